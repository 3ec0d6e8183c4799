"""Does a fit find both modes of a posterior, and in the right proportion?

python benchmarks/modes.py [--dims 2 10 50] [--seeds 3] [--json results.json]

The target is 1/4 N(-4, I) + 3/4 N(4, I): mean 2 and variance 13 in each coordinate, log evidence 0; a guide on one mode
alone has an ELBO of -0.288 or -1.386. `weight` is the share of draws in the heavier mode.
"""

import argparse
import json
from pathlib import Path

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_nf.diagnostics import diagnose
from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI

GUIDES = {
    "AutoNormal": (AutoNormal, 0),
    "AutoFlow": (AutoFlow, 8),
    "AutoFlow, mixture": (lambda model: AutoFlow(model, base="mixture"), 8),
}


def two_modes(dim):
    locs = torch.stack([torch.full((dim,), -4.0), torch.full((dim,), 4.0)])
    logits = torch.tensor([0.25, 0.75]).log()

    def model():
        pyro.sample("z", dist.MixtureOfDiagNormals(locs, torch.ones(2, dim), logits))

    return model


def run(dim, name, seed):
    model, (make_guide, num_starts) = two_modes(dim), GUIDES[name]
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = make_guide(model)
    result = FlowSVI(model, guide, num_starts=num_starts, max_steps=1500, seed=seed, progress=False).run()
    if isinstance(guide, AutoFlow):
        draws = guide.sample_posterior(20_000)["z"]
    else:
        with torch.no_grad():
            draws = torch.stack([guide()["z"] for _ in range(2000)])
    found = diagnose(model, guide)
    return {
        "dim": dim,
        "guide": name,
        "seed": seed,
        "weight": float((draws.mean(-1) > 0).float().mean()),
        "mean": float(draws.mean()),
        "variance": float(draws.var(0).mean()),
        "ELBO": result.elbo,
        "ESS %": 100 * found.ess_fraction,
        "k-hat": found.khat,
        "seconds": result.seconds,
        "starts": str(result.starts or ""),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 10, 50])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for dim in options.dims:
        for name in GUIDES:
            rows += [run(dim, name, seed) for seed in range(options.seeds)]
            print(pd.DataFrame(rows[-options.seeds :]).to_string(index=False, float_format="%.3f"), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
