"""Every Python block of the README, of CONTRIBUTING and of the documentation runs, and their tables are complete."""

import gzip
import json
import re
import runpy
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pyro_nf
from pyro_nf.flows import stacks
from pyro_nf.models import eight_schools
from pyro_nf.testing import check_flow

ROOT = Path(__file__).parent.parent
PAGES = sorted(path.relative_to(ROOT) for path in (ROOT / "docs").glob("*.md"))
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *map(str, PAGES)]
# Rooms that users need not know.
INTERNAL = {"compiler", "interface", "programs"}
# What the other side of a comparison is written in.
FOREIGN = ("numpyro", "pymc")


def blocks(name: str) -> list[str]:
    text = (ROOT / name).read_text()
    return [
        textwrap.dedent(block) for block in re.findall(r"^ *```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    ]


@pytest.fixture
def run(monkeypatch):
    """Run blocks as one module, which pickle can import classes from."""

    def run(name: str, chosen: list[str]) -> Any:
        module = types.ModuleType("documented")
        monkeypatch.setitem(sys.modules, "documented", module)
        for block in chosen:
            exec(compile(block, name, "exec"), vars(module))
        return module

    return run


@pytest.fixture
def few_steps():
    """Fit in a few steps."""
    namespace = runpy.run_path(str(ROOT / "tests" / "few_steps.py"))
    yield
    namespace["undo"]()


def test_readme(run, capsys):
    assert run("README.md", blocks("README.md")).idata["sample_stats"].attrs["verdict"] == "right"
    assert "Verdict: right" in capsys.readouterr().out


@pytest.mark.parametrize("context_dim", [0, 2])
def test_the_flow_of_contributing_passes_the_suite(run, context_dim):
    check_flow(run("CONTRIBUTING.md", blocks("CONTRIBUTING.md")).Shift(3, context_dim=context_dim))


@pytest.fixture
def posteriordb(tmp_path, monkeypatch):
    """A folder of that name, with eight schools, where the blocks run."""
    sigma, y = eight_schools.data()
    names = ["mu", "tau", *(f"theta_trans[{j}]" for j in range(1, 9)), *(f"theta[{j}]" for j in range(1, 9))]
    entry = {"name": "eight_schools-eight_schools_noncentered", "data": "eight_schools", "reference": "draws"}
    for folder in ("data", "reference"):
        (tmp_path / "posteriordb" / folder).mkdir(parents=True)
    (tmp_path / "posteriordb" / "index.json").write_text(json.dumps([entry]))
    with gzip.open(tmp_path / "posteriordb" / "data" / "eight_schools.json.gz", "wt") as file:
        json.dump({"J": 8, "y": y.tolist(), "sigma": sigma.tolist()}, file)
    np.savez(tmp_path / "posteriordb" / "reference" / "draws.npz", names=names, draws=np.ones((10, 1000, len(names))))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", [str(page) for page in PAGES if blocks(str(page))])
@pytest.mark.usefixtures("few_steps", "posteriordb")
@pytest.mark.filterwarnings("ignore:k-hat is above:UserWarning", "ignore::DeprecationWarning")  # of no fit; ArviZ's
def test_a_page_of_the_documentation(page, run):
    pytest.importorskip("matplotlib").use("Agg")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    run(page, [block for block in blocks(page) if not any(f"import {name}" in block for name in FOREIGN)])
    pyplot.close("all")


@pytest.mark.parametrize("library", FOREIGN)
def test_the_other_side_of_a_comparison(library, run):
    (block,) = (block for block in blocks("docs/coming_from.md") if f"import {library}" in block)
    compile(block, "docs/coming_from.md", "exec")
    pytest.importorskip(library)
    run("docs/coming_from.md", [block])


@pytest.mark.usefixtures("few_steps")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_the_fit_of_several_processes_runs_in_one(monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    runpy.run_path(str(ROOT / "docs" / "fit.py"))
    assert "ELBO" in capsys.readouterr().out


@pytest.mark.parametrize("name", DOCUMENTS)
def test_relative_links_lead_somewhere(name):
    text = re.sub(r"```.*?```", "", (ROOT / name).read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target = link.partition("#")[0].replace(
            "tutorials/", "../tutorials/" if name.startswith("docs/") else "tutorials/"
        )
        assert "://" in link or not target or ((ROOT / name).parent / target).exists(), link


def test_which_flow_has_a_row_for_every_stack():
    table = re.search(r"\| name \| one layer .*?\n\n", (ROOT / "docs" / "flows.md").read_text(), re.DOTALL)
    named = [name for row in table[0].splitlines()[2:] if row for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(named) == stacks.names()


def test_results_have_every_benchmark_table_of_the_readme():
    results = (ROOT / "docs" / "results.md").read_text()
    tables = re.findall(r"(?:^\|.*\n)+", (ROOT / "README.md").read_text(), re.MULTILINE)
    for table in tables:
        if table.split("|")[1].strip() in ("guide", "posterior", "work", "flow"):
            assert table in results


def test_every_public_module_has_a_page():
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    rooms = {path.parent.name for path in Path(pyro_nf.__file__).parent.glob("*/__init__.py")}
    for room in {*rooms, "guides", "models"} - INTERNAL:
        assert f"automodule:: pyro_nf.{room}\n" in pages
