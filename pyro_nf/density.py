"""A log density and its gradient at many points at once, without the cost of Python for each of them."""

import math
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from pyro_nf.coordinates import LogDensity

# Points that are computed at once: as many as keep each operation's numbers in the processor's cache, within bounds.
_MAX_POINTS, _MIN_POINTS, _CACHED_NUMBERS = 128, 16, 2**17
# Points whose values alone are computed at once: nothing is kept for a gradient, and Python is the cost of few.
_MAX_VALUES, _HELD_NUMBERS = 1000, 2**19
# Coordinates from which on a matrix of theirs, and so each point, may cost more than all else.
_MANY_COORDINATES = 256
# Operations from which on TorchScript, which takes a while to make, is faster over some hundred calls.
_MANY_OPERATIONS = 1000
# How often a density that changes is recorded anew.
_MAX_RENEWALS = 3

Gradients = Callable[[Tensor], tuple[Tensor, Tensor]]
# Those that are operations of their own, by their `id`.
_long_densities: "weakref.WeakValueDictionary[int, Density]" = weakref.WeakValueDictionary()


class Density:
    """A log density over `dim` coordinates, evaluated with its gradient at many points.

    The function is recorded as a graph of tensor operations on first use, which goes without Pyro's handlers, and is
    compared with the plain function at other points; where they differ, or it cannot be recorded, the plain one is
    used. What `vmap` cannot batch is computed point by point. Where a factorisation fails the density is NaN.

    Args:
        log_density: `(dim,) -> ()`.
        num_numbers: Numbers that a point makes in an operation: as many as there are data.

    Attributes:
        vectorized: Whether points are batched, as far as is known.
        work: Numbers that all operations make for a point; 0 before the first use, or if nothing could be recorded.
        is_long: Whether it is recorded, and its operations are so many that they, not numbers, take the time.
        size: Points that are computed at once.
    """

    def __init__(self, log_density: LogDensity, num_numbers: int = 1) -> None:
        self.log_density = log_density
        self.vectorized, self.work, self.is_long = True, 0, False
        self.size = max(_MIN_POINTS, min(_MAX_POINTS, _CACHED_NUMBERS // max(num_numbers, 1)))
        self._num_values = max(self.size, min(_MAX_VALUES, _HELD_NUMBERS // max(num_numbers, 1)))
        self._single = torch.func.grad_and_value(log_density)
        self._batch: Gradients | None = None
        self._graph: GraphModule | None = None
        self._num_renewals = 0

    @torch.no_grad()
    def values(self, points: Tensor) -> Tensor:
        """Return the log density at `(num_points, dim)`, `(num_points,)`."""
        # Whether points can be batched is known once gradients have been asked for.
        if len(points) <= self.size or self._batch is None:
            return self.gradients(points)[1]
        value = torch.func.vmap(self.log_density, randomness="different")
        try:
            return torch.cat([value(part) for part in points.split(self._num_values)])
        except LinAlgError:
            return self.gradients(points)[1]

    @torch.no_grad()
    def gradients(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients at `(num_points, dim)`, of the same shape, and the log densities, `(num_points,)`."""
        gradients, values = zip(*map(self._part, points.split(self.size)), strict=True)
        return torch.cat(gradients), torch.cat(values)

    @torch.no_grad()
    def hessian(self, point: Tensor) -> Tensor:
        """Return the second derivatives at a point, `(dim, dim)`."""
        # Twice in reverse: what models are made of does not all have forward derivatives.
        rows = torch.func.jacrev(torch.func.grad(self.log_density), chunk_size=_MAX_POINTS)(point)
        hessian: Tensor = (rows + rows.mT) / 2
        return hessian

    def batch(self, num_points: int) -> Gradients:
        """Return `gradients` for so many points as operations that can be recorded and compiled.

        A long density is a single operation: to record its thousands once more takes longer than many a fit.
        """
        if self.is_long:
            _long_densities[id(self)] = self
            return lambda points: _gradients(points, id(self))  # type: ignore[no-any-return]
        same_size = self._graph is not None and num_points == self.size
        return self._graph if same_size else torch.func.vmap(self._single)  # type: ignore[return-value]

    @torch.no_grad()
    def renew(self, points: Tensor) -> bool:
        """Record anew if the function itself is no longer what was recorded of it, as where a model's numbers change.

        Args:
            points: Where they are compared, `(num_points, dim)`, some of the first.

        Returns:
            Whether they differ.
        """
        if self._graph is None or self._batch is None:
            return False
        full = self._filled(points[: self.size])
        plain: Gradients = torch.func.vmap(self._single, randomness="different")
        try:
            pairs = list(zip(plain(full), self._batch(full), strict=True))
        except LinAlgError:  # of one of the points, which says nothing of the others
            return False
        if all(map(_alike, *zip(*pairs, strict=True))):
            return False
        self._batch, self._graph, self.is_long = None, None, False
        self._num_renewals += 1
        if self._num_renewals > _MAX_RENEWALS:
            self._batch = plain
            warnings.warn(
                f"the model's log density has changed {self._num_renewals} times, and is not recorded again: it runs "
                "plain from here on, which is slower (a number that changes during a fit should be a tensor, changed "
                "in place)",
                stacklevel=2,
            )
        return True

    def _filled(self, points: Tensor) -> Tensor:
        """Repeat the last point until there are as many as a graph takes."""
        return torch.cat([points, points[-1:].expand(self.size - len(points), -1)])

    def _part(self, points: Tensor) -> tuple[Tensor, Tensor]:
        try:
            if points.shape[1] > _MANY_COORDINATES and len(points) < self.size // 4:
                return self.batch(len(points))(points)  # what would fill a graph costs more here than handlers do
            full = self._filled(points)  # a graph is of one size
            if self._batch is None and self.vectorized:
                self._batch = self._record(full)
            if self._batch is not None:
                gradients, values = self._batch(full)
                return gradients[: len(points)], values[: len(points)]
        except LinAlgError:  # of one point's matrix, which is not positive definite to rounding
            pass
        gradients, values = map(torch.stack, zip(*map(self._one, points), strict=True))
        return gradients, values

    def _one(self, point: Tensor) -> tuple[Tensor, Tensor]:
        try:
            gradient, value = self._single(point)
        except LinAlgError:
            return torch.full_like(point, math.nan), point.new_full((), math.nan)
        return gradient, value

    def _record(self, points: Tensor) -> Gradients | None:
        single = self._single
        batch: Gradients = torch.func.vmap(single, randomness="different")
        try:
            batch(points)
        except LinAlgError:
            raise
        except RuntimeError:  # control flow that depends on values, say
            self.vectorized = False
            return None
        try:
            graph = make_fx(batch)(points.clone())
            elsewhere = points + 0.1
            pairs = zip(batch(elsewhere), graph(elsewhere), strict=True)
            if not all(torch.allclose(one, other, rtol=1e-3, equal_nan=True) for one, other in pairs):
                return batch
        except (RuntimeError, TypeError):  # an operation or a value that cannot be recorded
            return batch
        made = [node.meta.get("val") for node in graph.graph.nodes if node.op == "call_function"]
        self.work = sum(value.numel() for value in made if isinstance(value, Tensor)) // len(points)
        self.is_long, self._graph = len(made) > _MANY_OPERATIONS, graph
        recorded: Gradients = scripted(graph, (points.clone(),)) if self.is_long else graph
        return recorded


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two results differ by no more than rounding, in units of the largest."""
    size = float(one.abs().nan_to_num(posinf=0.0).amax()) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=1e-3, atol=1e-5 * size, equal_nan=True)


@torch.library.custom_op("pyro_nf::gradients", mutates_args=())
def _gradients(points: Tensor, key: int) -> tuple[Tensor, Tensor]:
    return _long_densities[key].gradients(points)


@_gradients.register_fake
def _(points: Tensor, key: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(points), points.new_empty(len(points))


def scripted(graph: GraphModule, inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
    """Return a graph as TorchScript, which goes from operation to operation without Python: twice as fast."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # Deprecated in favour of the compiler, which takes minutes where this takes a second.
            warnings.simplefilter("ignore", DeprecationWarning)
            script: Callable[..., Any] = torch.jit.trace(graph, inputs, check_trace=False)
            script(*inputs)
    except (RuntimeError, TypeError):  # an operation or a value that TorchScript does not know
        return graph
    return script


class Together:
    """A batched function for several threads: their calls are answered as one batch, once all of them have asked.

    Args:
        function: `(num_points, dim) -> tensors`, with a row for each point.
        num_threads: How many will ask; each says `leave` when it will not ask again.
    """

    def __init__(self, function: Callable[[Tensor], tuple[Tensor, ...]], num_threads: int) -> None:
        self.function, self.num_threads = function, num_threads
        self._asked: dict[int, Tensor] = {}
        self._answers: dict[int, Any] = {}
        self._changed = threading.Condition()

    def __call__(self, thread: int, point: Tensor) -> tuple[Tensor, ...]:
        """Return the function's results at this thread's point."""
        with self._changed:
            self._asked[thread] = point
            self._answer()
            self._changed.wait_for(lambda: thread in self._answers)
            answer = self._answers.pop(thread)
        if isinstance(answer, Exception):
            raise answer
        return tuple(answer)

    def leave(self) -> None:
        """Let the others go on without this thread."""
        with self._changed:
            self.num_threads -= 1
            self._answer()

    def _answer(self) -> None:
        if not self._asked or len(self._asked) < self.num_threads:
            return
        try:
            rows: Any = zip(*self.function(torch.stack(list(self._asked.values()))), strict=True)
        except Exception as error:  # whatever it raises, each thread that waits for it raises
            rows = [error] * len(self._asked)
        self._answers.update(zip(self._asked, rows, strict=True))
        self._asked.clear()
        self._changed.notify_all()
