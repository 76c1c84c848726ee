"""How well a trained separator does on songs with stems.

    python benchmarks/real_music.py RUN_FOLDER --test_folder FOLDER

The test segments of a run of recipes/train.py (manifests/test.jsonl, found
again under --test_folder if they have moved) are separated by

- the trained separator, RUN_FOLDER/separator, beside what the recipe itself
  wrote in test_results.csv;
- the trained separator with its masks averaged over the time of a segment:
  what is lost is what it gains by following the music;
- a trained Performer without what its attention adds, and with the mean of that
  over time: what is lost is what it gains from other frames;
- the same architecture with fresh weights (--seed);
- "N bands", the mixture cut into as many bands of frequency as there are
  outputs, equally wide in mel (HTK's formula): what no training is needed for;
- "mixture/N", which gives the mixture to each of the N outputs in equal parts;
- ideal ratio masks, |S_i| / sum_j |S_j| of the true stems on an STFT (1024,
  hop 256), one output a stem: what such masks can reach at best, roughly.

Measured on the single song, not on the sum of two: SI-SNR improvement over the
mixture with the best one-to-one choice of outputs (si_snri) and with every
output added to one stem (si_snri_grouped); with --sdr BSS-eval SDR too, which
is slow. Silent stems are left out. Averages are over segments, as in the
recipe, so that long songs count more; the mean over songs is given as well.
"""

import contextlib
import csv
import io
import json
import pathlib
import re
import sys
import time

import torch
from common import Record, new_parser, parse_args, say, table
from hyperpyyaml import resolve_references

from trackformer_sb.data.manifest import MappedManifest
from trackformer_sb.data.mixtures import MixtureOfMixtures
from trackformer_sb.inference.hub import plain_values
from trackformer_sb.inference.separation import separate
from trackformer_sb.inference.separator import Separator, load_separator
from trackformer_sb.nnet.masknet import PerformerMaskNet
from trackformer_sb.nnet.performer import SelfAttention
from trackformer_sb.nnet.stft import STFTDecoder, STFTEncoder
from trackformer_sb.objectives import metrics

TRAINED, ORACLE = "trained", "ideal ratio masks"
MAX_EPOCHS = 30  # rows of the training curve


def relocated(rows, folder):
    """The rows with tracks looked for under a folder by their last parts.

    Raises
    ------
    FileNotFoundError
        If a track is not there.
    """

    def find(track):
        parts = pathlib.Path(track).parts[1:]
        for first in range(len(parts)):
            path = folder.joinpath(*parts[first:])
            if path.is_file():
                return str(path)
        raise FileNotFoundError(f"{'/'.join(parts[-2:])} is not in {folder}")

    return {
        item: {
            **row,
            "tracks": {
                name: find(path) for name, path in row["tracks"].items()
            },
        }
        for item, row in rows.items()
    }


def load_separators(folder, seed, device):
    """The trained separator, and one of its architecture without training."""
    trained = load_separator(folder, device)
    torch.manual_seed(seed)
    untrained = Separator(**trained.config).to(device).eval()
    return trained.requires_grad_(False), untrained.requires_grad_(False)


def ideal_ratio_masks(mix, stems):
    """[stems, time]: the mixture through the masks of its true stems."""
    encoder, decoder = (
        STFTEncoder().to(mix.device),
        STFTDecoder().to(mix.device),
    )
    magnitude = encoder(stems).abs()
    masks = magnitude / magnitude.sum(0).clamp(min=1e-10)
    return decoder(masks * encoder(mix.unsqueeze(0)), length=len(mix))


def bands(mix, number, sample_rate):
    """[number, time]: bands of the mixture, equally wide in mel."""
    encoder, decoder = (
        STFTEncoder().to(mix.device),
        STFTDecoder().to(mix.device),
    )
    spectrum = encoder(mix[None])
    hertz = torch.linspace(0, sample_rate / 2, spectrum.shape[1])
    mel = (1 + hertz / 700).log()
    band = (number * mel / mel[-1]).long().clamp(max=number - 1)
    masks = torch.nn.functional.one_hot(band, number).T[:, :, None]
    return decoder(masks.to(mix.device) * spectrum, length=len(mix))


def constant(masknet):
    """A masknet with the means over time of another one's masks."""

    def masks_of(mix_w):
        masks = masknet(mix_w)
        return masks.mean(-1, keepdim=True).expand_as(masks)

    return masks_of


