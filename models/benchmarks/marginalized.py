"""The models with discrete latents of `pyro_nf.models.discrete`, their latents summed out by hand.

Each is its model written once more, with the same continuous sites and one `pyro.factor` for the rows: what a user of
Stan has to write. They prove the sums that the library makes by itself.
"""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


def gaussian_mixture(y: Tensor, num_components: int = 2, center: float = 0.0, spread: float = 1.0) -> None:
    """Rows are `logsumexp_k log share_k + log N(y_i | loc_k, scale_k)`."""
    share = pyro.sample("share", dist.Dirichlet(y.new_ones(num_components)))
    lowest = pyro.sample("lowest", dist.Normal(y.new_tensor(center - spread), spread))
    gap = pyro.sample("gap", dist.HalfNormal(spread).expand([num_components - 1]).to_event(1))
    scale = pyro.sample(
        "scale", dist.LogNormal(y.new_tensor(spread / 4).log(), 1.0).expand([num_components]).to_event(1)
    )
    loc = lowest + torch.cat([y.new_zeros(1), gap.cumsum(-1)])
    pyro.factor("rows", (share.log() + dist.Normal(loc, scale).log_prob(y[:, None])).logsumexp(-1).sum())


def poisson_hidden_markov(y: Tensor, num_states: int = 2, mean: float = 10.0) -> None:
    """Rows are the forward algorithm's."""
    concentration = 1.0 + 8.0 * torch.eye(num_states, dtype=y.dtype, device=y.device)
    log_transition = pyro.sample("transition", dist.Dirichlet(concentration).to_event(1)).log()
    lowest = pyro.sample("log_lowest", dist.Normal(y.new_tensor(mean).log(), 1.0))
    gap = pyro.sample("log_gap", dist.HalfNormal(y.new_tensor(1.0)).expand([num_states - 1]).to_event(1))
    rate = (lowest + torch.cat([y.new_zeros(1), gap.cumsum(-1)])).exp()
    emission = dist.Poisson(rate).log_prob(y[:, None])
    alpha = emission[0] - y.new_tensor(float(num_states)).log()
    for row in emission[1:]:
        alpha = (alpha[:, None] + log_transition).logsumexp(0) + row
    pyro.factor("rows", alpha.logsumexp(-1))


def change_point(y: Tensor, mean: float = 1.0) -> None:
    """Rows are `logsumexp_c -log n + sum_{t < c} log Poisson(y_t | early) + sum_{t >= c} log Poisson(y_t | late)`."""
    early = dist.Poisson(pyro.sample("early", dist.Exponential(y.new_tensor(1 / mean)))).log_prob(y)
    late = dist.Poisson(pyro.sample("late", dist.Exponential(y.new_tensor(1 / mean)))).log_prob(y)
    before = early.cumsum(-1) - early
    after = late.sum(-1) - late.cumsum(-1) + late
    pyro.factor("rows", (before + after).logsumexp(-1) - y.new_tensor(float(len(y))).log())


def zero_inflated_poisson(y: Tensor) -> None:
    """Rows are `log((y_i = 0) (1 - share) + share Poisson(y_i | rate))`."""
    share = pyro.sample("share", dist.Uniform(y.new_tensor(0.0), 1.0))
    rate = pyro.sample("intercept", dist.Normal(y.new_tensor(0.0), 2.0)).exp()
    seen = share.log() + dist.Poisson(rate).log_prob(y)
    pyro.factor("rows", torch.where(y == 0, torch.logaddexp(seen, torch.log1p(-share)), seen).sum())


def cormack_jolly_seber(captured: Tensor) -> None:
    """Rows are known up to the last capture; `never[t]` is the probability of no capture after occasion t."""
    zero, num_intervals = captured.new_tensor(0.0), captured.shape[-1] - 1
    recapture = pyro.sample("recapture", dist.Uniform(zero, 1.0))
    survival = pyro.sample("survival", dist.Uniform(zero, 1.0).expand([num_intervals]).to_event(1))
    never = [captured.new_tensor(1.0)]
    for t in reversed(range(num_intervals)):
        never.insert(0, 1 - survival[t] + survival[t] * (1 - recapture) * never[0])
    time = torch.arange(num_intervals + 1, device=captured.device)
    first = captured.argmax(-1)
    last = torch.where(captured > 0, time, -1).amax(-1)
    is_known = (time[1:] > first[:, None]) & (time[1:] <= last[:, None])
    rows = survival.log() + dist.Bernoulli(recapture).log_prob(captured[:, 1:])
    pyro.factor("rows", torch.where(is_known, rows, 0.0).sum() + torch.stack(never)[last].log().sum())


def occupancy(detections: Tensor, num_visits: int) -> None:
    """Rows are `log((detections_i = 0) (1 - occupied) + occupied Binomial(detections_i | num_visits, detected))`."""
    detected = pyro.sample("detected", dist.Uniform(detections.new_tensor(0.0), 1.0))
    occupied = pyro.sample("intercept", dist.Normal(detections.new_tensor(0.0), 1.5)).sigmoid()
    seen = occupied.log() + dist.Binomial(num_visits, detected).log_prob(detections)
    rows = torch.where(detections == 0, torch.logaddexp(seen, torch.log1p(-occupied)), seen)
    pyro.factor("rows", rows.sum())


def dawid_skene(labels: Tensor, annotators: Tensor) -> None:
    """Rows are `logsumexp_k log share_k + sum_j log confusion[annotator_j, k, labels_ij]`."""
    like = torch.ones(int(labels.max()) + 1, device=labels.device)
    share = pyro.sample("share", dist.Dirichlet(like))
    prior = dist.Dirichlet(like + 3.0 * torch.diag(like)).expand([int(annotators.max()) + 1, len(like)])
    confusion = pyro.sample("confusion", prior.to_event(2))
    said = confusion.log()[annotators, :, labels].sum(-2)
    pyro.factor("rows", (share.log() + said).logsumexp(-1).sum())
