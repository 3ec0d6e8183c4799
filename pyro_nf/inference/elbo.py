"""Objectives of variational inference, for our loop and for Pyro's."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pyro
import pyro.distributions as dist
import pyro.infer
import torch
from pyro import poutine
from torch import Tensor

from pyro_nf.approximations.density import Density
from pyro_nf.distributions import FlowDistribution
from pyro_nf.interface.arguments import AtLeast, Count, Size, checked
from pyro_nf.interface.renamed import renamed
from pyro_nf.programs.matching import warn_of_mismatches
from pyro_nf.programs.noise import SubstituteNormals
from pyro_nf.programs.program import BoundProgram, Program, Randomness, TracePair
from pyro_nf.programs.sites import is_latent, local_plate, nonreparam_sites, subsample_scale
from pyro_nf.programs.traces import guide_log_prob, local_log_prob, log_prob_sum

# Where log p - log q scatters by less than this over draws, in nats, the guide is near: there the path derivative has
# the lower variance. Far away it has none, and is the dearer one.
_NEAR = 2.0


class ELBO(pyro.infer.ELBO):
    r"""Evidence lower bound, `E_q[log p(x, z) - log q(z)]`, by reparametrised draws that are batched by `vmap`.

    With sticking the landing, the score `d log q(z; phi) / d phi` at fixed z, whose expectation is zero, is left out
    of the gradient: what remains is the path derivative, and is exactly zero for every draw once q = p. It costs a
    second scoring of the guide, for flows an inverse: cheap for couplings, `dim` passes for an autoregressive flow.

    Draws of the guide that carry no gradient, such as a mixture's component, enter by the score function, with the mean
    of the other draws' terms as its baseline.

    Args:
        num_particles: Draws a step, where Pyro's SVI drives; `FlowSVI` sets its own number.
        sticking_the_landing: Whether to leave the score out of the gradient. "auto" does in `FlowSVI` from the block of
            steps on whose draws scatter by less than 2 nats; in Pyro's SVI, which has no blocks, always.
        annealing_steps: For so many steps, maximise `E_q[beta log p(x, z) - log q(z)]` with `beta = min(1, 0.01 +
            step / annealing_steps)` instead: draws spread over modes that they would else not leave. What is reported
            is the ELBO itself.

    Raises:
        ValueError: If a number is not a positive whole number (`annealing_steps`: or 0).

    References:
        Roeder, Wu, Duvenaud (2017), "Sticking the landing", arXiv:1703.09194, equation 8. Rezende, Mohamed (2015),
        "Variational inference with normalizing flows", arXiv:1505.05770, equation 20 (annealing). Kool, van Hoof,
        Welling (2019), "Buy 4 REINFORCE samples, get a baseline for free", equation 8.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyro_nf.inference.elbo import ELBO
        >>> from pyro.infer import SVI
        >>> from pyro_nf.guides import AutoFlow
        >>> def model():
        ...     pyro.sample("z", dist.Normal(1.0, 2.0))
        >>> svi = SVI(model, AutoFlow(model), pyro.optim.Adam({"lr": 0.01}), ELBO(num_particles=16))
        >>> isinstance(svi.step(), float)
        True
    """

    @checked
    def __init__(
        self,
        num_particles: Size = 256,
        sticking_the_landing: bool | Literal["auto"] = True,
        annealing_steps: Count = 0,
    ) -> None:
        super().__init__(num_particles=num_particles, vectorize_particles=True)
        self.sticking_the_landing, self.annealing_steps = sticking_the_landing, annealing_steps
        self.path_gradient = bool(sticking_the_landing)
        self._temperature: Tensor | None = None
        self._program: Program | None = None
        self._step = 0

    def start_block(self, step: int, log_weight_std: float, like: Tensor) -> None:
        """Get ready for the steps from `step` on.

        Args:
            step: Steps taken.
            log_weight_std: Standard deviation of `log p - log q` over the draws of the latest steps, infinity at first.
            like: A tensor of the parameters' dtype and device.
        """
        if self.sticking_the_landing == "auto":
            self.path_gradient = (self.path_gradient and step > 0) or log_weight_std < _NEAR
        if self.annealing_steps:
            value = min(1.0, 0.01 + step / self.annealing_steps)
            # One tensor, filled anew: a recorded step reads it.
            if self._temperature is None:
                self._temperature = like.new_empty(())
            self._temperature.fill_(value)

    def refresh(self) -> None:
        """Compare what the objective itself has recorded of the model, if anything, with the model as it is now."""

    def estimate(self, program: BoundProgram, draws: Randomness) -> tuple[Tensor, Tensor]:
        """Return the ELBO's estimate (to report) and its surrogate (whose gradient is the estimator's)."""

        def terms(particle: TracePair) -> dict[str, Tensor]:
            log_p, log_q = log_prob_sum(particle.model), guide_log_prob(particle.guide)
            elbo = (log_p - log_q).detach()
            if self._temperature is not None:
                log_p = self._temperature * log_p
            surrogate = log_p - log_q
            if self.path_gradient:
                # log_q's gradient is the path derivative plus the score; the score goes out again.
                surrogate = surrogate + guide_log_prob(program.guide_at_fixed_draw(particle))
            names = nonreparam_sites(particle.guide)
            score = {"score": _unscaled_sum(particle.guide, names), "value": (log_p - log_q).detach()} if names else {}
            return {"elbo": elbo, "surrogate": surrogate, "usable": log_p.detach().isfinite(), **score}

        result = program.vmap_traces(terms, draws)
        surrogate = result["surrogate"]
        if "score" in result:
            surrogate = surrogate + _above_the_others(result["value"]) * result["score"]
        return _mean_of_usable(result["elbo"], surrogate, result["usable"])

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return minus the objective, with the estimator's gradient."""
        if self._program is None or (self._program.model, self._program.guide) != (model, guide):
            self._program = Program(model, guide)
            warn_of_mismatches(self._program.bind(*args, **kwargs))
        pair = self._program.bind(*args, **kwargs)
        draws = pair.draw(self.num_particles)
        self.start_block(self._step, 0.0, draws.noise)
        value, surrogate = self.estimate(pair, draws)
        return surrogate.detach() - surrogate - value

    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """Return minus the objective as a number."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """Add the gradient of minus the objective to the parameters' `grad`, and return minus the objective."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()  # type: ignore[no-untyped-call]
        self._step += 1
        return float(loss.detach())

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("this objective works on batched draws, not on single traces")


