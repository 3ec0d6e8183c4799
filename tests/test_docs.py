"""Every Python block of the README and of CONTRIBUTING runs."""

import re
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import pytest

from pyro_nf.testing import check_flow

ROOT = Path(__file__).parent.parent


def blocks(name: str) -> list[str]:
    text = (ROOT / name).read_text()
    return [
        textwrap.dedent(block) for block in re.findall(r"^ *```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    ]


@pytest.fixture
def run(monkeypatch):
    """Run a document's blocks as one module, which pickle can import classes from."""

    def run(name: str) -> Any:
        module = types.ModuleType("documented")
        monkeypatch.setitem(sys.modules, "documented", module)
        for block in blocks(name):
            exec(compile(block, name, "exec"), vars(module))
        return module

    return run


def test_readme(run, capsys):
    assert run("README.md").idata["sample_stats"].attrs["reliable"] == 1
    assert "reliable" in capsys.readouterr().out


@pytest.mark.parametrize("context_dim", [0, 2])
def test_the_flow_of_contributing_passes_the_suite(run, context_dim):
    check_flow(run("CONTRIBUTING.md").Shift(3, context_dim=context_dim))
