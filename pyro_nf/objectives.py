"""The objectives of `pyro_nf.inference`, by the name of the module that they were in; it goes with the next release."""

from pyro_nf.interface.renamed import renamed

__getattr__ = renamed(
    __name__,
    {
        "ELBO": "pyro_nf.inference.elbo.ELBO",
        "IWELBO": "pyro_nf.inference.elbo.IWELBO",
        "WarmUpELBO": "pyro_nf.inference.elbo.KLAnnealedELBO",
    },
)
