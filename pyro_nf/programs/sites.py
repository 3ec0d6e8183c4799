"""What the sites of a trace are: latents, data, functions of others, local ones."""

from typing import Any

from pyro import poutine

from pyro_nf.programs._pyro import is_subsample


def local_plate(trace: poutine.Trace) -> Any:
    """The frame of the one plate in which every site of a model's trace stands, or `None`."""
    sites = [site for site in trace.nodes.values() if is_latent(site) or is_data(site) or is_enumerated(site)]
    frames = {site["cond_indep_stack"] for site in sites}
    return frames.pop()[0] if len(frames) == 1 and all(len(site["cond_indep_stack"]) == 1 for site in sites) else None


def subsample_scale(frame: Any) -> float:
    """By how much Pyro scales up what stands in a plate: 1 unless it is subsampled."""
    return 1.0 if frame.full_size is None else frame.full_size / frame.size


def nonreparam_sites(trace: poutine.Trace) -> list[str]:
    """Names of a guide's sites whose draws carry no gradient, as of a discrete variable."""
    return [name for name, site in trace.nodes.items() if is_latent(site) and not site["fn"].has_rsample]


def is_data(site: dict[str, Any]) -> bool:
    """Whether a site of a trace is observed data (not a deterministic, which Pyro also marks as observed)."""
    return site["type"] == "sample" and site["is_observed"] and not is_deterministic(site)


def is_deterministic(site: dict[str, Any]) -> bool:
    """Whether a site of a trace is a `pyro.deterministic`."""
    return site["type"] == "sample" and bool(site["infer"].get("_deterministic", False))


def is_latent(site: dict[str, Any]) -> bool:
    """Whether a site of a trace is a latent variable (not the indices of a subsampled plate, nor summed out)."""
    is_sampled = site["type"] == "sample" and not site["is_observed"] and not is_subsample(site)
    return is_sampled and not is_enumerated(site)


def is_enumerated(site: dict[str, Any]) -> bool:
    """Whether a site of a trace is a discrete latent that is summed out."""
    return bool(site["type"] == "sample" and site["infer"].get("_enumerated", False))


def latent_names(trace: poutine.Trace) -> set[str]:
    """Names of a trace's latents, but for auxiliary ones."""
    sites = trace.nodes.items()
    return {name for name, site in sites if is_latent(site) and not site["infer"].get("is_auxiliary")}


def detached(trace: poutine.Trace) -> poutine.Trace:
    """Return a copy of a trace whose values carry no gradient."""
    fixed = trace.copy()
    for name, site in trace.nodes.items():
        if site["type"] == "sample":
            fixed.nodes[name] = {**site, "value": site["value"].detach()}
    return fixed
