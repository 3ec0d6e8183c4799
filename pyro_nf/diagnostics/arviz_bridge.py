"""A fitted guide as ArviZ data: InferenceData in ArviZ 0.x, DataTree in 1.x."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pyro_nf import __version__
from pyro_nf.diagnostics import simulation
from pyro_nf.diagnostics.arviz_versions import inference_data
from pyro_nf.diagnostics.diagnosis import Diagnosis, find_names, judge
from pyro_nf.diagnostics.moments import Moments
from pyro_nf.diagnostics.progress import Progress
from pyro_nf.diagnostics.verdict import Evidence, Verdict
from pyro_nf.diagnostics.weights import log_densities, pareto_smooth, require_whole_data, summarize
from pyro_nf.interface.arguments import check_has, check_whole_number, unpacked
from pyro_nf.interface.waits import one_at_a_time
from pyro_nf.programs.calls import takes_model_arguments
from pyro_nf.programs.contraction import contract
from pyro_nf.programs.coordinates import coordinates
from pyro_nf.programs.discrete import discrete_probabilities, draw_discrete, with_discrete
from pyro_nf.programs.grouped import log_prob_of
from pyro_nf.programs.matching import require_weights
from pyro_nf.programs.program import BoundProgram, Program, TracePair
from pyro_nf.programs.sites import is_data, is_deterministic, is_enumerated, is_latent
from pyro_nf.programs.traces import run_model

if TYPE_CHECKING:
    import xarray

Array = npt.NDArray[Any]
Variables = dict[str, tuple[list[str], Array]]

# Names that dimensions have here, so that sites and plates cannot.
_OWN_DIMS = ("chain", "draw", "step")
# What the probabilities of a discrete latent's values are called, behind its name.
_PROBS = "_probs"
_SAMPLES = ["chain", "draw"]
# What the draws of the posterior are, as an attribute.
_DRAWS = (
    "the guide's own; log_weight in sample_stats corrects them to the posterior where the verdict there is right after "
    "correction"
)


class Fitted(Protocol):
    """What is taken from a `FitResult`."""

    @property
    def history(self) -> Tensor:
        """The ELBO estimate of each step, `(steps,)`."""


@one_at_a_time
@takes_model_arguments
def to_arviz(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 4000,
    num_prior_samples: int = 1000,
    result: Fitted | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Any:
    """Draw from a fitted guide and return ArviZ's data structure.

    The draws are independent: they form one chain, for which R-hat says nothing (`az.summary(data, kind="stats")`
    leaves it out). Groups:

    - `posterior`: the guide's own draws, not corrected by their weights, of latent and deterministic sites, `(chain=1,
      draw, *shape)`; the dimensions of a plate bear its name. (`Predictive` takes latents alone, as from
      `guide.sample_posterior` or `corrected_posterior(...).draws`.);
    - `posterior_predictive`: data that the model draws given these latents, in the shape of the observed sites;
    - `log_likelihood`: of every observed site, pointwise; 0 where data are masked;
    - `prior`, `prior_predictive`: the same from draws of the model itself (`pyro.factor` has no part in them);
    - `observed_data`: the observed sites; NaN where they are masked;
    - `constant_data`: the model's other tensor arguments, by the names of its signature. If just one plate has the size
      of an argument's first dimension, that dimension bears its name;
    - `sample_stats`: `log_p` and `log_q` of each draw, `log_weight` (Pareto-smoothed, normalised: exponentials sum to
      1), and as attributes the diagnosis of these draws: `khat`, `ess`, `elbo`, `log_evidence`, ..., `verdict`
      ("right", "right after correction" or "not right", by their weights: no other modes are looked for as in
      `diagnose`, so that a mode in which the guide has no draws goes unnoticed), `reliable` (1 where it is "right"),
      `reasons`, `notes`, and `draws`, which says what the draws of `posterior` are; given a `result`, `elbo_trace`
      along the dimension `step`.

    A warning names what is left out because nothing can be drawn: data or latents of a distribution without a sampler,
    such as an improper prior.

    Args:
        model: The Pyro model.
        guide: Its fitted guide: ours, Pyro's or hand-written.
        *args: The model's arguments: all the data, nothing subsampled; or all in one `Arguments`.
        num_samples: Draws of the guide, and of data given them.
        num_prior_samples: Draws of the model itself; 0 leaves the prior groups out.
        result: What `FlowSVI.run` returned.
        progress: Whether to show a bar, on stderr, if it takes longer than about two seconds.
        **kwargs: The model's keyword arguments.

    Returns:
        `arviz.InferenceData` (ArviZ 0.x) or `xarray.DataTree` (ArviZ 1.x).

    Raises:
        ValueError: If a plate is subsampled, `num_samples` is no whole number of at least 100 or `num_prior_samples`
            none of at least 0, model or guide is not callable, an option may be meant for the model, the guide does not
            match the model or has no density, or a site has the name of an ArviZ dimension.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_nf.diagnostics import to_arviz
        >>> from pyro_nf.guides import AutoFlow
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("unit", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> data = to_arviz(model, AutoFlow(model), torch.zeros(3), num_samples=200)
        >>> dict(data["log_likelihood"]["y"].sizes)
        {'chain': 1, 'draw': 200, 'unit': 3}
        >>> dict(data["prior_predictive"]["y"].sizes)
        {'chain': 1, 'draw': 1000, 'unit': 3}
    """
    num_samples = check_whole_number("num_samples", num_samples, least=100)
    num_prior_samples = check_whole_number("num_prior_samples", num_prior_samples, least=0)
    if result is not None:
        check_has("result", result, ("history",), "what FlowSVI.run returned, or None")
    args, kwargs = unpacked(args, kwargs)
    shown = Progress("to_arviz", progress)
    plain = Program(model, guide).bind(*args, **kwargs)
    require_weights(plain)
    require_whole_data(plain)
    pair = plain.spec.traces
    sites, (names, obstacle) = _Sites(plain), find_names(pair)

    def extract(particle: TracePair, predicted: bool = False) -> dict[str, Tensor]:
        kept = sites.posterior(particle, predicted)
        return kept | ({"coordinates": coordinates(particle.model)} if names else {})

    predictive = Program(model, simulation.predictive(model, guide, plain.spec.enumeration)).bind(*args, **kwargs)
    if _can_draw(predictive, "posterior_predictive"):
        predicted = partial(extract, predicted=True)
        draws = shown.map("draws and predictions", predictive, predicted, num_samples)
    else:
        draws = shown.map("draws", plain, extract, num_samples)
    points = draws.pop("coordinates", None)
    prior = Program(model, simulation.prior(model)).bind(*args, **kwargs)
    if num_prior_samples and _can_draw(prior, "prior"):
        draws |= shown.map("draws of the prior", prior, sites.prior, num_prior_samples)
    groups = sites.variables(draws)
    groups["observed_data"] = sites.observed_data()
    groups["constant_data"] = sites.constant_data(simulation.named_arguments(model, args, kwargs))
    evidence = _add_weights(groups["sample_stats"], points, names, obstacle)
    if result is not None:
        groups["sample_stats"]["elbo_trace"] = (["step"], _numpy(result.history))
    data = inference_data({group: _dataset(variables) for group, variables in groups.items() if variables})
    data["sample_stats"].attrs.update(_attributes(judge(evidence)))
    data["posterior"].attrs["draws"] = _DRAWS
    return data


class _Sites:
    """The sites of a model that ArviZ takes, and the names of their dimensions."""

    def __init__(self, program: BoundProgram) -> None:
        nodes = program.spec.traces.model.nodes
        self._program, self._enumeration = program, program.spec.enumeration
        kinds = (is_latent, is_enumerated, is_deterministic)
        self.latent = {name: site for name, site in nodes.items() if any(kind(site) for kind in kinds)}
        self.observed = {name: site for name, site in nodes.items() if is_data(site) and not simulation.is_factor(site)}
        self.all = self.latent | self.observed
        self._plates: dict[str, list[str]] = {}
        for name in self.all:
            if name in _OWN_DIMS:
                raise ValueError(f"site {name!r} must be renamed: ArviZ has a dimension of that name")

    def posterior(self, particle: TracePair, predicted: bool = False) -> dict[str, Tensor]:
        """Return what is kept of a draw of the guide, which may return data predicted from it, by group and name."""
        stats = log_densities(particle)  # which also leaves each site's log_prob in the traces
        nodes = particle.model.nodes
        returned = particle.guide.nodes["_RETURN"]["value"] if predicted else simulation.Prediction({}, {})
        probabilities: dict[str, Tensor] = {}
        likelihood = {name: log_prob_of(nodes[name]) for name in self.observed}
        if self._enumeration.names:
            discrete = returned.discrete or draw_discrete(particle.model)
            probabilities = discrete_probabilities(particle.model)
            likelihood = self._pointwise(particle)
            nodes = run_model(self._program.model, with_discrete(particle.guide, discrete)).nodes
        return {
            **{f"posterior/{name}": torch.as_tensor(nodes[name]["value"]) for name in self.latent},
            **{f"posterior/{name}{_PROBS}": value for name, value in probabilities.items()},
            **_in_group("posterior_predictive", returned.data),
            **_in_group("log_likelihood", likelihood),
            **{f"sample_stats/{name}": value.double() for name, value in stats.items()},
        }

    def _pointwise(self, particle: TracePair) -> dict[str, Tensor]:
        """Return log likelihoods with the discrete latents summed out, of each element of the plates around them.

        Data that depend on each other through these, as those of a chain, have none.
        """
        found: dict[str, Tensor] = {}
        if getattr(particle.model, "branches", []):
            return found
        for term in contract(particle.model, scaled=False).terms:
            data = [name for name in term.sites if name in self.observed]
            if data == list(term.sites):
                found |= {name: log_prob_of(particle.model.nodes[name]) for name in data}
            elif data and term.plates:
                name = data[0] if len(data) == 1 else " and ".join(data[:2]) + (" ..." if len(data) > 2 else "")
                found[name] = term.value
                self._plates[name] = list(term.plates)
        return found

    def prior(self, particle: TracePair) -> dict[str, Tensor]:
        """Return what is kept of a draw of the model itself, by group and name."""
        return {
            **{f"prior/{name}": particle.guide.nodes[name]["value"] for name in self.latent},
            **_in_group("prior_predictive", simulation.drawn_data(particle.guide)),
        }

    def variables(self, draws: dict[str, Tensor]) -> dict[str, Variables]:
        """Return draws by group, with the names of their dimensions."""
        groups: dict[str, Variables] = {}
        for key, value in draws.items():
            group, _, name = key.partition("/")
            labels = [] if group == "sample_stats" else self._labels(group, name, value.shape[1:])
            groups.setdefault(group, {})[name] = (_SAMPLES + labels, _numpy(value)[None])
        return groups

    def _labels(self, group: str, name: str, shape: tuple[int, ...]) -> list[str]:
        if group == "log_likelihood" and name in self._plates:
            return self._plates[name]
        if name.endswith(_PROBS) and name not in self.all:
            site = name.removesuffix(_PROBS)
            return [*self.dims(site, shape[:-1]), f"{site}_value"]
        return self.dims(name, shape, group == "log_likelihood")

    def observed_data(self) -> Variables:
        """Return the data, NaN where masked."""
        values = {name: _seen(site) for name, site in self.observed.items()}
        return {name: (self.dims(name, value.shape), value) for name, value in values.items()}

    def constant_data(self, arguments: dict[str, Tensor]) -> Variables:
        """Return the arguments that are no site's data."""
        data = [site["value"] for site in self.observed.values()]
        sizes = {f.name: f.size for site in self.all.values() for f in site["cond_indep_stack"] if f.vectorized}
        result = {}
        for name, value in arguments.items():
            if name in _OWN_DIMS or any(_is_same(value, other) for other in data):
                continue
            labels = [f"{name}_dim_{i}" for i in range(value.dim())]
            rows = [plate for plate, size in sizes.items() if value.dim() and size == len(value)]
            if len(rows) == 1 and rows[0] not in {*arguments, *_OWN_DIMS}:
                labels[0] = rows[0]
            result[name] = (labels, _numpy(value))
        return result

    def dims(self, name: str, shape: tuple[int, ...], batch_only: bool = False) -> list[str]:
        """Name the dimensions of a site's value, or of its `log_prob`: those of a plate after it."""
        site = self.all[name]
        event_dim = 0 if batch_only else site["fn"].event_dim
        if is_deterministic(site) and event_dim == len(shape):
            event_dim = 0  # Pyro's default, which does not tell a plate's dimensions from others
        labels = [f"{name}_dim_{i}" for i in range(len(shape))]
        for frame in site["cond_indep_stack"]:
            position = len(shape) - event_dim + (frame.dim or 0)
            # A plate of the same name as a variable would be its own coordinate.
            named = frame.vectorized and frame.name not in {*self.all, *_OWN_DIMS}
            if named and position >= 0 and shape[position] == frame.size:
                labels[position] = frame.name
        return labels


def _can_draw(program: BoundProgram, group: str) -> bool:
    """Run the program once, and warn if a distribution in it cannot be drawn from."""
    try:
        program.spec  # noqa: B018 - which runs it
    except NotImplementedError as error:
        warnings.warn(f"{group} is left out, for the model cannot draw it: {error!r}", stacklevel=4)
        return False
    return True


def _add_weights(stats: Variables, points: Tensor | None, names: list[str], obstacle: str) -> Evidence:
    """Add the draws' weights to `log_p` and `log_q`, and return what they say of the guide."""
    log_weights = stats["log_p"][1] - stats["log_q"][1]
    stats["log_weight"] = (_SAMPLES, pareto_smooth(log_weights[0])[0][None])
    weights = summarize(log_weights)
    if points is None:
        return Evidence(weights=weights, notes=(obstacle,))
    moments = Moments()
    moments.add(torch.as_tensor(log_weights[0]), points)
    return Evidence(weights=weights, names=names, misfit=moments.compare())


def _attributes(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return a diagnosis as NetCDF takes attributes."""
    attributes: dict[str, Any] = {"draws": _DRAWS}
    for name, value in (dataclasses.asdict(diagnosis) | {"reliable": diagnosis.reliable}).items():
        if isinstance(value, bool):
            attributes[name] = int(value)
        elif isinstance(value, tuple):
            attributes[name] = " ".join(value)
        else:
            attributes[name] = str(value) if isinstance(value, Verdict) else value
    return attributes


def _dataset(variables: Variables) -> "xarray.Dataset":
    import xarray

    sizes = {dim: size for dims, value in variables.values() for dim, size in zip(dims, value.shape, strict=True)}
    attributes = {
        "created_at": datetime.now(timezone.utc).isoformat(),
        "inference_library": "pyro_nf",
        "inference_library_version": __version__,
    }
    if "draw" in sizes:
        attributes["sampling"] = "independent draws: one chain, for which R-hat says nothing"
    return xarray.Dataset(variables, {dim: np.arange(size) for dim, size in sizes.items()}, attributes)


def _seen(site: dict[str, Any]) -> Array:
    """The data of a site, NaN where they are masked."""
    value, mask = site["value"], site["mask"]
    if mask is None or mask is True:
        return _numpy(value)
    mask = torch.as_tensor(mask, device=value.device)[(...,) + (None,) * site["fn"].event_dim]
    return _numpy(value) if mask.all() else np.where(_numpy(mask), _numpy(value), np.nan)


def _is_same(argument: Tensor, data: Tensor) -> bool:
    """Whether an argument holds a site's data, in whatever shape and type; masked NaN are gone from those."""
    if argument.numel() != data.numel():
        return False
    argument, data = argument.reshape(-1), data.reshape(-1).to(argument.device)
    return bool(((argument == data) | argument.isnan()).all())


def _in_group(group: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{group}/{name}": value for name, value in values.items()}


def _numpy(value: Tensor) -> Array:
    array: Array = torch.as_tensor(value).detach().cpu().numpy()
    return array