class CoordinateELBO(ELBO):
    r"""The ELBO of a guide that is one distribution over the model's coordinates, by batched passes of both densities.

    The same bound and, term by term, the same gradient as `ELBO()` has, without running Pyro's handlers for each draw.
    The score of q, which the path derivative needs, comes along with the forward pass instead of from an inverse:
    the gradient is `E[(d log p(z) / dz - d log q(z) / dz) dz / dphi]`.

    Args:
        posterior: Returns the guide's distribution over the coordinates, under its present parameters.
        density: The model's.

    References:
        Vaitl, Nicoli, Nakajima, Kessel (2022), "Gradients should stay on path", arXiv:2207.08219, equation 9.
    """

    def __init__(self, posterior: Callable[[], FlowDistribution], density: Density) -> None:
        super().__init__()
        self.posterior, self.density = posterior, density

    def refresh(self) -> None:
        """Let the density be recorded anew where the model has changed."""
        with torch.random.fork_rng():
            self.density.renew(self.posterior().sample((self.density.size,)))

    def estimate(self, program: BoundProgram, draws: Randomness) -> tuple[Tensor, Tensor]:
        """Return the ELBO's estimate (to report) and its surrogate (whose gradient is the estimator's)."""
        with SubstituteNormals(draws.noise.flatten(), draws.noise.new_zeros(())), pyro.validation_enabled(False):
            points, log_q, score = self.posterior().rsample_and_score((len(draws.noise),))
        gradients, log_p = self.density.batch(len(points))(points.detach())
        usable = log_p.isfinite()
        residual = torch.where(usable[:, None], gradients - score, 0.0).detach()
        return _mean_of_usable((log_p - log_q).detach(), (points * residual).sum(-1), usable)


