"""Files of results: formats, groups, ranks, remixes, whole or not at all."""

import numpy as np
import pytest
import soundfile
import torch

from trackformer_sb.inference import writing
from trackformer_sb.inference.remix import check_outputs, mix_gains
from trackformer_sb.inference.writing import write_sources


def noise(sources, channels, frames):
    generator = torch.Generator().manual_seed(0)
    size = sources, channels, frames
    return torch.rand(size, generator=generator) * 0.2 - 0.1


def opened(folder, rate=8000, channels=2):
    """An open file that gives the rate and the channels."""
    path = folder / "song.wav"
    soundfile.write(path, np.zeros((300, channels)), rate)
    return soundfile.SoundFile(path)


def read(path):
    sig, _ = soundfile.read(path, dtype="float32", always_2d=True)
    return torch.from_numpy(sig).T


def written(sig, folder, outputs=None, remix=None, reader=None, **options):
    """Writes in two blocks; name -> what is read again."""
    half = sig.shape[-1] // 2
    blocks = [sig[..., :half], sig[..., half:]]
    mixes = mix_gains(check_outputs(outputs, len(sig)), remix, len(sig))
    out, reader = folder / "out", reader or opened(folder)
    paths = write_sources(blocks, reader, out, "song", *mixes, **options)
    # nothing else, not even a hidden folder
    assert sorted(paths) == sorted(out.iterdir())
    return {path.name: read(path) for path in paths if path.suffix != ".png"}


@pytest.mark.parametrize(
    ("file_format", "subtype", "channels", "rate", "error"),
    [
        ("wav", "FLOAT", 6, 44100, 0.0),
        ("flac", "PCM_24", 6, 352_800, 2e-7),
        ("ogg", "VORBIS", 1, 44100, 0.05),
        ("ogg", "VORBIS", 2, 192_000, 0.05),
    ],
)
def test_formats(tmp_path, file_format, subtype, channels, rate, error):
    # longer than a block: libsndfile's Vorbis crashes on long ones
    time = torch.arange(3 * writing.BLOCK_FRAMES + 5) / rate
    tone = 0.3 * torch.sin(2 * torch.pi * 440 * time)
    sig = torch.stack([tone, -0.5 * tone]).unsqueeze(1).repeat(1, channels, 1)
    reader = opened(tmp_path, rate, channels)
    files = written(sig, tmp_path, reader=reader, file_format=file_format)
    assert list(files) == [f"song_source{i}.{file_format}" for i in range(2)]
    for source, (name, result) in zip(sig, files.items()):
        info = soundfile.info(tmp_path / "out" / name)
        assert (info.samplerate, info.channels) == (rate, channels)
        assert info.subtype == subtype
        assert (result - source).abs().max() <= error


@pytest.mark.parametrize(
    ("file_format", "message"),
    [
        ("mp3", "expected file_format wav, flac, ogg, got 'mp3'"),
        ("ogg", "song.wav: expected wav or flac for 6 channels"),
    ],
)
def test_formats_that_cannot_hold_the_file_are_found_before(
    tmp_path, file_format, message
):
    mixes = ["a"], np.ones((1, 2))
    reader, out = opened(tmp_path, channels=6), tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        write_sources(None, reader, out, "song", *mixes, file_format)
    assert not out.exists()


def test_wav_beyond_4_gb_becomes_rf64(tmp_path, monkeypatch):
    """As three hours of six channels; its sizes have 64 bits."""
    monkeypatch.setattr(writing, "MAX_WAV_BYTES", 10)
    sig = noise(1, 2, 100)
    files = written(sig, tmp_path)
    assert (
        soundfile.info(tmp_path / "out" / "song_source0.wav").format == "RF64"
    )
    assert torch.equal(files["song_source0.wav"], sig[0])


@pytest.mark.parametrize("file_format", ["flac", "ogg"])
def test_beyond_full_scale_all_are_turned_down_alike(
    tmp_path, caplog, file_format
):
    time = torch.arange(8000) / 8000
    tone = torch.sin(2 * torch.pi * 200 * time).expand(2, -1)
    sig = torch.stack([2 * tone, 0.5 * tone])
    files = written(sig, tmp_path, file_format=file_format)
    error = 1e-6 if file_format == "flac" else 0.05
    for source, result in zip(sig, files.values()):
        assert torch.allclose(result, source / 2, atol=error)
    assert "song.wav: turned down by 6.0 dB" in caplog.text
    # neither wav nor what stays below is touched
    caplog.clear()
    (tmp_path / "wav").mkdir()
    files = written(sig, tmp_path / "wav")
    assert torch.equal(torch.stack(list(files.values())), sig)
    written(sig / 2, tmp_path, file_format=file_format)
    assert caplog.text == ""


def test_a_loud_remix_leaves_the_outputs_alone(tmp_path, caplog):
    sig = noise(2, 2, 500) * 8  # up to 0.8
    files = written(sig, tmp_path, file_format="flac", remix="0:6.0206")
    for source, result in zip(sig, files.values()):
        assert torch.allclose(result, source, atol=1e-6)
    remix = 2 * sig[0] + sig[1]
    expected = remix / remix.abs().max()
    assert torch.allclose(files["song_remix.flac"], expected, atol=1e-5)
    assert "song_remix.flac" in caplog.text
    assert "song_source0.flac" not in caplog.text


@pytest.mark.parametrize("step", ["stream", "figure", "finish"])
def test_nothing_is_left_of_a_run_that_ends_early(tmp_path, monkeypatch, step):
    """And its results take the place of earlier ones all at once."""
    out = tmp_path / "out"
    written(noise(2, 2, 100), tmp_path)
    (out / ".song.partial").mkdir()  # as after a kill
    before = {path: path.read_bytes() for path in out.glob("*.wav")}
    grown = []

    def interrupted(*_):
        grown.extend(out.glob(".song.partial/*_*.wav"))
        raise KeyboardInterrupt

    def blocks():
        yield -noise(2, 2, 200)
        if step == "stream":
            interrupted()

    if step != "stream":
        name = {"figure": "_draw", "finish": "_convert"}[step]
        monkeypatch.setattr(writing, name, interrupted)
    mixes = ["source0", "source1"], np.eye(2)
    with pytest.raises(KeyboardInterrupt):
        write_sources(
            *(blocks(), opened(tmp_path), out, "song"),
            *(*mixes, "flac"),
            figure=True,
        )
    assert len(grown) == 2
    assert {path: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("file_format", ["wav", "flac"])
def test_full_disk_names_the_file(tmp_path, monkeypatch, file_format):
    write = soundfile.SoundFile.write

    def full(file, data):
        if str(file.name).endswith(f"{file_format}'"):
            raise soundfile.LibsndfileError(2)
        write(file, data)

    monkeypatch.setattr(soundfile.SoundFile, "write", full)
    message = rf"could not write .*\.{file_format}, .*\d+ MB are free there"
    with pytest.raises(OSError, match=message):
        written(noise(2, 2, 100), tmp_path, file_format=file_format)
    assert not list(tmp_path.glob("out/*"))
