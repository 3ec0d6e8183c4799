"""A log density and its gradient at many points at once, without the cost of Python for each of them."""

import threading
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from pyro_nf.compiler.recording import GraphError, one_output, record
from pyro_nf.compiler.scripts import scripted
from pyro_nf.programs.coordinates import LogDensity
from pyro_nf.programs.noise import running

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
Ask = Callable[[Tensor], tuple[Tensor, ...]]
_T = TypeVar("_T")
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
        self.log_density = _never_raising(log_density)
        self.vectorized, self.work, self.is_long = True, 0, False
        self.size = max(_MIN_POINTS, min(_MAX_POINTS, _CACHED_NUMBERS // max(num_numbers, 1)))
        self._num_values = max(self.size, min(_MAX_VALUES, _HELD_NUMBERS // max(num_numbers, 1)))
        self._single = _single(self.log_density)
        self._batch: Gradients | None = None
        self._graph: GraphModule | None = None
        self._value_graph: GraphModule | None = None
        self._num_renewals = 0

    @torch.no_grad()
    def values(self, points: Tensor) -> Tensor:
        """Return the log density at `(num_points, dim)`, `(num_points,)`."""
        # Whether points can be batched is known once gradients have been asked for.
        if len(points) <= self.size or self._batch is None:
            return self.gradients(points)[1]
        if self._value_graph is not None:
            return torch.cat([self._value_graph(self._filled(part))[: len(part)] for part in points.split(self.size)])
        value = torch.func.vmap(self.log_density, randomness="different")
        return torch.cat([value(part) for part in points.split(self._num_values)])

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
        return self._graph if same_size else torch.func.vmap(self._single, randomness="different")  # type: ignore[return-value]

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
        pairs = list(zip(plain(full), self._batch(full), strict=True))
        if all(map(_alike, *zip(*pairs, strict=True))):
            return False
        self._batch, self._graph, self._value_graph, self.is_long = None, None, None, False
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
        if points.shape[1] > _MANY_COORDINATES and len(points) < self.size // 4 and self.vectorized:
            return self.batch(len(points))(points)  # what would fill a graph costs more here than handlers do
        full = self._filled(points)  # a graph is of one size
        if self._batch is None and self.vectorized:
            self._batch = self._record(full)
        if self._batch is not None:
            gradients, values = self._batch(full)
            return gradients[: len(points)], values[: len(points)]
        gradients, values = map(torch.stack, zip(*map(self._single, points), strict=True))
        return gradients, values

    def _record(self, points: Tensor) -> Gradients | None:
        single = self._single
        batch: Gradients = torch.func.vmap(single, randomness="different")
        try:
            batch(points)
        except RuntimeError:  # control flow that depends on values, say
            self.vectorized = False
            return None
        try:
            graph = record(batch, points.clone())
            elsewhere = points + 0.1
            pairs = zip(batch(elsewhere), graph(elsewhere), strict=True)
            if not all(torch.allclose(one, other, rtol=1e-3, equal_nan=True) for one, other in pairs):
                return batch
        except (GraphError, RuntimeError, TypeError):  # an operation or a value that cannot be recorded
            return batch
        made = [node.meta.get("val") for node in graph.graph.nodes if node.op == "call_function"]
        self.work = sum(value.numel() for value in made if isinstance(value, Tensor)) // len(points)
        self.is_long, self._graph = len(made) > _MANY_OPERATIONS, graph
        self._value_graph = one_output(graph, 1)
        recorded: Gradients = scripted(graph, (points.clone(),)) if self.is_long else graph
        return recorded


def _single(log_density: LogDensity) -> Gradients:
    """Return the gradient and the value at a point, the gradient NaN where the value is not finite."""
    both = torch.func.grad_and_value(log_density)

    def run(point: Tensor) -> tuple[Tensor, Tensor]:
        gradient, value = both(point)
        return gradient + 0.0 * value, value

    return run


def _never_raising(log_density: LogDensity) -> LogDensity:
    def run(point: Tensor) -> Tensor:
        with running():
            return log_density(point)

    return run


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


class BatchedEvaluator:
    """A batched function for several threads: what they ask is answered as one batch, once all of them have asked.

    The function runs in the thread that calls `run`, so that it finds there what it would find without threads, and
    whatever it raises, Ctrl-C too, is raised there. The first exception, in any of the threads, ends them all.

    Args:
        function: `(num_points, dim) -> tensors`, with a row for each point.
    """

    def __init__(self, function: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        self.function = function
        self._asked: dict[int, Tensor] = {}
        self._answers: dict[int, tuple[Tensor, ...]] = {}
        self._num_running = 0
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def run(self, job: Callable[[int, Ask], _T], num_threads: int) -> list[_T]:
        """Return `job(number, ask)` of each thread, where `ask(point)` are the function's results at a point.

        Raises:
            BaseException: What the function or a job has raised first.
        """
        self._num_running = num_threads
        with ThreadPoolExecutor(num_threads) as pool:
            try:
                futures = [pool.submit(self._work, job, number) for number in range(num_threads)]
                self._serve()
            except BaseException as error:  # the pool waits for its threads, which wait for answers
                self._end(error)
        if self._error is not None:
            raise self._error
        return [future.result() for future in futures]

    def _work(self, job: Callable[[int, Ask], _T], number: int) -> _T:
        try:
            return job(number, lambda point: self._ask(number, point))
        except BaseException as error:
            self._end(error)
            raise
        finally:
            with self._changed:
                self._num_running -= 1
                self._changed.notify_all()

    def _ask(self, number: int, point: Tensor) -> tuple[Tensor, ...]:
        with self._changed:
            self._asked[number] = point
            self._changed.notify_all()
            self._changed.wait_for(lambda: number in self._answers or self._error is not None)
            if self._error is not None:
                raise RuntimeError("another thread ended the run") from self._error
            return self._answers.pop(number)

    def _serve(self) -> None:
        """Answer until no thread is left."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._error is not None or len(self._asked) == self._num_running)
                if self._error is not None or not self._num_running:
                    return
                numbers = sorted(self._asked)  # who asked first is chance, and rounding may depend on the order
                points = torch.stack([self._asked.pop(number) for number in numbers])
            rows = list(zip(*self.function(points), strict=True))
            with self._changed:
                self._answers.update(zip(numbers, rows, strict=True))
                self._changed.notify_all()

    def _end(self, error: BaseException) -> None:
        with self._changed:
            self._error = error if self._error is None else self._error
            self._changed.notify_all()
