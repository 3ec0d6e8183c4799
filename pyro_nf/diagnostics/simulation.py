"""What a model draws by itself: data from its likelihood, latents from its prior."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import pyro.distributions as dist
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch import Tensor

from pyro_nf.programs.calls import innermost, signature_of
from pyro_nf.programs.discrete import draw_discrete, with_discrete
from pyro_nf.programs.enumeration import Enumeration
from pyro_nf.programs.sites import is_data
from pyro_nf.programs.traces import run_model


class Unconditioned(UnconditionMessenger):
    """Let observed sites be drawn, as `poutine.uncondition` does, but leave deterministic ones and factors as they are.

    Pyro's own redraws a deterministic site, and one inside a plate then has the plate's dimension twice.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if is_data(msg) and not is_factor(msg):
            super()._pyro_sample(msg)


def is_factor(site: Mapping[str, Any]) -> bool:
    """Whether a site of a trace is a `pyro.factor`, which Pyro marks as observed, and which has no data."""
    return isinstance(site["fn"], dist.Unit)


def is_drawn_data(site: Mapping[str, Any]) -> bool:
    """Whether a site of a trace under `Unconditioned` is drawn where the model has data."""
    return site["type"] == "sample" and bool(site["infer"].get("was_observed", False))


def prior(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return the model as a guide of itself, whose trace holds draws of its latents and, beside them, of its data."""

    def draw(*args: Any, **kwargs: Any) -> None:
        with Unconditioned():
            model(*args, **kwargs)

    return draw


class Prediction(NamedTuple):
    """Data that a model draws given its latents, and the discrete latents among these."""

    data: dict[str, Tensor]
    discrete: dict[str, Tensor]


def predictive(
    model: Callable[..., Any], guide: Callable[..., Any], enumeration: Enumeration
) -> Callable[..., Prediction]:
    """Return the guide, returning the data that the model draws given the guide's latents.

    Discrete latents, which the guide does not have, are drawn from their posterior given these.
    """

    def draw(*args: Any, **kwargs: Any) -> Prediction:
        latents = poutine.trace(guide).get_trace(*args, **kwargs)
        discrete: dict[str, Tensor] = {}
        with poutine.block():
            if enumeration.names:
                observed = run_model(partial(model, *args, **kwargs), latents, enumeration)
                discrete = draw_discrete(observed)
            with Unconditioned():
                whole = with_discrete(latents, discrete)
                drawn = poutine.trace(poutine.replay(model, trace=whole)).get_trace(*args, **kwargs)
        return Prediction(drawn_data(drawn), discrete)

    return draw


def drawn_data(trace: Trace) -> dict[str, Tensor]:
    """Return the data that a trace under `Unconditioned` has drawn, `{site: value}`."""
    return {name: site["value"] for name, site in trace.nodes.items() if is_drawn_data(site)}


def named_arguments(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors among a model's arguments by the names of its signature; the second of `*data` is `data_1`.

    Those of a model whose signature Python does not know are `args_0`, `args_1`, ...
    """
    function, args, kwargs = innermost(model, args, kwargs)
    signature = signature_of(function)
    if signature is None:
        return dict(_tensors({"args": args, **kwargs}))
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(_tensors(bound.arguments))


def _tensors(values: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in values.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            yield from _tensors(value)
        elif isinstance(value, (tuple, list)):
            yield from _tensors({f"{name}_{i}": item for i, item in enumerate(value)})
