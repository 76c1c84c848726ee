"""Music for small trainings: one folder of mono wav files, and its split.

    python benchmarks/small_music.py --data ../shared/data --out results/small

Finished songs (DATA/mixes) and MIDI pieces (DATA/midi but simutrans, which is
kept for tests), the latter rendered by FluidSynth without reverb and chorus and
cut after --max_seconds, all resampled to --sample_rate. OUT/split.yaml names 6
songs and 6 pieces, drawn at random, for validation, the rest for training.
"""

import argparse
import pathlib
import random
import subprocess
import tempfile

import soundfile
import torch
import yaml
from torchaudio.functional import resample

RENDER_RATE = 16000
SYNTHESIS = ["fluidsynth", "-ni", "-R", "0", "-C", "0", "-g", "0.6"]
VALIDATION_SONGS, VALIDATION_PIECES = 6, 6


def write_mono(path, out, sample_rate, max_seconds=None):
    """Writes a file as mono wav at another rate; returns its length in s."""
    rate = soundfile.info(path).samplerate
    frames = -1 if max_seconds is None else round(max_seconds * rate)
    sig, _ = soundfile.read(path, frames, dtype="float32", always_2d=True)
    sig = resample(torch.from_numpy(sig.mean(1)), rate, sample_rate)
    soundfile.write(out, sig.numpy(), sample_rate, subtype="PCM_16")
    return len(sig) / sample_rate


def main():
    """Converts what is not there yet, and splits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--sample_rate", type=int, default=8000)
    parser.add_argument("--max_seconds", type=float, default=150.0)
    args = parser.parse_args()
    music = args.out / "music"
    music.mkdir(parents=True, exist_ok=True)
    songs = sorted((args.data / "mixes").glob("*.ogg"))
    pieces = [
        path
        for path in sorted((args.data / "midi").glob("*/*.mid"))
        if "simutrans" not in path.parent.name
    ]
    font = next((args.data / "soundfont").glob("*.sf3"))
    seconds = 0.0
    for path in songs:
        out = music / f"{path.stem}.wav"
        seconds += write_mono(path, out, args.sample_rate)
    for path in pieces:
        out = music / f"midi_{path.stem}.wav"
        with tempfile.TemporaryDirectory() as folder:
            wav = f"{folder}/piece.wav"
            subprocess.run(
                [*SYNTHESIS, "-r", str(RENDER_RATE), "-F", wav, font, path],
                check=True,
                capture_output=True,
            )
            seconds += write_mono(wav, out, args.sample_rate, args.max_seconds)
    draw = random.Random(7)
    names = [
        draw.sample([path.stem for path in songs], len(songs)),
        draw.sample([f"midi_{path.stem}" for path in pieces], len(pieces)),
    ]
    valid = names[0][:VALIDATION_SONGS] + names[1][:VALIDATION_PIECES]
    train = names[0][VALIDATION_SONGS:] + names[1][VALIDATION_PIECES:]
    split = {"train": sorted(train), "valid": sorted(valid), "test": []}
    text = yaml.safe_dump(split, sort_keys=False)
    (args.out / "split.yaml").write_text(text, encoding="utf-8")
    print(f"{len(songs)} songs, {len(pieces)} pieces, {seconds / 3600:.2f} h")


if __name__ == "__main__":
    main()
