"""The house rules: who imports whom, docstrings, sizes, headers."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "trackformer_sb"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(
        ".__init__"
    ): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# What each part of the package may import of the others.
MAY_IMPORT = {
    "__main__": {"cli"},
    "audio": {"ffmpeg"},
    "paths": set(),
    "ffmpeg": set(),
    "plots": set(),
    "data": {"audio", "paths", "plots"},
    "nnet": set(),
    "objectives": set(),
    "web": {"paths", "plots"},
    "evaluation": {"data", "inference", "objectives"},
    "training": {
        *("audio", "data", "inference", "nnet", "objectives", "paths", "plots"),
    },
    "inference": {"audio", "ffmpeg", "nnet", "paths", "plots"},
    "asteroid": {"inference", "nnet"},
    "cli": {"cli_data", "cli_live", "cli_model", "cli_separate", "paths"},
    "cli_data": {"data"},
    "cli_live": {"cli_data", "cli_model", "inference"},
    "cli_model": {
        *("cli_data", "data", "evaluation", "inference", "objectives"),
        *("training", "web"),
    },
    "cli_separate": {"audio", "cli_data", "cli_model", "inference", "paths"},
}


def imports(node):
    """Full names of what a syntax tree imports, also in functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level
            yield from (f"{child.module}.{x.name}" for x in child.names)
        else:
            yield from imports(child)


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )


# --- imports -----------------------------------------------------------------


def test_parts_import_only_what_they_may():
    assert {name.split(".")[1] for name in MODULES if "." in name} == set(
        MAY_IMPORT
    )
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text("utf-8"))
        names = [name.split(".") for name in imports(tree)]
        ours = {x[1] for x in names if x[0] == "trackformer_sb" and x[1:]}
        _, _, part = module.partition(".")
        part = part.split(".")[0]
        may = MAY_IMPORT.get(part, set()) | {part, "__version__"}
        assert ours <= may, module
        # what is not installed with it
        assert not {x[0] for x in names} & {"recipes", "tests", "benchmarks"}


def test_all_modules_import_without_asteroid():
    # None in sys.modules makes an import fail
    result = run_python(
        "import sys; sys.modules['asteroid'] = None\n"
        f"import {', '.join(MODULES.keys() - {'trackformer_sb.asteroid'})}"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", ("trackformer_sb", "trackformer_sb.cli"))
def test_import_is_fast(module):
    heavy = ("torch", "speechbrain", "asteroid", "matplotlib", "scipy")
    result = run_python(
        f"import sys, {module}; "
        f"print('sys' in sys.modules, *sys.modules.keys() & set({heavy}))"
    )
    assert result.stdout.split() == ["True"], result.stderr


# --- modules -----------------------------------------------------------------


def undocumented(node, prefix):
    """Public names of a syntax tree that have no docstring."""
    for child in node.body:
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            if child.name.startswith("_"):
                continue
            if not ast.get_docstring(child):
                yield f"{prefix}.{child.name}"
            if isinstance(child, ast.ClassDef):
                yield from undocumented(child, f"{prefix}.{child.name}")


def test_all_that_is_public_has_a_docstring():
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text("utf-8"))
        assert ast.get_docstring(tree), module
        assert list(undocumented(tree, module)) == []


# --- hparams -----------------------------------------------------------------


def header(text):
    """The comment that a yaml starts with, as one line without "#"."""
    lines = re.match(r"(?:#.*\n)*", text)[0].splitlines()
    return " ".join(line.lstrip("# ") for line in lines)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "hparams").iterdir()), ids=lambda path: path.name
)
def test_yaml_starts_with_its_launch_command(path):
    assert path.suffix == ".yaml"
    text = header(path.read_text("utf-8"))
    # a pre-training may come before
    *_, command = re.finditer(r"python (recipes/\w+\.py) (hparams/\S+)", text)
    assert (ROOT / command[1]).is_file()
    assert command[2] == f"hparams/{path.name}"
    # and before it, what the experiment is
    assert len(text[: command.start()].split()) >= 8
