"""Triton kernels. They import torch and triton only.

An operator has a file of its own: what it computes, its launches, and the ``variants`` that the compile gate compiles;
what the GPU runs of a large one is beside it, in ``_kernels``.
"""
