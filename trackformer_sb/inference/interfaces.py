"""Trained separators, ready for use.

``PerformerSeparation`` loads what ``export_separator`` writes, or a separator
of three modules from the hub.
"""

from contextlib import ExitStack
from pathlib import Path

import soundfile
import torch
from tqdm import tqdm

from trackformer_sb.inference.hub import StrictPretrained
from trackformer_sb.inference.overlap_add import (
    UNKNOWN_FRAMES,
    separate_stream,
    write_sources,
)
from trackformer_sb.inference.separation import separate

PROGRESS = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s"


class PerformerSeparation(StrictPretrained):
    """A ready-to-use separator of music, of any three modules.

    The outputs have no names and come in the order of the model; those of
    ``separate_file`` sum to the file. Nothing is normalised.

    Arguments
    ---------
    modules : dict
        ``encoder``, ``masknet`` and ``decoder``, as in ``separate``.
    hparams : dict
        ``sample_rate`` in Hz and ``num_spks``; ``mixture_consistency`` if the
        outputs do not sum to the mixture by themselves.
    **kwargs : dict
        ``run_opts`` and ``freeze_params`` of ``Pretrained``.

    Raises
    ------
    ValueError
        If a module or a hyperparameter is missing.

    Example
    -------
    >>> from trackformer_sb.nnet.masknet import PerformerMaskNet
    >>> from trackformer_sb.nnet.stft import STFTDecoder, STFTEncoder
    >>> separator = PerformerSeparation(
    ...     modules={
    ...         "encoder": STFTEncoder(),
    ...         "masknet": PerformerMaskNet(513, 4, d_model=32, num_layers=1),
    ...         "decoder": STFTDecoder(),
    ...     },
    ...     hparams={"sample_rate": 44100, "num_spks": 4},
    ...     run_opts={"device": "cpu"},
    ... )
    >>> mix = torch.randn(2, 5000)
    >>> est_source = separator.separate_batch(mix)
    >>> est_source.shape
    torch.Size([2, 5000, 4])
    >>> torch.allclose(est_source.sum(-1), mix, atol=1e-5)
    True
    """

    what = "separator"
    MODULES_NEEDED = ("encoder", "masknet", "decoder")
    HPARAMS_NEEDED = ("sample_rate", "num_spks")

    def __init__(self, modules=None, hparams=None, **kwargs):
        missing = [
            name for name in self.MODULES_NEEDED if name not in (modules or {})
        ]
        if missing:
            raise ValueError(
                f"expected the modules {', '.join(self.MODULES_NEEDED)}, "
                f"missing {', '.join(missing)}"
            )
        super().__init__(modules=modules, hparams=hparams, **kwargs)

    def _separate(self, mix):
        est_source, _ = separate(
            mix.to(self.device),
            self.mods.encoder,
            self.mods.masknet,
            self.mods.decoder,
            getattr(self.hparams, "mixture_consistency", False),
        )
        return est_source

    def separate_batch(self, mix):
        """Separates a batch of mixtures at the rate of the model.

        Arguments
        ---------
        mix : torch.Tensor
            [batch, time].

        Returns
        -------
        torch.Tensor
            [batch, time, sources], as of ``SepformerSeparation``.
        """
        if mix.dim() != 2:
            raise ValueError(
                f"expected mix [batch, time], got {list(mix.shape)}"
            )
        return self._separate(mix).transpose(1, 2)

    def separate_channels(self, mix):
        """Separates mixtures of several channels, which share the masks.

        Arguments
        ---------
        mix : torch.Tensor
            [batch, channels, time], at the rate of the model.

        Returns
        -------
        torch.Tensor
            [batch, sources, channels, time].
        """
        if mix.dim() != 3:
            raise ValueError(
                f"expected mix [batch, channels, time], got {list(mix.shape)}"
            )
        return self._separate(mix)

    @torch.no_grad()
    def separate_file(
        self,
        path,
        out_folder=None,
        chunk_seconds=10.0,
        overlap=0.25,
        progressbar=True,
    ):
        """Separates a file of any length at its own rate and channels.

        Arguments
        ---------
        path : str or Path
            Audio file that libsndfile reads.
        out_folder : str or Path, optional
            Where to write one float wav per output: ``<stem>_source0.wav`` and
            so on. They appear when all of them are whole. Memory then does
            not depend on the length.
        chunk_seconds : float
            Length of what the model sees at once, in seconds.
        overlap : float
            Share of a chunk that overlaps with the next, in [0, 0.5].
        progressbar : bool
            Whether to show one.

        Returns
        -------
        torch.Tensor or list of Path
            [sources, channels, time] at the rate of the file; with
            ``out_folder``, the written files. Their sum is the file.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file is empty, truncated or holds NaN or infinite samples,
            or an argument is out of its range.
        soundfile.LibsndfileError
            If the file is no audio.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such audio file")
        with ExitStack() as stack:
            reader = stack.enter_context(soundfile.SoundFile(path))
            known = reader.frames != UNKNOWN_FRAMES
            bar = tqdm(
                total=reader.frames / reader.samplerate if known else None,
                desc=path.name,
                disable=not progressbar,
                bar_format=PROGRESS if known else None,
            )
            stack.enter_context(bar)
            blocks = _counted(
                separate_stream(
                    reader,
                    self.separate_channels,
                    self.hparams.sample_rate,
                    chunk_seconds,
                    overlap,
                ),
                bar,
                reader.samplerate,
            )
            if out_folder is None:
                return torch.cat(list(blocks), dim=-1)
            return write_sources(blocks, reader, Path(out_folder), path.stem)

    def forward(self, mix):
        """Separates a batch, see ``separate_batch``."""
        return self.separate_batch(mix)


def _counted(blocks, bar, sample_rate):
    """Moves the progress bar as blocks pass by."""
    for block in blocks:
        yield block
        bar.update(block.shape[-1] / sample_rate)
