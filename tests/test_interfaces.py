"""The separator as its users meet it: files in, files out, clear errors."""

import os

import numpy as np
import pytest
import soundfile
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.inference.separation import SepformerSeparation
from speechbrain.utils.fetching import FetchConfig

from trackformer_sb.inference.export import export_separator
from trackformer_sb.inference.interfaces import PerformerSeparation
from trackformer_sb.inference.separation import separate

TINY = """\
sample_rate: 8000
num_spks: 3
Encoder: !new:trackformer_sb.nnet.stft.STFTEncoder
  n_fft: 256
  hop_length: 64
MaskNet: !new:trackformer_sb.nnet.masknet.PerformerMaskNet
  in_channels: 129
  num_spks: 3
  d_model: 16
  nhead: 2
  num_layers: 1
  n_features: 16
  mask_activation: {activation}
Decoder: !new:trackformer_sb.nnet.stft.STFTDecoder
  n_fft: 256
  hop_length: 64
modules: {{encoder: !ref <Encoder>, masknet: !ref <MaskNet>,
  decoder: !ref <Decoder>}}
"""
CPU = {"device": "cpu"}


def write_separator(folder, activation="softmax"):
    """Exports a tiny separator whose outputs differ."""
    yaml = folder.parent / "hyperparams.yaml"
    yaml.write_text(TINY.format(activation=activation))
    torch.manual_seed(0)
    modules = load_hyperpyyaml(yaml.read_text())["modules"]
    for parameter in modules["masknet"].parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return export_separator(yaml, modules, folder)


@pytest.fixture
def folder(tmp_path):
    return write_separator(tmp_path / "separator")


@pytest.fixture
def separator(folder):
    return PerformerSeparation.from_hparams(folder, run_opts=CPU)


def write_noise(path, rate, channels, frames, subtype="FLOAT"):
    """A file of noise; returns what a reader gets, [channels, time]."""
    generator = np.random.default_rng(0)
    sig = generator.normal(0.0, 0.1, (frames, channels)).astype(np.float32)
    soundfile.write(path, sig, rate, subtype)
    return read(path)


def read(path):
    sig, _ = soundfile.read(path, dtype="float32", always_2d=True)
    return torch.from_numpy(sig).T


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_separate_batch(tmp_path, activation):
    folder = write_separator(tmp_path / "separator", activation)
    separator = PerformerSeparation.from_hparams(folder, run_opts=CPU)
    mix = torch.randn(2, 3000)
    est_source = separator.separate_batch(mix)
    assert est_source.shape == (2, 3000, 3)
    assert torch.allclose(est_source.sum(-1), mix, atol=1e-5)
    assert torch.equal(separator(mix), est_source)
    expected, _ = separate(
        mix,
        separator.mods.encoder,
        separator.mods.masknet,
        separator.mods.decoder,
        mixture_consistency=activation == "sigmoid",
    )
    assert torch.equal(est_source, expected.transpose(1, 2))
    # the outputs are not the same, and nothing scales them to a peak of one
    assert not torch.allclose(est_source[..., 0], est_source[..., 1], atol=0.1)
    quiet = separator.separate_batch(mix * 1e-3)
    assert torch.allclose(quiet, est_source * 1e-3, atol=1e-5)


def test_separate_channels(separator):
    mix = torch.randn(2, 6, 3000)
    est_source = separator.separate_channels(mix)
    assert est_source.shape == (2, 3, 6, 3000)
    assert torch.allclose(est_source.sum(1), mix, atol=1e-5)
    mono = separator.separate_channels(mix[:, :1])[:, :, 0]
    batch = separator.separate_batch(mix[:, 0]).transpose(1, 2)
    assert torch.allclose(mono, batch, atol=1e-6)


def test_shapes_are_checked(separator):
    with pytest.raises(ValueError, match=r"expected mix \[batch, time\]"):
        separator.separate_batch(torch.zeros(1, 2, 100))
    with pytest.raises(ValueError, match=r"\[batch, channels, time\], got"):
        separator.separate_channels(torch.zeros(2, 100))


def test_parameters_are_frozen_and_in_evaluation_mode(separator):
    assert not any(p.requires_grad for p in separator.parameters())
    assert not any(module.training for module in separator.mods.modules())


