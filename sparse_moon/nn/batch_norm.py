"""New statistics for batch norm, where weights were written after training."""

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from sparse_moon.distributed import mean_over_processes_, world_size
from sparse_moon.nn.inspect import evaluation_mode


class _ChannelStatistics:
    """Mean and squared deviations of every channel, over all positions of all images (Chan et al. 1979)."""

    def __init__(self, like: Tensor) -> None:
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.count, self.passes = 0, 0
        self.mean, self.deviations = torch.zeros_like(like, dtype=dtype), torch.zeros_like(like, dtype=dtype)

    def add(self, input: Tensor) -> None:
        """Take in the input of a batch norm, (N, C, ...)."""
        count = input.numel() // input.shape[1]
        input, dims = input.to(self.mean.dtype), [dim for dim in range(input.dim()) if dim != 1]
        # in two passes: torch.var_mean takes 15 times as long on the CPU, more than the network's forward pass
        kept = input.mean(dims, keepdim=True)
        var, mean = (input - kept).square_().mean(dims), kept.flatten()
        total, shift = self.count + count, mean - self.mean
        self.mean += shift * (count / total)
        self.deviations += var * count + shift.square() * (self.count * count / total)
        self.count, self.passes = total, self.passes + 1

    def gather(self) -> None:
        """Those of all processes together, the same bits in each."""
        count = torch.tensor(float(self.count), dtype=torch.float64, device=self.mean.device)
        mean_over_processes_(count)
        share = self.count / count.clamp(min=1.0).to(self.mean.dtype)
        mean = self.mean * share
        mean_over_processes_(mean)
        self.deviations += self.count * (self.mean - mean).square()
        mean_over_processes_(self.deviations)
        self.mean, self.count = mean, round(count.item() * world_size())
        self.deviations *= world_size()


def refresh_batch_norm(model: nn.Module, batches: Iterable[Any], device: torch.device | str | None = None) -> None:
    """Re-estimate all batch-norm statistics by one pass over ``batches``: those of all images, each weighing the same.

    Mean and unbiased variance are over all positions of all images, whatever the sizes of the batches. In the pass
    every batch is normalised by its own statistics, as in training, and all else (dropout) does what it does in
    evaluation. So inputs of the first batch norm do not depend on the batches; those behind another one do, and batches
    as large as in training are best. An image that is alone in its batch joins the next batch, or the last one.

    Modes and momenta stay as they are, and statistics too if the pass fails. With several processes, each of which has
    its own batches, all get the statistics of all. A model without batch norm does not read ``batches``.

    Args:
        model: also compiled, or in ``DistributedDataParallel``.
        batches: images (N, ...), or tuples and lists that begin with them.
        device: where to move the images; by default that of the model's first parameter.

    Raises:
        ValueError: batches of another kind, no image at all, or a single value for each channel.
    """
    model = model.module if isinstance(model, DistributedDataParallel) else model
    norms = {module: name for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    found = {module: _ChannelStatistics(module.running_mean) for module in norms if module.running_mean is not None}
    if not found:
        return

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[cast(_BatchNorm, module)].add(args[0] if args else kwargs["input"])

    device = device or next(chain(model.parameters(), model.buffers())).device
    before = {module: [buffer.clone() for buffer in module.buffers(recurse=False)] for module in found}
    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in found]
    # hooks that a compiled model does not know would not run
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    try:
        with evaluation_mode(model), torch.no_grad(), eager:
            for module in norms:
                module.training = True
            for images in _no_image_alone(map(_images, batches)):
                model(images.to(device))
        with torch.no_grad():
            unused = [norms[module] for module, statistics in found.items() if not _write(module, statistics)]
        if len(unused) == len(found):
            raise ValueError("no image to estimate batch-norm statistics from: batches are empty, or were read before")
    except BaseException:
        for module, buffers in before.items():
            for buffer, value in zip(module.buffers(recurse=False), buffers, strict=True):
                buffer.copy_(value)
        raise
    finally:
        for handle in handles:
            handle.remove()
    if unused:
        warnings.warn(f"the model did not use these batch norms, their statistics stay: {unused}", stacklevel=2)


def _write(module: _BatchNorm, statistics: _ChannelStatistics) -> bool:
    """Whether there are statistics for the module."""
    if world_size() > 1:
        statistics.gather()
    if not statistics.count:
        return False
    if statistics.count == 1:
        raise ValueError("a single value for each channel has no variance; batch norm needs more images")
    assert module.running_mean is not None and module.running_var is not None
    module.running_mean.copy_(statistics.mean)
    module.running_var.copy_(statistics.deviations / (statistics.count - 1))
    if module.num_batches_tracked is not None:
        module.num_batches_tracked.fill_(statistics.passes)
    return True


def _images(batch: Any) -> Tensor:
    first = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(first, Tensor) or not first.dim():
        raise ValueError(
            "expected batches of images (N, ...), or tuples that begin with them, "
            f"got {type(batch).__name__}; for others pass images alone: (batch['image'] for batch in loader)"
        )
    return first


def _no_image_alone(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same images; one that is alone in its batch, as the rest of an epoch can be, in a batch with others.

    Batch norm cannot normalise a single value, and one image by itself badly.
    """
    held: Tensor | None = None  # given out when it is known not to be the last
    alone: Tensor | None = None
    for images in batches:
        if alone is not None:
            if alone.shape[1:] == images.shape[1:]:
                images = torch.cat([alone, images])
            else:
                yield alone
            alone = None
        if len(images) == 1:
            alone = images
        elif len(images):
            if held is not None:
                yield held
            held = images
    if held is not None and alone is not None and alone.shape[1:] == held.shape[1:]:
        held, alone = torch.cat([held, alone]), None
    for rest in (held, alone):
        if rest is not None:
            yield rest
