"""Models on the hub: the real client against a server on loopback."""

import os
import pathlib
import subprocess
import sys

import pytest
import soundfile
import torch
from hub_server import serving, use_hub
from speechbrain.inference.separation import SepformerSeparation
from speechbrain.utils.fetching import FetchConfig, LocalStrategy
from test_export import loaded, mixtures, trained

from trackformer_sb.cli import main
from trackformer_sb.inference.export import export_separator
from trackformer_sb.inference.interfaces import PerformerSeparation
from trackformer_sb.inference.pretrained import PerformerSeparator
from trackformer_sb.inference.separator import Separator

REPO = "band/separator"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    path, modules = trained(folder / "experiment")
    return export_separator(path, modules, folder / "separator")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def hub(folder, cache, monkeypatch):
    with serving() as hub:
        use_hub(monkeypatch, hub, cache)
        hub.put(REPO, folder)
        yield hub


@pytest.fixture
def expected(folder):
    return loaded(folder).separate_batch(mixtures())


def by_yaml(source=REPO, revision=None, token=False, offline=False, **options):
    config = FetchConfig(
        revision=revision, token=token, allow_network=not offline
    )
    separator = PerformerSeparation.from_hparams(
        source, fetch_config=config, run_opts={"device": "cpu"}, **options
    )
    return separator.separate_batch


def by_speechbrain(source):
    return SepformerSeparation.from_hparams(
        source, run_opts={"device": "cpu"}
    ).separate_batch


def by_values(source=REPO, offline=False, **options):
    separator = PerformerSeparator.from_pretrained(
        source, local_files_only=offline, **options
    )
    return torch.no_grad()(separator)


WAYS = pytest.mark.parametrize("load", [by_yaml, by_values])
# what each of them needs of the hub
FILES = {
    by_yaml: {"hyperparams.yaml", "masknet.ckpt"},
    by_values: {"config.json", "model.safetensors"},
}


def cached(cache):
    """Files of weights in the cache that are or could become whole."""
    return [
        path
        for path in cache.rglob("*")
        if path.is_file()
        and path.parent.name == "blobs"
        and path.stat().st_size > 10000
    ]


@WAYS
def test_download(hub, cache, expected, load):
    assert torch.equal(load()(mixtures()), expected)
    names = {path.rpartition("/")[2] for _, path in hub.asked if REPO in path}
    assert names == FILES[load]
    # the same files again, out of the cache
    downloads = [path for method, path in hub.asked if "/large/" in path]
    assert torch.equal(load()(mixtures()), expected)
    assert downloads == [path for _, path in hub.asked if "/large/" in path]


@WAYS
def test_revision(hub, folder, expected, load, tmp_path):
    path, modules = trained(tmp_path / "experiment")
    with torch.no_grad():
        modules["masknet"].head.bias.add_(torch.randn(387))
    other = export_separator(path, modules, tmp_path / "other")
    hub.put(REPO, other, "v2")
    assert torch.equal(load()(mixtures()), expected)
    sources = load(revision="v2")(mixtures())
    assert torch.equal(sources, loaded(other).separate_batch(mixtures()))
    assert not torch.allclose(sources, expected, atol=1e-3)


@WAYS
def test_unknown_revision(hub, load):
    with pytest.raises(FileNotFoundError, match=rf"^{REPO} .*no revision v9$"):
        load(revision="v9")


@WAYS
def test_unknown_model(hub, load):
    with pytest.raises(FileNotFoundError, match=r"^band/x .*is no such model"):
        load("band/x")


@WAYS
def test_model_without_its_files(hub, load):
    for name in FILES[load]:
        content = hub.repos[REPO]["main"].pop(name)
        with pytest.raises(FileNotFoundError, match=rf"it has no {name}$"):
            load()
        hub.repos[REPO]["main"][name] = content


def test_pickles_of_the_hub_are_no_substitute(hub, tmp_path):
    files = hub.repos[REPO]["main"]
    del files["model.safetensors"]
    assert "pytorch_model.bin" in files
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors$"):
        PerformerSeparator.from_pretrained(REPO)
    assert not any("pytorch_model" in path for _, path in hub.asked)


