"""trackformer evaluate: what counts, models of three libraries, bad songs."""

import csv
import math
import os

import pytest
import soundfile
import torch
from separators import RATE, named, performer

from trackformer_sb.cli import main
from trackformer_sb.data.music import Music
from trackformer_sb.data.remix import sum_by_class
from trackformer_sb.evaluation import (
    MEASURES,
    averages,
    load_evaluated,
    measure_song,
    window_sdr,
)
from trackformer_sb.objectives import metrics


def write_song(folder, seconds=2.5, **stems):
    """A song of stems that sound in one second of it and rest in the next."""
    folder.mkdir(parents=True)
    for name, (hertz, rest) in stems.items():
        time = torch.arange(int(seconds * RATE)) / RATE
        sounds = time.long() % 2 != rest
        sig = 0.3 * torch.sin(2 * torch.pi * hertz * time) * sounds
        soundfile.write(folder / f"{name}.wav", sig, RATE, subtype="FLOAT")


@pytest.fixture
def data(tmp_path):
    """Two songs, the second one without a bass."""
    folder = tmp_path / "songs"
    write_song(folder / "a", drums=(900, 1), bass=(100, 2), clav=(400, 2))
    write_song(folder / "b", drums=(700, 2), horns=(300, 2), clav=(100, 2))
    return folder


def found_in(data, separate_window, number=0, seconds=1.0):
    """(masks, class) -> measure -> mean, of a song."""
    song = Music(data, "stems").songs()[number]
    rows = averages(measure_song(separate_window, RATE, song, seconds))
    measures = ("windows", *MEASURES)
    return {tuple(row[:2]): dict(zip(measures, row[2:])) for row in rows}


def quarters(mix, stems):
    slots = (mix / 4).expand(4, -1, -1)
    return (slots, slots), ["drums", "bass", "vocals", "other"]


def truth(mix, stems):
    classes = sum_by_class(stems)
    return (torch.stack([*classes.values()]),), list(classes)


def command(*args):
    return main(["evaluate", *map(str, args), "--seconds", "1"])


# -- measures


def test_the_mixture_gains_nothing_and_leaks_what_it_is(data):
    found = found_in(data, quarters)
    for masks in ("as they are", "averaged"):
        for name in ("drums", "bass", "other", "mean"):
            row = found[masks, name]
            assert row["si_snri"] == pytest.approx(0, abs=1e-3)
        chosen = found[masks, "chosen"]
        assert chosen["one_to_one"] == pytest.approx(0, abs=1e-3)
    # the drums rest in the second window of two
    assert found["averaged", "drums"]["windows"] == 1
    assert found["averaged", "bass"]["windows"] == 2
    # a quarter of the amplitude; vocals are in none
    quarter = pytest.approx(20 * math.log10(4), abs=0.01)
    for name in ("drums", "vocals", "mean"):
        assert found["averaged", name]["leakage"] == quarter
    assert found["averaged", "vocals"]["si_snri"] is None
    assert found["averaged", "bass"]["leakage"] is None


def test_the_truth_gains_as_much_as_can_be(data):
    found = found_in(data, truth)
    assert {masks for masks, _ in found} == {"as they are"}
    for name in ("drums", "bass", "other"):
        row = found["as they are", name]
        assert min(row["si_snri"], row["si_sdr"], row["sdr"]) > 50
    # classes are no single stems
    chosen = found["as they are", "chosen"]
    assert min(chosen["one_to_one"], chosen["grouped"], chosen["sdr"]) > 50


def test_a_song_without_bass_has_it_in_other(data):
    def swapped(mix, stems):
        """All but the drums is called bass."""
        (slots,), names = truth(mix, stems)
        return (slots,), [x.replace("other", "bass") for x in names]

    found = found_in(data, swapped, number=1)
    assert found["as they are", "other"]["si_snri"] > 50
    assert ("as they are", "bass") not in found
    # where it has one, that is what is compared
    assert found_in(data, swapped)["as they are", "bass"]["si_snri"] < 50


