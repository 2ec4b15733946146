#!/usr/bin/env python3
"""What whole steps on an H200 are expected to take, from what single layers took there: tables for predictions.md.

    python benchmarks/predict_steps.py

The model, in bytes and operations; its rates are fitted to benchmarks/results/cuda_layers_bf16.json, those marked e are
estimates. M rows (tokens or positions), I inputs, O outputs, taps, n blocks b x b:

- a block-sparse pass takes 2 M (I + O) / STREAM + 2 n M b (1 + b / 128) / L2: input and output once through memory,
  panels and blocks from the L2 for each tile of 128 rows. Gradients of 3x3 and strided convolutions get half of L2's
  rate, as measured; a 1x1 convolution of stride 1 runs as a linear layer. Where the dense product is faster, it runs;
- a dense pass takes 2 M I O taps / MATRIX, or its bytes at DENSE_STREAM if that is longer;
- what is neither: activations once for each time that an operation reads or writes them, counted in units of a layer's
  output, fused by a compiler or not, at STREAM; attention at ATTENTION; AdamW 28 bytes a weight, SGD 20, and 12 for
  casts to bf16 and back; 1.5 us for each kernel of a graph.
"""

import argparse
import math
from dataclasses import dataclass

import torch
from gpu_networks import NETWORKS, GpuNetwork, whole_blocks
from torch import nn

from sparse_moon.nn.batch_norm_relu import FEWEST_ON_A_GPU

STREAM, DENSE_STREAM = 3.3e12, 3.0e12
L2_LINEAR, L2_CONV, L2_CONV_GRAD = 12e12, 8.5e12, 4.3e12
NODE = 1.5e-6
ATTENTION = 250e12  # e
# Reads and writes of (M, D) by what stands between the products of a transformer block, forward and backward (e).
BLOCK_PASSES = {"compiled": 43.0, "eager": 66.0}
# The same where kernels of blocks do GELU and sum the gradients of biases (sparse_moon/ops/sparse_mlp): 8 of GELU's 20
# passes are left, and none of 9 for biases. A compiler has fused 4 of those with GELU's gradient, and does 4 itself.
OWN_BLOCK_PASSES = {"compiled": 30.0, "eager": 45.0}
# Of a convolution's output by batch norm, rectifier and sum, forward and backward: compiled and by torch's operators
# (e), and by our kernels 8, with a sum 11, as counted in kernels/batch_norm_relu.py; ResNet-50 has a sum behind 54 % of
# its convolutions' outputs.
NORM_PASSES = {"compiled": 10.0, "eager": 13.0}
OWN_NORM_PASSES = 9.6
KERNELS = {"compiled": 0.5, "eager": 1.0}  # of what stands between, relative to eager's 14 a layer


@dataclass
class Layer:
    """A product: sizes, and whether it is a convolution that reads neighbours."""

    m: int
    inputs: int
    outputs: int
    taps: int = 1
    gathers: bool = False
    m_in: int = 0

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs * self.taps

    @property
    def bytes_(self) -> float:
        return 2.0 * (self.m_in * self.inputs + self.m * self.outputs)

    def dense(self) -> float:
        """Of a pass."""
        matrix = 600e12 if min(self.inputs * self.taps, self.outputs) < 1024 else 750e12
        return max(2.0 * self.m * self.weights / matrix, self.bytes_ / DENSE_STREAM) + NODE

    def kept(self, block: int | None, density: float) -> float:
        """Density after rounding to whole blocks; 1 of a layer that stays dense, see ``gpu_networks.whole_blocks``."""
        if block is None:
            return density
        kept, blocks = whole_blocks((self.outputs, self.inputs, self.taps), density, (block, block))
        return kept / blocks if kept else 1.0

    def sparse(self, block: int, density: float) -> float:
        """Forward and both gradients, of a density that was rounded."""
        if density == 1.0:
            return 3 * self.dense()
        l2 = 2.0 * density * self.weights / block * self.m * (1 + block / 128)
        rates = (L2_CONV, L2_CONV_GRAD, L2_CONV_GRAD) if self.gathers else (L2_LINEAR,) * 3
        passes = [self.bytes_ / STREAM + l2 / rate + 2 * NODE for rate in rates]
        return sum(min(time, self.dense()) for time in passes)


