"""How well separators do on songs with stems, as ``trackformer evaluate`` says.

Songs are separated in windows, one by one; what is left at the end is dropped.
Figures are in dB, means of windows, of stereo averaged to mono; masks are
measured, without the filter by places that ``trackformer separate`` has.

By name, the outputs of a class against its stem (``remix.STEM_CLASSES``; where
a song has no bass, bass and other against other), nothing chosen: `si_snri`,
the improvement of SI-SNR over the mixture, `si_sdr` and `sdr` of the `windows`
in which the stem has between 0.1 % and 98 % of the mixture's energy; `leakage`,
how far the output is below the mixture where the stem is silent (-60 dB of it);
`museval`, SDR as museval has it (BSSEval v4, images), of all channels: the
median of the song's seconds, without those in which a stem or an output is
digital silence, and of several songs the mean.

Chosen by the truth, for single stems: `one_to_one` and `grouped`, SI-SNR
improvement as of ``metrics.si_snri`` and ``si_snri_grouped``, `si_sdr` and
`sdr` one to one. `sdr` is BSSEval's with a filter of 512 taps; `pesq`, a
measure of speech, is of the output for vocals, without names of the nearest.

Masks are measured twice, the second time averaged over the window by the power
of the mixture: what is lost is what is gained by following the music.
"""

from collections import defaultdict
from itertools import product
from pathlib import Path
from pickle import UnpicklingError
from statistics import fmean, median

import torch
from speechbrain.inference.separation import SepformerSeparation

from trackformer_sb.data.remix import STEM_CLASSES, read_stems, sum_by_class
from trackformer_sb.inference.separation import separate_by_both
from trackformer_sb.inference.separator import find_device, load_separator
from trackformer_sb.objectives import metrics
from trackformer_sb.objectives.named import (
    leakage,
    named_si_snri,
    pair_by_class,
)

MEASURES = (
    *("si_snri", "leakage", "one_to_one", "grouped", "si_sdr", "sdr"),
    *("museval", *["pesq"] * metrics.HAS_PESQ),
)
COLUMNS = ("masks", "class", "windows", *MEASURES)
MASKS = ("as they are", "averaged")
MEAN, CHOSEN = "mean", "chosen"  # in the place of a class


def by_masks(separator):
    """The ``separate_window`` of ``measure_song`` for a ``Separator``."""
    groups, classes = separator.groups or {}, None
    if groups and groups.keys() <= STEM_CLASSES.keys():
        classes = [name for name, slots in groups.items() for _ in slots]
    parts = separator.encoder, separator.masknet, separator.decoder

    def separate_window(mix, stems):
        how = *parts, separator.mixture_consistency
        return separate_by_both(mix.to(separator.device), *how), classes

    return separate_window


def by_outputs(forward, device):
    """The same for [batch, time] -> [batch, sources, time], without names."""

    def separate_window(mix, stems):
        est_source = forward(mix.mean(0, keepdim=True).to(device))
        return (est_source[0].unsqueeze(1),), None

    return separate_window


def load_evaluated(source, library="trackformer", device=None):
    """The ``separate_window`` of a model, and its rate in Hz.

    `library` is trackformer; asteroid: a file, a folder with pytorch_model.bin
    or an id on the hub, a pickle of which tensors and plain values are read and
    no more; or speechbrain: what ``SepformerSeparation.from_hparams`` takes,
    which runs the yaml. A ValueError says that the source is no such model.
    """
    if library == "trackformer":
        separator = load_separator(source, device)
        return by_masks(separator), separator.sample_rate
    device = find_device(device)
    try:
        if library == "asteroid":
            from asteroid.models import BaseModel  # an optional extra

            if Path(source).is_dir():
                source = str(Path(source) / "pytorch_model.bin")
            # in its files beside plain values
            version = [torch.torch_version.TorchVersion]
            with torch.serialization.safe_globals(version):
                model = BaseModel.from_pretrained(source).to(device).eval()
            return by_outputs(model, device), int(model.sample_rate)
        options = {"device": device}
        model = SepformerSeparation.from_hparams(source, run_opts=options)
        return by_outputs(
            lambda mix: model.separate_batch(mix).transpose(1, 2), device
        ), model.hparams.sample_rate
    except (AttributeError, LookupError, TypeError, UnpicklingError) as error:
        raise ValueError(
            f"{source}: expected a separator of {library} ({error})"
        ) from error


