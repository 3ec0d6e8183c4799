"""What a guide is that can be fitted in stages."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from pyro_nf.approximations.approximation import Approximation
from pyro_nf.distributions import FlowDistribution


@runtime_checkable
class StagedGuide(Protocol):
    """A guide over coordinates of a model that gives its approximation as a value, and takes another one over.

    It knows nothing of stages. `AutoFlow` is one.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Sample every latent."""

    def latent_sites(self) -> Mapping[str, dict[str, Any]]:
        """Return the latent sites, as in a trace, in the order of the guide's coordinates."""

    def get_posterior(self) -> FlowDistribution:
        """Return the distribution over the coordinates, under the present parameters."""

    def approximation(self) -> Approximation:
        """Return what the guide is now; what changes the guide later does not change this."""

    def take_over(self, approximation: Approximation) -> None:
        """Become this approximation, which is of the same layers."""
