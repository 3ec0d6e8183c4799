"""Functions recorded as graphs of tensor operations, and what is known while one is recorded."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from pyro_nf.compiler import trees

# Calls of a function before it is recorded, which takes as long as a few.
_PLAIN_CALLS = 5
_READERS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}


class GraphError(Exception):
    """A function cannot be recorded, compiled, or trusted; the message says why."""


def record(function: Callable[..., Any], *inputs: Any) -> GraphModule:
    """Run a function once, and return the operations on its inputs.

    Raises:
        GraphError: If this torch cannot record; else whatever the function raises where its tensors have no values.
    """
    try:
        from torch._guards import TracingContext, tracing
        from torch._subclasses import FakeTensorMode
        from torch.fx.experimental.proxy_tensor import make_fx

        # One mode for the shapes that nodes remember: without it each node makes its own, half of all the time.
        with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
            graph: GraphModule = make_fx(function)(*inputs)
    except ImportError as error:
        raise GraphError(f"this torch cannot record graphs: {error}") from error
    graph.graph.eliminate_dead_code(_has_effects)
    graph.recompile()
    return graph


def _has_effects(node: Node) -> bool:
    """Whether a node does more than to compute what other nodes use: it draws numbers, or writes into a tensor."""
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    schema = getattr(node.target, "_schema", None)
    return schema is None or schema.is_mutable or _draws(node)


def _draws(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


@contextmanager
def unrecorded() -> Iterator[None]:
    """Compute at once what is computed here, even while a graph is recorded."""
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    with disable_proxy_modes_tracing():
        yield


def is_constant(x: Tensor, is_known: Callable[[Tensor, Node], bool]) -> bool:
    """Whether a tensor follows from none of a recording's inputs, nor from what may change until it is used.

    Args:
        x: The tensor.
        is_known: Whether a tensor that is held, and read by a node, keeps its values until then.
    """
    try:
        from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
    except ImportError:
        return False
    mode: Any = get_proxy_mode()
    slot: Any = None if mode is None else get_proxy_slot(x, mode.tracer, None)
    if slot is None:
        return False
    pending, seen = [slot.proxy.node], set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder" or _draws(node):
            return False
        if node.op == "get_attr" and not is_known(getattr(mode.tracer.root, str(node.target)), node):
            return False
        pending += node.all_input_nodes
    return True


def without_reading(inputs: Sequence[Tensor], data: Sequence[Tensor]) -> "tuple[Any, Any]":
    """Return two modes under which a step is recorded, one inside the other.

    While a graph is recorded, what follows from whole numbers that are not inputs is computed at once. Then their
    values may be looked at: a model may index a list with the entries of a permutation, or count the groups that it
    finds in its data. Other tensors, such as buffers, may change from step to step, and are recorded. What reads the
    values of data that are inputs, unseen by the recording, is refused.

    Args:
        inputs: What the graph's inputs are.
        data: Those of them that are data: other ones may come with other steps.
    """
    constants = _integer_constants()(inputs, data)
    return constants, _reading()(constants)


@cache
def _integer_constants() -> Any:
    from torch.utils._python_dispatch import TorchDispatchMode

    class IntegerConstants(TorchDispatchMode):
        def __init__(self, inputs: Sequence[Tensor], data: Sequence[Tensor] = ()) -> None:
            super().__init__()
            self._of_data = {id(tensor) for tensor in data}
            self._variable = list(inputs)  # kept alive, so that no other tensor gets the same id
            self._ids = {id(tensor) for tensor in inputs}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            tensors = [value for value in trees.leaves_of((args, kwargs)) if isinstance(value, Tensor)]
            constant = all(not t.is_floating_point() and id(t) not in self._ids for t in tensors) and tensors
            if constant and not func._schema.is_mutable and torch.Tag.nondeterministic_seeded not in func.tags:
                with unrecorded():
                    return func(*args, **kwargs)
            of_data = self.is_of_data(tensors)
            if of_data and _has_shape_of_values(func, args):
                raise GraphError("shapes depend on the values of data, which are others in other minibatches")
            results = func(*args, **kwargs)
            for result in trees.leaves_of(results):
                if isinstance(result, Tensor):
                    self._variable.append(result)
                    self._ids.add(id(result))
                    if of_data:
                        self._of_data.add(id(result))
            return results

        def is_of_data(self, tensors: Sequence[Tensor]) -> bool:
            """Whether one of these tensors was computed from data that are inputs."""
            return any(id(tensor) in self._of_data for tensor in tensors)

    return IntegerConstants


@cache
def _reading() -> Any:
    from torch.overrides import TorchFunctionMode

    class WithoutReading(TorchFunctionMode):
        def __init__(self, constants: Any) -> None:
            super().__init__()
            self._constants = constants

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in _READERS and self._constants.is_of_data(args[:1]):
                raise GraphError(f"Tensor.{func.__name__}() reads data, which are others in other minibatches")
            return func(*args, **(kwargs or {}))

    return WithoutReading


def _has_shape_of_values(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the shape of an operation's result depends on values; that of an index, on those of masks alone."""
    if func is torch.ops.aten.index.Tensor:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.dynamic_output_shape in func.tags


