"""Steps of SVI side by side: time, compile time, time to a stated ELBO, and memory.

python benchmarks/svi_speed.py [--works WORK ...] [--threads 1] [--turns 3] [--json results.json]
python benchmarks/svi_speed.py --device cuda [...]
python benchmarks/svi_speed.py --scaling [...]

Everybody has Adam at the same rate, without clipping, float32, and a process for each run, on as many cores as
`--threads` says. First a race from a cold start: `compile` is the time that compiling took, `target` the rest of the
time until an ELBO on many fresh draws, checked every 100 steps and off the clock, reaches the figure stated with the
work. Then turns, one contestant after another, of four laps of about a second each: `ms/step` is a turn's median lap,
the median, `min` and `max` over the turns; `peak` the memory of the whole process. `ratio` is ms/step over that of the
best peer: below 1 is better.

Our laps are `eval_every` steps of FlowSVI and all that it does in between: 100 steps in the race, where `in race` is
the ms/step. Works on MNIST need the folder of data in `PYRO_NF_DATA`, `../shared/data` by default.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distributions
from pathlib import Path

import pandas as pd
import svi_peers
import svi_works

PACKAGES = ("torch", "pyro-ppl", "numpyro", "jax")
RACE_EVERY = 100
SHORTEST_LAP, LONGEST_LAP = 20, 20_000


def launch(spec, options, cache):
    """Do one run in a process of its own and return its record, or `{"error": ...}`."""
    threads = str(options.threads)
    environment = os.environ | {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TORCHINDUCTOR_CACHE_DIR": cache,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_cpu_multi_thread_eigen={str(options.threads > 1).lower()}",
    }
    spec |= {"threads": options.threads, "device": options.device}
    command = [sys.executable, Path(__file__).with_name("svi_peers.py"), json.dumps(spec)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return {"error": lines[-1] if lines else f"exit {done.returncode}"} if done.returncode else json.loads(lines[-1])


def compete(name, work, options):
    """Let everybody race, then take turns; return contestant -> the records of its runs, the race first."""
    contestants = [*work.contestants, *(svi_peers.LOOPS if name in svi_peers.NUMPYRO else ())]
    if options.contestants:
        contestants = [c for c in contestants if any(part in c for part in options.contestants)]
    numbers = {key: getattr(work, key) for key in ("num_particles", "learning_rate", "num_draws")}
    race = {"every": RACE_EVERY, "target": work.target}
    race["max_steps"] = RACE_EVERY * svi_peers.MIN_LAPS if work.target is None else options.max_steps
    records = {}
    with tempfile.TemporaryDirectory() as caches:
        for turn in range(options.turns + 1):
            for contestant in contestants:
                spec = {"work": name, "contestant": contestant, **numbers, **race}
                if turn > 0:
                    if "error" in records[contestant][-1]:
                        continue
                    every = round(options.lap_seconds / statistics.median(lap_seconds(records[contestant][0])))
                    every = min(max(every, SHORTEST_LAP), LONGEST_LAP)
                    spec |= {"every": every, "target": None, "max_steps": svi_peers.MIN_LAPS * every}
                cache = Path(caches) / str(contestants.index(contestant))
                records.setdefault(contestant, []).append(launch(spec, options, str(cache)))
    return records


def lap_seconds(record):
    """Seconds a step of each lap but the first."""
    return [lap / record["every"] for lap in record["laps"][1:]]


def summary(name, work, records):
    """Yield the row of each contestant."""
    times = {}
    for contestant, (_, *turns) in records.items():
        medians = [1e3 * statistics.median(lap_seconds(turn)) for turn in turns if "error" not in turn]
        if medians:
            times[contestant] = statistics.median(medians), min(medians), max(medians)
    best = min((t[0] for contestant, t in times.items() if not contestant.startswith("ours")), default=math.nan)
    for contestant, (race, *turns) in records.items():
        row = {"work": name, "contestant": contestant, "note": (turns or [race])[-1].get("error", "")}
        if contestant in times:
            ms, low, high = times[contestant]
            row |= {"ms/step": ms, "min": low, "max": high, "ratio": ms / best, "compile": race["compile"]}
            row["in race"] = 1e3 * statistics.median(lap_seconds(race))
            if work.target is not None:
                reached = [elbo >= work.target for elbo in race["elbos"]]
                laps = race["laps"][: reached.index(True) + 1] if any(reached) else []
                row["target"], row["steps"] = (sum(laps), len(laps) * race["every"]) if laps else ("not reached", "")
            row["peak"] = statistics.median(turn["peak"] for turn in turns)
            if not contestant.endswith(race.get("ran", "")):  # the form that ours was asked for
                row["note"] = f"ran {race['ran']}"
            if "utilization" in turns[-1]:
                row["GPU %"] = statistics.mean(value for turn in turns for value in turn["utilization"][1:])
        yield row


def table(rows):
    frame = pd.DataFrame(rows)
    frame["note"] = frame.pop("note")  # to the end
    frame = frame.map(lambda cell: f"{cell:.3g}" if isinstance(cell, float) and abs(cell) < 1000 else cell)
    return frame.fillna("").to_string(index=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", help="only these works, or parts of their names")
    parser.add_argument("--contestants", nargs="+", help="only these, or parts of their names")
    parser.add_argument("--scaling", action="store_true", help="how time and memory grow with particles, dims and data")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--lap-seconds", type=float, default=1.0)
    parser.add_argument("--max-steps", type=int, default=10_000, help="of a race")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # for the runs, which inherit it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    works = svi_works.SCALING if options.scaling else svi_works.WORKS
    rows, runs, start = [], {}, time.perf_counter()
    for name, work in works.items():
        if options.device not in work.devices or (options.works and not any(part in name for part in options.works)):
            continue
        if work.problem is svi_works.mnist and not svi_works.MNIST.exists():
            print(f"{name}: skipped, there is no {svi_works.MNIST}")
            continue
        runs[name] = compete(name, work, options)
        rows += (new := list(summary(name, work, runs[name])))
        print(f"{table(new)}\nafter {time.perf_counter() - start:.0f} s", flush=True)
    if not rows:
        parser.exit(1, "no work was done\n")
    targets = [f"{name} {work.target:g}" for name, work in works.items() if name in runs and work.target is not None]
    print(f"\nms, seconds, MiB; targets in nats: {', '.join(targets)}\n{table(rows)}")
    if options.json:
        record = {
            "machine": platform.platform(),
            "options": vars(options) | {"json": str(options.json)},
            "versions": {found.name: found.version for found in distributions() if found.name in PACKAGES},
            "targets": targets,
            "rows": rows,
            "runs": runs,
        }
        options.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
