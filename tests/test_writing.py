"""Files of results: formats, groups, ranks, remixes, whole or not at all."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

from trackformer_sb.inference import writing
from trackformer_sb.inference.writing import (
    output_paths,
    write_sources,
)


def noise(sources, channels, frames):
    generator = torch.Generator().manual_seed(0)
    size = sources, channels, frames
    return torch.rand(size, generator=generator) * 0.2 - 0.1


@pytest.fixture
def reader(tmp_path):
    """An open file that gives the rate and the channels."""
    return opened(tmp_path, 8000, 2)


def opened(folder, rate, channels):
    path = folder / "song.wav"
    soundfile.write(path, np.zeros((300, channels)), rate)
    return soundfile.SoundFile(path)


def read(path):
    sig, _ = soundfile.read(path, dtype="float32", always_2d=True)
    return torch.from_numpy(sig).T


def written(sig, reader, folder, **options):
    """Writes in two blocks; name -> what is read again."""
    half = sig.shape[-1] // 2
    blocks = [sig[..., :half], sig[..., half:]]
    paths = write_sources(blocks, reader, folder / "out", "song", **options)
    assert sorted(paths) == sorted((folder / "out").iterdir())
    return {path.name: read(path) for path in paths if path.suffix != ".png"}


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize(
    "file_format, subtype, error",
    [("wav", "FLOAT", 0.0), ("flac", "PCM_24", 2e-7), ("ogg", "VORBIS", 0.05)],
)
def test_formats(tmp_path, file_format, subtype, error, channels):
    reader = opened(tmp_path, 44100, channels)
    if file_format == "ogg" and channels > 2:
        with pytest.raises(ValueError, match="expected wav or flac for 6"):
            written(noise(1, 6, 10), reader, tmp_path, file_format="ogg")
        return
    # longer than a block: libsndfile's Vorbis crashes on long ones
    time = torch.arange(3 * writing.BLOCK_FRAMES + 5) / 44100
    tone = 0.3 * torch.sin(2 * torch.pi * 440 * time)
    sig = torch.stack([tone, -0.5 * tone]).unsqueeze(1).repeat(1, channels, 1)
    files = written(sig, reader, tmp_path, file_format=file_format)
    assert list(files) == [f"song_source{i}.{file_format}" for i in range(2)]
    for source, (name, result) in zip(sig, files.items()):
        info = soundfile.info(tmp_path / "out" / name)
        assert (info.samplerate, info.channels) == (44100, channels)
        assert info.subtype == subtype
        assert result.shape == source.shape
        assert (result - source).abs().max() <= error


@pytest.mark.parametrize(
    ("file_format", "rate", "message"),
    [
        # libsndfile would end the process
        ("ogg", 352_800, "as Vorbis ends at 200000 Hz"),
        ("ogg", 200_001, "as Vorbis ends at 200000 Hz"),
        ("flac", 96_001, "flac cannot hold 2 channels at 96001 Hz"),
        ("flac", 700_000, "flac cannot hold 2 channels at 700000 Hz"),
    ],
)
def test_rates_that_a_format_cannot_hold(tmp_path, file_format, rate, message):
    reader = opened(tmp_path, rate, 2)

    def blocks():
        raise AssertionError("separated though it cannot be written")
        yield

    with pytest.raises(ValueError, match=message):
        write_sources(
            blocks(), reader, tmp_path / "out", "song", file_format=file_format
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file_format", "rate"), [("ogg", 192_000), ("flac", 352_800)]
)
def test_high_rates_that_it_can(tmp_path, file_format, rate):
    reader = opened(tmp_path, rate, 2)
    files = written(noise(2, 2, 900), reader, tmp_path, file_format=file_format)
    assert len(files) == 2


def test_a_song_in_one_block_as_ogg(tmp_path):
    """Two minutes at once crash libsndfile's Vorbis encoder."""
    code = (
        "import sys, pathlib, torch, soundfile;"
        "from trackformer_sb.inference.writing import write_sources;"
        "reader = soundfile.SoundFile(sys.argv[1]);"
        "out = pathlib.Path(sys.argv[2]);"
        "sig = torch.zeros(1, 2, 120 * 8000);"
        "write_sources([sig], reader, out, 'song', 'ogg')"
    )
    path = opened(tmp_path, 8000, 2).name
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", code, str(path), str(out)])
    assert done.returncode == 0
    assert soundfile.info(out / "song_source0.ogg").frames == 120 * 8000


