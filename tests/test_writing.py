"""Files of results: formats, groups, ranks, remixes, whole or not at all."""

import io

import av
import matplotlib.image
import numpy as np
import pytest
import soundfile
import torch
from scipy.signal import resample
from separators import read

from trackformer_sb import ffmpeg
from trackformer_sb.audio import open_audio
from trackformer_sb.ffmpeg import FFmpegWriter, Tags, read_tags
from trackformer_sb.inference import writing
from trackformer_sb.inference.remix import check_outputs, mix_gains
from trackformer_sb.inference.writing import write_sources


def noise(sources, channels, frames):
    generator = torch.Generator().manual_seed(0)
    size = sources, channels, frames
    return torch.rand(size, generator=generator) * 0.2 - 0.1


def true_peak(sig):
    """Of [channels, time], by a spectrum with zeros on top."""
    return np.abs(resample(sig.numpy(), 8 * sig.shape[1], axis=1)).max()


def opened(folder, rate=8000, channels=2):
    """An open file that gives the rate and the channels."""
    path = folder / "song.wav"
    soundfile.write(path, np.zeros((300, channels)), rate)
    return soundfile.SoundFile(path)


def written(sig, folder, outputs=None, remix=None, reader=None, **options):
    """Writes in two blocks; name -> what is read again."""
    half = sig.shape[-1] // 2
    blocks = [sig[..., :half], sig[..., half:]]
    *mixes, _ = mix_gains(check_outputs(outputs, len(sig)), remix, len(sig))
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


@pytest.mark.parametrize("file_format", ["mp3", "m4a"])
@pytest.mark.parametrize(
    ("rate", "frames", "channels"),
    [(22050, 4321, 2), (44100, 1152 * 40, 1), (48000, 40001, 2)],
)
def test_mp3_and_m4a_begin_and_end_with_the_file(
    tmp_path, file_format, rate, frames, channels
):
    """Encoders begin with silence and fill up the last of their frames."""
    time = torch.arange(frames) / rate
    tone = torch.hann_window(frames) * torch.sin(2 * torch.pi * 440 * time)
    sig = torch.stack([0.3 * tone, -0.2 * tone])[:channels]
    paths = write_sources(
        [sig[None, :, :999], sig[None, :, 999:]],
        opened(tmp_path, rate, channels),
        tmp_path / "out",
        "song",
        ["vocals"],
        np.eye(1),
        file_format,
    )
    with open_audio(paths[0]) as audio:
        assert (audio.samplerate, audio.frames) == (rate, frames)
        result = torch.from_numpy(audio.read(frames + 1)).T
    assert result.shape == (channels, frames)
    assert (result - sig).abs().max() < 0.01


@pytest.mark.parametrize(
    ("file_format", "rate", "becomes"),
    [("mp3", 44056, 44100), ("mp3", 96000, 48000), ("m4a", 192_000, 96000)],
)
def test_a_rate_that_a_format_lacks_is_changed(
    tmp_path, file_format, rate, becomes
):
    time = torch.arange(rate) / rate
    tone = torch.hann_window(rate) * torch.sin(2 * torch.pi * 440 * time)
    reader, out = opened(tmp_path, rate, 1), tmp_path / "out"
    blocks = [0.3 * tone[None, None, :999], 0.3 * tone[None, None, 999:]]
    mixes = ["vocals"], np.eye(1)
    [path] = write_sources(blocks, reader, out, "song", *mixes, file_format)
    with open_audio(path) as audio:
        assert (audio.samplerate, audio.frames) == (becomes, becomes)
        result = torch.from_numpy(audio.read(becomes))[:, 0]
    time = torch.arange(becomes) / becomes
    tone = torch.hann_window(becomes) * torch.sin(2 * torch.pi * 440 * time)
    assert (result - 0.3 * tone).abs().max() < 0.01


@pytest.mark.parametrize(
    ("file_format", "channels", "rate", "message"),
    [
        ("opus", 2, 44100, "file_format wav, flac, ogg, mp3, m4a, got 'opus'"),
        ("ogg", 6, 44100, "song.wav: expected wav or flac for 6 channels"),
        ("mp3", 6, 44100, "song.wav: expected wav or flac for 6 channels"),
    ],
)
def test_formats_that_cannot_hold_the_file_are_found_before(
    tmp_path, file_format, channels, rate, message
):
    mixes = ["a"], np.ones((1, 2))
    reader, out = opened(tmp_path, rate, channels), tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        write_sources(None, reader, out, "song", *mixes, file_format)
    assert not out.exists()


