"""Whether a guide is one of its model: what only one of the two has, and shapes in which they differ."""

import warnings
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine

from pyro_nf.programs._pyro import is_subsample
from pyro_nf.programs.program import BoundProgram, ProgramSpec, TracePair
from pyro_nf.programs.sites import is_data, is_deterministic, is_latent
from pyro_nf.programs.supports import bijection

Sites = dict[str, Any]

_POINT = (
    "the guide has one value of {names} and no density, as a point estimate has (AutoDelta): take a guide that is a "
    "distribution"
)


class Mismatch(NamedTuple):
    """Something in which a guide does not fit its model.

    Attributes:
        sentence: What it is, and what to do.
        counts: Whether it makes importance weights wrong.
    """

    sentence: str
    counts: bool


def matched_spec(program: BoundProgram) -> ProgramSpec:
    """Return a pair's spec, once it is known that the guide's values are of the kind that the model's sites take.

    Raises:
        ValueError: If a latent of the model is something else in the guide, or has another shape there, or if a factor
            of the guide does not say whether it is reparametrised; else as `BoundProgram.spec`.
    """
    try:
        spec = program.spec
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        # Of a wrong shape the model may make any error: say whether there is one.
        found = next(_clashes(*_apart(program)), "")
        if found:
            raise ValueError(found) from error
        raise
    for sentence in _clashes(spec.traces.guide.nodes, spec.traces.model.nodes):
        raise ValueError(sentence)
    return spec


def warn_of_mismatches(program: BoundProgram) -> None:
    """Warn of sites and plates that only one of the two has, as Pyro's ELBOs do.

    Raises:
        ValueError: As `matched_spec`.
    """
    for mismatch in _mismatches(matched_spec(program).traces):
        warnings.warn(mismatch.sentence, stacklevel=3)


def require_match(program: BoundProgram) -> None:
    """Raise a `ValueError` if draws and densities of the guide are not those of an approximation to the posterior."""
    with torch.no_grad():
        pair = matched_spec(program).traces
    _refuse("guide and model do not match", [each.sentence for each in _mismatches(pair) if each.counts])


def require_weights(program: BoundProgram) -> None:
    """Raise a `ValueError` if `p(x, z) / q(z)` is no importance weight: as `require_match`, and where q is no density.

    That is a point estimate's, and one of more variables than the model has latents.
    """
    require_match(program)
    spec = program.spec
    _refuse("the guide's draws have no importance weights", list(_without_density(spec.traces)))
    given = _given_subsamples(spec)
    if given:
        raise ValueError(
            f"plate {_names(given)} is subsampled by indices that the model was given, and importance weights need all "
            "the data: give it all of them"
        )


def _refuse(what: str, sentences: list[str]) -> None:
    if sentences:
        raise ValueError(f"{what}: {'; '.join(sentences)}")


def _apart(program: BoundProgram) -> tuple[Sites, Sites]:
    """Return the sites of guide and model, each run by itself, as far as they run."""
    found = []
    for run in (program.guide, program.model):
        tracer = poutine.trace(run)
        try:
            with torch.no_grad(), poutine.block():
                tracer()
        except Exception:  # the caller has an error to raise already
            pass
        found.append(tracer.trace.nodes)
    return found[0], found[1]


def _clashes(guide: Sites, model: Sites) -> Iterator[str]:
    """Yield a sentence for each site at which the guide's value cannot be the model's."""
    for name, site in guide.items():
        if site["type"] == "sample" and isinstance(site["fn"], dist.Unit) and "has_rsample" not in vars(site["fn"]):
            yield (
                f"the guide's pyro.factor({name!r}, ...) must say whether it is a function of reparametrised draws, "
                "such as a log-determinant: has_rsample=True, or False"
            )
    for name, site in model.items():
        if name in guide and _is_plate(site) and _is_plate(guide[name]) and guide[name]["fn"].size != site["fn"].size:
            # The model would take the guide's indices, and so a part of its own.
            yield (
                f"plate {name!r} has size {site['fn'].size} in the model and {guide[name]['fn'].size} in the guide: "
                "plates of one name must have one size"
            )
        if not is_latent(site) or name not in guide:
            continue
        other = guide[name]
        kind = _kind(other)
        if kind:
            yield (
                f"site {name!r} is a latent of the model and {kind} in the guide, which must sample it: by "
                f"pyro.sample({name!r}, ...), of a value known already with dist.Delta"
            )
        else:
            yield from _shape_clash(name, site["fn"], other["fn"])


def _kind(site: dict[str, Any]) -> str:
    """Say what a site of a guide is that is no latent."""
    if site["type"] != "sample":
        return f"a pyro.{site['type']}"
    if is_deterministic(site):
        return "a pyro.deterministic"
    return "observed" if site["is_observed"] else ""