@pytest.mark.parametrize(
    "rate, channels, frames",
    [(8000, 1, 9000), (22050, 2, 22051), (44100, 6, 30000), (96000, 2, 50000)],
)
def test_files_sum_to_the_input(separator, tmp_path, rate, channels, frames):
    sig = write_noise(tmp_path / "my song.v2.wav", rate, channels, frames)
    paths = separator.separate_file(
        tmp_path / "my song.v2.wav",
        out_folder=tmp_path / "new" / "sources",
        chunk_seconds=0.2,
        progressbar=False,
    )
    assert paths == [
        tmp_path / "new" / "sources" / f"my song.v2_source{i}.wav"
        for i in range(3)
    ]
    # nothing else, not even a hidden folder
    assert sorted(paths[0].parent.iterdir()) == paths
    for path in paths:
        info = soundfile.info(path)
        assert (info.samplerate, info.channels) == (rate, channels)
        assert (info.frames, info.subtype) == (frames, "FLOAT")
    total = sum(read(path) for path in paths)
    error = 20 * torch.log10((total - sig).norm() / sig.norm())
    assert error < -120
    # without a folder the same comes as a tensor
    est_source = separator.separate_file(
        tmp_path / "my song.v2.wav", chunk_seconds=0.2, progressbar=False
    )
    assert torch.equal(est_source, torch.stack([read(p) for p in paths]))


def test_file_equals_batch_at_the_rate_of_the_model(separator, tmp_path):
    sig = write_noise(tmp_path / "song.flac", 8000, 1, 8000, subtype="PCM_16")
    est_source = separator.separate_file(
        str(tmp_path / "song.flac"), progressbar=False
    )
    expected = separator.separate_batch(sig)[0].T
    assert torch.allclose(est_source[:, 0], expected, atol=1e-6)


@pytest.mark.parametrize("frames", [1, 2, 300])
def test_very_short_files(separator, tmp_path, frames):
    sig = write_noise(tmp_path / "click.wav", 44100, 2, frames)
    est_source = separator.separate_file(
        tmp_path / "click.wav", progressbar=False
    )
    assert est_source.shape == (3, 2, frames)
    assert torch.allclose(est_source.sum(0), sig, atol=1e-7)


def test_silent_file(separator, tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros((9000, 2)), 44100)
    paths = separator.separate_file(
        tmp_path / "silence.wav", tmp_path, progressbar=False
    )
    assert all(torch.equal(read(p), torch.zeros(2, 9000)) for p in paths)


def test_progress_bar(separator, tmp_path, capsys):
    write_noise(tmp_path / "song.wav", 8000, 1, 16000)
    separator.separate_file(tmp_path / "song.wav", progressbar=False)
    assert capsys.readouterr().err == ""
    separator.separate_file(tmp_path / "song.wav", chunk_seconds=0.5)
    shown = capsys.readouterr().err
    assert "song.wav: 100%" in shown
    assert "2/2 s" in shown


def test_progress_callback(separator, tmp_path):
    write_noise(tmp_path / "song.wav", 8000, 1, 16000)
    calls = []
    options = {
        "chunk_seconds": 0.5,
        "overlap": 0.2,
        "progressbar": False,
        "progress": lambda *seconds: calls.append(seconds),
    }
    separator.separate_file(tmp_path / "song.wav", **options)
    expected = [(0.4 * i, 2.0) for i in range(5)]
    assert calls == [pytest.approx(call) for call in [*expected, (2.0, 2.0)]]

    # what it raises ends the separation, as a user of a web page may
    def cancel(done, total):
        if done > 1:
            raise InterruptedError("cancelled")

    options["progress"] = cancel
    with pytest.raises(InterruptedError, match="cancelled"):
        separator.separate_file(
            tmp_path / "song.wav", tmp_path / "out", **options
        )
    assert list((tmp_path / "out").iterdir()) == []


