"""One layer of every flow that another library has too, side by side in one run: time and memory.

python benchmarks/flow_speed.py [--flows planar ...] [--dims 16 64 256] [--peers pyro ...] [--no-compile] [--json FILE]

`train` is forward, log-determinant and gradients to all parameters; `inverse` is the other direction with its
log-determinant, without gradients; `memory` is what `train` saves for its backward pass, parameters aside. One thread,
float32, 256 points, networks of two hidden layers of max(64, 2 dim) units, the same for everybody. Libraries take
turns; times are CPU times, which a busy machine disturbs least, and medians over the turns. A peer's column is its
figure over ours: below 1 it is better.
"""

import argparse
import json
import platform
import statistics
import time
import warnings
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import peers
import torch

from pyro_nf import flows as f

COLUMNS = ["flow", "dim", "mode", "what", "ours", *peers.LIBRARIES, "best", "ratio"]
BATCH, TURNS, TURN_SECONDS = 256, 5, 0.05
# Seconds: a call above the first is not repeated, one that is likely to take the second is not made ("slow").
SLOW, TOO_SLOW = 1.0, 10.0


def coupling(transformer):
    return lambda dim, hidden: f.Coupling(dim, transformer=transformer, hidden_dims=hidden)


def autoregressive(transformer):
    return lambda dim, hidden: f.Autoregressive(dim, transformer, hidden)


# Our flows, `make(dim, hidden_dims)`, and what the others call theirs. A new row is a line in each.
OURS = {
    "planar": lambda dim, hidden: f.Planar(dim),
    "radial": lambda dim, hidden: f.Radial(dim),
    "full-rank affine": lambda dim, hidden: f.LowerTriangularAffine(dim),
    "sylvester": lambda dim, hidden: f.Sylvester(dim, dim, "householder", num_reflections=dim),
    "householder": lambda dim, hidden: f.Householder(dim, dim),
    "lu": lambda dim, hidden: f.LULinear(dim),
    "rotation": lambda dim, hidden: f.Rotation(dim),
    "additive coupling": coupling(f.Additive()),
    "affine coupling": coupling(f.Affine()),
    "spline coupling": coupling(f.RationalQuadraticSpline(peers.BINS, peers.BOUND)),
    "affine autoregressive": autoregressive(f.Affine()),
    "gated autoregressive": autoregressive(f.Gated()),
    "spline autoregressive": autoregressive(f.RationalQuadraticSpline(peers.BINS, peers.BOUND)),
    "neural autoregressive": autoregressive(f.DeepSigmoidal(peers.UNITS)),
    "block neural autoregressive": lambda dim, hidden: f.BlockAutoregressive(dim),
}
PEERS = {
    "planar": {"pyro": "Planar", "normflows": "Planar"},
    "radial": {"pyro": "Radial", "normflows": "Radial"},
    "full-rank affine": {"pyro": "LowerCholeskyAffine"},
    "sylvester": {"pyro": "Sylvester"},
    "householder": {"pyro": "Householder", "nflows": "HouseholderSequence"},
    "lu": {"zuko": "LU", "nflows": "LULinear", "normflows": "LULinearPermute"},
    "rotation": {"zuko": "Rotation"},
    "additive coupling": {"zuko": "NICE", "nflows": "AdditiveCoupling", "normflows": "AdditiveCouplingBlock"},
    "affine coupling": {
        "pyro": "AffineCoupling",
        "zuko": "RealNVP",
        "nflows": "AffineCoupling",
        "normflows": "AffineCouplingBlock",
    },
    "spline coupling": {
        "pyro": "SplineCoupling",
        "zuko": "RQS coupling",
        "nflows": "RQSCoupling",
        "normflows": "RQSCoupling",
    },
    "affine autoregressive": {
        "pyro": "AffineAutoregressive",
        "zuko": "MAF",
        "nflows": "MaskedAffineAutoregressive",
        "normflows": "MaskedAffineAutoregressive",
    },
    "gated autoregressive": {"pyro": "AffineAutoregressive stable"},
    "spline autoregressive": {
        "pyro": "SplineAutoregressive",
        "zuko": "NSF",
        "nflows": "MaskedRQSAutoregressive",
        "normflows": "RQSAutoregressive",
    },
    "neural autoregressive": {"pyro": "NeuralAutoregressive", "zuko": "NAF"},
    "block neural autoregressive": {"pyro": "BlockAutoregressive"},
}


def candidates(kind, dim, libraries):
    """Library -> flow at random parameters, ours first."""
    hidden = (max(64, 2 * dim),) * 2
    makers = {"ours": OURS[kind]}
    makers |= {library: libraries[library][name] for library, name in PEERS[kind].items() if library in libraries}
    found = {}
    for library, make in makers.items():
        torch.manual_seed(0)
        flow = found[library] = peers.as_flow(dim, make(dim, hidden))
        with torch.no_grad():
            for p in flow.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return found


def train(flow, call, point):
    """Forward, log-determinant, and gradients to all parameters."""
    y, log_det = call(point.detach())  # a new tensor, so that nobody's cache knows it
    parameters = [p for p in flow.parameters() if p.requires_grad]
    torch.autograd.grad(y.sum() + log_det.sum(), parameters, allow_unused=True)


