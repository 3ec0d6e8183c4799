"""AutoFlow: the drop-in guide, a flow over all latents of a model."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoContinuous, init_to_feasible
from torch import Tensor

from pyro_nf.distributions import FlowDistribution, ScoredDraw
from pyro_nf.flows import ElementwiseAffine, Flow, LowerTriangularAffine, Sequential
from pyro_nf.guides.bases import BaseLike, check_base, make_base
from pyro_nf.guides.flow_guide import FlowGuide, FlowLike, build_flow, check_flow_like, check_latents
from pyro_nf.guides.mixture import MixtureBase
from pyro_nf.guides.starts import Starts, find_starts, starting_points

# Up to here a full matrix (dim^2 / 2 parameters) is cheap beside the model; beyond, scales without correlations.
_FULL_RANK_DIM = 500


class AutoFlow(FlowGuide, AutoContinuous):
    r"""Guide over all continuous latents, `q(z) = affine(flow(base))`, in place of Pyro's `AutoNormal(model)`.

    z are the latents on the real line (through `biject_to` of their supports). The flow starts as the identity and the
    affine layer at `init_loc_fn` and `init_scale`: over the normal base, this starts as the mean-field guide that it
    replaces. The affine layer is lower triangular (a full-rank normal) up to 500 coordinates.

    Works in Pyro's `SVI` with `Trace_ELBO`, in `Predictive`, `AutoGuideList` and `NeuTraReparam`, and in `FlowSVI`.

    Args:
        model: A Pyro model with static structure.
        flow: A name (`pyro_nf.flows.stacks.names()`), a `Flow` over the unconstrained coordinates, or a picklable
            factory `dim -> Flow`.
        base: `"normal"`; `"student_t"` with trainable degrees of freedom, for posteriors with a funnel's neck or heavy
            tails, where a normal base gives a higher k-hat; `"mixture"` of four normals, for posteriors with several
            modes; or a factory, such as `partial(MixtureBase, num_components=8)`.
        init_loc_fn: Initial value of each site, a strategy of `pyro.infer.autoguide.initialization`. The default is
            AutoNormal's.
        init_scale: Initial standard deviation on the real line, positive.

    Raises:
        ValueError: If `init_scale` is not positive; on the first call, if the model has no continuous latents,
            discrete ones, or local ones in a subsampled plate, or if the flow has another dimension.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyro_nf.guides import AutoFlow
        >>> def model():
        ...     pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        >>> guide = AutoFlow(model)
        >>> guide.sample_posterior(5)["sigma"].shape
        torch.Size([5])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        flow: FlowLike = "realnvp",
        *,
        base: BaseLike = "normal",
        init_loc_fn: Callable[..., Any] = init_to_feasible,
        init_scale: float = 0.1,
    ) -> None:
        if not init_scale > 0:
            raise ValueError(f"init_scale must be positive; got {init_scale!r}")
        check_flow_like(flow)
        check_base(base)
        super().__init__(model, init_loc_fn=init_loc_fn)
        # Unlike `self.model`, without initial values. In a tuple, or a module would become part of the guide.
        self._plain_model = (model,)
        self._make_flow = partial(build_flow, flow)
        self._make_base = partial(make_base, base)
        self._init_scale = init_scale

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        check_latents(*self._plain_model, args, kwargs, "AutoFlow")
        super()._setup_prototype(*args, **kwargs)
        loc = self._init_loc()
        inner = self._make_flow(self.latent_dim)
        affine = LowerTriangularAffine if self.latent_dim <= _FULL_RANK_DIM else ElementwiseAffine
        outer = affine(self.latent_dim, loc=loc, scale=self._init_scale)
        self.flow = Sequential(inner.to(loc), outer)
        self.base = self._make_base(self.latent_dim).to(loc)

    @torch.no_grad()
    def warm_start(self, *args: Any, num_starts: int = 8, **kwargs: Any) -> Starts:
        """Put the guide on the modes that L-BFGS finds, if its ELBO is higher there than where it is.

        The affine layer takes the location of the best mode and the curvature of the log density there. Over a mixture
        base every mode that is not negligible gets a component. Meant for a guide whose flow is still the identity.

        Args:
            *args: The model's arguments.
            num_starts: Runs of L-BFGS, the first from where the guide is, the others from random points.
            **kwargs: The model's keyword arguments.

        Returns:
            What was found, and whether the runs agree.

        Raises:
            ValueError: If `num_starts` is not positive, or there are more than 500 coordinates.
        """
        if num_starts < 1:
            raise ValueError(f"num_starts must be at least 1; got {num_starts!r}")
        self._ensure_prototype(*args, **kwargs)
        if self.latent_dim > _FULL_RANK_DIM:
            raise ValueError(
                f"warm_start takes up to {_FULL_RANK_DIM} coordinates, for it needs their whole Hessian; "
                f"the model has {self.latent_dim}"
            )
        log_density, posterior = self._log_density(args, kwargs), self.get_posterior()
        affine: Any = self.flow.flows[-1]
        starts = find_starts(log_density, posterior, starting_points(affine.params.loc.detach(), num_starts))
        if starts.modes:
            best = starts.modes[0]
            affine.assign(best.loc, best.scale_tril)
            if isinstance(self.base, MixtureBase):
                self.base.assign(starts.modes, starts.shares)
        return starts

    def get_base_dist(self) -> Any:
        """Return the base distribution over the coordinates."""
        self._check_ready()
        return self.base()

    def get_transform(self, *args: Any, **kwargs: Any) -> Flow:
        """Return the flow from the base to the unconstrained latents, affine layer included."""
        self._check_ready()
        flow: Flow = self.flow
        return flow

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowDistribution:
        """Return the posterior over the unconstrained coordinates."""
        return FlowDistribution(self.get_base_dist(), self.get_transform())

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """Sample the coordinates, as one auxiliary site."""
        posterior, name = self.get_posterior(), f"_{self._pyro_name}_latent"
        if isinstance(self.base, MixtureBase):
            posterior = FlowDistribution(self.base.draw_from(name), self.get_transform())
        latent: Tensor = pyro.sample(name, ScoredDraw(posterior), infer={"is_auxiliary": True})
        return latent

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[dict[str, Any], Tensor]]:
        yield from AutoContinuous._unpack_latent(self, latent)

    def _pack_latent(self, parts: list[Tensor]) -> Tensor:
        return torch.cat([part.reshape(-1) for part in parts])

    def _check_ready(self) -> None:
        if self.prototype_trace is None:
            raise RuntimeError("AutoFlow does not know its model's latents yet: call the guide, or fit it, first")