class KLAnnealedELBO(ELBO):
    r"""ELBO whose divergence from the prior is phased in, and may be left some free bits: for autoencoders.

    `E_q[log p(x | z)] - beta sum_j max(KL_j, num_data * free_bits)`, where `KL_j = E_q[log q(z_j) - log p(z_j)]` is
    estimated by the same draws, `beta = min(1, 0.01 + step / warmup_steps)`, and `log p(x | z)` is all of the model but
    its latents. At full strength from the start, the divergence switches latents off before the decoder has learnt to
    use them. What is reported is the ELBO itself, `beta = 1` and no free bits. (`ELBO(annealing_steps=...)` weighs the
    prior along with the likelihood; here the prior belongs to the divergence.)

    The groups j are the model's latent sites that the guide samples one by one, and all others together: under a guide
    with one flow over all latents, such as `AmortizedFlow`, there is one group. In a group of less than its free bits
    the divergence has no gradient.

    Args:
        warmup_steps: Steps until beta is 1; 0 for none. In `FlowSVI` beta changes from block to block, of `eval_every`
            steps, and no block before the end of the warm-up counts for the plateau.
        free_bits: Nats for each group and each datum of a subsampled plate that holds all sites; where there is no such
            plate, for each group.
        num_particles: As in `ELBO`.
        sticking_the_landing: As in `ELBO`.

    Raises:
        ValueError: If a number is out of range; at the first step, if the guide has draws without gradient.

    References:
        Sønderby, Raiko, Maaløe, Sønderby, Winther (2016), "Ladder variational autoencoders", arXiv:1602.02282, section
        2.3 (warm-up). Kingma et al. (2016), "Improving variational inference with inverse autoregressive flow",
        arXiv:1606.04934, equation 15 (free bits).

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyro_nf.inference.elbo import KLAnnealedELBO
        >>> from pyro.infer import SVI
        >>> from pyro_nf.guides import AutoFlow
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(1.0, 2.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=z.new_zeros(()))
        >>> svi = SVI(model, AutoFlow(model), pyro.optim.Adam({"lr": 0.01}), KLAnnealedELBO(100, num_particles=16))
        >>> isinstance(svi.step(), float)
        True
    """

    @checked
    def __init__(
        self,
        warmup_steps: Count = 0,
        free_bits: Annotated[float, AtLeast(0)] = 0.0,
        num_particles: Size = 256,
        sticking_the_landing: bool | Literal["auto"] = True,
    ) -> None:
        super().__init__(num_particles, sticking_the_landing, annealing_steps=warmup_steps)
        self.free_bits = free_bits

    def estimate(self, program: BoundProgram, draws: Randomness) -> tuple[Tensor, Tensor]:
        """Return the ELBO's estimate (to report) and its surrogate (whose gradient is the estimator's)."""
        spec = program.spec
        if names := nonreparam_sites(spec.traces.guide):
            raise ValueError(
                f"KLAnnealedELBO takes guides with reparametrised draws; those of {names[0]!r} carry no gradient"
            )
        latents = [name for name, site in spec.traces.model.nodes.items() if is_latent(site)]
        guide_sites = spec.traces.guide.nodes
        # A Delta is the image of a draw that it shares with other sites.
        own = [name for name in latents if not isinstance(guide_sites[name]["fn"], dist.Delta)]

        def grouped(total: Tensor, trace: poutine.Trace) -> Tensor:
            """The sum of each of the sites in `own`, and last what is left of the total."""
            alone = [torch.as_tensor(trace.nodes[name]["log_prob_sum"]) for name in own]
            return torch.stack([*alone, total - sum(alone)])

        def terms(particle: TracePair) -> dict[str, Tensor]:
            log_p, log_q = log_prob_sum(particle.model), guide_log_prob(particle.guide)
            prior = torch.stack([torch.as_tensor(particle.model.nodes[n]["log_prob_sum"]) for n in latents]).sum()
            kl = grouped(log_q, particle.guide) - grouped(prior, particle.model)
            result = {"elbo": (log_p - log_q).detach(), "likelihood": log_p - prior, "kl": kl, "value": kl.detach()}
            if self.path_gradient:
                again = program.guide_at_fixed_draw(particle)
                result["kl"] = kl - grouped(guide_log_prob(again), again)
            return result

        result = {name: value.mean(0) for name, value in program.vmap_traces(terms, draws).items()}
        divergence = result["kl"].sum()
        if self.free_bits:
            plate = local_plate(spec.traces.model)
            size = 1 if plate is None else plate.full_size or plate.size
            divergence = torch.where(result["value"] > size * self.free_bits, result["kl"], 0.0).sum()
        if self._temperature is not None:
            divergence = self._temperature * divergence
        return result["elbo"], result["likelihood"] - divergence


