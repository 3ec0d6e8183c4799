"""Functions of tensors recorded as graphs and compiled: every private or deprecated part of torch that is used.

Another release of torch may change these. So each is imported inside the function that needs it; where one is missing,
a `GraphError` says so, and whoever asked goes on without.
"""
