"""Models on the hub: the real client against a server on loopback."""

import pytest
import torch
from hub_server import serving, use_hub
from separators import mixtures, performer
from speechbrain.inference.separation import SepformerSeparation

from trackformer_sb.cli import main
from trackformer_sb.inference.separator import Separator
from trackformer_sb.inference.speechbrain import PerformerSeparation

REPO = "band/separator"


@pytest.fixture(scope="module")
def separator():
    torch.manual_seed(0)
    return performer()


@pytest.fixture
def hub(separator, tmp_path, monkeypatch):
    separator.save_pretrained(tmp_path / "separator")
    with serving() as hub:
        use_hub(monkeypatch, hub, tmp_path / "cache")
        hub.put(REPO, tmp_path / "separator")
        yield hub


def asked_for(hub):
    return {path.rpartition("/")[2] for _, path in hub.asked if REPO in path}


def test_download_and_offline(hub, separator):
    with pytest.raises(FileNotFoundError, match="outgoing traffic has been"):
        Separator.from_pretrained(REPO, local_files_only=True)
    again = Separator.from_pretrained(REPO)
    assert torch.equal(again(mixtures()), separator(mixtures()))
    assert asked_for(hub) == {"config.json", "model.safetensors"}
    before = len(hub.asked)
    again = Separator.from_pretrained(REPO, local_files_only=True)
    assert torch.equal(again(mixtures()), separator(mixtures()))
    assert len(hub.asked) == before


@pytest.mark.parametrize("cls", [PerformerSeparation, SepformerSeparation])
def test_speechbrain_by_id(hub, separator, cls, tmp_path):
    saved = tmp_path / "saved"
    interface = cls.from_hparams(REPO, savedir=saved)
    expected = separator(mixtures()).transpose(1, 2)
    torch.testing.assert_close(interface.separate_batch(mixtures()), expected)
    assert asked_for(hub) == {"hyperparams.yaml", "model.safetensors"}
    assert len(list(saved.iterdir())) == 2


def test_revision(hub, tmp_path):
    other = performer()
    other.save_pretrained(tmp_path / "other")
    hub.put(REPO, tmp_path / "other", "v2")
    again = Separator.from_pretrained(REPO, revision="v2")
    assert torch.equal(again(mixtures()), other(mixtures()))


def test_what_is_not_there_is_named(hub, capsys):
    start = "is no folder, nor can it be had from the hub: "
    with pytest.raises(
        FileNotFoundError, match=f"(?s)^band/x {start}.*Reposit"
    ):
        Separator.from_pretrained("band/x")
    with pytest.raises(FileNotFoundError, match="Revision Not Found"):
        Separator.from_pretrained(REPO, revision="v9")
    # and no pickle takes its place
    hub.repos[REPO]["main"]["pytorch_model.bin"] = b"pickle"
    del hub.repos[REPO]["main"]["model.safetensors"]
    with pytest.raises(FileNotFoundError, match="Entry Not Found"):
        Separator.from_pretrained(REPO)
    assert "pytorch_model.bin" not in asked_for(hub)
    assert main(["info", "band/x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"trackformer info: band/x {start}")


def test_private_model(hub, separator, monkeypatch):
    hub.token = "hf_right"
    with pytest.raises(FileNotFoundError, match=r"(?s)private.*authenticated"):
        Separator.from_pretrained(REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    again = Separator.from_pretrained(REPO)
    assert torch.equal(again(mixtures()), separator(mixtures()))