def layers_of(network: GpuNetwork) -> list[Layer]:
    """Of all blocks of what is timed."""
    found = []
    for _, layer, shape in network.layers():
        if isinstance(layer, nn.Linear):
            m = math.prod(shape[:-1])
            found += [Layer(m, layer.in_features, layer.out_features, m_in=m)] * max(network.depth, 1)
        else:
            taps, stride = math.prod(layer.kernel_size), layer.stride[0]
            m_in = shape[0] * shape[2] * shape[3]
            m = shape[0] * math.prod((size - 1) // stride + 1 for size in shape[2:])
            found.append(Layer(m, layer.in_channels, layer.out_channels, taps, taps > 1 or stride > 1, m_in))
    return found


def others(network: GpuNetwork, layers: list[Layer], kind: str, weights: float, blocks: bool) -> float:
    """What is no sparse product, without the head, of a network with so many weights, of blocks or not."""
    time = weights * ((28 if network.adam else 20) + 12) / STREAM + 14 * KERNELS[kind] * len(layers) * NODE
    if network.is_convolutional:
        sizes = [layer.m * layer.outputs for layer in layers]
        own = OWN_NORM_PASSES if kind == "eager" else NORM_PASSES[kind]
        moved = [2.0 * size * (own if size >= FEWEST_ON_A_GPU else NORM_PASSES[kind]) for size in sizes]
        return time + sum(moved) / STREAM
    m, width = layers[0].m, layers[0].inputs
    tokens = m // network.shape[0]
    pairs = 0.5 if len(network.shape) == 2 else 1.0  # causal
    attention = 3.5 * 4.0 * m * tokens * width * pairs / ATTENTION
    passes = (OWN_BLOCK_PASSES if blocks else BLOCK_PASSES)[kind]
    return time + network.depth * (2.0 * m * width * passes / STREAM + attention)


def head(network: GpuNetwork) -> float:
    """The layers that stay dense and the loss."""
    with torch.device("meta"):
        model = network.make(network.dense_outputs, min(network.depth, 1))
    named = dict(model.named_modules())
    last = named[network.keep_dense[1 if len(network.shape) == 4 else 0]]
    weights = last.in_features * last.out_features
    if len(network.shape) == 4:
        stem = 3 * 150e-6 if network.shape[2] > 64 else 3 * 10e-6  # e: of 3 channels
        return stem + weights * 40 / STREAM + 20 * NODE
    m = math.prod(network.shape)
    logits = 3 * 2.0 * m * weights / 750e12 + m * last.out_features * (2 + 4 * 6 + 2) / STREAM
    return logits + (2 * weights + 1024 * last.in_features) * 40 / STREAM


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| network | dense compiled ms | sparsity | block32 | block64 | block128 | vector16 |")
    print("|---|---|---|---|---|---|---|")
    for network in NETWORKS:
        layers, rest = layers_of(network), head(network)
        weights = sum(layer.weights for layer in layers)
        products = 3 * sum(layer.dense() for layer in layers)
        dense_blocks = products + others(network, layers, "compiled", weights, blocks=False)
        for sparsity in (0.8, 0.9, 0.95):
            cells = []
            for block in (32, 64, 128, None):
                kept = [(layer, layer.kept(block, 1 - sparsity)) for layer in layers]
                own = products if block is None else sum(layer.sparse(block, density) for layer, density in kept)
                left = sum(layer.weights * density for layer, density in kept)
                if block is None:  # the dense product on a weight that is scattered three times
                    own += 3 * weights * 2 / STREAM
                texts = []
                for kind in ("eager", "compiled"):
                    step = own + others(network, layers, kind, left, block is not None)
                    text = f"{1e3 * (step + rest):.1f}, {(dense_blocks + rest) / (step + rest):.2f}x"
                    if network.whole_depth is not None:
                        times = network.whole_depth / network.depth
                        text += f" ({(times * dense_blocks + rest) / (times * step + rest):.2f}x)"
                    texts.append(text)
                cells.append(" / ".join(texts))
            name = f"{network.name}, batch {network.shape[0]}" if sparsity == 0.8 else ""
            dense = f"{1e3 * (dense_blocks + rest):.1f} ({1e3 * products:.1f} products)" if sparsity == 0.8 else ""
            print(f"| {name} | {dense} | {100 * sparsity:.0f} % | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
