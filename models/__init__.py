"""Models and data to start from. A model knows nothing of its posterior's family."""

from pyro_nf.models import (
    eight_schools,
    energies,
    fertility,
    hard_posteriors,
    imputation,
    motorcycle,
    posteriordb,
    tables,
)
from pyro_nf.models.digits import Digits, load_digits
from pyro_nf.models.dlgm import DLGM, VAE
from pyro_nf.models.hivae import HIVAE, TableEncoder
from pyro_nf.models.images import (
    Images,
    Resampled,
    binarize,
    dequantize,
    load_caltech_silhouettes,
    load_frey_faces,
    load_mnist,
    load_omniglot,
    load_static_mnist,
)
from pyro_nf.models.likelihoods import (
    BernoulliLikelihood,
    CategoricalLikelihood,
    Likelihood,
    LogisticMixtureLikelihood,
    NormalLikelihood,
)

__all__ = [
    "DLGM",
    "HIVAE",
    "VAE",
    "BernoulliLikelihood",
    "CategoricalLikelihood",
    "Digits",
    "Images",
    "Likelihood",
    "LogisticMixtureLikelihood",
    "NormalLikelihood",
    "Resampled",
    "TableEncoder",
    "binarize",
    "dequantize",
    "eight_schools",
    "energies",
    "fertility",
    "hard_posteriors",
    "imputation",
    "load_caltech_silhouettes",
    "load_digits",
    "load_frey_faces",
    "load_mnist",
    "load_omniglot",
    "load_static_mnist",
    "motorcycle",
    "posteriordb",
    "tables",
]
