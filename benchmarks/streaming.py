"""Live separation: latency, speed of a block, memory over an hour.

    python benchmarks/streaming.py [MODEL ...] [--minutes 60]

Each candidate takes noise in blocks of its hop, as a sound card gives them, in
a process of its own with one thread, as fast as it goes:

- torch: `StreamingSeparator`, as `trackformer live` runs it;
- onnxruntime: what `trackformer export --onnx` writes, with the STFT of numpy,
  as in examples/live_onnx.py;
- open-unmix: the four targets of umxhq with a one-directional LSTM, whose state
  is handed from block to block, masks by magnitude without its Wiener filter,
  on its STFT of 4096 samples with hop 1024.

A MODEL is the folder of a live separator. Without one, nets of the sizes of
hparams/separator_live.yaml with hop 512 and 256 have random weights, as
open-unmix has. "Latency" is that of the algorithm: how much later than a
sample its stems are known, at most. "Work" is seconds of it a second of sound;
times of a block are the median and the 99th percentile.

Memory: the resident set of a stream of `--minutes` after its first minute and
at its end, and the work of these two minutes.

What a live model separates, beside one that sees the whole song and one without
attention (`--num_layers=0` in training), is measured by

    python benchmarks/quality.py default LIVE WITHOUT --data FOLDER
"""

import pathlib
import tempfile
import time

import numpy as np
import psutil
import torch
from common import (
    Record,
    in_fresh_process,
    new_parser,
    parse_args,
    say,
    table,
    verdict,
)
from hyperpyyaml import load_hyperpyyaml
from torch import nn

from trackformer_sb.inference.separator import Separator, load_separator
from trackformer_sb.inference.streaming import StreamingSeparator, export_onnx

YAML = pathlib.Path(__file__).parents[1] / "hparams" / "separator_live.yaml"
RANDOM = {f"random weights, hop {hop}": hop for hop in (512, 256)}
OPEN_UNMIX = "open-unmix, one-directional"
RATE = 44100
WORK_TARGET, GROWTH_TARGET_MB = 0.5, 5.0


def live_separator(name):
    """A model, or one of RANDOM."""
    if name not in RANDOM:
        return load_separator(name, "cpu")
    text = YAML.read_text(encoding="utf-8")
    hparams = load_hyperpyyaml(text, {"hop_length": RANDOM[name]})
    parts = (hparams[key] for key in ("Encoder", "MaskNet", "Decoder"))
    sizes = (hparams[key] for key in ("sample_rate", "num_spks", "classes"))
    return Separator(*parts, *sizes)


def make_torch(name):
    """What takes a block [2, hop] of numpy; hop and latency in samples."""
    streaming = StreamingSeparator(live_separator(name))
    streaming.prepare(channels=2)
    return streaming.process, streaming.hop_length, streaming.latency_samples


class SpectralStream:
    """Blocks of a hop through an STFT of numpy and back.

    Arguments
    ---------
    n_fft, hop_length : int
        In samples.
    separate : callable
        Spectrum [2, freq] -> masked ones [stems, 2, freq], maybe of an earlier
        frame.
    """

    def __init__(self, n_fft, hop_length, separate):
        self.hop_length, self.separate = hop_length, separate
        self.window = np.hanning(n_fft + 1)[:-1]
        self.squares = np.square(self.window).reshape(-1, hop_length).sum(0)
        self.heard, self.sums = np.zeros((2, n_fft)), 0.0

    def __call__(self, block):
        """[2, hop] -> stems [stems, 2, hop], late by the window."""
        hop = self.hop_length
        self.heard = np.concatenate([self.heard[:, hop:], block], 1)
        masked = self.separate(np.fft.rfft(self.heard * self.window))
        self.sums = self.sums + np.fft.irfft(masked) * self.window
        done = self.sums[..., :hop] / self.squares
        rest = self.sums[..., hop:]
        self.sums = np.concatenate([rest, np.zeros_like(done)], -1)
        return done


def make_onnx(name):
    """Like ``make_torch``."""
    import onnxruntime

    separator = live_separator(name)
    latency = StreamingSeparator(separator).latency_samples
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/live.onnx"
        export_onnx(separator, path)
        net = onnxruntime.InferenceSession(path, options)
    inputs = net.get_inputs()
    state = {x.name: np.zeros(x.shape, "float32") for x in inputs[2:]}
    waiting = [np.zeros((2, inputs[0].shape[2]))]
    waiting *= separator.masknet.lookahead_frames

    def separate(spectrum):
        waiting.append(spectrum)
        frame = spectrum.astype("complex64")[None, ..., None]
        masks, *rest = net.run(
            None, {"real": frame.real, "imag": frame.imag} | state
        )
        state.update(zip(state, rest))
        return waiting.pop(0) * masks[..., 0]

    encoder = separator.encoder
    sizes = encoder.n_fft, encoder.hop_length
    return SpectralStream(*sizes, separate), encoder.hop_length, latency