def window_sdr(est_stems, stems, length):
    """SDR of BSSEval v4 (images) in windows of `length` samples.

    |s|^2 / |s - s'|^2: its parts for spatial distortion, interference and
    artefacts sum to the whole error, so that the 512 taps of its filters do not
    matter. Of [classes, channels, time], [classes, windows] in dB, within
    +-120; NaN where any is digital silence.
    """
    length = min(length, stems.shape[-1])
    est_stems, stems = (
        sig.unfold(-1, length, length).double() for sig in (est_stems, stems)
    )
    energy, est_energy, error = (
        sig.square().sum((1, 3))
        for sig in (stems, est_stems, est_stems - stems)
    )
    silent = (energy == 0).any(0) | (est_energy == 0).any(0)
    ratio = 10 * (energy / error).log10()
    ratio = ratio.clamp(-metrics.LIMIT_DB, metrics.LIMIT_DB)
    return torch.where(silent, torch.nan, ratio)


def _measure_window(slots, slot_classes, files, sample_rate):
    """Yields class, measure and value, None or NaN for what does not count."""
    single = torch.stack([sig.mean(0) for sig in files.values()])
    mono, mix, stems = slots.mean(1), single.sum(0), sum_by_class(files)
    yield CHOSEN, "one_to_one", metrics.si_snri(mono, single, mix)[0]
    if len(mono) <= metrics.MAX_GROUPED:
        grouped, _ = metrics.si_snri_grouped(mono, single, mix)
        yield CHOSEN, "grouped", grouped
    yield CHOSEN, "si_sdr", metrics.si_sdr(mono, single)
    yield CHOSEN, "sdr", metrics.sdr(mono, single)
    if slot_classes and len(stems) > 1:
        names, *pair = pair_by_class(slots, slot_classes, stems)
        there = [i for i, name in enumerate(names) if name in stems]
        seconds = window_sdr(*(sig[there] for sig in pair), sample_rate)
        for i, values in zip(there, seconds.tolist()):
            yield from ((names[i], "museval", value) for value in values)
        est_stems, true = (sig.mean(1) for sig in pair)
        gained = named_si_snri(est_stems, true, mix)
        below = leakage(est_stems, true, mix)
        for i, name in enumerate(names):
            yield name, "si_snri", gained[i]
            yield name, "leakage", below[i]
            if gained[i].isfinite():
                yield name, "si_sdr", metrics.si_sdr(est_stems[[i]], true[[i]])
                yield name, "sdr", metrics.sdr(est_stems[[i]], true[[i]])
        if "vocals" in names:
            mono = est_stems[[names.index("vocals")]]
    if metrics.HAS_PESQ and "vocals" in stems:
        vocals = stems["vocals"].mean(0)
        yield CHOSEN, "pesq", metrics.pesq(mono, vocals, sample_rate)


@torch.no_grad()
def measure_song(separate_window, sample_rate, song, seconds=3.0):
    """Measures of the windows of a ``Song``, read one by one.

    ``separate_window`` takes a mixture [channels, time] and, for oracles, name
    -> stem. It gives slots [slots, channels, time] by masks as they are and, if
    it has masks, averaged; and the class of each slot, None without names.
    Returns a list of (masks, class or "chosen", measure, value).
    """
    found, of_seconds = [], defaultdict(list)
    for number in range(int(song.seconds // seconds)):
        files = read_stems(song, number * seconds, seconds, sample_rate)
        kinds, classes = separate_window(sum(files.values()), files)
        for masks, slots in zip(MASKS, kinds):
            what = slots.cpu(), classes, files, sample_rate
            for name, measure, value in _measure_window(*what):
                if value is None or value != value:
                    continue
                if measure == "museval":
                    of_seconds[masks, name, measure].append(value)
                else:
                    found.append((masks, name, measure, float(value)))
    medians = [(*what, median(some)) for what, some in of_seconds.items()]
    return found + medians


def averages(found, measures=MEASURES):
    """Rows of what ``measure_song`` found in one or more songs.

    Masks, class, number of windows that count, and mean of each measure, None
    without any; of the class "mean" the means of those before.
    """
    values = defaultdict(list)
    for *what, value in found:
        values[tuple(what)].append(value)
    for (masks, name, measure), some in list(values.items()):
        if name != CHOSEN:
            values[masks, MEAN, measure].append(fmean(some))
    rows = []
    for masks, name in product(MASKS, (*STEM_CLASSES, MEAN, CHOSEN)):
        row = [values.get((masks, name, measure)) for measure in measures]
        if any(row):
            counted = {CHOSEN: "one_to_one", MEAN: None}.get(name, "si_snri")
            windows = len(values.get((masks, name, counted), ())) or None
            means = [fmean(some) if some else None for some in row]
            rows.append([masks, name, windows, *means])
    return rows
