"""Graphs compiled by torch's inductor."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from pyro_nf.compiler.recording import GraphError


def compile_graph(graph: GraphModule, inputs: Sequence[Tensor], options: dict[str, Any]) -> Callable[..., Any]:
    """Compile a complete graph whose inputs keep their shapes.

    `torch.compile`, which would read it as Python and check at each call that nothing has changed, takes longer than a
    small step itself.

    Raises:
        GraphError: If this torch has no such compiler.
    """
    try:
        from torch._guards import TracingContext, tracing
        from torch._inductor import compile as inductor_compile
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv
    except ImportError as error:
        raise GraphError(f"this torch has no compiler: {error}") from error
    for node in graph.graph.nodes:
        node.meta.clear()  # stand-ins of the recorded tensors, which the compiler would mix with its own
    # What the compiler keeps on disk for the next process, it looks up by the shapes in such a context.
    context = TracingContext(FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True))
    with tracing(context):
        compiled: Callable[..., Any] = inductor_compile(graph, list(inputs), options)
    return compiled
