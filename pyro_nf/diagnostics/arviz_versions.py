"""ArviZ's own objects: the one file of these tools that asks whether ArviZ 0.x or 1.x is installed."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import xarray


def inference_data(groups: Mapping[str, "xarray.Dataset"]) -> Any:
    """Put groups together: `arviz.InferenceData` in ArviZ 0.x, `xarray.DataTree` in 1.x."""
    import arviz  # here, because it takes seconds to import
    import xarray

    return arviz.InferenceData(**groups) if _is_old() else xarray.DataTree.from_dict(dict(groups))


def elpd_data(
    elpd: "xarray.DataArray", khat: "xarray.DataArray", p_loo: "xarray.DataArray", num_samples: int, good_k: float
) -> Any:
    """Put the result of a leave-one-out cross-validation into ArviZ's own class, with the sums that it has.

    Args:
        elpd: Log predictive density of each observation left out.
        khat: Pareto shape of each observation's weights.
        p_loo: Each observation's part in the effective number of parameters.
        num_samples: Draws.
        good_k: Up to where a k-hat is good.
    """
    warning = bool((khat > good_k).any())
    if _is_old():
        from arviz.stats import ELPDData

        return ELPDData(
            {
                "elpd_loo": float(elpd.sum()),  # first: ArviZ reads the kind of result off it
                "se": float(np.sqrt(elpd.size * elpd.var())),
                "p_loo": float(p_loo.sum()),
                "n_samples": num_samples,
                "n_data_points": elpd.size,
                "warning": warning,
                "loo_i": elpd.rename("loo_i"),
                "pareto_k": khat.rename("pareto_shape"),
                "scale": "log",
                "good_k": good_k,
            }
        )
    from arviz_stats import utils

    total, se, p, _ = elpd.azstats.loo_summary(p_loo)
    make = getattr(utils, "ELPDDataLOO", partial(utils.ELPDData, kind="loo"))  # a class of its own since 1.3
    return make(
        elpd=total,
        se=se,
        p=p,
        n_samples=num_samples,
        n_data_points=elpd.size,
        scale="log",
        warning=warning,
        good_k=good_k,
        elpd_i=elpd.rename("elpd_i"),
        pareto_k=khat.rename("pareto_k"),
        approx_posterior=True,
    )


def psislw(log_weights: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], float]:
    """Return Pareto-smoothed, normalised log weights and k-hat."""
    import arviz

    with np.errstate(over="ignore"):  # of candidates for the fit of the tail whose weight is the inverse
        if _is_old():
            smoothed, khat = arviz.psislw(log_weights)
        else:
            from arviz_stats.base import array_stats

            smoothed, khat = array_stats.psislw(-log_weights)  # it takes log likelihoods, the weights' inverses
    return np.asarray(smoothed), float(khat)


def _is_old() -> bool:
    import arviz

    return bool(arviz.__version__.startswith("0."))
