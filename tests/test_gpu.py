"""The same on a CUDA device: nothing falls back to the CPU."""

import pytest
import torch

from pyro_nf.diagnostics import diagnose, local_evidence
from pyro_nf.flows import stacks
from pyro_nf.guides import AmortizedFlow, AutoFlow
from pyro_nf.inference import FlowSVI
from pyro_nf.models import DLGM, eight_schools, load_digits
from pyro_nf.networks import MLP
from pyro_nf.testing import check_flow

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("name", stacks.names())
@pytest.mark.parametrize("context_dim", [0, 3])
def test_flows(name, context_dim):
    check_flow(stacks.make(name, 5, depth=2, context_dim=context_dim).cuda())


def test_eight_schools():
    data = eight_schools.data(device="cuda")
    guide = AutoFlow(eight_schools.centered, base="student_t")
    FlowSVI(eight_schools.centered, guide, seed=0, progress=False).run(*data)
    assert all(p.is_cuda for p in guide.parameters())
    found = diagnose(eight_schools.centered, guide, *data)
    assert found.khat < 0.7
    assert found.log_evidence == pytest.approx(-31.31, abs=0.05)


def test_digits():
    train, test = (images.cuda() for images in load_digits())
    model = DLGM(64, (8,), (50,)).cuda()
    guide = AmortizedFlow(model, MLP(64, (100,), 50).cuda(), "planar")
    svi = FlowSVI(model, guide, num_particles=4, learning_rate=3e-3, max_steps=500, seed=0, progress=False)
    result = svi.run(train, batch_size=100)
    assert result.elbo > result.evaluations[0].elbo
    assert local_evidence(model, guide, test, num_samples=50).elbo.is_cuda
