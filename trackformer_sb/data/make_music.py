"""A folder of music with stems, made from MIDI, soundfonts, kits and speech.

Each song is a folder of 16-bit stereo wav files at 44.1 kHz, as `dataset:
stems` reads them: pieces with drums, bass and other, played by soundfonts or by
synthesisers, clips of drums alone, and clips of vocals alone. ``counts.json``
says how many instruments of each stem sound, ten times a second. What a song is
depends on the seed and its name alone.
"""

import faulthandler
import hashlib
import shutil
import tempfile
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import soundfile

from trackformer_sb.data.band import check_same, make_song
from trackformer_sb.data.drumkits import (
    SAMPLE_RATE,
    load_kit,
    make_drums,
    make_pattern,
    midi_hits,
    reverb,
)
from trackformer_sb.data.files import write_json
from trackformer_sb.data.midi import (
    COUNT_RATE,
    PEAK,
    count_instruments,
    load_midi,
    load_soundfont,
    make_piece,
)
from trackformer_sb.data.voices import make_voice

PACKAGES = ("symusic", "espeakng-loader", "pyworld-prebuilt")
VERSION = 3  # raise it when the songs change
DRUM_SOUNDFONT_SHARE = 0.3
DRIVEN_SHARE = 0.6  # of the synthesisers' basses
AUDIBLE = 1e-4  # of the loudest tenth of a second of a recording
TRACE = "trace"
LIMIT = 600  # seconds that a song may take: some soundfonts never fall silent


def make_music(
    out,
    midi=(),
    soundfonts=(),
    drum_soundfonts=(),
    drumkits=(),
    drums=0,
    voices=0,
    electronic=0,
    renders=1,
    seconds=75.0,
    classes=("bass",),
    seed=0,
    jobs=1,
):
    """Makes what is not there yet, and ``music.json``, which names sources.

    Prints a line for each song that is made and for all that is left out. The
    arguments are those of ``trackformer make-music``. Returns names of songs as
    "made" and "kept", and reasons as "left_out". Raises an ImportError without
    the packages of the extra `music`, and a ValueError if there is nothing to
    make, or `out` holds music of other settings.
    """
    settings = {"seed": seed, "seconds": seconds, "classes": list(classes)}
    settings["version"] = VERSION
    try:
        packages = {name: version(name) for name in PACKAGES}
    except ImportError as error:
        hint = "pip install 'trackformer_sb[music]'"
        raise ImportError(f"{error}: {hint}") from error
    out = Path(out)
    if (out / "music.json").exists():
        check_same(settings, out / "music.json")
    made, left_out = [], []

    def leave_out(reason):
        # the renders of a piece fail alike
        if reason not in left_out:
            left_out.append(reason)
            print(f"left out: {reason}")

    def usable(paths, load, *args):
        for path in paths:
            try:
                load(path, *args)
                yield path
            # of symusic, soundfile and ElementTree (a SyntaxError) as well
            except (OSError, RuntimeError, SyntaxError, ValueError) as error:
                leave_out(f"{path}: {error}")

    def find(folders, expected, *endings):
        for folder in folders:
            paths = [
                path
                for path in sorted(Path(folder).rglob("*"))
                if path.name.lower().endswith(endings)
            ]
            if not paths:
                leave_out(f"expected {expected} in {folder}, got none")
            yield from paths

    files = find(midi, "MIDI files", ".mid", ".midi")
    files = list(usable(files, load_midi, seconds))
    fonts = list(usable(soundfonts, load_soundfont))
    drum_fonts = list(usable(drum_soundfonts, load_soundfont))
    kits = find(drumkits, "Hydrogen drum kits", "drumkit.xml")
    kits = list(usable([path.parent for path in kits], load_kit))
    tasks = {}
    if fonts:
        tasks |= {
            f"{name}_{i}": (_piece, path, i, fonts, drum_fonts)
            for name, path in _named(files).items()
            for i in range(renders)
        }
    if kits:
        tasks |= {
            f"drums_{i:03d}": (_drums, i, kits, files) for i in range(drums)
        }
    tasks |= {f"voices_{i:03d}": (_voice,) for i in range(voices)}
    tasks |= {f"electronic_{i:03d}": (_electronic,) for i in range(electronic)}
    if not tasks:
        raise ValueError(
            "nothing to make: expected MIDI files and a soundfont, drum kits, "
            "or a number of voices or electronic pieces"
        )
    out.mkdir(parents=True, exist_ok=True)
    sources = [*files, *fonts, *drum_fonts]
    sources += [kit / "drumkit.xml" for kit in kits]
    content = settings | {
        "packages": packages,
        "sources": {
            str(path): hashlib.sha256(Path(path).read_bytes()).hexdigest()
            for path in sources
        },
    }
    write_json(out / "music.json", content)
    kept = [name for name in tasks if (out / name).is_dir()]
    missing = {name: tasks[name] for name in tasks if name not in kept}
    for name, reason in _run_all(out, missing, settings, jobs):
        if reason:
            leave_out(reason)
        else:
            made.append(name)
            print(f"{len(made) + len(kept)}/{len(tasks)} {name}")
    return {"made": made, "kept": kept, "left_out": left_out}


