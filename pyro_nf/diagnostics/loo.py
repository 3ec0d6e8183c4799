"""Leave-one-out cross-validation from the draws of a fitted guide."""

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import logsumexp

from pyro_nf.diagnostics.arviz_versions import elpd_data
from pyro_nf.diagnostics.local import named_rows
from pyro_nf.diagnostics.progress import Progress
from pyro_nf.diagnostics.weights import Floats, pareto_smooth
from pyro_nf.interface.arguments import check_has

if TYPE_CHECKING:
    import xarray

# Fewer draws have no tail that could be smoothed.
_MIN_DRAWS = 100


def loo(data: Any, *, var_name: str | None = None, progress: bool = True) -> Any:
    r"""Estimate how well a model predicts data that are left out, without fitting again (PSIS-LOO).

    For observation i, draws `z_s` of the guide get weights in proportion to `p(y, z_s) / (q(z_s) p(y_i | z_s))`, those
    of the posterior without i: `log_p - log_q - log_likelihood_i`, Pareto-smoothed. `arviz.loo` takes the draws to be
    exact and leaves `log_p - log_q` out. Then

    `elpd_i = log sum_s w_is p(y_i | z_s)`, and `elpd` is their sum.

    Takes and gives ArviZ's structures: `az.compare({"a": loo(a), "b": loo(b)})`, `az.plot_khat(loo(a))`.

    Args:
        data: What `to_arviz` returned, or the same read from a file.
        var_name: The observed site; may be left out where there is only one.
        progress: Whether to show a bar, on stderr, if it takes longer than about two seconds.

    Returns:
        `arviz.ELPDData` (ArviZ 0.x) or the one of `arviz_stats` (1.x), with pointwise values. Masked data are left out.
        The effective number of parameters is, as in ArviZ, over the draws as they are.

    Raises:
        ValueError: If `data` holds no `log_p`, `log_q` or `log_likelihood`, or fewer than 100 draws, `var_name` is
            missing or unknown, all data are masked, or a log-likelihood or a weight is not finite.

    Warns:
        UserWarning: If an observation's k-hat is too high for its estimate to be trusted; the result says for which.
            If draws lie outside the model's support, where `log_p` is minus infinity: they have no weight.

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
    log_ratio = _log_ratio(stats)
    values = log_lik.values.reshape(len(log_ratio), -1).astype(np.float64)  # (num_samples, num_data)
    seen = _seen(data, log_lik, values)
    _require_finite(str(log_lik.name), values, seen)
    outside = int(np.isneginf(log_ratio).sum())
    if outside:
        warnings.warn(
            f"{outside} of {len(values)} draws lie outside the model's support and have no weight: the guide has "
            "another support than the posterior",
            stacklevel=2,
        )
    columns = Progress("loo", progress).over("observations", values.T, values.shape[1])
    smoothed = [pareto_smooth(log_ratio - column) for column in columns]
    elpd = np.array([logsumexp(log_w + column) for (log_w, _), column in zip(smoothed, values.T, strict=True)])
    log_mean: Floats = logsumexp(values, 0) - np.log(len(values))
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
    check_has("data", data, ("get",), "what to_arviz returns")
    stats, log_liks = (data.get(group, {}) for group in ("sample_stats", "log_likelihood"))
    if not ("log_p" in stats and "log_q" in stats and len(log_liks)):
        raise ValueError(
            "data must hold log_likelihood, and log_p and log_q in sample_stats, as what to_arviz returns does; "
            "for exact draws take arviz.loo"
        )
    names = list(log_liks.data_vars)
    if var_name is None and len(names) == 1:
        var_name = names[0]
    if not isinstance(var_name, str) or var_name not in names:
        raise ValueError(f"var_name must be one of the observed sites {', '.join(map(repr, names))}; got {var_name!r}")
    return stats, log_liks[var_name].transpose("chain", "draw", ...)


def _log_ratio(stats: Any) -> Floats:
    """Return the draws' log weights `log_p - log_q`, `(num_samples,)`, minus infinity outside the support."""
    log_p, log_q = (np.ravel(stats[name]).astype(np.float64) for name in ("log_p", "log_q"))
    if len(log_p) < _MIN_DRAWS:
        raise ValueError(f"data must hold at least {_MIN_DRAWS} draws; got {len(log_p)}")
    outside = np.isneginf(log_p)
    for name, broken in (("log_p", ~np.isfinite(log_p) & ~outside), ("log_q", ~np.isfinite(log_q))):
        if broken.any():
            raise ValueError(
                f"data must hold finite weights; {name} in sample_stats is NaN or infinite for {int(broken.sum())} of "
                f"{len(log_p)} draws: the guide or the model is broken there"
            )
    if outside.all():
        raise ValueError("data must hold draws inside the model's support; log_p is minus infinity for all of them")
    ratio: Floats = log_p - log_q
    return ratio


def _require_finite(name: str, values: Floats, seen: Any) -> None:
    """Raise a `ValueError` that counts and names the observations whose log-likelihood is not finite in every draw."""
    broken = ~np.isfinite(values) & seen
    if broken.any():
        rows = broken.any(0).nonzero()[0].tolist()
        raise ValueError(
            f"data must hold finite log-likelihoods; that of {name!r} is NaN or infinite for "
            f"{int(broken.any(1).sum())} of {len(values)} draws at {len(rows)} of {values.shape[1]} observations, "
            f"{named_rows(rows)}"
        )


def _seen(data: Any, log_lik: "xarray.DataArray", values: Floats) -> Any:
    """Which observations are not masked (`to_arviz` shows those that are as NaN), flat."""
    if log_lik.name in data.get("observed_data", {}):
        observed = data["observed_data"][log_lik.name]
        # Of an observation of several numbers some may be missing: those that are there have a likelihood.
        any_seen = observed.notnull().any([dim for dim in observed.dims if dim not in log_lik.dims])
        seen = np.ravel(any_seen.broadcast_like(log_lik[0, 0]).transpose(*log_lik.dims[2:]))
    else:
        seen = np.ones(values.shape[1], dtype=bool)
        flat = (values == 0).all(0).nonzero()[0].tolist()
        if flat:
            raise ValueError(
                f"data must hold observed_data, which tells what is masked: the log-likelihood of {log_lik.name!r} is "
                f"0 in all draws for {len(flat)} of {len(seen)} observations, {named_rows(flat)}"
            )
    if not seen.any():
        raise ValueError(f"data must hold observations of {log_lik.name!r}; all {len(seen)} are masked")
    return seen


def _pointwise(values: Floats, seen: Any, log_lik: "xarray.DataArray") -> "xarray.DataArray":
    """Give each observation's value the observations' coordinates; masked ones go, and their grid with them."""
    result: xarray.DataArray = log_lik[0, 0].drop_vars(["chain", "draw"]).copy(data=values.reshape(log_lik.shape[2:]))
    return result if seen.all() else result.stack(observation=result.dims)[seen].reset_index("observation")
