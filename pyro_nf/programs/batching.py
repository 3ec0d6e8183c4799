"""What `vmap` cannot batch, and what a recording stops at, done in ways that both can take.

A model is run for many draws at once by `torch.func.vmap`, and its density is recorded as a graph of operations. Code
that was written for one draw meets both with operations that they refuse: a draw's value written into a tensor that
all draws share, `tensor[mask] = number`, `tensor.data`, an `autograd.Function` of the old style, the value of a
constant as a number. `Batchable` is the mode under which models are run. It has a rule for each of these, gives NaN
for a draw whose matrix cannot be factorized, where torch would end the run of all draws, and, while
it lasts, the rewrites of `pyro_nf.programs.rewrites` stand in for the few functions of Pyro and torch that need more
than a rule.
"""

import threading
import traceback
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode

from pyro_nf.compiler import functorch
from pyro_nf.compiler.functorch import is_batched
from pyro_nf.compiler.recording import is_constant, unrecorded
from pyro_nf.programs.factorizations import NEVER_RAISING
from pyro_nf.programs.rewrites import REWRITES, Rewrite

# What makes a tensor that nobody else holds.
_MAKERS = {
    *(getattr(torch, name) for name in ("tensor", "zeros", "ones", "full", "empty", "eye", "arange", "linspace")),
    *(getattr(torch, f"{name}_like") for name in ("zeros", "ones", "full", "empty")),
    *(getattr(Tensor, f"new_{name}") for name in ("zeros", "ones", "full", "empty", "tensor")),
    *(Tensor.new, Tensor.clone, torch.clone),  # type: ignore[attr-defined]
}
_NUMBERS = {getattr(Tensor, f"__{name}__") for name in ("bool", "int", "float", "index")}
_NUMBERS |= {Tensor.item, Tensor.tolist}
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_IN_PLACE_OPERATORS = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "pow", "and", "or", "xor")}
# What `vmap` does draw by draw in place, and at once beside it.
_IN_TWO: dict[Any, Callable[..., Tensor]] = {
    Tensor.clamp_: torch.clamp,
    Tensor.clamp_min_: torch.clamp_min,
    Tensor.clamp_max_: torch.clamp_max,
    Tensor.scatter_: torch.scatter,
}
# What torch's distributions ask when they check values, which no model does where it is batched.
_IS_VALID = functorch.validity_check()


