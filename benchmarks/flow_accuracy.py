"""The conformance suite over every flow, ours or another library's: how exact both directions are, and what fails.

python benchmarks/flow_accuracy.py [--dims 1 2 5 32] [--seeds 3] [--flows NAME ...] [--json results.json]
python benchmarks/flow_accuracy.py --peer pyro --peer zuko [...]

Everything in float64, at the parameters as they came, ~ N(0, 1) and ~ N(0, 5^2), at points up to 1000 standard
deviations out. The table counts findings: `numbers`, wrong or non-finite values and gradients; `state`, what copies,
caches and unregistered parameters get wrong; `use`, shapes, `vmap` and exceptions. Peers are not asked to start as the
identity. `image` is where a flow of one coordinate takes [-1e9, 1e9] if that is not all of [-100, 100], and the mass
that the density model N(f(x)) |df/dx| then has.
"""

import argparse
import json
import math
import platform
import re
import statistics
import time
import warnings
from collections import defaultdict
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path

import pandas as pd
import peers
import torch

from pyro_nf import flows as f
from pyro_nf.flows import stacks
from pyro_nf.testing import FlowError, check_flow
from pyro_nf.testing.cases import largest

# Single flows, `make(dim, context_dim=...)`. A new flow is one line here; named stacks come by themselves.
SINGLE = {
    "ElementwiseAffine": f.ElementwiseAffine,
    "LowerTriangularAffine": f.LowerTriangularAffine,
    "Planar": f.Planar,
    "Inverse Planar": lambda dim, context_dim: f.Inverse(f.Planar(dim, context_dim)),
    "Radial": f.Radial,
    "Sylvester orthogonal": partial(f.Sylvester, basis="orthogonal"),
    "Sylvester householder": partial(f.Sylvester, basis="householder"),
    "Sylvester triangular": partial(f.Sylvester, basis="triangular"),
    "Householder": f.Householder,
    "LinearIAF": lambda dim, context_dim: f.LinearIAF(dim, 3 if context_dim else 1, context_dim),
    "BlockAutoregressive": f.BlockAutoregressive,
    "CircularConvolution": f.CircularConvolution,
    "SymmetricConvolution": f.SymmetricConvolution,
    "ConvolutionCoupling": f.ConvolutionCoupling,
    "PReLU": f.PReLU,
    "LeakyReLU 0.9": lambda dim, context_dim: f.LeakyReLU(dim, 0.9),
    "SLog": f.SLog,
    "Diagonal": f.Diagonal,
    "LULinear": f.LULinear,
    "Rotation": f.Rotation,
    "ActNorm": lambda dim, context_dim: f.ActNorm(dim, context_dim).eval(),
    "BatchNorm": lambda dim, context_dim: f.BatchNorm(dim, context_dim).eval(),
    "ImageCoupling checkerboard": lambda dim, context_dim: f.ImageCoupling((dim, 2, 2), context_dim=context_dim),
    "Permutation": lambda dim, context_dim: f.Permutation([*range(1, dim), 0]),
}
TRANSFORMERS = {
    "additive": f.Additive,
    "affine": f.Affine,
    "gated": f.Gated,
    "spline": f.RationalQuadraticSpline,
    "logistic mixture": f.LogisticMixture,
    "deep sigmoidal": f.DeepSigmoidal,
}
NO_IDENTITY = {"Permutation", "LeakyReLU 0.9"}
REACH = {"SLog": 10.0}  # one direction is exponential

STATE = ("parameters", "copies", "distributions", "forward cache", "inverse cache")
USE = ("forward shapes", "inverse shapes", "forward vmap", "inverse vmap", "cannot be built")
NO_INVERSE = ("NotImplementedError", "InverseNotAvailable", "expected to find key in intermediates cache")
TROUBLES = {"not finite": "not finite", " raises ": "raises", "must have shape": "wrong shape"}


def ours():
    """Name -> `make(dim, context_dim=...)` of our flows: single ones, every wiring of every transformer, stacks."""
    found = dict(SINGLE)
    for name, transformer in TRANSFORMERS.items():
        found[f"Coupling {name}"] = partial(f.Coupling, transformer=transformer())
        found[f"Autoregressive {name}"] = partial(f.Autoregressive, transformer=transformer())
    return found | {f"stack {name}": partial(stacks.make, name, depth=2) for name in stacks.names()}


def of_peer(library):
    """Name -> `make(dim, context_dim=0)` of a library's flows."""

    def adapt(make):
        return lambda dim, context_dim: make(dim, (16 + dim,) * 2)

    return {f"{library} {name}": adapt(make) for name, make in peers.flows(library).items()}


def measure(name, make, contexts, identity, options):
    """Run the suite over dimensions, contexts and seeds; return the row of the table, and all figures and findings."""
    start, figures, limits, failures, dims, images = time.perf_counter(), {}, {}, defaultdict(list), set(), []
    for dim, context_dim, seed in product(options.dims, contexts, range(options.seeds)):
        torch.manual_seed(seed)
        try:
            flow = make(dim, context_dim=context_dim)
        except Exception as error:  # whatever a library raises where it has no such flow
            failures["cannot be built"].append((f"cannot be built: {error}", dim))
            continue
        dims.add(dim)
        shape = (dim, 2, 2)[: flow.domain.event_dim]
        try:
            report = check_flow(flow, event_shape=shape, identity=identity, seed=seed, reach=REACH.get(name, 1000.0))
        except FlowError as error:
            report = error.report
        figures = {
            check: largest([figures.get(check, 0.0), report.figures.get(check, 0.0)])
            for check in figures | report.figures
        }
        limits |= report.limits
        for sentence in report.failures:
            failures[group(sentence)].append((sentence, dim))
        if shape == (1,) and context_dim == 0:
            with suppress(Exception):  # found by the suite already
                images.append(image(flow, seed))
    lacking = [key for key in failures if any(word in key for word in NO_INVERSE)]
    for key in lacking:
        del failures[key]
    findings = [finding(entries) for entries in failures.values()]
    kinds = [kind for kind, _ in findings]
    row = {
        "flow": name,
        "dims": " ".join(map(str, sorted(dims))),
        "log-det": cell(figures, failures, "forward log-det", *["inverse log-det"] * (not lacking)),
        "round trip": "no inverse" if lacking else cell(figures, failures, "forward round trip", "inverse round trip"),
        "gradcheck": "failed" if any("gradcheck" in line for _, line in findings) else "passed",
        **{kind: kinds.count(kind) for kind in ("numbers", "state", "use")},
        "image": narrowest(images),
        "seconds": round(time.perf_counter() - start, 1),
    }
    return row, {"figures": figures, "findings": findings}, limits


