"""Triton kernels, one file per op; installed as ``lddyn.kernels`` and used by ``lddyn.ops`` only."""