class KeptState(nn.Module):
    """An LSTM that goes on where it was."""

    def __init__(self, lstm):
        super().__init__()
        self.lstm, self.state = lstm, None

    def forward(self, x):
        """As an LSTM."""
        x, self.state = self.lstm(x, self.state)
        return x, self.state


def make_open_unmix(_):
    """Like ``make_torch``."""
    from openunmix.model import OpenUnmix

    n_fft, hop_length = 4096, 1024
    nets = []
    for _ in range(4):
        # 16 kHz of it go in, as in umxhq
        net = OpenUnmix(
            n_fft // 2 + 1, 2, 512, unidirectional=True, max_bin=1487
        )
        net.lstm = KeptState(net.lstm)
        nets.append(net.eval())

    @torch.inference_mode()
    def separate(spectrum):
        magnitude = np.abs(spectrum)
        x = torch.from_numpy(magnitude).float()[None, ..., None]
        found = torch.stack([net(x)[0, ..., 0] for net in nets]).numpy()
        return found * (spectrum / np.maximum(magnitude, 1e-10))

    return SpectralStream(n_fft, hop_length, separate), hop_length, n_fft


MAKERS = {
    "torch": make_torch,
    "onnxruntime": make_onnx,
    "open-unmix": make_open_unmix,
}


def measure(kind, name, seconds):
    """A stream of so many seconds.

    Gives hop and latency in samples, seconds of the blocks, and the resident
    set in MB after each minute and at the end.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    process, hop, latency = MAKERS[kind](name)
    rng, resident = np.random.default_rng(0), []
    # one second of it, again and again
    noise = rng.normal(0.0, 0.1, (2, RATE + hop)).astype("float32")
    for _ in range(20):
        process(noise[:, :hop])
    blocks = int(seconds * RATE / hop)
    spent = np.ones(blocks)  # in memory from the start
    a_minute = 60 * RATE // hop
    for number in range(blocks):
        start = number * hop % RATE
        block = noise[:, start : start + hop]
        began = time.perf_counter()
        process(block)
        spent[number] = time.perf_counter() - began
        if (number + 1) % a_minute == 0 or number == blocks - 1:
            resident.append(psutil.Process().memory_info().rss / 2**20)
    return hop, latency, spent, resident


def work(spent, hop):
    """Seconds of work for a second of sound."""
    return spent.mean() * RATE / hop


def main():
    """Measures speeds, then memory."""
    parser = new_parser(__doc__, "streaming")
    parser.add_argument("models", nargs="*", metavar="MODEL", help="folders")
    parser.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        help="of the stream that speed is measured on (default: %(default)s); "
        "0 leaves it out",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=60.0,
        help="of the stream that memory is measured on (default: %(default)s)",
    )
    args = parse_args(parser)
    torch.set_num_threads(1)
    record = Record("Live separation", __doc__, args.output, args.device)
    models = args.models or list(RANDOM)
    candidates = [
        *((kind, name) for name in models for kind in ("torch", "onnxruntime")),
        ("open-unmix", OPEN_UNMIX),
    ]
    rows, verdicts = [], []
    for kind, name in candidates if args.seconds else ():
        found, reason = in_fresh_process(measure, kind, name, args.seconds)
        if reason:
            rows.append([name, kind, reason, *[""] * 4])
            say(*rows[-1])
            continue
        hop, latency, spent, _ = found
        middle, late = 1e3 * np.percentile(spent, [50, 99])
        label = (
            name if name in (*RANDOM, OPEN_UNMIX) else pathlib.Path(name).name
        )
        rows.append(
            [
                *(label, kind, f"{hop} ({1e3 * hop / RATE:.1f} ms)"),
                f"{latency} ({1e3 * latency / RATE:.0f} ms)",
                f"{work(spent, hop):.3f}",
                *(f"{middle:.2f}", f"{late:.2f}"),
            ]
        )
        say(*rows[-1])
        if kind != "open-unmix":
            verdicts.append(
                verdict(
                    f"work of {label} in {kind}",
                    work(spent, hop),
                    WORK_TARGET,
                    higher_is_better=False,
                )
            )
    found, _ = in_fresh_process(measure, "torch", models[0], 60 * args.minutes)
    hop, _, spent, resident = found
    a_minute = 60 * RATE // hop
    memory = [
        [when, f"{megabytes:.1f}", f"{work(part, hop):.3f}"]
        for when, megabytes, part in (
            ("first minute", resident[0], spent[:a_minute]),
            (f"minute {args.minutes:g}", resident[-1], spent[-a_minute:]),
        )
    ]
    say(*memory)
    verdicts.append(
        verdict(
            "growth of memory, MB",
            resident[-1] - resident[0],
            GROWTH_TARGET_MB,
            higher_is_better=False,
        )
    )
    header = ["net", "runs in", "hop", "latency", "work"]
    speed = table([*header, "block, ms", "99th percentile, ms"], rows)
    record.write(
        *[speed] * bool(rows),
        table(["stream", "resident set, MB", "work"], memory),
        "\n".join(verdicts),
    )


if __name__ == "__main__":
    main()