def _shape_clash(name: str, model: Any, guide: Any) -> Iterator[str]:
    if getattr(model, "event_dim", None) is None or getattr(guide, "event_dim", None) is None:
        return
    shapes = tuple(model.shape()), tuple(guide.shape())
    if model.event_dim != guide.event_dim:
        yield (
            f"site {name!r} has {model.event_dim} event dimensions in the model and {guide.event_dim} in the guide: "
            "they must be equal, by .to_event(...), and the rest be the same plates"
        )
    elif any(one != other for one, other in zip_longest(*map(reversed, shapes), fillvalue=1)):
        yield (
            f"site {name!r} has shape {shapes[0]} in the model and {shapes[1]} in the guide: the guide must sample it "
            "in the same shape, in plates of the same size and dimension"
        )


def _mismatches(pair: TracePair) -> list[Mismatch]:
    guide, model = pair.guide.nodes, pair.model.nodes
    latent = [name for name, site in model.items() if is_latent(site)]
    own = [name for name, site in guide.items() if is_latent(site) and not _is_auxiliary(site) and name not in latent]
    data = [name for name in own if name in model and is_data(model[name])]
    seen = [name for name, site in guide.items() if is_data(site) and not _is_auxiliary(site)]
    marked = [name for name in latent if name in guide and _is_auxiliary(guide[name])]
    plates = [name for name, site in guide.items() if _is_plate(site) and name not in model]
    extra = [name for name in own if name not in data]
    found = {
        f"the guide samples {_names(extra)}, which the model does not: take it out of the guide, or mark it "
        "infer={'is_auxiliary': True} if latents are made of it": (extra, True),
        f"the guide samples {_names(data)}, which the model observes: take it out of the guide": (data, True),
        f"the guide observes {_names(seen)}, and a guide has no data: take it out of the guide, or hide it by "
        f"poutine.block(guide, hide={seen})": (seen, True),
        f"the guide marks {_names(marked)} as auxiliary, which the model samples: leave the mark out": (marked, False),
        f"the guide has plate {_names(plates)}, which the model has not: give it the model's name": (plates, False),
    }
    return [Mismatch(sentence, counts) for sentence, (names, counts) in found.items() if names]


def _without_density(pair: TracePair) -> Iterator[str]:
    """Say where the guide's density is not one over the model's latents, by how many numbers it draws for them."""
    guide, model = pair.guide.nodes, pair.model.nodes
    images = [name for name, site in model.items() if is_latent(site) and _is_point(guide[name]["fn"])]
    sources = [
        name
        for name, site in guide.items()
        if is_latent(site) and name not in model and not _is_point(site["fn"]) and not _is_masked(site)
    ]
    # Densities of others may make up for an auxiliary variable's, as a factor can, and the components of our mixtures.
    made_up = any(isinstance(site.get("fn"), dist.Unit) for site in guide.values())
    alone = [] if made_up else [name for name in sources if not guide[name]["infer"].get("_summed_out", False)]
    if not sources and any(_density_is_one(guide[name]["fn"]) for name in images):
        yield _POINT.format(names=_names(images))
        return
    try:
        size = sum(bijection(model[name]).inverse_shape(model[name]["value"].shape).numel() for name in images)
    except (NotImplementedError, ValueError):  # a support whose dimension is not known
        return
    discrete = [name for name in alone if guide[name]["fn"].support.is_discrete]
    drawn = sum(guide[name]["value"].numel() for name in sources if not guide[name]["fn"].support.is_discrete)
    if alone and (discrete or drawn > size):
        yield (
            f"the guide draws auxiliary variables, {_names(discrete or alone)}, beside the latents that the model has, "
            "so that its density is of more than these: sum them out (a mixture as one distribution, "
            "dist.MixtureSameFamily), or make the latents functions of them, one to one"
        )
    elif sources and drawn < size:
        yield _POINT.format(names=f"some of {_names(images)}")


def _given_subsamples(spec: ProgramSpec) -> list[str]:
    """Return the plates that hold part of the data by indices that the model was given, which no draw chooses."""
    sites = [site for trace in spec.traces for site in trace.nodes.values() if site["type"] == "sample"]
    frames = {frame for site in sites for frame in site["cond_indep_stack"]}
    parts = {frame.name for frame in frames if frame.full_size is not None and frame.size < frame.full_size}
    return sorted(parts - set(spec.subsamples))


def _density_is_one(fn: Any) -> bool:
    return bool((torch.as_tensor(_innermost(fn).log_density) == 0).all())


def _is_point(fn: Any) -> bool:
    return isinstance(_innermost(fn), dist.Delta)


def _innermost(fn: Any) -> Any:
    """The distribution under a mask, an expansion, a transformation, `to_event`."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def _is_masked(site: dict[str, Any]) -> bool:
    return site["mask"] is False or getattr(site["fn"], "_mask", None) is False


def _is_auxiliary(site: dict[str, Any]) -> bool:
    return bool(site["infer"].get("is_auxiliary", False))


def _is_plate(site: dict[str, Any]) -> bool:
    return site["type"] == "sample" and is_subsample(site)


def _names(names: list[str]) -> str:
    return ", ".join(map(repr, names))
