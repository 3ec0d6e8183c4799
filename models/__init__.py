"""Models and data to start from. A model knows nothing of its posterior's family."""

from pyro_nf.models import eight_schools, fertility, hard_posteriors, motorcycle, posteriordb
from pyro_nf.models.digits import Digits, load_digits
from pyro_nf.models.dlgm import DLGM, VAE
from pyro_nf.models.likelihoods import (
    BernoulliLikelihood,
    CategoricalLikelihood,
    Likelihood,
    LogisticMixtureLikelihood,
    NormalLikelihood,
)

__all__ = [
    "DLGM",
    "VAE",
    "BernoulliLikelihood",
    "CategoricalLikelihood",
    "Digits",
    "Likelihood",
    "LogisticMixtureLikelihood",
    "NormalLikelihood",
    "eight_schools",
    "fertility",
    "hard_posteriors",
    "load_digits",
    "motorcycle",
    "posteriordb",
]
