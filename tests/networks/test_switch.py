"""A flag that is saved with its module."""

import copy
import io
import pickle

import torch

from pyro_nf.networks import Switch


def switched(on=True):
    switch = Switch()
    switch.set(on)
    return switch


def test_it_is_off_until_it_is_turned_on():
    switch = Switch()
    assert not switch
    for on in (True, False, True):
        switch.set(on)
        assert bool(switch) is on
        assert bool(switch.state_dict()["on"]) is on


def test_it_is_saved_and_loaded_also_over_one_that_is_on():
    for on in (True, False):
        file = io.BytesIO()
        torch.save(switched(on).state_dict(), file)
        file.seek(0)
        state = torch.load(file)
        for before in (True, False):
            other = switched(before)
            other.load_state_dict(state)
            assert bool(other) is on


def test_it_is_loaded_as_a_part_of_a_module():
    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Sequential(Switch())

    one, other = Holder(), Holder()
    one.inner[0].set(True)
    other.load_state_dict(one.state_dict())
    assert other.inner[0]
    assert not Holder().inner[0]


def test_copies_are_of_their_own():
    switch = switched()
    for other in (copy.deepcopy(switch), pickle.loads(pickle.dumps(switch))):
        assert other
        other.set(False)
        assert not other
        assert switch
        assert bool(switch.on)


def test_it_keeps_through_a_change_of_dtype_and_is_no_parameter():
    switch = switched().double()
    assert switch
    assert bool(switch.on)
    assert not list(switch.parameters())
