"""The works of `svi_speed.py`, and how Pyro, we, and a loop written by hand do them.

Adam at the same rate, without clipping, from seed 0, everywhere.
"""

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoNormal
from torch import nn

from pyro_nf.flows import stacks
from pyro_nf.guides import AmortizedFlow, AutoFlow
from pyro_nf.inference import ELBO, FlowSVI
from pyro_nf.models import DLGM, eight_schools
from pyro_nf.networks import MLP

DATA = Path(os.environ.get("PYRO_NF_DATA", Path(__file__).parents[2] / "shared" / "data"))
MNIST = DATA / "mnist_static_larochelle" / "mnist_static_packbits.npz"
PIXELS, LATENTS, HIDDEN, BATCH = 784, 40, 400, 128
TEST_IMAGES = 2000
NO_CLIPPING = 1e12  # a norm that no gradient reaches


class Problem(NamedTuple):
    """What is fitted: `model(*args, **kwargs)`, checked as `model(*test)` and reported per datum of `size`."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    test: tuple[Any, ...]
    kwargs: dict[str, Any]
    size: int = 1


class Work(NamedTuple):
    """A problem, who does it and how, and the ELBO (on `num_draws` draws) that ends the race."""

    problem: Callable[[str], Problem]
    contestants: dict[str, Callable[..., dict[str, Any]]]
    num_particles: int
    target: float | None = None
    num_draws: int = 10_000
    learning_rate: float = 1e-2
    devices: tuple[str, ...] = ("cpu",)


# Contestants: `(work, problem, watch, ...)` -> what to record beside the laps.


def pyro_svi(work, problem, watch, make_guide, validation=True):
    """Pyro's SVI, as its users call it; validation is on where they do not switch it off."""
    pyro.enable_validation(validation)
    guide = make_guide(problem.model)
    many = work.num_particles > 1
    loss = Trace_ELBO(num_particles=work.num_particles, vectorize_particles=many)
    svi = SVI(problem.model, guide, pyro.optim.Adam({"lr": work.learning_rate}), loss)

    def advance(count):
        for _ in range(count):
            svi.step(*problem.args, **problem.kwargs)

    watch.drive(advance, partial(pyro_elbo, work, problem, guide))
    return {"compile": 0.0}


def flow_svi(work, problem, watch, make_guide, compiled, objective=None):
    """FlowSVI. Whatever it does between its blocks of `eval_every` steps is part of its time."""
    guide = make_guide(problem.model)
    svi = FlowSVI(
        problem.model,
        guide,
        objective=objective,
        num_particles=work.num_particles,
        learning_rate=work.learning_rate,
        max_steps=watch.max_steps,
        eval_every=watch.every,
        clip_norm=NO_CLIPPING,
        compile=compiled,
        seed=0,
        progress=False,
        callbacks=[lambda evaluation: watch.lap(partial(pyro_elbo, work, problem, guide))],
    )
    watch.start()
    result = svi.run(*problem.args, **problem.kwargs)
    watch.laps[0] -= result.compile_seconds
    return {"compile": result.compile_seconds, "ran": result.execution}


