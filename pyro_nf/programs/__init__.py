"""A Pyro model and its guide as functions of tensors, run for many draws at once."""
