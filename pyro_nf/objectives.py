"""The objectives of `pyro_nf.inference`, by the name of the module that they were in; it goes with the next release."""

from typing import TYPE_CHECKING

from pyro_nf.interface.renamed import renamed

if not TYPE_CHECKING:
    __getattr__ = renamed(
        __name__,
        {
            "ELBO": "pyro_nf.inference.elbo.ELBO",
            "IWELBO": "pyro_nf.inference.elbo.IWELBO",
            "WarmUpELBO": "pyro_nf.inference.elbo.KLAnnealedELBO",
        },
    )