@WAYS
def test_private_model(hub, expected, load, monkeypatch):
    hub.token = "hf_right"
    with pytest.raises(FileNotFoundError, match=r"or it is private: .* token"):
        load(token=False)
    with pytest.raises(PermissionError, match=r"refused \(403\): .* the token"):
        load(token="hf_wrong")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert torch.equal(load(token=True)(mixtures()), expected)


@WAYS
@pytest.mark.parametrize("times", [1, 2])
def test_connection_that_drops(hub, expected, load, times):
    """The client resumes where it was."""
    hub.cut = times
    assert torch.equal(load()(mixtures()), expected)
    large = [path for method, path in hub.asked if path.startswith("/large")]
    assert len([m for m, path in hub.asked if path in large]) >= times + 1


@WAYS
def test_interrupted_download(hub, cache, expected, load):
    """Nothing half-written is taken for whole, and a second try works."""
    hub.cut = 10**6
    with pytest.raises(OSError, match=rf"^{REPO} .* failed, try again"):
        load()
    assert cached(cache) == []
    with pytest.raises(FileNotFoundError, match="is not in the cache"):
        load(offline=True)
    hub.cut = 0
    assert torch.equal(load()(mixtures()), expected)
    assert len(cached(cache)) == 1


def flip(content):
    """One bit less, far inside."""
    middle = len(content) // 2
    changed = bytes([content[middle] ^ 1])
    return content[:middle] + changed + content[middle + 1 :]


@WAYS
@pytest.mark.parametrize(
    "change, message",
    [
        (flip, r"expected hash \w{64}, got"),
        (lambda content: content[:-10], "file should be of size"),
        (lambda content: content + b"more", "file should be of size"),
    ],
)
def test_other_content_than_announced(
    hub, cache, expected, load, change, message
):
    hub.change = change
    for _ in range(2):
        with pytest.raises(OSError, match=rf"^{REPO} .*{message}"):
            load()
        assert cached(cache) == []
    hub.change = None
    assert torch.equal(load()(mixtures()), expected)


@WAYS
def test_file_that_decays_in_the_cache(hub, cache, expected, load):
    load()
    (path,) = cached(cache)
    path.write_bytes(flip(path.read_bytes()))
    with pytest.raises(OSError, match="expected hash"):
        load(offline=True)
    assert torch.equal(load()(mixtures()), expected)


@WAYS
def test_small_file_that_decays(hub, cache, load):
    load()
    name = min(FILES[load])
    (link,) = cache.rglob(f"snapshots/*/{name}")
    link.resolve().write_text("a: 1")
    with pytest.raises(OSError, match=r"expected hash \w{40}, got"):
        load()


@WAYS
def test_offline(hub, expected, load):
    with pytest.raises(FileNotFoundError, match=r"not in the cache, and the n"):
        load(offline=True)
    load()
    asked = list(hub.asked)
    assert torch.equal(load(offline=True)(mixtures()), expected)
    assert hub.asked == asked


@WAYS
def test_hub_that_is_down(hub, expected, load, monkeypatch):
    """What was fetched once is there without the hub."""
    load()
    hub.status = 500
    assert torch.equal(load()(mixtures()), expected)
    with pytest.raises(OSError, match=r"^band/x .*hub answered 500"):
        load("band/x")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert torch.equal(load()(mixtures()), expected)
    with pytest.raises(FileNotFoundError, match="is not in the cache"):
        load("band/x")


@WAYS
def test_another_server(hub, load):
    hub.plain = True
    with pytest.raises(OSError, match=rf"^{REPO} .* is no model hub"):
        load()


@pytest.mark.parametrize("strategy", [LocalStrategy.COPY, "SYMLINK"])
def test_savedir(hub, expected, tmp_path, strategy):
    """The files of a model are put where they are asked for."""
    if strategy == "SYMLINK":
        strategy = LocalStrategy.SYMLINK
    saved = tmp_path / "saved"
    for offline in (False, True):
        separate = by_yaml(
            savedir=saved, local_strategy=strategy, offline=offline
        )
        assert torch.equal(separate(mixtures()), expected)
    assert sorted(path.name for path in saved.iterdir()) == [
        "hyperparams.yaml",
        "masknet.ckpt",
    ]
    linked = strategy == LocalStrategy.SYMLINK
    assert all(path.is_symlink() == linked for path in saved.iterdir())


