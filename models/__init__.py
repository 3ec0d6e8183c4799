"""Models and data to start from. A model knows nothing of its posterior's family."""

from typing import TYPE_CHECKING

from pyro_nf.interface.renamed import renamed
from pyro_nf.models import discrete, eight_schools, imputation, tables
from pyro_nf.models.digits import Digits, load_digits
from pyro_nf.models.dlgm import DLGM, VAE
from pyro_nf.models.hivae import HIVAE, TableEncoder
from pyro_nf.models.likelihoods import (
    BernoulliLikelihood,
    CategoricalLikelihood,
    Likelihood,
    LogisticMixtureLikelihood,
    NormalLikelihood,
)
from pyro_nf.models.resampling import Resampled, binarize, dequantize

__all__ = [
    "DLGM",
    "HIVAE",
    "VAE",
    "BernoulliLikelihood",
    "CategoricalLikelihood",
    "Digits",
    "Likelihood",
    "LogisticMixtureLikelihood",
    "NormalLikelihood",
    "Resampled",
    "TableEncoder",
    "binarize",
    "dequantize",
    "discrete",
    "eight_schools",
    "imputation",
    "load_digits",
    "tables",
]

_MODULES = ("energies", "fertility", "hard_posteriors", "motorcycle", "posteriordb")
_IMAGES = (
    "Images",
    "load_caltech_silhouettes",
    "load_frey_faces",
    "load_mnist",
    "load_omniglot",
    "load_static_mnist",
)
if not TYPE_CHECKING:
    __getattr__ = renamed(
        __name__,
        {name: f"pyro_nf.models.benchmarks.{name}" for name in _MODULES}
        | {name: f"pyro_nf.models.benchmarks.images.{name}" for name in _IMAGES},
    )
