"""The posteriors of posteriordb: every port against a formula in NumPy, and against the reference draws.

Data here are made up and tiny. The tests on real data are slow, and need the files:
`PYRO_NF_POSTERIORDB=FOLDER make slow`.
"""

import gzip
import itertools
import json
import math
import os
import zipfile

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats
from scipy.integrate import solve_ivp
from scipy.special import logsumexp

from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI
from pyro_nf.models.benchmarks import posteriordb
from pyro_nf.models.benchmarks.posteriordb import priors
from pyro_nf.models.benchmarks.posteriordb.catalogue import ENTRIES
from pyro_nf.models.benchmarks.posteriordb.priors import Restricted
from pyro_nf.programs.sites import is_latent

FOLDER = os.environ.get("PYRO_NF_POSTERIORDB")
RNG = np.random.default_rng(0)
N = 7

NORMAL = stats.norm.logpdf


def positive(*shape):
    return RNG.uniform(0.5, 3.0, shape)


def binary():
    return np.array([0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0])


def nes():
    small = {name: RNG.integers(1, 5, N) for name in ("educ1", "gender", "income", "partyid7", "race_adj", "real_ideo")}
    return {"age_discrete": np.array([1, 2, 3, 4, 4, 3, 1]), **small}


SHRUBS = ("weight", "diam1", "diam2", "canopy_height", "total_height", "density")
DATA = {
    "earnings": {"earn": 1e4 * positive(N), "height": 60 + positive(N), "male": binary()},
    "kidiq": {"kid_score": 90 + positive(N), "mom_hs": binary(), "mom_iq": 100 + positive(N)},
    "mesquite": {**{name: positive(N) for name in SHRUBS}, "group": binary()},
    **{f"nes{year}": nes() for year in (1972, 1980, 1988, 1996)},
    "sblrc": {"X": RNG.normal(size=(N, 3)), "y": RNG.normal(size=N), "D": 3, "N": N},
    "diamonds": {"X": np.c_[np.ones(N), RNG.normal(size=(N, 3))], "Y": RNG.normal(size=N), "K": 4},
    "eight_schools": {"y": 10 * RNG.normal(size=8), "sigma": 10 * positive(8), "J": 8},
    "low_dim_gauss_mix": {"y": RNG.normal(size=N)},
    "arK": {"y": RNG.normal(size=9), "K": 2, "T": 9},
    "garch": {"y": RNG.normal(size=N), "sigma1": 0.5, "T": N},
    "bball_drive_event_0": {"u": positive(5), "v": positive(5), "alpha": np.array([[4.0, 1.0], [2.0, 3.0]]), "K": 2},
    "gp_pois_regr": {"x": np.arange(5.0), "y": RNG.normal(size=5)},
    # Times so close that the steps between them are all but exact.
    "hudson_lynx_hare": {"ts": np.array([0.1, 0.3, 0.4]), "y_init": np.array([30.0, 4.0]), "y": 20 * positive(3, 2)},
}
DATA["kidiq_with_mom_work"] = DATA["kidiq"]


def regression(x, y):
    return lambda v: NORMAL(y, x @ v["beta"], v["sigma"]).sum()


def half_cauchy_regression(x, y):
    return lambda v: regression(x, y)(v) + stats.halfcauchy.logpdf(v["sigma"], scale=2.5)


def interaction(y, a, b):
    return regression(np.c_[np.ones(N), a, b, a * b], y)


def earnings(name, earn, height, male):
    one, z = np.ones(N), (height - height.mean()) / height.std(ddof=1)
    x, y = {
        "log10earn_height": (np.c_[one, height], np.log10(earn)),
        "logearn_height": (np.c_[one, height], np.log(earn)),
        "logearn_height_male": (np.c_[one, height, male], np.log(earn)),
        "logearn_interaction_z": (np.c_[one, z, male, z * male], np.log(earn)),
        "logearn_logheight_male": (np.c_[one, np.log(height), male], np.log(earn)),
    }[name]
    return regression(x, y)


def kidiq(name, kid_score, mom_hs, mom_iq):
    x = {"momhs": np.c_[mom_hs], "momiq": np.c_[mom_iq], "momhsiq": np.c_[mom_hs, mom_iq]}[name[len("kidscore_") :]]
    return half_cauchy_regression(np.c_[np.ones(N), x], kid_score)


