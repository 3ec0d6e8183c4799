"""The data of the models with discrete latents: numbers that were printed in papers and books."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

_GALAXIES = """
9.172 9.350 9.483 9.558 9.775 10.227 10.406 16.084 16.170 18.419 18.552 18.600 18.927 19.052 19.070 19.330 19.343
19.349 19.440 19.473 19.529 19.541 19.547 19.663 19.846 19.856 19.863 19.914 19.918 19.973 19.989 20.166 20.175 20.179
20.196 20.215 20.221 20.415 20.629 20.795 20.821 20.846 20.875 20.986 21.137 21.492 21.701 21.814 21.921 21.960 22.185
22.209 22.242 22.249 22.314 22.374 22.495 22.746 22.747 22.888 22.914 23.206 23.241 23.263 23.484 23.538 23.542 23.666
23.706 23.711 24.129 24.285 24.289 24.366 24.717 24.990 25.633 26.960 26.995 32.065 32.789 34.279
"""
_EARTHQUAKES = """
13 14 8 10 16 26 32 27 18 32 36 24 22 23 22 18 25 21 21 14 8 11 14 23 18 17 19 20 22 19 13 26 13 14 22 24 21 22 26 21 23
24 27 41 31 27 35 26 28 36 39 21 17 22 17 19 15 34 10 15 22 18 15 20 15 22 19 16 30 27 29 23 20 16 21 21 25 16 18 15 18
14 10 15 8 15 6 11 8 7 18 16 13 12 13 20 15 16 12 18 15 16 13 15 16 11 11
"""
_DISASTERS = """
4 5 4 1 0 4 3 4 0 6 3 3 4 0 2 6 3 3 5 4 5 3 1 4 4 1 5 5 3 4 2 5 2 2 3 4 2 1 3 2 2 1 1 1 1 3 0 0 1 0 1 1 0 0 3 1 0 3 2 2
0 1 1 1 0 1 0 1 0 0 0 2 1 0 0 0 1 1 0 2 3 3 1 1 2 1 1 1 1 2 4 2 0 0 0 1 4 0 0 0 1 0 0 0 0 0 1 0 0 1 0 1
"""
# A patient a word: the grade that each of the seven assessments gave, 1 to 4.
_RATINGS = """
1111111 3334334 1122122 2223121 2223222 2223322 1222111 3333433 2222223 2322223 4444444 2223343 1111111 2223212 1211111
1112111 1111111 1111111 2222221 2221322 2222222 2222221 2223222 2212222 1111111 1111111 2322222 1111111 1111111 1121121
1111111 3333233 1111111 2222222 2223232 4334343 2212232 2323233 3333432 1111111 1111111 1212111 2322222 1211111 2222222
"""
_ASSESSORS = (0, 0, 0, 1, 2, 3, 4)
# How many birds had a history of captures in the seven years.
_DIPPERS = {
    "0000001": 39,
    "0000010": 23,
    "0000011": 23,
    "0000100": 16,
    "0000110": 9,
    "0000111": 16,
    "0001000": 16,
    "0001001": 2,
    "0001011": 1,
    "0001100": 11,
    "0001110": 7,
    "0001111": 8,
    "0010000": 29,
    "0010110": 1,
    "0011000": 12,
    "0011100": 6,
    "0011110": 2,
    "0011111": 2,
    "0100000": 29,
    "0110000": 11,
    "0110110": 1,
    "0111000": 2,
    "0111100": 3,
    "0111110": 1,
    "0111111": 2,
    "1000000": 9,
    "1010000": 2,
    "1100000": 6,
    "1101110": 1,
    "1111000": 2,
    "1111100": 1,
    "1111110": 1,
}


class Ratings(NamedTuple):
    """What several annotators say of the same items.

    Attributes:
        labels: What each assessment of each item says, `(items, assessments)`, of 0 to classes - 1.
        annotators: Who made the assessment, `(assessments,)`, of 0 to annotators - 1.
    """

    labels: Tensor
    annotators: Tensor


def galaxies(**options: Any) -> Tensor:
    """Return the velocities of 82 galaxies of the Corona Borealis region, in 1,000 km/s, `(82,)`.

    Args:
        **options: `dtype` and `device` of the tensor, as for the other data of this module.

    References:
        Roeder (1990), "Density estimation with confidence sets exemplified by superclusters and voids in the
        galaxies", table 1.
    """
    return torch.tensor([float(word) for word in _GALAXIES.split()], **options)


def earthquakes(**options: Any) -> Tensor:
    """Return the numbers of earthquakes of magnitude 7 or more in the world, each year from 1900 to 2006, `(107,)`.

    References:
        Zucchini, MacDonald and Langrock (2016), "Hidden Markov models for time series", 2nd edition, table 1.1.
    """
    return _counts(_EARTHQUAKES, **options)


def coal_mining_disasters(**options: Any) -> Tensor:
    """Return the numbers of disasters in British coal mines, each year from 1851 to 1962, `(112,)`.

    References:
        Jarrett (1979), "A note on the intervals between coal-mining disasters"; Carlin, Gelfand and Smith (1992),
        "Hierarchical Bayesian analysis of changepoint problems".
    """
    return _counts(_DISASTERS, **options)


def fetal_movements(**options: Any) -> Tensor:
    """Return how often a fetal lamb moved in each of 240 intervals of 5 seconds, in no order, `(240,)`.

    References:
        Leroux and Puterman (1992), "Maximum-penalized-likelihood estimation for independent and Markov-dependent
        mixture models".
    """
    numbers = {0: 182, 1: 41, 2: 12, 3: 2, 4: 2, 7: 1}
    return torch.tensor([float(value) for value, number in numbers.items() for _ in range(number)], **options)


def anesthesia_ratings(device: torch.device | str | None = None) -> Ratings:
    """Return what five anesthetists said of 45 patients' fitness; the first of them said it three times.

    References:
        Dawid and Skene (1979), "Maximum likelihood estimation of observer error-rates using the EM algorithm", table 1.
    """
    labels = [[int(letter) - 1 for letter in word] for word in _RATINGS.split()]
    return Ratings(torch.tensor(labels, device=device), torch.tensor(_ASSESSORS, device=device))


def dippers(**options: Any) -> Tensor:
    """Return whether each of 294 European dippers was caught in each year from 1981 to 1987, `(294, 7)`, of 0 and 1.

    References:
        Marzolin (1988); Lebreton et al. (1992), "Modeling survival and testing biological hypotheses using marked
        animals: a unified approach with case studies".
    """
    rows = [[float(letter) for letter in word] for word, number in _DIPPERS.items() for _ in range(number)]
    return torch.tensor(rows, **options)


def salamanders(**options: Any) -> Tensor:
    """Return in how many of 5 visits Blue Ridge two-lined salamanders were seen at each of 39 sites, `(39,)`.

    References:
        MacKenzie et al. (2006), "Occupancy estimation and modeling", section 4.3.
    """
    numbers = {4: 1, 3: 4, 2: 1, 1: 12, 0: 21}
    return torch.tensor([float(value) for value, number in numbers.items() for _ in range(number)], **options)


def _counts(text: str, **options: Any) -> Tensor:
    return torch.tensor([float(word) for word in text.split()], **options)