@contextlib.contextmanager
def attention_replaced(masknet, replacement):
    """What all attention of a masknet gives goes through a function."""
    hooks = [
        module.register_forward_hook(lambda *args: replacement(args[-1]))
        for module in masknet.modules()
        if isinstance(module, SelfAttention)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def make_methods(args):
    """Name -> function of mix [time] and stems, and the sample rate."""
    trained, untrained = load_separators(
        args.run_folder / "separator", args.seed, args.device
    )
    num_spks = trained.num_spks

    def outputs_of(separator):
        return lambda mix, stems: separator(mix[None])[0]

    def averaged(mix, stems):
        est_source, _ = separate(
            mix[None],
            trained.encoder,
            constant(trained.masknet),
            trained.decoder,
            trained.mixture_consistency,
        )
        return est_source[0]

    def without_attention(replacement):
        def outputs(mix, stems):
            with attention_replaced(trained.masknet, replacement):
                return trained(mix[None])[0]

        return outputs

    sample_rate = trained.sample_rate
    methods = {
        TRAINED: outputs_of(trained),
        "trained, masks averaged over time": averaged,
    }
    if isinstance(trained.masknet, PerformerMaskNet):
        methods |= {
            "trained, without attention": without_attention(torch.zeros_like),
            "trained, attention averaged": without_attention(
                lambda x: x.mean(1, keepdim=True).expand_as(x)
            ),
        }
    methods |= {
        "untrained": outputs_of(untrained),
        f"{num_spks} bands": lambda mix, stems: bands(
            mix, num_spks, sample_rate
        ),
        "mixture/N": lambda mix, stems: mix.expand(num_spks, -1) / num_spks,
        ORACLE: ideal_ratio_masks,
    }
    return methods, sample_rate


def measure(est_source, stems, mix, with_sdr):
    """The measures of one item; None where no stem sounds."""
    row = {
        "si_snri": metrics.si_snri(est_source, stems, mix)[0],
        "si_snri_grouped": metrics.si_snri_grouped(est_source, stems, mix)[0],
    }
    if with_sdr:
        row["sdr"] = metrics.sdr(est_source, stems)
    return row


@torch.no_grad()
def evaluate(rows, items, methods, args, sample_rate):
    """(item, method) -> measures."""
    pairs = MixtureOfMixtures(
        rows, sample_rate, seed=args.seed, with_stems=True
    )
    results, told = {}, time.monotonic()
    for number, item in enumerate(items):
        mixtures, stems, skipped = pairs(item)
        if skipped:
            # another segment would take its place
            sys.exit(f"{item}: {skipped[0]}")
        mix, stems = mixtures[0].to(args.device), stems.to(args.device)
        for name, method in methods.items():
            est_source = method(mix, stems).float()
            results[item, name] = measure(est_source, stems, mix, args.sdr)
        if time.monotonic() - told > 15:
            told = time.monotonic()
            say(f"{number + 1} of {len(items)} segments")
    return results


def mean(values):
    """Mean of the values that there are, None if there are none."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def shown(value):
    """A number of dB, or a dash."""
    # plus zero: no "-0.00"
    return "-" if value is None else f"{round(value, 2) + 0.0:.2f}"


def read_results(path):
    """Rows of test_results.csv by id, empty fields as None."""
    with open(path, newline="", encoding="utf-8") as file:
        return {
            row.pop("id"): {k: float(v) if v else None for k, v in row.items()}
            for row in csv.DictReader(file)
        }


def score_tables(results, rows, items, methods, recorded):
    """Averages, per-song table, and how well the recipe's figures agree."""
    measures = list(next(iter(results.values())))
    songs = {}
    for item in items:
        songs.setdefault(rows[item]["song"], []).append(item)
    by_song = {
        (song, name, key): mean(results[item, name][key] for item in members)
        for song, members in songs.items()
        for name in methods
        for key in measures
    }
    averages = [
        [
            name,
            *(
                shown(mean(results[item, name][key] for item in items))
                for key in measures
            ),
            *(
                shown(mean(by_song[song, name, key] for song in songs))
                for key in measures
            ),
        ]
        for name in methods
    ]
    average = [shown(recorded["avg"][key]) for key in measures]
    averages.append(
        ["trained, test_results.csv", *average, *["-"] * len(measures)]
    )
    header = ["", *measures, *(f"{key}, mean of songs" for key in measures)]
    blocks = [
        f"## Averages of {len(items)} segments of {len(songs)} songs, dB",
        table(header, averages),
    ]
    apart = [
        abs(results[item, TRAINED]["si_snri"] - recorded[item]["si_snri"])
        for item in items
        if recorded.get(item, {}).get("si_snri") is not None
        and results[item, TRAINED]["si_snri"] is not None
    ]
    if apart:
        blocks.append(
            f"The trained separator's si_snri differs by at most "
            f"{max(apart):.1e} dB from test_results.csv on {len(apart)} "
            "segments."
        )
    for key in measures:
        table_rows = [
            [
                song,
                len(members),
                *(shown(by_song[song, name, key]) for name in methods),
            ]
            for song, members in songs.items()
        ]
        blocks += [
            f"## {key} by song, dB",
            table(["song", "segments", *methods], table_rows),
        ]
    return blocks


def training_curve(history):
    """The epochs as a table, thinned out if there are many."""
    if not history:
        return []
    keys = ["train_loss", *(k for k in history[-1] if k.startswith("valid_"))]
    keys.remove("valid_seconds")
    step = -(-len(history) // MAX_EPOCHS)
    # counted from the end, so that the last epoch is shown
    shown_epochs = history[::-1][::step][::-1]
    rows = [
        [row["epoch"], *(shown(row.get(key)) for key in keys)]
        for row in shown_epochs
    ]
    return ["## Training curve", table(["epoch", *keys], rows)]


def changes(value, before):
    """What of a mapping is another one now; anything else as it is."""
    if not isinstance(value, dict) or not isinstance(before, dict):
        return value
    return {k: x for k, x in value.items() if before.get(k) != x}


def training_command(folder):
    """The command of a training, rebuilt from the yaml that it left behind."""
    text = (folder / "hyperparams.yaml").read_text(encoding="utf-8")
    found = re.search(r"^# Generated .* from:\n# (.*)$", text, re.M)
    name = pathlib.Path(found[1]).name if found else ""
    path = pathlib.Path(__file__).resolve().parents[1] / "hparams" / name
    if not path.is_file():
        return "unknown"
    recipe, used = path.read_text(encoding="utf-8"), plain_values(text)
    overrides, found = {}, True
    # one by one in the order of the file: later keys follow from earlier ones
    while found:
        resolved = resolve_references(io.StringIO(recipe), overrides)
        before = plain_values(resolved.getvalue())
        found = [
            key
            for key, value in used.items()
            if before.get(key, value) != value and key not in overrides
        ]
        overrides |= {key: changes(used[key], before[key]) for key in found[:1]}
    words = [f"python recipes/train.py hparams/{name}"]
    for key, value in overrides.items():
        if isinstance(value, str) and pathlib.Path(value).is_absolute():
            value = f".../{pathlib.Path(value).name}"
        if isinstance(value, dict):
            value = f"'{json.dumps(value)}'"
        words.append(f"--{key}={'null' if value is None else value}")
    return " ".join(words)


def main():
    """Evaluates a run folder and writes the record."""
    parser = new_parser(__doc__, "real_music")
    parser.add_argument("run_folder", type=pathlib.Path)
    parser.add_argument(
        "--test_folder",
        type=pathlib.Path,
        help="where the test songs are now, if not where they were",
    )
    parser.add_argument("--max_items", type=int, help="for a quick look")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sdr", action="store_true", help="SDR too, slow")
    args = parse_args(parser)
    record = Record("Real music", __doc__, args.output, args.device)
    manifest = args.run_folder / "manifests"
    rows = dict(MappedManifest(manifest, "test"))
    if args.test_folder:
        rows = relocated(rows, args.test_folder)
    for row in rows.values():
        for track in row["tracks"].values():
            if not pathlib.Path(track).is_file():
                parser.error(f"{track} is gone, see --test_folder")
    items = [item for item, row in rows.items() if row["has_stems"]]
    if not items:
        parser.error(f"{manifest} has no segments with stems")
    if args.max_items:
        # spread over the songs
        items = items[:: -(-len(items) // args.max_items)]
    methods, sample_rate = make_methods(args)
    results = evaluate(rows, items, methods, args, sample_rate)
    recorded = read_results(args.run_folder / "test_results.csv")
    text = (args.run_folder / "metrics.json").read_text(encoding="utf-8")
    figures = json.loads(text)
    blocks = [
        "Trained with (rebuilt from its hyperparams.yaml)\n\n"
        f"    {training_command(args.run_folder)}",
        f"{figures['epochs']} epochs, {figures['total_seconds'] / 60:.1f} "
        f"minutes on {figures['device']}, "
        f"{figures['num_parameters'] / 1e6:.1f} million parameters, peak "
        f"memory {figures['peak_memory_mb']:.0f} MB.",
        *score_tables(results, rows, items, methods, recorded),
        *training_curve(figures["history"]),
    ]
    record.write(*blocks)
    say(*blocks, sep="\n\n")
    say(f"wrote {args.output}")


if __name__ == "__main__":
    main()