def kidiq_with_mom_work(name, kid_score, mom_hs, mom_iq):
    a, b = mom_hs - mom_hs.mean(), mom_iq - mom_iq.mean()
    return {
        "c": interaction(kid_score, a, b),
        "c2": interaction(kid_score, mom_hs - 0.5, mom_iq - 100),
        "z": interaction(kid_score, a / (2 * mom_hs.std(ddof=1)), b / (2 * mom_iq.std(ddof=1))),
    }[name[len("kidscore_interaction_") :]]


def mesquite(name, weight, diam1, diam2, canopy_height, total_height, density, group):
    volume, area, shape = diam1 * diam2 * canopy_height, diam1 * diam2, diam1 / diam2
    sizes = {
        "logmesquite": (diam1, diam2, canopy_height, total_height, density),
        "logmesquite_logvolume": (volume,),
        "logmesquite_logva": (volume, area),
        "logmesquite_logvas": (volume, area, shape, total_height, density),
    }[name]
    x = np.c_[np.ones(N), np.log(np.stack(sizes, 1)), group]
    return regression(x[:, :-1] if name == "logmesquite_logvolume" else x, np.log(weight))


def nes_regression(_, age_discrete, educ1, gender, income, partyid7, race_adj, real_ideo):
    ages = [[float(age == level) for level in (2, 3, 4)] for age in age_discrete]
    return regression(np.c_[np.ones(N), real_ideo, race_adj, ages, educ1, gender, income], partyid7)


def sblrc(_, **d):
    def log_density(v):
        prior = NORMAL(v["beta"], 0, 10).sum() + stats.halfnorm.logpdf(v["sigma"], scale=10)
        return prior + regression(d["X"], d["y"])(v)

    return log_density


def diamonds(_, **d):
    def log_density(v):
        # Half a Student-t: twice its density.
        prior = math.log(2) + stats.t.logpdf(v["sigma"], 3, 0, 10) + stats.t.logpdf(v["Intercept"], 3, 8, 10)
        loc = v["Intercept"] + (d["X"] - d["X"].mean(0))[:, 1:] @ v["b"]
        return prior + NORMAL(v["b"]).sum() + NORMAL(d["Y"], loc, v["sigma"]).sum()

    return log_density


def eight_schools(name, y, sigma, **sizes):
    def log_density(v):
        prior = NORMAL(v["mu"], 0, 5) + stats.halfcauchy.logpdf(v["tau"], scale=5)
        if name == "eight_schools_centered":
            return prior + NORMAL(v["theta"], v["mu"], v["tau"]).sum() + NORMAL(y, v["theta"], sigma).sum()
        theta = v["mu"] + v["tau"] * v["theta_trans"]
        return prior + NORMAL(v["theta_trans"]).sum() + NORMAL(y, theta, sigma).sum()

    return log_density


def low_dim_gauss_mix(_, y):
    def log_density(v):
        prior = NORMAL(v["mu"], 0, 2).sum() + stats.halfnorm.logpdf(v["sigma"], scale=2).sum()
        densities = stats.norm.pdf(y[:, None], v["mu"], v["sigma"]) @ [v["theta"], 1 - v["theta"]]
        return prior + stats.beta.logpdf(v["theta"], 5, 5) + np.log(densities).sum()

    return log_density


def autoregression(_, y, **d):
    order = d["K"]

    def log_density(v):
        prior = NORMAL(np.r_[v["alpha"], v["beta"]], 0, 10).sum() + stats.halfcauchy.logpdf(v["sigma"], scale=2.5)
        locs = [v["alpha"] + sum(v["beta"][k] * y[t - k - 1] for k in range(order)) for t in range(order, len(y))]
        return prior + NORMAL(y[order:], locs, v["sigma"]).sum()

    return log_density


def garch(_, y, sigma1, **sizes):
    def log_density(v):
        beta1 = v["beta1_share"] * (1 - v["alpha1"])
        variance, total = sigma1**2, math.log(1 - v["alpha1"])
        for value in y:
            total += NORMAL(value, v["mu"], math.sqrt(variance))
            variance = v["alpha0"] + v["alpha1"] * (value - v["mu"]) ** 2 + beta1 * variance
        return total

    return log_density


