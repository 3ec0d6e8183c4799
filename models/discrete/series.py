"""Series of counts: a hidden Markov model, and a change point."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


def poisson_hidden_markov(y: Tensor, num_states: int = 2, mean: float = 10.0) -> None:
    """Hidden Markov model of counts: `z_t ~ Categorical(transition[z_{t-1}])`, `y_t ~ Poisson(rate[z_t])`.

    The priors: the first state has equal probabilities; `transition[k] ~ Dirichlet`, with the concentration 9 for
    staying and 1 for each other state; the rates are in order, `log rate_1 ~ N(log mean, 1)` and
    `log rate_{k+1} - log rate_k ~ HalfNormal(1)`.

    Args:
        y: Counts in the order of time, `(n,)`.
        num_states: K.
        mean: A count that would not surprise.
    """
    with pyro.plate("state", num_states):
        concentration = 1.0 + 8.0 * torch.eye(num_states, dtype=y.dtype, device=y.device)
        transition = pyro.sample("transition", dist.Dirichlet(concentration))
    lowest = pyro.sample("log_lowest", dist.Normal(y.new_tensor(mean).log(), 1.0))
    with pyro.plate("gaps", num_states - 1):
        gap = pyro.sample("log_gap", dist.HalfNormal(y.new_tensor(1.0)))
    log_rate = lowest + torch.cat([y.new_zeros(1), gap.cumsum(-1)])
    rate = pyro.deterministic("rate", log_rate.exp(), event_dim=1)
    probs = y.new_full((num_states,), 1 / num_states)
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(probs))
        pyro.sample(f"y_{t}", dist.Poisson(rate[z]), obs=y[t])
        probs = transition[z]


def change_point(y: Tensor, mean: float = 1.0) -> None:
    """Counts whose rate changes once: `y_t ~ Poisson(early)` for t < change, and `Poisson(late)` from then on.

    The priors: `change` takes 0 to n - 1 with equal probabilities, `early` and `late` are `Exponential(1 / mean)`.

    Args:
        y: Counts in the order of time, `(n,)`.
        mean: A count that would not surprise.
    """
    early = pyro.sample("early", dist.Exponential(y.new_tensor(1 / mean)))
    late = pyro.sample("late", dist.Exponential(y.new_tensor(1 / mean)))
    change = pyro.sample("change", dist.Categorical(y.new_ones(len(y))))
    with pyro.plate("time", len(y)):
        is_early = torch.arange(len(y), device=y.device) < change
        pyro.sample("y", dist.Poisson(torch.where(is_early, early, late)), obs=y)