def test_wav_beyond_4_gb_becomes_rf64(tmp_path, monkeypatch):
    """As three hours of six channels; its sizes have 64 bits."""
    monkeypatch.setitem(ffmpeg.CONTAINER_OPTIONS, "rf64", "always")
    sig = noise(1, 2, 100)
    files = written(sig, tmp_path)
    assert (
        soundfile.info(tmp_path / "out" / "song_source0.wav").format == "RF64"
    )
    assert torch.equal(files["song_source0.wav"], sig[0])


@pytest.mark.parametrize(
    ("ending", "layout"),
    [
        ({"format": "WAV"}, "6 channels"),  # says nothing
        ({"format": "WAVEX"}, "5.1"),
        ({"format": "FLAC"}, "5.1(side)"),
    ],
)
def test_wavs_tell_the_places_of_channels(tmp_path, ending, layout):
    path = tmp_path / "song.wav"
    soundfile.write(path, np.zeros((300, 6)), 8000, **ending)
    sig = noise(1, 6, 300)
    with open_audio(path) as reader:
        files = written(sig, tmp_path, reader=reader)
    (name,) = files
    with av.open(tmp_path / "out" / name) as file:
        assert file.streams.audio[0].layout.name == layout
    assert torch.equal(files[name], sig[0])


def picture():
    file = io.BytesIO()
    matplotlib.image.imsave(file, np.zeros((4, 6, 3)), format="png")
    return file.getvalue()


def tagged(path, metadata, cover):
    """A song with tags and, if its format takes one, a cover."""
    if path.suffix == ".ogg":
        with soundfile.SoundFile(path, "w", 8000, 2, "VORBIS") as file:
            for key, value in metadata.items():
                setattr(file, key.replace("track", "tracknumber"), value)
            file.write(np.zeros((500, 2)))
        return
    tags = Tags("stereo", {**metadata, "REPLAYGAIN_TRACK_GAIN": "-7"}, cover)
    with FFmpegWriter(path, path.suffix[1:], 8000, tags) as file:
        file.write(np.zeros((500, 2), "float32"))


@pytest.mark.parametrize(
    ("source", "file_format", "has_cover"),
    [
        ("mp3", "m4a", True),
        ("m4a", "flac", True),
        ("flac", "mp3", True),
        ("ogg", "wav", False),
        ("wav", "ogg", False),
    ],
)
def test_tags_and_cover_are_those_of_the_file(
    tmp_path, source, file_format, has_cover
):
    metadata = {"title": "Lied", "artist": "Ä", "album": "B", "track": "3"}
    path, cover = tmp_path / f"song.{source}", ("png", 6, 4, picture())
    tagged(path, metadata, cover)
    with open_audio(path) as reader:
        paths = write_sources(
            [noise(1, 2, 500)],
            reader,
            tmp_path / "out",
            "song",
            ["vocals"],
            np.eye(1),
            file_format,
        )
    tags = read_tags(paths[0])
    assert tags.metadata == {**metadata, "title": "Lied (vocals)"}
    assert tags.cover == (cover if has_cover else None)
    if file_format in ("flac", "wav", "ogg"):
        with soundfile.SoundFile(paths[0]) as file:
            assert (file.title, file.artist) == ("Lied (vocals)", "Ä")
    with av.open(paths[0]) as file:
        assert "REPLAYGAIN_TRACK_GAIN" not in file.metadata


def test_without_a_title_it_is_the_name_of_the_file(tmp_path):
    written(noise(1, 2, 100), tmp_path, {"bass": (0,)})
    tags = read_tags(tmp_path / "out" / "song_bass.wav")
    assert tags.metadata == {"title": "song (bass)"}


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
    sig = resample(noise(2, 2, 250).numpy(), 500, axis=2)
    sig = 5 * torch.from_numpy(sig) * torch.hann_window(500)
    files = written(sig, tmp_path, file_format="flac", remix="0:6.0206")
    for source, result in zip(sig, files.values()):
        assert torch.allclose(result, source, atol=1e-6)
    result = files["song_remix.flac"]
    remix = 2 * sig[0] + sig[1]
    gain = (result * remix).sum() / remix.square().sum()
    assert torch.allclose(result, gain * remix, atol=1e-5)
    # by its true peak, in whatever format
    assert 20 * np.log10(true_peak(result)) == pytest.approx(-1, abs=0.05)
    (tmp_path / "wav").mkdir()
    files = written(sig, tmp_path / "wav", remix="0:6.0206")
    assert torch.allclose(files["song_remix.wav"], result, atol=1e-5)
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


