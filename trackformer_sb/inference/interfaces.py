"""Trained separators, ready for use.

``PerformerSeparation`` loads what ``export_separator`` writes, or a separator
of three modules from the hub.
"""

import os
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path

import soundfile
import torch
from tqdm import tqdm

from trackformer_sb.inference.hub import StrictPretrained
from trackformer_sb.inference.overlap_add import UNKNOWN_FRAMES, separate_stream
from trackformer_sb.inference.provenance import provenance, up_to_date
from trackformer_sb.inference.remix import (
    check_outputs,
    loudest_first,
    remix_gains,
)
from trackformer_sb.inference.separation import separate
from trackformer_sb.inference.writing import (
    check_paths,
    output_paths,
    write_sources,
)

ALL = "all"
PROGRESS = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s"


class PerformerSeparation(StrictPretrained):
    """A ready-to-use separator of music, of any three modules.

    Outputs come in the order of the model; those of ``separate_file`` sum to
    the file, and have names where the model has. Nothing is normalised.

    Arguments
    ---------
    modules : dict
        ``encoder``, ``masknet`` and ``decoder``, as in ``separate``.
    hparams : dict
        ``sample_rate`` in Hz and ``num_spks``; ``mixture_consistency`` if the
        outputs do not sum to the mixture by themselves; ``groups``, name ->
        tuple of outputs, if stems have names.
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

    @property
    def groups(self):
        """Outputs of each named stem, None where stems have no names."""
        return getattr(self.hparams, "groups", None)

    def named_outputs(self, outputs=None):
        """Which outputs ``separate_file`` writes, see there."""
        if outputs is None:
            return self.groups
        return None if outputs == ALL else outputs

    def _separate(self, mix, groups=None):
        est_source, _ = separate(
            mix.to(self.device),
            self.mods.encoder,
            self.mods.masknet,
            self.mods.decoder,
            getattr(self.hparams, "mixture_consistency", False),
            groups,
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
            [batch, time, sources], as of ``SepformerSeparation``: the outputs,
            or the named stems in their order where the model has names.
        """
        if mix.dim() != 2:
            raise ValueError(
                f"expected mix [batch, time], got {list(mix.shape)}"
            )
        groups = None if self.groups is None else self.groups.values()
        return self._separate(mix, groups).transpose(1, 2)

    def separate_channels(self, mix, groups=None):
        """Separates mixtures of several channels, which share the masks.

        Arguments
        ---------
        mix : torch.Tensor
            [batch, channels, time], at the rate of the model.
        groups : iterable of tuples of int, optional
            Outputs to add up, see ``separate``.

        Returns
        -------
        torch.Tensor
            [batch, sources, channels, time].
        """
        if mix.dim() != 3:
            raise ValueError(
                f"expected mix [batch, channels, time], got {list(mix.shape)}"
            )
        return self._separate(mix, groups)

    @torch.no_grad()
    def separate_file(
        self,
        path,
        out_folder=None,
        chunk_seconds=10.0,
        overlap=0.25,
        progressbar=True,
        batch_size=1,
        file_format="wav",
        outputs=None,
        ranked=False,
        remix=None,
        figure=False,
        skip_existing=False,
        stem=None,
        progress=None,
    ):
        """Separates a file of any length at its own rate and channels.

        Arguments
        ---------
        path : str or Path
            Audio file that libsndfile reads.
        out_folder : str or Path, optional
            Where to write one file per output: ``<stem>_drums.wav`` and so
            on, or ``<stem>_source0.wav`` where the model has no names. They
            appear when all of them are whole. Memory then does not depend on
            the length.
        chunk_seconds : float
            Length of what the model sees at once, in seconds.
        overlap : float
            Share of a chunk that overlaps with the next, in [0, 0.5]: a fifth
            of it is crossfaded, the rest is context.
        progressbar : bool
            Whether to show one.
        batch_size : int
            How many chunks go through the model at once.
        file_format : str
            wav (32-bit float), flac (24 bit) or ogg (Vorbis). What exceeds
            full scale is kept by wav; in flac and ogg, all outputs of the file
            are turned down alike, with a warning.
        outputs : str or dict, optional
            Which outputs to keep, or to sum into groups: ``"0,2"`` or
            ``"drums=0+3,rest=1+2"``; ``"none"`` for no output, only a remix or
            a figure; ``"all"``. By default the named stems, or all.
        ranked : bool
            Whether the outputs are numbered by their energy in this file, 0
            the loudest; otherwise as the model numbers them.
        remix : str or dict, optional
            Gains in dB of outputs or groups, ``"0:-inf,3:+3"``: writes their
            sum to ``<stem>_remix.wav``. Outputs not named stay as they are.
        figure : bool
            Whether to write ``<stem>_figure.png``: spectrograms of the mixture
            and of the outputs, and their levels over time.
        skip_existing : bool
            Whether to do nothing if all that would be written is there, not
            older than the file, and made of it by this model and these
            options.
        stem : str, optional
            What the names of the files begin with; that of ``path`` without
            its ending if not given.
        progress : callable, optional
            Called as ``progress(seconds_done, seconds_total)`` at the start
            and after each part of the file, and never if ``skip_existing``
            leaves nothing to do. The total is None for a stream of unknown
            length. What it raises ends the separation.

        Returns
        -------
        torch.Tensor or list of Path
            [sources, channels, time] at the rate of the file; with
            ``out_folder``, the written files: outputs, remix, figure. The sum
            of all outputs is the file.

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
        outputs = self.named_outputs(outputs)
        path = Path(path)
        if not path.is_file():
            what = (
                "a folder without audio files"
                if path.is_dir()
                else "no such audio file"
            )
            raise FileNotFoundError(f"{path}: {what}")
        if out_folder is None and (
            remix is not None or figure or skip_existing or file_format != "wav"
        ):
            raise ValueError(
                "expected out_folder with file_format, remix, figure or "
                "skip_existing"
            )
        if out_folder is None:
            if not check_outputs(outputs, self.hparams.num_spks):
                raise ValueError("expected an output to return")
        else:
            out_folder = Path(out_folder)
            stem = path.stem if stem is None else stem
            if Path(stem).name != stem:
                raise ValueError(f"stem: expected a file name, got {stem!r}")
            paths = output_paths(
                out_folder,
                stem,
                self.hparams.num_spks,
                file_format,
                outputs,
                remix,
                figure,
            )
            comment = self._comment(
                path, chunk_seconds, overlap, outputs, ranked, remix
            )
            if skip_existing and up_to_date(path, paths, comment):
                return paths
            check_paths(paths)
        separate_chunk = self.separate_channels
        chosen = check_outputs(outputs, self.hparams.num_spks)
        each_once = sorted(chain(*chosen.values())) == list(
            range(self.hparams.num_spks)
        )
        if self.groups is not None and each_once and not (ranked or remix):
            separate_chunk = partial(separate_chunk, groups=chosen.values())
            outputs = {name: (k,) for k, name in enumerate(chosen)}
        with ExitStack() as stack:
            # names need not be valid UTF-8
            try:
                reader = soundfile.SoundFile(os.fsencode(path))
            except TypeError as error:  # soundfile's own, of a .raw file
                raise ValueError(f"{path}: no audio file ({error})") from error
            stack.enter_context(reader)
            known = reader.frames != UNKNOWN_FRAMES
            seconds = reader.frames / reader.samplerate if known else None
            bar = tqdm(
                total=seconds,
                desc=path.name,
                disable=not progressbar,
                bar_format=PROGRESS if known else None,
            )
            stack.enter_context(bar)
            blocks = _counted(
                separate_stream(
                    reader,
                    separate_chunk,
                    self.hparams.sample_rate,
                    chunk_seconds,
                    overlap,
                    batch_size,
                    keep_order=self.groups is not None,
                ),
                bar,
                reader.samplerate,
                progress or (lambda done, total: None),
                seconds,
            )
            if out_folder is None:
                est_source = torch.cat(list(blocks), dim=-1)
                return _chosen(est_source, outputs, ranked)
            return write_sources(
                blocks,
                reader,
                out_folder,
                stem,
                file_format,
                outputs,
                ranked,
                remix,
                figure,
                comment,
            )

    def _comment(self, path, chunk_seconds, overlap, outputs, ranked, remix):
        """What `separate_file` writes into its files, see ``provenance``."""
        num_spks = self.hparams.num_spks
        outputs = check_outputs(outputs, num_spks)
        gains = None if remix is None else remix_gains(remix, outputs, num_spks)
        return provenance(
            path,
            dict(self.mods.items()),
            sample_rate=self.hparams.sample_rate,
            mixture_consistency=getattr(
                self.hparams, "mixture_consistency", False
            ),
            chunk_seconds=float(chunk_seconds),
            overlap=float(overlap),
            outputs=outputs,
            ranked=ranked,
            gains=gains,
        )

    def forward(self, mix):
        """Separates a batch, see ``separate_batch``."""
        return self.separate_batch(mix)


def _counted(blocks, bar, sample_rate, progress, seconds):
    """Moves the progress as blocks pass by."""
    frames = 0
    progress(0.0, seconds)
    for block in blocks:
        yield block
        frames += block.shape[-1]
        bar.update(block.shape[-1] / sample_rate)
        progress(frames / sample_rate, seconds)


def _chosen(est_source, outputs, ranked):
    """The wanted outputs, or sums of them, [outputs, channels, time]."""
    if ranked:
        energies = est_source.double().square().sum((1, 2)).tolist()
        est_source = est_source[loudest_first(energies)]
    if outputs is None:
        return est_source
    chosen = check_outputs(outputs, len(est_source)).values()
    return torch.stack([est_source[list(x)].sum(0) for x in chosen])
