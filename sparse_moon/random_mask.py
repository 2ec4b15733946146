"""Random masks on the weights during training: CigL's second mask (ICLR 2023), or plain weight dropout.

mask = RandomMask(model, keep=0.9)
for images, labels in loader:
    if method.updates_now:
        mask.clear()  # growth scores are those of the whole sparse network
    else:
        mask.draw()
    criterion(model(images), labels).backward()
    method.step()
    optimizer.zero_grad()
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparse_moon import ops
from sparse_moon.nn import SparseLayer
from sparse_moon.nn.inspect import tied_layers
from sparse_moon.sharding import is_sharded, part_of


class RandomMask:
    """``Z ~ Bernoulli(keep)`` on every weight of the sparse layers, drawn anew by each :meth:`draw`.

    While a mask is drawn, forward and backward see ``Z * values``; gradients of hidden weights are 0, but momentum and
    weight decay still move them: see :func:`sparse_moon.freeze_hidden`. ``values`` themselves stay whole, so topology
    updates rank all of them. Nothing is scaled by ``1 / keep``. Biases, norms and dense layers are never masked. ``Z``
    is a function of seed, layer and number of the draw (:func:`sparse_moon.ops.bernoulli_mask`), so all processes draw
    the same, and a resumed run goes on with the same.

    Args:
        model: with sparse layers.
        keep: keep probability p in (0, 1]; the paper's is 0.9.
        seed: of the masks.

    Attributes:
        step: 0-d int64 tensor, how many masks were drawn.
        drawn: whether a mask hides weights now.
        draws: how often this object has drawn, and one more for each draw that found gradients of a pass that hid
            nothing.

    Raises:
        ValueError: a keep probability outside its range, or a model without sparse layers.
    """

    def __init__(self, model: nn.Module, keep: float = 0.9, seed: int = 0) -> None:
        if not 0.0 < keep <= 1.0:
            raise ValueError(f"keep must be in (0, 1], got {keep}")
        self._tied = tied_layers(model)
        self.layers = list(self._tied)
        if not self.layers:
            raise ValueError("a random mask needs a model with sparse layers; call sparsify(model, ...) first")
        self.keep, self.seed = keep, seed
        self._step = torch.zeros((), dtype=torch.int64, device=self.layers[0].values.device)
        self.drawn, self.draws = False, 0

    @property
    def step(self) -> Tensor:
        return self._step

    @step.setter
    def step(self, number: Tensor | int) -> None:
        # in place, like every draw's: a captured step goes on reading this memory
        self._step.fill_(number)

    def draw(self) -> None:
        """Hide other weights from now on."""
        self._step += 1
        whole = not self.drawn and any(layer.values.grad is not None for layer in self.layers)
        self.draws += 1 + whole
        self.drawn = True
        for stream, layer in enumerate(self.layers):
            hide = _Hide(self.mask(stream, layer))
            for tied in self._tied[layer]:
                tied.hide = hide

    def clear(self) -> None:
        """Hide nothing from now on."""
        self.drawn = False
        for layers in self._tied.values():
            for layer in layers:
                layer.hide = None

    @contextmanager
    def restored(self) -> Iterator[None]:
        """After the block ``step`` is as before, and so is what is hidden."""
        step, drawn = self.step.clone(), self.drawn
        hidden = {layer: layer.hide for layers in self._tied.values() for layer in layers}
        try:
            yield
        finally:
            self.step, self.drawn = step, drawn
            for layer, hide in hidden.items():
                layer.hide = hide

    def mask(self, stream: int, layer: SparseLayer) -> Tensor:
        """The present draw's mask (shape of ``values``, bool) of layer number ``stream``."""
        like: Tensor = layer.values
        if is_sharded(like):  # of which the passes see the whole
            like = part_of(like).new_empty(like.shape)
        return ops.bernoulli_mask(like, self.keep, seed=self.seed, stream=stream, step=self.step)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"step": self.step.item()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.step = state["step"]


class _Hide:
    """Multiplication by a mask."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def __call__(self, values: Tensor) -> Tensor:
        return values * self.mask
