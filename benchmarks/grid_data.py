"""Test songs for recipes/reproduce.py: excerpts of 30 s with stems.

    python benchmarks/grid_data.py --data ../shared/data --out results/grid_data

Excerpts of 30 s make the test the same music at every segment length: a
segment of 30 s, three of 10 s, six of 5 s or ten of 3 s. They come from the
songs of DATA/stems that are long enough and from MIDI files of DATA/midi,
rendered by DATA/render_midi.py (which needs FluidSynth and mido). Every stem is
cut alike; excerpts begin --skip seconds into the song, or 0 if it is too short.
"""

import argparse
import pathlib
import shutil
import subprocess
import sys

import soundfile

EXCERPT_SECONDS = 30
# numbers of simutrans pieces, kept for evaluation
PIECES = (1, 5, 9, 13, 17, 21, 27, 35)


def render(data, folder):
    """Renders the MIDI pieces: a folder of stems each."""
    found = sorted((data / "midi" / "simutrans_Artistic1").glob("*.mid"))
    pieces = [path for path in found if int(path.name[:2]) in PIECES]
    font = next((data / "soundfont").glob("*.sf3"))
    command = [sys.executable, data / "render_midi.py", "--sf2", font]
    command += ["--out", folder, "--by", "class", "--max-seconds", "45"]
    subprocess.run([str(word) for word in command + pieces], check=True)


def cut(song, folder, skip):
    """Writes the excerpt of a song; whether it is long enough."""
    tracks = [
        path
        for path in sorted(song.iterdir())
        if path.suffix in (".ogg", ".flac", ".wav") and path.stem != "mix"
    ]
    seconds = min(soundfile.info(path).duration for path in tracks)
    if seconds < EXCERPT_SECONDS:
        return False
    start = skip if seconds >= EXCERPT_SECONDS + skip else 0
    (folder / song.name).mkdir(parents=True)
    for path in tracks:
        rate = soundfile.info(path).samplerate
        sig, _ = soundfile.read(
            path, start=start * rate, frames=EXCERPT_SECONDS * rate
        )
        out = folder / song.name / f"{path.stem}.flac"
        soundfile.write(out, sig, rate, subtype="PCM_16")
    return True


def main():
    """Makes the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--skip", type=int, default=10)
    parser.add_argument("--rendered", type=pathlib.Path, help="if there")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"--out: {args.out} exists, expected a new folder")
    rendered = args.rendered or args.out.with_name(f"{args.out.name}.midi")
    if not rendered.exists():
        render(args.data, rendered)
    for kind in (args.data / "stems", rendered):
        songs = [path for path in sorted(kind.iterdir()) if path.is_dir()]
        for song in songs:
            kept = cut(song, args.out, args.skip)
            print(song.name, "kept" if kept else "shorter than 30 s, left out")
    if args.rendered is None:
        shutil.rmtree(rendered)


if __name__ == "__main__":
    main()