def _piece(rng, settings, path, render, fonts, drum_fonts):
    # the same for all renders of a piece, so that their soundfonts differ
    first = zlib.crc32(path.name.encode()) + settings["seed"]
    font = fonts[(first + render) % len(fonts)]
    drum_font = None
    if drum_fonts and rng.random() < DRUM_SOUNDFONT_SHARE:
        drum_font = drum_fonts[rng.integers(len(drum_fonts))]
    seconds, classes = settings["seconds"], settings["classes"]
    stems = make_piece(path, font, rng, seconds, classes, drum_font)
    counts = count_instruments(load_midi(path, seconds), seconds, classes)
    return stems, {name: counts[name] for name in stems}


def _drums(rng, settings, index, kits, files):
    pair = [kits[index % len(kits)], kits[rng.integers(len(kits))]]
    hits = []
    if files and rng.random() < 0.35:
        path = files[rng.integers(len(files))]
        hits = midi_hits(load_midi(path, 600.0), rng)
    if len(hits) < 40:
        hits = make_pattern(rng)
    sig = make_drums(pair, hits, rng)
    return {"drums": sig}, {"drums": _sounds(sig)}


def _voice(rng, settings):
    sig = make_voice(rng)
    return {"vocals": sig}, {"vocals": _sounds(sig)}


def _electronic(rng, settings):
    parts = make_song(int(rng.integers(2**31)), settings["seconds"])
    parts = {
        name: sig[:, None].repeat(2, axis=1) for name, sig in parts.items()
    }
    counts = {name: _sounds(sig) for name, sig in parts.items()}
    counts["other"] = counts.pop("chords") + counts.pop("lead")
    if rng.random() < DRIVEN_SHARE:
        peak = np.abs(parts["bass"]).max()
        drive = rng.uniform(1, 6)
        parts["bass"] = np.tanh(drive / peak * parts["bass"]) * peak
    for name in ("drums", "chords", "lead"):
        pan = 0.0 if name == "drums" else rng.uniform(-0.5, 0.5)
        sig = parts[name] * np.float32([1 - pan, 1 + pan])
        level = 10 ** (rng.uniform(-24, -6) / 20)
        parts[name] = sig + level * reverb(sig, rng, rng.uniform(0.2, 1.5))
    other = parts.pop("chords") + parts.pop("lead")
    stems = parts | {"other": other}
    loudest = np.abs([sum(stems.values()), *stems.values()]).max()
    return {name: PEAK / loudest * sig for name, sig in stems.items()}, counts


def _sounds(sig):
    """1 in tenths of seconds in which a recording [time, 2] sounds, else 0."""
    step = SAMPLE_RATE // COUNT_RATE
    energy = np.square(sig[: len(sig) // step * step]).reshape(-1, 2 * step)
    energy = energy.mean(1)
    return (energy > AUDIBLE * energy.max()).astype(int)


def _make(out, name, task, settings, limit):
    """Makes one song; returns its name and why it could not be made."""
    make, *args = task
    rng = np.random.default_rng([settings["seed"], zlib.crc32(name.encode())])
    # hidden: what a killed run leaves behind is no music
    with tempfile.TemporaryDirectory(prefix=".making_", dir=out) as new:
        song = Path(new, name)
        song.mkdir()
        with open(Path(new, TRACE), "w") as trace:
            # ends the process even where a library does not come back
            faulthandler.dump_traceback_later(limit, exit=True, file=trace)
            try:
                stems, counts = make(rng, settings, *args)
            except ValueError as error:
                return name, str(error)
            finally:
                faulthandler.cancel_dump_traceback_later()
        for stem, sig in stems.items():
            soundfile.write(song / f"{stem}.wav", sig, SAMPLE_RATE, "PCM_16")
        counts = {stem: count.tolist() for stem, count in counts.items()}
        write_json(song / "counts.json", counts)
        song.rename(out / name)
    return name, None


def _run_all(out, tasks, settings, jobs, limit=LIMIT):
    """Yields what ``_make`` returns, in the order in which songs are ready."""
    left = dict(tasks)
    while left:
        pool = ProcessPoolExecutor(jobs, get_context("spawn"))
        futures = [
            pool.submit(_make, out, name, task, settings, limit)
            for name, task in left.items()
        ]
        try:
            for future in as_completed(futures):
                name, reason = future.result()
                del left[name]
                yield name, reason
        except BrokenProcessPool:
            pass  # a process ended; the others' songs are made again
        finally:
            pool.shutdown(cancel_futures=True)
        traces = [*out.glob(f".making_*/{TRACE}")]
        stuck = [path for path in traces if path.stat().st_size]
        if left and not stuck:
            raise ValueError(
                f"{out}: a process ended while it made {', '.join(left)[:200]}"
            )
        for path in stuck:
            (song,) = (x for x in path.parent.iterdir() if x.is_dir())
            del left[song.name]
            yield song.name, f"expected {song.name} within {limit} s: no end"
        for path in traces:
            shutil.rmtree(path.parent)


def _named(paths):
    """Name of a song -> path; no two are the same."""
    names = {}
    for path in paths:
        words = f"{path.parent.name} {path.stem}"
        name = "".join(c if c.isalnum() else "_" for c in words)
        while name in names:
            name += "_"
        names[name] = path
    return names
