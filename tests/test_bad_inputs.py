"""Two hundred random bad inputs over the public functions: each is a sentence of ours, or is right."""

import collections.abc
import importlib
import inspect
import math
import pathlib
import types
from functools import cache, partial
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import pyro_nf
from pyro_nf import diagnostics, flows, guides, inference, models, networks, testing
from pyro_nf.inference import elbo, staged
from pyro_nf.models import imputation, tables
from pyro_nf.models.benchmarks import energies, hard_posteriors, images, posteriordb

ROOT = pathlib.Path(pyro_nf.__file__).parent
Y = torch.tensor([1.0, 2.0, 0.5])

BAD = {
    "None": None,
    "word": "nonsense",
    "zero": 0,
    "negative": -1,
    "fraction": 2.5,
    "flag": True,
    "nan": math.nan,
    "inf": math.inf,
    "list": [],
    "list of zeros": [0, 0],
    "list of words": ["a"],
    "dict": {},
    "object": object(),
    "array": np.array([1.0, np.nan]),
    "empty": torch.empty(0),
    "empty rows": torch.empty(0, 3),
    "NaN": torch.tensor([math.nan, 1.0, 2.0]),
    "infinite": torch.tensor([math.inf, 1.0, 2.0]),
    "scalar": torch.tensor(1.0),
    "cube": torch.ones(2, 3, 4),
    "integers": torch.tensor([1, 2, 3]),
    "complex": torch.ones(3, dtype=torch.complex64),
    "meta": torch.empty(3, device="meta"),
    "function": lambda *args, **kwargs: None,
    "class": dict,
}


def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("unit", 3):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def local_model(y):
    with pyro.plate("unit", 3):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def prior():
    pyro.sample("mu", dist.Normal(0.0, 1.0))


def both_model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("unit", 3):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[:, 0])


def local_guide(y):
    with pyro.plate("unit", 3):
        pyro.sample("z", dist.Normal(y / 2, 0.5**0.5))


@cache
def guide():
    made = guides.AutoFlow(model, lambda dim: flows.ElementwiseAffine(dim), init_scale=0.5)
    made(Y)
    return made


@cache
def fit():
    options = {"learning_rate": 0.1, "max_steps": 20, "num_particles": 4, "progress": False, "compile": False}
    return inference.FlowSVI(model, guide(), seed=0, **options).run(Y)


@cache
def data():
    torch.manual_seed(0)
    return diagnostics.to_arviz(model, guide(), Y, num_samples=100, num_prior_samples=0)


@cache
def table():
    columns = [tables.Column("a", "real"), tables.Column("b", "pos")]
    return tables.make(columns, torch.tensor([[1.0, 2.0], [3.0, 0.5], [0.1, 0.2]]))


def run(y=Y, **options):
    options = {"max_steps": 20, "num_particles": 4, "eval_particles": 10, "learning_rate": 0.1, **options}
    svi = inference.FlowSVI(model, guides.AutoFlow(model), **{"progress": False, "compile": False, **options})
    return svi.run(y)


def built(make):
    """A constructor, and a use of what it makes."""

    def use(**arguments):
        flow = make(**arguments)
        return flow.forward_and_log_det(torch.zeros(2, *flow.event_shape)) if not flow.context_dim else flow

    return use


