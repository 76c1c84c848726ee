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
    "memory": set(),
    "plots": set(),
    "torch_pair": set(),
    "data": {"plots"},
    "nnet": set(),
    "objectives": set(),
    "web": {"plots"},
    "training": {
        *("data", "inference", "memory", "nnet", "objectives", "plots"),
    },
    "inference": {"memory", "nnet", "plots"},
    "asteroid": {"inference", "nnet"},
    "cli": {
        *("cli_data", "cli_demo", "cli_model", "cli_music", "cli_separate"),
        "torch_pair",
    },
    "cli_data": {"data"},
    "cli_demo": {"cli_data", "cli_model", "inference", "web"},
    "cli_model": {"cli_data", "inference"},
    "cli_music": {"cli_data", "data"},
    "cli_separate": {"cli_data", "cli_model", "data", "inference"},
}


def imports(source, module, is_package=False, top_level=False):
    """Full names of all that a source imports.

    Arguments
    ---------
    source : str
        Python.
    module : str
        Its name, where relative imports start.
    is_package : bool
        Whether it is an ``__init__.py``.
    top_level : bool
        Whether to leave out imports that run in functions only.

    Returns
    -------
    set of str
        ``from a import b`` counts as ``a.b``.
    """
    names = set()

    def visit(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                names.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parts = module.split(".")
                    cut = len(parts) - child.level + is_package
                    base = ".".join([*parts[:cut], *filter(None, [base])])
                names.update(f"{base}.{alias.name}" for alias in child.names)
            elif not (top_level and isinstance(child, ast.FunctionDef)):
                visit(child)

    visit(ast.parse(source))
    return names


def imports_of(module, top_level=False):
    path = MODULES[module]
    source = path.read_text("utf-8")
    return imports(source, module, path.stem == "__init__", top_level)


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )


# --- imports -----------------------------------------------------------------


def test_imports_are_found_wherever_they_are():
    source = (
        "import a.b as c, d\nfrom . import e\nfrom ..f import g\n"
        "if d:\n    import h\n"
        "class K:\n    def m(self):\n        from i import j\n"
    )
    found = imports(source, "top.sub.mod")
    assert found == {"a.b", "d", "top.sub.e", "top.f.g", "h", "i.j"}
    assert imports(source, "top.sub.mod", top_level=True) == found - {"i.j"}
    assert "top.sub.mod.e" in imports(source, "top.sub.mod", is_package=True)


def test_every_part_has_a_rule():
    parts = {name.split(".")[1] for name in MODULES if "." in name}
    assert parts == set(MAY_IMPORT)


@pytest.mark.parametrize("module", [name for name in MODULES if "." in name])
def test_parts_import_only_what_they_may(module):
    part = module.split(".")[1]
    ours = {
        name.split(".")[1]
        for name in imports_of(module)
        if name.startswith("trackformer_sb.")
    }
    assert ours - {part, "__version__"} <= MAY_IMPORT[part]


def test_package_itself_imports_nothing():
    assert imports_of("trackformer_sb") == set()


@pytest.mark.parametrize("module", MODULES)
def test_nothing_imports_what_is_not_installed_with_it(module):
    folders = ("recipes", "tests", "benchmarks")
    outside = {path.stem for one in folders for path in ROOT.glob(f"{one}/*")}
    outside |= set(folders)
    roots = {name.split(".")[0] for name in imports_of(module)}
    assert not roots & outside
    # an optional extra: never needed to import a module
    top = {name.split(".")[0] for name in imports_of(module, top_level=True)}
    assert "asteroid" not in top


def test_all_modules_import_without_asteroid():
    # None in sys.modules makes an import fail
    result = run_python(
        "import sys; sys.modules['asteroid'] = None\n"
        f"import {', '.join(MODULES)}"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "module",
    ("trackformer_sb", "trackformer_sb.cli", "trackformer_sb.training.grid"),
)
def test_import_is_fast(module):
    heavy = ("torch", "speechbrain", "asteroid", "matplotlib", "scipy")
    result = run_python(
        f"import sys, {module}; "
        f"print('sys' in sys.modules, *sys.modules.keys() & set({heavy}))"
    )
    assert result.stdout.split() == ["True"], result.stderr


# --- modules -----------------------------------------------------------------


def undocumented(source):
    """Public names of a source that have no docstring."""
    tree = ast.parse(source)
    missing = [] if ast.get_docstring(tree) else ["module"]

    def visit(body, prefix):
        for node in body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                continue
            if node.name.startswith("_"):
                continue
            if not ast.get_docstring(node):
                missing.append(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{node.name}.")

    visit(tree.body, "")
    return missing


def test_undocumented_names_are_found():
    source = (
        "class A:\n    def b(self): ...\n    def _c(self): ...\n"
        "def d():\n    'Text.'\n    def inner(): ...\n"
    )
    assert undocumented(source) == ["module", "A", "A.b"]


@pytest.mark.parametrize("module", MODULES)
def test_all_that_is_public_has_a_docstring(module):
    assert undocumented(MODULES[module].read_text("utf-8")) == []


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
