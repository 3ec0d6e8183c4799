"""Animals that are there and not seen: capture-recapture, and occupancy."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_nf.models.discrete.designs import linear_predictor


def cormack_jolly_seber(captured: Tensor) -> None:
    """Capture-recapture of marked animals, which live on with probability `survival_t` and are caught with `recapture`.

    From its first capture on, an animal's state is `z_it ~ Bernoulli(z_{i,t-1} survival_{t-1})` and its captures are
    `captured_it ~ Bernoulli(z_it recapture)`. All probabilities are `Uniform(0, 1)`.

    Args:
        captured: Whether an animal was caught, `(animals, occasions)`, of 0 and 1, at least once each.

    References:
        Lebreton et al. (1992), "Modeling survival and testing biological hypotheses using marked animals".
    """
    num_animals, num_occasions = captured.shape
    zero = captured.new_tensor(0.0)
    recapture = pyro.sample("recapture", dist.Uniform(zero, 1.0))
    with pyro.plate("interval", num_occasions - 1):
        survival = pyro.sample("survival", dist.Uniform(zero, 1.0))
    is_marked = captured.cumsum(-1) > 0
    with pyro.plate("animal", num_animals):
        z = captured.new_tensor(1.0)
        for t in pyro.markov(range(1, num_occasions)):
            # An animal is alive for certain until it is caught for the first time.
            alive = torch.where(is_marked[:, t - 1], z * survival[t - 1], 1.0)
            z = pyro.sample(f"z_{t}", dist.Bernoulli(alive))
            with pyro.poutine.mask(mask=is_marked[:, t - 1]):
                pyro.sample(f"captured_{t}", dist.Bernoulli(z * recapture), obs=captured[:, t])


def occupancy(detections: Tensor, num_visits: int, x: Tensor | None = None) -> None:
    """Occupancy of sites: `z_i ~ Bernoulli(occupied_i)`, `detections_i ~ Binomial(num_visits, z_i detected)`.

    The priors: `detected ~ Uniform(0, 1)`; without columns `logit occupied = intercept ~ N(0, 1.5)`, near to uniform
    for the probability; with columns, standardized, `+ x_i . slope`, slopes `N(0, 1.5)`.

    Args:
        detections: In how many visits the species was seen, `(sites,)`.
        num_visits: Visits of each site.
        x: Columns that occupancy depends on, `(sites, p)`.

    References:
        MacKenzie et al. (2002), "Estimating site occupancy rates when detection probabilities are less than one".
    """
    detected = pyro.sample("detected", dist.Uniform(detections.new_tensor(0.0), 1.0))
    occupied = pyro.deterministic("occupied", linear_predictor(detections, x, 1.5).sigmoid())
    with pyro.plate("site", len(detections)):
        z = pyro.sample("z", dist.Bernoulli(occupied))
        pyro.sample("detections", dist.Binomial(num_visits, z * detected), obs=detections)