IMAGE = {"event_shape": (4, 4, 4)}
MLP = {"in_features": 2, "hidden_dims": (4,), "out_features": 3, "context_dim": 0}
# Every public function and class, with arguments that are right: one of them at a time is made wrong.
CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "flows.Autoregressive": (flows.Autoregressive, {"dim": 3, "hidden_dims": (8,), "reverse": False, "context_dim": 0}),
    "flows.BlockAutoregressive": (flows.BlockAutoregressive, {"dim": 3, "units": 2, "depth": 2, "reverse": False}),
    "flows.Channelwise": (flows.Channelwise, {"flow": flows.Diagonal(4), "height": 2, "width": 2}),
    "flows.ConvolutionCoupling": (flows.ConvolutionCoupling, {"dim": 3, "mask": None, "kind": "circular"}),
    "flows.Coupling": (flows.Coupling, {"dim": 3, "mask": None, "transformer": None, "hidden_dims": (4,)}),
    "flows.Flow": (flows.Flow, {"event_shape": (3,), "context_dim": 0}),
    "flows.Householder": (flows.Householder, {"dim": 3, "num_reflections": 2, "context_dim": 0}),
    "flows.ImageCoupling": (
        flows.ImageCoupling,
        {**IMAGE, "mask": "channel", "invert": False, "hidden_channels": (4,)},
    ),
    "flows.Inverse": (flows.Inverse, {"flow": flows.Planar(3)}),
    "flows.LULinear": (flows.LULinear, {"dim": 3, "order": None, "context_dim": 0}),
    "flows.LeakyReLU": (flows.LeakyReLU, {"dim": 3, "alpha": 0.1}),
    "flows.LinearIAF": (flows.LinearIAF, {"dim": 3, "num_matrices": 1, "context_dim": 0}),
    "flows.WhitenedAffine": (flows.WhitenedAffine, {"dim": 3}),
    "flows.Paced": (flows.Paced, {"flow": flows.Planar(3)}),
    "flows.Permutation": (flows.Permutation, {"order": [2, 0, 1]}),
    "flows.Rotation": (flows.Rotation, {"dim": 3, "start": None, "trainable": True}),
    "flows.Sequential": (lambda flow: flows.Sequential(flow), {"flow": flows.Planar(3)}),
    "flows.Split": (flows.Split, {"flow": flows.Channelwise(flows.Diagonal(2), 2, 2), "channels": 2}),
    "flows.Squeezed": (flows.Squeezed, {"flow": flows.Channelwise(flows.Diagonal(4), 2, 2)}),
    "flows.Sylvester": (flows.Sylvester, {"dim": 3, "num_units": None, "basis": "orthogonal", "num_reflections": None}),
    "flows.QuadraticTriangularMap": (flows.QuadraticTriangularMap, {"dim": 3, "quadratic": True}),
    "flows.BatchNorm": (flows.BatchNorm, {"dim": 3, "momentum": 0.1, "eps": 1e-5}),
    "flows.Affine": (flows.Affine, {"bound": 5.0}),
    "flows.Gated": (flows.Gated, {"forget_bias": 2.0, "bound": 5.0}),
    "flows.DeepSigmoidal": (flows.DeepSigmoidal, {"num_units": 4}),
    "flows.LogisticMixture": (flows.LogisticMixture, {"num_components": 4}),
    "flows.RationalQuadraticSpline": (flows.RationalQuadraticSpline, {"num_bins": 4, "bound": 5.0}),
    "flows.random_orthogonal": (flows.random_orthogonal, {"dim": 3, "generator": None}),
    "flows.initialize_actnorm": (
        flows.initialize_actnorm,
        {"flow": flows.ActNorm(3), "data": torch.randn(5, 3), "inverse": True},
    ),
    "flows.set_batchnorm_statistics": (
        flows.set_batchnorm_statistics,
        {"flow": flows.BatchNorm(3), "data": torch.randn(5, 3)},
    ),
    "flows.multiscale": (flows.multiscale, {"event_shape": (1, 4, 4), "num_scales": 1, "steps": lambda s, last: []}),
    "flows.stacks.make": (flows.stacks.make, {"name": "realnvp", "dim": 3, "depth": 2, "context_dim": 0}),
    "networks.MADE": (networks.MADE, {"dim": 3, "num_params": 2, "hidden_dims": (4,), "order": None}),
    "networks.MLP": (networks.MLP, {**MLP, "zero_init": False, "activation": nn.Tanh}),
    "networks.ContextParameters": (networks.ContextParameters, {"initial": {"a": torch.zeros(2)}, "context_dim": 0}),
    "networks.ConvNet": (networks.ConvNet, {"in_channels": 1, "hidden_channels": (4,), "out_channels": 2}),
    "networks.GatedLinear": (networks.GatedLinear, {"in_features": 2, "out_features": 2}),
    "networks.GatedMLP": (networks.GatedMLP, {"in_features": 2, "hidden_dims": (4,), "out_features": 2}),
    "networks.ImageDecoder": (networks.ImageDecoder, {"in_features": 2, "image_shape": (1, 8, 8), "num_params": 1}),
    "networks.ImageEncoder": (networks.ImageEncoder, {"image_shape": (1, 8, 8), "out_features": 2, "kernel_size": 3}),
    "networks.MaskedLinear": (networks.MaskedLinear, {"mask": torch.ones(2, 3, dtype=torch.bool)}),
    "networks.OrderAgnosticMADE": (networks.OrderAgnosticMADE, {"dim": 3, "num_params": 1, "hidden_dims": (4,)}),
    "networks.freeze": (networks.freeze, {"module": nn.Linear(2, 2)}),
    "networks.start_at_zero": (lambda layer: networks.start_at_zero(layer), {"layer": nn.Linear(2, 2)}),
    "inference.ELBO": (
        elbo.ELBO,
        {"num_particles": 4, "sticking_the_landing": True, "annealing_steps": 0},
    ),
    "inference.IWELBO": (elbo.IWELBO, {"num_importance_samples": 2, "num_particles": 4}),
    "inference.KLAnnealedELBO": (elbo.KLAnnealedELBO, {"warmup_steps": 2, "free_bits": 0.1, "num_particles": 4}),
    "diagnostics.calibrate": (
        lambda **o: diagnostics.calibrate(model, lambda simulated: prior, Y, **o),
        {"num_simulations": 20, "num_samples": 100, "num_workers": 1, "seed": 0},
    ),
    "diagnostics.compare": (lambda fits, **o: diagnostics.compare(fits, **o), {"fits": None, "num_samples": 100}),
    "diagnostics.corrected_posterior": (
        lambda y, **o: diagnostics.corrected_posterior(model, guide(), y, **o),
        {"y": Y, "method": "resample", "num_samples": 100, "num_proposals": None, "proposal_df": None},
    ),
    "diagnostics.diagnose": (
        lambda y, **o: diagnostics.diagnose(model, guide(), y, **o),
        {"y": Y, "num_samples": 100, "num_sets": 1, "num_starts": 0},
    ),
    "diagnostics.local_evidence": (
        lambda y, **o: diagnostics.local_evidence(local_model, local_guide, y, **o),
        {"y": Y, "num_samples": 10, "chunk_size": 5},
    ),
    "diagnostics.loo": (diagnostics.loo, {"data": None, "var_name": "y"}),
    "diagnostics.to_arviz": (
        lambda y, **o: diagnostics.to_arviz(model, guide(), y, **o),
        {"y": Y, "num_samples": 100, "num_prior_samples": 0, "result": None},
    ),
    "diagnostics.plot_coverage": (diagnostics.plot_coverage, {"calibration": None}),
    "diagnostics.plot_elbo": (diagnostics.plot_elbo, {"result": None}),
    "diagnostics.plot_flow": (diagnostics.plot_flow, {"guide": None, "num_samples": 50}),
    "diagnostics.plot_pairs": (diagnostics.plot_pairs, {"draws": {"a": {"z": torch.randn(50)}}, "var_names": None}),
    "diagnostics.plot_weights": (diagnostics.plot_weights, {"data": None}),
    "inference.FlowSVI": (
        partial(inference.FlowSVI, model, guides.AutoFlow(model)),
        {
            "objective": None,
            "num_particles": 4,
            "learning_rate": 0.1,
            "weight_decay": 0.0,
            "max_steps": 10,
            "eval_every": 5,
            "eval_particles": 10,
            "clip_norm": 10.0,
            "num_starts": 0,
            "compile": False,
            "checkpoint": None,
            "callbacks": (),
            "plan": None,
            "seed": 0,
            "progress": False,
        },
    ),
    "inference.staged.Plan": (staged.Plan, {"stages": (staged.Normal(),), "finish": (staged.Tails(),)}),
    "inference.FlowSVI.run": (run, {"y": Y}),
    "guides.AutoFlow": (
        lambda model, **o: guides.AutoFlow(model, **o)(Y),
        {"model": model, "flow": "iaf", "base": "normal", "init_scale": 0.1},
    ),
    "guides.AutoFlow.sample_posterior": (lambda **o: guide().sample_posterior(**o, y=Y), {"num_samples": 3}),
    "guides.AutoFlow.quantiles": (lambda **o: guide().quantiles(**o, y=Y), {"quantiles": [0.5]}),
    "guides.AutoFlow.log_prob": (lambda **o: guide().log_prob(**o, y=Y), {"latents": {"mu": torch.zeros(2)}}),
    "guides.AutoFlow.warm_start": (lambda **o: guide().warm_start(Y, **o), {"num_starts": 1}),
    "guides.AmortizedFlow": (
        lambda model, **o: guides.AmortizedFlow(model, **o)(Y[:, None]),
        {"model": None, "encoder": nn.Linear(1, 2), "flow": None, "affine": "last", "create_plates": None},
    ),
    "guides.StructuredFlow": (
        lambda **o: guides.StructuredFlow(both_model, **o)(Y[:, None]),
        {"encoders": {"unit": nn.Linear(1, 2)}, "flow": "iaf"},
    ),
    "guides.MixtureBase": (guides.MixtureBase, {"dim": 2, "num_components": 2}),
    "models.DLGM": (models.DLGM, {"data_dim": 3, "latent_dims": [2], "hidden_dims": [4], "likelihood": None}),
    "models.VAE": (models.VAE, {"data_dim": 3, "latent_dim": 2, "decoder": nn.Linear(2, 3), "likelihood": None}),
    "models.HIVAE": (models.HIVAE, {"table": None, "latent_dim": 2, "num_components": 2, "y_dim": 2}),
    "models.TableEncoder": (models.TableEncoder, {"table": None, "hidden_dims": (4,), "out_features": 3}),
    "models.CategoricalLikelihood": (models.CategoricalLikelihood, {"num_classes": 3}),
    "models.LogisticMixtureLikelihood": (models.LogisticMixtureLikelihood, {"num_components": 2, "num_levels": 16}),
    "models.Resampled": (models.Resampled, {"source": torch.zeros(3, 2), "draw": models.binarize}),
    "models.binarize": (models.binarize, {"levels": torch.rand(3)}),
    "models.dequantize": (models.dequantize, {"levels": torch.rand(3)}),
    "models.benchmarks.images.load_mnist": (images.load_mnist, {"folder": "/no/such/folder"}),
    "models.benchmarks.images.load_static_mnist": (images.load_static_mnist, {"folder": "/no/such/folder"}),
    "models.benchmarks.images.load_omniglot": (images.load_omniglot, {"folder": "/no/such/folder"}),
    "models.benchmarks.images.load_frey_faces": (images.load_frey_faces, {"folder": "/no/such/folder"}),
    "models.benchmarks.images.load_caltech_silhouettes": (
        images.load_caltech_silhouettes,
        {"folder": "/no/such/folder"},
    ),
    "models.eight_schools.grid_posterior": (
        models.eight_schools.grid_posterior,
        {"sigma": torch.ones(2), "y": torch.zeros(2), "num_mu": 10, "num_log_tau": 10},
    ),
    "models.posteriordb.load": (posteriordb.load, {"name": "arK-arK", "folder": "/no/such/folder"}),
    "models.hard_posteriors.load": (hard_posteriors.load, {"name": "funnel"}),
    "models.energies.energy_grid": (energies.energy_grid, {"potential": energies.u1, "num_points": 10}),
    "models.tables.load": (tables.load, {"name": "Wine", "percent_missing": 10}),
    "models.tables.make": (tables.make, {"columns": [tables.Column("a", "real")], "values": torch.zeros(3, 1)}),
    "models.imputation.impute_by_column": (imputation.impute_by_column, {"table": None}),
    "testing.check_flow": (testing.check_flow, {"flow": None, "event_shape": (2,), "identity": True}),
}
_LIKE_PLANAR = ["ActNorm", "CircularConvolution", "SymmetricConvolution", "Diagonal", "ElementwiseAffine", "Planar"]
_LIKE_PLANAR += ["LowerTriangularAffine", "PReLU", "Radial", "SLog"]
CALLS |= {f"flows.{name}": (built(getattr(flows, name)), {"dim": 3, "context_dim": 0}) for name in _LIKE_PLANAR}
# Arguments that are the user's own code, or what it works on: what it raises stays, but for data that we know better.
USERS = {"y", "model", "create_plates", "callbacks"}
OURS = {"NaN", "infinite"}
# Values that are right, though they are not of the kind of the right one.
ALSO_RIGHT = {("callbacks", "dict"), ("callbacks", "empty"), ("quantiles", "zero"), ("draws", "dict"), ("y", "zero")}
# Values that are made when they are needed.
LATE = {
    ("diagnostics.compare", "fits"): lambda: {"a": fit()},
    ("diagnostics.loo", "data"): data,
    ("diagnostics.plot_weights", "data"): data,
    ("diagnostics.plot_elbo", "result"): fit,
    ("diagnostics.plot_flow", "guide"): guide,
    ("guides.AmortizedFlow", "model"): lambda: lambda y: local_model(y[:, 0]),
    ("models.HIVAE", "table"): table,
    ("models.TableEncoder", "table"): table,
    ("models.imputation.impute_by_column", "table"): table,
    ("testing.check_flow", "flow"): lambda: flows.Planar(2),
}
# Public names that take nothing from users, or are results.
NO_CALLS = {
    "flows": {"Additive", "Transformer", "stacks", "unpaced"},
    "networks": {"Switch"},
    "diagnostics": {"Calibration", "CorrectedPosterior", "Diagnosis", "LocalEvidence", "Verdict"},
    "inference": {"Evaluation", "FitResult", "Status"},
    "inference.staged": {
        *("DEFAULT", "Approximation", "Fitted", "Problem", "Stage", "StepPlan"),
        *("Normal", "TransportMap", "Steps", "Tails"),
    },
    "guides": set(),
    "models": {
        *("BernoulliLikelihood", "NormalLikelihood", "Likelihood", "Digits", "Images", "load_digits"),
        *("discrete", "eight_schools", "energies", "fertility", "hard_posteriors", "imputation", "motorcycle"),
        *("posteriordb", "tables"),
    },
    "testing": {"FlowError", "FlowReport"},
}


