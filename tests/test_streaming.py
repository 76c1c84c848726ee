"""Streams: equal to the whole, causal, the same after an hour, from a pipe."""

import functools
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from separators import RATE, close, named, performer, read

from trackformer_sb import cli_live
from trackformer_sb.cli import main
from trackformer_sb.inference.streaming import StreamingSeparator, export_onnx
from trackformer_sb.nnet.fusion import FusionMaskNet
from trackformer_sb.nnet.streaming import MEMORY_FRAMES

ROOT = Path(__file__).parents[1]


@functools.cache
def live(kind="fusion", lookahead=0, hop_length=256):
    """A causal separator whose masks are far from even."""
    options = {"causal": True, "lookahead_frames": lookahead}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if kind != "fusion":
            return performer(mask_activation=kind, **options)
        separator = named(hop_length=hop_length, patch_frames=1, **options)
        for parameter in separator.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return separator


@functools.cache
def stream_of(*args):
    return StreamingSeparator(live(*args))


def noise(time, channels=2):
    """A hum, and a hiss that comes and goes."""
    time = torch.arange(time)
    hiss = torch.randn(channels, len(time)) * (time * 1e-3).sin()
    return 0.1 * (hiss + (time * 0.05).sin())


def streamed(streaming, *blocks):
    """The stems of a stream in these blocks."""
    return torch.cat([*map(streaming.process, blocks), streaming.flush()], -1)


NETS = [
    ("fusion", 0, 256),
    ("fusion", 4, 128),
    ("softmax", 0, 64),
    ("sigmoid", 4, 64),
]


# -- equal to the whole


@pytest.mark.parametrize("net", NETS, ids=str)
@settings(max_examples=6)
@given(
    channels=st.integers(1, 2),
    sizes=st.lists(st.sampled_from([0, 1, 2, 100, 256, 1000]), max_size=8),
)
def test_a_stream_in_any_blocks_equals_the_whole(net, channels, sizes):
    torch.manual_seed(0)
    streaming, sig = stream_of(*net), noise(1 + sum(sizes), channels)
    stems = streamed(streaming, *sig.split([*sizes, 1], -1))
    with torch.no_grad():
        expected = live(*net)(sig[None])[0]
    close(stems, expected)


@pytest.mark.parametrize("net", NETS, ids=str)
def test_stems_come_as_soon_as_they_can(net):
    streaming, returned, late = stream_of(*net), 0, []
    for number, sample in enumerate(noise(4000).split(1, -1)):
        returned += streaming.process(sample).shape[-1]
        late.append(number + 1 - returned)
    streaming.flush()
    # a sample comes out with the one that completes its last frame
    assert max(late) == streaming.latency_samples - 1


@pytest.mark.parametrize("kind", ["fusion", "sigmoid"])
@pytest.mark.parametrize("lookahead", [0, 4])
def test_masks_depend_on_nothing_after_their_lookahead(kind, lookahead):
    net = live(kind, lookahead).masknet
    mix_w = torch.randn(1, net.in_channels, 40, dtype=torch.complex64)
    changed = mix_w.clone()
    changed[..., 25:] *= 3
    with torch.no_grad():
        change = (net(changed) - net(mix_w)).abs().amax((0, 1, 2))
    first = 25 - lookahead
    assert change[:first].max() < 1e-5 < 1e-3 < change[first:].min()


def test_a_steady_sound_has_steady_masks():
    # positions would tell its frames apart
    net = live("softmax").masknet
    frame = torch.randn(1, net.in_channels, 1, dtype=torch.complex64)
    with torch.no_grad():
        masks = net(frame.expand(-1, -1, 600))
    assert (masks - masks[..., :1]).abs().max() < 1e-4


# -- for any time


