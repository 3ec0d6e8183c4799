"""Is a port right? Identities that the reference draws satisfy under the right density, and its evidence.

`python benchmarks/posteriordb_ports.py` runs them over all posteriors.
"""

import math
from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_nf.interface.arguments import Size, checked
from pyro_nf.models.benchmarks.posteriordb.loader import Posterior
from pyro_nf.models.benchmarks.posteriordb.real_line import log_density, on_real_line

# Draws that are run at once.
_CHUNK = 1000
# Draws in a batch: the chains of posteriordb are thinned until draws are all but independent.
_BATCH = 50
# Degrees of freedom of the proposal: with fewer its variance is barely finite, with more its tails are too light.
_DF = 5.0


class Evidence(NamedTuple):
    """An estimate of `log p(data)`.

    Attributes:
        log_evidence: In nats.
        se: Its standard error.
        ess_fraction: Effective draws of each draw.
    """

    log_evidence: float
    se: float
    ess_fraction: float


@checked
def stein_scores(posterior: Posterior) -> dict[str, Tensor]:
    r"""Return z-scores of Stein's identities, `E[g_j] = 0` and `E[(z_j - E z_j) g_j] = -1`, over the reference draws.

    z are the latents on the real line and `g = grad log p(z)`. The first identity sees a density that is displaced, the
    second one that is too wide or too narrow. If the density is right, each score is nearly N(0, 1). Standard errors
    come from the means of batches of 50 draws, and so allow for autocorrelation.

    Args:
        posterior: With reference draws.

    Returns:
        The scores `"shift"` and `"spread"`, `(dim,)` each.

    Raises:
        ValueError: If there are no reference draws.

    References:
        Stein (1981), "Estimation of the mean of a multivariate normal distribution", lemma 2; Gorham, Mackey (2015),
        "Measuring sample quality with Stein's method", arXiv:1506.03039, section 2; Flegal, Jones (2010), "Batch means
        and spectral variance estimators in Markov chain Monte Carlo", arXiv:0811.1729.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_nf.models.benchmarks import posteriordb
        >>> def wide():
        ...     pyro.sample("z", dist.Normal(torch.tensor(0.0), 2.0))
        >>> draws = {"z": torch.randn(10, 1000, generator=torch.Generator().manual_seed(0))}
        >>> scores = posteriordb.stein_scores(posteriordb.Posterior("wide", wide, (), draws))
        >>> bool(scores["shift"].abs() < 4), bool(scores["spread"].abs() < 4)
        (True, False)
    """
    z, density = _reference(posterior), log_density(posterior)
    gradient = torch.cat([torch.func.vmap(torch.func.grad(density))(part) for part in z.split(_CHUNK)])
    return {"shift": _scores(gradient), "spread": _scores((z - z.mean(0)) * gradient + 1)}


@checked
def importance_evidence(posterior: Posterior, num_draws: Size = 10_000, seed: int = 0) -> Evidence:
    """Estimate the evidence by importance sampling from a Student-t with the reference draws' mean and covariance.

    Args:
        posterior: With reference draws.
        num_draws: Draws of the Student-t, on the real line.
        seed: Of these draws.

    Raises:
        ValueError: If there are no reference draws.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_nf.models.benchmarks import posteriordb
        >>> def half():
        ...     pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        ...     pyro.factor("half", torch.tensor(0.5).log())
        >>> draws = {"z": torch.randn(10, 1000, generator=torch.Generator().manual_seed(0))}
        >>> round(posteriordb.importance_evidence(posteriordb.Posterior("half", half, (), draws)).log_evidence, 1)
        -0.7
    """
    z, density = _reference(posterior), log_density(posterior)
    # The covariance of a Student-t is df / (df - 2) times its scale matrix; torch's of one coordinate is a scalar.
    scale_tril = torch.linalg.cholesky(torch.atleast_2d(z.T.cov()) * (_DF - 2) / _DF)
    proposal = dist.MultivariateStudentT(z.new_tensor(_DF), z.mean(0), scale_tril)
    with torch.random.fork_rng([z.device] if z.is_cuda else []), torch.no_grad():
        torch.manual_seed(seed)
        draws = proposal.sample((num_draws,))
        log_p = torch.cat([torch.func.vmap(density)(part) for part in draws.split(_CHUNK)])
    log_weights = log_p - proposal.log_prob(draws)
    log_evidence = float(log_weights.logsumexp(0)) - math.log(num_draws)
    weights = (log_weights - log_evidence).exp()
    se = float(weights.std()) / math.sqrt(num_draws)
    return Evidence(log_evidence, se, float(1 / weights.square().mean()))


def _reference(posterior: Posterior) -> Tensor:
    """Return the reference draws on the real line, the latents side by side, `(num_draws, dim)`."""
    return torch.cat([values.reshape(len(values), -1) for values in on_real_line(posterior).values()], 1)


def _scores(terms: Tensor) -> Tensor:
    """Return means over standard errors, by whole batches, `(num_draws, dim) -> (dim,)`."""
    means = terms[: len(terms) // _BATCH * _BATCH].unflatten(0, (-1, _BATCH)).mean(1)
    scores: Tensor = means.mean(0) / means.std(0) * math.sqrt(len(means))
    return scores
