"""Pyro's own tests, with `AutoFlow` in place of the guides that they test: counts, and every failure explained.

    python benchmarks/pyro_tests.py CHECKOUT

CHECKOUT is one of https://github.com/pyro-ppl/pyro, of the installed version. The names in `REPLACED` are `AutoFlow`
while the tests run, and their own options are left out. Run are all tests that use one of these names, in whatever
file: autoguides, reparametrisation, `Predictive`, serialisation. A test fails, too, where it takes more CPU time than
`--seconds`. The script ends with an error if a test fails that `EXPLAINED` says nothing about. `--plain` leaves Pyro's
guides in place, which tells the failures of the tests themselves.
"""

import argparse
import os
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

REPLACED = (
    "AutoNormal",
    "AutoDiagonalNormal",
    "AutoMultivariateNormal",
    "AutoLowRankMultivariateNormal",
    "AutoIAFNormal",
)
# What a test asks for that AutoFlow is not, or that is not public, by the test's name: all others must pass.
EXPLAINED: dict[str, str] = {
    "AutoGaussianChain::test_multivariatate_normal_auto": "reads AutoMultivariateNormal's own attribute loc",
    "EqualizeHandlerTests::test_render_model": "needs graphviz; with Pyro's guides, too",
    "test_auto_diagonal_gaussians": "reads the guide's own attribute loc",
    "test_auto_dirichlet": "reads the guide's own attributes loc and transform",
    "test_auto_transform": "reads the guide's own attribute loc",
    "test_autonormal_dynamic_model": "reads AutoNormal's own attribute locs",
    "test_condition_by_equalize": "calls AutoNormal's private _get_loc_and_scale",
    "test_discrete_helpful_error": "compares the words: AutoFlow refuses in others",
    "test_empty_model_error": "asks for a RuntimeError: AutoFlow refuses a model without latents with a ValueError",
    "test_exact_tree[AutoGaussianFunsor]": "needs funsor; with Pyro's guides, too",
    "test_init_loc_fn": "a median is of 10,000 draws, not a formula",
    "test_init_scale": "calls the private _loc_scale of a normal",
    "test_median_module": "20 steps of 0.005 from the median of the prior; AutoFlow starts where AutoNormal does, at 0",
    "test_quantiles": "asks for the variance of the posterior as a formula",
    "test_reparam_log_joint": "reads the transforms of the guide's TransformedDistribution",
    "test_stable": "the test's model has no latents, which AutoFlow refuses",
    "test_stable_with_log_prob_param_fit": "the test's model has no latents, which AutoFlow refuses",
    "test_subsample_guide": "local latents in a subsampled plate: AutoFlow refuses them and names AmortizedFlow",
    "test_subsample_guide_2": "local latents in a subsampled plate: AutoFlow refuses them and names AmortizedFlow",
    "test_subsample_model": "local latents in a subsampled plate: AutoFlow refuses them and names AmortizedFlow",
}


class Swap:
    """Plugin of pytest: puts `AutoFlow` in the place of Pyro's guides, chooses the tests that use them, and counts."""

    def __init__(self, is_plain: bool, seconds: int) -> None:
        self.is_plain, self.seconds = is_plain, seconds
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.explained: Counter[str] = Counter()
        self.failed: list[str] = []

    def pytest_configure(self) -> None:
        """Replace the guides, before any test is imported."""
        if self.is_plain:
            return
        import pyro.infer.autoguide as autoguide

        for name in REPLACED:
            globals()[name] = swapped(name)  # where pickle looks for it
            for module in (autoguide, autoguide.guides):
                setattr(module, name, globals()[name])

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Leave out the tests that use none of the guides."""
        used = [item for item in items if uses_guides(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in used])
        items[:] = used

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: Any) -> Iterator[None]:
        """Run a test for so many seconds at most."""
        with limited(self.seconds):
            return (yield)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count what came of a test."""
        if report.when != "call" and report.passed:
            return
        file, _, test = report.nodeid.partition("::")
        outcome = report.outcome
        if hasattr(report, "wasxfail"):
            outcome = "expected by Pyro to fail"
        elif report.failed and not self.is_plain and (name := explained(test)):
            outcome = "explained"
            self.explained[name] += 1
        elif report.failed:
            self.failed.append(report.nodeid)
        self.counts[file][outcome] += 1

    def pytest_sessionfinish(self, session: Any) -> None:
        """A run whose failures are all explained is a success."""
        if not self.failed and session.exitstatus == pytest.ExitCode.TESTS_FAILED:
            session.exitstatus = pytest.ExitCode.OK

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print the counts of each file, and what explains the failures."""
        write = terminalreporter.write_line
        for file, counts in sorted(self.counts.items()):
            write(f"{file}: " + ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items())))
        for name, number in sorted(self.explained.items()):
            write(f"{number:4} x {name}: {EXPLAINED[name]}")
        for nodeid in self.failed:
            write(f"not explained: {nodeid}")
        write("total: " + ", ".join(f"{n} {name}" for name, n in sorted(sum(self.counts.values(), Counter()).items())))


def swapped(name: str) -> type:
    """Return `AutoFlow` under the name of one of Pyro's guides, which takes that guide's options."""
    from pyro_nf.guides import AutoFlow

    def init(self: Any, model: Any, *args: Any, **options: Any) -> None:
        kept = {key: value for key, value in options.items() if key in ("init_loc_fn", "init_scale")}
        AutoFlow.__init__(self, model, **kept)

    return type(name, (AutoFlow,), {"__init__": init, "__module__": __name__})


def explained(test: str) -> str:
    """Return the key of the table that a test falls under, the start of its name and parameters; "" for none."""
    return next((key for key in EXPLAINED if test == key or test.startswith((f"{key}[", f"{key}-"))), "")


def uses_guides(item: Any) -> bool:
    """Whether a test names one of the guides: in its code, in its parameters, or in functions that these call."""
    values = [item.function, *getattr(getattr(item, "callspec", None), "params", {}).values()]
    if item.cls is not None:
        values += [value for value in vars(item.cls).values() if callable(value)]
    seen: set[int] = set()
    while values:
        value = values.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if getattr(value, "__name__", "") in REPLACED:
            return True
        if isinstance(value, partial):
            values += [value.func, *value.args]
        code = getattr(value, "__code__", None)
        if code is None:
            continue
        if not set(REPLACED).isdisjoint(_names(code)):
            return True
        values += [value.__globals__.get(name) for name in _names(code) if callable(value.__globals__.get(name))]
    return False


def _names(code: Any) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if hasattr(constant, "co_names"):
            yield from _names(constant)


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise a `TimeoutError` after so many seconds of CPU time: others may be at work, too."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"longer than {seconds} CPU seconds")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--plain", action="store_true", help="leave Pyro's guides in place")
    parser.add_argument("--seconds", type=int, default=120, help="CPU time that each test has")
    parser.add_argument("--files", nargs="+", help="all that name one of the guides, by default")
    parser.add_argument("-k", default="", help="which tests, as for pytest")
    options = parser.parse_args()
    os.chdir(options.checkout)
    sys.path.insert(0, ".")
    files = options.files or sorted(
        str(path) for path in Path("tests").rglob("test_*.py") if any(name in path.read_text() for name in REPLACED)
    )
    command = ["-q", "--tb=line", "-p", "no:cacheprovider", "-W", "ignore", "-k", options.k, *files]
    sys.exit(pytest.main(command, plugins=[Swap(options.plain, options.seconds)]))


if __name__ == "__main__":
    main()