def hidden_markov(_, u, v, alpha, **sizes):
    def log_density(values):
        phi, lam, transition = values["phi"], values["lambda"], np.stack([values["theta1"], values["theta2"]])
        prior = sum(NORMAL(rates, [0, 3]).sum() for rates in (phi, lam))
        prior += sum(stats.dirichlet.logpdf(row, a) for row, a in zip(transition, alpha, strict=True))
        paths = [
            sum(
                stats.expon.logpdf(u[t], scale=1 / phi[z]) + stats.expon.logpdf(v[t], scale=1 / lam[z]) for t, z in path
            )
            + sum(np.log(transition[i, j]) for (_, i), (_, j) in itertools.pairwise(path))
            for path in (list(enumerate(states)) for states in itertools.product(range(2), repeat=len(u)))
        ]
        return prior + logsumexp(paths)

    return log_density


def gaussian_process(_, x, y):
    def log_density(v):
        prior = stats.gamma.logpdf(v["rho"], 25, scale=1 / 4) + stats.halfnorm.logpdf(v["alpha"], scale=2)
        covariance = v["alpha"] ** 2 * np.exp(-(np.subtract.outer(x, x) ** 2) / (2 * v["rho"] ** 2))
        noisy = covariance + v["sigma"] * np.eye(len(x))
        return prior + stats.halfnorm.logpdf(v["sigma"]) + stats.multivariate_normal.logpdf(y, cov=noisy)

    return log_density


def lotka_volterra(_, ts, y_init, y):
    def log_density(v):
        alpha, beta, gamma, delta = v["theta"]
        prior = NORMAL(v["theta"], [1, 0.05, 1, 0.05], [0.5, 0.05, 0.5, 0.05]).sum()
        prior += stats.lognorm.logpdf(v["z_init"], 1, scale=10).sum()
        prior += stats.lognorm.logpdf(v["sigma"], 1, scale=math.exp(-1)).sum()
        path = solve_ivp(
            lambda _, z: [(alpha - beta * z[1]) * z[0], (delta * z[0] - gamma) * z[1]],
            (0, ts[-1]), v["z_init"], "DOP853", ts, rtol=1e-10, atol=1e-12,
        )  # fmt: skip
        first = stats.lognorm.logpdf(y_init, v["sigma"], scale=v["z_init"]).sum()
        return prior + first + stats.lognorm.logpdf(y, v["sigma"], scale=path.y.T).sum()

    return log_density


# {data set: formula}: the model's name and the data to a function of the latents.
FORMULAS = {
    "earnings": earnings,
    "kidiq": kidiq,
    "kidiq_with_mom_work": kidiq_with_mom_work,
    "mesquite": mesquite,
    "nes1972": nes_regression,
    "nes1980": nes_regression,
    "nes1988": nes_regression,
    "nes1996": nes_regression,
    "sblrc": sblrc,
    "diamonds": diamonds,
    "eight_schools": eight_schools,
    "low_dim_gauss_mix": low_dim_gauss_mix,
    "arK": autoregression,
    "garch": garch,
    "bball_drive_event_0": hidden_markov,
    "gp_pois_regr": gaussian_process,
    "hudson_lynx_hare": lotka_volterra,
}
# The name of one posterior for each model.
MODELS = list({entry.model: name for name, entry in ENTRIES.items()}.values())
EVIDENCE = (-12.5, 0.25)


def as_json(data):
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in data.items()}


def made_up_draws(**shapes):
    """Three draws in each of two chains, under posteriordb's names: `{"beta[1]": (2, 3)}`."""
    return {
        f"{site}[{index + 1}]" if shape else site: RNG.uniform(0.1, 0.4, (2, 3))
        for site, shape in shapes.items()
        for index in range(math.prod(shape))
    }


DRAWS = {
    "garch-garch11": made_up_draws(mu=(), alpha0=(), alpha1=(), beta1=()),
    "eight_schools-eight_schools_noncentered": made_up_draws(theta=(8,), mu=(), tau=()),
    # More than nine, in the order of the alphabet: beta[10] comes before beta[2].
    "nes1972-nes": dict(sorted(made_up_draws(beta=(11,), sigma=()).items())),
}


def write_indexed(folder):
    (folder / "data").mkdir()
    (folder / "reference").mkdir()
    index = []
    for name in posteriordb.names():
        data_name = name.split("-")[0]
        index.append({"name": name, "data": data_name, "reference": name})
        index[-1] |= {"log_evidence": EVIDENCE[0], "log_evidence_se": EVIDENCE[1]}
        with gzip.open(folder / "data" / f"{data_name}.json.gz", "wt") as file:
            json.dump(as_json(DATA[data_name]), file)
        if name in DRAWS:
            arrays = {"names": np.array(list(DRAWS[name])), "draws": np.stack(list(DRAWS[name].values()), -1)}
            np.savez(folder / "reference" / f"{name}.npz", **arrays)
    (folder / "index.json").write_text(json.dumps(index))


