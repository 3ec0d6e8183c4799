"""The whole way on the classic funnel, against the exact evidence."""

import pyro
import pytest
from pyro.infer.autoguide import AutoNormal

from pyro_nf.diagnostics import Verdict, diagnose
from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI
from pyro_nf.models import eight_schools

DATA = eight_schools.data()
LOG_EVIDENCE = eight_schools.grid_posterior(*DATA).log_evidence


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3, 4))])
def test_the_flow_is_right(seed):
    pyro.set_rng_seed(seed)
    guide = AutoFlow(eight_schools.centered, base="student_t")
    FlowSVI(eight_schools.centered, guide, seed=seed, progress=False).run(*DATA)
    found = diagnose(eight_schools.centered, guide, *DATA)
    # By the exact density the guides' sds of log tau are 2 to 10% too small.
    assert found.verdict is not Verdict.NOT_RIGHT
    assert found.khat < 0.7
    assert found.elbo == pytest.approx(LOG_EVIDENCE, abs=0.03)
    assert found.log_evidence == pytest.approx(LOG_EVIDENCE, abs=0.05)


def test_the_mean_field_guide_is_wrong_and_is_said_to_be():
    guide = AutoNormal(eight_schools.centered)
    FlowSVI(eight_schools.centered, guide, seed=0, progress=False, max_steps=3000).run(*DATA)
    found = diagnose(eight_schools.centered, guide, *DATA)
    assert not found.reliable
    assert found.elbo < LOG_EVIDENCE - 1
