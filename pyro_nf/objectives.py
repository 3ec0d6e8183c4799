"""Objectives of variational inference, for our loop and for Pyro's."""

from collections.abc import Callable
from typing import Any

import pyro.infer
import torch
from torch import Tensor

from pyro_nf.tracing import Draws, Particle, Program, log_prob_sum


class ELBO(pyro.infer.ELBO):
    r"""Evidence lower bound, `E_q[log p(x, z) - log q(z)]`, by reparametrised draws that are batched by `vmap`.

    With sticking the landing, the score `d log q(z; phi) / d phi` at fixed z, whose expectation is zero, is left out
    of the gradient: what remains is the path derivative, and is exactly zero for every draw once q = p. It costs a
    second scoring of the guide, for flows an inverse: cheap for couplings, `dim` passes for an autoregressive flow.

    Args:
        num_particles: Draws a step, where Pyro's SVI drives; `FlowSVI` sets its own number.
        sticking_the_landing: Whether to leave the score out of the gradient.

    Raises:
        ValueError: If `num_particles` is not a positive whole number.

    References:
        Roeder, Wu, Duvenaud (2017), "Sticking the landing", arXiv:1703.09194, equation 8.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyro_nf.objectives import ELBO
        >>> from pyro.infer import SVI
        >>> from pyro_nf.guides import AutoFlow
        >>> def model():
        ...     pyro.sample("z", dist.Normal(1.0, 2.0))
        >>> svi = SVI(model, AutoFlow(model), pyro.optim.Adam({"lr": 0.01}), ELBO(num_particles=16))
        >>> isinstance(svi.step(), float)
        True
    """

    def __init__(self, num_particles: int = 256, sticking_the_landing: bool = True) -> None:
        if not isinstance(num_particles, int) or num_particles < 1:
            raise ValueError(f"num_particles must be a positive whole number; got {num_particles!r}")
        super().__init__(num_particles=num_particles, vectorize_particles=True)
        self.sticking_the_landing = sticking_the_landing
        self._program: Program | None = None

    def estimate(
        self, program: Program, draws: Draws, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Return the ELBO's estimate (to report) and its surrogate (whose gradient is the estimator's)."""

        def terms(particle: Particle) -> dict[str, Tensor]:
            log_p, log_q = log_prob_sum(particle.model), log_prob_sum(particle.guide)
            surrogate = log_p - log_q
            if self.sticking_the_landing:
                # log_q's gradient is the path derivative plus the score; the score goes out again.
                surrogate = surrogate + program.score(particle, args, kwargs)
            return {"elbo": (log_p - log_q).detach(), "surrogate": surrogate}

        result = program.map(terms, draws, args, kwargs)
        return result["elbo"].mean(), result["surrogate"].mean()

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return minus the ELBO, with the estimator's gradient."""
        if self._program is None or (self._program.model, self._program.guide) != (model, guide):
            self._program = Program(model, guide)
        draws = self._program.draw(self.num_particles, args, kwargs)
        elbo, surrogate = self.estimate(self._program, draws, args, kwargs)
        return surrogate.detach() - surrogate - elbo

    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """Return minus the ELBO as a number."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """Add the gradient of minus the ELBO to the parameters' `grad`, and return minus the ELBO."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("this ELBO works on batched draws, not on single traces")
