"""Are `diagnose`'s figures and verdicts right? Log evidence against the truth, and guides broken on purpose.

python benchmarks/diagnosis.py [--evidence] [--verdicts] [--seeds 50] [--works WORK ...] [--json results.json]

`--evidence`: estimates for posteriors of known evidence, a normal-inverse-gamma regression (Linnerud's 20 men: pulse on
exercises), Beta-binomial (18 batters of 1970, Efron and Morris 1975) and Neal's funnel in 10 dimensions; a new fit, by
defaults but for a Student-t base, for every five seeds. `within k se` counts the estimates that lie within k reported
standard errors of the truth, of all and of those called "right".

`--verdicts`: how often a right guide is called "right", and broken ones anything else ("flagged"). Broken: every sd
halved; the first coordinate (or all) shifted by a posterior sd; one of two modes. `regression` and `two modes` have
exact guides; `eight schools` is a fit of AutoFlow (non-centred; a new fit for every ten seeds).
"""

import argparse
import json
import math
import platform
import warnings
from functools import cache, partial
from pathlib import Path

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_linnerud

from pyro_nf.diagnostics import diagnose
from pyro_nf.guides import AutoFlow, MixtureBase
from pyro_nf.inference import FlowSVI
from pyro_nf.models import eight_schools

exercises = load_linnerud()
STANDARD = torch.tensor((exercises.data - exercises.data.mean(0)) / exercises.data.std(0))
X = torch.cat([torch.ones(20, 1).double(), STANDARD], 1)
Y = torch.tensor(exercises.target[:, 2] - 56.0)
A, B, PRIOR_PRECISION = 3.0, 60.0, 0.1
AT_BATS = 45
HITS = torch.tensor([18, 17, 16, 15, 14, 14, 13, 12, 11, 11, 10, 10, 10, 10, 10, 9, 8, 7.0]).double()


def regression():
    """Pulse on three exercises: sigma^2 ~ InverseGamma, beta ~ N(0, sigma^2 / precision)."""
    variance = pyro.sample("variance", dist.InverseGamma(torch.tensor(A).double(), B))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(4).double(), (variance / PRIOR_PRECISION).sqrt()).to_event(1))
    with pyro.plate("men", 20):
        pyro.sample("pulse", dist.Normal(X @ beta, variance.sqrt()), obs=Y)


def regression_posterior():
    """Return mean and precision of beta given sigma = 1, and the posterior's a and b."""
    precision = X.T @ X + PRIOR_PRECISION * torch.eye(4).double()
    mean = torch.linalg.solve(precision, X.T @ Y)
    return mean, precision, A + 10, B + 0.5 * float(Y @ Y - mean @ precision @ mean)


def regression_evidence():
    _, precision, a, b = regression_posterior()
    log_dets = 0.5 * (4 * math.log(PRIOR_PRECISION) - float(torch.logdet(precision)))
    return log_dets - 10 * math.log(2 * math.pi) + A * math.log(B) - a * math.log(b) + math.lgamma(a) - math.lgamma(A)


def batters():
    """Hits of 18 batters in 45 at bats each: p ~ Beta(8, 22)."""
    with pyro.plate("batters", 18):
        p = pyro.sample("p", dist.Beta(torch.tensor(8.0).double(), 22.0))
        pyro.sample("hits", dist.Binomial(AT_BATS, p), obs=HITS)


def batters_evidence():
    return float(dist.BetaBinomial(torch.tensor(8.0).double(), 22.0, AT_BATS).log_prob(HITS).sum())


def funnel():
    """Neal's funnel: v ~ N(0, 3), nine x ~ N(0, exp(v / 2)); its evidence is 1."""
    v = pyro.sample("v", dist.Normal(torch.zeros(()).double(), 3.0))
    pyro.sample("x", dist.Normal(torch.zeros(9).double(), (v / 2).exp()).to_event(1))


EVIDENCE = {
    "regression": (regression, regression_evidence),
    "Beta-binomial": (batters, batters_evidence),
    "funnel": (funnel, lambda: 0.0),
}


# Diagnoses of one fit.
DIAGNOSES = 5


@cache
def fitted(work, seed):
    model = EVIDENCE[work][0]
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = AutoFlow(model, base="student_t")
    return guide, FlowSVI(model, guide, seed=seed, progress=False).run()


