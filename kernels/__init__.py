"""Triton kernels, a file an operator. They import torch and triton only."""