@pytest.mark.parametrize("file_format", ["flac", "ogg"])
def test_beyond_full_scale_all_are_turned_down_alike(
    tmp_path, reader, caplog, file_format
):
    time = torch.arange(8000) / 8000
    tone = torch.sin(2 * torch.pi * 200 * time).expand(2, -1)
    sig = torch.stack([2 * tone, 0.5 * tone])
    files = written(sig, reader, tmp_path, file_format=file_format)
    error = 1e-6 if file_format == "flac" else 0.05
    for source, result in zip(sig, files.values()):
        assert torch.allclose(result, source / 2, atol=error)
    assert "song.wav: turned down by 6.0 dB" in caplog.text
    # neither wav nor what stays below is touched
    caplog.clear()
    files = written(sig, reader, tmp_path / "wav")
    assert torch.equal(torch.stack(list(files.values())), sig)
    written(sig / 2, reader, tmp_path / "quiet", file_format=file_format)
    assert caplog.text == ""


def test_a_loud_remix_leaves_the_outputs_alone(tmp_path, reader, caplog):
    sig = noise(2, 2, 500) * 8  # up to 0.8
    files = written(sig, reader, tmp_path, file_format="flac", remix="0:6.0206")
    for source, result in zip(sig, files.values()):
        assert torch.allclose(result, source, atol=1e-6)
    remix = 2 * sig[0] + sig[1]
    expected = remix / remix.abs().max()
    assert torch.allclose(files["song_remix.flac"], expected, atol=1e-5)
    assert "song_remix.flac" in caplog.text
    assert "song_source0.flac" not in caplog.text


def test_outputs_are_kept_and_summed(tmp_path, reader):
    sig = noise(4, 2, 1000)
    # an output both by itself and in a sum, in any order
    for outputs in ("2,drums=0+2,rest=1+3", "drums=2+0,rest=3+1,2"):
        files = written(sig, reader, tmp_path, outputs=outputs)
        assert torch.equal(files["song_source2.wav"], sig[2])
        assert torch.equal(files["song_drums.wav"], sig[0] + sig[2])
        assert torch.equal(files["song_rest.wav"], sig[1] + sig[3])
        assert len(files) == 3


def test_one_output_under_two_names(tmp_path, reader):
    sig = noise(2, 2, 100)
    files = written(sig, reader, tmp_path, outputs="voice=1,1,drums=0")
    assert torch.equal(files["song_voice.wav"], sig[1])
    assert torch.equal(files["song_source1.wav"], sig[1])
    assert torch.equal(files["song_drums.wav"], sig[0])


def test_ranked_outputs(tmp_path, reader):
    gains = torch.tensor([0.5, 0.1, 1.0, 0.2])[:, None, None]
    sig = noise(4, 2, 1000) * gains
    for order in itertools.islice(itertools.permutations(range(4)), 0, 24, 5):
        files = written(
            sig[list(order)],
            reader,
            tmp_path,
            ranked=True,
            outputs="0,rest=1+3",
            remix="1:-inf",
        )
        assert torch.equal(files["song_source0.wav"], sig[2])
        assert torch.allclose(files["song_rest.wav"], sig[0] + sig[1])
        expected = sig[1] + sig[2] + sig[3]
        assert torch.allclose(files["song_remix.wav"], expected, atol=1e-7)


def test_remix_of_all_muted_is_silence(tmp_path, reader):
    sig = noise(2, 2, 100)
    remix = "0:-inf,1:-inf"
    files = written(sig, reader, tmp_path, outputs="none", remix=remix)
    assert list(files) == ["song_remix.wav"]
    assert torch.equal(files["song_remix.wav"], torch.zeros(2, 100))


@pytest.mark.parametrize("file_format", ["wav", "flac"])
@pytest.mark.parametrize("outputs", [None, "none", "0,2"])
@pytest.mark.parametrize("figure", [False, True])
def test_remix_of_one_output_alone(
    tmp_path, reader, file_format, outputs, figure
):
    sig = noise(3, 2, 4000)
    files = written(
        sig,
        reader,
        tmp_path,
        remix="1:-inf,2:-inf",
        outputs=outputs,
        figure=figure,
        file_format=file_format,
    )
    kept = {None: (0, 1, 2), "none": (), "0,2": (0, 2)}[outputs]
    names = [f"song_source{i}.{file_format}" for i in kept]
    assert list(files) == [*names, f"song_remix.{file_format}"]
    error = 2**-23 if file_format == "flac" else 0
    for name, index in zip(files, (*kept, 0), strict=True):
        assert (files[name] - sig[index]).abs().max() <= error