def test_batches_of_chunks_give_the_same(separator, tmp_path):
    write_noise(tmp_path / "song.wav", 11025, 2, 22050)
    options = {"chunk_seconds": 0.3, "progressbar": False}
    one = separator.separate_file(tmp_path / "song.wav", **options)
    many = separator.separate_file(
        tmp_path / "song.wav", batch_size=4, **options
    )
    assert torch.allclose(one, many, atol=1e-6)
    assert not torch.allclose(one[0], one[1], atol=0.01)


def test_outputs_ranks_and_remix(separator, tmp_path):
    path = tmp_path / "song.wav"
    write_noise(path, 8000, 2, 8000)
    options = {"chunk_seconds": 0.4, "progressbar": False}
    est_source = separator.separate_file(path, **options)
    order = est_source.square().sum((1, 2)).argsort(descending=True)
    assert order.tolist() != [0, 1, 2]
    ranked = separator.separate_file(path, ranked=True, **options)
    assert torch.equal(ranked, est_source[order])
    rest = separator.separate_file(
        path, ranked=True, outputs="rest=1+2,0", **options
    )
    assert torch.equal(rest[0], ranked[1] + ranked[2])
    assert torch.equal(rest[1], ranked[0])
    paths = separator.separate_file(
        path,
        tmp_path / "out",
        file_format="flac",
        outputs={"rest": (1, 2)},
        ranked=True,
        remix={"rest": -20.0},
        figure=True,
        stem="other",
        **options,
    )
    assert [path.name for path in paths] == [
        "other_rest.flac",
        "other_remix.flac",
        "other_figure.png",
    ]
    assert sorted((tmp_path / "out").iterdir()) == sorted(paths)
    assert torch.allclose(read(paths[0]), rest[0], atol=1e-6)
    expected = ranked[0] + 0.1 * rest[0]
    assert torch.allclose(read(paths[1]), expected, atol=1e-6)
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_skip_existing(separator, tmp_path, monkeypatch):
    path = tmp_path / "song.wav"
    write_noise(path, 8000, 1, 800)
    options = {"out_folder": tmp_path / "out", "progressbar": False}
    paths = separator.separate_file(path, skip_existing=True, **options)
    monkeypatch.setattr(separator, "separate_channels", None)
    skipped = separator.separate_file(path, skip_existing=True, **options)
    assert skipped == paths
    with pytest.raises(TypeError):
        separator.separate_file(path, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"remix": "0:1"}, "expected out_folder with"),
        ({"figure": True}, "expected out_folder with"),
        ({"file_format": "flac"}, "expected out_folder with"),
        ({"skip_existing": True}, "expected out_folder with"),
        ({"outputs": "none"}, "expected an output to return"),
        ({"outputs": "3"}, "expected outputs from 0 to 2, got 3"),
        ({"out_folder": "out", "outputs": "3"}, "outputs from 0 to 2, got 3"),
        ({"out_folder": "out", "remix": "3:0"}, "outputs from 0 to 2, got 3"),
        ({"out_folder": "out", "file_format": "mp3"}, "expected file_format"),
        ({"batch_size": 0}, "expected batch_size from 1 up, got 0"),
    ],
)
def test_options_are_checked_before_the_model_runs(
    separator, tmp_path, monkeypatch, options, message
):
    (tmp_path / "music").mkdir()
    monkeypatch.chdir(tmp_path / "music")
    write_noise("song.wav", 8000, 1, 800)
    monkeypatch.setattr(separator, "separate_channels", None)
    with pytest.raises(ValueError, match=message):
        separator.separate_file("song.wav", progressbar=False, **options)
    assert os.listdir() == ["song.wav"]


def test_interrupted_run_leaves_no_files(separator, tmp_path, monkeypatch):
    write_noise(tmp_path / "song.wav", 8000, 1, 8000)
    calls = []
    whole = separator.separate_channels

    def interrupted(mix):
        calls.append(mix)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(mix)

    monkeypatch.setattr(separator, "separate_channels", interrupted)
    with pytest.raises(KeyboardInterrupt):
        separator.separate_file(
            tmp_path / "song.wav",
            tmp_path / "sources",
            chunk_seconds=0.2,
            progressbar=False,
        )
    assert len(calls) == 3
    assert list((tmp_path / "sources").iterdir()) == []


