"""Does a guide train in Pyro's own SVI, at the learning rates that Pyro's users have?

python benchmarks/plain_svi.py [--quick] [--models eight_schools ...] [--guides AutoNormal AutoFlow ...]
    [--rates .005 .05 ...] [--optimizers Adam ...] [--particles 1 10 ...] [--seeds 3] [--steps 1000]
    [--results plain_svi.jsonl]

Every fit is `SVI(model, guide, optimizer({"lr": rate}), Trace_ELBO(num_particles))` with a constant learning rate.
`10 in a loop` are ten particles that are not vectorized. `loss` is the negative ELBO after the last step, averaged over
the states of the last tenth of the steps, 2,000 fresh draws in all. `diverged` is the share of seeds whose loss is not
finite, or higher than before the first step. Each number of the table is the median over seeds of the loss, less the
lowest median of any guide, learning rate and optimizer for that model: 0 is best. `--quick` has two rates, one
optimizer, 1 and 10 particles, one seed and 400 steps.

`--guides` also accepts names of flows, `AutoFlow realnvp` for `AutoFlow(model, "realnvp")`. Fits that `--results` holds
already are not done again.
"""

import argparse
import math
import time
from functools import partial
from pathlib import Path

import jobs
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal

from pyro_nf.guides import AutoFlow
from pyro_nf.models import eight_schools

GUIDES = {
    "AutoNormal": AutoNormal,
    "AutoIAFNormal": AutoIAFNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoFlow": AutoFlow,
}
OPTIMIZERS = {"Adam": pyro.optim.Adam, "ClippedAdam": pyro.optim.ClippedAdam}
RATES = (0.005, 0.01, 0.02, 0.05, 0.1)
# Number of particles, and whether they are vectorized.
PARTICLES = {"1": (1, False), "10": (10, True), "10 in a loop": (10, False), "100": (100, True)}
COMPARED = ("AutoNormal", "AutoIAFNormal", "AutoFlow")
NUM_STATES, NUM_DRAWS = 10, 200  # of a loss


def prior():
    """Latents of three supports without data: the posterior is the prior, and the loss of a perfect fit is 0."""
    pyro.sample("y", dist.LogNormal(0.0, 1.0))
    pyro.sample("z", dist.Beta(2.0, 2.0).expand([2]).to_event(1))
    pyro.sample("x", dist.Normal(0.0, 1.0))


def logistic(x, y):
    coefficients = pyro.sample("coefficients", dist.Normal(torch.zeros(x.shape[-1]), 2.5).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=(coefficients[..., None, :] * x).sum(-1)), obs=y)


def scales(y):
    """A hierarchy of positive scales: one for each of six groups, around a common one."""
    spread = pyro.sample("spread", dist.HalfCauchy(1.0))
    with pyro.plate("groups", y.shape[-1]):
        scale = pyro.sample("scale", dist.LogNormal(0.0, spread))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(0.0, scale), obs=y)


def correlated():
    """Twenty correlated normals, of unequal scales."""
    index = torch.arange(20)
    sds = torch.logspace(-0.5, 0.5, 20)
    covariance = 0.9 ** (index[:, None] - index).abs() * sds[:, None] * sds
    pyro.sample("z", dist.MultivariateNormal(torch.linspace(-1, 1, 20), covariance))


def rows_of_logistic():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 10, generator=generator)
    x[:, 1:] += 0.7 * x[:, :-1]
    chances = torch.sigmoid(x @ torch.linspace(-1, 1, 10))
    return x, (torch.rand(200, generator=generator) < chances).float()


def rows_of_scales():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 6, generator=generator) * torch.logspace(-1, 1, 6)


MODELS = {
    "prior": (prior, ()),
    "eight_schools": (eight_schools.noncentered, eight_schools.data()),
    "eight_schools_centered": (eight_schools.centered, eight_schools.data()),
    "logistic": (logistic, rows_of_logistic()),
    "scales": (scales, (rows_of_scales(),)),
    "correlated": (correlated, ()),
}


