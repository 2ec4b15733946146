"""Networks whose whole training steps are timed on a GPU, and small ones of the same make, for a CPU."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse_moon as sm
from sparse_moon.app import models
from sparse_moon.topology import block_grid, block_shape, blocks_of, matrix_shape


class _Attention(nn.Module):
    """Causal attention of ``heads`` heads, queries, keys and values from one layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, width))


class _Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = _Attention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """GPT-2 (Radford et al. 2019) without dropout and with a head of its own: tokens (B, T) to logits (B * T, O).

    Transformers' has its weights in a ``Conv1D``, which is no layer that :func:`sparse_moon.sparsify` takes.
    """

    def __init__(self, outputs: int, width: int, heads: int, depth: int, length: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(outputs, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(x))).flatten(0, 1)


def whole_blocks(shape: Sequence[int], density: float, block: tuple[int, int]) -> tuple[int, int]:
    """How many blocks a weight keeps, and how many it has; 0 and 0 where they do not divide it, and never 1 kept but 0.

    By uniform rounding small layers keep one or none: of ResNet-50 in blocks of 64 at 90 % seven have none, and nothing
    comes through.
    """
    if shape[0] % block[0] or shape[1] % block[1]:
        return 0, 0
    grid = block_grid(matrix_shape(tuple(shape)), block)
    kept = blocks_of(density, grid)
    return (kept if kept >= 2 else 0), math.prod(grid)


def has_blocks(layer: nn.Module, sparsity: float, pattern: str) -> bool:
    """Whether the pattern divides a dense layer and leaves it at least two blocks."""
    return whole_blocks(layer.weight.shape, 1 - sparsity, block_shape(pattern))[0] > 0


