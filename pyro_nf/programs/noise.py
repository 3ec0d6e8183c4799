"""What is random in a run of a model and a guide: normals and minibatches that are drawn first, and handed to it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_nf.programs._pyro import is_subsample
from pyro_nf.programs.batching import Batchable, batchable

_IN_PLACE_DRAWS = {
    getattr(Tensor, name) for name in ("bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "uniform_")
}
_NORMAL_DRAWS = {Tensor.normal_, torch.randn, torch.randn_like}


@contextmanager
def running(fixed: bool = False) -> Iterator[None]:
    """Hold wherever a model or a guide runs: a `Batchable`, and no checks of values, which cannot be batched.

    Args:
        fixed: As of `Batchable`.
    """
    # 0 is as good as False for Pyro, and tells a user's own `validate_args=False` from it.
    with pyro.validation_enabled(0), batchable(fixed):
        yield


class CountedNoise(Batchable):
    """Count the normals that are drawn.

    Attributes:
        size: How many.
        like: An empty tensor of the first ones' dtype and device, `None` before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.size = 0
        self.like: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func`, and count if it draws."""
        result = super().__torch_function__(func, types, args, kwargs)
        if func in _NORMAL_DRAWS:
            self.size += result.numel()
            self.like = result.new_empty(0) if self.like is None else self.like
        return result


class SubstituteNormals(Batchable):
    """Let what draws normals take these, and let other draws differ between the particles of a `vmap`.

    Args:
        noise: Standard normals, as many as will be drawn, `(noise_dim,)`.
        zero: The particle's zero, a scalar that `vmap` batches.
    """

    def __init__(self, noise: Tensor, zero: Tensor) -> None:
        super().__init__()
        self.noise, self.zero = noise, zero
        self.used = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func`, or what replaces it where it draws."""
        kwargs = kwargs or {}
        if func in _NORMAL_DRAWS:
            return self._normal(func, args, kwargs)
        if func in _IN_PLACE_DRAWS:
            # `vmap` refuses to fill a tensor that is not batched with noise that is: here it is made batched first.
            args = (torch.zeros_like(args[0]) + self.zero.to(args[0].dtype), *args[1:])
        elif func is torch.binomial and args:
            # Its count, too: `vmap` makes an output of the count's shape.
            args = (args[0] + self.zero.to(args[0].dtype), *args[1:])
        return super().__torch_function__(func, types, args, kwargs)

    def _normal(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        mean, std = 0.0, 1.0
        if func is torch.randn:
            kwargs.pop("generator", None)
            template = torch.empty(*args, **kwargs)
        elif func is torch.randn_like:
            template = torch.empty_like(*args, **kwargs)
        else:
            mean, std = _mean_and_std(*args[1:], **kwargs)
            # Who goes on to read the tensor, and not what `normal_` returned, shall not read what lay in memory.
            template = args[0].fill_(math.nan)
        size = template.numel()
        if self.used + size > len(self.noise):
            raise ValueError(
                f"the guide drew {self.used + size} normals where its first run took {len(self.noise)}: "
                "the number of its draws must not depend on values"
            )
        values = self.noise[self.used : self.used + size].view(template.shape).to(template)
        self.used += size
        return values if (mean, std) == (0.0, 1.0) else mean + std * values


class SharedSubsamples(Messenger):
    """Give subsampled plates these indices, the same for every particle.

    Args:
        indices: `{plate name: indices}`.
    """

    def __init__(self, indices: dict[str, Tensor]) -> None:
        super().__init__()
        self.indices = indices

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.indices and is_subsample(msg):
            msg["value"] = self.indices[msg["name"]].to(msg["fn"].device)
            msg["done"] = True


def minibatches(size: int, part: int, num_steps: int, device: torch.device) -> Tensor:
    """Indices of random parts of a whole, distinct within each permutation, `(num_steps, part)`."""
    steps_each = min(size // part, num_steps)
    # Copied by `cat`: what is kept is the parts, not the whole permutations.
    whole = [torch.randperm(size, device=device)[: steps_each * part] for _ in range(-(-num_steps // steps_each))]
    return torch.cat(whole)[: num_steps * part].view(num_steps, part)


def _mean_and_std(
    mean: float = 0.0, std: float = 1.0, *, generator: torch.Generator | None = None
) -> tuple[float, float]:
    """Read the arguments of `Tensor.normal_`."""
    return mean, std
