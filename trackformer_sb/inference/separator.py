"""The separator: its parts in plain values, and its weights, in a folder."""

import importlib
import inspect
import json
import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import trackformer_sb
from trackformer_sb.audio import name_of, open_audio
from trackformer_sb.inference.counting import (
    Likeness,
    SongCount,
    sounding_mixes,
)
from trackformer_sb.inference.hub import HubModel, is_part, plain_values
from trackformer_sb.inference.overlap_add import separate_stream
from trackformer_sb.inference.remix import (
    check_outputs,
    chosen_stems,
    mix_gains,
    pan_matrix,
)
from trackformer_sb.inference.separation import separate
from trackformer_sb.inference.spatial import keep_sides
from trackformer_sb.inference.writing import write_sources
from trackformer_sb.nnet.stft import STFTEncoder
from trackformer_sb.paths import expanded, shortened

ALL, AUTO = "all", "auto"
KARAOKE, KEEP_BACKING = "karaoke", "karaoke+backing"
PARTS = {"encoder": "Encoder", "masknet": "MaskNet", "decoder": "Decoder"}
PROGRESS = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s"

LOW_CLASSES = ("drums", "bass")  # share the low-frequency channel of 5.1
MAX_CHANNELS = 64  # more are samples

YAML_FILE = "hyperparams.yaml"

# For the interfaces of SpeechBrain, which load yamls.
YAML = """\
# {title}
# For SpeechBrain's from_hparams, written by trackformer_sb {version};
# `trackformer separate song.wav --model FOLDER` reads config.json.
sample_rate: {sample_rate}
num_spks: {num_stems}
classes: {classes}
mixture_consistency: {mixture_consistency}

Encoder: {encoder}
MaskNet: {masknet}
Decoder: {decoder}

StemMaskNet: !new:trackformer_sb.inference.separator.StemMaskNet
  masknet: !ref <MaskNet>
  num_stems: !ref <num_spks>

modules:
  encoder: !ref <Encoder>
  masknet: !ref <StemMaskNet>
  decoder: !ref <Decoder>

audio_normalizer: !new:speechbrain.dataio.preprocess.AudioNormalizer
  sample_rate: !ref <sample_rate>
  mix: keep

pretrainer: !new:trackformer_sb.inference.speechbrain.SafetensorsPretrainer
  loadables:
    encoder: !ref <Encoder>
    masknet: !ref <MaskNet>
    decoder: !ref <Decoder>
"""

TEXT = """\
Separates music into {stems}, which sum to it.

## How to use

```shell
trackformer separate song.wav --model path/to/this/folder
```

```python
from trackformer_sb.inference.separator import Separator

separator = Separator.from_pretrained("path/to/this/folder")
paths = separator.separate_file("song.wav", out_folder="stems")
stems = separator.separate(song)  # [channels, time] at {sample_rate} Hz
```

Neither runs code of this folder. `hyperparams.yaml` is code, for interfaces
that load it: `SepformerSeparation` of SpeechBrain gives the outputs in their
order, and its `separate_file` scales each to a peak of one.
`trackformer_sb.asteroid.SeparatorModel` is the same model in Asteroid.

## Limits

- It works at {sample_rate} Hz. Files of other rates are resampled; what it
  cannot represent is distributed evenly over the outputs.
- Channels share their masks; a filter tells stems apart by their places too.
- Long files are separated in chunks that overlap.
"""

UNNAMED = """\
- The outputs have no names: MixIT (arXiv 2006.12701), which needs no separated
  stems, does not tell which of them are the drums. An instrument can be spread
  over several outputs, and several can share one. Outputs are aligned where
  chunks overlap, so that silence or a change of the music there can swap them.
"""


def _class_of(part):
    module, _, name = part["class"].rpartition(".")
    return getattr(importlib.import_module(module), name)


def _complete(value):
    """A part with the defaults of its class; plain values as they are."""
    if not is_part(value):
        return value
    parameters = inspect.signature(_class_of(value)).parameters.values()
    defaults = {
        p.name: p.default for p in parameters if p.default is not p.empty
    }
    given = {name: _complete(inner) for name, inner in value.items()}
    return {"class": value["class"], **defaults, **given}


def _built(value):
    """The module that a part describes; plain values as they are."""
    if not is_part(value):
        return value
    cls = _class_of(value)
    return cls(**{k: _built(v) for k, v in value.items() if k != "class"})