def one_output(graph: GraphModule, number: int) -> GraphModule:
    """Return the graph of one of a graph's outputs, which computes no other, of the same flat inputs."""
    nodes = Graph()
    nodes.output(nodes.graph_copy(graph.graph, {})[number])  # type: ignore[index]
    nodes.eliminate_dead_code(_has_effects)
    return GraphModule(graph, nodes)


class Repeated:
    """A function of a tensor that is called many times: the first calls are plain, later ones of their shape recorded.

    The recorded graph is compared with the function once; where they differ, or it cannot be recorded, and for inputs
    of other shapes, the function stays plain.

    Args:
        function: `tensor -> {name: tensor}`, the same each time but for what it draws.
        recordable: The same for a recording, where `function` would make up for an error; by default `function`.
    """

    def __init__(
        self,
        function: Callable[[Tensor], dict[str, Tensor]],
        recordable: Callable[[Tensor], dict[str, Tensor]] | None = None,
    ) -> None:
        self._function, self._recordable = function, recordable or function
        self._num_calls = 0
        self._shape: torch.Size | None = None
        self._graph: GraphModule | None = None

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """Return the function's results."""
        self._num_calls += 1
        if self._graph is not None and x.shape == self._shape:
            return self._graph(x)  # type: ignore[no-any-return]
        result = self._function(x)
        if self._num_calls == _PLAIN_CALLS:
            self._graph, self._shape = self._recorded(x), x.shape
        return result

    @torch.random.fork_rng()
    def _recorded(self, x: Tensor) -> GraphModule | None:
        try:
            graph = record(self._recordable, x)
            results = []
            for run in (self._recordable, graph):
                torch.manual_seed(0)
                results.append(run(x))
        except (GraphError, RuntimeError, TypeError, ValueError):  # what cannot be recorded
            return None
        plain, found = results
        same = all(torch.allclose(found[name], plain[name], rtol=1e-3, equal_nan=True) for name in plain)
        return graph if same else None


def lift(graph: GraphModule, params: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Make what a graph reads an input: parameters from the first, where they stand side by side, others one by one.

    Returns:
        The other tensors, inputs behind those that the graph has.
    """
    nodes = graph.graph
    flat, *_, last_input = (node for node in nodes.nodes if node.op == "placeholder")
    places: dict[int, Node] = {}
    held: list[Tensor] = []
    read = [(node, getattr(graph, str(node.target))) for node in nodes.nodes if node.op == "get_attr"]
    known = {id(param) for param in params}
    for _, tensor in read:
        if id(tensor) not in known:
            known.add(id(tensor))
            with nodes.inserting_after(last_input):
                last_input = places[id(tensor)] = nodes.placeholder(f"held_{len(held)}")
            held.append(tensor)
    end = 0
    for param in params:
        start, end = end, end + param.numel()
        with nodes.inserting_after(last_input):
            part = nodes.call_function(torch.ops.aten.slice.Tensor, (flat, 0, start, end))
        with nodes.inserting_after(part):
            places[id(param)] = nodes.call_function(torch.ops.aten.view.default, (part, list(param.shape)))
    for node, tensor in read:
        node.replace_all_uses_with(places[id(tensor)])
        nodes.erase_node(node)
    graph.recompile()
    return tuple(held)


def merge(graph: GraphModule) -> None:
    """Do once what a graph without mutations does twice, as the model and the guide gather the rows of a minibatch."""
    known: dict[Any, Node] = {}
    for node in graph.graph.nodes:
        if node.op == "call_function" and not _draws(node):
            arguments, names = trees.flatten((node.target, node.args, node.kwargs))
            key = str(names), *((type(value), value) for value in arguments)
            if first := known.get(key):
                node.replace_all_uses_with(first)
                graph.graph.erase_node(node)
            else:
                known[key] = node
