"""Functions recorded as graphs of tensor operations, and what is known while one is recorded."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from pyro_nf.compiler import trees

_READERS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}


class GraphError(Exception):
    """A function cannot be recorded, compiled, or trusted; the message says why."""


def record(function: Callable[..., Any], *inputs: Any) -> GraphModule:
    """Run a function once, and return the operations on its inputs.

    Raises:
        GraphError: If this torch cannot record; else whatever the function raises where its tensors have no values.
    """
    try:
        from torch.fx.experimental.proxy_tensor import make_fx

        return make_fx(function)(*inputs)  # type: ignore[no-any-return]
    except ImportError as error:
        raise GraphError(f"this torch cannot record graphs: {error}") from error


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
        if node.op == "placeholder" or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
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
        if node.op == "call_function" and torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
            arguments, names = trees.flatten((node.target, node.args, node.kwargs))
            key = str(names), *((type(value), value) for value in arguments)
            if first := known.get(key):
                node.replace_all_uses_with(first)
                graph.graph.erase_node(node)
            else:
                known[key] = node