def by_hand(work, problem, watch, num_flows):
    """A loop in plain PyTorch: a compiled network that returns minus the ELBO, fused Adam, minibatches by epochs."""
    (images,), (test,) = problem.args, problem.test
    network = Autoencoder(num_flows).to(images.device)
    optimizer = torch.optim.Adam(network.parameters(), work.learning_rate, fused=True)
    scale = len(images) / BATCH
    compiled = torch.compile(network)
    batches = iter(())

    def loss():
        nonlocal batches
        rows = next(batches, None)
        if rows is None:
            batches = iter(torch.randperm(len(images), device=images.device).split(BATCH)[: len(images) // BATCH])
            rows = next(batches)
        return scale * compiled(images[rows])

    def advance(count):
        for _ in range(count):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

    @torch.no_grad()
    def elbo():
        return -float(network(test)) / len(test)

    start = time.perf_counter()
    loss().backward()
    seconds = time.perf_counter() - start
    watch.drive(advance, elbo)
    return {"compile": seconds}


def pyro_elbo(work, problem, guide):
    """The yardstick for all that runs on Pyro."""
    many = work.num_draws > 1
    yardstick = Trace_ELBO(num_particles=work.num_draws, vectorize_particles=many, max_plate_nesting=1)
    return -yardstick.loss(problem.model, guide, *problem.test) / problem.size


# Problems: `device` -> Problem.


def schools(model, device):
    return Problem(model, eight_schools.data(), eight_schools.data(), {})


def logistic(num_rows, dim, batch_size, device):
    """Logistic regression on synthetic data, seed 0; a model that broadcasts over Pyro's vectorised particles."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, dim, generator=generator)
    y = torch.bernoulli((x @ torch.randn(dim, generator=generator)).sigmoid(), generator=generator)

    def model(x, y):
        with pyro.plate("features", dim):
            beta = pyro.sample("beta", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("rows", num_rows, subsample_size=batch_size) as rows:
            if batch_size is not None:
                x, y = x[rows], y[rows]
            pyro.sample("y", dist.Bernoulli(logits=beta @ x.T), obs=y)

    return Problem(model, (x, y), (x, y), {})


def normal(dim, device):
    loc = torch.linspace(-1.0, 1.0, dim)

    def model():
        pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    return Problem(model, (), (), {})


def mnist(device):
    """A deep latent Gaussian model of binarised MNIST."""
    packed = np.load(MNIST)
    train, test = (
        torch.tensor(np.unpackbits(packed[part], axis=1)[:, :PIXELS], dtype=torch.float32, device=device)
        for part in ("train", "test")
    )
    model = DLGM(PIXELS, latent_dims=(LATENTS,), hidden_dims=(HIDDEN, HIDDEN)).to(device)
    return Problem(model, (train,), (test[:TEST_IMAGES],), {"batch_size": BATCH}, TEST_IMAGES)


# Guides.


def stack(name, **options):
    return partial(AutoFlow, flow=partial(stacks.make, name, **options))


def mean_field_encoder(model):
    """Return Pyro's usual guide for a variational autoencoder, on the device of the model."""
    encoder = MLP(PIXELS, (HIDDEN, HIDDEN), 2 * LATENTS).to(model.mixers[0].weight.device)

    def guide(x, batch_size=None):
        network = pyro.module("encoder", encoder)
        with pyro.plate("data", len(x), subsample_size=batch_size, device=x.device) as rows:
            loc, raw_scale = network(x if len(rows) == len(x) else x[rows]).chunk(2, -1)
            pyro.sample("xi_1", dist.Normal(loc, nn.functional.softplus(raw_scale)).to_event(1))

    return guide


def flow_encoder(model):
    encoder = nn.Sequential(MLP(PIXELS, (HIDDEN,), HIDDEN), nn.Tanh()).to(model.mixers[0].weight.device)
    return AmortizedFlow(model, encoder, partial(stacks.make, "iaf", depth=4))


class Autoencoder(nn.Module):
    """Minus the ELBO of a batch of images, as one writes it by hand: one draw of `log q - log p`."""

    def __init__(self, num_flows):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh())
        self.flows = nn.ModuleList(GatedAutoregressive(k % 2 == 1) for k in range(num_flows))
        self.head = nn.Linear(HIDDEN, 2 * LATENTS)
        self.decoder = nn.Sequential(
            nn.Linear(LATENTS, LATENTS, bias=False),
            *(nn.Linear(LATENTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh()),
            nn.Linear(HIDDEN, PIXELS),
        )

    def forward(self, x):
        context = self.encoder(x)
        loc, raw_scale = self.head(context).chunk(2, -1)
        z = torch.randn_like(loc)
        log_q = -0.5 * z**2
        for flow in self.flows:
            z, log_gate = flow(z, context)
            log_q = log_q - log_gate
        scale = nn.functional.softplus(raw_scale)
        z = loc + scale * z
        # The constants of the two normals cancel.
        minus_log_p = nn.functional.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        return (log_q - scale.log() + 0.5 * z**2).sum() + minus_log_p


class GatedAutoregressive(nn.Module):
    """A layer of inverse autoregressive flow with two hidden layers."""

    def __init__(self, reverse, width=2 * LATENTS):
        super().__init__()
        degrees = torch.arange(1, LATENTS + 1)
        degrees = degrees.flip(0) if reverse else degrees
        hidden = torch.arange(width) * LATENTS // width
        self.masked = nn.ModuleList((nn.Linear(LATENTS, width), nn.Linear(width, width), nn.Linear(width, 2 * LATENTS)))
        self.from_context = nn.Linear(HIDDEN, width, bias=False)
        self.context_to_output = nn.Linear(HIDDEN, 2 * LATENTS, bias=False)
        masks = (hidden[:, None] >= degrees, hidden[:, None] >= hidden, (degrees[:, None] > hidden).repeat(2, 1))
        for k, mask in enumerate(masks):
            self.register_buffer(f"mask_{k}", mask.float())
        for tensor in (self.masked[-1].weight, self.masked[-1].bias, self.context_to_output.weight):
            nn.init.zeros_(tensor)

    def forward(self, z, context):
        h = (self._layer(0, z) + self.from_context(context)).tanh()
        h = self._layer(1, h).tanh()
        shift, s = (self._layer(2, h) + self.context_to_output(context)).chunk(2, -1)
        gate = torch.sigmoid(s + 2.0)
        return gate * z + (1 - gate) * shift, nn.functional.logsigmoid(s + 2.0)

    def _layer(self, k, h):
        layer = self.masked[k]
        return nn.functional.linear(h, layer.weight * getattr(self, f"mask_{k}"), layer.bias)


# The tables of works. A new work, or a new contestant, is a line.

NO_STL = ELBO(sticking_the_landing=False)


def of_pyro(make_guide):
    return {
        "Pyro": partial(pyro_svi, make_guide=make_guide),
        "Pyro, no validation": partial(pyro_svi, make_guide=make_guide, validation=False),
    }


def ours(make_guide, mark="", objective=None):
    return {
        f"ours{mark} {name}": partial(flow_svi, make_guide=make_guide, compiled=compiled, objective=objective)
        for name, compiled in {"plain": False, "compiled": True}.items()
    }


def mean_field():
    return {**of_pyro(AutoNormal), **ours(AutoNormal)}


def digits(make_guide, num_flows):
    """Without sticking the landing, as in the loop by hand: the same sums are differentiated everywhere."""
    return {
        **of_pyro(make_guide),
        "torch.compile by hand": partial(by_hand, num_flows=num_flows),
        **ours(make_guide, objective=NO_STL),
    }


iaf, pyro_iaf = stack("iaf", depth=2, hidden_dims=(32,)), partial(AutoIAFNormal, hidden_dim=[32], num_transforms=2)
realnvp = stack("realnvp", depth=8)
both = ("cpu", "cuda")
WORKS = {
    "eight schools, non-centred": Work(
        partial(schools, eight_schools.noncentered), mean_field(), num_particles=64, target=-31.7
    ),
    "eight schools, centred": Work(
        partial(schools, eight_schools.centered), mean_field(), num_particles=64, target=-33.5
    ),
    "eight schools, centred, IAF": Work(
        partial(schools, eight_schools.centered),
        {
            **of_pyro(pyro_iaf),
            **ours(pyro_iaf, " (Pyro's guide)"),
            **ours(iaf),
            **ours(iaf, " (no STL)", NO_STL),
        },
        num_particles=64,
        target=-31.7,
    ),
    **{
        f"logistic {num_rows} x {dim}, RealNVP": Work(
            partial(logistic, num_rows, dim, None),
            {**of_pyro(realnvp), **ours(realnvp), **ours(realnvp, " (no STL)", NO_STL)},
            num_particles=64,
            target=target,
            num_draws=1000,
        )
        for num_rows, dim, target in ((200, 10, -94.8), (10_000, 50, -2012.4))
    },
    "DLGM, mean-field": Work(
        mnist,
        digits(mean_field_encoder, num_flows=0),
        num_particles=1,
        target=-100.0,
        num_draws=1,
        learning_rate=1e-3,
        devices=both,
    ),
    "DLGM, IAF": Work(
        mnist,
        digits(flow_encoder, num_flows=4),
        num_particles=1,
        target=-100.0,
        num_draws=1,
        learning_rate=1e-3,
        devices=both,
    ),
}


def growing(problem, num_particles):
    return Work(problem, {"Pyro": partial(pyro_svi, make_guide=AutoNormal), **ours(AutoNormal)}, num_particles)


SCALING = {
    **{
        f"{count} particles": growing(partial(schools, eight_schools.noncentered), count)
        for count in (1, 4, 16, 64, 256, 1024, 4096)
    },
    **{f"{dim} dimensions": growing(partial(normal, dim), 16) for dim in (10, 100, 1000, 10_000)},
    **{f"{10**k} rows": growing(partial(logistic, 10**k, 10, None), 1) for k in range(2, 7)},
    **{f"100 of {10**k} rows": growing(partial(logistic, 10**k, 10, 100), 1) for k in range(3, 7)},
}


def run(spec, watch):
    """Do one run and return its record."""
    torch.set_num_threads(spec["threads"])
    work = (WORKS | SCALING)[spec["work"]]
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    if spec["device"] == "cuda":
        watch.gpu = torch.cuda
    return work.contestants[spec["contestant"]](work, work.problem(spec["device"]), watch)
