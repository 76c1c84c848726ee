"""Separates a stereo wav file frame by frame, with onnxruntime alone.

trackformer export live live.onnx --onnx
python examples/live_onnx.py live.onnx song.wav vocals vocals.wav
"""

import sys

import numpy as np
import onnxruntime
import soundfile

model, song, stem, result = sys.argv[1:]
net = onnxruntime.InferenceSession(model)
facts = net.get_modelmeta().custom_metadata_map
number = facts["names"].split(",").index(stem)
n_fft, hop = int(facts["n_fft"]), int(facts["hop_length"])
late = int(facts["lookahead_frames"])
state = {x.name: np.zeros(x.shape, "float32") for x in net.get_inputs()[2:]}
window = np.hanning(n_fft + 1)[:-1, None]
sig, rate = soundfile.read(song, always_2d=True)
if sig.shape[1] != 2 or rate != int(facts["sample_rate"]):
    sys.exit(f"{song}: expected stereo at {facts['sample_rate']} Hz")
frames, before = len(sig) // hop + n_fft // hop + late, (n_fft - hop + 1) // 2
sig = np.pad(sig, ((before, frames * hop + n_fft - len(sig)), (0, 0)))
stems, squares = np.zeros_like(sig), np.full((len(sig), 1), 1e-9)
spectra = []
for start in range(0, frames * hop, hop):
    spectra.append(np.fft.rfft(sig[start : start + n_fft] * window, axis=0))
    parts = {"real": spectra[-1].real, "imag": spectra[-1].imag}
    parts = {
        k: v.T[None, ..., None].astype("float32") for k, v in parts.items()
    }
    masks, *rest = net.run(None, parts | state)
    state = dict(zip(state, rest))
    if len(spectra) > late:  # the mask belongs to an earlier frame
        place = slice(start - late * hop, start - late * hop + n_fft)
        masked = spectra.pop(0) * masks[number, 0]
        stems[place] += np.fft.irfft(masked, axis=0) * window
        squares[place] += window**2
length = soundfile.info(song).frames
soundfile.write(result, (stems / squares)[before : before + length], rate)
