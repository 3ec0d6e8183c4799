"""The triangular map of a normal that is nearest to a posterior, by natural gradients."""

from typing import Any

import torch
from torch import Tensor

from pyro_nf.approximations.density import Density
from pyro_nf.approximations.natural_gradient import Rates, antithetic_normals, cut, normal_log_prob
from pyro_nf.flows import QuadraticTriangularMap
from pyro_nf.interface.waits import Report, silent

# Draws of a step; steps at the full rate, and steps whose rates fall, which average; draws that set the order.
_NUM_DRAWS, _RATES, _NUM_ORDER = 256, Rates(num_steps=15, num_averaged=15), 2048
# A step moves draws by no more than this, in standard deviations, by root mean square.
_MAX_MOVE = 0.3
# Longer residuals, in root mean squares of a normal's, are of draws far in a tail, and cut.
_MAX_RESIDUAL = 3.0
# Over a standard normal, with s(z) = sqrt(1 + z^2), by which the skewing function moves: Var s + E (ds / dz)^2.
_SKEW_METRIC = 0.5096


@torch.no_grad()
def nearest_triangular(
    density: Density, loc: Tensor, scale_tril: Tensor, quadratic: bool = True, report: Report = silent
) -> tuple[QuadraticTriangularMap, Tensor]:
    r"""Fit `y = m + L c(z)`, z standard normal, to a density: the map c, beginning at the identity.

    A step is one of the path gradient of the ELBO, `E[(d log p / dw - d log q / dw) dw / d theta]`, `w = c(z)`, divided
    by the second derivatives of the divergence where p is the normal and c the identity, which are diagonal in these
    parameters. Both terms vanish draw by draw where the map is right.

    Args:
        density: The model's.
        loc: m, `(dim,)`: as of `nearest_normal`.
        scale_tril: L, `(dim, dim)`.
        quadratic: Whether the map has products of two coordinates.
        report: Is told the ELBO after each step; false ends the steps.

    Returns:
        The map, and the ELBO at each step, `(num_steps,)`.

    References:
        Marzouk, Moselhy, Parno, Spantini (2016), "An introduction to sampling via measure transport",
        arXiv:1602.05023; Vaitl, Nicoli, Nakajima, Kessel (2022), "Gradients should stay on path", arXiv:2207.08219.
    """
    transport_map = QuadraticTriangularMap(len(loc), quadratic=quadratic).to(loc)
    transport_map.set_order(_order(density, loc, scale_tril))
    names, params = zip(*transport_map.params.named_parameters(), strict=True)
    elbos = []
    for step in range(_RATES.total):
        rate, z = _RATES[step], antithetic_normals(_NUM_DRAWS // 2, loc)
        with torch.enable_grad():
            w, log_det, score = transport_map.forward_with_score(z, -z)
        gradients, values = density.gradients(loc + w.detach() @ scale_tril.mT)
        log_q = normal_log_prob(z, scale_tril) - log_det
        elbos.append((values - log_q).mean())
        # In units of each coordinate's scale, which may be much smaller than the whole posterior's.
        scale = transport_map.params.log_scale.exp().index_select(0, transport_map.ranks)
        residual = cut((gradients @ scale_tril - score) * scale, values, _MAX_RESIDUAL) / scale
        with torch.enable_grad():
            slopes = torch.autograd.grad((w * residual).sum() / len(z), params)
        metric = _metric(transport_map)
        moves = [rate * slope / metric[name] for name, slope in zip(names, slopes, strict=True)]
        length = torch.stack([(metric[name] * move**2).sum() for name, move in zip(names, moves, strict=True)]).sum()
        shorter = (_MAX_MOVE / length.sqrt()).clamp(max=1)
        for param, move in zip(params, moves, strict=True):
            param += shorter * move
        if not report("natural gradients", step + 1, _RATES.total, float(elbos[-1])):
            break
    return transport_map, torch.stack(elbos)


def _metric(transport_map: QuadraticTriangularMap) -> dict[str, Tensor]:
    """Second derivatives of the divergence by each parameter, where the posterior is normal and the rest the identity.

    They are the mean square of what a parameter moves in z, and for those of scales once more that of the slope.
    """
    log_scale: Any = transport_map.params.log_scale
    precision = (-2 * log_scale).exp()
    twice = torch.full_like(precision, 2.0)
    rows, _ = torch.tril_indices(len(precision), len(precision), -1, device=precision.device)
    metric = {
        "loc": precision,
        "log_scale": twice,
        "skew": torch.full_like(precision, _SKEW_METRIC),
        "shear": precision[rows],
        "log_scale_slope": twice.new_full(rows.shape, 2.0),
    }
    if transport_map.quadratic:
        first, second, third = transport_map.entries
        metric["quadratic"] = precision[first] * torch.where(second == third, 2.0, 1.0)
    return metric


def _order(density: Density, loc: Tensor, scale_tril: Tensor) -> Tensor:
    """Put first the coordinates that the scales of others follow: `sum_i (E[d^3 log p / dz_k dz_i^2])^2`, i != k."""
    z = antithetic_normals(_NUM_ORDER // 2, loc)
    gradients, values = density.gradients(loc + z @ scale_tril.mT)
    residual = cut(gradients @ scale_tril + z, values, _MAX_RESIDUAL)
    # Derivatives of a normal's mean are means with Hermite polynomials; two estimates of one, the second of two thirds.
    by_square = residual.mT @ (z**2 - 1)
    by_product = z.mT @ (residual * z)
    third = ((by_square + 2 * by_product) / (3 * len(z))).fill_diagonal_(0.0)
    return third.square().sum(1).argsort(descending=True)