class IWELBO(ELBO):
    r"""Importance-weighted bound, `E[log mean_k w_k]` over K draws, `w = p(x, z) / q(z)`: tighter than the ELBO.

    The gradient is doubly reparametrised: to the guide `sum_k v_k^2 d log w_k / dz dz / dphi`, v the weights divided by
    their sum; to the model's parameters `sum_k v_k d log p / dtheta`. Its signal does not fade as K grows.

    Where all sites stand in one plate, as in a variational autoencoder, each datum has weights of its own, and the
    bound is the sum over data, scaled up from a minibatch. Else a draw has one weight, and nothing may be subsampled.

    Args:
        num_importance_samples: K.
        num_particles: Draws a step, a multiple of K, where Pyro's SVI drives; `FlowSVI` sets its own number.

    Raises:
        ValueError: If a number is not positive; at the first step, if the number of draws is not a multiple of K, if
            the guide has draws without gradient, or if a plate is subsampled that does not hold all sites.

    References:
        Burda, Grosse, Salakhutdinov (2015), arXiv:1509.00519, equation 8. Tucker, Lawson, Gu, Maddison (2019), "Doubly
        reparameterized gradient estimators for Monte Carlo objectives", arXiv:1810.04152, equation 8.
    """

    @checked
    def __init__(self, num_importance_samples: Size = 16, num_particles: Size = 256) -> None:
        super().__init__(num_particles=num_particles)
        self.num_importance_samples = num_importance_samples

    def estimate(self, program: BoundProgram, draws: Randomness) -> tuple[Tensor, Tensor]:
        """Return the bound's estimate (to report) and its surrogate (whose gradient is the estimator's)."""
        num_draws, size = len(draws.noise), self.num_importance_samples
        if num_draws % size:
            raise ValueError(f"num_particles must be a multiple of num_importance_samples={size}; got {num_draws}")
        spec = program.spec
        if names := nonreparam_sites(spec.traces.guide):
            raise ValueError(f"IWELBO takes guides with reparametrised draws; those of {names[0]!r} carry no gradient")
        plate = local_plate(spec.traces.model)
        if plate is None and spec.subsamples:
            name = next(iter(spec.subsamples))
            raise ValueError(
                f"IWELBO weighs draws by all the data: plate {name!r} may be subsampled only if every site stands in it"
            )
        scale = 1.0 if plate is None else subsample_scale(plate)
        has_parameters = any(_is_trained(site) for site in spec.traces.model.nodes.values())

        log_p, log_q = (log_prob_sum, guide_log_prob) if plate is None else (local_log_prob, local_log_prob)

        def terms(particle: TracePair) -> dict[str, Tensor]:
            log_w = log_p(particle.model) - log_q(particle.guide)
            path = log_w + log_q(program.guide_at_fixed_draw(particle))
            own = {"own": log_p(program.model_at_fixed_draw(particle))} if has_parameters else {}
            return {"log_w": log_w.detach(), "path": path, **own}

        result = {
            name: value.unflatten(0, (num_draws // size, size))
            for name, value in program.vmap_traces(terms, draws).items()
        }
        share = result["log_w"].softmax(1)
        surrogate = share.square() * result["path"]
        if has_parameters:  # whose gradient through `path` bears the squares of the shares
            surrogate = surrogate + (share - share.square()) * result["own"]
        bound = result["log_w"].logsumexp(1) - math.log(size)
        return scale * bound.mean(0).sum(), scale * surrogate.sum(1).mean(0).sum()


def _mean_of_usable(elbo: Tensor, surrogate: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
    """Means over draws at which the model has a density, as of the guide cut off there; -inf and 0 if there are none.

    The ELBO of that guide is less by the logarithm of their share.
    """
    number = usable.sum()
    means = [torch.where(usable, terms, 0.0).sum() / number.clamp(min=1) for terms in (elbo, surrogate)]
    return means[0] + (number / len(usable)).log(), means[1]


def _above_the_others(values: Tensor) -> Tensor:
    """Each value less the mean of the others; a single one, less nothing."""
    if len(values) == 1:
        return values
    return (len(values) * values - values.sum()) / (len(values) - 1)


def _unscaled_sum(trace: poutine.Trace, names: list[str]) -> Tensor:
    return torch.stack([trace.nodes[name]["unscaled_log_prob"].sum() for name in names]).sum()


def _is_trained(site: dict[str, Any]) -> bool:
    return bool(site["type"] == "param" and site["value"].requires_grad)


if not TYPE_CHECKING:
    __getattr__ = renamed(__name__, {"WarmUpELBO": "KLAnnealedELBO"})
