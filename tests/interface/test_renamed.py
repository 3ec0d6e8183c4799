"""Old public names work for one release, with a warning that says what to write instead."""

import warnings

import pytest

from pyro_nf import diagnostics, flows, inference, models, objectives
from pyro_nf.diagnostics.weights import WeightSummary
from pyro_nf.inference import elbo
from pyro_nf.models import benchmarks


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        (flows, "Triangular", flows.QuadraticTriangularMap),
        (flows, "initialize", flows.initialize_actnorm),
        (flows, "set_statistics", flows.set_batchnorm_statistics),
        (elbo, "WarmUpELBO", inference.KLAnnealedELBO),
        (objectives, "ELBO", inference.ELBO),
        (objectives, "IWELBO", inference.IWELBO),
        (objectives, "WarmUpELBO", inference.KLAnnealedELBO),
        (models, "posteriordb", benchmarks.posteriordb),
        (models, "load_mnist", benchmarks.images.load_mnist),
    ],
)
def test_old_names_are_the_new_ones(module, old, new):
    with pytest.warns(DeprecationWarning, match=f"{old} is now .*; the old name goes with the next release"):
        assert getattr(module, old) is new


@pytest.mark.parametrize(("kind", "old"), [(diagnostics.Diagnosis, "left_out"), (WeightSummary, "outside")])
def test_old_attributes_are_the_new_ones(kind, old):
    new = {"left_out": "missed_mass", "outside": "frac_zero_density"}[old]
    found = object.__new__(kind)
    object.__setattr__(found, new, 0.25)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new}"):
        assert getattr(found, old) == 0.25


def test_an_old_keyword_is_the_new_one():
    with pytest.warns(DeprecationWarning, match="bends= is now quadratic=; the old name goes with the next release"):
        assert not flows.QuadraticTriangularMap(3, bends=False).quadratic
    with pytest.raises(ValueError, match="bends is the old name of quadratic; got both: pass quadratic alone"):
        flows.QuadraticTriangularMap(3, bends=False, quadratic=True)


def test_the_warning_points_to_the_users_line():
    with pytest.warns(DeprecationWarning, match="Triangular is now") as found:
        _ = flows.Triangular
    with pytest.warns(DeprecationWarning, match="bends= is now") as also_found:
        flows.QuadraticTriangularMap(2, bends=True)
    assert {warning.filename for warning in [*found, *also_found]} == {__file__}


def test_python_shows_one_warning_for_a_line():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        exec(compile("from pyro_nf.models import posteriordb", "script.py", "exec"), {"__name__": "script"})
    assert len(found) == 1


def test_a_name_that_never_was_is_no_attribute():
    with pytest.raises(AttributeError, match=r"module 'pyro_nf\.flows' has no attribute 'Triangle'"):
        flows.Triangle  # noqa: B018