def evidence(work, seed):
    model, truth = EVIDENCE[work]
    guide, result = fitted(work, seed // DIAGNOSES)
    pyro.set_rng_seed(1000 + seed)
    found = diagnose(model, guide)
    return {
        "work": work,
        "seed": seed,
        "error": found.log_evidence - truth(),
        "se": found.log_evidence_se,
        "ELBO": found.elbo - truth(),
        "k-hat": found.khat,
        "ESS": found.ess_fraction,
        "reliable": found.reliable,
        "seconds": result.seconds,
    }


def regression_guide(factor=1.0, shift=0.0):
    mean, precision, a, b = regression_posterior()
    covariance = precision.inverse()
    sd = (b / a * covariance.diagonal()).sqrt()

    def guide():
        variance = pyro.sample("variance", dist.InverseGamma(torch.tensor(a).double(), b))
        spread = factor**2 * variance * covariance
        pyro.sample("beta", dist.MultivariateNormal(mean + shift * sd * (torch.arange(4) == 0), spread))

    return guide


LOCS = torch.stack([torch.full((10,), -4.0), torch.full((10,), 4.0)])


def two_modes():
    """1/4 N(-4, I) + 3/4 N(4, I) in ten dimensions."""
    pyro.sample("z", dist.MixtureOfDiagNormals(LOCS, torch.ones(2, 10), torch.tensor([0.25, 0.75]).log()))


def both_modes(seed):
    """A normal at each of the modes that climbs find, with their shares: the posterior itself, nearly."""
    pyro.set_rng_seed(seed)
    guide = AutoFlow(two_modes, base=partial(MixtureBase, num_components=2))
    guide.warm_start()
    return guide


def one_mode():
    """The heavier mode alone."""
    pyro.sample("z", dist.Normal(LOCS[1], 1.0).to_event(1))


def schools_guide(seed, factor=1.0, shift=0.0, cache={}):  # noqa: B006
    """Fit once for each seed, and break a copy by its affine layer."""
    args = eight_schools.data()
    if seed not in cache:
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        guide = AutoFlow(eight_schools.noncentered, base="student_t")
        FlowSVI(eight_schools.noncentered, guide, seed=seed, progress=False).run(*args)
        cache[seed] = guide.state_dict()
    guide = AutoFlow(eight_schools.noncentered, base="student_t")
    guide.load_state_dict(cache[seed])
    guide(*args)
    with torch.no_grad():
        affine, points = guide.flow.flows[-1], guide.get_posterior().sample((10_000,))
        rows = affine(torch.cat([torch.zeros(1, 10), torch.eye(10)]))
        affine.assign(rows[0] + shift * points.std(0), factor * (rows[1:] - rows[0]).mT)
    return guide


VERDICTS = {
    "regression": {
        "right": lambda seed: regression_guide(),
        "sds halved": lambda seed: regression_guide(0.5),
        "one coordinate shifted by 1 sd": lambda seed: regression_guide(shift=1.0),
    },
    "two modes": {"right": both_modes, "one of two modes": lambda seed: one_mode},
    "eight schools": {
        "right": lambda seed: schools_guide(seed // 10),
        "sds halved": lambda seed: schools_guide(seed // 10, factor=0.5),
        "all coordinates shifted by 1 sd": lambda seed: schools_guide(seed // 10, shift=1.0),
    },
}
MODELS = {"regression": regression, "two modes": two_modes, "eight schools": eight_schools.noncentered}


def verdict(work, kind, seed):
    guide = VERDICTS[work][kind](seed)
    pyro.set_rng_seed(1000 + seed)
    found = diagnose(MODELS[work], guide, *(eight_schools.data() if work == "eight schools" else ()))
    return {
        "work": work,
        "guide": kind,
        "seed": seed,
        "reliable": found.reliable,
        "verdict": found.verdict.value,
        "k-hat": found.khat,
        "k-hat alone": found.khat < found.khat_threshold,
        "ESS": found.ess_fraction,
        "mean shift": found.mean_shift,
        "sd ratio": found.sd_ratio,
        "Stein": found.stein_residual,
        "left out": found.missed_mass,
        "reasons": " ".join(found.reasons),
    }


def show_evidence(rows):
    table = pd.DataFrame(rows)
    z = (table["error"] / table["se"]).abs()
    for chosen, label in ((table["reliable"] | True, "all"), (table["reliable"], "right")):
        shares = [f"within {k} se {int((z[chosen] < k).sum())}" for k in (1, 2, 3)]
        part = table[chosen]
        figures = part[["ELBO", "k-hat", "ESS", "seconds", "se"]].median()
        print(
            f"{table['work'][0]}, {label}: {len(part)} estimates, {', '.join(shares)}; "
            f"error {part['error'].mean():.4f} (sd {part['error'].std():.4f}), medians: "
            + ", ".join(f"{name} {value:.3g}" for name, value in figures.items()),
            flush=True,
        )


def show_verdicts(rows):
    table = pd.DataFrame(rows)
    part = table.select_dtypes("number").median()
    print(
        f"{table['work'][0]}, {table['guide'][0]}: {table['verdict'].value_counts().to_dict()}, flagged "
        f"{int((~table['reliable']).sum())} of {len(table)} (by k-hat "
        f"alone {int((~table['k-hat alone']).sum())}); k-hat {part['k-hat']:.2f}, ESS {part['ESS']:.3f}, shift "
        f"{part['mean shift']:.2f}, sd ratio {part['sd ratio']:.2f}, Stein {part['Stein']:.2f}, "
        f"left out {part['left out']:.2f}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evidence", action="store_true")
    parser.add_argument("--verdicts", action="store_true")
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--works", nargs="+", help="only these")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    found = {"machine": platform.platform(), "torch": torch.__version__, "evidence": [], "verdicts": []}
    for work in EVIDENCE if options.evidence else ():
        if not options.works or work in options.works:
            found["evidence"] += [evidence(work, seed) for seed in range(options.seeds)]
            show_evidence(found["evidence"][-options.seeds :])
    for work, kinds in VERDICTS.items() if options.verdicts else ():
        for kind in kinds if not options.works or work in options.works else ():
            found["verdicts"] += [verdict(work, kind, seed) for seed in range(options.seeds)]
            show_verdicts(found["verdicts"][-options.seeds :])
    if options.json:
        options.json.write_text(json.dumps(found, indent=1, default=str))


if __name__ == "__main__":
    main()
