"""What is known of a tensor inside `torch.func` transforms, and of the transforms themselves."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def _functorch() -> Any:
    from torch._C import _functorch as functorch

    return functorch


def is_wrapped(x: Tensor) -> bool:
    """Whether a transform holds this tensor in a wrapper."""
    return bool(_functorch().is_functorch_wrapped_tensor(x))


def is_batched(x: Tensor) -> bool:
    """Whether `vmap` batches a tensor, at any of its levels."""
    functorch = _functorch()
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def unwrapped(x: Tensor) -> Tensor:
    """Return the tensor inside all wrappers."""
    functorch = _functorch()
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
    return x


def in_vmap() -> bool:
    """Whether `vmap` runs, at any level."""
    functorch = _functorch()
    stack = functorch.get_interpreter_stack() or []
    return any(level.key() == functorch.TransformType.Vmap for level in stack)


def in_transform() -> bool:
    """Whether any transform runs."""
    return bool(torch._C._are_functorch_transforms_active())


def draws_differ() -> bool:
    """Whether the innermost transform is a `vmap` whose draws differ."""
    from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_current_functorch_interpreter

    level = retrieve_current_functorch_interpreter()
    return isinstance(level, VmapInterpreter) and level.randomness() == "different"


def in_torchscript_trace() -> bool:
    """Whether TorchScript traces."""
    return torch._C._get_tracing_state() is not None


def function_modes() -> list[Any]:
    """Return the `TorchFunctionMode`s that hold now, the outermost first."""
    from torch.overrides import _get_current_function_mode_stack

    return list(_get_current_function_mode_stack())


def without_modes() -> AbstractContextManager[None]:
    """Return a context in which no `TorchFunctionMode` holds."""
    context: AbstractContextManager[None] = torch._C.DisableTorchFunction()  # type: ignore[assignment]
    return context


def swap(x: Tensor, other: Tensor) -> None:
    """Let all that refer to one tensor find the other, and the other way round."""
    torch._C._swap_tensor_impl(x, other)  # type: ignore[attr-defined]


def num_users(x: Tensor) -> int:
    """Return how many tensors share a tensor's memory."""
    count: int = torch._C._storage_Use_Count(x.untyped_storage()._cdata)  # type: ignore[attr-defined]
    return count


def validity_check() -> Callable[..., Any] | None:
    """Return what torch's distributions ask when they check values, if there is such a function."""
    return getattr(torch, "_is_all_true", None)


def sample_dirichlet(concentration: Tensor) -> Tensor:
    """Draw without a gradient."""
    return torch._sample_dirichlet(concentration)


def standard_gamma(concentration: Tensor) -> Tensor:
    """Draw from `Gamma(concentration, 1)`."""
    return torch._standard_gamma(concentration)


def with_parameters(module: torch.nn.Module, parameters: dict[str, Tensor]) -> AbstractContextManager[Any]:
    """Return a context in which a module has other parameters, also where TorchScript traces."""
    context: AbstractContextManager[Any] = torch.nn.utils.stateless._reparametrize_module(module, parameters)
    return context