@pytest.mark.parametrize(
    "minutes", [4, pytest.param(60, marks=pytest.mark.slow)]
)
def test_after_any_time_a_stream_is_as_fresh(minutes):
    streaming, fresh = stream_of(), StreamingSeparator(live())
    longest = MEMORY_FRAMES[-1] * streaming.hop_length
    tone = 0.3 * (torch.arange(RATE * 60) * 0.3).sin()
    minute, song = torch.stack([tone, 0 * tone]), noise(7 * longest) ** 2
    streaming.process(minute)
    sizes = [tensor.shape for tensor in tensors_of(streaming)]
    for number in range(1, minutes):
        streaming.process(minute * (number < minutes / 2))
    assert [tensor.shape for tensor in tensors_of(streaming)] == sizes
    late, early = streamed(streaming, song), streamed(fresh, song)
    late, early = (x[..., -longest:] for x in (late, early))
    # 1.5e-5; attention that did not forget would leave ten times as much
    assert (late - early).norm() < 5e-5 * early.norm()


def tensors_of(streaming):
    """All that a stream keeps."""
    kept = [x for x in vars(streaming).values() if isinstance(x, torch.Tensor)]
    return [*kept, *streaming.state]


def test_silence_gives_silence():
    stems = streamed(stream_of(), torch.zeros(2, 5000))
    assert stems.shape == (3, 2, 5000)
    assert not stems.any()


def test_a_damaged_block_is_silence_and_the_stream_goes_on():
    streaming, sig = stream_of(), noise(6000)
    damaged = sig.clone()
    damaged[0, 2000:2500], damaged[1, 2500:3000] = torch.nan, torch.inf
    damaged[1, 2000:2010] = 1e30
    silenced = torch.where(damaged.abs() < 1e9, damaged, 0.0)
    expected = streamed(streaming, *silenced.split(2000, -1))
    counts, stems = [], []
    for block in damaged.split(2000, -1):
        stems.append(streaming.process(block))
        counts.append(streaming.damaged_blocks)
    assert counts == [0, 1, 1]
    assert torch.equal(torch.cat([*stems, streaming.flush()], -1), expected)


def test_a_reset_stream_is_a_new_one():
    streaming, sig = stream_of(), noise(3000)
    expected = streamed(streaming, sig)
    streaming.process(noise(2000, channels=1))
    streaming.reset()
    assert torch.equal(streamed(streaming, sig), expected)
    # as flush leaves it
    assert streaming.flush().shape == (3, 1, 0)
    assert streamed(streaming, sig[:, :0]).shape == (3, 2, 0)
    found = streaming.process(sig.numpy())
    np.testing.assert_array_equal(found, expected[..., : found.shape[-1]])
    streaming.reset()


def test_what_cannot_be_streamed_is_refused():
    with pytest.raises(ValueError, match="softmax, which keeps all frames"):
        FusionMaskNet(257, 4, causal=True, patch_frames=1, attention="softmax")
    with pytest.raises(TypeError, match=r"got torch\.int16"):
        stream_of().process(torch.zeros(2, 9, dtype=torch.int16))
    with pytest.raises(ValueError, match="expected a causal separator, as hpa"):
        StreamingSeparator(named())
    with pytest.raises(ValueError, match="patch_frames 1 and steady_share 0"):
        FusionMaskNet(257, 4, causal=True)
    streaming = stream_of()
    with pytest.raises(ValueError, match=r"1 or 2 channels, got \[100\]"):
        streaming.process(torch.zeros(100))
    streaming.process(torch.zeros(2, 100))
    with pytest.raises(ValueError, match="2 channels as before, got 1"):
        streaming.process(torch.zeros(1, 100))
    streaming.reset()


# -- without torch