@pytest.mark.parametrize("room", NO_CALLS)
def test_every_public_name_is_tried(room):
    module = importlib.import_module(f"pyro_nf.{room}")
    public = getattr(module, "__all__", None) or [
        name for name in vars(module) if inspect.isclass(getattr(module, name)) and name.endswith("ELBO")
    ]
    tried = {name.removeprefix(f"{room}.").split(".")[0] for name in CALLS if name.startswith(f"{room}.")}
    assert set(public) - tried - NO_CALLS[room] == set()


CASES = [(call, argument, bad) for call, (_, right) in CALLS.items() for argument in right for bad in BAD]


@settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(case=st.sampled_from(CASES))
@pytest.mark.filterwarnings("ignore")
def test_bad_inputs_are_refused_in_a_sentence_or_right(case):
    assert trouble(*case) == ""


def trouble(call: str, argument: str, bad: str) -> str:
    """What is wrong with how a bad input was met; nothing if it was refused as it should be, or is right."""
    function, right = CALLS[call]
    arguments = {name: LATE.get((call, name), lambda v=value: v)() for name, value in right.items()}
    value = BAD[bad]
    arguments[argument] = value
    pyro.clear_param_store()
    try:
        function(**arguments)
    except Exception as error:
        place = error.__traceback__
        while place.tb_next is not None:
            place = place.tb_next
        source = pathlib.Path(place.tb_frame.f_code.co_filename).resolve()
        ours = (
            any(part in ("pyro_nf", "guides", "models") for part in source.parts)
            and "site-packages" not in (source.parts[-4:])
        )
        if argument in USERS and bad not in OURS and (not ours or isinstance(error, (RuntimeError, ValueError))):
            return ""  # what the user's own code says of it
        if not ours or not isinstance(error, (ValueError, ImportError, ConnectionError)):
            return f"{type(error).__name__} from {source.name}: {error}"
        if argument not in str(error) and not _names_data(argument, str(error)):
            return f"the sentence does not name {argument!r}: {error}"
        return ""
    finally:
        pyro.clear_param_store()
    if (argument, bad) in ALSO_RIGHT or argument in USERS:
        return ""
    return "" if _may_be(value, _annotation(function, argument), right[argument]) else f"{bad} was taken for {argument}"


def _names_data(argument: str, sentence: str) -> bool:
    """Data are named by their site, or as the model's arguments."""
    return argument == "y" and any(word in sentence for word in ("site 'y'", "argument", "data"))


def _annotation(function: Any, argument: str) -> Any:
    try:
        parameter = inspect.signature(function).parameters.get(argument)
    except (TypeError, ValueError):
        return Any
    found = Any if parameter is None or parameter.annotation is inspect.Parameter.empty else parameter.annotation
    return Any if isinstance(found, str) else found


def _may_be(value: Any, hint: Any, right: Any) -> bool:
    """Whether a value may be meant: it is what the annotation says or, without one, of the right value's kind."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_may_be(value, part, right) for part in get_args(hint))
    if origin is Annotated:
        return _may_be(value, get_args(hint)[0], right)
    if hint is Any:
        return value is None or right is None or isinstance(value, type(right)) or callable(value)
    if hint in (int, float):
        return (
            isinstance(value, (int, float)) and not isinstance(value, bool) and (hint is float or value == int(value))
        )
    if origin is Literal:
        return value in get_args(hint)
    if origin is collections.abc.Callable:
        return callable(value)
    if hint in (None, type(None)):
        return value is None
    return isinstance(value, origin or hint)
