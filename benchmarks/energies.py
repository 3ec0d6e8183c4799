"""Flows on the four energies of Rezende & Mohamed, and neural autoregressive flow on the frequency of a sine.

python benchmarks/energies.py [--potentials U1 U2 U3 U4] [--flows planar ...] [--lengths 2 8 32] [--seeds 3]
    [--steps 2000] [--processes 1] [--out energies]

Each energy is the model `partial(energies.energy, U)` on [-4, 4]^2, whose evidence is Z; z has the square as its
support, so a flow's density is zero outside. Every fit is `FlowSVI` of an `AutoFlow` over K steps of a flow from a
standard normal, by one setting: 256 draws a step, Adam at 0.003, the energy annealed over the first four fifths of the
steps. `KL` is KL(q || p) in nats, the grid's ln Z less the ELBO of 100,000 draws (`MCSE` its standard error), `TV` the
total variation distance on a grid of 200 x 200, `outside` what the density has outside of the 99.9% region that the
exact one has.

The sine's frequency has a posterior with three modes, and half a one at 0. `naf` (two deep sigmoidal flows of 24
units; four times the steps) is fitted beside `iaf`, whose steps are affine in one dimension; `shares` are those of the
four.

`--out` gets results.jsonl, from which a run goes on where the last one stopped, the densities, and two figures:
energies.png, after figure 3 of the paper (the first seed), and sine.png. Each process has one thread.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import jobs
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import torch

from pyro_nf.diagnostics import diagnose
from pyro_nf.flows import stacks
from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI
from pyro_nf.inference.elbo import ELBO
from pyro_nf.models.benchmarks import energies

# NICE-ortho is the paper's; a spline step is a coupling.
FLOWS = {"planar": "planar", "radial": "radial", "NICE": "nice_ortho", "IAF": "iaf", "spline": "spline_coupling"}
SINE_FLOWS = {
    "naf": partial(stacks.make, "naf", depth=2, num_units=24),
    "iaf": partial(stacks.make, "iaf", depth=8),
}
# Between the sine's modes.
BORDERS = (0.0, 0.3, 0.9, 1.5, energies.MAX_FREQUENCY)
GRID = 200
DRAWS = 100_000


def fit(model, flow, data, seed, steps):
    """Fit a guide and return it, its diagnosis and the seconds."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = AutoFlow(model, flow, init_scale=1.0)
    start = time.perf_counter()
    result = FlowSVI(
        model,
        guide,
        # Scoring a draw a second time takes a root for each planar step: no sticking the landing, for none.
        objective=ELBO(sticking_the_landing=False, annealing_steps=4 * steps // 5),
        learning_rate=0.003,
        max_steps=steps,
        seed=seed,
        progress=False,
    ).run(*data)
    seconds = time.perf_counter() - start
    found = diagnose(model, guide, *data, num_samples=DRAWS)
    return guide, {
        "ELBO": found.elbo,
        "MCSE": found.elbo_mcse,
        "ESS": found.ess_fraction,
        "k-hat": found.khat,
        "steps": result.steps,
        "skipped": result.num_skipped,
        "seconds": seconds,
    }


@torch.no_grad()
def density(guide, site, points, data):
    """Return the guide's density at a grid's points, in the default dtype."""
    values = points.to(torch.get_default_dtype()).flatten(0, -2)
    parts = [guide.log_prob({site: part}, *data).exp() for part in values.split(10_000)]
    return torch.cat(parts).reshape(points.shape[:-1]).double()


def compare(found, exact):
    """Return the distance of two densities on one grid, and how much the first has where the second has nothing."""
    heights, order = exact.density.flatten().sort(descending=True)
    nowhere = order[(heights.cumsum(0) * exact.cell) > 0.999]
    return {
        "TV": float((found - exact.density).abs().sum() * exact.cell / 2),
        "outside": float(found.flatten()[nowhere].sum() * exact.cell),
    }


def run_energy(potential, flow, length, seed, steps):
    """Fit a flow to an energy and return its record and its density on the grid."""
    potential_of = energies.ENERGIES[potential]
    model, data = partial(energies.energy, potential_of), (energies.box(),)
    factory = partial(stacks.make, FLOWS[flow], depth=length)
    guide, record = fit(model, factory, data, seed, steps)
    exact = energies.energy_grid(potential_of, GRID)
    found = density(guide, "z", exact.points, data)
    log_evidence = energies.energy_grid(potential_of).log_evidence
    return {**record, "KL": log_evidence - record["ELBO"], **compare(found, exact)}, found


def run_sine(flow, seed, steps):
    """Fit a flow to the sine's frequency and return its record and its density on the grid."""
    data = energies.sine_data()
    guide, record = fit(energies.sine, SINE_FLOWS[flow], data, seed, 4 * steps)
    exact = energies.sine_grid(*data)
    found = density(guide, "f", exact.points[:, 0, None], data)
    draws = guide.sample_posterior(DRAWS, *data)["f"]
    shares = (torch.histogram(draws, torch.tensor(BORDERS)).hist / DRAWS).tolist()
    return {**record, "KL": exact.log_evidence - record["ELBO"], **compare(found, exact), "shares": shares}, found


def run(job, folder):
    """Do one fit, save its density, and return what was found."""
    target, flow, length, seed, steps = job.values()
    if target == "sine":
        record, found = run_sine(flow, seed, steps)
    else:
        record, found = run_energy(target, flow, length, seed, steps)
    np.save(density_file(folder, job), found.numpy().astype(np.float32))
    return record


def density_file(folder, record):
    names = "target", "flow", "K", "seed", "max steps"
    return folder / "densities" / ("-".join(str(record[name]) for name in names) + ".npy")


def show(records):
    """Print medians over seeds, and which flow is best."""
    table = pd.DataFrame(records)
    lines = table[table["target"] != "sine"]
    if not lines.empty:
        for name in ("KL", "TV"):
            middle = lines.pivot_table(index=["flow", "K"], columns="target", values=name, aggfunc="median", sort=False)
            print(f"\n{name}, median of {lines['seed'].nunique()} seeds\n{middle.to_string(float_format='%.4f')}")
        longest = lines[lines["K"] == lines["K"].max()]
        worst = longest.groupby(["target", "flow"])[["KL", "MCSE"]].max()
        for target, part in worst.groupby(level="target"):
            flow = part["KL"].idxmin()[1]
            print(f"{target}: best at K = {longest['K'].max()}: {flow}, worst seed's KL {part['KL'].min():.4f}")
        print(lines.groupby(["flow", "K"], sort=False)["seconds"].median().unstack().round(0).to_string())
    for record in records:
        if record["target"] == "sine":
            shares = ", ".join(f"{share:.3f}" for share in record["shares"])
            print(f"sine, {record['flow']}, seed {record['seed']}: KL {record['KL']:.4f}, shares {shares}")


def draw_energies(records, folder):
    """Draw each exact density and, beside it, each flow's, for growing lengths, after figure 3 of the paper."""
    shown = {(r["target"], r["flow"], r["K"]): r for r in records if r["target"] != "sine" and r["seed"] == 0}
    if not shown:
        return
    targets = [name for name in energies.ENERGIES if any(key[0] == name for key in shown)]
    columns = sorted({key[1:] for key in shown}, key=lambda column: (list(FLOWS).index(column[0]), column[1]))
    figure, axes = plt.subplots(
        len(targets),
        len(columns) + 1,
        figsize=(1.25 * (len(columns) + 1), 1.5 * len(targets) + 0.4),
        squeeze=False,
        layout="constrained",
    )
    width = energies.HALF_WIDTH
    for row, target in zip(axes, targets, strict=True):
        exact = energies.energy_grid(energies.ENERGIES[target], GRID).density.numpy()
        images = [("exact" if target == targets[0] else "", exact, target)]
        for flow, length in columns:
            title = f"{flow}\nK = {length}" if target == targets[0] else ""
            if record := shown.get((target, flow, length)):
                images.append((title, np.load(density_file(folder, record)), f"KL {record['KL']:.3f}"))
            else:
                images.append((title, np.zeros_like(exact), ""))
        for axis, (title, image, label) in zip(row, images, strict=True):
            # One scale for a row: a flow that is too narrow is brighter than the truth.
            axis.imshow(image.T, origin="lower", extent=(-width, width) * 2, vmin=0, vmax=exact.max(), cmap="magma")
            axis.set(xticks=[], yticks=[])
            axis.set_title(title, fontsize=8)
            axis.set_xlabel(label, fontsize=8)
    figure.savefig(folder / "energies.png", dpi=130)


def draw_sine(records, folder):
    """Draw the sines of the three frequencies, and the posterior of the frequency with the flows' densities."""
    shown = [record for record in records if record["target"] == "sine" and record["seed"] == 0]
    if not shown:
        return
    t, y = energies.sine_data()
    exact = energies.sine_grid(t, y)
    frequency = exact.points[:, 0].numpy()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    times = np.linspace(0, 2, 400)
    for mode in (0.6, 1.2, 1.8):
        left.plot(times, np.sin(2 * np.pi * mode * times), label=f"f = {mode}")
    left.plot(t, y, "kx", markersize=9)
    left.set(xlabel="t", ylabel="sin(2 pi f t)", title="three of the sines through the data", ylim=(-1.6, 1.2))
    left.legend(loc="lower center", ncols=3)
    right.fill_between(frequency, exact.density.numpy(), color="0.85", label="exact")
    for record in shown:
        found = np.load(density_file(folder, record))
        right.plot(frequency, found, label=f"{record['flow']}, KL {record['KL']:.3f}", linewidth=1.2)
    right.set(xlabel="f", ylabel="density", title="posterior of the frequency", xlim=(0, energies.MAX_FREQUENCY))
    right.set_ylim(0, 1.4 * float(exact.density.max()))
    right.legend()
    figure.savefig(folder / "sine.png", dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--potentials", nargs="*", choices=list(energies.ENERGIES), default=list(energies.ENERGIES))
    parser.add_argument("--flows", nargs="+", choices=list(FLOWS), default=list(FLOWS))
    parser.add_argument("--lengths", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("energies"))
    options = parser.parse_args()
    (options.out / "densities").mkdir(parents=True, exist_ok=True)
    keys = [("sine", flow, 1, seed) for flow in SINE_FLOWS for seed in range(options.seeds)]
    keys += [
        (potential, flow, length, seed)
        for seed in range(options.seeds)
        for length in options.lengths
        for potential in options.potentials
        for flow in options.flows
    ]
    records = jobs.do(
        partial(run, folder=options.out),
        [dict(zip(("target", "flow", "K", "seed", "max steps"), (*key, options.steps), strict=True)) for key in keys],
        options.out / "results.jsonl",
        options.processes,
        lambda record: f"KL {record['KL']:.4f}, {record['seconds']:.0f} s",
    )
    show(records)
    draw_energies(records, options.out)
    draw_sine(records, options.out)


if __name__ == "__main__":
    main()