def test_the_exported_net_separates_a_file(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    separator, net = live("fusion", 2), tmp_path / "live.onnx"
    export_onnx(separator, net)
    sig = torch.cat([torch.zeros(2, 2000), noise(6001)], -1)
    song, vocals = tmp_path / "song.wav", tmp_path / "vocals.wav"
    soundfile.write(song, sig.T.numpy(), RATE, subtype="FLOAT")
    script = ROOT / "examples" / "live_onnx.py"
    command = [sys.executable, script, net, song, "vocals", vocals]
    subprocess.run(command, check=True)
    expected = streamed(StreamingSeparator(separator), sig)[1]
    # of 16 bits
    close(read(vocals), expected)


# -- the command


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(live().export(tmp_path_factory.mktemp("live")))


def test_a_pipe_gives_a_stem_as_long_as_the_sound(model):
    sig, command = noise(RATE), [sys.executable, "-m", "trackformer_sb", "live"]
    result = subprocess.run(
        [*command, "--model", model, "--without", "vocals"],
        input=sig.T.contiguous().numpy().tobytes() + b"cut",
        capture_output=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    *_, cut, summary = result.stderr.decode().splitlines()
    assert cut.endswith("in the middle of a sample: 3 bytes of 8 are left out")
    assert summary.startswith("trackformer live: 1.0 s in ")
    found = np.frombuffer(result.stdout, "float32").reshape(-1, 2).copy()
    drums, _, other = streamed(stream_of(), sig)
    close(torch.from_numpy(found).T, drums + other)


def test_unknown_stems_are_refused(model, capsys):
    assert main(["live", "--model", model, "--stems", "vocals,flute"]) == 2
    message = "this model has drums, vocals, other; got flute"
    assert message in capsys.readouterr().err


def test_clock_counts_blocks_that_come_too_late():
    clock = cli_live.Clock()
    for busy in (0.01, 0.2, 0.01, 0.01):
        clock.count(busy, sound=0.06)
    # the second is 140 ms behind, the third 90 and the last 40, which is caught
    # up before it is heard
    assert (clock.blocks, clock.late) == (4, 2)
    assert clock.factor == pytest.approx(0.23 / 0.24)


class Devices:
    """Stands in for sounddevice: a microphone and a loudspeaker."""

    PortAudioError = RuntimeError

    def __init__(self, sig):
        self.sig, self.played, self.opened = sig.T.numpy(), [], []
        self.InputStream = self.OutputStream = self.open

    def open(self, samplerate, device, **options):
        if device == "of 48 kHz":
            raise self.PortAudioError("Invalid sample rate")
        self.opened.append((device, samplerate))
        return self

    def start(self):
        pass

    def stop(self):
        self.stopped = True

    def read(self, count):
        if len(self.sig) < count:
            raise KeyboardInterrupt
        block, self.sig = self.sig[:count], self.sig[count:]
        return block, len(self.sig) < count

    def write(self, block):
        self.played.append(torch.from_numpy(block).T)
        return False


def test_devices_play_what_they_hear(model, capsys, monkeypatch):
    sig = noise(RATE)
    devices = Devices(sig)
    monkeypatch.setitem(sys.modules, "sounddevice", devices)
    words = ["live", "--model", model, "--stems", "drums"]
    words += ["--input-device", "3", "--output-device"]
    assert main([*words, "speakers"]) == 130
    assert devices.stopped
    assert devices.opened == [(3, RATE), ("speakers", RATE)]
    played = torch.cat(devices.played, -1)
    expected = streamed(stream_of(), sig)[0, :, : played.shape[-1]]
    assert RATE - played.shape[-1] < 1000
    close(played, expected, 1e-5)
    # the microphone overflowed once
    assert " 1 late, " in capsys.readouterr().err
    assert main([*words, "of 48 kHz"]) == 2
    message = "--output-device of 48 kHz: Invalid sample rate"
    assert message in capsys.readouterr().err


def test_a_slow_machine_and_damage_are_told_once(model, capsys, monkeypatch):
    sound = 8 * [noise(RATE).T.numpy() * np.nan] + [np.zeros((0, 2))]
    blocks = iter(sound)
    monkeypatch.setattr(cli_live.Pipe, "read", lambda *_: (next(blocks), 0))
    monkeypatch.setattr(cli_live.Pipe, "write", lambda *_: False)
    seconds = iter(range(0, 1000, 2))
    clock = types.SimpleNamespace(perf_counter=lambda: next(seconds))
    monkeypatch.setattr(cli_live, "time", clock)
    assert main(["live", "--model", model, "--stems", "drums"]) == 0
    *_, damage, slow, summary = capsys.readouterr().err.splitlines()
    assert damage.endswith("NaN or above 100: taken as silence")
    assert "the work is 2.0 s behind the sound: end other programs, or" in slow
    assert "8.0 s in 8 blocks, 8 late, 2.00 s of work a second, 8 wi" in summary
