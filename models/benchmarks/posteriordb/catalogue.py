"""Which model each posterior is of, and how its arguments are made of posteriordb's data."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pyro_nf.models import eight_schools
from pyro_nf.models.benchmarks.posteriordb import (
    differential_equations,
    gaussian_processes,
    mixtures,
    regressions,
    time_series,
)

Floats = npt.NDArray[np.float64]
Data = Mapping[str, Any]
"""A data set as posteriordb has it: arrays in float64, and plain numbers."""


def _nothing(draws: Mapping[str, Floats]) -> dict[str, Floats]:
    return {}


class Entry(NamedTuple):
    """How a posterior is made.

    Attributes:
        model: The Pyro model.
        arguments: Makes its arguments of the data: arrays, which become tensors, and integers.
        derived: Computes those latents that the reference draws only imply.
    """

    model: Callable[..., Any]
    arguments: Callable[[Data], tuple[Floats | int, ...]]
    derived: Callable[[Mapping[str, Floats]], dict[str, Floats]] = _nothing


def _columns(*columns: Floats | float) -> Floats:
    return np.stack(np.broadcast_arrays(*columns), -1)


def _interaction(a: Floats, b: Floats) -> Floats:
    return _columns(1.0, a, b, a * b)


def _standardized(x: Floats) -> Floats:
    scores: Floats = (x - x.mean()) / x.std(ddof=1)
    return scores


def _kidscore_interaction_c(d: Data) -> tuple[Floats, Floats]:
    return _interaction(d["mom_hs"] - d["mom_hs"].mean(), d["mom_iq"] - d["mom_iq"].mean()), d["kid_score"]


def _kidscore_interaction_z(d: Data) -> tuple[Floats, Floats]:
    return _interaction(_standardized(d["mom_hs"]) / 2, _standardized(d["mom_iq"]) / 2), d["kid_score"]


def _logearn_interaction_z(d: Data) -> tuple[Floats, Floats]:
    z = _standardized(d["height"])
    return _columns(1.0, z, d["male"], z * d["male"]), np.log(d["earn"])


def _logmesquite(d: Data) -> tuple[Floats, Floats]:
    sizes = (np.log(d[name]) for name in ("diam1", "diam2", "canopy_height", "total_height", "density"))
    return _columns(1.0, *sizes, d["group"]), np.log(d["weight"])


def _logmesquite_logvolume(d: Data) -> tuple[Floats, Floats]:
    return _columns(1.0, _log_volume(d)), np.log(d["weight"])


def _logmesquite_logva(d: Data) -> tuple[Floats, Floats]:
    return _columns(1.0, _log_volume(d), np.log(d["diam1"] * d["diam2"]), d["group"]), np.log(d["weight"])


def _logmesquite_logvas(d: Data) -> tuple[Floats, Floats]:
    area, shape = np.log(d["diam1"] * d["diam2"]), np.log(d["diam1"] / d["diam2"])
    others = np.log(d["total_height"]), np.log(d["density"]), d["group"]
    return _columns(1.0, _log_volume(d), area, shape, *others), np.log(d["weight"])


def _log_volume(d: Data) -> Floats:
    logs: Floats = np.log(d["diam1"] * d["diam2"] * d["canopy_height"])
    return logs


def _nes(d: Data) -> tuple[Floats, Floats]:
    ages = ((d["age_discrete"] == age).astype(np.float64) for age in (2, 3, 4))
    x = _columns(1.0, d["real_ideo"], d["race_adj"], *ages, d["educ1"], d["gender"], d["income"])
    return x, d["partyid7"]


def _diamonds(d: Data) -> tuple[Floats, Floats]:
    x = d["X"][:, 1:]  # without the intercept's ones
    return x - x.mean(0), d["Y"]


def _schools(d: Data) -> tuple[Floats, Floats]:
    return d["sigma"], d["y"]


def _noncentered(draws: Mapping[str, Floats]) -> dict[str, Floats]:
    return {"theta_trans": (draws["theta"] - draws["mu"][..., None]) / draws["tau"][..., None]}


def _share(draws: Mapping[str, Floats]) -> dict[str, Floats]:
    return {"beta1_share": draws["beta1"] / (1 - draws["alpha1"])}


ENTRIES = {
    "earnings-log10earn_height": Entry(regressions.flat, lambda d: (_columns(1.0, d["height"]), np.log10(d["earn"]))),
    "earnings-logearn_height": Entry(regressions.flat, lambda d: (_columns(1.0, d["height"]), np.log(d["earn"]))),
    "earnings-logearn_height_male": Entry(
        regressions.flat, lambda d: (_columns(1.0, d["height"], d["male"]), np.log(d["earn"]))
    ),
    "earnings-logearn_interaction_z": Entry(regressions.flat, _logearn_interaction_z),
    "earnings-logearn_logheight_male": Entry(
        regressions.flat, lambda d: (_columns(1.0, np.log(d["height"]), d["male"]), np.log(d["earn"]))
    ),
    "kidiq-kidscore_momhs": Entry(
        regressions.half_cauchy_scale, lambda d: (_columns(1.0, d["mom_hs"]), d["kid_score"])
    ),
    "kidiq-kidscore_momiq": Entry(
        regressions.half_cauchy_scale, lambda d: (_columns(1.0, d["mom_iq"]), d["kid_score"])
    ),
    "kidiq-kidscore_momhsiq": Entry(
        regressions.half_cauchy_scale, lambda d: (_columns(1.0, d["mom_hs"], d["mom_iq"]), d["kid_score"])
    ),
    "kidiq_with_mom_work-kidscore_interaction_c": Entry(regressions.flat, _kidscore_interaction_c),
    "kidiq_with_mom_work-kidscore_interaction_c2": Entry(
        regressions.flat, lambda d: (_interaction(d["mom_hs"] - 0.5, d["mom_iq"] - 100), d["kid_score"])
    ),
    "kidiq_with_mom_work-kidscore_interaction_z": Entry(regressions.flat, _kidscore_interaction_z),
    "mesquite-logmesquite": Entry(regressions.flat, _logmesquite),
    "mesquite-logmesquite_logvolume": Entry(regressions.flat, _logmesquite_logvolume),
    "mesquite-logmesquite_logva": Entry(regressions.flat, _logmesquite_logva),
    "mesquite-logmesquite_logvas": Entry(regressions.flat, _logmesquite_logvas),
    "nes1972-nes": Entry(regressions.flat, _nes),
    "nes1980-nes": Entry(regressions.flat, _nes),
    "nes1988-nes": Entry(regressions.flat, _nes),
    "nes1996-nes": Entry(regressions.flat, _nes),
    "sblrc-blr": Entry(regressions.normal_coefficients, lambda d: (d["X"], d["y"])),
    "diamonds-diamonds": Entry(regressions.centered_regressors, _diamonds),
    "eight_schools-eight_schools_centered": Entry(eight_schools.centered, _schools),
    "eight_schools-eight_schools_noncentered": Entry(eight_schools.noncentered, _schools, _noncentered),
    "low_dim_gauss_mix-low_dim_gauss_mix": Entry(mixtures.two_normals, lambda d: (d["y"],)),
    "arK-arK": Entry(time_series.autoregression, lambda d: (d["y"], d["K"])),
    "garch-garch11": Entry(time_series.garch, lambda d: (d["y"], np.array(d["sigma1"], np.float64)), _share),
    "bball_drive_event_0-hmm_drive_0": Entry(time_series.hidden_markov, lambda d: (d["u"], d["v"], d["alpha"])),
    "gp_pois_regr-gp_regr": Entry(gaussian_processes.gaussian_process, lambda d: (d["x"], d["y"])),
    "hudson_lynx_hare-lotka_volterra": Entry(
        differential_equations.lotka_volterra, lambda d: (d["ts"], d["y_init"], d["y"])
    ),
}
"""`{name: Entry}` of every posterior that is here as a Pyro model."""
