"""Models and data to start from. A model knows nothing of its posterior's family."""

from pyro_nf.models import eight_schools, fertility, hard_posteriors, motorcycle, posteriordb
from pyro_nf.models.digits import Digits, load_digits
from pyro_nf.models.dlgm import DLGM, bernoulli_likelihood, normal_likelihood

__all__ = [
    "DLGM",
    "Digits",
    "bernoulli_likelihood",
    "eight_schools",
    "fertility",
    "hard_posteriors",
    "load_digits",
    "motorcycle",
    "normal_likelihood",
    "posteriordb",
]
