"""What is given to a guide: its flow, by a name, as it is or by a factory, and its model."""

from collections.abc import Callable
from typing import Any

from pyro_nf.flows import Flow, stacks

FlowLike = str | Flow | Callable[..., Flow]


def check_flow_like(flow: FlowLike) -> None:
    """Report a `flow` argument that can never become a flow when the guide is made, not at its first step."""
    if isinstance(flow, str):
        stacks.make(flow, 1)
    elif not callable(flow):  # a Flow is callable too
        raise ValueError(f"flow must be a name, a Flow or a factory dim -> Flow; got {type(flow).__name__}")


def build_flow(flow: FlowLike, dim: int, **options: Any) -> Flow:
    """Turn the `flow` argument of a guide (a name, a flow, a factory) into a flow over `dim` coordinates.

    Raises:
        ValueError: If the name is unknown, or the flow has another dimension.
    """
    if isinstance(flow, str):
        built = stacks.make(flow, dim, **options)
    elif isinstance(flow, Flow):
        built = flow
    else:
        try:
            built = flow(dim, **options)
        except TypeError as error:
            raise ValueError(
                f"flow must be a factory of a Flow from a number of coordinates; it fails: {error}"
            ) from error
    if not isinstance(built, Flow):
        raise ValueError(f"flow must be a factory that returns a Flow; it returned {built!r} for dim={dim}")
    if tuple(built.event_shape) != (dim,):
        raise ValueError(
            f"flow must be over the model's {dim} unconstrained latent coordinates; "
            f"got one of event shape {tuple(built.event_shape)}"
        )
    return built


def check_model(model: Any) -> Any:
    """Return a model, or raise a `ValueError`: it must be callable."""
    if not callable(model):
        raise ValueError(f"model must be a Pyro model, a function or a module; got {model!r}")
    return model