def test_files_that_are_no_music(separator, tmp_path):
    missing = tmp_path / "missing.wav"
    with pytest.raises(FileNotFoundError, match=r"missing\.wav: no such audio"):
        separator.separate_file(missing, progressbar=False)
    text = tmp_path / "text.wav"
    text.write_text("this is no audio\n" * 100)
    with pytest.raises(soundfile.LibsndfileError, match=r"text\.wav"):
        separator.separate_file(text, progressbar=False)
    empty = tmp_path / "empty.wav"
    soundfile.write(empty, np.zeros((0, 2)), 44100)
    with pytest.raises(ValueError, match=r"empty\.wav: .* no samples"):
        separator.separate_file(empty, progressbar=False)
    broken = tmp_path / "broken.wav"
    sig = np.zeros(20000, dtype=np.float32)
    sig[-1] = np.nan
    soundfile.write(broken, sig, 8000, "FLOAT")
    with pytest.raises(ValueError, match=r"broken\.wav: NaN or infinite"):
        separator.separate_file(
            broken, tmp_path / "out", chunk_seconds=0.5, progressbar=False
        )
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "of"), [("song.ogg", "at least "), ("song.mp3", "")]
)
def test_cut_files_are_refused(separator, tmp_path, name, of):
    path, out = tmp_path / name, tmp_path / "sources"
    sig = np.random.default_rng(0).uniform(-0.3, 0.3, 5 * 8000)
    soundfile.write(path, sig, 8000)
    content = path.read_bytes()
    for missing in (2000, len(content) // 3):
        path.write_bytes(content[:-missing])
        size = len(content) - missing
        message = rf"{name}: truncated, {size} of {of}\d+ bytes"
        for folder in (None, out):
            with pytest.raises(ValueError, match=message):
                separator.separate_file(path, folder, progressbar=False)
    assert list(out.iterdir()) == []
    path.write_bytes(content + b"TAG" + b"x" * 125)
    est_source = separator.separate_file(path, progressbar=False)
    assert torch.allclose(est_source.sum(0), read(path), atol=1e-5)


def test_ogg_that_nobody_ended_is_separated_with_a_warning(
    separator, tmp_path, caplog
):
    path = tmp_path / "live.ogg"
    sig = np.random.default_rng(0).uniform(-0.3, 0.3, 5 * 8000)
    soundfile.write(path, sig, 8000)
    separator.separate_file(path, progressbar=False)
    assert not caplog.messages
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"OggS")])
    with caplog.at_level("WARNING"):
        est_source = separator.separate_file(path, progressbar=False)
    assert torch.allclose(est_source.sum(0), read(path), atol=1e-5)
    (message,) = caplog.messages
    assert message.startswith(f"{path}: no end-of-stream page")


def test_loading_a_folder_leaves_no_trace(folder, tmp_path, monkeypatch):
    working = tmp_path / "working"
    working.mkdir()
    monkeypatch.chdir(working)
    before = sorted(folder.iterdir())
    PerformerSeparation.from_hparams(folder, run_opts=CPU)
    PerformerSeparation.from_hparams(
        os.path.relpath(folder), savedir="saved", run_opts=CPU
    )
    assert list(working.iterdir()) == []
    assert sorted(folder.iterdir()) == before
    assert not any(path.is_symlink() for path in before)


def test_overrides(folder):
    separator = PerformerSeparation.from_hparams(
        folder, overrides={"mixture_consistency": True}, run_opts=CPU
    )
    assert separator.hparams.mixture_consistency is True
    with pytest.raises(KeyError, match="mixture_consistancy"):
        PerformerSeparation.from_hparams(
            folder, overrides={"mixture_consistancy": True}
        )


@pytest.mark.parametrize(
    "source", ["{tmp}/separater", "./separater", "separater", "{name}/x"]
)
def test_mistyped_folder(folder, tmp_path, monkeypatch, source):
    """A path that cannot be meant for the hub is not looked up there."""
    monkeypatch.chdir(tmp_path)
    source = source.format(tmp=tmp_path, name=folder.name)
    with pytest.raises(FileNotFoundError) as error:
        PerformerSeparation.from_hparams(source, run_opts=CPU)
    assert str(error.value).startswith(f"{source} not found: expected a sep")
    assert "hyperparams.yaml" in str(error.value)


