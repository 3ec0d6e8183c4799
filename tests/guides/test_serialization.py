"""Guides saved and loaded: state dicts, pickles, copies, the parameter store."""

import copy
import io
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.poutine import block

from pyro_nf.flows import stacks
from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI

Y = torch.tensor([1.0, -1.0, 2.0])


def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
    with pyro.plate("rows", 3):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def fitted(flow="auto", base="normal"):
    guide = AutoFlow(model, flow, base=base)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(3):
        svi.step(Y)
    return guide


def through_a_file(thing, **options):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, **options)


def assert_same_draws(first, second):
    second(Y)  # sets up a guide that has not been called
    draws = []
    for guide in (first, second):
        pyro.set_rng_seed(1)
        draws.append(guide.sample_posterior(4, Y))
    assert all(torch.equal(draws[0][name], draws[1][name]) for name in draws[0])


@pytest.mark.parametrize("base", ["normal", "student_t"])
@pytest.mark.parametrize("name", stacks.names())
def test_a_state_dict_gives_a_fresh_guide_the_same_draws(name, base):
    guide = fitted(name, base)
    state = through_a_file(guide.state_dict(), weights_only=True)
    fresh = AutoFlow(model, name, base=base)
    fresh.load_state_dict(state)  # before its first call
    assert_same_draws(guide, fresh)
    used = fitted(name, base)
    used.load_state_dict(state)
    assert_same_draws(guide, used)


def test_a_state_dict_in_an_auto_guide_list():
    def build():
        guide = AutoGuideList(model)
        guide.append(AutoFlow(block(model, expose=["mu", "tau"])))
        guide.append(AutoNormal(block(model, expose=["theta"])))
        return guide

    guide = build()
    guide(Y)
    # Units are those of the flow that loads.
    of_flow = {name: value for name, value in guide.state_dict().items() if name.startswith("0.")}
    state = {name: value for name, value in of_flow.items() if not name.endswith("units")}
    with torch.no_grad():
        for value in filter(torch.is_floating_point, state.values()):
            value.add_(0.1)
    fresh = build()
    fresh.load_state_dict({**of_flow, **state})
    fresh(Y)
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in state.items())


def test_the_state_of_another_flow_is_refused_at_the_first_call():
    fresh = AutoFlow(model, "planar")
    fresh.load_state_dict(fitted("iaf").state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh(Y)


@pytest.mark.parametrize(
    "how",
    [copy.deepcopy, lambda guide: pickle.loads(pickle.dumps(guide)), lambda g: through_a_file(g, weights_only=False)],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_of_a_fitted_guide_is_whole_and_learns_on_its_own(how):
    guide = fitted()
    before = copy.deepcopy(guide.state_dict())
    twin = how(guide)
    assert_same_draws(guide, twin)
    svi = SVI(model, twin, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(2):
        svi.step(Y)
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())
    assert any(not torch.equal(value, before[name]) for name, value in twin.state_dict().items())
    assert guide.model is not None
    guide(Y)


def test_a_copy_of_a_guide_that_was_not_called_has_its_model():
    twin = copy.deepcopy(AutoFlow(model))
    assert set(twin(Y)) == {"mu", "tau", "theta"}
    FlowSVI(model, twin, max_steps=2, learning_rate=0.01, progress=False, compile=False).run(Y)


def test_a_pickle_from_before_the_first_call_says_that_it_is_useless():
    with pytest.raises(RuntimeError, match="AutoFlow was pickled before its first call"):
        pickle.loads(pickle.dumps(AutoFlow(model)))(Y)


def test_the_parameter_store_gives_a_fresh_guide_the_same_draws(tmp_path):
    guide = fitted()
    pyro.get_param_store().save(tmp_path / "store.pt")
    before = set(pyro.get_param_store().keys())
    fresh = AutoFlow(model)
    # What the guide of a new process is called.
    fresh._pyro_set_supermodule(guide._pyro_name, fresh._pyro_context)
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store.pt")
    assert_same_draws(guide, fresh)
    svi = SVI(model, fresh, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    loaded = copy.deepcopy(fresh.state_dict())
    svi.step(Y)
    assert set(pyro.get_param_store().keys()) == before
    assert any(not torch.equal(value, loaded[name]) for name, value in fresh.state_dict().items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_guide_draws_the_same():
    guide = fitted()
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace_module(guide, {"call": (Y,)}, check_trace=False), file)
    file.seek(0)
    traced = torch.jit.load(file)
    draws = []
    for each in (guide, traced):
        pyro.set_rng_seed(1)
        draws.append(each.call(Y))
    assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True))


@pytest.mark.gpu
def test_a_guide_moves_between_devices():
    guide = fitted()
    state = through_a_file(guide.state_dict(), weights_only=True, map_location="cuda")
    y = Y.cuda()
    with torch.device("cuda"):
        other = AutoFlow(model)
        other(y)
    other.load_state_dict(state)
    back = AutoFlow(model)
    back.load_state_dict({name: value.cpu() for name, value in other.state_dict().items()})
    assert_same_draws(guide, back)
    pickled = through_a_file(guide, weights_only=False, map_location="cuda")
    assert pickled.sample_posterior(2, y)["mu"].is_cuda