def _yaml_node(value):
    """A part as yaml, of which JSON is a kind."""
    if not is_part(value):
        return json.dumps(value)
    arguments = [
        f'"{name}": {_yaml_node(inner)}'
        for name, inner in value.items()
        if name != "class"
    ]
    return f"!new:{value['class']} {{{', '.join(arguments)}}}"


def unwrapped(module):
    """The module inside of DDP, DataParallel and torch.compile."""
    wrappers = nn.parallel.DistributedDataParallel, nn.DataParallel
    if isinstance(module, wrappers):
        return unwrapped(module.module)
    if hasattr(module, "_orig_mod"):
        return unwrapped(module._orig_mod)
    return module


class StemMaskNet(nn.Module):
    """A masknet with one mask per stem, the sum of its slots.

    For the yaml of a folder: SpeechBrain knows no groups of outputs.
    """

    def __init__(self, masknet, num_stems):
        super().__init__()
        self.masknet = masknet
        self.num_stems = num_stems
        self.stereo = getattr(masknet, "stereo", False)

    def forward(self, mix_w):
        """Predicts masks [num_stems, batch, channels, frames]."""
        return self.masknet(mix_w).unflatten(0, (self.num_stems, -1)).sum(1)


class Separator(
    HubModel,
    pipeline_tag="audio-to-audio",
    tags=[
        "speechbrain",
        "audio-source-separation",
        "music-source-separation",
        "unsupervised",
        "mixit",
    ],
):
    """A song goes in, its stems come out.

    Each part is a dict with the name of its "class", such as
    ``trackformer_sb.nnet.masknet.PerformerMaskNet``, and the arguments of it:
    so ``config.json`` has them. A separator of modules as they are cannot be
    saved.

    Arguments
    ---------
    encoder, masknet, decoder : dict or torch.nn.Module
        As of ``trackformer_sb.inference.separation.separate``.
    sample_rate : int
        Rate of the waveforms in Hz.
    num_spks : int
        Number of outputs of the masknet.
    classes : list of str, optional
        Names of the stems, each of as many outputs, which follow each other;
        without, each output is a stem.
    mixture_consistency : bool, optional
        Whether what the outputs lack of the mixture is distributed evenly over
        them. By default, unless the masks are a softmax on an STFT: those sum
        to it by themselves.
    counter : dict or torch.nn.Module, optional
        Of instruments and sounding classes, see ``nnet.counting.Counter``.

    Raises
    ------
    ImportError
        If a class is not installed.
    ValueError
        For a number of outputs that the classes do not divide.

    Example
    -------
    >>> stft = {"n_fft": 128, "hop_length": 32}
    >>> separator = Separator(
    ...     encoder={"class": "trackformer_sb.nnet.stft.STFTEncoder", **stft},
    ...     masknet={
    ...         "class": "trackformer_sb.nnet.masknet.PerformerMaskNet",
    ...         **{"in_channels": 65, "num_spks": 4},
    ...         **{"d_model": 16, "num_layers": 1},
    ...     },
    ...     decoder={"class": "trackformer_sb.nnet.stft.STFTDecoder", **stft},
    ...     sample_rate=44100,
    ...     num_spks=4,
    ...     classes=["vocals", "rest"],
    ... ).eval()
    >>> song = torch.randn(2, 5000)
    >>> stems = separator.separate(song)
    >>> list(stems)
    ['vocals', 'rest']
    >>> torch.allclose(stems["vocals"] + stems["rest"], song, atol=1e-5)
    True
    """

    def __init__(
        self,
        encoder,
        masknet,
        decoder,
        sample_rate,
        num_spks,
        classes=None,
        mixture_consistency=None,
        counter=None,
    ):
        super().__init__()
        parts = {"encoder": encoder, "masknet": masknet, "decoder": decoder}
        parts["counter"] = counter
        for name, part in parts.items():
            parts[name] = _complete(part)
            self.add_module(name, _built(parts[name]))
        if classes is not None and num_spks % len(classes):
            raise ValueError(
                f"num_spks: expected a multiple of {len(classes)}, the number "
                f"of classes, got {num_spks}"
            )
        if mixture_consistency is None:
            activation = getattr(self.masknet, "mask_activation", "softmax")
            on_stft = isinstance(self.encoder, STFTEncoder)
            mixture_consistency = not (on_stft and activation == "softmax")
        self.sample_rate, self.num_spks = sample_rate, num_spks
        self.mixture_consistency = mixture_consistency
        self.groups = self.lfe = None
        if classes is not None:
            slots = num_spks // len(classes)
            self.groups = {
                name: tuple(range(k * slots, (k + 1) * slots))
                for k, name in enumerate(classes)
            }
            low = [self.groups[x] for x in LOW_CLASSES if x in self.groups]
            self.lfe = [output for group in low for output in group] or None
        self.config = {
            "sample_rate": sample_rate,
            "num_spks": num_spks,
            "classes": None if classes is None else list(classes),
            "mixture_consistency": mixture_consistency,
            **parts,
        }

    @property
    def title(self):
        """The first line of card and yaml."""
        names = ", ".join(self.groups or [f"{self.num_spks} outputs"])
        return f"Separator of {names} at {self.sample_rate} Hz"

    @property
    def text(self):
        """What the card says of all separators."""
        stems = ", ".join(self.groups or [f"{self.num_spks} waveforms"])
        text = TEXT.format(stems=stems, sample_rate=self.sample_rate)
        return text if self.groups else text + UNNAMED

    @property
    def device(self):
        """Where the weights are."""
        return next(self.parameters()).device

    def _separated(self, mix, groups, spatial=False):
        if isinstance(mix, np.ndarray):
            mix = torch.from_numpy(np.ascontiguousarray(mix))
        if not mix.is_floating_point():
            raise TypeError(
                f"expected floating-point samples in [-1, 1], got {mix.dtype}"
            )
        if mix.dim() == 3 and mix.shape[1] > MAX_CHANNELS:
            raise ValueError(
                f"expected [batch, channels, time], got {list(mix.shape)}"
            )
        # only a learned encoder wants the type of its weights
        weight = next(self.encoder.parameters(), mix)
        on_stft = isinstance(self.encoder, STFTEncoder)
        est_source, _ = separate(
            mix.to(self.device, weight.dtype),
            self.encoder,
            self.masknet,
            self.decoder,
            self.mixture_consistency,
            groups,
            self.lfe,
            # only stems have places, and only an STFT has their phases
            spatial and groups is not None and on_stft,
        )
        return est_source.to(mix.dtype)

    def forward(self, mix):
        """Separates mixtures at the rate of the model.

        In ``half()`` or ``bfloat16()`` too: the STFT stays in float32.

        Arguments
        ---------
        mix : torch.Tensor or numpy.ndarray
            [batch, time] or [batch, channels, time].

        Returns
        -------
        torch.Tensor
            [batch, stems, time] or [batch, stems, channels, time], of the type
            of ``mix``, on the device of the model.
        """
        return self._separated(mix, self.groups and self.groups.values())

    @torch.no_grad()
    def separate(self, waveform, spatial=True):
        """Separates a waveform at the rate of the model.

        Arguments
        ---------
        waveform : torch.Tensor or numpy.ndarray
            [channels, time], in numpy too. For files, and for songs of any
            length, see ``separate_file``.
        spatial : bool
            Whether named stems are told apart by their places between the
            channels too, see ``spatial.wiener``; else by masks alone.

        Returns
        -------
        dict
            Name -> [channels, time]; the stems sum to the waveform. Without
            classes, names are source0, source1 and so on.
        """
        names = check_outputs(self.groups, self.num_spks)
        groups = self.groups and self.groups.values()
        stems = self._separated(waveform[None], groups, spatial)
        return dict(zip(names, stems[0]))

    def mixes(self, outputs=None, remix=None):
        """What ``separate_file`` writes, see ``mix_gains``."""
        if outputs == AUTO and self.groups and self.counter is None:
            raise ValueError(
                "auto: expected a model with a counter, see recipes/count.py"
            )
        if outputs in (None, AUTO):
            outputs = self.groups
        elif outputs == ALL:
            outputs = None
        elif outputs in (KARAOKE, KEEP_BACKING):
            _, *rest = chosen_stems("vocals", self.groups).values()
            if not rest:
                raise ValueError(
                    "karaoke: expected a model of more stems than vocals"
                )
            outputs = {KARAOKE: rest[0]}
        outputs = check_outputs(outputs, self.num_spks)
        stems = check_outputs(self.groups, self.num_spks)
        return mix_gains(outputs, remix, self.num_spks, stems)

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
        song_folders=False,
        spatial=True,
        on_count=None,
    ):
        """Separates a file of any length at its own rate and channels.

        Arguments
        ---------
        path : str or Path
            Audio file, or film, that libsndfile or FFmpeg reads.
        out_folder : str or Path, optional
            Where to write one file per output: ``song_drums.wav`` and so on,
            or ``song_source0.wav`` where the model has no names. They appear
            when all of them are whole. Memory then does not depend on the
            length.
        chunk_seconds : float
            Length of what the model sees at once, in seconds.
        overlap : float
            Share of a chunk that overlaps with the next, in [0, 0.5]: a fifth
            of it is crossfaded, the rest is context.
        progressbar : bool or callable
            Whether to show one; or what is called instead, as
            ``progressbar(seconds_done, seconds_total)``, at the start and
            after each part of the file. What it raises ends the separation.
        batch_size : int
            How many chunks go through the model at once.
        file_format : str
            wav (32-bit float), flac (24 bit), ogg (Vorbis), mp3 or m4a (AAC);
            ``"same"``: that of the file, or what is nearest, with a warning.
            What exceeds full scale is kept by wav; in the others, all outputs
            of the file are turned down alike, with a warning. Title (with the
            output's name), artist, album and so on are those of the file; mp3,
            m4a and flac have its cover.
        outputs : str or dict, optional
            Which outputs to keep, or to sum into groups: ``"0,2"`` or
            ``"drums=0+3,rest=1+2"``; ``"none"`` for no output, only a remix or
            a figure; ``"all"``; ``"auto"``: those that sound, of which "other",
            or else the loudest, takes in what the silent ones hold, and one for
            outputs without names that are one instrument; ``"karaoke"``: all
            but the vocals, as one; ``"karaoke+backing"``: also what of the
            vocals is not in the centre of stereo, backing voices at the sides
            and some reverberation. By default the named stems, or all.
        ranked : bool
            Whether the outputs are numbered by their energy in this file, 0
            the loudest; otherwise as the model numbers them.
        remix : str or dict, optional
            Gains in dB of outputs or stems, ``"0:-inf,3:+3"``: writes their sum
            to ``song_remix.wav``, turned down, with a warning, where its true
            peak exceeds -1 dB. Outputs not named stay as they are. In the
            text, ``"other@0.5"`` moves a stem in all that is written, -1 to
            the left, 1 to the right, see ``pan_matrix``; mono becomes stereo.
        figure : bool
            Whether to write ``song_figure.png``: spectrograms of the mixture
            and of the outputs, and how many instruments sound if the model
            has a counter.
        song_folders : bool
            Whether to write ``song/drums.wav`` in place of ``song_drums.wav``.
        spatial : bool
            As of ``separate``; without effect where outputs or a remix tell
            apart what belongs to one stem, and on ranked outputs.
        on_count : callable, optional
            Called at the end by a model with a counter, with how many
            instruments sound: ``{"mean": 3.2, "curve": [of each second]}``.

        Returns
        -------
        torch.Tensor or list of Path
            [sources, channels, time] at the rate of the file, the remix last;
            with ``out_folder``, the written files: outputs, remix, figure. The
            sum of all outputs is the file.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If an argument is out of its range, or the format cannot hold the
            channels of the file or, as ogg, its rate.
        UnreadableAudio
            If the file is no audio, empty, truncated or holds NaN or infinite
            samples.
        """
        names, gains, pans = self.mixes(outputs, remix)
        path = Path(expanded(path))
        if not path.is_file():
            what = "no such audio file"
            if path.is_dir():
                what = "a folder without audio files"
            raise FileNotFoundError(f"{path}: {what}")
        groups = None
        if self.groups is not None and not ranked:
            # of named stems all outputs have the same gain and place
            slots = np.vstack([gains, pans])[:, list(self.groups.values())]
            if (slots == slots[..., :1]).all():
                groups = self.groups.values()
                gains, pans = slots[:-1, :, 0], slots[-1, :, 0]
        with ExitStack() as stack:
            reader = stack.enter_context(open_audio(path))
            count = choose = None
            if self.counter is not None:
                seconds = reader.frames / reader.samplerate
                count = SongCount(self.counter, seconds, chunk_seconds, overlap)
                hook = self.masknet.register_forward_hook(count)
                stack.enter_context(hook)
            if outputs == KEEP_BACKING:
                vocals = list(self.groups["vocals"])
                rest = max({*range(self.num_spks)} - {*vocals})
                hook = partial(keep_sides, vocals, rest)
                hook = self.masknet.register_forward_hook(hook)
                stack.enter_context(hook)
            blocks = separate_stream(
                reader,
                lambda mix: self._separated(mix, groups, spatial),
                self.sample_rate,
                chunk_seconds,
                overlap,
                batch_size,
                keep_order=self.groups is not None,
            )
            blocks = _counted(blocks, reader, progressbar)
            channels = reader.channels
            if pans.any():
                places = np.stack([pan_matrix(x, channels) for x in pans])
                places = torch.from_numpy(places.astype("float32"))
                blocks = (places @ block for block in blocks)
                channels = 2
            if outputs == AUTO:
                heard = count
                if self.groups is None:
                    heard = Likeness()
                    blocks = heard.watch(blocks)
                choose = partial(sounding_mixes, names, gains, heard)
            elif ranked:
                choose = partial(_loudest_first, names, gains)
            if out_folder is not None:
                results = write_sources(
                    blocks,
                    reader,
                    Path(expanded(out_folder)),
                    shortened(path.stem),
                    names,
                    gains,
                    file_format,
                    choose,
                    figure,
                    song_folders,
                    count,
                    channels,
                )
            else:
                est_source = torch.cat(list(blocks), dim=-1)
                if choose is not None:
                    energies = est_source.double().square().sum((1, 2))
                    _, gains = choose(energies.numpy())
                gains = torch.from_numpy(gains)
                results = torch.tensordot(gains, est_source, 1)
        if count is not None and on_count is not None:
            on_count(count.record())
        return results

    @classmethod
    def of_recipe(cls, hparams_file, modules=None):
        """A separator of what a recipe trains, on the CPU, in evaluation mode.

        Of the yaml as ``create_experiment_directory`` leaves it, with the three
        parts as ``!new:`` nodes with arguments by name, else a ValueError says
        so; and with the weights of the trained `modules`, if they are given,
        also wrapped by DDP or torch.compile. Those without may be missing.
        """
        hparams = plain_values(Path(hparams_file).read_text("utf-8"))
        parts = {name: hparams.get(key) for name, key in PARTS.items()}
        if not all(map(is_part, parts.values())):
            raise ValueError(
                f"{hparams_file}: expected {', '.join(PARTS.values())} as "
                "!new: with arguments by name"
            )
        keys = ("sample_rate", "num_spks", "classes", "mixture_consistency")
        # without touching the random state of a training
        with torch.random.fork_rng(devices=[]):
            separator = cls(
                **parts, **{key: hparams[key] for key in keys if key in hparams}
            )
        for name, part in separator.named_children():
            if modules is not None and part.state_dict():
                part.load_state_dict(unwrapped(modules[name]).state_dict())
        return separator.eval()

    def _save_pretrained(self, save_directory):
        """Writes config and weights, and a yaml for both."""
        super()._save_pretrained(save_directory)
        config = self.config
        num_stems = len(self.groups or range(self.num_spks))
        text = YAML.format(
            title=self.title,
            version=trackformer_sb.__version__,
            sample_rate=self.sample_rate,
            num_stems=num_stems,
            classes=json.dumps(config["classes"]),
            mixture_consistency=json.dumps(self.mixture_consistency),
            **{name: _yaml_node(config[name]) for name in PARTS},
        )
        (Path(save_directory) / YAML_FILE).write_text(text, "utf-8")