@dataclass(frozen=True)
class GpuNetwork:
    """A network with its training batch.

    Attributes:
        make: from the number of outputs and of blocks (of a transformer; else None) to the network.
        shape: of a training batch: images (B, C, H, W), or tokens (B, T).
        classes: that targets come from; ``dense_outputs``: of the dense network, in which a vocabulary is padded.
        keep_dense: names of layers that stay dense: what sees the images, and the classifier.
        depth: blocks of what is timed, ``whole_depth``: of the network that it is a part of; None where it is whole.
        steps_per_epoch: batches from one averaging of the weights to the next.
    """

    name: str
    make: Callable[[int, int], nn.Module]
    shape: tuple[int, ...]
    classes: int
    dense_outputs: int
    keep_dense: tuple[str, ...]
    depth: int = 0
    whole_depth: int | None = None
    steps_per_epoch: int = 10_000
    adam: bool = True

    @property
    def is_convolutional(self) -> bool:
        return not self.adam

    def build(self, outputs: int, device: torch.device, depth: int | None = None) -> nn.Module:
        """A new network with ``outputs`` outputs, in the layout that suits it."""
        torch.manual_seed(0)
        with torch.device(device):
            model = self.make(outputs, self.depth if depth is None else depth)
        layout = torch.channels_last if self.is_convolutional else torch.contiguous_format
        return model.to(device, memory_format=layout)

    def sparsify(self, model: nn.Module, sparsity: float, pattern: str) -> None:
        """Make all layers equally sparse, in place, but those of ``keep_dense`` and those of too few blocks.

        Raises:
            ValueError: nothing depends on the images or tokens any more: another network than the one that is meant.
        """

        def stays_dense(name: str, layer: nn.Module) -> bool:
            return name in self.keep_dense or not has_blocks(layer, sparsity, pattern)

        outside = [stays_dense, nn.Embedding]
        sm.sparsify(model, sparsity, "uniform", pattern=pattern, exclude=outside, first_dense=False)
        with torch.no_grad():
            one, other = model(self.batch(next(model.parameters()).device)[0][:2]).chunk(2)
        if torch.equal(one, other):
            raise ValueError(f"of {self.name} with {pattern} at {sparsity} all outputs are the same whatever comes in")

    def layers(self) -> list[tuple[str, nn.Module, torch.Size]]:
        """Name, layer without memory, and shape of its input, of all but ``keep_dense``; of one transformer block."""
        return [found for found in self._modules(nn.Linear, nn.Conv2d) if found[0] not in self.keep_dense]

    def norms(self) -> list[torch.Size]:
        """Shapes of the inputs of batch norms."""
        return [shape for _, _, shape in self._modules(nn.BatchNorm2d)]

    def _modules(self, *kinds: type[nn.Module]) -> list[tuple[str, nn.Module, torch.Size]]:
        """Name, module without memory, and shape of its input, in the order of a forward pass."""
        found: list[tuple[str, nn.Module, torch.Size]] = []
        meta = torch.device("meta")

        def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.append((name, module, inputs[0].shape))

        model = self.build(self.dense_outputs, meta, min(self.depth, 1))
        for name, module in model.named_modules():
            if isinstance(module, kinds):
                module.register_forward_pre_hook(partial(note, name))
        model(self.batch(meta)[0])
        return found

    def batch(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Random inputs and targets."""
        if len(self.shape) == 2:
            tokens = torch.randint(self.classes, self.shape, device=device)
            return tokens, tokens.roll(-1, 1).flatten()
        images = torch.randn(self.shape, device=device)
        if self.is_convolutional:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, torch.randint(self.classes, self.shape[:1], device=device)


def _vit(name: str, batch: int) -> GpuNetwork:
    def make(outputs: int, depth: int) -> nn.Module:
        import timm  # not everyone who imports this file has it

        return timm.create_model(name, num_classes=outputs, depth=depth)

    shape = (batch, 3, 224, 224)
    return GpuNetwork(name.split("_patch")[0], make, shape, 1000, 1000, ("patch_embed.proj", "head"), 12)


def _gpt2(name: str, width: int, heads: int, whole_depth: int) -> GpuNetwork:
    def make(outputs: int, depth: int) -> nn.Module:
        return GPT2(outputs, width, heads, depth, 1024)

    # a vocabulary of 50257, padded to a multiple of 128; of the padding MOON takes one as its unknown output
    return GpuNetwork(name, make, (8, 1024), 50303, 50304, ("head", "tokens", "places"), 2, whole_depth)


def _resnet(name: str, batch: int, size: int, classes: int, steps: int) -> GpuNetwork:
    def make(outputs: int, _: int) -> nn.Module:
        return models.build(name, outputs, in_channels=3, image_size=size)

    shape = (batch, 3, size, size)
    return GpuNetwork(
        f"{name}_{size}", make, shape, classes, classes, ("conv1", "fc"), steps_per_epoch=steps, adam=False
    )


NETWORKS = [
    _vit("vit_base_patch16_224", 128),
    _gpt2("gpt2_1.3b", 2048, 16, 24),
    _resnet("resnet50", 128, 224, 1000, 10_000),
    _resnet("resnet18", 128, 32, 10, 390),
    _gpt2("gpt2_350m", 1024, 16, 24),
    _vit("vit_small_patch16_224", 256),
]  # by their value: a run that is cut short has the first


def tiny() -> list[GpuNetwork]:
    """Networks of the same make that a CPU trains in a second, under the same names."""

    def vit(outputs: int, depth: int) -> nn.Module:
        import timm

        return timm.models.VisionTransformer(
            img_size=32, patch_size=16, embed_dim=128, depth=depth, num_heads=2, num_classes=outputs
        )

    def gpt2(outputs: int, depth: int) -> nn.Module:
        return GPT2(outputs, 128, 2, depth, 16)

    def resnet(name: str) -> Callable[[int, int], nn.Module]:
        return lambda outputs, _: models.build(name, outputs, in_channels=3, image_size=32, width=32)

    found = []
    for network in NETWORKS:
        if network.name.startswith("vit"):
            small = replace(network, make=vit, shape=(4, 3, 32, 32), depth=2)
        elif network.name.startswith("gpt2"):
            small = replace(network, make=gpt2, shape=(2, 16), classes=127, dense_outputs=128)
        else:
            small = replace(network, make=resnet(network.name.split("_")[0]), shape=(4, 3, 16, 16))
        found.append(small)
    return found
