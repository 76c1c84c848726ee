"""Which stems sound, how many instruments do, and slots that come and go."""

import json

import numpy as np
import pytest
import soundfile
import torch
from separators import RATE, close, named, performer, read, write_noise
from torch.nn import functional as F

from trackformer_sb.cli import main
from trackformer_sb.inference.counting import SongCount
from trackformer_sb.inference.separator import Separator
from trackformer_sb.nnet.counting import Counter

COUNTER = {
    "class": "trackformer_sb.nnet.counting.Counter",
    "in_channels": 257,
    "num_spks": 6,
    "num_classes": 3,
}


def counting(**more):
    """A separator of drums, vocals and other, with a counter."""
    torch.manual_seed(0)
    separator = named()
    config = separator.config | {"counter": {**COUNTER, **more}}
    return Separator(**config).eval()


@pytest.fixture
def song(tmp_path):
    return write_noise(tmp_path / "song.wav", 6 * RATE)


class Says:
    """A counter that says what it is told, one second after another."""

    thresholds = (0.5, 0.5)
    sounding = Counter.sounding

    def __init__(self, *chunks):
        self.chunks = iter(chunks)

    def __call__(self, mix_w, est_mask):
        count = torch.tensor([next(self.chunks)])
        logits = torch.stack([count - 2.5, torch.full_like(count, -1)], 1)
        return count, logits


def test_level_of_a_slot_follows_its_mask_and_not_the_volume():
    torch.manual_seed(0)
    counter = Counter(257, 2, 1)
    mix_w = torch.randn(1, 2, 257, 16, dtype=torch.complex64)
    half = torch.arange(257)[:, None] < 128
    masks = torch.stack([half, ~half]).float().expand(-1, -1, 16).unsqueeze(1)
    levels = counter.levels(mix_w, masks)[0]
    low, high = counter.bands[:, :128].sum(1) > 0, slice(-3, None)
    assert levels.shape == (2, 24, 2)
    assert (levels[0, high] == -4).all()
    assert (levels[1, high] > 0).all()
    assert (levels[0, low] > -1).all()
    louder = counter.levels(5 * mix_w, masks)[0]
    close(louder, levels, 1e-3)


def test_a_counter_learns_which_of_four_slots_sound():
    torch.manual_seed(0)
    counter = Counter(257, 4, 4)
    optimizer = torch.optim.Adam(counter.parameters(), 1e-2)
    for _ in range(100):
        there = (torch.rand(32, 4) < 0.5).float()
        power = torch.rand(4, 32, 257, 8) * there.T[..., None, None]
        masks = power / (power.sum(0) + 1e-9)
        mix_w = power.sum(0).sqrt().unsqueeze(1) + 0j
        count, logits = counter(mix_w, masks)
        error = (count - there.sum(1, keepdim=True)).abs().mean()
        known = there.unsqueeze(-1)
        loss = F.binary_cross_entropy_with_logits(logits, known)
        optimizer.zero_grad()
        (error + loss).backward()
        optimizer.step()
    assert error < 0.3
    assert ((logits > 0) == known).float().mean() > 0.95


def test_overlapping_chunks_tell_each_second_of_a_song():
    # chunks of 4 s at 0, 2 and, the last, 3 s
    chunks = [[1.0] * 4, [1.0, 1.0, 3.0, 3.0], [1.0, 3.0, 3.0, 4.0]]
    song = SongCount(Says(*chunks), 7.0, 4.0, 0.5)
    for _ in chunks:
        song(None, (None,), None)
    record = song.record()
    assert record["curve"] == [1.0, 1.0, 1.0, 1.0, 3.0, 3.0, 4.0]
    assert record["mean"] == 2.0
    sounding, _ = song.outputs(np.ones(2))
    assert sounding.tolist() == [True, False]


def test_stems_auto_writes_those_that_sound(tmp_path, song, capsys):
    separator = counting(thresholds=[0.0, 1.0, 0.0])  # never vocals
    model = separator.export(tmp_path / "model")
    out = tmp_path / "out"
    words = [song, "--model", str(model), "--out", str(out)]
    words += ["--stems", "auto", "--chunk_seconds", "2", "--figure"]
    assert main(["separate", *words]) == 0
    names = ["song_drums.wav", "song_other.wav", "song_figure.png"]
    assert capsys.readouterr().out.split() == [str(out / x) for x in names]
    assert not (out / "song_vocals.wav").exists()
    sum_of_stems = sum(read(out / name) for name in names[:2])
    close(sum_of_stems, read(song), 1e-5)
    (record,) = json.loads((out / "trackformer.json").read_text()).values()
    assert len(record["count"]["curve"]) == 6
    assert main(["separate", *words, "--skip-existing"]) == 0
    assert "skipped" in capsys.readouterr().err
    # in memory, and a remix stays as it is
    options = {"outputs": "auto", "chunk_seconds": 2, "progressbar": False}
    *stems, remix = separator.separate_file(song, remix="drums:-inf", **options)
    close(sum(stems), read(song), 1e-5)
    all_stems = separator.separate_file(song, **options | {"outputs": None})
    close(stems[0], all_stems[0], 1e-6)  # other takes in the vocals
    options["outputs"] = {"rest": (2, 3, 4, 5)}
    (rest,) = separator.separate_file(song, **options)
    close(remix, rest, 1e-5)


def test_a_counter_changes_no_mask_and_need_not_be_there(tmp_path):
    plain = named()
    config = dict(plain.config)
    del config["counter"]  # as of models before there was one
    with pytest.raises(ValueError, match="auto: expected a model with a count"):
        Separator(**config).mixes("auto")
    separator = counting()
    separator.load_state_dict(plain.state_dict(), strict=False)
    mix = torch.randn(1, 2, RATE)
    assert torch.equal(separator(mix), plain(mix))
    again = Separator.from_pretrained(separator.export(tmp_path / "model"))
    for key, value in separator.counter.state_dict().items():
        assert torch.equal(again.counter.state_dict()[key], value)


def test_outputs_of_one_instrument_are_merged(tmp_path):
    """Without names: a tone in two outputs, a higher one, and silence."""
    separator = performer(num_spks=4)
    time = torch.arange(4 * RATE) / RATE
    low, high = (torch.sin(2 * torch.pi * f * time) for f in (220, 1500))
    faint = 1e-3 * torch.sin(2 * torch.pi * 3000 * time)
    outputs = torch.stack([0.7 * low, high, 0.3 * low, faint])
    # as a net would tell them apart
    separator._separated = lambda mix, *_: outputs.unsqueeze(1)[None]
    path = tmp_path / "song.wav"
    soundfile.write(path, outputs.sum(0).numpy(), RATE, "FLOAT")
    options = {"outputs": "auto", "progressbar": False}
    paths = separator.separate_file(path, tmp_path, **options)
    assert [x.name for x in paths] == ["song_source0.wav", "song_source1.wav"]
    for path, tone in zip(paths, (low, high)):
        similarity = torch.cosine_similarity(read(path)[0], tone, dim=0)
        assert similarity > 0.99
