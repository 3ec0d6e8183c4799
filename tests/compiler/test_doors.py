"""Private parts of torch and Pyro stand behind one door each, and fits go on where those of torch are missing."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [path for folder in ("pyro_nf", "guides", "models") for path in (ROOT / folder).rglob("*.py")]
PRIVATE_TORCH = re.compile(
    r"\btorch(\.\w+)*\._\w+|\btorch\.jit\.(?!TracerWarning)|torch\.fx\.experimental|\b_functorch\b|\b_inductor\b|\b_pytree\b"
)

FIT = """
import sys, warnings
import pyro_nf.inference
assert not any(name.startswith("torch._inductor") for name in sys.modules), "the compiler is loaded"
from pyro_nf import AutoFlow, FlowSVI
import importlib
for module, name in {missing!r}:
    delattr(importlib.import_module(module), name)
from pyro_nf.models import eight_schools
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = eight_schools.noncentered
    options = dict(max_steps=320, learning_rate=0.01, num_particles=16, seed=0, progress=False, compile={compile!r})
    result = FlowSVI(model, AutoFlow(model), **options).run(*eight_schools.data())
said = [str(each.message) for each in caught if "the step runs" in str(each.message)]
print(result.execution, len(said), result.elbo)
"""


def code_of(path):
    """A file's source without its comments and strings."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.unparse(tree)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_torch_stands_in_the_compiler_room_alone(path):
    if "compiler" not in path.parts:
        assert not PRIVATE_TORCH.findall(code_of(path))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_pyro_is_imported_in_one_file_alone(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pyro":
            private = [name.name for name in node.names if name.name.startswith("_")]
            assert not private or path.name == "_pyro.py"


def fit(missing=(), mode="auto", **environment):
    code = FIT.format(missing=list(missing), compile=mode)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, check=False
    )
    assert not done.returncode, done.stderr[-2000:]
    execution, warned, elbo = done.stdout.split()[-3:]
    return execution, int(warned), float(elbo)


def test_without_torchscript_a_fit_is_the_same():
    here, there = fit(), fit(PYRO_NF_TORCHSCRIPT="0")
    assert here[:2] == there[:2] == ("recorded", 0)
    assert here[2] == pytest.approx(there[2], abs=1e-3)


@pytest.mark.parametrize(
    ("module", "name", "mode", "wanted"),
    [
        ("torch._inductor", "compile", True, ("recorded", 1)),
        ("torch.fx.experimental.proxy_tensor", "make_fx", "auto", ("plain", 1)),
    ],
)
def test_where_a_part_of_torch_is_missing_the_fit_goes_on_without_it(module, name, mode, wanted):
    assert fit([(module, name)], mode)[:2] == wanted