def test_stems_of_other_lengths_and_rates_and_silent_ones(data, tmp_path):
    write_song(data / "c", drums=(900, 2), clav=(200, 2), pad=(0, 2))
    write_song(data / "short", seconds=1.2, bass=(100, 2))
    (data / "short" / "bass.wav").rename(data / "c" / "bass.wav")
    (data / "short").rmdir()
    sig, _ = soundfile.read(data / "c" / "clav.wav")
    soundfile.write(data / "c" / "clav.wav", sig[::2], RATE // 2, "FLOAT")
    found = found_in(data, truth, number=2)
    # the bass ends in the second window, the pad is silence
    assert found["as they are", "bass"]["windows"] == 2
    assert found["as they are", "other"]["si_snri"] > 50
    values = [x for row in found.values() for x in row.values()]
    assert all(x is None or math.isfinite(x) for x in values)


def test_sdr_is_that_of_museval():
    # museval 0.4.1, bss_eval(window=hop=8, filters_len=512), images: the
    # ratio of the stem to the whole error, where nothing is silent
    stems = torch.ones(2, 2, 24)
    stems[1, :, 8:16] = 0
    est_stems = stems * 1.1
    ratio = window_sdr(est_stems, stems, 8)
    assert ratio[0].tolist() == pytest.approx([20, math.nan, 20], nan_ok=True)
    assert ratio[1].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    "number, decibels", [(0, 20), (2, 40)], ids=["drums rest", "all sound"]
)
def test_museval_takes_the_median_of_seconds(data, number, decibels):
    write_song(data / "c", 3.5, bass=(100, 2), drums=(900, 2))
    errors = iter([0.1, 0.001, 0.01])

    def separate_window(mix, stems):
        (slots,), names = truth(mix, stems)
        return (slots * (1 + next(errors)),), names

    found = found_in(data, separate_window, number)
    for name in ("bass", "mean"):
        value = found["as they are", name]["museval"]
        assert value == pytest.approx(decibels, abs=1e-3)


def test_vocals_are_measured_by_their_name(data, monkeypatch):
    pytest.importorskip("pesq")
    heard = []
    monkeypatch.setattr(metrics, "pesq", lambda *args: heard.append(args) or 2)
    write_song(data / "c", vocals=(300, 2), drums=(900, 2))
    found = found_in(data, truth, number=2)
    assert found["as they are", "chosen"]["pesq"] == 2
    est_source, vocals, rate = heard[0]
    assert rate == RATE and est_source.shape == (1, RATE)
    assert torch.equal(est_source[0], vocals)
    # without names the nearest of all is chosen
    found_in(data, lambda mix, stems: (truth(mix, stems)[0], None), number=2)
    assert len(heard[-1][0]) == 2


# -- models


def test_a_model_with_names(data, tmp_path, capsys):
    named(["drums", "bass", "vocals", "other"]).save_pretrained(tmp_path / "m")
    out = tmp_path / "out.csv"
    assert command(tmp_path / "m", "--data", data, "--out", out) == 0
    table = capsys.readouterr().out
    for words in (
        "si_snri",
        "museval",
        "| as they are | drums | 3 |",
        "| mean | - |",
    ):
        assert words in table
    text = out.read_text("utf-8")
    assert "nan" not in (text + table).lower()
    rows = list(csv.DictReader(text.splitlines()))
    assert {row["song"] for row in rows} == {"a", "b"}
    drums = [
        float(row["si_snri"])
        for row in rows
        if (row["masks"], row["class"]) == ("averaged", "drums")
    ]
    assert len(drums) == 2
    # weighted by their windows
    mean = (drums[0] + 2 * drums[1]) / 3
    assert f"| averaged | drums | 3 | {mean:.2f} |" in table


@pytest.mark.parametrize(
    "model", [performer(), named(["vocals", "rest"])], ids=["none", "others"]
)
def test_outputs_without_known_names_are_chosen_by_the_truth(
    model, data, tmp_path, capsys
):
    model.save_pretrained(tmp_path / "m")
    assert command(tmp_path / "m", "--data", data) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    classes = [line.split(" | ")[1] for line in lines]
    assert classes == ["chosen"] * 2


def test_masks_as_they_are_and_their_averages(tmp_path):
    model = performer(mask_activation="sigmoid")
    model.save_pretrained(tmp_path / "m")
    separate_window, rate = load_evaluated(str(tmp_path / "m"), device="cpu")
    mix = torch.randn(2, 5000)
    with torch.no_grad():
        (slots, averaged), classes = separate_window(mix, {})
        (one, _), _ = separate_window(mix[:1], {})
        expected = model(mix[:1])[0]
    assert rate == RATE and classes is None
    torch.testing.assert_close(one[:, 0], expected)
    for each in (slots, averaged):
        assert each.shape == (3, 2, 5000)
        torch.testing.assert_close(each.sum(0), mix, atol=1e-4, rtol=1e-4)
    # averaged masks are a filter that stays as it is
    spectra = model.encoder(averaged.flatten(0, 1)).unflatten(0, (3, 2))
    gain = (spectra * model.encoder(mix).conj()).real.mean(1)
    gain = gain / model.encoder(mix).abs().square().mean(0)
    middle = gain[..., 20:60]
    assert middle.std(-1).median() < 0.1 * slots.std()


