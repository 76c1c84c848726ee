"""A short report of a training on the demo band.

    python benchmarks/demo_report.py results/demo/1234 results/demo/excerpt

Reads what recipes/train.py has written and prints it for humans, with the
files of the second folder, where the package's own separator left a song's
stems. Ends with exit code 1 if the separation was not measured.
"""

import argparse
import csv
import json
import math
import pathlib
import sys

from trackformer_sb.data.manifest import read_songs

NEEDED = {
    "si_snri": "best one-to-one choice of outputs",
    "si_snri_grouped": "outputs added up by instrument",
}


def songs_of(folder, split):
    """Names of the songs of a split."""
    return {line["song"] for line in read_songs(folder / "manifests", split)}


def read_average(folder):
    """The last row of test_results.csv and the number of items above it."""
    path = folder / "test_results.csv"
    with open(path, newline="", encoding="utf-8") as file:
        *items, average = csv.DictReader(file)
    return average, len(items)


def print_report(folder, excerpt):
    """Prints the report; returns the measures that are missing."""
    text = (folder / "metrics.json").read_text(encoding="utf-8")
    metrics = json.loads(text)
    average, num_items = read_average(folder)
    tested = songs_of(folder, "test")
    trained = songs_of(folder, "train") | songs_of(folder, "valid")
    print(
        f"Separation of {num_items} segments of {len(tested)} demo songs, "
        f"{len(tested & trained) or 'none'} of them used in training. SI-SNR "
        "improvement over the mixture:"
    )
    missing = []
    for name, how in NEEDED.items():
        value = float(average.get(name) or "nan")
        if math.isfinite(value):
            print(f"  {value:+.2f} dB, {how}")
        else:
            missing.append(name)
            print(f"  not measured, {how}")
    print(
        f"Trained for {metrics['total_seconds'] / 60:.1f} minutes, "
        f"{metrics['epochs']} epochs, on {metrics['device']}."
    )
    print("To look at and to listen to, of the model in the box:")
    for path in [*excerpt.glob("*.png"), *sorted(excerpt.glob("*.wav"))]:
        print(f"  {path}")
    print("and of what was trained here:")
    wavs = [*folder.glob("example/**/*.wav")]
    for path in sorted([*folder.glob("figures/*.png"), *wavs]):
        print(f"  {path}")
    return missing


def main():
    """Prints the report of a run folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_folder", type=pathlib.Path)
    parser.add_argument("excerpt_folder", type=pathlib.Path)
    args = parser.parse_args()
    try:
        missing = print_report(args.run_folder, args.excerpt_folder)
    except (FileNotFoundError, KeyError, ValueError) as error:
        sys.exit(f"no finished run in {args.run_folder}: {error!r}")
    if missing:
        sys.exit(
            f"{args.run_folder}/test_results.csv: no finite average of "
            f"{' and '.join(missing)}"
        )


if __name__ == "__main__":
    main()
