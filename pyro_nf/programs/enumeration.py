"""Discrete latents of a model, run with all of their values at once, so that the density can sum them out.

A discrete latent of finite support that the guide does not sample gets every value of its support along a dimension of
its own, to the left of all plates (Pyro's `EnumMessenger`). The model is that of one draw: indexing by such a value
broadcasts, and `Vindex` is accepted and not needed. `contraction` sums the values out.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_nf.programs._pyro import is_sampling, is_subsample
from pyro_nf.programs.sharing import InPlaceError, Shared, TooManyValuesError

# Values of sequential sites together: each is a run of the model.
_MAX_RUNS = 1024
# What draws from a discrete distribution.
_DISCRETE_DRAWS = {torch.multinomial, torch.bernoulli, torch.poisson, torch.binomial, Tensor.bernoulli_}


class Enumeration(NamedTuple):
    """The discrete latents of a model that are summed out.

    Attributes:
        parallel: Names of those whose values stand along dimensions of their own.
        sequential: For each of those that take one value a run (`infer={"enumerate": "sequential"}`), its values.
        first_dim: The first dimension that no plate and no batch takes, negative.
    """

    parallel: tuple[str, ...]
    sequential: dict[str, Sequence[Tensor]]
    first_dim: int

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.parallel, *self.sequential)

    def branches(self) -> Iterator[dict[str, Tensor]]:
        """Yield the values of the sequential ones of each run."""
        for values in itertools.product(*self.sequential.values()):
            yield dict(zip(self.sequential, values, strict=True))


NOTHING = Enumeration((), {}, -1)


def find_discrete(model: poutine.Trace, known: set[str]) -> Enumeration:
    """Return the discrete latents of a model's trace that are to be summed out.

    Args:
        model: A trace of one run, outside of `vmap`.
        known: Names of the sites that a guide samples, or that have a value otherwise.

    Raises:
        ValueError: If one of them has an infinite support, or a batch that no plate declares.
    """
    parallel: list[str] = []
    sequential: dict[str, Sequence[Tensor]] = {}
    nesting = 0
    for name, site in model.nodes.items():
        if site["type"] != "sample" or is_subsample(site):
            continue
        nesting = max(nesting, len(site["fn"].batch_shape), *(-frame.dim for frame in _plates(site)), 0)
        if site["is_observed"] or name in known or not is_discrete(site):
            continue
        _check(name, site)
        if site["infer"].get("enumerate") == "sequential" and not _plates(site):
            sequential[name] = list(site["fn"].enumerate_support(expand=False))
        else:
            parallel.append(name)
    found = Enumeration(tuple(parallel), sequential, -1 - nesting)
    number = 1
    for name, values in sequential.items():
        number *= len(values)
        if number > _MAX_RUNS:
            raise ValueError(
                f"site {name!r} is enumerated sequentially, and its values and those of the sites before it make "
                f"{number} runs of the model; {_MAX_RUNS} are the most: leave infer={{'enumerate': 'sequential'}} out"
            )
    return found


def is_discrete(site: dict[str, Any]) -> bool:
    """Whether a sample site of a trace has a discrete distribution."""
    support = getattr(site["fn"], "support", None)
    return bool(getattr(support, "is_discrete", False))


def run_enumerated(
    model: Callable[[], Any], latents: poutine.Trace | None, enumeration: Enumeration, fixed: dict[str, Tensor]
) -> poutine.Trace:
    """Run a model, which has its arguments, and return its trace, in which discrete latents have all their values.

    Args:
        model: The model.
        latents: Values of the others; `None` where a handler around the call gives them.
        enumeration: Which ones.
        fixed: Values of those that take one a run.
    """
    run = model if latents is None else poutine.replay(model, trace=latents)
    if not enumeration.parallel:
        with poutine.trace() as capture, _Marked(set(), fixed):
            run()
        return capture.trace
    shared: Shared | None = Shared()
    try:
        trace = _enumerated(run, enumeration, fixed, shared)
    except TooManyValuesError as error:
        raise ValueError(
            f"the values of the discrete latents {', '.join(map(repr, enumeration.parallel[:5]))} together make a "
            f"tensor of {error.args[0]:,} numbers: write a chain of latents with pyro.markov, put independent ones "
            "into a plate, or take fewer values"
        ) from error
    except InPlaceError:
        shared = None
        trace = _enumerated(run, enumeration, fixed, None)
    trace.shared = shared
    return trace


def _enumerated(
    run: Callable[[], Any], enumeration: Enumeration, fixed: dict[str, Tensor], shared: Shared | None
) -> poutine.Trace:
    with ExitStack() as stack:
        trace = stack.enter_context(poutine.trace())
        stack.enter_context(EnumMessenger(first_available_dim=enumeration.first_dim))
        stack.enter_context(_Marked(set(enumeration.parallel), fixed))
        stack.enter_context(shared or nullcontext())
        run()
    return trace.trace


class _Marked(Messenger):
    """Have sites enumerated, or give them their value of this run."""

    def __init__(self, parallel: set[str], fixed: dict[str, Tensor]) -> None:
        super().__init__()
        self.parallel, self.fixed = parallel, fixed

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if msg["done"] or msg["is_observed"]:
            return
        if name in self.fixed:
            msg["value"], msg["done"] = self.fixed[name], True
            msg["infer"] = {**msg["infer"], "_enumerated": True}
        elif name in self.parallel:
            msg["infer"] = {**msg["infer"], "enumerate": "parallel", "num_samples": None, "expand": False}
            msg["infer"]["_enumerated"] = True


@contextmanager
def refusing_hidden_draws() -> Iterator[None]:
    """Refuse a model that draws from a discrete distribution though all its discrete latents have values.

    Raises:
        ValueError: If it does.
    """
    with _DiscreteDraws() as draws:
        yield
    if draws.seen:
        raise ValueError(
            "the model draws a discrete variable anew in every run, at a site that poutine.block hides: take the block "
            "away, for discrete latents are summed out by themselves"
        )


class _DiscreteDraws(TorchFunctionMode):
    """Note whether there were draws from a discrete distribution."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or (func in _DISCRETE_DRAWS and is_sampling())
        return func(*args, **(kwargs or {}))


def _plates(site: dict[str, Any]) -> list[Any]:
    return [frame for frame in site["cond_indep_stack"] if frame.vectorized]


def _check(name: str, site: dict[str, Any]) -> None:
    fn = site["fn"]
    if not getattr(fn, "has_enumerate_support", False):
        raise ValueError(
            f"site {name!r} is discrete, and {_kind(fn)} has no finite support to sum over: observe it, sum it out by "
            "hand, or take a distribution with finitely many values, such as a Categorical over the values that matter"
        )
    declared = {frame.dim for frame in _plates(site)}
    batch = fn.batch_shape
    undeclared = [dim for dim in range(-len(batch), 0) if batch[dim] > 1 and dim not in declared]
    if undeclared:
        raise ValueError(
            f"site {name!r} is discrete and has the batch shape {tuple(batch)}, which no plate declares independent: "
            f'sample it in `with pyro.plate("...", {batch[undeclared[0]]}):`'
        )
    if fn.event_shape and not _is_one_hot(fn):
        raise ValueError(
            f"site {name!r} is a discrete vector of shape {tuple(fn.event_shape)}, whose values are too many to sum "
            "over: sample its entries in a plate, if they are independent"
        )


def _is_one_hot(fn: Any) -> bool:
    return "OneHot" in _kind(fn)


def _kind(fn: Any) -> str:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return type(fn).__name__
