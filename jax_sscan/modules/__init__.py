"""The mathematics of the Flax modules: options, parameter tables and pure functions of dicts of parameters.

`jax_sscan.nnx` and `jax_sscan.linen` are two thin faces of this package, which itself knows nothing of Flax. Parameters
have the same names and shapes under both, so that those of one fit the other.
"""