def write_original(folder):
    posteriors, data, reference = (
        folder / "posterior_database" / part for part in ("posteriors", "data/data", "reference_posteriors/draws/draws")
    )
    for part in (posteriors, data, reference):
        part.mkdir(parents=True)
    for name in posteriordb.names():
        data_name, model_name = name.split("-")
        entry = {"name": name, "data_name": data_name, "model_name": model_name}
        entry["reference_posterior_name"] = name if name in DRAWS else None
        (posteriors / f"{name}.json").write_text(json.dumps(entry))
        with zipfile.ZipFile(data / f"{data_name}.json.zip", "w") as archive:
            archive.writestr(f"{data_name}.json", json.dumps(as_json(DATA[data_name])))
        if name in DRAWS:
            chains = [{key: value[chain].tolist() for key, value in DRAWS[name].items()} for chain in range(2)]
            with zipfile.ZipFile(reference / f"{name}.json.zip", "w") as archive:
                archive.writestr(f"{name}.json", json.dumps(chains))


@pytest.fixture(scope="module", params=[write_indexed, write_original])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("posteriordb")
    request.param(path)
    return path


@pytest.mark.parametrize("name", posteriordb.names())
def test_log_densities_are_those_of_the_formulas(name, folder):
    posterior = posteriordb.load(name, folder)
    data_name, model_name = name.split("-")
    formula = FORMULAS[data_name](model_name, **DATA[data_name])
    for _ in range(5):
        trace = poutine.trace(posterior.model).get_trace(*posterior.args)
        values = {key: site["value"].numpy() for key, site in trace.nodes.items() if is_latent(site)}
        assert float(trace.log_prob_sum()) == pytest.approx(float(formula(values)), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_model_is_fitted_in_batches_and_keeps_its_dtype(name, dtype, tmp_path):
    write_indexed(tmp_path)
    posterior = posteriordb.load(name, tmp_path, dtype=dtype)
    guide = AutoFlow(posterior.model)
    svi = FlowSVI(posterior.model, guide, learning_rate=0.01, max_steps=2, compile=False, progress=False, seed=0)
    # Warnings are errors: of a model that vmap cannot batch among them.
    assert math.isfinite(svi.run(*posterior.args).elbo)
    assert {value.dtype for value in guide.sample_posterior(2, *posterior.args).values()} == {dtype}


def test_reference_draws_are_gathered_by_site(folder):
    reference = posteriordb.load("nes1972-nes", folder).reference
    assert {site: tuple(values.shape) for site, values in reference.items()} == {"beta": (2, 3, 11), "sigma": (2, 3)}
    assert torch.equal(reference["beta"][..., 9], torch.from_numpy(DRAWS["nes1972-nes"]["beta[10]"]))
    assert reference["sigma"].dtype == torch.float64
    assert posteriordb.load("nes1980-nes", folder).reference is None


@pytest.mark.parametrize(
    ("name", "computed"), [("garch-garch11", "beta1"), ("eight_schools-eight_schools_noncentered", "theta")]
)
def test_latents_that_the_draws_imply_give_the_draws_back(name, computed, folder):
    posterior = posteriordb.load(name, folder)
    one = {site: values[1, 2] for site, values in posterior.reference.items()}
    expected = one.pop(computed)
    trace = poutine.trace(poutine.condition(posterior.model, data=one)).get_trace(*posterior.args)
    assert not any(map(is_latent, trace.nodes.values()))
    assert torch.allclose(trace.nodes[computed]["value"], expected)


@pytest.mark.parametrize(
    ("write", "inside", "evidence"),
    [(write_indexed, "", EVIDENCE), (write_original, "posterior_database", (None, None))],
)
def test_the_folder_can_come_from_the_environment(write, inside, evidence, monkeypatch, tmp_path):
    write(tmp_path)
    monkeypatch.setenv("PYRO_NF_POSTERIORDB", str(tmp_path / inside))
    posterior = posteriordb.load("garch-garch11")
    assert (posterior.log_evidence, posterior.log_evidence_se) == evidence


def test_bad_input_gets_a_sentence(monkeypatch, tmp_path):
    monkeypatch.delenv("PYRO_NF_POSTERIORDB", raising=False)
    with pytest.raises(ValueError, match=r"got 'garch-garch'; did you mean 'garch-garch11'\?"):
        posteriordb.load("garch-garch")
    with pytest.raises(ValueError, match=r"folder must be that of .*; give it, or set PYRO_NF_POSTERIORDB"):
        posteriordb.load("arK-arK")
    with pytest.raises(ValueError, match=r"there is no folder '.*nowhere'"):
        posteriordb.load("arK-arK", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has neither"):
        posteriordb.load("arK-arK", tmp_path)
    (tmp_path / "index.json").write_text("[]")
    with pytest.raises(ValueError, match=r"has no posterior 'arK-arK' in its index.json"):
        posteriordb.load("arK-arK", tmp_path)
    (tmp_path / "index.json").rename(tmp_path / "other.json")
    (tmp_path / "posteriors").mkdir()
    with pytest.raises(ValueError, match="has no posterior 'arK-arK'"):
        posteriordb.load("arK-arK", tmp_path)
    with pytest.raises(ValueError, match="posterior must have reference draws; 'x' has none"):
        posteriordb.stein_scores(posteriordb.Posterior("x", lambda: None, ()))


def test_a_restricted_prior_has_the_bases_density_and_draws_inside(float64):
    base = dist.Normal(torch.tensor([0.0, 0.5]), 1.0).to_event(1)
    prior = Restricted(base, dist.constraints.ordered_vector)
    draws = prior.expand((3,)).sample((20_000,))
    assert draws.shape == (20_000, 3, 2)
    assert (draws[..., 0] < draws[..., 1]).all()
    assert torch.equal(prior.log_prob(draws), base.log_prob(draws))
    with pytest.raises(ValueError, match="within the support"):
        prior.log_prob(torch.tensor([1.0, 0.0]))
    proposed = base.sample((60_000,))
    expected = proposed[proposed[:, 0] < proposed[:, 1]].mean(0)
    assert torch.allclose(draws.mean((0, 1)), expected, atol=0.03)


def test_draws_that_never_fall_inside_end(monkeypatch):
    monkeypatch.setattr(priors, "_MAX_TRIES", 50)
    for loc in ([math.nan, 0.0], [1e3, 0.0]):
        base = dist.Normal(torch.tensor(loc), 1.0, validate_args=False).to_event(1)
        with pytest.raises(ValueError, match=r"no draw of .* fell into .* in 50 tries"):
            Restricted(base, dist.constraints.ordered_vector).sample()


def normal_posterior(loc, scale):
    """A model that says `N(loc, scale)` of two positive latents' logarithms, and draws that are of `N(0, 1)`."""

    def model():
        pyro.sample("z", dist.LogNormal(torch.full((2,), loc), scale).to_event(1))

    return posteriordb.Posterior("made up", model, (), {"z": torch.randn(4, 500, 2).exp()})


def test_the_checks_tell_a_right_density_from_a_displaced_and_from_a_wide_one(float64):
    def worst(loc, scale):
        return {
            kind: float(z.abs().max()) for kind, z in posteriordb.stein_scores(normal_posterior(loc, scale)).items()
        }

    assert max(worst(0.0, 1.0).values()) < 4
    assert worst(0.3, 1.0)["shift"] > 6
    assert worst(0.0, 1.3)["spread"] > 6 > worst(0.0, 1.3)["shift"]


def test_importance_evidence_counts_every_constant(float64):
    found = posteriordb.importance_evidence(normal_posterior(0.0, 1.0))
    assert abs(found.log_evidence) < 4 * found.se < 0.05
    assert found.ess_fraction > 0.5


@pytest.mark.slow
@pytest.mark.skipif(FOLDER is None, reason="PYRO_NF_POSTERIORDB names no folder with posteriordb's files")
@pytest.mark.parametrize("name", posteriordb.names())
def test_reference_draws_satisfy_steins_identities_and_give_the_evidence(name):
    posterior = posteriordb.load(name)
    scores = posteriordb.stein_scores(posterior)
    print({kind: float(values.abs().max()) for kind, values in scores.items()})
    assert all(float(values.abs().max()) < 4.5 for values in scores.values())
    if posterior.log_evidence is not None:
        found = posteriordb.importance_evidence(posterior)
        print(found, posterior.log_evidence)
        error = math.hypot(found.se, posterior.log_evidence_se)
        assert abs(found.log_evidence - posterior.log_evidence) < 4.5 * error