@torch.no_grad()
def invert(flow, call, point):
    """The other direction and its log-determinant."""
    call(point.detach())


def clock(step, repeats=1):
    start = time.process_time()
    for _ in range(repeats):
        step()
    return (time.process_time() - start) / repeats


def take_turns(steps, warm_up):
    """Library -> milliseconds, the median over interleaved turns; or the word for what happened instead."""
    times, repeats = {}, {}
    for library, step in steps.items():
        try:
            once = clock(step)
            if warm_up or once < SLOW:
                once = clock(step)
        except Exception as error:  # whatever a library raises where it has no such direction
            missing = "expected to find key" in str(error) or "Not" in type(error).__name__
            times[library] = "-" if missing else "fails"
            continue
        times[library] = [once]
        repeats[library] = 0 if once > SLOW else max(1, round(TURN_SECONDS / once))
    for _ in range(TURNS):
        for library, count in repeats.items():
            if count:
                times[library].append(clock(steps[library], count))
    return {library: t if isinstance(t, str) else 1e3 * statistics.median(t[1:] or t) for library, t in times.items()}


def saved_megabytes(flow, point):
    """Size of the distinct storages that the forward pass keeps for its backward pass, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in (*flow.parameters(), *flow.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # held, so that its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = flow.forward_and_log_det(point.detach())
    del results
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own) / 1e6


def compare(kind, dim, libraries, compile_too, before):
    """Yield a row for each direction and mode of one flow; `before` holds the seconds that smaller dimensions took."""
    torch.manual_seed(0)
    found, point = candidates(kind, dim, libraries), torch.randn(BATCH, dim)
    yield row(kind, dim, "eager", "memory", {name: saved_megabytes(flow, point) for name, flow in found.items()})
    for mode in ("eager", "compiled") if compile_too else ("eager",):
        torch.compiler.reset()
        for direction, run in (("train", train), ("inverse", invert)):
            if direction == "inverse" and mode == "compiled" and ("autoregressive" in kind or kind == "sylvester"):
                continue  # one coordinate after another: unrolled, this would compile for minutes
            steps, figures = {}, {}
            for library, flow in found.items():
                smaller, seconds = before.get((mode, direction, library), (dim, 0.0))
                if seconds * (dim / smaller) ** 2.5 > TOO_SLOW:
                    figures[library] = "slow"
                    continue
                call = flow.forward_and_log_det if direction == "train" else flow.inverse_and_log_det
                steps[library] = partial(run, flow, torch.compile(call) if mode == "compiled" else call, point)
            figures |= take_turns(steps, warm_up=mode == "compiled")
            before |= {(mode, direction, name): (dim, t / 1e3) for name, t in figures.items() if not isinstance(t, str)}
            yield row(kind, dim, mode, direction, figures)


def row(kind, dim, mode, what, figures):
    """Our figure, those of the others relative to it, and ours relative to the best of them."""
    ours = figures["ours"]
    others = {library: figures.get(library, "-") for library in peers.LIBRARIES}
    able = {library: figure for library, figure in others.items() if not isinstance(figure, str)}
    best = min(able, key=able.__getitem__, default="-")
    if isinstance(ours, str) or not ours:
        return {"flow": kind, "dim": dim, "mode": mode, "what": what, "ours": ours, **others, "best": best}
    ratio = ours / able[best] if able and able[best] else float("nan")
    relative = {library: figure / ours if library in able else figure for library, figure in others.items()}
    return {
        "flow": kind,
        "dim": dim,
        "mode": mode,
        "what": what,
        "ours": ours,
        **relative,
        "best": best,
        "ratio": ratio,
    }


def table(rows):
    """All rows, those where ours is worst first."""
    frame = pd.DataFrame(rows, columns=COLUMNS).sort_values("ratio", ascending=False, na_position="last")
    frame[""] = ["<- worse" if ratio > 1.05 else "" for ratio in frame["ratio"]]
    return frame.map(lambda cell: f"{cell:.3g}" if isinstance(cell, float) else cell).to_string(index=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flows", nargs="+", choices=OURS, default=list(OURS), metavar="FLOW", help=", ".join(OURS))
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--compile-dims", type=int, nargs="+", default=[16])
    parser.add_argument("--peers", nargs="+", choices=peers.LIBRARIES, default=peers.LIBRARIES)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # peers warn of deprecations, torch's compiler of its own code
    libraries = {library: peers.flows(library) for library in options.peers}
    rows, start = [], time.perf_counter()
    for kind in options.flows:
        before = {}
        for dim in sorted(options.dims):
            compile_too = dim in options.compile_dims and not options.no_compile
            rows += (new := list(compare(kind, dim, libraries, compile_too, before)))
            print(f"{table(new)}\nafter {time.perf_counter() - start:.0f} s", flush=True)
    print(f"\nours in ms or MB; others, and the best one's ratio, relative to ours\n{table(rows)}")
    if options.json:
        packages = ("torch", "pyro-ppl", *(name for name in options.peers if name != "pyro"))
        record = {
            "machine": platform.platform(),
            "threads": 1,
            "batch": BATCH,
            "versions": {name: version(name) for name in packages},
            "rows": rows,
        }
        options.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