def test_a_model_of_speechbrain(data, tmp_path, capsys):
    folder = str(tmp_path / "m")
    model = performer()
    model.save_pretrained(folder)
    separate_window, rate = load_evaluated(folder, "speechbrain", "cpu")
    mix = torch.randn(2, 5000)
    with torch.no_grad():
        (slots,), classes = separate_window(mix, {})
        expected = model(mix.mean(0, keepdim=True))[0]
    assert (rate, classes) == (RATE, None)
    torch.testing.assert_close(slots[:, 0], expected, atol=1e-5, rtol=1e-4)
    options = "--library", "speechbrain", "--data", data
    assert command(folder, *options) == 0
    assert "| as they are | chosen | 4 |" in capsys.readouterr().out


class Trojan:
    """What runs a command where a pickle of it is read."""

    def __reduce__(self):
        return os.mkdir, ("trojan",)


def test_a_model_of_asteroid(data, tmp_path, capsys, monkeypatch):
    models = pytest.importorskip("asteroid.models")
    sizes = {"n_blocks": 2, "n_repeats": 1, "bn_chan": 8, "hid_chan": 16}
    model = models.ConvTasNet(
        3, sample_rate=RATE, n_filters=16, skip_chan=8, **sizes
    ).eval()
    (tmp_path / "m").mkdir()
    path = tmp_path / "m" / "pytorch_model.bin"
    torch.save(model.serialize(), path)
    mix = torch.randn(2, 5000)
    for source in (path, path.parent):
        separate_window, rate = load_evaluated(str(source), "asteroid", "cpu")
        with torch.no_grad():
            (slots,), classes = separate_window(mix, {})
            expected = model(mix.mean(0))
        assert (rate, classes) == (RATE, None)
        torch.testing.assert_close(slots[:, 0], expected)
    options = "--library", "asteroid", "--data", data
    assert command(path, *options) == 0
    assert "| as they are | chosen | 4 |" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    torch.save({"model_name": Trojan()}, path)
    assert command(path, *options) == 2
    assert "expected a separator of asteroid" in capsys.readouterr().err
    assert not (tmp_path / "trojan").exists()


# -- bad input


def test_no_songs_with_stems_and_no_model(data, tmp_path, capsys):
    performer().save_pretrained(tmp_path / "m")
    assert command(tmp_path / "m", "--data", data / "a") == 2
    assert "expected one folder a song" in capsys.readouterr().err
    assert command(tmp_path / "m", "--data", tmp_path / "none") == 2
    assert "none" in capsys.readouterr().err
    for library in ("speechbrain", "asteroid"):
        if library == "asteroid":
            pytest.importorskip("asteroid")
        (tmp_path / "pytorch_model.bin").write_bytes(b"no pickle")
        (tmp_path / "hyperparams.yaml").write_text("sample_rate: 8000")
        options = "--library", library, "--data", data
        assert command(tmp_path, *options) == 2
        said = capsys.readouterr().err
        assert f"expected a separator of {library}" in said
        assert str(tmp_path) in said


def test_a_damaged_song_is_left_out(data, tmp_path, capsys):
    performer().save_pretrained(tmp_path / "m")
    path = data / "a" / "drums.wav"
    sig, _ = soundfile.read(path)
    soundfile.write(path, sig * math.nan, RATE, "FLOAT")
    assert command(tmp_path / "m", "--data", data) == 1
    said = capsys.readouterr()
    assert "| as they are | chosen | 2 |" in said.out
    assert "evaluate: a: " in said.err and "drums.wav" in said.err


def test_without_pesq_it_is_said(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(metrics, "HAS_PESQ", False)
    performer().save_pretrained(tmp_path / "m")
    write_song(data / "c", vocals=(300, 2), drums=(900, 2))
    assert command(tmp_path / "m", "--data", data) == 0
    assert capsys.readouterr().err.count("no PESQ of vocals") == 1
