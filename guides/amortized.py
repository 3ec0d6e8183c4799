"""AmortizedFlow: a guide for local latents, whose posterior an encoder reads off the data."""

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_nf.distributions import FlowDistribution, ScoredDraw
from pyro_nf.distributions.bases import NormalBase
from pyro_nf.flows import ElementwiseAffine, Flow, Sequential
from pyro_nf.guides.building import FlowLike, build_flow, check_flow_like
from pyro_nf.guides.flow_guide import FlowGuide
from pyro_nf.guides.latents import check_latents, has_rows
from pyro_nf.interface.arguments import check_choice
from pyro_nf.programs.calls import signature
from pyro_nf.programs.supports import bijection

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class AnySizeGuide(FlowGuide):
    """A guide that looks at its model once for arguments of each shape: the minibatch may differ from call to call."""

    def __init__(self, model: Callable[..., Any], create_plates: Callable[..., Any] | None = None) -> None:
        if create_plates is not None and not callable(create_plates):
            raise ValueError(
                "create_plates must be a function of the model's arguments that returns plates, or None; got "
                f"{create_plates!r}"
            )
        super().__init__(model, create_plates=create_plates)
        self._prototypes: dict[Any, tuple[Any, Any]] = {}

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        key = signature(args, kwargs)
        if key not in self._prototypes:
            if self.prototype_trace is not None and self._model is None:
                raise ValueError(
                    f"args hold data of a new shape, and this {type(self).__name__} is a copy without its model, which "
                    "pickle and deepcopy leave behind: make a guide of the model, and load this one's state_dict"
                )
            if self.prototype_trace is not None and not self._is_part:
                self.look_again(*args, **kwargs)
            if self.prototype_trace is None:
                self._set_up(args, kwargs)
            else:
                self._setup_prototype(*args, **kwargs)
            self._prototypes[key] = (self.prototype_trace, self._prototype_frames)
        self.prototype_trace, self._prototype_frames = self._prototypes[key]

    def _forget(self) -> None:
        super()._forget()
        self._prototypes = {}