class Batchable(TorchFunctionMode):
    """The mode under which a model, written for one draw, can be batched by `vmap` and recorded by `make_fx`.

    Args:
        fixed: Whether the tensors that the model holds, such as its data, keep their values for as long as a recording
            is used: then what follows from them may be read as a number while it is made.
    """

    def __init__(self, fixed: bool = False) -> None:
        super().__init__()
        self.fixed = fixed
        self._made: dict[int, weakref.ref[Tensor]] = {}

    def __enter__(self) -> Any:
        """Run under the mode, and under the rewrites."""
        _rewriting.enter()
        return super().__enter__()

    def __exit__(self, kind: Any, error: Any, trace: TracebackType | None) -> None:
        """Leave both."""
        super().__exit__(kind, error, trace)
        _rewriting.leave()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func`, or what replaces it."""
        rule = _rule(func)
        if rule is None:
            return func(*args, **(kwargs or {}))
        return rule(self, func, *args, **(kwargs or {}))

    def _make(self, func: Any, *args: Any, **kwargs: Any) -> Tensor:
        made: Tensor = func(*args, **kwargs)
        self._made[id(made)] = weakref.ref(made)
        return made

    def _factorize(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("out") is not None:
            return func(*args, **kwargs)
        return NEVER_RAISING[func](*args, **kwargs)

    def _is_valid(self, func: Any, x: Tensor) -> bool:
        return True

    def _data(self, func: Any, x: Tensor, *args: Any) -> Any:
        return x.detach() if functorch.is_wrapped(x) else func(x, *args)

    def _set(self, func: Any, x: Tensor, index: Any, value: Any) -> None:
        is_mask = isinstance(index, Tensor) and index.dtype == torch.bool
        if is_mask and isinstance(value, int | float) and x.shape[: index.dim()] == index.shape:
            mask = index[(...,) + (None,) * (x.dim() - index.dim())]
            self._write(Tensor.copy_, x, x.masked_fill(mask, value))
        else:
            self._write(func, x, index, value)

    def _write(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Write in place; what all draws share, and the model alone holds, is first made each draw's own."""
        if func in _IN_TWO and is_batched(x):
            return x.copy_(_IN_TWO[func](x, *args, **kwargs))
        try:
            return func(x, *args, **kwargs)
        except RuntimeError:
            batched = [arg for arg in args if isinstance(arg, Tensor) and is_batched(arg)]
            if not batched or is_batched(x) or not self._is_models_own(x):
                raise
        own = x + torch.zeros_like(batched[0].detach().flatten()[0], dtype=x.dtype)
        func(own, *args, **kwargs)
        functorch.swap(x, own)  # all that refer to x shall find what is written
        return x

    def _is_models_own(self, x: Tensor) -> bool:
        """Whether a tensor was made in this run and has no views, which would not see what is written."""
        made = self._made.get(id(x))
        if made is None or made() is not x:
            return False
        x = functorch.unwrapped(x)
        return not x._is_view() and functorch.num_users(x) == _ALONE

    def _number(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what a tensor's values are, also where a graph is recorded that they do not depend on."""
        if is_batched(x):
            return func(x, *args, **kwargs)  # which raises
        x = functorch.unwrapped(x)
        try:
            return func(x, *args, **kwargs)
        except RuntimeError:
            if not is_constant(x, self._is_known):
                raise
        with unrecorded():
            return func(x, *args, **kwargs)

    def _is_known(self, held: Tensor, node: Any) -> bool:
        literal = all(user.target is torch.ops.aten.lift_fresh_copy.default for user in node.users)
        return literal or (self.fixed and not held.requires_grad)


def batchable(fixed: bool = False) -> AbstractContextManager[Any]:
    """Return the mode to run under: a `Batchable`, or none where one that serves is there already."""
    modes = [mode for mode in functorch.function_modes() if isinstance(mode, Batchable)]
    return nullcontext() if any(mode.fixed or not fixed for mode in modes) else Batchable(fixed)


class _Rewriting:
    """The rewrites, in place while some thread is under a `Batchable`: they compute what they stand in for."""

    def __init__(self, rewrites: tuple[Rewrite, ...]) -> None:
        self._rewrites = rewrites
        self._originals = [vars(owner)[name] for owner, name, _ in rewrites]
        self._lock, self._depth = threading.Lock(), 0

    def enter(self) -> None:
        with self._lock:
            self._depth += 1
            if self._depth == 1:
                for owner, name, ours in self._rewrites:
                    setattr(owner, name, ours)

    def leave(self) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                for (owner, name, _), original in zip(self._rewrites, self._originals, strict=True):
                    setattr(owner, name, original)


class _Context:
    """What a function of the old style finds as `ctx`."""

    saved_tensors: tuple[Tensor | None, ...] = ()
    needs_input_grad: tuple[bool, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def _apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
    """Stand in for `Function.apply`: batch functions that have `forward(ctx, ...)` and no `setup_context`, too."""
    old_style = cls.setup_context is Function.setup_context
    if not (old_style and functorch.in_transform()):
        return _plain_apply(cls, *args, **kwargs)
    tensors = [i for i, arg in enumerate(args) if isinstance(arg, Tensor) and arg.is_floating_point()]
    if (
        functorch.draws_differ() and tensors and not any(is_batched(args[i]) for i in tensors)
    ):  # it may draw: from parameters that all draws share, too, they shall differ
        first = tensors[0]
        args = (*args[:first], args[first] + 0.0 * torch.rand(()).to(args[first]), *args[first + 1 :])
    context = _Context()
    num_outputs = 0

    class NewStyle(Function):
        """The function, whose tensors that are kept for the gradient are outputs, as `vmap` needs them to be."""

        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Any:
            nonlocal num_outputs
            with Batchable():
                outputs = cls.forward(context, *inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            num_outputs = len(outputs)
            # A copy each: an output that is an input, or is given twice, would be a view.
            return *outputs, *(None if kept is None else kept.clone() for kept in context.saved_tensors)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*output[num_outputs:])

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            context.saved_tensors, context.needs_input_grad = ctx.saved_tensors, ctx.needs_input_grad
            return cls.backward(context, *grads[:num_outputs])

    outputs = NewStyle.apply(*args, **kwargs)[:num_outputs]
    return outputs[0] if num_outputs == 1 else outputs


def culprit(error: BaseException) -> str:
    """Return whose code raised an error: `"the model"`, or a distribution, as `"pyro's Rejector at site 'x'"`."""
    owner, site = "", ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        held = frame.f_locals
        if isinstance(held.get("self"), Distribution):
            kind = type(held["self"])
            home = kind.__module__.split(".")[0]
            owner = f"{home}'s {kind.__name__}" if home in ("pyro", "torch") else kind.__name__
        if frame.f_code.co_name == "compute_log_prob":
            site = held["name"]
        elif frame.f_code.co_name == "apply_stack":
            site = held["msg"]["name"]
    if not owner:
        return "the model"
    return f"{owner} at site {site!r}" if site else owner


@cache
def _rule(func: Any) -> Callable[..., Any] | None:
    """Return the rule of `Batchable` for a function of torch, if there is one."""
    if func in _MAKERS:
        return Batchable._make
    if func in _NUMBERS:
        return Batchable._number
    if func in NEVER_RAISING:
        return Batchable._factorize
    if func == _IS_VALID:
        return Batchable._is_valid
    if func == _DATA:
        return Batchable._data
    if func == Tensor.__setitem__:
        return Batchable._set
    name = getattr(func, "__name__", "")
    in_place = name in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))
    return Batchable._write if in_place and getattr(Tensor, name, None) is func else None


_ALONE = functorch.num_users(torch.zeros(1))
_plain_apply = Function.apply.__func__  # type: ignore[attr-defined]
_rewriting = _Rewriting((*REWRITES, (Function, "apply", classmethod(_apply))))
