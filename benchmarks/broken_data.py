"""Fifty small random models, each with valid data and with data broken in one way: is a broken one ever called right?

`python benchmarks/broken_data.py --models 50 --json broken.json`; a minute or two on one core.
"""

import argparse
import json
import math
import random
import warnings
from collections import Counter

import pyro
import pyro.distributions as dist
import torch
from torch.nn.functional import softplus

from pyro_nf.diagnostics import diagnose
from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI

# Likelihoods of a linear predictor, and a value outside the support of each.
FAMILIES = {
    "normal": (lambda eta: dist.Normal(eta, 1.0), math.inf),
    "student_t": (lambda eta: dist.StudentT(4.0, eta, 1.0), -math.inf),
    "log_normal": (lambda eta: dist.LogNormal(eta, 0.5), -1.0),
    "poisson": (lambda eta: dist.Poisson(eta.clamp(-5, 5).exp()), 1.5),
    "negative_binomial": (lambda eta: dist.GammaPoisson(5.0, 5.0 / eta.clamp(-5, 5).exp()), -2.0),
    "bernoulli": (lambda eta: dist.Bernoulli(logits=eta), 2.0),
    "binomial": (lambda eta: dist.Binomial(10, logits=eta), 11.0),
    "exponential": (lambda eta: dist.Exponential(softplus(eta) + 0.1), -0.5),
    "gamma": (lambda eta: dist.Gamma(2.0, softplus(eta) + 0.1), -3.0),
    "beta": (lambda eta: dist.Beta(softplus(eta) + 0.5, 2.0), 1.5),
}
BREAKS = ("NaN in data", "infinity in data", "value outside the support", "NaN in a covariate", "infinite covariate")


def make(rng: random.Random) -> tuple[str, object, torch.Tensor, torch.Tensor, float]:
    """Return a random regression, some with groups: its description, model, covariates, data, and a broken value."""
    family = rng.choice(sorted(FAMILIES))
    likelihood, outside = FAMILIES[family]
    rows, width, groups = rng.randint(10, 60), rng.randint(1, 4), rng.choice([0, 0, 3])
    scale = rng.choice([0.5, 1.0])
    x, group = torch.randn(rows, width), torch.arange(rows) % max(groups, 1)

    def model(x, y=None):
        beta = pyro.sample("beta", dist.Normal(torch.zeros(width), scale).to_event(1))
        eta = x @ beta
        if groups:
            tau = pyro.sample("tau", dist.HalfNormal(0.5))
            with pyro.plate("group", groups):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            eta = eta + (tau * z)[group]
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", likelihood(eta), obs=y)

    with torch.no_grad():
        y = model(x)
    return f"{family}, {rows} x {width}, {groups} groups", model, x, y, outside


def broken(kind: str, x: torch.Tensor, y: torch.Tensor, outside: float, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return copies of covariates and data, one number of which is broken."""
    x, y = x.clone(), y.clone()
    if "covariate" in kind:
        x[row, 0] = math.nan if "NaN" in kind else math.inf
    else:
        y[row] = {"N": math.nan, "i": math.inf, "v": outside}[kind[0]]
    return x, y


def verdict(model: object, x: torch.Tensor, y: torch.Tensor) -> tuple[str, str]:
    """Fit and diagnose: the verdict, or "refused" and the sentence."""
    pyro.clear_param_store()
    guide = AutoFlow(model)
    try:
        FlowSVI(model, guide, seed=0, progress=False, max_steps=3000, max_seconds=20).run(x, y)
        return str(diagnose(model, guide, x, y, num_samples=2000, progress=False).verdict), ""
    except ValueError as error:
        return "refused", str(error).splitlines()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rng, rows = random.Random(options.seed), []
    for number in range(options.models):
        pyro.set_rng_seed(1000 * options.seed + number)
        name, model, x, y, outside = make(rng)
        kind = BREAKS[number % len(BREAKS)]
        good, _ = verdict(model, x, y)
        bad, sentence = verdict(model, *broken(kind, x, y, outside, rng.randrange(len(y))))
        rows.append({"model": name, "valid": good, "break": kind, "broken": bad, "sentence": sentence})
        print(f"{number:3} {name:38} valid: {good:24} {kind:26} {bad}: {sentence[:90]}", flush=True)
    print("valid: ", dict(Counter(row["valid"] for row in rows)))
    print("broken:", dict(Counter(row["broken"] for row in rows)))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