class AmortizedFlow(AnySizeGuide):
    r"""Guide for the local latents of one plate, `q(z_n | x_n) = affine(flow(base; c_n); c_n)`, `c_n = encoder(x_n)`.

    The base is a standard normal over the latents of one datum (all local sites side by side, on the real line), the
    affine layer gives each coordinate a location and a scale linear in the context, and starts as the identity, like
    the flow. The plate may be subsampled, and the minibatch may have any size, changing from call to call.

    `affine="first"` is `flow(affine(base; c_n); c_n)`, the order of the literature on variational autoencoders. Flows
    that only rotate, such as `"householder"`, need it: a standard normal they leave as it is.

    Global latents next to the local ones: `StructuredFlow`.

    Args:
        model: A Pyro model whose latents stand in one plate.
        encoder: A module that maps the model's positional arguments, and the keyword arguments that its `forward`
            names, to the contexts, `(batch, width)`. A tensor whose first dimension is the plate's full size is given
            to it restricted to the subsample.
        flow: A name (`pyro_nf.flows.stacks.names()`), a `Flow` over the coordinates of one datum with `context_dim`
            the encoder's width, or a picklable factory `(dim, context_dim=width) -> Flow`. `None` for the affine layer
            alone, the mean-field normal.
        affine: Whether the affine layer comes after the flow, "last", or before it, "first".
        create_plates: Makes the plate from the model's arguments, where the model gets its indices from them, as in
            `lambda x, rows: pyro.plate("data", len(x), subsample=rows)`.

    Raises:
        ValueError: If the encoder is no module, or `affine` neither order; on the first call, if the model has no
            continuous latents or discrete ones, if they do not stand in one plate, if its indices are arguments and
            there is no `create_plates`, or if the encoder's width is not the flow's `context_dim`; if the encoder
            returns no context for a datum.

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

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: nn.Module,
        flow: FlowLike | None = "realnvp",
        *,
        affine: Literal["last", "first"] = "last",
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        check_encoder(encoder)
        check_choice("affine", affine, ("last", "first"))
        if flow is not None:
            check_flow_like(flow)
        super().__init__(model, create_plates)
        self.encoder = encoder
        self._affine_is_first = affine == "first"
        self._make_flow = None if flow is None else partial(build_flow, flow)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every local latent, in the model's plate."""
        self._ensure_prototype(*args, **kwargs)
        plate = self._create_plates(*args, **kwargs)[self._plate.name]
        with plate as indices:
            args, kwargs = self._restrict(args, kwargs, plate, indices)
            posterior = self.get_posterior(*args, **kwargs)
            rows = posterior.batch_shape[self._plate.dim]
            if rows != plate.subsample_size:
                raise ValueError(
                    f"encoder must return one context for each of the {plate.subsample_size} elements of plate "
                    f"{plate.name!r} (size {plate.size}); got {rows}. Tensors of {plate.size} rows are cut to the "
                    "subsample for it; data that are cut already must have as many rows as the plate's subsample_size"
                )
            latent = pyro.sample(f"_{self._pyro_name}_latent", ScoredDraw(posterior), infer={"is_auxiliary": True})
            return {
                site["name"]: self._sample_site(site, value, log_det)
                for site, value, log_det in self._constrained(latent)
            }

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowDistribution:
        """Return the posteriors of all the data in the arguments, one batch entry a datum."""
        return FlowDistribution(self.base(), self.flow, self._context(args, kwargs))

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        trace = check_latents(self.model, args, kwargs, "AmortizedFlow", self._latents, local=True)
        super()._setup_prototype(*args, **kwargs)
        sites = list(self.prototype_trace.iter_stochastic_nodes())
        (self._plate,) = sites[0][1]["cond_indep_stack"]
        self._event_shapes = []
        for _, site in sites:
            unconstrained = bijection(site).inv(site["value"])
            self._event_shapes.append(unconstrained.shape[len(site["fn"].batch_shape) :])
        if not self._plates_are_given:
            check_indices(trace, {self._plate.name})
        if "flow" not in self._modules:
            self._take(**{name: part.to(unconstrained) for name, part in self._build(args, kwargs).items()})

    def _may_change(self, plate: str) -> bool:
        return True

    def _build(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, nn.Module]:
        # A few rows will do, in whatever order: the data may be large.
        few = torch.arange(self._plate.size)
        args, kwargs = cut(args, kwargs, self._plate.full_size or self._plate.size, few)
        try:
            with torch.no_grad():
                # Not by self.encoder, which Pyro would put into its store, before the guide has its name there.
                width = self._encode(self._modules["encoder"], args, kwargs).shape[-1]
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"encoder fails on the model's arguments: {str(error).splitlines()[0]}") from error
        dim = sum(shape.numel() for shape in self._event_shapes)
        layers: list[Flow] = [ElementwiseAffine(dim, width)]
        if self._make_flow is not None:
            inner = self._make_flow(dim, context_dim=width)
            _check_width(inner.context_dim or width, width)
            layers.insert(len(layers) if self._affine_is_first else 0, inner)
        return {"flow": Sequential(*layers), "base": NormalBase(dim)}

    def _context(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return self._encode(self.encoder, args, kwargs)

    def _encode(self, encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        named = inspect.signature(encoder.forward).parameters
        context = encoder(*args, **{name: value for name, value in kwargs.items() if name in named})
        if not isinstance(context, Tensor) or context.dim() != 2:
            got = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
            raise ValueError(f"encoder must return a tensor of shape (batch, width); got {got}")
        if "flow" in self._modules:
            _check_width(self.flow.context_dim, context.shape[-1])
        # The plate's dimension counts from the right: put the batch there.
        return context.reshape(len(context), *(1,) * (-self._plate.dim - 1), -1)

    def _restrict(self, args: tuple[Any, ...], kwargs: dict[str, Any], plate: pyro.plate, indices: Tensor) -> Arguments:
        """Cut the data down to a subsample."""
        if plate.subsample_size == plate.size and not self._plates_are_given:
            return args, kwargs
        return cut(args, kwargs, plate.size, indices)

    @property
    def _plates_are_given(self) -> bool:
        return (self if self.master is None else self.master()).create_plates is not None

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


def check_encoder(encoder: Any) -> None:
    """Raise a `ValueError` unless this is a module, whose parameters are trained along."""
    if not isinstance(encoder, nn.Module):
        raise ValueError(f"encoder must be a torch.nn.Module; got {type(encoder).__name__}")


def check_indices(trace: poutine.Trace, plates: set[str]) -> None:
    """Raise a `ValueError` if one of these plates has indices that the model was given: a guide cannot know them."""
    for name in plates & set(trace.nodes):
        fn, indices = trace.nodes[name]["fn"], trace.nodes[name]["value"]
        if fn.subsample_size is None and len(indices) < fn.size:
            raise ValueError(
                f"plate {name!r} is subsampled by indices that the model is given, and the guide has to know them: "
                f"pass create_plates, which makes the plate from the model's arguments, such as lambda x, rows: "
                f"pyro.plate({name!r}, {fn.size}, subsample=rows)"
            )


def cut(args: tuple[Any, ...], kwargs: dict[str, Any], size: int, indices: Tensor) -> Arguments:
    """Cut the tensors that hold a row for each of the `size` elements of a plate down to those with these indices."""

    def part(value: Any) -> Any:
        return value[indices] if has_rows(value, size) else value

    return tuple(map(part, args)), {name: part(value) for name, value in kwargs.items()}


def _check_width(wanted: int, got: int) -> None:
    if got != wanted:
        raise ValueError(f"encoder must return contexts of the flow's width context_dim={wanted}; got width {got}")
