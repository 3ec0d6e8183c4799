"""Every Python block of the README and of CONTRIBUTING runs."""

import re
import textwrap
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


def run(name: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    for block in blocks(name):
        exec(compile(block, name, "exec"), namespace)
    return namespace


def test_readme(capsys):
    namespace = run("README.md")
    assert namespace["idata"]["sample_stats"].attrs["reliable"] == 1
    assert "reliable" in capsys.readouterr().out


@pytest.mark.parametrize("context_dim", [0, 2])
def test_the_flow_of_contributing_passes_the_suite(context_dim):
    namespace = run("CONTRIBUTING.md")
    check_flow(namespace["Shift"](3, context_dim=context_dim))