@pytest.mark.parametrize("remix", ["0:100000", {0: 121.0}, {0: float("nan")}])
def test_gains_have_an_end(tmp_path, reader, remix):
    with pytest.raises(ValueError, match="gains up to 120 dB"):
        written(noise(2, 2, 100), reader, tmp_path, remix=remix)


def test_an_empty_remix_is_the_sum(tmp_path, reader):
    sig = noise(3, 2, writing.BLOCK_FRAMES + 1)
    files = written(sig, reader, tmp_path, remix={})
    assert torch.allclose(files["song_remix.wav"], sig.sum(0), atol=1e-7)


@pytest.mark.parametrize("step", ["stream", "finish", "figure"])
def test_nothing_is_left_of_a_run_that_ends_early(
    tmp_path, reader, monkeypatch, step
):
    out = tmp_path / "out"

    def blocks():
        yield noise(2, 2, 200)
        assert len(list(out.glob(".*.partial/streams/?.wav"))) == 2
        if step == "stream":
            raise KeyboardInterrupt

    def interrupted(*_):
        assert list(out.glob(".*.partial"))
        raise KeyboardInterrupt

    if step == "finish":
        monkeypatch.setattr(writing._Mix, "peak", interrupted)
    if step == "figure":
        from trackformer_sb import plots

        monkeypatch.setattr(plots, "save_figure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_sources(blocks(), reader, out, "song", "flac", figure=True)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("outputs", [None, "both=0+1"])
def test_full_disk_names_the_file(tmp_path, reader, monkeypatch, outputs):
    write = soundfile.SoundFile.write

    def full(file, data):
        if outputs is None or "streams" not in str(file.name):
            raise soundfile.LibsndfileError(2)
        write(file, data)

    monkeypatch.setattr(soundfile.SoundFile, "write", full)
    message = r"could not write .*\.wav, \d+ MB are free there \(System error"
    with pytest.raises(OSError, match=message):
        written(noise(2, 2, 100), reader, tmp_path, outputs=outputs)


def test_files_of_an_earlier_run_are_replaced_at_the_end(tmp_path, reader):
    sig = noise(2, 2, 100)
    written(sig, reader, tmp_path)

    def blocks():
        yield -sig
        path = tmp_path / "out" / "song_source0.wav"
        assert torch.equal(read(path), sig[0])

    first, _ = write_sources(blocks(), reader, tmp_path / "out", "song")
    assert torch.equal(read(first), -sig[0])


def test_formats_that_cannot_hold_the_file_are_found_before(tmp_path):
    def blocks():
        raise AssertionError("the model ran")
        yield

    reader = opened(tmp_path, 8000, 9)
    with pytest.raises(
        ValueError, match=r"song\.wav: flac cannot hold 9 channels at 8000 Hz"
    ):
        write_sources(blocks(), reader, tmp_path / "out", "song", "flac")
    with pytest.raises(ValueError, match="expected file_format wav, flac, ogg"):
        write_sources(blocks(), reader, tmp_path / "out", "song", "mp3")
    assert not (tmp_path / "out").exists()


def test_number_of_sources_must_not_change(tmp_path, reader):
    blocks = [noise(3, 2, 10), noise(2, 2, 10)]
    with pytest.raises(ValueError, match="shorter"):
        write_sources(blocks, reader, tmp_path / "out", "song")


def test_output_paths(tmp_path):
    paths = output_paths(
        tmp_path, "my.song", 3, "ogg", "rest=1+2,0", {0: 3.0}, figure=True
    )
    assert [path.name for path in paths] == [
        "my.song_rest.ogg",
        "my.song_source0.ogg",
        "my.song_remix.ogg",
        "my.song_figure.png",
    ]
    assert {path.parent for path in paths} == {tmp_path}
    with pytest.raises(ValueError, match="expected file_format"):
        output_paths("", "song", 2, "mp3")
    with pytest.raises(ValueError, match="source2: expected outputs from 0"):
        output_paths("", "song", 2, outputs="2")
    with pytest.raises(ValueError, match="expected an output, a remix or"):
        output_paths("", "song", 2, outputs="none")
