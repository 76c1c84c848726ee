"""Writes the mixture of a test song, to separate it and to listen.

    python benchmarks/demo_example.py results/demo/1234

Takes the first test song of a run with stems and writes their sum as
RUN_FOLDER/example/mix.wav.
"""

import argparse
import pathlib

import soundfile

from trackformer_sb.data.manifest import MappedManifest


def main(argv=None):
    """Finds the song in the run's manifest and adds up its stems."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run_folder", type=pathlib.Path)
    folder = parser.parse_args(argv).run_folder
    row = MappedManifest(folder / "manifests", "test").row(0)
    stems, rates = zip(*(soundfile.read(p) for p in row["tracks"].values()))
    path = folder / "example" / "mix.wav"
    path.parent.mkdir(exist_ok=True)
    soundfile.write(path, sum(stems), rates[0], "FLOAT")
    print(f"{path}: {', '.join(row['tracks'])} of {row['song']}")


if __name__ == "__main__":
    main()
