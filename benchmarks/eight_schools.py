"""Eight schools, centred: guides side by side over several seeds, against the exact evidence.

python benchmarks/eight_schools.py [--seeds 5] [--first-seed 0] [--json results.json]
"""

import argparse
import json
import platform
from pathlib import Path

import pandas as pd
import pyro
import torch
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal

from pyro_nf.diagnostics import diagnose
from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI
from pyro_nf.models import eight_schools

GUIDES = {
    "pyro AutoNormal": AutoNormal,
    "pyro AutoMultivariateNormal": AutoMultivariateNormal,
    "pyro AutoIAFNormal": AutoIAFNormal,
    "AutoFlow": AutoFlow,
    "AutoFlow student_t": lambda model: AutoFlow(model, base="student_t"),
}


def run(name, seed):
    """Fit one guide from one seed and judge it by fresh draws."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model, data = eight_schools.centered, eight_schools.data()
    guide = GUIDES[name](model)
    result = FlowSVI(model, guide, seed=seed, progress=False).run(*data)
    found = diagnose(model, guide, *data)
    return {
        "guide": name,
        "seed": seed,
        "ELBO": found.elbo,
        "log evidence": found.log_evidence,
        "se": found.log_evidence_se,
        "k-hat": found.khat,
        "ESS": found.ess_fraction,
        "verdict": found.verdict.value,
        "converged": result.converged,
        "steps": result.steps,
        "seconds": result.seconds,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    exact = eight_schools.grid_posterior(*eight_schools.data()).log_evidence
    rows = []
    for name in GUIDES:
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            rows.append(run(name, seed))
            print(
                pd.DataFrame(rows[-1:]).to_string(index=False, header=len(rows) == 1, float_format="%.3f"), flush=True
            )
    table = pd.DataFrame(rows)
    columns = ["ELBO", "log evidence", "k-hat", "ESS", "seconds"]
    print(f"\nexact log evidence {exact:.3f}; medians over {options.seeds} seeds")
    print(table.groupby("guide", sort=False)[columns].median().to_string(float_format="%.3f"))
    if options.json:
        machine = {"machine": platform.platform(), "torch": torch.__version__, "threads": 1}
        options.json.write_text(json.dumps({**machine, "exact": exact, "rows": rows}, indent=1, default=bool))


if __name__ == "__main__":
    main()
