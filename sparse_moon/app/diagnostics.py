"""What the papers' theory speaks of, measured after every epoch: ``--diagnostics``."""

from collections.abc import Mapping
from itertools import islice
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor

from sparse_moon.app import datasets
from sparse_moon.app.build import Run, autocast
from sparse_moon.app.run_data import plain_batches
from sparse_moon.nn.exploration import Exploration
from sparse_moon.ood import DICE, Energy, Outputs, collect, fit_detectors
from sparse_moon.ood.metrics import class_probabilities
from sparse_moon.ood.outputs import features_of
from sparse_moon.ood.regions import REGIONS, local_gaps
from sparse_moon.random_mask import RandomMask


class Diagnostics:
    """Measures a run's network as it trains, in passes over the test, OOD and training images that change nothing.

    Args:
        run: at its start.
        ood_sets: by name.

    Raises:
        ValueError: a network without features, of which the regions are made, or too few test images for them, or test
            images of one class.
    """

    def __init__(self, run: Run, ood_sets: Mapping[str, datasets.Images]) -> None:
        self.run, self.ood_sets = run, ood_sets
        self.exploration = Exploration(run.model) if run.config.method_class.sparse else None
        if len(run.data.test) < REGIONS:
            raise ValueError(f"diagnostics need {REGIONS} test images or more, got {len(run.data.test)}")
        if len(cast(Tensor, run.data.test.labels).unique()) < 2:
            raise ValueError("diagnostics need test images of two classes or more, got one")
        with autocast(run.config):
            features_of(collect(run.model, islice(plain_batches(run.data.test, run.data, run.config), 1)))

    def note_update(self) -> None:
        """After each update of the topology."""
        if self.exploration is not None:
            self.exploration.update()

    def figures(self) -> dict[str, float]:
        """Of the present network, for its row in ``metrics.jsonl``; what it does not have is not among them.

        ``id_confidence``, ``ood_confidence`` (mean over the sets), and of the tenth of the ID test images that are
        nearest to another class (:func:`sparse_moon.ood.regions.local_gaps`) ``hard_confidence`` and ``hard_gap``,
        their confidence minus accuracy; ``local_gap``, the mean of its absolute value over all tenths.
        ``dice_variance_id``, ``..._ood``, with ``_sparse`` after DICE (:meth:`sparse_moon.ood.DICE.output_variance`).
        ``exploration_rate`` (:class:`sparse_moon.nn.exploration.Exploration`), ``mask_correlation`` of the last random
        mask and the weights.
        """
        run, num_classes = self.run, self.run.data.num_classes
        known = self._outputs(run.data.test)
        ood = [self._outputs(images) for images in self.ood_sets.values()]
        confidence, _, gaps = local_gaps(known, num_classes)
        found = {
            "id_confidence": _confidence(known, num_classes),
            "hard_confidence": confidence[0].item(),
            "hard_gap": gaps[0].item(),
            "local_gap": gaps.abs().mean().item(),
        }
        if ood:
            found["ood_confidence"] = fmean(_confidence(outputs, num_classes) for outputs in ood)
        if known.head is not None and not known.head.cosine:
            found |= self._dice_variances(known, ood)
        if self.exploration is not None:
            found["exploration_rate"] = self.exploration.rate
        mask = run.reliability.mask
        if mask is not None and mask.step > 0:
            found["mask_correlation"] = mask_correlation(mask)
        return found

    def _outputs(self, images: datasets.Images) -> Outputs:
        with autocast(self.run.config):
            return collect(self.run.model, plain_batches(images, self.run.data, self.run.config))

    def _dice_variances(self, known: Outputs, ood: list[Outputs]) -> dict[str, float]:
        run = self.run
        dice = DICE(Energy(run.data.num_classes))
        with autocast(run.config):
            fit_detectors(run.model, [dice], plain_batches(run.data.train, run.data, run.config))
        dice.to("cpu")
        found = {}
        for name, sets in (("id", [known]), ("ood", ood)):
            if sets:
                both = [dice.output_variance(outputs) for outputs in sets]
                found[f"dice_variance_{name}"] = fmean(whole for whole, _ in both)
                found[f"dice_variance_{name}_sparse"] = fmean(sparse for _, sparse in both)
        return found

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"exploration": None if self.exploration is None else self.exploration.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        if self.exploration is not None:
            self.exploration.load_state_dict(state["exploration"])


def mask_correlation(mask: RandomMask) -> float:
    """Pearson's correlation of the last draw Z and the weights W, over all weights of the mask's layers.

    Z is drawn without looking at W, so it is 0 up to ``1 / sqrt(n)`` unless what Z hid has changed W since. 0 where one
    of both is constant.
    """
    drawn = torch.cat([mask.mask(stream, layer).flatten() for stream, layer in enumerate(mask.layers)]).double()
    weights = torch.cat([layer.values.detach().flatten() for layer in mask.layers]).double()
    drawn, weights = drawn - drawn.mean(), weights - weights.mean()
    width = drawn.norm() * weights.norm()
    return (drawn @ weights / width).item() if width > 0 else 0.0


def _confidence(outputs: Outputs, num_classes: int) -> float:
    return class_probabilities(outputs.logits, num_classes).amax(1).mean().item()
