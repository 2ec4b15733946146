"""The dense weight gradient of a layer on an update batch, which growth is chosen by."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparse_moon.distributed import sum_over_processes
from sparse_moon.nn import SparseLayer
from sparse_moon.sharding import is_sharded, part_of


class DenseGradient:
    """What the backward passes of one batch leave of a layer's dense weight gradient.

    A backward pass counts as long as the gradient of ``values`` that came with it does: where that had been thrown away
    before (``zero_grad`` after a step that was skipped, after a generator's or an attack's pass through the network),
    what came before is thrown away here, too. So growth sees what the optimizer would see.

    Args:
        layers: all layers that share the weight. They get a probe, a leaf without memory of its own whose gradient is
            the dense gradient.
        reduce: what to keep of the gradient of a single pass, called as soon as it is there, so that only one layer's
            gradient exists at a time; a second pass that adds to the first is an error then. None keeps the sum.
    """

    def __init__(self, layers: Sequence[SparseLayer], reduce: Callable[[Tensor], object] | None = None) -> None:
        self.layers, self.reduce = layers, reduce
        self.values = layers[0].values
        self.total: Tensor | None = None
        self.reduced: object = None
        self._pass = -1  # number of the backward pass that was looked at last
        self._passes = 0
        self._synchronized = not is_sharded(self.values)  # whether values.grad has the gradients of all passes
        probe = part_of(self.values.detach()).new_zeros(()).expand(layers[0].topology.shape).detach().requires_grad_()
        for layer in layers:
            layer.probe = probe
        self._hooks = [
            self.values.register_post_accumulate_grad_hook(self._note_synchronized)
            if is_sharded(self.values)
            else self.values.register_hook(lambda _: self._look()),
            probe.register_post_accumulate_grad_hook(self._take),
        ]

    @property
    def there(self) -> bool:
        """Whether a backward pass has come by and has not been thrown away."""
        grad = self.values.grad
        return self._passes > 0 and grad is not None

    def close(self) -> None:
        """Take no more part in the layers' products."""
        for layer in self.layers:
            layer.probe = None
        for hook in self._hooks:
            hook.remove()

    def _look(self) -> None:
        """At the first sign of another backward pass, before it adds to anything."""
        number = torch._C._current_graph_task_id()
        if number == self._pass:
            return
        self._pass = number
        if self._synchronized and self._passes and self._thrown_away():
            self.total, self.reduced, self._passes = None, None, 0

    def _thrown_away(self) -> bool:
        grad = self.values.grad
        if grad is None or not is_sharded(grad):
            return grad is None or bool(grad.numel() and not grad.any())
        return not sum_over_processes(part_of(grad).any().float())

    def _note_synchronized(self, _: Tensor) -> None:
        """After FSDP2 has reduced the gradients, which it may leave until a later pass."""
        self._synchronized = True

    @torch.no_grad()
    def _take(self, probe: Tensor) -> None:
        self._look()
        grad, probe.grad = probe.grad, None
        assert grad is not None
        self._passes += 1
        self._synchronized = not is_sharded(self.values)
        if self.reduce is None:
            self.total = grad if self.total is None else self.total + grad
        elif self._passes > 1:
            raise RuntimeError(
                "a second backward pass adds to the gradients of an update batch: pass backwards_per_step to the "
                "training method where gradients are accumulated, or where a weight is in several segments of "
                "checkpoint(..., use_reentrant=True), each of which is a pass; call zero_grad after a pass that is not "
                "the step's"
            )
        else:
            self.reduced = self.reduce(grad)
