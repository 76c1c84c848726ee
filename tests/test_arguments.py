"""The command line of the recipes: what it takes, keeps and refuses."""

import pytest

from trackformer_sb.training.arguments import load_hparams, parse_arguments

YAML = """\
# a comment: not a key
data_folder: null
output_folder: results
save_folder: !ref <output_folder>/save
lr: 0.1
split_ratio: [8, 1, 1]
optimizer: !name:builtins.dict
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


# --- parse_arguments ---------------------------------------------------------


def test_nothing_but_a_file():
    path, run_opts, overrides = parse_arguments(["a.yaml"])
    assert (path, overrides) == ("a.yaml", "")
    assert run_opts.overridden_args == set()


@pytest.mark.parametrize("key", ("test", "max", "dev", "log", "prec", "data"))
def test_beginnings_of_run_options_are_keys(key, hparams_file):
    # SpeechBrain's own parser takes each of these for --test_only,
    # --max_grad_norm, ...
    path, run_opts, overrides = parse_arguments([hparams_file, f"--{key}=3"])
    assert run_opts.overridden_args == set()
    assert overrides == f"{key}: 3"
    with pytest.raises(ValueError, match=f"unknown key '{key}'"):
        load_hparams(path, overrides)


def test_beginning_of_a_run_option_may_be_a_key_of_the_yaml(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("test: 1\nlog: 2\n", encoding="utf-8")
    assert load(str(path), "--test=a", "--log", "b") == {
        "test": "a",
        "log": "b",
    }


@pytest.mark.parametrize("split", (False, True))
@pytest.mark.parametrize(
    "text",
    (
        "/music/a=b=c",
        "=",
        "/my music/best of",
        "/music: part 2",
        "C:\\music",
        "ends in:",
        "/music #1",
        "#1 hits",
        "/C# and D#",
        "- rehearsal",
        "&name text",
        "*star",
        "@home",
        "it's",
        '"half quoted',
        "[unclosed",
        "Größe 音楽",
        "2024",
        "2024-05-01",
        "1e3",
        "true",
        "two\nlr: 7",
    ),
)
def test_texts_arrive_as_they_are(text, split, hparams_file):
    words = ["--data_folder", text] if split else [f"--data_folder={text}"]
    hparams = load(hparams_file, *words)
    assert hparams["data_folder"] == text
    assert hparams["lr"] == 0.1


@pytest.mark.parametrize(
    ("text", "value"),
    (
        ("5e-4", 5e-4),
        ("1E-3", 1e-3),
        ("-3", -3),
        ("0.25", 0.25),
        ("True", True),
        ("null", None),
        ("", None),
        ("[80, 10, 10]", [80, 10, 10]),
        ("'5'", "5"),
    ),
)
def test_values_have_the_types_of_yaml(text, value, hparams_file):
    # paths are texts, see below
    read = load(hparams_file, f"--split_ratio={text}")["split_ratio"]
    assert read == value and type(read) is type(value)


def test_overrides_reach_what_refers_to_them(hparams_file):
    hparams = load(hparams_file, "--lr=5e-4", "--output_folder=a b")
    assert hparams["optimizer"]() == {"lr": 5e-4}
    assert hparams["save_folder"] == "a b/save"


def test_override_may_refer_to_a_key(hparams_file):
    hparams = load(
        hparams_file,
        "--output_folder=out",
        "--save_folder=!ref <output_folder>/elsewhere",
        "--data_folder=!ref <lr>",
    )
    assert hparams["save_folder"] == "out/elsewhere"
    assert hparams["data_folder"] == 0.1


def test_run_options_reach_run_opts_and_no_yaml():
    path, run_opts, overrides = parse_arguments(
        [
            *("--device=cpu", "--precision", "bf16", "--max_grad_norm", "-1"),
            *("train.yaml", "--lr=1e-3", "--noprogressbar"),
            "--optimizer_step_limit=5",
        ]
    )
    assert (path, overrides) == ("train.yaml", "lr: 1e-3")
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
    path.write_text("precision: fp32\ncompile: True\nlr: 1\n", "utf-8")
    words = ["--precision=bf16", str(path), "--compile=False", "--device=cpu"]
    file, run_opts, overrides = parse_arguments(words)
    assert run_opts.precision == "bf16"
    hparams = load_hparams(file, overrides)
    assert hparams == {"precision": "bf16", "compile": False, "lr": 1}
    path.write_text("max_grad_norm: 5.0\ncompile_module_keys: [x]\n", "utf-8")
    words = ["--max_grad_norm=inf", "--compile_module_keys=masknet"]
    file, run_opts, overrides = parse_arguments([str(path), *words])
    hparams = load_hparams(file, overrides)
    assert hparams["max_grad_norm"] == run_opts.max_grad_norm == float("inf")
    assert hparams["compile_module_keys"] == run_opts.compile_module_keys


@pytest.mark.parametrize(
    ("words", "on"),
    (
        ([], False),
        (["--compile"], True),
        (["--compile=True"], True),
        (["--compile=true"], True),
        (["--compile=False"], False),
    ),
)
def test_flags_can_be_on_and_off(words, on):
    _, run_opts, overrides = parse_arguments(["train.yaml", *words])
    assert run_opts.compile is on
    assert overrides == ""


@pytest.mark.parametrize(
    ("words", "message"),
    (
        ([], "expected a yaml file, for example: python recipes/train.py"),
        (["a.yaml", "b.yaml"], r"unexpected .*'b\.yaml'.*got 'a\.yaml' before"),
        (["a.yaml", "--lr"], "expected a value after --lr"),
        (["a.yaml", "--lr", "--seed=1"], "expected a value after --lr"),
        (["a.yaml", "--device"], "expected a value after --device"),
        (["a.yaml", "--compile=1"], "--compile=False, got '--compile=1'"),
        (["a.yaml", "--compile", "True"], "unexpected argument 'True'"),
        (["a.yaml", "--optimizer_step_limit=x"], "invalid literal .*'x'"),
    ),
)
def test_wrong_command_lines_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(words)


def test_fields_of_run_opts_that_are_no_options_are_not_dropped(hparams_file):
    # SpeechBrain's parser does not know it, though RunOptions has it
    with pytest.raises(ValueError, match="unknown key 'data_parallel_count'"):
        load(hparams_file, "--data_parallel_count=2")


def test_mappings_are_merged_into_what_is_built(hparams_file):
    hparams = load(hparams_file, "--optimizer={betas: [0.9, 0.99], eps: 1e-8}")
    expected = {"lr": 0.1, "betas": [0.9, 0.99], "eps": 1e-8}
    assert hparams["optimizer"]() == expected


# --- load_hparams ------------------------------------------------------------


def test_missing_file_is_named(tmp_path):
    path = tmp_path / "none.yaml"
    with pytest.raises(FileNotFoundError, match=r"no hyper.*none\.yaml, exp"):
        load_hparams(path)


@pytest.mark.parametrize(
    ("key", "hint"),
    (
        ("data_foler", "did you mean data_folder"),
        ("outputfolder", "did you mean output_folder"),
        ("precison", "did you mean precision"),
        (
            "zzz",
            "its keys are data_folder, lr, optimizer, output_folder, "
            "save_folder, split_ratio$",
        ),
    ),
)
def test_unknown_key_comes_with_the_nearest(key, hint, hparams_file):
    with pytest.raises(ValueError, match=f"unknown key '{key}' .*{hint}"):
        load_hparams(hparams_file, f"{key}: 1")


def test_key_in_a_block_or_a_comment_is_not_a_key(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("# hidden: 1\nmodel:\n    width: 2\n", encoding="utf-8")
    for key in ("hidden", "width"):
        with pytest.raises(ValueError, match=f"unknown key '{key}'"):
            load_hparams(path, f"{key}: 1")


def test_the_last_of_two_values_counts():
    _, _, overrides = parse_arguments(["a.yaml", "--lr=1", "--lr=2"])
    assert overrides == "lr: 2"
