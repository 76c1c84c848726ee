"""The command line of the recipes: what it takes, keeps and refuses."""

import pytest

from trackformer_sb.training.experiment import load_hparams, parse_arguments

YAML = """\
# a comment: not a key
data_folder: null
output_folder: results
save_folder: !ref <output_folder>/save
lr: 0.1
experiment: name
optimizer: !name:collections.UserDict
    lr: !ref <lr>
"""


@pytest.fixture
def hparams_file(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(YAML, encoding="utf-8")
    return str(path)


def load(hparams_file, *words):
    """What a recipe gets of a command line."""
    path, _, overrides = parse_arguments([hparams_file, *words])
    return load_hparams(path, overrides)


# --- keys of the yaml --------------------------------------------------------


@pytest.mark.parametrize("split", (False, True))
@pytest.mark.parametrize(
    "text",
    (
        "/music/a=b=c",
        "/music: part 2",
        "/C# and #D",
        "*star",
        "[unclosed",
        "Größe 音楽",
        "2024",
        "two\nlr: 7",
    ),
)
def test_folders_arrive_as_they_are(text, split, hparams_file):
    words = ["--data_folder", text] if split else [f"--data_folder={text}"]
    hparams = load(hparams_file, *words)
    assert hparams["data_folder"] == text
    assert hparams["lr"] == 0.1


@pytest.mark.parametrize(
    ("text", "value"),
    (
        ("5e-4", 5e-4),
        ("True", True),
        ("null", None),
        ("", None),
        ("[80, 10, 10]", [80, 10, 10]),
        ("'5'", "5"),
        ("a: b #c", "a: b #c"),
    ),
)
def test_values_have_the_types_of_yaml(text, value, hparams_file):
    read = load(hparams_file, f"--experiment={text}")["experiment"]
    assert read == value and type(read) is type(value)


def test_overrides_reach_what_refers_to_them(hparams_file):
    words = ["--lr=1", "--lr=5e-4", "--output_folder=a b"]
    hparams = load(hparams_file, *words, "--data_folder=!ref <lr>")
    # of two values the last one counts
    assert hparams["optimizer"]() == {"lr": 5e-4}
    assert hparams["save_folder"] == "a b/save"
    assert hparams["data_folder"] == 5e-4


def test_tilde_and_variables_are_the_shell_s(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DISK", "/mnt/a: #1")
    path = tmp_path / "train.yaml"
    lines = ["data_folder: null", "out: !ref ~/<data_folder>", "lr: [~/a, ~]"]
    lines += ["optimizer: !name:builtins.dict", "    x: $DISK/$NOT_SET"]
    path.write_text("\n".join(lines), encoding="utf-8")
    hparams = load(str(path), "--data_folder=${DISK}/b")
    assert hparams["data_folder"] == "/mnt/a: #1/b"
    assert hparams["out"] == "/home/me//mnt/a: #1/b"
    assert hparams["lr"] == ["/home/me/a", None]
    assert hparams["optimizer"]() == {"x": "/mnt/a: #1/$NOT_SET"}


def test_mappings_are_merged_into_what_is_built(hparams_file):
    hparams = load(hparams_file, "--optimizer={betas: [0.9, 0.99], eps: 1e-8}")
    expected = {"lr": 0.1, "betas": [0.9, 0.99], "eps": 1e-8}
    assert hparams["optimizer"]() == expected


@pytest.mark.parametrize(
    ("word", "message"),
    (
        ("--data_foler=1", "unknown key 'data_foler'.*did you mean data_fold"),
        ("--zzz=1", "'zzz'.*its keys are data_folder, experiment, lr, opt"),
        # SpeechBrain's parser takes it for --test_only
        ("--test=3", "unknown key 'test'"),
    ),
)
def test_unknown_key_comes_with_the_nearest(word, message, hparams_file):
    with pytest.raises(ValueError, match=message):
        load(hparams_file, word)


def test_arguments_of_what_the_yaml_builds(tmp_path):
    path = tmp_path / "train.yaml"
    place = "trackformer_sb.data.mixtures.MixtureOfMixtures"
    path.write_text(f"pairs: !name:{place}\n    seed: 1\n", encoding="utf-8")
    pairs = load(str(path), "--pairs={gain_db: 3.0}")["pairs"]
    assert pairs.keywords == {"seed": 1, "gain_db": 3.0}
    message = r"--pairs: .*Mixtures has no argument 'typo', .*gain_db"
    with pytest.raises(ValueError, match=message):
        load(str(path), "--pairs={typo: 1}")


# --- run options -------------------------------------------------------------


def test_run_options_reach_run_opts_and_no_yaml():
    words = ["--device=cpu", "--precision", "bf16", "--max_grad_norm", "-1"]
    words += ["train.yaml", "--lr=1e-3", "--noprogressbar"]
    words += ["--optimizer_step_limit=5"]
    path, run_opts, overrides = parse_arguments(words)
    assert (path, overrides) == ("train.yaml", {"lr": 1e-3})
    values = {
        "device": "cpu",
        "precision": "bf16",
        "max_grad_norm": -1.0,
        "noprogressbar": True,
        "optimizer_step_limit": 5,
    }
    assert {key: run_opts[key] for key in values} == values
    # what decides between the command line and the yaml
    assert run_opts.overridden_args == set(values)


def test_run_options_of_the_yaml_are_recorded(tmp_path):
    path = tmp_path / "train.yaml"
    text = "precision: fp32\ncompile: True\nmax_grad_norm: 5.0\n"
    path.write_text(text + "compile_module_keys: [x]\nlr: 1\n", "utf-8")
    words = ["--precision=bf16", str(path), "--compile=False", "--device=cpu"]
    words += ["--max_grad_norm=inf", "--compile_module_keys=masknet"]
    file, run_opts, overrides = parse_arguments(words)
    assert run_opts.precision == "bf16"
    assert load_hparams(file, overrides) == {
        "precision": "bf16",
        "compile": False,
        "max_grad_norm": float("inf"),
        "compile_module_keys": ["masknet"],
        "lr": 1,
    }


@pytest.mark.parametrize(
    ("words", "message"),
    (
        ([], "expected a yaml file, for example: python recipes/train.py"),
        (["a.yaml", "b.yaml"], r"unexpected .*'b\.yaml'.*got 'a\.yaml' before"),
        (["a.yaml", "--lr"], "expected a value after --lr"),
        (["a.yaml", "--compile=1"], "--compile=False, got '--compile=1'"),
        (["a.yaml", "--device=gpu"], "device gpu: expected .* has, .*cpu"),
    ),
)
def test_wrong_command_lines_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(words)
