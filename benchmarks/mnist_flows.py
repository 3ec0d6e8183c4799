"""Posterior families of a variational autoencoder of MNIST, under one budget: bound, log-likelihood, time.

python benchmarks/mnist_flows.py [--families planar-10 iaf-4 ...] [--epochs 40] [--seeds 3] [--samples 500]
    [--images 10000] [--processes 1] [--device cpu] [--results mnist_flows.jsonl] [--figure mnist_flows.png]

The model: 40 latents, a gated decoder 300-300, static binary MNIST (Larochelle's). The guide: a gated encoder 300-300,
whose last layer sets every parameter of the posterior, a normal with diagonal covariance and then a flow. All families
have the same epochs, minibatches of 100, Adam at 5e-4 until two thirds of the epochs and down along a cosine to the
end, and a divergence that is phased in over the first fifth (`KLAnnealedELBO`); the gradient is the total one. From one
seed all have the same initial encoder and decoder. Steps are FlowSVI's compiled ones, on data that live on the device.

`ELBO` and `log p`, by `--samples` draws an image, are nats per test image: the bound on all 10,000, importance
sampling on `--images` of them, evenly spaced. `gap` is log p less that of the family without flow, paired by seed; it
is inside the noise if it is less than two standard errors, from the spread of such gaps over seeds, pooled over all
families.

Fits that `--results` holds already are not done again, and one that was interrupted goes on from its last epoch (its
state is kept beside the results). `--families` takes names, "cheap" (the default) or "all". Each process has one thread
on the CPU. The data come from the folder `PYRO_NF_DATA`, or are downloaded.
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import jobs
import pandas as pd
import pyro
import torch
from torch import nn

from pyro_nf.diagnostics import local_evidence
from pyro_nf.flows import Householder, stacks
from pyro_nf.guides import AmortizedFlow
from pyro_nf.inference import FlowSVI, Status
from pyro_nf.inference.elbo import KLAnnealedELBO
from pyro_nf.models import VAE
from pyro_nf.models.benchmarks.images import load_static_mnist
from pyro_nf.networks import GatedLinear, GatedMLP

LATENTS, HIDDEN, BATCH, RATE = 40, 300, 100, 5e-4
WARM_UP = 0.2  # of the epochs
CHUNK = 20, 500  # draws and images at once, in evaluations


class Family(NamedTuple):
    """A kind of posterior, its number of flow steps, and `(dim, context_dim=) -> Flow`; `None` for no flow."""

    kind: str
    length: int
    flow: Callable[..., object] | None


def stack(kind, length, name, **options):
    return Family(kind, length, partial(stacks.make, name, **{"depth": length, **options}))


def reflections(dim, context_dim, number):
    return Householder(dim, number, context_dim)


IAF_WIDTH, COUPLING_WIDTHS, UNITS = (320,), (100, 100), {"num_units": 16}
FAMILIES = {
    "none": Family("none", 0, None),
    **{f"planar-{k}": stack("planar", k, "planar") for k in (10, 20, 40)},
    **{f"radial-{k}": stack("radial", k, "radial") for k in (10, 20, 40)},
    **{f"householder-{k}": Family("Householder", k, partial(reflections, number=k)) for k in (1, 10)},
    "linear-iaf": stack("linear IAF", 1, "linear_iaf"),
    "cc-linear-iaf-5": stack("ccLinIAF, 5 matrices", 1, "linear_iaf", num_matrices=5),
    **{f"nice-perm-{k}": stack("NICE-perm", k, "nice_perm", hidden_dims=COUPLING_WIDTHS) for k in (4, 8)},
    **{f"nice-ortho-{k}": stack("NICE-ortho", k, "nice_ortho", hidden_dims=COUPLING_WIDTHS) for k in (4, 8)},
    **{f"realnvp-{k}": stack("RealNVP", k, "realnvp", hidden_dims=COUPLING_WIDTHS) for k in (4, 8)},
    **{f"iaf-{k}": stack("IAF", k, "iaf", hidden_dims=IAF_WIDTH) for k in (2, 4, 8)},
    # As many units as the paper's smaller ones; the triangular basis has all 40.
    **{
        f"sylvester-{basis}-{k}": stack(f"Sylvester, {basis}", k, f"sylvester_{basis}", **options)
        for basis, options in {"orthogonal": UNITS, "householder": UNITS, "triangular": {}}.items()
        for k in (4, 8)
    },
    **{f"naf-{k}": stack("NAF-DSF", k, "naf", hidden_dims=IAF_WIDTH) for k in (2, 4)},
}
CHEAP = ["none", "planar-10", "planar-20", "planar-40", "householder-1", "householder-10", "linear-iaf", "iaf-4"]
CHEAP += [f"sylvester-{basis}-4" for basis in ("orthogonal", "householder", "triangular")]


class Job(NamedTuple):
    """One fit and its evaluation: what makes a record of the results."""

    family: str
    seed: int
    epochs: int
    samples: int
    images: int
    device: str


def checkpoint_of(job, folder):
    return folder / f"{job.family}-{job.seed}-{job.epochs}.pt"


def fit(job, images, folder, progress):
    """Fit, or go on with a fit; return model, guide and what the fit says of itself."""
    pyro.clear_param_store()
    pyro.set_rng_seed(job.seed)
    pixels = images.train.shape[1]
    model = VAE(pixels, LATENTS, GatedMLP(LATENTS, (HIDDEN, HIDDEN), pixels)).to(job.device)
    encoder = nn.Sequential(GatedLinear(pixels, HIDDEN), GatedLinear(HIDDEN, HIDDEN)).to(job.device)
    guide = AmortizedFlow(model, encoder, FAMILIES[job.family].flow, affine="first")
    steps = len(images.train) // BATCH
    checkpoint = checkpoint_of(job, folder)
    laps = [time.perf_counter()]
    svi = FlowSVI(
        model,
        guide,
        objective=KLAnnealedELBO(int(WARM_UP * job.epochs * steps), sticking_the_landing=False),
        num_particles=1,
        learning_rate=RATE,
        max_steps=job.epochs * steps,
        eval_every=steps,
        compile=True,
        checkpoint=checkpoint,
        callbacks=[lambda evaluation: laps.append(time.perf_counter())],
        seed=job.seed,
        progress=progress,
    )
    result = (svi.resume if checkpoint.exists() else svi.run)(images.train, batch_size=BATCH)
    if result.status is Status.INTERRUPTED:
        raise KeyboardInterrupt
    # The first lap holds the compilation.
    each = sorted(after - before for before, after in pairwise(laps[1:])) or [math.nan]
    said = {
        "s/epoch": each[len(each) // 2],
        "compile": result.compile_seconds,
        "ran": result.execution,
        "epochs run": result.steps / steps,
        "stop": result.stop_reason,
        "skipped": result.num_skipped,
        "train ELBO": result.elbo / len(images.train),
        "curve": [evaluation.elbo / len(images.train) for evaluation in result.evaluations],
        "parameters": sum(param.numel() for part in (model, guide) for param in part.parameters()),
    }
    return model, guide, said


def evaluate(model, guide, images, num_samples):
    """Return the mean ELBO and the mean importance-sampled log-likelihood of images."""
    draws, at_once = CHUNK
    found = [
        local_evidence(model, guide, part, num_samples=num_samples, chunk_size=draws) for part in images.split(at_once)
    ]
    elbo, log_p = (torch.cat([getattr(part, name) for part in found]) for name in ("elbo", "log_evidence"))
    return float(elbo.mean()), float(log_p.mean())


def run(job, folder, progress):
    """Fit and evaluate; return what was found."""
    job = Job(**job)
    images = load_static_mnist(device=job.device)
    model, guide, said = fit(job, images, folder, progress)
    start = time.perf_counter()
    pyro.set_rng_seed(job.seed)
    # Evenly spaced: the file is in the order of the digits, more or less.
    is_chosen = torch.zeros(len(images.test), dtype=torch.bool, device=job.device)
    is_chosen[torch.linspace(0, len(images.test) - 1, job.images, device=job.device).long()] = True
    chosen, rest = images.test[is_chosen], images.test[~is_chosen]
    elbo, log_p = evaluate(model, guide, chosen, job.samples)
    if len(rest):  # a bound takes fewer draws
        other, _ = evaluate(model, guide, rest, CHUNK[0])
        elbo = (len(chosen) * elbo + len(rest) * other) / len(images.test)
    validation, _ = evaluate(model, guide, images.validation, CHUNK[0])
    family = FAMILIES[job.family]
    checkpoint_of(job, folder).unlink()
    return {
        "kind": family.kind,
        "length": family.length,
        "ELBO": elbo,
        "log p": log_p,
        "validation ELBO": validation,
        **said,
        "evaluation": time.perf_counter() - start,
    }


def show(records):
    """Print a line for each family, and what is inside the noise."""
    table = pd.DataFrame(records).drop(columns="curve")
    groups = table.groupby("family", sort=False)
    lines = groups.agg(
        length=("length", "first"),
        seeds=("seed", "size"),
        ELBO=("ELBO", "mean"),
        sd=("ELBO", "std"),
        log_p=("log p", "mean"),
        sd_log_p=("log p", "std"),
        train=("train ELBO", "mean"),
        validation=("validation ELBO", "mean"),
        epochs=("epochs run", "mean"),
        seconds=("s/epoch", "median"),
        ran=("ran", "first"),
        parameters=("parameters", "first"),
    ).sort_values("log_p")
    by_seed = table.pivot(index="family", columns="seed", values="log p").dropna()
    if "none" in by_seed.index:
        lines["gap"] = by_seed.sub(by_seed.loc["none"]).mean(axis=1)
    lines["to the next"] = lines["log_p"].diff()
    print(lines.to_string(float_format="{:.2f}".format))
    num_families, num_seeds = by_seed.shape
    if min(num_families, num_seeds) > 1:
        # Families and seeds explain a table of log p but for this scatter.
        residual = by_seed.sub(by_seed.mean(axis=1), axis=0).sub(by_seed.mean(axis=0), axis=1) + by_seed.stack().mean()
        variance = float((residual**2).to_numpy().sum()) / ((num_families - 1) * (num_seeds - 1))
        noise = 2 * math.sqrt(2 * variance / num_seeds)
        print(f"two standard errors of a difference of two families: {noise:.2f} nats; inside this noise:")
        close = lines.index[lines["to the next"] < noise]
        position = {name: k for k, name in enumerate(lines.index)}
        print(
            "; ".join(f"{lines.index[position[name] - 1]} < {name}" for name in close) or "no neighbours in the table"
        )


def draw(records, path):
    """Draw the negative log-likelihood, and the negative bound, against the number of flow steps."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    table = pd.DataFrame(records)
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    kinds = [kind for kind in table["kind"].unique() if kind != "none"]
    colors = plt.get_cmap("tab20").colors
    for axis, column, title in zip(axes, ("log p", "ELBO"), ("-log p(x), importance sampled", "-ELBO"), strict=True):
        base = -table[table["kind"] == "none"][column]
        if len(base):
            axis.axhline(base.mean(), color="k", linestyle="--", linewidth=1, label="no flow")
            axis.axhspan(base.min(), base.max(), color="k", alpha=0.1, linewidth=0)
        for kind, color, marker in zip(kinds, colors, "osD^v<>Ph*Xd" * 2, strict=False):
            found = -table[table["kind"] == kind].groupby("length")[column].agg(["mean", "min", "max"])
            # After the change of sign, "min" is the largest.
            spread = [found["mean"] - found["max"], found["min"] - found["mean"]]
            axis.errorbar(found.index, found["mean"], spread, color=color, marker=marker, capsize=3, label=kind)
        axis.set(xscale="log", xlabel="flow steps", ylabel="nats per test image", title=title)
        axis.set_xticks([1, 2, 4, 8, 10, 20, 40], [1, 2, 4, 8, 10, 20, 40], minor=False)
        axis.minorticks_off()
    axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    figure.suptitle("Static MNIST: mean and range over seeds (lower is better)")
    figure.savefig(path, dpi=120)


