"""The training loop that the command line runs."""

import math
import time
import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from sparse_moon import flops
from sparse_moon.app.build import autocast, build_run, captures_steps, check_dtypes, learning_rate, load_network
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.datasets import Images
from sparse_moon.app.diagnostics import Diagnostics
from sparse_moon.app.run_data import RunData, difference, identity, plain_batches
from sparse_moon.capture import CapturedStep
from sparse_moon.capture.step import say_not_captured
from sparse_moon.distributed import average_gradients_, world_size
from sparse_moon.nn import overall_sparsity, refresh_batch_norm
from sparse_moon.nn.movement import Movement
from sparse_moon.reliability import Reliability
from sparse_moon.step_clock import StepClock

_CHECK_EVERY = 20  # batches between looks at the loss: each look waits for the device


class Trainer:
    """A run, its loop over epochs and batches, and their common state.

    Args:
        config, dataset: its settings and data.
        ood_sets: OOD images by name, of which diagnostics are taken; nothing else looks at them.
    """

    def __init__(self, config: TrainConfig, dataset: RunData, ood_sets: Mapping[str, Images] | None = None) -> None:
        self.run = run = build_run(config, dataset)
        self.config, self.dataset, self.batches = config, dataset, run.batches
        self.identity = identity(dataset)
        self.model, self.optimizer = run.model, run.optimizer
        self.method, self.reliability = run.method, run.reliability
        self.total_steps = run.total_steps
        self.device = torch.device(config.device)
        self.start_flops = self._forward_flops()
        self.parallel = self._wrap()
        self.scaler = torch.amp.GradScaler(self.device.type) if config.amp == "float16" else None
        self.clock = StepClock(self.device)
        self.diagnostics = Diagnostics(run, ood_sets or {}) if config.diagnostics else None
        self.movement = Movement(self.model) if self.method.updates else None
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        self.lr = learning_rate(config, self.total_steps)
        self._lr = config.lr
        self._updated = False
        self.captured = self._capture() if captures_steps(config) else None

    def _wrap(self) -> nn.Module:
        # without buffers: those of the index are more than the gradients, and only rank 0's batch norms are ever read
        return DistributedDataParallel(self.model, broadcast_buffers=False) if world_size() > 1 else self.model

    def _capture(self) -> CapturedStep | None:
        """Steps as CUDA graphs, or a warning that says why not."""
        kind = type(self.reliability)
        reason = None
        if self.scaler is not None:
            reason = "the scale of float16's gradients is not captured, take bfloat16"
        elif (kind.before_batch, kind.loss_of) != (Reliability.before_batch, Reliability.loss_of):
            reason = f"reliability method {kind.name!r} may do something else in each batch"
        if reason is not None:
            say_not_captured(reason, stacklevel=4)
            return None
        return CapturedStep(self._draw_and_train, self.method, self.model, self.reliability.loss)

    def _forward_flops(self) -> float:
        costs = flops.layer_costs(self.model, self.dataset.train.shape)
        return sum(cost.forward_sparse for cost in costs)

    def learning_rate(self, step: int) -> float:
        """That of batch number ``step``."""
        return self.reliability.learning_rate(self.lr, step, len(self.batches))

    def run_epoch(self, bar: tqdm) -> None:
        """One pass over the training data, then the epoch's bookkeeping.

        Raises:
            ValueError: the loss is not finite.
        """
        started = time.perf_counter()
        self.parallel.train()
        totals = torch.zeros(3, device=self.device)  # loss x images, correct, images
        updates = 0
        for step, (images, labels) in enumerate(self.batches.epoch(self.epoch)):
            with self.clock.step():
                updates += self._step(images, labels, totals)
            if step % _CHECK_EVERY == 0 or step + 1 == len(self.batches):
                self._look(bar, totals)
            bar.update()
        loss, correct, count = totals.tolist()
        row: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "loss": loss / count,
            "train_accuracy": correct / count,
            "lr": self._lr,
            "density": 1.0 - overall_sparsity(self.model),
            "topology_updates": updates,
            **self.reliability.metrics(),
        }
        if (step_ms := self.clock.median_ms()) is not None:
            row["step_ms"] = step_ms
        if self.captured is not None:  # whether steps end as CUDA graphs
            row["captured"] = self.captured.reason is None and self.captured.captures > 0
        self.epoch += 1
        self.reliability.end_epoch(self.model, self.epoch)
        row["test_accuracy"] = self._test_accuracy()
        row["time_s"] = time.perf_counter() - started
        if self.movement is not None:
            row["moved"] = self.movement.look()
        if self.diagnostics is not None:
            row |= self.diagnostics.figures()
        self.history.append(row)

    def _step(self, images: Tensor, labels: Tensor, totals: Tensor) -> bool:
        self._lr, self._updated = self.learning_rate(self.method.steps), False
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self._lr)
            else:
                group["lr"] = self._lr
        if self.captured is None:
            self.reliability.before_batch(self.method.updates_now)
        images, targets = self.reliability.batch(images, labels)
        step = self._train if self.captured is None else self.captured
        loss, correct = cast(tuple[Tensor, Tensor], step(images, targets, labels))
        if self._updated and self.diagnostics is not None:
            self.diagnostics.note_update()
        if self._updated and world_size() > 1 and self.method.resizes:
            self.parallel = self._wrap()  # its buckets have the old sizes
        totals += torch.stack([loss.float() * len(labels), correct.sum(), correct.numel() * torch.ones_like(loss)])
        return self._updated

    def _draw_and_train(self, images: Tensor, targets: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        self.reliability.before_batch(self.method.updates_now)
        return self._train(images, targets, labels)

    def _train(self, images: Tensor, targets: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """A step; the loss, and whether the prediction of each image is right."""
        reliability = self.reliability
        with autocast(self.config):
            logits = self.parallel(images)
            loss = reliability.loss_of(logits, targets)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        average_gradients_(reliability.loss.parameters())  # which DistributedDataParallel does not know
        self._updated = self.method.step(self.scaler)
        self.optimizer.zero_grad()
        return loss.detach(), logits.detach()[:, : self.dataset.num_classes].argmax(1) == labels

    def _look(self, bar: tqdm, totals: Tensor) -> None:
        loss, correct, count = totals.tolist()
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} in epoch {self.epoch + 1}, batch {self.method.steps} of {self.total_steps}; "
                f"the last good epoch is in the checkpoint. Try a lower lr than {self.config.lr}"
            )
        shown = {"epoch": f"{self.epoch + 1}/{self.config.epochs}", "loss": f"{loss / count:.3f}",
                 "acc": f"{correct / count:.3f}", **self.reliability.progress()}  # fmt: skip
        bar.set_postfix(shown | {"density": f"{1.0 - overall_sparsity(self.model):.3f}"}, refresh=False)

    def _test_accuracy(self) -> float:
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.model.eval()
        with torch.no_grad(), autocast(self.config):
            for images, labels in plain_batches(self.dataset.test, self.dataset, self.config):
                correct += (self.model(images)[:, : self.dataset.num_classes].argmax(1) == labels).sum()
        return correct.item() / len(self.dataset.test)

    def finish(self) -> nn.Module:
        """Turn the model into what the run ends with, its batch norm refreshed where the weights are others now.

        That pass sees training images as an epoch after the last would: shuffled and augmented. Networks that are
        trained on crops have other statistics on whole images.

        Returns:
            What to predict with, :meth:`predictor`.
        """
        if (reason := self.method.unfinished) is not None:
            warnings.warn(reason, stacklevel=3)
        if self.reliability.finish(self.model):
            with autocast(self.config):
                refresh_batch_norm(self.model, self.batches.epoch(self.config.epochs))
        return self.predictor()

    def predictor(self) -> nn.Module:
        """What a finished run predicts with, in evaluation mode: its network, passes of it, or several networks."""
        return self.reliability.predictor(self.model, lambda s: load_network(self.config, self.dataset, s)).eval()

    def flop_counts(self) -> dict[str, float]:
        """FLOPs of the present network: ``flops`` in ``results.json``."""
        config, reliability = self.config, self.reliability
        costs = flops.layer_costs(self.model, self.dataset.train.shape)
        dense, sparse = sum(c.forward_dense for c in costs), sum(c.forward_sparse for c in costs)
        ratio = flops.training_flops_ratio(
            config.method, sparse, dense, interval=config.interval, update_fraction=reliability.topology_stop,
            f_start=max(self.start_flops, sparse),
            growth=self.method.growth(config.method_options, config.drop_fraction, reliability.topology_stop),
        )  # fmt: skip
        return {"forward_dense": dense, "forward_sparse": sparse, "passes": reliability.passes, "train_ratio": ratio}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs; tensors, numbers, strings and containers only."""
        return {
            **self.reliability.state_dict(),
            "epoch": self.epoch,
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "random_state": torch.get_rng_state(),
            "cuda_random_state": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "diagnostics": None if self.diagnostics is None else self.diagnostics.state_dict(),
            "data_identity": self.identity,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Raises:
            ValueError: a state that does not fit this run's model or method, or is of other data.
        """
        try:
            if other := difference(state.get("data_identity"), self.identity):
                raise ValueError(f"it was trained with {other}")
            check_dtypes(self.model, state["model"])
            self.model.load_state_dict(state["model"])
            own = [(group["lr"], group["fused"]) for group in self.optimizer.param_groups]
            self.optimizer.load_state_dict(state["optimizer"])
            for group, (lr, fused) in zip(self.optimizer.param_groups, own, strict=True):
                # which form they have depends on the device, not on the checkpoint
                saved, group["fused"] = group["lr"], fused
                group["lr"] = lr.fill_(saved) if isinstance(lr, Tensor) else float(saved)
            self.method.load_state_dict(state["method"])
            self.reliability.load_state_dict(state)
            if self.diagnostics is not None:
                self.diagnostics.load_state_dict(state["diagnostics"])
            if self.scaler is not None:
                self.scaler.load_state_dict(state["scaler"])
            torch.set_rng_state(state["random_state"])
            cuda_random_state = state.get("cuda_random_state")  # none where it was trained on a CPU, or long ago
            if self.device.type == "cuda" and cuda_random_state is not None:
                torch.cuda.set_rng_state(cuda_random_state, self.device)
            self.epoch, self.history = state["epoch"], list(state["history"])
            if self.movement is not None:
                self.movement.look()  # from here on; the start is the one that the seed makes
            if not 0 <= self.epoch == len(self.history) <= self.config.epochs:
                raise ValueError(f"{self.epoch} epochs, {len(self.history)} of them with metrics")
        except Exception as error:  # what does not fit has no one kind of error
            raise ValueError(f"the checkpoint does not fit this run: {error}") from None
