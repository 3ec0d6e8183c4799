"""Models with discrete latents, and data for each of them. The latents are summed out by the guides of this library."""

from pyro_nf.models.discrete.annotators import dawid_skene
from pyro_nf.models.discrete.counts import hurdle_poisson, zero_inflated_poisson
from pyro_nf.models.discrete.datasets import (
    Ratings,
    anesthesia_ratings,
    coal_mining_disasters,
    dippers,
    earthquakes,
    fetal_movements,
    galaxies,
    salamanders,
)
from pyro_nf.models.discrete.ecology import cormack_jolly_seber, occupancy
from pyro_nf.models.discrete.mixtures import gaussian_mixture
from pyro_nf.models.discrete.series import change_point, poisson_hidden_markov

__all__ = [
    "Ratings",
    "anesthesia_ratings",
    "change_point",
    "coal_mining_disasters",
    "cormack_jolly_seber",
    "dawid_skene",
    "dippers",
    "earthquakes",
    "fetal_movements",
    "galaxies",
    "gaussian_mixture",
    "hurdle_poisson",
    "occupancy",
    "poisson_hidden_markov",
    "salamanders",
    "zero_inflated_poisson",
]