def chosen_families(names):
    """Return the names of families that the command line stands for."""
    found = list(FAMILIES) if "all" in names else [*(CHEAP if "cheap" in names else ())]
    found += [name for name in names if name not in ("all", "cheap", *found)]
    if unknown := [name for name in found if name not in FAMILIES]:
        raise SystemExit(f"--families takes cheap, all, {', '.join(FAMILIES)}; got {', '.join(unknown)}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["cheap"])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=500, help="draws for each image's log-likelihood")
    parser.add_argument("--images", type=int, default=10_000, help="test images for the log-likelihood")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--progress", action="store_true")
    parser.add_argument("--results", type=Path, default=Path("mnist_flows.jsonl"))
    parser.add_argument("--figure", type=Path, default=Path("mnist_flows.png"))
    options = parser.parse_args()
    folder = options.results.with_suffix(".checkpoints")
    folder.mkdir(parents=True, exist_ok=True)
    budget = (options.epochs, options.samples, options.images, options.device)
    families = chosen_families(options.families)
    found = jobs.do(
        partial(run, folder=folder, progress=options.progress),
        [Job(name, seed, *budget)._asdict() for seed in range(options.seeds) for name in families],
        options.results,
        options.processes,
        lambda record: (
            f"ELBO {record['ELBO']:.2f}, log p {record['log p']:.2f}, {record['s/epoch']:.2f} s an epoch "
            f"({record['ran']})"
        ),
    )
    show(found)
    draw(found, options.figure)


if __name__ == "__main__":
    main()
