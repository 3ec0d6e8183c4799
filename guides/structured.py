"""StructuredFlow: a guide for models with global and local latents."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList
from torch import Tensor, nn

from pyro_nf.distributions import FlowDistribution
from pyro_nf.guides.amortized import AmortizedFlow, AnySizeGuide, Arguments, check_encoder, check_indices
from pyro_nf.guides.auto_flow import AutoFlow
from pyro_nf.guides.building import FlowLike
from pyro_nf.guides.latents import trace_latents
from pyro_nf.networks import start_at_zero


class StructuredFlow(AnySizeGuide, AutoGuideList):  # type: ignore[misc]
    r"""Guide for global and local latents, `q(theta) prod_n q(z_n | x_n, theta)`.

    `q(theta)` is an `AutoFlow` over the latents outside the plates that have an encoder. Each such plate has an
    `AmortizedFlow`, whose context depends on the globals too: with u the base point of the globals' flow, standard
    normal at every moment of a fit, and N the plate's size,

        c_n = e_n + J(e_n) u / sqrt(N),    e_n = encoder(x_n),    J(e) a matrix linear in e that starts at zero.

    So the locals follow the globals, as they do in the posterior: with locals that do not, `q(theta)` would be as
    narrow as the posterior of theta *given* the locals. The context is of first order in u, which is exact where the
    posterior is normal, as it is nearly where many rows determine the globals. To score a draw takes the inverse of the
    globals' flow: cheap for couplings, `dim` passes for an autoregressive flow.

    The guide is a list (Pyro's `AutoGuideList`): `guide[0]` is the `AutoFlow` over the globals alone, whose
    `sample_posterior`, `median` and `quantiles` need no data; then the guides of the plates, in `encoders`' order.
    `sample_posterior`, `log_prob`, `median` and `quantiles` of the whole guide are for all the data in the arguments.

    Args:
        model: A Pyro model. Given to minibatches, it states the size of the whole data itself
            (`pyro.plate(name, size, len(x))`), or the globals would be those of the minibatch.
        encoders: `{plate: encoder}`; as `AmortizedFlow` takes them.
        flow: The globals' flow, as `AutoFlow` takes it.
        local_flow: The locals' flow, as `AmortizedFlow` takes it.
        create_plates: Makes the plates from the model's arguments, where the model gets their indices from them.
        **options: Further options of `AutoFlow`.

    Raises:
        ValueError: If an encoder is no module; on the first call, if an encoder's plate holds no latents, or if the
            globals or a plate's latents are not of the kind that `AutoFlow` and `AmortizedFlow` take.

    References:
        Hoffman, Blei (2015), "Structured stochastic variational inference", arXiv:1404.4114, section 2.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_nf.guides import StructuredFlow
        >>> def model(x):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("rows", len(x), subsample_size=10) as rows:
        ...         z = pyro.sample("z", dist.Normal(mu, 1.0))
        ...         pyro.sample("x", dist.Normal(z[..., None], 1.0).expand([len(rows), 2]).to_event(1), obs=x[rows])
        >>> guide = StructuredFlow(model, {"rows": torch.nn.Linear(2, 4)})
        >>> {name: tuple(value.shape) for name, value in guide(torch.zeros(100, 2)).items()}
        {'mu': (), 'z': (10,)}
    """

    def __init__(
        self,
        model: Callable[..., Any],
        encoders: Mapping[str, nn.Module],
        flow: FlowLike = "realnvp",
        *,
        local_flow: FlowLike = "realnvp",
        create_plates: Callable[..., Any] | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(encoders, Mapping) or not encoders:
            got = "none" if isinstance(encoders, Mapping) else type(encoders).__name__
            raise ValueError(f"encoders must be a dictionary of plates' names and their encoders; got {got}")
        super().__init__(model, create_plates)
        self._encoded = tuple(encoders)
        self.append(AutoFlow(poutine.block(model, hide_fn=partial(_stands_in, self._encoded)), flow, **options))
        for plate, encoder in encoders.items():
            check_encoder(encoder)
            self.append(_LocalFlow(poutine.block(model, expose_fn=partial(_stands_in, (plate,))), encoder, local_flow))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample the globals, then the locals of every plate."""
        self._ensure_prototype(*args, **kwargs)
        self._create_plates(*args, **kwargs)
        global_guide, *local_guides = self
        with poutine.trace() as capture:
            values: dict[str, Tensor] = global_guide(*args, **kwargs)
        given = self._base_point(capture.trace.nodes[f"_{global_guide._pyro_name}_latent"]["value"])
        for guide in local_guides:
            values.update(guide(given, *args, **kwargs))
        return values

    def get_posterior(self, *args: Any, **kwargs: Any) -> "Joint":  # type: ignore[override]
        """Return the joint posterior of the globals and of the locals of all the data in the arguments."""
        global_guide, *local_guides = self

        def conditional(latent: Tensor) -> tuple[FlowDistribution, ...]:
            given = self._base_point(latent)
            return tuple(guide.get_posterior(guide.align(given), *args, **kwargs) for guide in local_guides)

        return Joint(global_guide.get_posterior(), conditional)

    def _base_point(self, latent: Tensor) -> Tensor:
        # Always by the inverse, also of a draw whose base point is known: a draw and its rescoring at fixed values then
        # see one function of the latents and the parameters, and gradients are those of the density.
        point: Tensor = self[0].flow.inverse_and_log_det(latent)[0]
        return point

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._prepare(args, kwargs)
        for guide in self._parts:
            guide._prepare(args, kwargs)

    def _may_change(self, plate: str) -> bool:
        return plate in self._encoded

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        trace, sites = trace_latents(self.model, args, kwargs, "StructuredFlow", self._latents)
        places = {name: [frame.name for frame in site["cond_indep_stack"]] for name, site in sites.items()}
        plates = dict.fromkeys(plate for stack in places.values() for plate in stack)
        unknown = [plate for plate in self._encoded if plate not in plates]
        if unknown:
            raise ValueError(
                "encoders must be of plates that hold latents: the model's are "
                f"{', '.join(map(repr, plates)) or 'none'}; got {', '.join(map(repr, unknown))}"
            )
        if all(set(stack) & set(self._encoded) for stack in places.values()):
            raise ValueError(
                f"StructuredFlow takes a model with global latents too; all of {', '.join(places)} stand in plates "
                "with encoders: use AmortizedFlow(model, encoder)"
            )
        if self.create_plates is None:
            check_indices(trace, set(self._encoded))
        super()._setup_prototype(*args, **kwargs)
        for guide in self._parts:
            guide._prepare(args, kwargs)

    def _unpack_latent(self, latent: Any) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for guide, part in zip(self, latent, strict=True):
            yield from guide._unpack_latent(part)

    def _pack_latent(self, parts: list[Tensor]) -> Any:
        named = dict(zip((name for name, _ in self.prototype_trace.iter_stochastic_nodes()), parts, strict=True))
        return tuple(
            guide._pack_latent([named[name] for name, _ in guide.prototype_trace.iter_stochastic_nodes()])
            for guide in self
        )


class Joint(NamedTuple):
    """The law of the globals' coordinates, and of the locals' given these: draws and densities of all together.

    Attributes:
        globals: Distribution of the globals' coordinates.
        conditional: Maps them, `(*batch, dim)`, to the distribution of each plate's local coordinates.
    """

    globals: FlowDistribution
    conditional: Callable[[Tensor], tuple[FlowDistribution, ...]]

    def sample(self, sample_shape: Any = ()) -> tuple[Tensor, ...]:
        """Return draws of the globals, `(*sample_shape, dim)`, and of each plate's locals."""
        first = self.globals.sample(sample_shape)
        return first, *(posterior.sample() for posterior in self.conditional(first))

    def log_prob(self, latents: tuple[Tensor, ...]) -> Tensor:
        """Return the joint log density of such draws, `(*sample_shape,)`."""
        first, *rest = latents
        total = self.globals.log_prob(first)
        for posterior, value in zip(self.conditional(first), rest, strict=True):
            total = total + posterior.log_prob(value).flatten(first.dim() - 1).sum(-1)
        return total


class _LocalFlow(AmortizedFlow):
    """An `AmortizedFlow` that is given the globals' base point, before the model's arguments."""

    def align(self, given: Tensor) -> Tensor:
        """Put dimensions for the plate, and those to its right, between those of draws and the coordinates."""
        return given[(..., *(None,) * -self._plate.dim, slice(None))]

    def _ensure_prototype(self, given: Tensor, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        super()._ensure_prototype(*args, **kwargs)

    def _build(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, nn.Module]:
        made = super()._build(args, kwargs)
        size = self._plate.full_size or self._plate.size
        width: Any = made["flow"].context_dim
        return {**made, "follow": _Following(width, self.master()[0].latent_dim, size)}

    def _context(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        given, *rest = args
        context: Tensor = self.follow(super()._context(tuple(rest), kwargs), given)
        return context

    def _restrict(self, args: tuple[Any, ...], kwargs: dict[str, Any], plate: Any, indices: Tensor) -> Arguments:
        given, *rest = args
        cut_args, cut_kwargs = super()._restrict(tuple(rest), kwargs, plate, indices)
        return (given, *cut_args), cut_kwargs


class _Following(nn.Module):
    r"""`c = e + J(e) u / sqrt(N)`, J a matrix linear in e that starts at zero: how the contexts e follow the globals u.

    The posterior's scale of theta, which is u's unit, is smaller than that of a local latent by a factor of order
    `1 / sqrt(N)`, and so is its effect on a local: without the root, J would have to settle at values far below the
    steps of an optimiser.
    """

    unit: Tensor

    def __init__(self, width: int, num_globals: int, size: int) -> None:
        super().__init__()
        self.matrix = nn.Linear(width, width * num_globals)
        start_at_zero(self.matrix)
        self.register_buffer("unit", torch.tensor(size**-0.5))

    def forward(self, context: Tensor, given: Tensor) -> Tensor:
        """Return `(*batch, width)` for `context: (*batch, width)` and `given: (*batch, num_globals)`."""
        matrix = self.matrix(context).unflatten(-1, (context.shape[-1], -1))
        shift: Tensor = (matrix @ (self.unit * given)[..., None])[..., 0]
        return context + shift


def _stands_in(plates: tuple[str, ...], site: Any) -> bool:
    """Whether a sample statement stands in one of these plates."""
    return site["type"] == "sample" and any(frame.name in plates for frame in site["cond_indep_stack"])
