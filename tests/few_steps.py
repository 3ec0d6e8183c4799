"""Every fit takes a few plain steps: a quick run of all that pages and tutorials do, whose figures mean nothing.

Python starts its interactive sessions, notebooks among them, with the file that PYTHONSTARTUP names:
`PYTHONSTARTUP=$PWD/tests/few_steps.py pytest --nbmake tutorials`. Undone by `undo()`.
"""

import inspect
from typing import Any

from pyro_nf.diagnostics import Verdict, correction, diagnose
from pyro_nf.inference import FlowSVI

_NUM_STEPS = 10
_diagnose: Any = inspect.unwrap(diagnose)
_init, _decide, _defaults = FlowSVI.__init__, correction.decide, dict(_diagnose.__kwdefaults__)


def _few(self: FlowSVI, *args: Any, **options: Any) -> None:
    num_steps = min(options.get("max_steps", _NUM_STEPS), _NUM_STEPS)
    few = {"learning_rate": 0.01, "num_particles": 16}  # a rate that is given is not looked for
    _init(self, *args, **(few | options | {"max_steps": num_steps, "compile": False, "plan": None}))


def undo() -> None:
    """Fit in earnest again."""
    FlowSVI.__init__, correction.decide = _init, _decide  # type: ignore[method-assign]
    _diagnose.__kwdefaults__.update(_defaults)


FlowSVI.__init__ = _few  # type: ignore[method-assign]
# Guides that are not fitted are not refused.
correction.decide = lambda evidence: _decide(evidence)._replace(verdict=Verdict.RIGHT_AFTER_CORRECTION)
_diagnose.__kwdefaults__.update(num_samples=1000, num_sets=1, num_starts=2)
