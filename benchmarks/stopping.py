"""How often FlowSVI stops too early: fits to targets whose best ELBO is known, from many seeds.

python benchmarks/stopping.py [--seeds 25] [--json results.json]

A run has stopped falsely if it says that it converged and its ELBO is more than 0.05 nats (and two standard errors)
below the best that the guide's family has.
"""

import argparse
import json
import math
from pathlib import Path

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI

TOLERANCE = 0.05


def covariance(dim):
    """Return a covariance with correlations up to 0.95 and scales from 0.3 to 3."""
    index = torch.arange(dim)
    scales = torch.logspace(-0.5, 0.5, dim)
    return 0.95 ** (index[:, None] - index).abs() * scales[:, None] * scales


def correlated():
    """Ten correlated normals."""
    pyro.sample("z", dist.MultivariateNormal(torch.arange(10.0), covariance(10)))


def scaled():
    """Independent normals with scales from 0.1 to 10."""
    pyro.sample("z", dist.Normal(torch.zeros(10), torch.logspace(-1, 1, 10)).to_event(1))


DESIGN = torch.stack([torch.ones(100), torch.linspace(-2, 2, 100)], -1)
RESPONSE = DESIGN @ torch.tensor([1.0, -2.0]) + torch.sin(torch.arange(100.0))


def regression():
    """Conjugate regression, ten rows of a hundred at a time."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    with pyro.plate("rows", 100, subsample_size=10) as rows:
        pyro.sample("y", dist.Normal(DESIGN[rows] @ beta, 1.0), obs=RESPONSE[rows])


def mean_field_gap():
    """KL from the best product of normals to `correlated`: half the log of det(cov) prod(diag(cov^-1))."""
    cov = covariance(10).double()
    return 0.5 * float(cov.logdet() + cov.inverse().diagonal().log().sum())


def log_evidence():
    """Log evidence of `regression`."""
    cov = torch.eye(100) + 25.0 * DESIGN @ DESIGN.T
    return float(dist.MultivariateNormal(torch.zeros(100).double(), cov.double()).log_prob(RESPONSE.double()))


WORKS = {
    "correlated, full-rank": (correlated, AutoMultivariateNormal, 0.0),
    "correlated, AutoFlow": (correlated, AutoFlow, 0.0),
    "correlated, mean-field": (correlated, AutoNormal, -mean_field_gap()),
    "scales .1-10, mean-field": (scaled, AutoNormal, 0.0),
    "regression by minibatches, full-rank": (regression, AutoMultivariateNormal, log_evidence()),
}


def run(name, seed):
    """Fit once and compare with the best ELBO."""
    model, guide, best = WORKS[name]
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    result = FlowSVI(model, guide(model), seed=seed, eval_particles=10_000, progress=False).run()
    gap = best - result.elbo
    return {
        "work": name,
        "seed": seed,
        "converged": result.converged,
        "steps": result.steps,
        "learning rate": result.learning_rate,
        "gap": gap,
        "mcse": result.elbo_mcse,
        "false stop": result.converged and gap > max(TOLERANCE, 2 * result.elbo_mcse),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=25)
    parser.add_argument("--works", nargs="+", default=list(WORKS), choices=list(WORKS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.works:
        rows += [run(name, seed) for seed in range(options.seeds)]
        frame = pd.DataFrame(rows[-options.seeds :])
        low, middle, high = frame["gap"].quantile([0, 0.5, 1])
        print(
            f"{name:40s} converged {frame['converged'].mean():.2f}  false stops {int(frame['false stop'].sum())} of "
            f"{len(frame)}  steps {frame['steps'].median():.0f}  gap {middle:.4f} ({low:.4f} to {high:.4f})",
            flush=True,
        )
    falsely = sum(row["false stop"] for row in rows)
    share = falsely / len(rows)
    print(f"false-stop rate {share:.3f} +- {math.sqrt(share * (1 - share) / len(rows)):.3f} ({falsely} of {len(rows)})")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