def make_guide(name, model):
    kind, _, flow = name.partition(" ")
    return AutoFlow(model, flow) if flow else GUIDES[kind](model)


def run(job, steps):
    """Do one fit and return its loss."""
    model, args = MODELS[job["model"]]
    pyro.clear_param_store()
    pyro.set_rng_seed(job["seed"])
    guide = make_guide(job["guide"], model)
    count, vectorized = PARTICLES[job["particles"]]
    elbo = partial(Trace_ELBO, max_plate_nesting=2)
    svi = SVI(
        model,
        guide,
        OPTIMIZERS[job["optimizer"]]({"lr": job["rate"]}),
        elbo(num_particles=count, vectorize_particles=vectorized),
    )
    loss = partial(elbo(num_particles=NUM_DRAWS, vectorize_particles=True).loss, model, guide, *args)
    guide(*args)
    with torch.random.fork_rng():
        before = sum(loss() for _ in range(NUM_STATES)) / NUM_STATES
    losses, seconds = [], 0.0
    measured = {steps - 1 - state * steps // (10 * NUM_STATES) for state in range(NUM_STATES)}
    try:
        for step in range(steps):
            start = time.perf_counter()
            svi.step(*args)
            seconds += time.perf_counter() - start
            if step in measured:
                losses.append(loss())
    except ValueError:  # of Pyro, where parameters of a distribution are NaN
        losses = [math.nan]
    after = sum(losses) / len(losses)
    return {"loss": after, "before": before, "diverged": not after < before, "ms/step": 1000 * seconds / steps}


def show(records):
    """Print a line for each guide and optimizer, a column for each model, and a block for each number of particles."""
    table = pd.DataFrame(records)
    table["loss"] = table["loss"].where(table["loss"].notna(), math.inf)
    keys = ["model", "particles", "optimizer", "guide", "rate"]
    lines = table.groupby(keys, sort=False).agg(loss=("loss", "median"), diverged=("diverged", "mean")).reset_index()
    lines["loss"] -= lines.groupby("model")["loss"].transform("min")
    for particles, block in lines.groupby("particles", sort=False):
        wide = block.pivot_table(
            index=["optimizer", "guide", "rate"], columns="model", values=["loss", "diverged"], sort=False
        )
        print(f"\n{particles} particles: loss less the lowest")
        print(wide["loss"].to_string(float_format="%.2f"))
        bad = wide["diverged"][wide["diverged"].gt(0).any(axis=1)]
        print("diverged: " + ("none" if bad.empty else "\n" + bad.to_string(float_format="%.2f")))
    print("\nms/step:")
    print(
        table.groupby(["particles", "guide"], sort=False)["ms/step"].median().unstack().to_string(float_format="%.2f")
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--guides", nargs="+", default=list(COMPARED))
    parser.add_argument("--rates", nargs="+", type=float)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS)
    parser.add_argument("--particles", nargs="+", choices=PARTICLES)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--results", type=Path, default=Path("plain_svi.jsonl"))
    options = parser.parse_args()
    rates = options.rates or ((0.01, 0.05) if options.quick else RATES)
    optimizers = options.optimizers or list(OPTIMIZERS)[: 1 if options.quick else None]
    particles = options.particles or (["1", "10"] if options.quick else list(PARTICLES))
    steps = options.steps or (400 if options.quick else 1000)
    todo = [
        {
            "model": model,
            "particles": count,
            "optimizer": optimizer,
            "guide": guide,
            "rate": rate,
            "steps": steps,
            "seed": seed,
        }
        for seed in range(options.seeds or (1 if options.quick else 3))
        for count in particles
        for optimizer in optimizers
        for rate in rates
        for guide in options.guides
        for model in options.models
    ]
    show(jobs.do(partial(run, steps=steps), todo, options.results))


if __name__ == "__main__":
    main()
