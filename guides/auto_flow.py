"""AutoFlow: the drop-in guide, a flow over all latents of a model."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous, AutoGuide, init_to_feasible
from torch import Tensor
from torch.distributions import Transform, constraints

from pyro_nf.approximations.approximation import Approximation, start_at_modes
from pyro_nf.approximations.density import Density
from pyro_nf.approximations.modes import Starts
from pyro_nf.approximations.pairs import paired_density
from pyro_nf.distributions import FlowDistribution, ScoredDraw
from pyro_nf.distributions.bases import BaseLike, check_base, make_base
from pyro_nf.distributions.mixture import MixtureBase
from pyro_nf.flows import ElementwiseAffine, Flow, Paced, Sequential, WhitenedAffine, stacks
from pyro_nf.guides.building import FlowLike, build_flow, check_flow_like
from pyro_nf.guides.flow_guide import FlowGuide, is_inside
from pyro_nf.guides.latents import check_latents
from pyro_nf.interface.arguments import check_number, check_whole_number, unpacked
from pyro_nf.programs._pyro import num_plate_elements
from pyro_nf.programs.calls import takes_model_arguments
from pyro_nf.programs.program import Program
from pyro_nf.programs.supports import bijection

# Up to here a full matrix (dim^2 / 2 parameters) is cheap beside the model; beyond, scales without correlations.
_FULL_RANK_DIM = 1000


class AutoFlow(FlowGuide, AutoContinuous):
    r"""Guide over all continuous latents, `q(z) = affine(flow(base))`, in place of Pyro's `AutoNormal(model)`.

    z are the latents on the real line (through bijections of their supports). The flow starts as the identity and the
    affine layer at `init_loc_fn` and `init_scale`: over the normal base, this starts as the mean-field guide that it
    replaces. The affine layer is lower triangular (a full-rank normal) up to 1,000 coordinates.

    In Pyro's `SVI` it trains at the learning rates that `AutoNormal` trains at: the flow's parameters are in units in
    which a step of Adam moves the whole flow about as far as a location (`pyro_nf.flows.Paced`).

    Works in `FlowSVI`, in Pyro's `SVI` with any of its ELBOs (over a base without discrete draws), in `AutoGuideList`,
    `NeuTraReparam` and `Predictive`. `Predictive(model, guide.sample_posterior(1000, *args))` gives sites of their own
    shapes, where Pyro's `Predictive(model, guide=guide)` puts dimensions of size 1 before those outside of plates.

    `load_state_dict` may come before the first call, and so may the parameter store's `load`.

    Args:
        model: A Pyro model with static structure.
        flow: "auto" for eight affine couplings, whose networks have one hidden layer of 64; a name
            (`pyro_nf.flows.stacks.names()`), a picklable factory `dim -> Flow`, or a `Flow` over the unconstrained
            coordinates, which keeps its parameters as they are (`Paced(flow)` gives them units).
        base: `"normal"`; `"student_t"` with trainable degrees of freedom, for posteriors with a funnel's neck or heavy
            tails, where a normal base gives a higher k-hat; `"mixture"` of four normals, for posteriors with several
            modes; or a factory, such as `partial(MixtureBase, num_components=8)`.
        init_loc_fn: Initial value of each site, a strategy of `pyro.infer.autoguide.initialization`. The default is
            AutoNormal's.
        init_scale: Initial standard deviation on the real line, positive.

    Raises:
        ValueError: If an argument is none of these, or `init_scale` is not positive; on the first call, if the model
            has no continuous latents, discrete ones, or local ones in a subsampled plate, or if the flow has another
            dimension.

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
        flow: FlowLike = "auto",
        *,
        base: BaseLike = "normal",
        init_loc_fn: Callable[..., Any] = init_to_feasible,
        init_scale: float = 0.1,
    ) -> None:
        init_scale = check_number("init_scale", init_scale, above=0.0)
        if not callable(init_loc_fn):
            raise ValueError(f"init_loc_fn must be a strategy of pyro.infer.autoguide, a function; got {init_loc_fn!r}")
        flow = _couplings if isinstance(flow, str) and flow == "auto" else flow
        check_flow_like(flow)
        check_base(base)
        super().__init__(model, init_loc_fn=_starting(init_loc_fn))
        # Unlike `self.model`, without initial values. In a tuple, or a module would become part of the guide.
        self._plain_model = (model,)
        self._make_flow = partial(_build_paced, flow)
        self._make_base = partial(make_base, base)
        self._init_scale = init_scale
        self._outdated = False
        self._has_network = True

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site, in the model's plates."""
        self._ensure_prototype(*args, **kwargs)
        latent = self.sample_latent(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        values = {}
        for site, value, log_det in self._constrained(latent):
            with ExitStack() as stack:
                for frame in site["cond_indep_stack"]:
                    stack.enter_context(plates[frame.name])
                values[site["name"]] = self._sample_site(site, value, log_det)
        return values

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # The prototype holds tensors of the model, bounds of supports, which may move with it: look again.
        self._outdated = self.prototype_trace is not None and self._model is not None
        return super()._apply(*args, **kwargs)

    @property
    def given_model(self) -> Any:
        """The model as the user gave it, `None` in a copy from a pickle."""
        return None if self._plain_model is None else self._plain_model[0]

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._prepare(args, kwargs)
        if self._outdated:
            self._setup_prototype(*args, **kwargs)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        self._outdated = False
        check_latents(self.model, args, kwargs, "AutoFlow", self._latents)
        AutoGuide._setup_prototype(self, *args, **kwargs)
        start = dict(self._initial_values())
        self._unconstrained_shapes = {name: value.shape for name, value in start.items()}
        self._check_supports(start, args, kwargs)
        loc = self._pack_latent(list(start.values()))
        self.latent_dim = len(loc)
        if self.master is None:  # NeuTraReparam reads the plates, maybe before the guide's first call
            with poutine.block():
                self._create_plates(*args, **kwargs)
        if "flow" in self._modules:
            return
        inner = self._make_flow(self.latent_dim)
        affine = WhitenedAffine if self.latent_dim <= _FULL_RANK_DIM else ElementwiseAffine
        outer = affine(self.latent_dim, loc=loc, scale=self._init_scale)
        self._take(flow=Sequential(inner.to(loc), outer), base=self._make_base(self.latent_dim).to(loc))

    @takes_model_arguments
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
            ValueError: If `num_starts` is no whole number of at least 1, or there are more than 1,000 coordinates.
        """
        num_starts = check_whole_number("num_starts", num_starts)
        args, kwargs = unpacked(args, kwargs)
        self._ensure_prototype(*args, **kwargs)
        self._check_size()  # before the work of a density
        starts, found = start_at_modes(self.approximation(), self.density(*args, **kwargs), num_starts)
        self.take_over(found)
        return starts

    def _check_size(self) -> None:
        if self.latent_dim > _FULL_RANK_DIM:
            raise ValueError(
                f"warm_start takes up to {_FULL_RANK_DIM} coordinates, for it needs their whole Hessian; "
                f"the model has {self.latent_dim}"
            )

    def density(self, *args: Any, **kwargs: Any) -> Density:
        """Return the log density of the guide's own model over the unconstrained coordinates, for many points at once.

        That of another model with the same latents: `pyro_nf.approximations.pairs.paired_density`.

        Args:
            *args: The model's arguments.
            **kwargs: The model's keyword arguments. A subsampled plate has one minibatch.
        """
        return paired_density(Program(self._plain_model[0], self).bind(*args, **kwargs))

    @property
    def network(self) -> Flow:
        """The flow before the affine layer."""
        return self.flow.flows[0]  # type: ignore[no-any-return]

    @property
    def affine(self) -> Any:
        """The outer layer: a `WhitenedAffine`, or an `ElementwiseAffine` of more than 1,000 coordinates."""
        return self.flow.flows[-1]

    def approximation(self) -> Approximation:
        """Return what the guide is now, as a value: what changes the guide later does not change this."""
        self._check_ready()
        return Approximation(self.base, self.network, self.affine, self._has_network).copy()

    @torch.no_grad()
    def take_over(self, approximation: Approximation) -> None:
        """Become this approximation, of the same kind of base and layers as `approximation` returns.

        Without its network the guide draws from the base and the affine layer alone, until it takes over another one.
        """
        self._check_ready()
        self.base.load_state_dict(approximation.base.state_dict())
        self.network.load_state_dict(approximation.network.state_dict())
        self.affine.load_state_dict(approximation.affine.state_dict())
        self._has_network = approximation.has_network
        self._keep()

    def latent_sites(self) -> dict[str, dict[str, Any]]:
        """Return the latent sites, as in a trace of the guide's own model, in the order of the coordinates."""
        self._check_ready()
        return dict(self.prototype_trace.iter_stochastic_nodes())

    def _initial_values(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each site's name and its initial value on the real line."""
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            value, shape = site["value"].detach(), site["fn"].shape()
            if value.shape != shape:
                raise ValueError(
                    f"init_loc_fn must give site {name!r} a value of shape {tuple(shape)}; got {tuple(value.shape)}"
                )
            if not is_inside(site, value):
                support = site["fn"].support
                raise ValueError(
                    f"init_loc_fn must give site {name!r} a value inside its support {support}; got {value}"
                )
            yield name, bijection(site).inv(value)

    def _check_supports(self, start: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the model at other values, and report a site whose support has moved with them."""
        sites = dict(self.prototype_trace.iter_stochastic_nodes())
        elsewhere = {name: bijection(site)(start[name] + 0.1) for name, site in sites.items()}
        with poutine.block(), torch.no_grad():
            trace = poutine.trace(poutine.condition(self.model, elsewhere)).get_trace(*args, **kwargs)
        for name, value in elsewhere.items():
            if name not in trace.nodes:
                raise ValueError(f"AutoFlow takes models with fixed sites; {name!r} comes and goes with other latents")
            moved = bijection(trace.nodes[name])(start[name] + 0.1)
            if moved.shape != value.shape or not torch.allclose(moved, value):
                raise ValueError(
                    f"AutoFlow takes sites whose support is fixed; that of {name!r} depends on other latents. Sample "
                    "it on a fixed support, from Uniform(0, 1) say, and map it there with pyro.deterministic"
                )

    def get_base_dist(self) -> Any:
        """Return the base distribution over the coordinates."""
        self._check_ready()
        return self.base()

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        """Return the flow from the base to the unconstrained latents, affine layer included."""
        self._check_ready()
        # NeuTraReparam adds the log-determinant to the first site's density, once for each element of its plates.
        elements = num_plate_elements()
        return self.flow if elements == 1 else _Shared(self.flow, elements)

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowDistribution:
        """Return the posterior over the unconstrained coordinates."""
        return FlowDistribution(self.get_base_dist(), self._active_flow)

    @property
    def _active_flow(self) -> Flow:
        return self.flow if self._has_network else self.affine  # type: ignore[no-any-return]

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """Sample the coordinates, as one auxiliary site."""
        posterior, name = self.get_posterior(), f"_{self._pyro_name}_latent"
        if isinstance(self.base, MixtureBase):
            posterior = FlowDistribution(self.base.draw_from(name), self._active_flow)
        latent: Tensor = pyro.sample(name, ScoredDraw(posterior), infer={"is_auxiliary": True})
        return latent

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Cut the coordinates into sites.

        Outer plates (vectorised particles) leave the dimensions of the model's plates free: batch dimensions that end
        in as many ones. Any other batch is of draws, each with the sites' own shapes.
        """
        batch = latent.shape[:-1]
        sites = [site for _, site in self.prototype_trace.iter_stochastic_nodes()]
        nesting = max(len(site["fn"].batch_shape) for site in sites)
        outer = len(batch) > nesting and all(size == 1 for size in batch[len(batch) - nesting :])
        shapes = self._unconstrained_shapes.values()
        parts = latent.split([shape.numel() for shape in shapes], -1)
        for site, shape, part in zip(sites, shapes, parts, strict=True):
            lead = batch[: len(batch) - len(site["fn"].batch_shape)] if outer else batch
            yield site, part.reshape((*lead, *shape))

    def _pack_latent(self, parts: list[Tensor]) -> Tensor:
        return torch.cat([part.reshape(-1) for part in parts])

    def _check_ready(self) -> None:
        if self.prototype_trace is None:
            raise RuntimeError("AutoFlow does not know its model's latents yet: call the guide, or fit it, first")


def _couplings(dim: int) -> Flow:
    """The default flow: on what a normal leaves over, a second hidden layer costs time and gains nothing."""
    return stacks.realnvp(dim, hidden_dims=(64,))


def _build_paced(flow: FlowLike, dim: int) -> Flow:
    """Build the flow; one that the user holds stays as it is, for its parameters are the user's."""
    built = build_flow(flow, dim)
    return built if isinstance(flow, Flow) or isinstance(built, Paced) else Paced(built)


class _Shared(Transform):
    """A flow whose log-determinant is spread over so many elements, which add up to it."""

    bijective = True
    domain = codomain = constraints.real_vector

    def __init__(self, flow: Flow, elements: int) -> None:
        super().__init__()
        self.flow, self.elements = flow, elements

    def _call(self, x: Tensor) -> Tensor:
        return self.flow.forward_and_log_det(x)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return one element's share."""
        return self.flow.forward_and_log_det(x)[1] / self.elements


def _starting(init_loc_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the strategy, changed where it would fail before the guide can say what is wrong, or need not fail."""

    def init(site: dict[str, Any]) -> Any:
        fn = site["fn"]
        if fn.support.is_discrete:
            return fn.sample()
        if init_loc_fn is not init_to_feasible:
            return init_loc_fn(site)
        # Pyro's own knows fewer supports, and draws from the prior, which improper ones cannot.
        try:
            like = fn.sample()
        except NotImplementedError:
            like = torch.empty(0)
        try:
            to_support = bijection({"name": site["name"], "fn": fn})
        except ValueError:  # right for a site that a reparametrisation replaces; else reported after this run
            return like
        return to_support(like.new_zeros(to_support.inverse_shape(fn.shape())))

    return init