def group(sentence):
    """What the sentences of one finding have in common: the exception, or the check and what is wrong."""
    check, raises, exception = sentence.partition(" raises ")
    return re.split(r"\d|\[| \(", exception)[0] if raises else re.split(r":| \(parameters| must have", check)[0]


def finding(entries):
    """One line on sentences of one group: the mildest setting, the largest figure, all dimensions; and its kind."""
    sentences = [sentence for sentence, _ in entries]
    line = min(sentences, key=mildness)
    kind = "state" if line.startswith(STATE) else "use" if line.startswith(USE) else "numbers"
    if " raises " in line:
        checks = dict.fromkeys(sentence.split(" raises ")[0] for sentence in sentences)
        kind = "numbers" if "GradcheckError" in line else "state" if set(checks) <= set(STATE) else "use"
        line = f"{', '.join(checks)} raises {line.split(' raises ')[1]}"
    figures = [float(figure) for sentence in sentences for figure in re.findall(r": (\S+), allowed", sentence)]
    worst = f", at worst {max(figures):.1e}" if figures else ""
    return kind, f"{line}{worst} [dim {', '.join(map(str, dict.fromkeys(dim for _, dim in entries)))}]"


def mildness(sentence):
    """The standard deviation of the mildest parameters that a sentence is about."""
    found = re.search(r"\(parameters ~ N\(0, (\S+)\^2", sentence)
    return float(found[1]) if found else 0.0


def cell(figures, failures, *checks):
    """The largest error that these checks saw, the direction of it, and what kept them from seeing one."""
    seen = {check: figures[check] for check in checks if math.isfinite(figures.get(check, math.nan))}
    troubles = {}
    for sentence in (sentence for entries in failures.values() for sentence, _ in entries):
        check = next((check for check in checks if sentence.startswith(check)), None)
        if check is None:
            continue
        for figure in re.findall(r": (\S+), allowed", sentence):
            seen[check] = max(seen.get(check, 0.0), float(figure))
        troubles |= {word: None for mark, word in TROUBLES.items() if mark in sentence}
    worst = max(seen, key=seen.__getitem__, default=None)
    return ", ".join([*([f"{seen[worst]:.1e} {worst.split()[0]}"] if worst else []), *troubles])


@torch.no_grad()
def image(flow, seed):
    """Where +-1e9 go under a flow of one coordinate, at parameters ~ N(0, 1)."""
    torch.manual_seed(seed)
    flow = flow.double()
    for p in flow.parameters():
        p.normal_()
    return sorted(float(flow(torch.full((1, 1), end, dtype=torch.float64))) for end in (-1e9, 1e9))


def narrowest(images):
    """The narrowest image, if it is not all of [-100, 100], and the mass that a density model would have with it."""
    if not images:
        return "-"
    low, high = min(images, key=lambda ends: ends[1] - ends[0])
    mass = torch.special.ndtr(torch.tensor([low, high])).diff().item()
    return "R" if low <= -100 and high >= 100 else f"[{low:.3g}, {high:.3g}] mass {mass:.3f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[1, 2, 5, 32])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--flows", nargs="+", help="only these names, or parts of names")
    parser.add_argument("--peer", action="append", choices=peers.LIBRARIES, help="this library's flows, not ours")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # peers warn of deprecations
    catalogues = [of_peer(library) for library in options.peer] if options.peer else [ours()]
    chosen = {name: make for catalogue in catalogues for name, make in catalogue.items()}
    if options.flows:
        chosen = {name: make for name, make in chosen.items() if any(part in name for part in options.flows)}
    rows, details, limits = [], {}, {}
    for name, make in chosen.items():
        identity = not options.peer and name not in NO_IDENTITY
        row, details[name], own_limits = measure(name, make, (0,) if options.peer else (0, 3), identity, options)
        rows.append(row)
        limits |= own_limits
        lines = [f"  {kind}: {line}" for kind, line in details[name]["findings"]]
        print(f"{name}: log-det {row['log-det']}; round trip {row['round trip']}", *lines, sep="\n", flush=True)
    print("\n" + pd.DataFrame(rows).to_string(index=False))
    usual = statistics.mode(limits.values())
    others = [f"{name} {limit:.0e}" for name, limit in limits.items() if limit not in (0, usual)]
    print(f"limits, relative to 1 + size: {', '.join([f'{usual:.0e}', *others])}")
    if options.json:
        libraries = ("torch", "pyro-ppl", *(name for name in options.peer or () if name != "pyro"))
        record = {
            "machine": platform.platform(),
            "versions": {name: version(name) for name in libraries},
            "seeds": list(range(options.seeds)),
            "limits": limits,
            "rows": rows,
            "details": details,
        }
        options.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
