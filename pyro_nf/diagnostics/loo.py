"""Leave-one-out cross-validation from the draws of a fitted guide."""

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import logsumexp

from pyro_nf.diagnostics.arviz_versions import elpd_data
from pyro_nf.diagnostics.weights import Floats, pareto_smooth

if TYPE_CHECKING:
    import xarray


def loo(data: Any, *, var_name: str | None = None) -> Any:
    r"""Estimate how well a model predicts data that are left out, without fitting again (PSIS-LOO).

    For observation i, draws `z_s` of the guide get weights in proportion to `p(y, z_s) / (q(z_s) p(y_i | z_s))`, those
    of the posterior without i: `log_p - log_q - log_likelihood_i`, Pareto-smoothed. `arviz.loo` takes the draws to be
    exact and leaves `log_p - log_q` out. Then

    `elpd_i = log sum_s w_is p(y_i | z_s)`, and `elpd` is their sum.

    Takes and gives ArviZ's structures: `az.compare({"a": loo(a), "b": loo(b)})`, `az.plot_khat(loo(a))`.

    Args:
        data: What `to_arviz` returned, or the same read from a file.
        var_name: The observed site; may be left out where there is only one.

    Returns:
        `arviz.ELPDData` (ArviZ 0.x) or the one of `arviz_stats` (1.x), with pointwise values. Masked data are left out.
        The effective number of parameters is, as in ArviZ, over the draws as they are.

    Raises:
        ValueError: If `data` holds no `log_p`, `log_q` or `log_likelihood`, `var_name` is missing or unknown, or a
            log-likelihood is not finite.

    Warns:
        UserWarning: If an observation's k-hat is too high for its estimate to be trusted; the result says for which.

    References:
        Magnusson, Andersen, Jonasson, Vehtari (2019), "Bayesian leave-one-out cross-validation for large data",
        arXiv:1904.10679; Vehtari, Gelman, Gabry (2017), arXiv:1507.04544.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_nf.diagnostics import loo, to_arviz
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("unit", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> def guide(y):  # the exact posterior
        ...     pyro.sample("mu", dist.Normal(y.sum() / (len(y) + 1), (len(y) + 1) ** -0.5))
        >>> _ = pyro.set_rng_seed(0)
        >>> found = loo(to_arviz(model, guide, torch.tensor([0.5, -1.0, 2.0, 1.5])))
        >>> int(found["n_data_points"]), bool(found["warning"])
        (4, False)
    """
    stats, log_lik = _samples(data, var_name)
    log_ratio = np.ravel(stats["log_p"] - stats["log_q"])
    values = log_lik.values.reshape(len(log_ratio), -1).astype(np.float64)  # (num_samples, num_data)
    if not np.isfinite(values).all():
        raise ValueError(
            f"data must hold finite log-likelihoods; that of {log_lik.name!r} is not for "
            f"{int((~np.isfinite(values)).sum())} of {values.size}"
        )
    smoothed = [pareto_smooth(log_ratio - column) for column in values.T]
    elpd = np.array([logsumexp(log_w + column) for (log_w, _), column in zip(smoothed, values.T, strict=True)])
    log_mean: Floats = logsumexp(values, 0) - np.log(len(values))
    seen = _seen(data, log_lik)
    good_k = float(min(1 - 1 / np.log10(len(values)), 0.7))
    khat = np.array([k for _, k in smoothed])
    high = int((khat[seen] > good_k).sum())
    if high:
        warnings.warn(
            f"k-hat is above {good_k:.2f} for {high} of {int(seen.sum())} observations: they are too influential, or "
            "the guide is too far from the posterior, for their estimates to be trusted",
            stacklevel=2,
        )
    elpd_i, khat_i, p_loo_i = (_pointwise(each, seen, log_lik) for each in (elpd, khat, log_mean - elpd))
    return elpd_data(elpd_i, khat_i, p_loo_i, num_samples=len(values), good_k=good_k)


def _samples(data: Any, var_name: str | None) -> tuple[Any, "xarray.DataArray"]:
    """Return `sample_stats` and one site's log-likelihood, `(chain, draw, *shape)`."""
    stats, log_liks = (data.get(group, {}) for group in ("sample_stats", "log_likelihood"))
    if not ("log_p" in stats and "log_q" in stats and len(log_liks)):
        raise ValueError(
            "data must hold log_likelihood, and log_p and log_q in sample_stats, as what to_arviz returns does; "
            "for exact draws take arviz.loo"
        )
    names = list(log_liks.data_vars)
    if var_name is None and len(names) == 1:
        var_name = names[0]
    if var_name not in names:
        raise ValueError(f"var_name must be one of the observed sites {', '.join(map(repr, names))}; got {var_name!r}")
    return stats, log_liks[var_name].transpose("chain", "draw", ...)


def _seen(data: Any, log_lik: "xarray.DataArray") -> Any:
    """Which observations are not masked (`to_arviz` shows those that are as NaN), flat."""
    if log_lik.name not in data.get("observed_data", {}):
        return np.ones(log_lik[0, 0].size, dtype=bool)
    observed = data["observed_data"][log_lik.name]
    seen = observed.notnull().all([dim for dim in observed.dims if dim not in log_lik.dims])
    return np.ravel(seen.broadcast_like(log_lik[0, 0]).transpose(*log_lik.dims[2:]))


def _pointwise(values: Floats, seen: Any, log_lik: "xarray.DataArray") -> "xarray.DataArray":
    """Give each observation's value the observations' coordinates; masked ones go, and their grid with them."""
    result: xarray.DataArray = log_lik[0, 0].drop_vars(["chain", "draw"]).copy(data=values.reshape(log_lik.shape[2:]))
    return result if seen.all() else result.stack(observation=result.dims)[seen].reset_index("observation")