def test_folder_without_yaml(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"hyperparams\.yaml not found: expected a sep"
    ):
        PerformerSeparation.from_hparams(tmp_path, run_opts=CPU)


def test_unreachable_hub():
    """Without the network: the same kind of error, naming the id."""
    with pytest.raises(FileNotFoundError, match=r"nobody/nothing is no folder"):
        PerformerSeparation.from_hparams(
            "nobody/nothing", fetch_config=FetchConfig(allow_network=False)
        )


def change_weights(folder, change):
    path = folder / "masknet.ckpt"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def drop_key(state):
    del state["head.bias"]


def add_key(state):
    state["surprise"] = torch.zeros(1)


def misshape_key(state):
    state["head.bias"] = state["head.bias"][1:]


@pytest.mark.parametrize("cls", [PerformerSeparation, SepformerSeparation])
@pytest.mark.parametrize(
    "change, message",
    [
        (drop_key, r"missing head\.bias"),
        (add_key, r"unexpected surprise"),
        (misshape_key, r"misshapen head\.bias \(expected \[387\], got \[386\]"),
    ],
)
def test_weights_that_do_not_fit(folder, tmp_path, change, message, cls):
    """Refused by the stock class as well, which by itself only warns."""
    change_weights(folder, change)
    with pytest.raises(ValueError, match=rf"masknet\.ckpt does .*{message}"):
        cls.from_hparams(str(folder), savedir=str(tmp_path / "save"))


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.99])
def test_truncated_weights(folder, kept):
    path = folder / "masknet.ckpt"
    whole = path.read_bytes()
    size = kept if isinstance(kept, int) else int(kept * len(whole))
    path.write_bytes(whole[:size])
    with pytest.raises(ValueError, match=r"masknet\.ckpt: no readable file"):
        PerformerSeparation.from_hparams(folder, run_opts=CPU)


def test_weights_of_another_kind(folder):
    torch.save([1, 2], folder / "masknet.ckpt")
    with pytest.raises(ValueError, match=r"masknet\.ckpt: .*got list"):
        PerformerSeparation.from_hparams(folder, run_opts=CPU)
    (folder / "masknet.ckpt").unlink()
    with pytest.raises(FileNotFoundError, match=r"masknet\.ckpt"):
        PerformerSeparation.from_hparams(folder, run_opts=CPU)


def test_folder_without_our_hook_is_strict_too(folder):
    yaml = folder / "hyperparams.yaml"
    text = yaml.read_text()
    start = text.index("  custom_hooks")
    yaml.write_text(text[:start])
    PerformerSeparation.from_hparams(folder, run_opts=CPU)
    change_weights(folder, drop_key)
    with pytest.raises(ValueError, match=r"missing head\.bias"):
        PerformerSeparation.from_hparams(folder, run_opts=CPU)


def test_pretrainer_that_forgets_a_module(folder):
    yaml = folder / "hyperparams.yaml"
    text = yaml.read_text()
    yaml.write_text(text[: text.index("  loadables")] + "  loadables: {}\n")
    with pytest.raises(ValueError, match="loads no weights for masknet"):
        PerformerSeparation.from_hparams(folder, run_opts=CPU)


def test_yaml_without_pretrainer(folder):
    yaml = folder / "hyperparams.yaml"
    text = yaml.read_text()
    yaml.write_text(text[: text.index("pretrainer")])
    with pytest.raises(ValueError, match=r"yaml: expected the key pretrainer"):
        PerformerSeparation.from_hparams(folder, run_opts=CPU)


def test_needed_modules_and_hparams(separator):
    modules = dict(separator.mods)
    hparams = {"sample_rate": 8000, "num_spks": 3}
    for name in modules:
        rest = {key: modules[key] for key in modules if key != name}
        with pytest.raises(ValueError, match=f"missing {name}"):
            PerformerSeparation(rest, hparams, run_opts=CPU)
    for name in hparams:
        rest = {key: hparams[key] for key in hparams if key != name}
        with pytest.raises(ValueError, match=name):
            PerformerSeparation(modules, rest, run_opts=CPU)
