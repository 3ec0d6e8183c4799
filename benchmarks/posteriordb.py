"""Posteriors of posteriordb, fitted by defaults: divergence, weights, means and standard deviations, time.

python benchmarks/posteriordb.py [--folder FOLDER] [--names garch-garch11 ...] [--seeds 5] [--processes 2]
    [--peers] [--results results.jsonl]

Every fit is `FlowSVI(model, AutoFlow(model), seed=seed).run(*data)`, one configuration for all. `gap` is the known log
evidence less the ELBO, in nats; `mean off` and `sd off` the largest error of a latent's mean, in reference sds, and of
its sd, relative, from 100,000 draws as they are; `missed` counts fits that are more than .1 nats off and not flagged.
`--peers` gives others 20 s each: Pyro's guides in Pyro's own SVI, Adam at 0.01; NumPyro's and PyMC's as
`posteriordb_peers.py` says (`pip install numpyro pymc`), by the weights of their draws under our model's density, with
no verdict. Fits that `--results` holds already are not done again. Each process has one thread.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import jobs
import pandas as pd
import posteriordb_peers
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from pyro.optim import Adam

from pyro_nf.diagnostics import diagnose
from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI
from pyro_nf.models.benchmarks import posteriordb

PEERS = {
    "Pyro AutoNormal": AutoNormal,
    "Pyro AutoMultivariateNormal": AutoMultivariateNormal,
    "Pyro AutoIAFNormal": AutoIAFNormal,
}
PEER_SECONDS = 20.0


def defaults(posterior, seed):
    """Fit by defaults; return the guide and what the fit says of itself."""
    guide = AutoFlow(posterior.model)
    result = FlowSVI(posterior.model, guide, seed=seed, progress=False).run(*posterior.args)
    return guide, {
        "steps": result.steps,
        "stages": ", ".join(f"{stage.name} {stage.seconds:.1f}" for stage in result.stages),
        "converged": result.converged,
    }


def peer(make_guide, posterior, seed):
    """Run Pyro's SVI for 20 s."""
    guide = make_guide(posterior.model)
    svi = SVI(posterior.model, guide, Adam({"lr": 0.01}), Trace_ELBO())
    start, steps = time.perf_counter(), 0
    # Pyro makes its guides' networks in the default dtype; the data are in float64.
    torch.set_default_dtype(torch.float64)
    try:
        while time.perf_counter() - start < PEER_SECONDS:
            svi.step(*posterior.args)
            steps += 1
    finally:
        torch.set_default_dtype(torch.float32)
    return guide, {"steps": steps, "stages": "", "converged": False}


def moments(posterior, guide):
    """Return the largest errors of a mean and of an sd."""
    draws = guide.sample_posterior(100_000, *posterior.args)
    means, sds = [], []
    for name, value in draws.items():
        reference = posterior.reference[name].flatten(0, 1)
        sd = reference.std(0)
        means.append(((value.mean(0) - reference.mean(0)) / sd).abs().max())
        sds.append((value.std(0) / sd - 1).abs().max())
    return float(max(means)), float(max(sds))


def run(job, folder):
    """Do one fit and return what was found."""
    method, seed = job["method"], job["seed"]
    posterior = posteriordb.load(job["posterior"], folder)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    mean_off = sd_off = None
    if method in posteriordb_peers.FITS:
        draws = posteriordb_peers.fit(posterior, method, PEER_SECONDS, seed)
        seconds, said = draws.seconds, {"steps": draws.steps, "stages": "", "converged": False}
        found, verdict = posteriordb_peers.weigh(posterior, draws), {"reliable": None, "verdict": "", "reasons": ""}
    else:
        fit = defaults if method == "AutoFlow" else partial(peer, PEERS[method])
        start = time.perf_counter()
        guide, said = fit(posterior, seed)
        seconds = time.perf_counter() - start
        found = diagnose(posterior.model, guide, *posterior.args)
        verdict = {"reliable": found.reliable, "verdict": found.verdict.value, "reasons": " ".join(found.reasons)}
    if method == "AutoFlow":
        mean_off, sd_off = moments(posterior, guide)
    return {
        **said,
        "seconds": seconds,
        "gap": posterior.log_evidence - found.elbo,
        "evidence off": found.log_evidence - posterior.log_evidence,
        "ESS": found.ess_fraction,
        "k-hat": found.khat,
        "mean off": mean_off,
        "sd off": sd_off,
        **verdict,
    }


def show(records):
    """Print a line for each posterior and method, medians over seeds and worst ones."""
    table = pd.DataFrame(records)
    table["missed"] = table["reliable"].eq(True) & (table["gap"] > 0.1)
    groups = table.groupby(["method", "posterior"])
    lines = groups.agg(
        seeds=("seed", "size"),
        gap=("gap", "median"),
        worst=("gap", "max"),
        ESS=("ESS", "min"),
        khat=("k-hat", "max"),
        mean_off=("mean off", "max"),
        sd_off=("sd off", "max"),
        seconds=("seconds", "median"),
        flagged=("reliable", lambda values: int(values.eq(False).sum())),
        missed=("missed", "sum"),
    )
    print(lines.to_string(float_format="%.4f"))
    for method, part in lines.groupby(level=0):
        print(
            f"{method}: {len(part)} posteriors, median gap {part['gap'].median():.4f}, worst "
            f"{part['worst'].max():.4f}, least ESS {part['ESS'].min():.3f}, highest k-hat {part['khat'].max():.2f}, "
            f"median {part['seconds'].median():.1f} s, missed {part['missed'].sum()}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="posteriordb's files; else PYRO_NF_POSTERIORDB")
    parser.add_argument("--names", nargs="+", default=posteriordb.names())
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--results", type=Path, default=Path("posteriordb.jsonl"))
    options = parser.parse_args()
    methods = ["AutoFlow", *((*PEERS, *posteriordb_peers.installed()) if options.peers else ())]
    wanted = [
        {"posterior": name, "method": method, "seed": seed}
        for seed in range(options.seeds)
        for name in options.names
        for method in methods
    ]
    show(jobs.do(partial(run, folder=options.folder), wanted, options.results, options.processes))


if __name__ == "__main__":
    main()