def _loudest_first(names, gains, energies):
    """Names, and gains of sources that are numbered by their energy."""
    rank = np.argsort(np.argsort(-energies, kind="stable"))
    return names, gains[:, rank]


def _counted(blocks, reader, progressbar):
    """The blocks, while a bar or a callable is told how far they are."""
    rate = reader.samplerate
    seconds = reader.frames / rate
    bar = tqdm(
        total=seconds,
        desc=os.path.basename(name_of(reader)),
        disable=callable(progressbar) or not progressbar,
        bar_format=PROGRESS,
        leave=None,
    )
    tell = progressbar if callable(progressbar) else lambda done, total: None
    frames = 0
    with bar:
        tell(0.0, seconds)
        for block in blocks:
            yield block
            frames += block.shape[-1]
            bar.update(block.shape[-1] / rate)
            tell(frames / rate, seconds)


def find_device(device=None):
    """The device asked for, by default the fastest: CUDA, else MPS, else CPU.

    If it is not there, a ValueError says what there is.
    """
    there = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        there.append("mps")
    there.append("cpu")
    name = str(device or there[0])
    if name not in there and not (name == "cuda" and "cuda:0" in there):
        raise ValueError(
            f"device {name}: expected what this machine has, {', '.join(there)}"
        )
    return name


def load_separator(source="default", device=None):
    """A separator on a device, see ``from_pretrained`` and ``find_device``."""
    return Separator.from_pretrained(source).to(find_device(device))
