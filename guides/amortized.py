"""AmortizedFlow: a guide for local latents, whose posterior an encoder reads off the data."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import biject_to

from pyro_nf.distributions import FlowDistribution, ScoredDraw
from pyro_nf.flows import ElementwiseAffine, Sequential
from pyro_nf.guides.bases import NormalBase
from pyro_nf.guides.flow_guide import FlowGuide, FlowLike, build_flow, check_flow_like, check_latents
from pyro_nf.tracing import signature


class AmortizedFlow(FlowGuide):
    r"""Guide for the local latents of one plate, `q(z_n | x_n) = affine(flow(base; c_n); c_n)`, `c_n = encoder(x_n)`.

    The base is a standard normal over the latents of one datum (all local sites side by side, on the real line), the
    affine layer gives each coordinate a location and a scale linear in the context, and starts as the identity, like
    the flow. The plate may be subsampled, and the minibatch may have any size, changing from call to call.

    Global latents need a guide of their own, next to this one in an `AutoGuideList`.

    Args:
        model: A Pyro model whose latents stand in one plate.
        encoder: Maps the model's positional arguments to the contexts, `(batch, width)`. A tensor whose first
            dimension is the plate's full size is given to it restricted to the subsample.
        flow: A name (`pyro_nf.flows.stacks.names()`), a `Flow` over the coordinates of one datum with `context_dim`
            the encoder's width, or a picklable factory `(dim, context_dim=width) -> Flow`.

    Raises:
        ValueError: On the first call, if the model has no continuous latents or discrete ones, if they do not stand
            in one plate, or if the encoder's width is not the flow's `context_dim`.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_nf.guides import AmortizedFlow
        >>> def model(x):
        ...     with pyro.plate("data", len(x), subsample_size=10) as batch:
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[batch])
        >>> guide = AmortizedFlow(model, torch.nn.Linear(2, 8))
        >>> guide(torch.zeros(100, 2))["z"].shape
        torch.Size([10, 2])
    """

    def __init__(self, model: Callable[..., Any], encoder: nn.Module, flow: FlowLike = "realnvp") -> None:
        check_flow_like(flow)
        super().__init__(model)
        self.encoder = encoder
        self._make_flow = partial(build_flow, flow)
        # What the model looked like for arguments of each shape: the minibatch may have another size at each call.
        self._prototypes: dict[Any, tuple[Any, Any]] = {}

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every local latent, in the model's plate."""
        self._ensure_prototype(*args, **kwargs)
        plate = self._create_plates(*args, **kwargs)[self._plate.name]
        with plate as indices:
            posterior = self.get_posterior(*_restrict(args, plate, indices))
            if posterior.batch_shape[0] != plate.subsample_size:
                raise ValueError(
                    f"encoder must return one context for each of the {plate.subsample_size} elements of plate "
                    f"{plate.name!r}; got {posterior.batch_shape[0]}"
                )
            latent = pyro.sample(f"_{self._pyro_name}_latent", ScoredDraw(posterior), infer={"is_auxiliary": True})
            return {
                site["name"]: pyro.sample(
                    site["name"], dist.Delta(value, log_density=-log_det, event_dim=site["fn"].event_dim)
                )
                for site, value, log_det in self._constrained(latent)
            }

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowDistribution:
        """Return the posteriors of all the data in `args`, one batch entry a datum."""
        context = self._encode(args)
        return FlowDistribution(self.base(), self.flow, context)

    def _ensure_prototype(self, *args: Any, **kwargs: Any) -> None:
        key = signature(args, kwargs)
        if key not in self._prototypes:
            self._setup_prototype(*args, **kwargs)
            self._prototypes[key] = (self.prototype_trace, self._prototype_frames)
        self.prototype_trace, self._prototype_frames = self._prototypes[key]

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        check_latents(self.model, args, kwargs, "AmortizedFlow", local=True)
        super()._setup_prototype(*args, **kwargs)
        sites = list(self.prototype_trace.iter_stochastic_nodes())
        (self._plate,) = sites[0][1]["cond_indep_stack"]
        self._event_shapes = []
        for _, site in sites:
            unconstrained = biject_to(site["fn"].support).inv(site["value"])
            self._event_shapes.append(unconstrained.shape[len(site["fn"].batch_shape) :])
        if not hasattr(self, "flow"):
            self._build(args, unconstrained)

    def _build(self, args: tuple[Any, ...], like: Tensor) -> None:
        with torch.no_grad():
            width = self._encode(args).shape[-1]
        dim = sum(shape.numel() for shape in self._event_shapes)
        inner = self._make_flow(dim, context_dim=width)
        if inner.context_dim not in (0, width):
            raise ValueError(
                f"encoder must return contexts of the flow's width context_dim={inner.context_dim}; got width {width}"
            )
        self.flow = Sequential(inner, ElementwiseAffine(dim, width)).to(like)
        self.base = NormalBase(dim).to(like)

    def _encode(self, args: tuple[Any, ...]) -> Tensor:
        context = self.encoder(*args)
        if not isinstance(context, Tensor) or context.dim() != 2:
            got = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
            raise ValueError(f"encoder must return a tensor of shape (batch, width); got {got}")
        # The plate's dimension counts from the right: put the batch there.
        return context.reshape(len(context), *(1,) * (-self._plate.dim - 1), -1)

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[dict[str, Any], Tensor]]:
        parts = latent.split([shape.numel() for shape in self._event_shapes], -1)
        sites = self.prototype_trace.iter_stochastic_nodes()
        for (_, site), part, shape in zip(sites, parts, self._event_shapes, strict=True):
            yield site, part.reshape(*part.shape[:-1], *shape)

    def _pack_latent(self, parts: list[Tensor]) -> Tensor:
        flat = [
            part.reshape(*part.shape[: part.dim() - len(shape)], shape.numel())
            for part, shape in zip(parts, self._event_shapes, strict=True)
        ]
        return torch.cat(flat, -1)


def _restrict(args: tuple[Any, ...], plate: pyro.plate, indices: Tensor) -> tuple[Any, ...]:
    """Cut the tensors that hold a row for each element of a subsampled plate down to the subsample."""
    if plate.subsample_size == plate.size:
        return args
    return tuple(
        arg[indices] if isinstance(arg, Tensor) and arg.dim() > 0 and len(arg) == plate.size else arg for arg in args
    )
