"""A hierarchical model with a latent for each of 100,000 rows, fitted by minibatch, beside NUTS on all rows.

python benchmarks/local_latents.py [--rows 100000] [--memory] [--json results.json]

Each row has a latent effect and two observations, `y_n1, y_n2 ~ N(alpha + beta x_n + z_n, sigma)`, `z_n ~ N(0, tau)`.
NUTS runs on the same model with every z_n integrated out, `mean(y_n) ~ N(alpha + beta x_n, sqrt(tau^2 + sigma^2 / 2))`
and `y_n1 - y_n2 ~ N(0, sqrt(2) sigma)`: exactly the same posterior of alpha, beta, tau and sigma.

The posterior is narrow and a minibatch's gradient noisy (ten posterior sds a step, for a hundredth of the rows), so the
fit goes in `--stages`, each from where the last one ended, with larger minibatches and a lower rate. `--memory` fits a
few hundred steps to 1,000 up to 1,000,000 rows, in minibatches of 500, each in a process of its own, and prints by how
much its memory grew at the peak, data aside.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS

from pyro_nf.guides import StructuredFlow
from pyro_nf.inference import FlowSVI

TRUTH = {"alpha": 0.5, "beta": -1.0, "tau": 0.8, "sigma": 0.6}


def simulate(rows):
    """Return x, (rows,), and y, (rows, 2)."""
    generator = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, rows, generator=generator)
    noise = torch.randn(rows, 2, generator=generator)
    mean = TRUTH["alpha"] + TRUTH["beta"] * x + TRUTH["tau"] * z
    return x, mean[:, None] + TRUTH["sigma"] * noise


def globals_():
    """Sample the four global latents."""
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 2.0))
    return alpha, beta, tau, sigma


def model(x, y, batch_size):
    """The model, on a random minibatch."""
    alpha, beta, tau, sigma = globals_()
    with pyro.plate("rows", len(x), subsample_size=batch_size) as rows:
        z = pyro.sample("z", dist.Normal(0.0, tau))
        mean = alpha + beta * x[rows] + z
        pyro.sample("y", dist.Normal(mean[:, None], sigma).to_event(1), obs=y[rows])


def marginal(x, mean, difference):
    """The model with its local latents integrated out, on all rows."""
    alpha, beta, tau, sigma = globals_()
    with pyro.plate("rows", len(x)):
        pyro.sample("mean", dist.Normal(alpha + beta * x, (tau**2 + sigma**2 / 2).sqrt()), obs=mean)
        pyro.sample("difference", dist.Normal(0.0, 2**0.5 * sigma), obs=difference)


class Encoder(torch.nn.Module):
    """A linear map of one row's data: the locals' exact posterior is linear in them."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 8)

    def forward(self, x, y):
        """Return contexts, (rows, 8)."""
        return self.linear(torch.cat([x[:, None], y], -1))


def fit(data, options):
    """Fit the guide, stage by stage, and return it with the results."""
    pyro.set_rng_seed(options.seed)
    pyro.clear_param_store()
    guide = StructuredFlow(model, {"rows": Encoder()}, "linear_iaf", local_flow="linear_iaf", init_scale=0.01)
    results = []
    for batch_size, learning_rate, max_steps, eval_every in options.stages:
        svi = FlowSVI(
            model,
            guide,
            num_particles=options.particles,
            learning_rate=learning_rate,
            max_steps=max_steps,
            eval_every=eval_every,
            seed=options.seed,
            compile=options.compile,
            progress=options.progress,
        )
        results.append(svi.run(*data, batch_size=batch_size))
        print(f"minibatches of {batch_size}: {results[-1]}; {results[-1].compile_seconds:.0f} s to compile", flush=True)
    return guide, results


def full_batch(data, options):
    """Run NUTS on the marginal model and return its draws of the globals."""
    x, y = (tensor.double() for tensor in data)
    start = {name: torch.tensor(value).double() for name, value in TRUTH.items()}
    start["tau"], start["sigma"] = start["tau"].log(), start["sigma"].log()
    pyro.set_rng_seed(options.seed)
    kernel = NUTS(marginal)
    mcmc = MCMC(kernel, options.draws, options.draws // 4, initial_params=start, disable_progbar=not options.progress)
    mcmc.run(x, y.mean(-1), y[:, 0] - y[:, 1])
    return mcmc.get_samples(), mcmc.diagnostics()


def compare(options):
    """Fit, sample, and return a row for each global latent."""
    data = simulate(options.rows)
    start = time.perf_counter()
    exact, diagnostics = full_batch(data, options)
    seconds = time.perf_counter() - start
    print(f"NUTS, {options.draws} draws: {seconds:.0f} s", flush=True)
    guide, _ = fit(data, options)
    found = guide[0].sample_posterior(100_000)
    rows = []
    for name in TRUTH:
        mean, sd = exact[name].mean(), exact[name].std()
        rows.append(
            {
                "latent": name,
                "NUTS mean": float(mean),
                "NUTS sd": float(sd),
                "mean": float(found[name].double().mean()),
                "sd": float(found[name].double().std()),
                "mean off, NUTS sd": float((found[name].double().mean() - mean) / sd),
                "its MCSE": float(diagnostics[name]["n_eff"]) ** -0.5,
                "sd, ratio": float(found[name].double().std() / sd),
            }
        )
    return rows


def peak_memory(rows, options):
    """Fit a few steps to so many rows and return the growth of the process's memory, in MB, the data aside."""
    data = simulate(rows)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    options.stages, options.compile = [(500, 0.005, 200, 100)], False
    fit(data, options)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--particles", type=int, default=4)
    parser.add_argument(
        "--stages",
        type=lambda text: tuple(float(number) if "." in number else int(number) for number in text.split(",")),
        nargs="+",
        default=[(1000, 0.01, 3000, 1000), (5000, 0.001, 3000, 1000)],
        help="batch size, learning rate, steps, steps of a block (a whole number of epochs), with commas between",
    )
    parser.add_argument("--draws", type=int, default=2000, help="of NUTS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", dest="compile", action="store_false", help="do not compile")
    parser.add_argument("--progress", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        print(json.dumps(peak_memory(options.memory_of, options)))
        return
    if options.memory:
        table = []
        for size in (1000, 10_000, 100_000, 1_000_000):
            command = [sys.executable, __file__, "--memory-of", str(size)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            table.append({"rows": size, "peak memory, MB": float(output)})
    else:
        table = compare(options)
    print(pd.DataFrame(table).to_string(index=False, float_format="{:.4f}".format))
    if options.json:
        options.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
