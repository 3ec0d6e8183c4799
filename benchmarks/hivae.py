"""Missing entries of Wine, Adult and Breast filled in: HI-VAE with and without a flow, beside the columns' means.

python benchmarks/hivae.py [--tables Wine Adult Breast] [--percents 10 20 30 40 50] [--methods ...] [--seeds 3]
    [--steps 3000] [--processes 1] [--out hivae]

The entries that HI-VAE's authors held out (mask 1 of each percentage, completely at random) are predicted from the
others. Methods: `mean/mode`, each column's; `HI-VAE` with a normal posterior; `HI-VAE + IAF`, the same with an
inverse autoregressive flow as posterior; `missing flow`, that with columns that depend on the columns before them, by
MADE's masks. The last three have one budget: minibatches of 128 rows, one draw each, Adam at 0.005, `--steps` steps;
ten components, z of 10, y_d of 5, an encoder of 64 units.

Predictions are over 10 draws of the posterior. Errors are HI-VAE's: NRMSE of numbers, share of wrong classes,
displacement of ordinals over the number of classes, each averaged over the columns of the kind; `all` over all
columns. Numbers are filled in by their predictive mean; `all, mode` is with the mean of the likelihood's modes
instead. `nats` is the mean log predictive density of a held-out entry, higher is better.

`--out` gets results.jsonl, from which a run goes on where the last one stopped, and errors.png. The data are read from
the folder `hivae` of `PYRO_NF_DATA`, or downloaded. Each process has one thread.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import jobs
import matplotlib.pyplot as plt
import pandas as pd
import pyro
import torch

from pyro_nf.flows import ElementwiseAffine, stacks
from pyro_nf.guides import AmortizedFlow
from pyro_nf.inference import ELBO, FlowSVI
from pyro_nf.models import HIVAE, TableEncoder, imputation, tables

BASELINE = "mean/mode"
IAF = partial(stacks.make, "iaf", depth=2)
# Flow of the posterior, and whether columns depend on each other. The guide has an affine layer of its own.
METHODS = {"HI-VAE": (ElementwiseAffine, False), "HI-VAE + IAF": (IAF, False), "missing flow": (IAF, True)}
BATCH = 128
CONTEXT = 64
DRAWS = 10


def fit(table, method, seed, steps):
    """Fit a model and a guide to a table's observed entries, and return both and what the fit says."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    flow, neighbours = METHODS[method]
    model = HIVAE(table, neighbours=neighbours)
    guide = AmortizedFlow(model, TableEncoder(table, (CONTEXT,), CONTEXT), flow)
    start = time.perf_counter()
    result = FlowSVI(
        model,
        guide,
        # No sticking the landing: an inverse autoregressive flow scores a draw again in as many steps as z has entries.
        objective=ELBO(sticking_the_landing=False),
        num_particles=1,
        learning_rate=0.005,
        max_steps=steps,
        seed=seed,
        progress=False,
    ).run(table.values, table.observed, batch_size=BATCH)
    said = {
        "ELBO per row": result.elbo / len(table.values),
        "steps": result.steps,
        "skipped": result.num_skipped,
        "seconds": time.perf_counter() - start,
    }
    return model, guide, said


def run(job):
    """Do one fit and return what was found."""
    table = tables.load(job["table"], job["percent"])
    if job["method"] == BASELINE:
        filled = imputation.impute_by_column(table)
        return {"mean": imputation.errors(table, filled), "mode": imputation.errors(table, filled)}
    model, guide, said = fit(table, job["method"], job["seed"], job["max steps"])
    torch.manual_seed(job["seed"])
    found = imputation.impute(model, guide, table, num_samples=DRAWS)
    return {
        **said,
        "nats": float(found.log_prob[table.held_out].mean()),
        "mean": imputation.errors(table, found.mean),
        "mode": imputation.errors(table, found.mode),
    }


def by_kind(records):
    """Return a line for each fit: errors of each kind of column."""
    columns_of = {name: tables.load(name, 10).columns for name in {record["table"] for record in records}}
    lines = []
    for record in records:
        columns = columns_of[record["table"]]
        line = {name: record[name] for name in ("table", "percent", "method", "seed")}
        line["nats"] = record.get("nats")
        line.update(imputation.error_by_kind(columns, record["mean"]))
        line["all, mode"] = imputation.error_by_kind(columns, record["mode"])["all"]
        lines.append(line)
    return pd.DataFrame(lines)


def show(lines):
    """Print means over seeds, and the largest difference between seeds."""
    kinds = [kind for kind in ("all", "all, mode", *tables.KINDS, "nats") if kind in lines]
    for name, part in lines.groupby("table", sort=False):
        groups = part.groupby(["percent", "method"], sort=False)[kinds]
        spread = groups.agg(lambda values: values.max() - values.min()).max()
        print(f"\n{name}, means of {part['seed'].nunique()} seeds")
        print(groups.mean().dropna(axis=1, how="all").to_string(float_format="%.4f", na_rep=""))
        print("largest spread over seeds: " + ", ".join(f"{k} {v:.4f}" for k, v in spread.dropna().items()))


def draw(lines, folder):
    """Draw errors and log predictive densities against the part that is missing."""
    names = list(lines["table"].unique())
    methods = [BASELINE, *METHODS]
    percents = sorted(lines["percent"].unique())
    figure, axes = plt.subplots(2, len(names), figsize=(4.2 * len(names), 6.4), squeeze=False, layout="constrained")
    for column, name in zip(axes.T, names, strict=True):
        for axis, what in zip(column, ("all", "nats"), strict=True):
            part = lines[(lines["table"] == name) & lines[what].notna()]
            for method, fits in part.groupby("method", sort=False):
                groups = fits.groupby("percent")[what]
                mean, low, high = groups.mean(), groups.min(), groups.max()
                # A little aside, so that no spread hides another.
                at = mean.index + 0.5 * (methods.index(method) - 1.5)
                color = "0.5" if method == BASELINE else f"C{methods.index(method) - 1}"
                axis.errorbar(at, mean, [mean - low, high - mean], label=method, marker="o", capsize=2, color=color)
            axis.set(xticks=percents, xlim=(percents[0] - 5, percents[-1] + 5))
        column[0].set(title=name, ylabel="mean error of a column")
        column[1].set(xlabel="% missing", ylabel="nats per held-out entry")
        column[0].set_ylim(bottom=0)
    axes[0][0].legend()
    figure.savefig(folder / "errors.png", dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=tables.names(), default=["Wine", "Adult", "Breast"])
    parser.add_argument("--percents", type=int, nargs="+", choices=tables.PERCENTS, default=list(tables.PERCENTS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("hivae"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = [
        {"table": name, "percent": percent, "method": method, "seed": seed, "max steps": options.steps}
        for seed in range(options.seeds)
        for name in options.tables
        for percent in options.percents
        for method in (BASELINE, *options.methods)
        if method != BASELINE or seed == 0
    ]
    records = jobs.do(
        run,
        wanted,
        options.out / "results.jsonl",
        options.processes,
        lambda record: f"{record.get('seconds', 0.0):.0f} s",
    )
    lines = by_kind(records)
    show(lines)
    draw(lines, options.out)


if __name__ == "__main__":
    main()
