"""Triton kernels, one file per op; installed as lddyn.kernels, used by lddyn.ops alone."""
