"""One run of `svi_speed.py`, in a process of its own, and how NumPyro does its works.

`python svi_peers.py SPEC` prints the record of the run that SPEC describes, both JSON. Only what the contestant needs
is imported, for its memory is measured.
"""

import importlib.util
import json
import sys
import time
import warnings
from functools import partial
from pathlib import Path

# Work -> model and guide, named below.
NUMPYRO = {
    "eight schools, non-centred": ("noncentered", "AutoNormal"),
    "eight schools, centred": ("centered", "AutoNormal"),
    "eight schools, centred, IAF": ("centered", "AutoIAFNormal"),
}
MIN_LAPS = 4  # of a run; the first one holds what is done once
LOOPS = ("NumPyro loop", "NumPyro scan")


class Watch:
    """A stopwatch that takes a lap every so many steps, and stands still while the ELBO is checked.

    Args:
        every: Steps in a lap.
        max_steps: Steps that end the race.
        target: The ELBO that ends it, or `None` for no checks.

    Attributes:
        gpu: `torch.cuda`, where that is where the race is.
        laps: Seconds of each lap.
        elbos: What the check after each lap found.
        utilization: Per cent of the time that the GPU was busy, asked at the end of each lap.
    """

    def __init__(self, every, max_steps, target):
        self.every, self.max_steps, self.target = every, max_steps, target
        self.gpu = None
        self.laps, self.elbos, self.utilization = [], [], []

    def start(self):
        self._since = time.perf_counter()

    def lap(self, elbo):
        """End a lap, check `elbo()` if there is a target, start the next, and return whether the race is over."""
        if self.gpu:
            if importlib.util.find_spec("pynvml"):
                self.utilization.append(self.gpu.utilization())
            self.gpu.synchronize()
        self.laps.append(time.perf_counter() - self._since)
        if self.target is not None:
            self.elbos.append(elbo())
        over = len(self.laps) * self.every >= self.max_steps
        if self.target is not None and len(self.laps) >= MIN_LAPS:
            over = over or max(self.elbos) >= self.target
        self.start()
        return over

    def drive(self, advance, elbo):
        """Take laps of `advance(every)` until the race is over."""
        self.start()
        advance(self.every)
        while not self.lap(elbo):
            advance(self.every)

    def peak(self):
        """Peak memory in MiB, of the GPU if there is one."""
        if self.gpu:
            return self.gpu.max_memory_allocated() / 2**20
        # The kernel's mark of this program: getrusage would count the one that started it too.
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10


def numpyro_svi(spec, watch):
    """`SVI.update`, compiled: called step by step, or in the scan that is in `SVI.run`, a lap at a time.

    `SVI.run` itself would compile its scan anew in each call.
    """
    import jax
    import numpyro
    from numpyro.infer import SVI, Trace_ELBO, autoguide, init_to_feasible

    data = [[15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]]
    data = [jax.numpy.array(values) for values in data]
    model, guide = NUMPYRO[spec["work"]]
    model = numpyro_models()[model]
    guide = {
        "AutoNormal": partial(autoguide.AutoNormal, init_loc_fn=init_to_feasible),  # as Pyro's starts
        "AutoIAFNormal": partial(autoguide.AutoIAFNormal, num_flows=2, hidden_dims=[32]),
    }[guide](model)
    svi = SVI(model, guide, numpyro.optim.Adam(spec["learning_rate"]), Trace_ELBO(spec["num_particles"]))
    yardstick = Trace_ELBO(spec["num_draws"])
    start = time.perf_counter()
    state = svi.init(jax.random.PRNGKey(0), *data)
    update = jax.jit(svi.update)
    if spec["contestant"] == "NumPyro scan":

        @jax.jit
        def scan(state):
            return jax.lax.scan(lambda state, _: svi.update(state, *data), state, None, length=watch.every)

        scan = scan.lower(state).compile()
    else:
        jax.block_until_ready(update(state, *data))
    seconds = time.perf_counter() - start

    def advance(count):
        nonlocal state
        if spec["contestant"] == "NumPyro scan":
            state, _ = scan(state)
        else:
            for _ in range(count):
                state, _ = update(state, *data)
        jax.block_until_ready(state)

    @jax.jit
    def elbo(state):
        return -yardstick.loss(state.rng_key, svi.get_params(state), model, guide, *data)

    watch.drive(advance, lambda: float(elbo(state)))
    return {"compile": seconds}


def numpyro_models():
    import numpyro
    import numpyro.distributions as dist

    def population():
        return numpyro.sample("mu", dist.Normal(0.0, 5.0)), numpyro.sample("tau", dist.HalfCauchy(5.0))

    def centered(sigma, y):
        mu, tau = population()
        with numpyro.plate("school", len(sigma)):
            theta = numpyro.sample("theta", dist.Normal(mu, tau))
            numpyro.sample("y", dist.Normal(theta, sigma), obs=y)

    def noncentered(sigma, y):
        mu, tau = population()
        with numpyro.plate("school", len(sigma)):
            theta = mu + tau * numpyro.sample("theta_trans", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(theta, sigma), obs=y)

    return {"centered": centered, "noncentered": noncentered}


def main():
    warnings.simplefilter("ignore")  # peers warn of deprecations, torch's compiler of its own code
    spec = json.loads(sys.argv[1])
    watch = Watch(spec["every"], spec["max_steps"], spec["target"])
    if spec["contestant"] in LOOPS:
        record = numpyro_svi(spec, watch)
    else:
        import svi_works

        record = svi_works.run(spec, watch)
    record |= {"every": watch.every, "laps": watch.laps, "elbos": watch.elbos, "peak": watch.peak()}
    print(json.dumps(record | ({"utilization": watch.utilization} if watch.utilization else {})))


if __name__ == "__main__":
    main()
