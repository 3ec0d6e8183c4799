"""The house as a whole: light imports, and imports that run one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_nf
from pyro_nf import flows, networks

ROOT = Path(__file__).parent.parent
# The rooms of the house in the order of their imports, and what each holds: CONTRIBUTING and the design page list them.
ROOMS = {
    "interface": "what every public call does first: arguments, turns, files that came from others",
    "compiler": "functions of tensors recorded as graphs and compiled: every private part of torch",
    "networks": "what sets a flow's parameters",
    "flows": "invertible maps, one family a file",
    "distributions": "bases and flows, sampled and scored in one pass",
    "programs": "a Pyro model and its guide as functions of tensors: every private part of Pyro",
    "approximations": "what gradients of a log density give without a network: modes, normals, transport maps",
    "diagnostics": "weights, k-hat, evidence, correction, calibration, ArviZ, plots",
    "inference": "FlowSVI: stages, steps, objectives, checkpoints, processes",
    "guides": "AutoFlow, AmortizedFlow, StructuredFlow",
    "models": "eight schools, VAE, DLGM, HI-VAE and their data; models/benchmarks for what serves benchmarks",
}
ORDER = list(ROOMS)
SOURCES = sorted(path for folder in ("pyro_nf", "guides", "models") for path in (ROOT / folder).rglob("*.py"))
each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
MAX_FILE, MAX_FUNCTION = 400, 60


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "pyro_nf" else parts[0]


@each_source
def test_imports_run_one_way(path):
    here = room(path)
    modules = {node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
    used = {module.split(".")[1] for module in modules if module and module.startswith("pyro_nf.")}
    if here == "testing":
        assert used <= {"testing", "flows", "interface"}
    elif here in ROOMS:
        assert all(ORDER.index(other) <= ORDER.index(here) for other in used)
        assert not {"guides", "models"} <= used | {here}


def test_importing_everything_loads_no_plots_and_no_data_libraries(tmp_path):
    code = (
        "import sys, pyro_nf, pyro_nf.diagnostics, pyro_nf.guides, pyro_nf.inference, pyro_nf.models, pyro_nf.testing\n"
        "print([m for m in ('matplotlib', 'arviz', 'sklearn', 'statsmodels') if m in sys.modules])"
    )
    # From the checkout, too, where Python finds the folder pyro_nf before the installed package.
    for folder in (tmp_path, ROOT):
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


def public_classes(folder: str) -> dict[str, Path]:
    """Names of the public classes defined in a folder, and where."""
    return {
        node.name: path
        for path in (ROOT / "pyro_nf" / folder).rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    }


@pytest.mark.parametrize(("folder", "module"), [("flows", flows), ("networks", networks)])
def test_everything_public_is_exported_and_tested(folder, module):
    tests = "".join(path.read_text() for path in (ROOT / "tests" / folder).rglob("test_*.py"))
    for name in public_classes(folder):
        assert name in module.__all__
        assert name in tests


def test_no_module_stands_outside_of_a_room():
    loose = {path.name for path in (ROOT / "pyro_nf").glob("*.py")}
    assert loose == {"__init__.py", "objectives.py"}  # the second by its old name, for one release
    assert {path.name for path in (ROOT / "pyro_nf").iterdir() if (path / "__init__.py").exists()} <= {
        *ROOMS,
        "testing",
    }


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/design.md"])
def test_pages_list_the_rooms(page):
    text = (ROOT / page).read_text()
    for name, what in ROOMS.items():
        assert f"`{name}`" in text or f"{name}/" in text
        assert what in " ".join(text.split())


@each_source
def test_private_names_stay_in_their_room(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyro_nf."):
            other = node.module.split(".")[1]
            names = [alias.name for alias in node.names]
            private = [name for name in names if name.startswith("_") and not name.startswith("__")]
            assert not private or other == room(path), f"{private} of {other}"


def test_models_know_nothing_of_benchmarks():
    for path in (ROOT / "models").glob("*.py"):
        imported = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        assert not any((node.module or "").startswith("pyro_nf.models.benchmarks") for node in imported), path


@each_source
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) < MAX_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            # Docstrings are as long as they need to be.
            start = node.body[0].end_lineno if ast.get_docstring(node) is not None else node.lineno - 1
            assert node.end_lineno - start < MAX_FUNCTION, node.name


def test_importing_the_package_alone_is_light():
    code = "import sys, pyro_nf; print([m for m in ('torch', 'pyro', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_most_programs_need_is_to_be_had_from_the_package():
    for name in pyro_nf.__all__:
        assert getattr(pyro_nf, name).__name__ == name
    assert set(pyro_nf.__all__) <= set(dir(pyro_nf))
    with pytest.raises(AttributeError, match="no attribute 'AutoFlo'"):
        pyro_nf.AutoFlo  # noqa: B018
