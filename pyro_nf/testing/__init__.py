"""Testing: does a flow keep its contract? For ours, for yours, and for any torch or Pyro transform."""

from pyro_nf.testing.suite import FlowError, FlowReport, check_flow

__all__ = ["FlowError", "FlowReport", "check_flow"]