def test_cache_dir(hub, cache, tmp_path):
    PerformerSeparator.from_pretrained(REPO, cache_dir=tmp_path / "mine")
    assert len(cached(tmp_path / "mine")) == 1
    assert not cache.exists()


def test_push_to_hub(hub, folder, expected):
    hub.token = "hf_right"
    separator = PerformerSeparator.from_pretrained(folder)
    commit = separator.push_to_hub("me/mine", token="hf_right")
    assert commit.startswith(f"{hub.url}/me/mine/commit/")
    assert sorted(hub.repos["me/mine"]["main"]) == [
        "README.md",
        "config.json",
        "hyperparams.yaml",
        "masknet.ckpt",
        "model.safetensors",
        "pytorch_model.bin",
    ]
    again = by_values("me/mine", token="hf_right")
    assert torch.equal(again(mixtures()), expected)


def test_named_stems_by_their_id(hub, tmp_path):
    masknet = {"channels": [8, 8, 8], "d_model": 16, "num_layers": 1}
    separator = Separator(["drums", "vocals"], 8000, 512, 256, masknet)
    separator.push_to_hub("me/mine")
    assert sorted(hub.repos["me/mine"]["main"]) == [
        "README.md",
        "config.json",
        "hyperparams.yaml",
        "model.safetensors",
    ]
    again = Separator.from_pretrained("me/mine")
    mix = mixtures()[:1]
    stems = torch.stack(list(again.separate(mix).values()), -1)
    for load in (by_yaml, by_speechbrain):
        torch.testing.assert_close(load("me/mine")(mix), stems)
    song = tmp_path / "song.wav"
    soundfile.write(song, mix[0], 8000)
    words = ["separate", str(song), "--model=me/mine", f"--out={tmp_path}"]
    assert main(words) == 0
    assert (tmp_path / "song_vocals.wav").is_file()


SCRIPT = """
import sys
from trackformer_sb.inference.pretrained import PerformerSeparator
try:
    separator = PerformerSeparator.from_pretrained(sys.argv[1])
except OSError as error:
    print(type(error).__name__, error)
else:
    print(separator.config["sample_rate"])
"""


def output_of(script, *arguments, env):
    """What a process prints that raises nothing."""
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=env,
        cwd=pathlib.Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert result.stderr.count("Traceback") == 0, result.stderr
    return result.stdout.strip()


def test_environment_of_a_process(hub, tmp_path):
    """As users set it: HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE."""
    hub.token = "hf_right"
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "OMP_NUM_THREADS": "1",
    }

    def run(**more):
        return output_of(SCRIPT, REPO, env={**environment, **more})

    assert run(HF_TOKEN="hf_right") == "8000"
    assert run(HF_HUB_OFFLINE="1") == "8000"


ASTEROID_SCRIPT = """
import sys
import torch
from asteroid.models import BaseModel
from trackformer_sb.asteroid import PerformerSeparatorModel
path, *names = sys.argv[1:]
models = [BaseModel.from_pretrained(name).eval() for name in names]
with torch.no_grad():
    est_source = [model(torch.load(path)).transpose(1, 2) for model in models]
torch.save(est_source, path)
print(*(type(model) is PerformerSeparatorModel for model in models))
"""


def test_their_base_model_of_asteroid(hub, folder, tmp_path):
    """By Asteroid's own download, set to this hub as users set it."""
    pytest.importorskip("asteroid")
    # of another model, whose only revision this is
    hub.put("band/other", folder, "v2")
    hub.token = "hf_right"
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "ASTEROID_CACHE": str(tmp_path / "asteroid"),
        "OMP_NUM_THREADS": "1",
    }
    with torch.no_grad():
        expected = PerformerSeparator.from_pretrained(folder)(mixtures())
    path = tmp_path / "audio.pt"
    for more in ({"HF_TOKEN": "hf_right"}, {"HF_HUB_OFFLINE": "1"}):
        torch.save(mixtures(), path)
        environment.update(more)
        script = (ASTEROID_SCRIPT, path, REPO, "band/other@v2")
        assert output_of(*script, env=environment) == "True True"
        for est_source in torch.load(path):
            assert torch.equal(est_source, expected)
    asked = {path.rpartition("/")[2] for _, path in hub.asked if "band" in path}
    assert asked == {"pytorch_model.bin"}
