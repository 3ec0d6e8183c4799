"""Posteriors that are known to be difficult, fitted by defaults: divergence, evidence, moments, modes, time.

python benchmarks/hard_posteriors.py [--names funnel banana ...] [--seeds 5] [--processes 1] [--results hard.jsonl]

Every fit is `FlowSVI(model, AutoFlow(model), seed=seed).run(*args)`, one configuration for all; many_wells has another
line with `AutoFlow(model, base="mixture")`. Evidence, means and sds are exact, or those of
`benchmarks/references/hard.json`, which hard_references.py makes by long runs of NUTS. `gap` is the log evidence less
the ELBO, and `evidence off` the error of the log evidence by importance weights, in nats; `mean off` and `sd off` the
largest error of a latent's mean, in its sds, and of its sd, relative (for the funnel's x, of the width of the central
90%: its sd cannot be told from draws), from 100,000 draws as they are; `mass off` the largest error of the mass of a
mode of a well; `missed` counts fits that are more than .1 nats off, or .1 sds, or .1 of a mode's mass, and not flagged.
Fits that `--results` holds already are not done again. Each process has one thread.
"""

import argparse
import json
import math
import time
from functools import partial
from pathlib import Path

import jobs
import pandas as pd
import pyro
import torch

from pyro_nf.diagnostics import diagnose
from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI
from pyro_nf.models.benchmarks import hard_posteriors

REFERENCES = Path(__file__).parent / "references" / "hard.json"
GUIDES = {"AutoFlow": AutoFlow, "AutoFlow, mixture": partial(AutoFlow, base="mixture")}
MIXTURES = ("many_wells",)
NUM_DRAWS, CHUNK = 100_000, 10_000
# A fit that is further off than this, in nats, sds or mass, and not flagged, is a silent failure.
FAR_OFF = 0.1


def load(name):
    """Return the posterior, its reference in place of exact figures that it has not."""
    posterior = hard_posteriors.load(name)
    if posterior.mean is not None or not REFERENCES.exists():
        return posterior
    record = json.loads(REFERENCES.read_text())[name]
    mean, sd = (
        {site: torch.tensor(figures[moment], dtype=torch.float64) for site, figures in record["sites"].items()}
        for moment in ("mean", "sd")
    )
    return posterior._replace(log_evidence=record["log_evidence"], mean=mean, sd=sd)


def errors(posterior, guide):
    """Return the largest errors of a mean, of an sd, and of the mass of a mode."""
    parts = [guide.sample_posterior(CHUNK, *posterior.args) for _ in range(NUM_DRAWS // CHUNK)]
    draws = {site: torch.cat([part[site] for part in parts]).reshape(NUM_DRAWS, -1) for site in posterior.mean}
    means, sds = [], []
    for site, value in draws.items():
        mean, sd = posterior.mean[site].flatten(), posterior.sd[site].flatten()
        free = sd > 0  # a Cholesky factor has entries that are constant
        means.append(((value.mean(0) - mean) / sd)[free].abs().max())
        if site in posterior.width:
            low, high = value.quantile(value.new_tensor([0.05, 0.95]), 0)
            sds.append(((high - low) / posterior.width[site] - 1).abs().max())
        else:
            sds.append((value.std(0) / sd - 1)[free].abs().max())
    mass = None
    if posterior.model is hard_posteriors.many_wells:
        mass = float(((draws["x"] > 0).double().mean(0) - hard_posteriors.double_well().right_mass).abs().max())
    return {"mean off": float(max(means)), "sd off": float(max(sds)), "mass off": mass}


def run(job):
    """Do one fit and return what was found."""
    posterior, seed = load(job["posterior"]), job["seed"]
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    start = time.perf_counter()
    guide = GUIDES[job["method"]](posterior.model)
    result = FlowSVI(posterior.model, guide, seed=seed, progress=False).run(*posterior.args)
    seconds = time.perf_counter() - start
    found = diagnose(posterior.model, guide, *posterior.args)
    known = posterior.log_evidence is not None
    return {
        "steps": result.steps,
        "stages": ", ".join(f"{stage.name} {stage.seconds:.1f}" for stage in result.stages),
        "converged": result.converged,
        "seconds": seconds,
        "gap": posterior.log_evidence - found.elbo if known else math.nan,
        "evidence off": found.log_evidence - posterior.log_evidence if known else math.nan,
        "evidence se": found.log_evidence_se,
        "ESS": found.ess_fraction,
        "k-hat": found.khat,
        **(errors(posterior, guide) if posterior.mean is not None else {}),
        "reliable": found.reliable,
        "verdict": found.verdict.value,
        "reasons": " ".join(found.reasons),
    }


def show(records):
    """Print a line for each posterior and method, medians over seeds and worst ones."""
    table = pd.DataFrame(records)
    unsigned = ["evidence off", "mean off", "sd off", "mass off"]
    table[unsigned] = table[unsigned].astype(float).abs()
    reliable = table["reliable"].astype(bool)
    off = (table[["gap", "mean off", "mass off"]].fillna(0) > FAR_OFF).any(axis=1)
    table["flagged"], table["missed"] = (~reliable).astype(int), (off & reliable).astype(int)
    lines = table.groupby(["posterior", "method"]).agg(
        seeds=("seed", "size"),
        gap=("gap", "median"),
        worst=("gap", "max"),
        evidence_off=("evidence off", "max"),
        ESS=("ESS", "min"),
        khat=("k-hat", "max"),
        mean_off=("mean off", "max"),
        sd_off=("sd off", "max"),
        mass_off=("mass off", "max"),
        seconds=("seconds", "median"),
        flagged=("flagged", "sum"),
        missed=("missed", "sum"),
    )
    print(lines.to_string(float_format="%.4f", na_rep="-"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", choices=hard_posteriors.names(), default=hard_posteriors.names())
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path("hard.jsonl"))
    options = parser.parse_args()
    wanted = [
        {"posterior": name, "method": method, "seed": seed}
        for seed in range(options.seeds)
        for name in options.names
        for method in (GUIDES if name in MIXTURES else ["AutoFlow"])
    ]
    show(jobs.do(run, wanted, options.results, options.processes))


if __name__ == "__main__":
    main()
