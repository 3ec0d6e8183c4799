"""The latents that a guide is for: which sites of a model they are, and whether a later call has the same ones."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor

from pyro_nf.programs._pyro import subsampled
from pyro_nf.programs.enumeration import find_discrete
from pyro_nf.programs.noise import running
from pyro_nf.programs.sites import is_data, is_latent

# Elements of a list or tuple that are looked at: a longer one is data.
_MAX_ELEMENTS = 32

Shape = tuple[int | None, ...]
"""Sizes of a site's value, `None` for those that may differ from call to call."""


def trace_latents(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    guide: str,
    known: Collection[str] = (),
) -> tuple[poutine.Trace, dict[str, Any]]:
    """Run the model once and return its trace and its latent sites, which must be of a kind that a guide takes.

    Args:
        model: The Pyro model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        guide: Name of the guide, for the message.
        known: The latents of a guide that is set up already: others, such as data to be predicted, are not its own.

    Raises:
        ValueError: If there is no continuous latent, one in a sequential plate, or a discrete one that cannot be
            summed out, or if the model fails on data
            that fit none of its subsampled plates.
    """
    tracer = poutine.trace(model)
    try:
        with poutine.block(), torch.no_grad(), running():
            trace = tracer.get_trace(*args, **kwargs)
    except (IndexError, RuntimeError, ValueError) as error:
        _explain_sizes(tracer.trace, (*args, *kwargs.values()), error)
        raise
    discrete = find_discrete(trace, set()).names
    latents = {name: site for name, site in trace.nodes.items() if is_latent(site) and name not in discrete}
    sites = {name: site for name, site in latents.items() if not known or name in known}
    if not sites:
        what = "discrete latents alone, which are summed out" if discrete else "no latent variables"
        raise ValueError(f"{guide} found {what} in the model: there is no posterior to fit")
    for name, site in sites.items():
        for frame in site["cond_indep_stack"]:
            if not frame.vectorized:
                raise ValueError(
                    f"site {name!r} stands in a sequential plate, a loop over pyro.plate({frame.name!r}, ...); "
                    f"{guide} takes vectorized ones: with pyro.plate({frame.name!r}, ...)"
                )
    return trace, sites


def check_latents(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    guide: str,
    known: Collection[str] = (),
    local: bool = False,
) -> poutine.Trace:
    """Run the model once and check that its latents are of the kind that a guide takes.

    Args:
        model: The Pyro model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        guide: Name of the guide, for the message.
        known: As in `trace_latents`.
        local: Whether the guide is for the local latents of one plate, or for latents that are always all there.

    Returns:
        The model's trace.

    Raises:
        ValueError: If a latent stands inside (`local`: outside) a subsampled plate; else as `trace_latents`.
    """
    trace, sites = trace_latents(model, args, kwargs, guide, known)
    for name, site in sites.items():
        subsampled = [f.name for f in site["cond_indep_stack"] if f.full_size is not None and f.size < f.full_size]
        if subsampled and not local:
            raise ValueError(
                f"site {name!r} is local to the subsampled plate {subsampled[0]!r}, so that each step sees other "
                f"latents: {guide} needs them all. Give the plate an encoder: AmortizedFlow(model, encoder), or, with "
                f"global latents too, StructuredFlow(model, {{{subsampled[0]!r}: encoder}})"
            )
    if local:
        plates = {tuple(frame.name for frame in site["cond_indep_stack"]) for site in sites.values()}
        if len(plates) > 1 or any(len(names) != 1 for names in plates):
            places = ", ".join(
                f"{name!r} in {' and '.join(f.name for f in site['cond_indep_stack']) or 'no plate'}"
                for name, site in sites.items()
            )
            raise ValueError(
                f"{guide} takes latents that all stand in one plate, and in no other; got {places}. Latents outside "
                "the plate: StructuredFlow(model, {plate: encoder}). Nested plates: make the inner one an event "
                "dimension, by .to_event(1)"
            )
    return trace


