"""The ``trackformer live`` command: a stream in, one stem of it out."""

import os
import time

from trackformer_sb.cli_data import complain
from trackformer_sb.cli_model import MODEL

EPILOG = """\
examples:
  ffmpeg -re -i song.mp3 -f f32le -ac 2 -ar 44100 - |
    trackformer live --without vocals | ffplay -f f32le -ch_layout stereo
    -sample_rate 44100 -nodisp -
  trackformer live --stems drums --input-device 2 --output-device 5

devices are those that `python -m sounddevice` lists
"""

FRAME_BYTES = 4  # of a sample of a channel
READ_BYTES = 2**16  # at most, what a pipe holds
# What players keep in stock: work that is further behind is heard
BUFFER_SECONDS = 0.05
TOLD_SECONDS = 1.0  # behind, at which it is told that the machine is too slow


def add_live(parser):
    """Separate a stream of sound as it comes.

    Raw PCM (32-bit floats, channels interleaved) or a microphone in; as much,
    and less than a tenth of a second later, out.
    """
    parser.epilog = EPILOG
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--stems", metavar="NAMES", help="what comes out, as drums,bass in sum"
    )
    which.add_argument(
        "--without", metavar="NAMES", help="all but this comes out, as vocals"
    )
    model = MODEL | {"default": "live"}
    model["help"] += "; causal, as hparams/separator_live.yaml trains"
    parser.add_argument("--model", **model)
    parser.add_argument(
        "--channels", type=int, choices=(1, 2), default=2, help="(default: 2)"
    )
    parser.add_argument("--rate", type=int, help="in Hz: that of the model")
    for name in ("input", "output"):
        parser.add_argument(
            f"--{name}-device",
            metavar="DEVICE",
            help=f"its number or name, in place of the standard {name}",
        )
    parser.set_defaults(run=_live)


class Clock:
    """How far the work is behind the sound, and how often that was heard."""

    def __init__(self):
        self.blocks = self.late = 0
        self.busy = self.sound = self.behind = 0.0

    def count(self, busy, sound):
        """Counts a block of so many seconds of work and of sound."""
        self.busy += busy
        self.sound += sound
        # time that is spent waiting for sound is in neither
        self.behind = max(0.0, self.behind + busy - sound)
        self.blocks += 1
        self.late += self.behind > BUFFER_SECONDS

    @property
    def factor(self):
        """Seconds of work for a second of sound."""
        return self.busy / self.sound if self.sound else 0.0


class Pipe:
    """The standard input and output, with the methods of a device."""

    def __init__(self, args):
        self.args, self.rest, self.begun = args, b"", False
        self.frame_bytes = FRAME_BYTES * args.channels

    def read(self, frames):
        """Samples [time, channels], none at the end, and that none are lost.

        All that are there, not only some `frames`: together they take less.
        """
        import numpy as np

        data = self.rest
        while len(data) < self.frame_bytes and (more := os.read(0, READ_BYTES)):
            data += more
        headers = b"RIFF", b"fLaC", b"OggS", b"ID3"
        if not self.begun and data.startswith(headers):
            raise ValueError(
                "standard input: expected raw PCM, as of ffmpeg -i FILE -f "
                f"f32le -ac {self.args.channels} -ar 44100 -, got a file"
            )
        self.begun = True
        whole = len(data) // self.frame_bytes * self.frame_bytes
        self.rest = data[whole:]
        if self.rest and not whole:
            complain(
                self.args,
                f"the input ends in the middle of a sample: {len(data)} bytes "
                f"of {self.frame_bytes} are left out",
            )
        block = np.frombuffer(bytearray(data[:whole]), "float32")
        return block.reshape(-1, self.args.channels), False

    def write(self, block):
        """Writes samples [time, channels]; says that none come too late."""
        data = block.tobytes()
        while data:
            data = data[os.write(1, data) :]
        return False

    def stop(self):
        """What a device needs so that its last samples are heard."""


def _device(args, name, streaming):
    """An open stream of sounddevice, of one hop a block."""
    try:
        import sounddevice
    except (ImportError, OSError) as error:
        raise ImportError(
            f"--{name}-device: expected sounddevice with PortAudio, pip "
            f"install 'trackformer_sb[live]' ({error})"
        ) from error
    device = getattr(args, f"{name}_device")
    try:
        stream = getattr(sounddevice, f"{name.title()}Stream")(
            samplerate=streaming.sample_rate,
            blocksize=streaming.hop_length,
            device=int(device) if device.isdecimal() else device,
            channels=args.channels,
            dtype="float32",
            latency="low",
        )
        stream.start()
    except sounddevice.PortAudioError as error:
        # of a rate or a number of channels that it does not have
        raise OSError(f"--{name}-device {device}: {error}") from error
    return stream


def _live(args):
    import numpy as np
    import torch

    from trackformer_sb.inference.remix import chosen_stems
    from trackformer_sb.inference.streaming import StreamingSeparator

    torch.set_num_threads(1)  # of so little work, others are in the way
    streaming = StreamingSeparator(args.model)
    names = streaming.names
    chosen = chosen_stems(args.stems or args.without, dict.fromkeys(names, ()))
    gains = np.float32([(x in chosen) == bool(args.stems) for x in names])
    if args.rate not in (None, streaming.sample_rate):
        raise ValueError(
            f"--rate: expected {streaming.sample_rate}, that of the model, got "
            f"{args.rate}"
        )
    # before devices are heard, for it takes a second
    streaming.prepare(args.channels)
    clock, lost, told = Clock(), 0, False
    source = sink = Pipe(args)
    if args.input_device is not None:
        source = _device(args, "input", streaming)
    if args.output_device is not None:
        sink = _device(args, "output", streaming)

    def play(stems):
        out = np.tensordot(gains, stems, 1)
        return sink.write(out.T.copy("C"))

    try:
        while True:
            block, overflowed = source.read(streaming.hop_length)
            if not len(block):
                break
            started = time.perf_counter()
            stems = streaming.process(block.T)
            busy = time.perf_counter() - started
            clock.count(busy, len(block) / streaming.sample_rate)
            clock.late += overflowed + play(stems)
            if not lost and streaming.damaged_blocks:
                complain(
                    args, "samples that are NaN or above 100: taken as silence"
                )
            lost = streaming.damaged_blocks
            if not told and clock.behind > TOLD_SECONDS:
                told = True
                complain(
                    args,
                    f"the work is {clock.behind:.1f} s behind the sound: end "
                    "other programs, or use a model of a larger hop_length or "
                    "of fewer channels",
                )
        play(streaming.flush().numpy())
    except BrokenPipeError:
        complain(args, "nobody takes the output any more")
    finally:
        sink.stop()
        source.stop()
        damage = f", {lost} with NaN or infinite samples" * (lost > 0)
        complain(
            args,
            f"{clock.sound:.1f} s in {clock.blocks} blocks, {clock.late} late, "
            f"{clock.factor:.2f} s of work a second{damage}",
        )
