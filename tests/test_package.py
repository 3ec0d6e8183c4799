"""The house as a whole: light imports, and imports that run one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from pyro_nf import flows, networks

ROOT = Path(__file__).parent.parent
ROOMS = ["arguments", "calls", "waits", "untrusted", "networks", "flows", "distributions", "rewrites"]
ROOMS += ["factorizations", "batching", "supports", "validity", "noise", "tracing", "matching", "coordinates"]
ROOMS += ["density", "pairs", "improper", "modes", "normals", "transport", "objectives", "diagnostics", "inference"]
ROOMS += ["guides", "models"]
SOURCES = sorted([*(ROOT / "pyro_nf").rglob("*.py"), *(ROOT / "guides").glob("*.py"), *(ROOT / "models").glob("*.py")])


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "pyro_nf" else parts[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    here = room(path)
    modules = {node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
    used = {module.split(".")[1] for module in modules if module and module.startswith("pyro_nf.")}
    if here == "testing":
        assert used <= {"testing", "flows", "arguments"}
    elif here in ROOMS:
        assert all(ROOMS.index(other) <= ROOMS.index(here) for other in used)
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