def run_quietly(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], devices: Collection[torch.device]
) -> poutine.Trace | None:
    """Run the model once, leaving the random state as it was; `None` if it fails on these arguments.

    What a guide is called with need not be the model's arguments once it is set up, and where they should be, whoever
    runs the model next reports the failure.
    """
    with _same_random_state(devices), poutine.block(), torch.no_grad(), running():
        try:
            return poutine.trace(model).get_trace(*args, **kwargs)
        except Exception:
            return None


def lost_latents(latents: dict[str, Shape], shapes: dict[str, Shape]) -> list[str]:
    """Names of the latents that are none any more, or have another shape.

    Latents that came along do not count: data to be predicted are latent in every model.

    Args:
        latents: Shapes of a guide's latents.
        shapes: Shapes of the model's latents now.
    """
    return [name for name, shape in latents.items() if shapes.get(name) != shape]


def explain_lost(
    name: str, trace: poutine.Trace, latents: dict[str, Shape], shapes: dict[str, Shape], guide: str
) -> str:
    """Say what became of a latent of a trained guide; "" if it only is not there, as in predictions."""
    if name in shapes:
        return (
            f"site {name!r} had shape {_shown(latents[name])} when this {guide} was set up, and has "
            f"{_shown(shapes[name])} now: make the guide anew for these arguments. Latents of the rows of data, of any "
            "number: AmortizedFlow or StructuredFlow"
        )
    if name in trace.nodes and is_data(trace.nodes[name]):
        return (
            f"site {name!r} was latent when this {guide} was set up, and is observed now: it was trained to sample "
            "data. Make the guide anew, and fit it with the data given"
        )
    return ""


def argument_kinds(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what decides which sites are latent, as a rule: what is `None`, types, flags and strings."""
    return _described((args, kwargs), sizes=False)


def argument_sizes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what may decide on the shapes of latents, too: shapes of tensors and whole numbers."""
    return _described((args, kwargs), sizes=True)


def _described(value: Any, sizes: bool) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Tensor):
        return ("tensor", *(value.shape if sizes else ()))
    if isinstance(value, dict):
        return tuple((str(key), _described(item, sizes)) for key, item in value.items())
    if isinstance(value, (tuple, list)) and len(value) <= _MAX_ELEMENTS:
        return tuple(_described(item, sizes) for item in value)
    if sizes and isinstance(value, int):
        return "number", value
    return f"{type(value).__module__}.{type(value).__qualname__}"  # no type, which a pickle might not find again


@contextmanager
def _same_random_state(devices: Collection[torch.device]) -> Iterator[None]:
    before = get_rng_state()  # Python's, NumPy's and torch's
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        set_rng_state(before)


def _shown(shape: Shape) -> str:
    return (
        "(" + ", ".join("any" if size is None else str(size) for size in shape) + ("," if len(shape) == 1 else "") + ")"
    )


def has_rows(value: Any, size: int | None) -> bool:
    """Whether this is a tensor with a row for each of the `size` elements of a plate."""
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == size


def _explain_sizes(trace: poutine.Trace, values: tuple[Any, ...], error: Exception) -> None:
    """Raise a `ValueError` if a model that failed has a subsampled plate, and no data of that plate's size."""
    rows = [len(value) for value in values if isinstance(value, Tensor) and value.dim() > 0]
    for name, site in trace.nodes.items():
        fn = site.get("fn")
        is_part = subsampled(site) is not None
        if is_part and rows and fn.size not in rows:
            raise ValueError(
                f"args hold data of {' and '.join(map(str, rows))} rows, on which the model fails: its plate {name!r} "
                f"has size {fn.size} and subsample_size {fn.subsample_size}. Pass all {fn.size} rows, for the model to "
                "take those with the plate's indices; or minibatches x, without indexing them, in "
                f"pyro.plate({name!r}, {fn.size}, subsample_size=len(x))"
            ) from error