def test_full_disk_names_the_files(tmp_path):
    """As where the system lets no file grow any more."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    message = r"could not write .*_source1\.mp3, .*\d+ MB are free there"
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match=message):
            written(noise(2, 2, 20_000), tmp_path, file_format="mp3")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.glob("out/*"))


# --- the same format as the file ---------------------------------------------

NOISE = np.random.default_rng(0).uniform(-0.3, 0.3, (3000, 2))


def written_again(path, **options):
    """A source that is half of a file, in the same format."""
    with open_audio(path) as reader:
        sig = reader.read(reader.frames, dtype="float32").T
        reader.seek(0)
        out = path.parent / "out"
        (result,) = write_sources(
            [0.5 * sig[None]],
            *(reader, out, "song", ["half"], np.eye(1), "same"),
            **options,
        )
    return result, 0.5 * sig


@pytest.mark.parametrize(
    ("name", "subtype", "result_name"),
    [
        *(("song.wav", x, "song_half.wav") for x in ("PCM_U8", "PCM_16")),
        *(("song.wav", x, "song_half.wav") for x in ("PCM_24", "PCM_32")),
        *(("song.wav", x, "song_half.wav") for x in ("FLOAT", "DOUBLE")),
        *(("song.wav", x, "song_half.wav") for x in ("ULAW", "ALAW")),
        ("song.FLAC", "PCM_16", "song_half.flac"),
        ("song.flac", "PCM_24", "song_half.flac"),
        ("song.aiff", "PCM_24", "song_half.wav"),
        ("surround.ogg", "VORBIS", "song_half.flac"),
    ],
)
def test_the_same_samples(tmp_path, caplog, name, subtype, result_name):
    path = tmp_path / name
    sig = np.repeat(NOISE, 3, 1) if name.startswith("surround") else NOISE
    soundfile.write(path, sig, 8000, subtype)
    result, expected = written_again(path)
    assert result.name == result_name
    info = soundfile.info(result)
    kind = "PCM_24" if subtype == "VORBIS" else subtype
    assert (info.subtype, info.samplerate, info.frames) == (kind, 8000, 3000)
    errors = {"PCM_U8": 2**-8, "PCM_16": 2**-16, "ULAW": 0.02, "ALAW": 0.02}
    error = np.abs(read(result).numpy() - expected).max()
    assert error <= 1.01 * errors.get(subtype, 2**-24)
    said = f"{path}: written as {result.suffix[1:]}, the nearest"
    assert (said in caplog.text) == name.endswith((".aiff", ".ogg"))


@pytest.mark.parametrize(
    ("name", "codec", "result_codec"),
    [
        ("song.mp3", "libmp3lame", "mp3float"),
        ("song.m4a", "aac", "aac"),
        ("song.m4a", "alac", "alac"),
        ("song.wma", "wmav2", "aac"),
        ("song.mp4", "aac", "aac"),
    ],
)
def test_the_same_codec_or_the_nearest(
    tmp_path, caplog, name, codec, result_codec
):
    path = tmp_path / name
    container = {".wma": "asf", ".mp3": "mp3"}.get(path.suffix, "mp4")
    with av.open(path, "w", format=container) as file:
        stream = file.add_stream(codec, 44100, layout="stereo")
        stream.bit_rate = 256_000
        sig = np.tile(NOISE.astype("float32"), (4, 1)).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(sig, "flt", "stereo")
        frame.sample_rate = 44100
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    result, expected = written_again(path)
    assert result.suffix == {".mp3": ".mp3"}.get(path.suffix, ".m4a")
    with open_audio(result) as audio:
        assert (audio.subtype, audio.samplerate) == (result_codec, 44100)
        sig = audio.read(audio.frames).T
    assert sig.shape == expected.shape
    level = np.linalg.norm(sig) / np.linalg.norm(expected)
    assert 20 * np.log10(level) == pytest.approx(0, abs=0.5)
    if codec == "alac":
        assert np.abs(sig - expected).max() <= 2**-24
    said = f"{path}: written as m4a, the nearest" in caplog.text
    assert said == (path.suffix not in (".mp3", ".m4a"))
