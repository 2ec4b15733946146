"""The training loop that the command line runs: sparse training, reliability, evaluation, and the run's folder."""

import math
import sys
import time
from bisect import bisect
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from sparse_moon import files, flops
from sparse_moon.algorithms import GMP, MEST, SET, Dense, DynamicMethod, GraNet, Method, RigL, SRigL, Static, TopKAST
from sparse_moon.app import datasets, run_folder
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.environment import environment
from sparse_moon.app.evaluate import build_model, check_dtypes, evaluate_model, final_densities, predictor, scores_for
from sparse_moon.app.report import write_report
from sparse_moon.app.run_data import RunData, load_dataset, load_ood_sets, plain_batches
from sparse_moon.averaging import TicketAverage, WeightAverage, refresh_batch_norm
from sparse_moon.distributed import mean_over_processes_, rank, world_size
from sparse_moon.losses import (
    AbstainingLoss,
    AbstentionLoss,
    LogitNormLoss,
    UnknownAwareLoss,
    VirtualOutlierLoss,
    mixup,
)
from sparse_moon.nn import layer_sparsities, live_outputs, overall_sparsity, sparse_layers
from sparse_moon.ood import CosineHead, classifier_head
from sparse_moon.random_mask import RandomMask
from sparse_moon.schedules import Cosine

# w in the last epoch, by dataset (arXiv 2403.20047, section 4.1).
_FINAL_WEIGHT = {"mnist": 0.01, "cifar10": 1.0, "cifar100": 2.0}
_DTYPES = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CHECK_EVERY = 20  # batches between looks at the loss: each look waits for the device
_TICKET_RATE = 5.0  # a cycle of Sup-tickets starts at this multiple of the final learning rate


class Trainer:
    """Model, optimizer, method and loss of one run, and their common state."""

    def __init__(self, config: TrainConfig, dataset: RunData) -> None:
        torch.manual_seed(config.seed)
        self.config, self.dataset = config, dataset
        self.device = torch.device(config.device)
        self.batches = datasets.Batches(
            dataset.train, dataset.mean, dataset.std, config.batch_size, shuffle_seed=config.seed,
            augment=dataset.augment, device=config.device, rank=rank(), world_size=world_size(),
            drop_last=len(dataset.train) >= config.batch_size,  # batch norm cannot train on a rest of one image
        )  # fmt: skip
        self.total_steps = len(self.batches) * config.epochs
        self.model = build_model(config, dataset).to(self.device)
        self.start_flops = self._forward_flops()
        self.parallel = self._wrap()
        self.loss = self._build_loss().to(self.device)
        self.optimizer = torch.optim.SGD(
            self._parameter_groups(), config.lr, config.momentum,
            weight_decay=config.weight_decay, nesterov=config.momentum > 0,
        )  # fmt: skip
        self.method = self._build_method()
        self.mask = RandomMask(self.model, config.keep, config.seed) if config.masks else None
        self.average = self._build_average()
        self.members: list[dict[str, Tensor]] = []  # states of the late epochs' networks
        self.features: Tensor | None = None
        if isinstance(self.loss, VirtualOutlierLoss):
            classifier_head(self.model).register_forward_pre_hook(self._keep_features)
        self.scaler = torch.amp.GradScaler(self.device.type) if config.amp == "float16" else None
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        lr_end = config.lr / 15 if config.lr_end is None else config.lr_end
        self.lr = Cosine(config.lr, lr_end, max(round(config.lr_until * self.total_steps), 1))

    def _wrap(self) -> nn.Module:
        return DistributedDataParallel(self.model) if world_size() > 1 else self.model

    def _forward_flops(self) -> float:
        costs = flops.layer_costs(self.model, self.dataset.train.shape)
        return sum(cost.forward_sparse for cost in costs)

    def _parameter_groups(self) -> Any:
        """What the optimizer trains, apart what has no weight decay."""
        without: list[nn.Parameter] = list(self.loss.parameters())
        if self.config.method == "top-kast":  # which has its own penalty
            without += [layer.values for layer in sparse_layers(self.model).values()]
        head = classifier_head(self.model)
        if isinstance(head, CosineHead):
            without.append(head.weight)
        if not without:
            return self.model.parameters()
        named = {id(parameter) for parameter in without}
        others = [parameter for parameter in self.model.parameters() if id(parameter) not in named]
        return [{"params": others}, {"params": without, "weight_decay": 0.0}]

    def _build_method(self) -> Method:
        config, model, optimizer = self.config, self.model, self.optimizer
        if not config.updates:
            return (Dense if config.method == "dense" else Static)(model, optimizer)
        timing: dict[str, Any] = {
            "total_steps": self.total_steps, "interval": config.interval, "stop": config.topology_stop,
        }  # fmt: skip
        stop_step = max(round(config.topology_stop * self.total_steps), 1)
        exchange = {**timing, "drop_fraction": Cosine(config.drop_fraction, 0.0, stop_step), "seed": config.seed}
        match config.method:
            case "set":
                return SET(model, optimizer, **exchange)
            case "rigl":
                return RigL(model, optimizer, **exchange)
            case "mest":
                return MEST(
                    model, optimizer, gradient_weight=config.gradient_weight,
                    soft_memory_bound=config.soft_memory_bound, **exchange,
                )  # fmt: skip
            case "srigl":
                return SRigL(model, optimizer, gamma_sal=config.ablation_threshold, **exchange)
            case "top-kast":
                return TopKAST(
                    model, optimizer, forward_share=config.forward_share, penalty=config.weight_decay, **exchange
                )
            case "gmp":
                return GMP(model, optimizer, densities=final_densities(config, self.dataset), **timing)
            case _:
                return GraNet(model, optimizer, densities=final_densities(config, self.dataset), **exchange)

    def _build_loss(self) -> nn.Module:
        config, classes = self.config, self.dataset.num_classes
        if config.unknown_unit:
            weight = 1.0 if config.reliability == "dac" else _FINAL_WEIGHT.get(config.dataset, 1.0)
            weight = weight if config.final_weight is None else config.final_weight
            if config.reliability == "dac":
                return AbstainingLoss(classes, config.epochs, final_weight=weight, warmup_epochs=config.warmup_epochs)
            return UnknownAwareLoss(
                classes, config.epochs, final_weight=weight, warmup_epochs=config.warmup_epochs,
                auto_tune="tuning" not in config.without,
            )  # fmt: skip
        if config.reliability == "logitnorm":
            return LogitNormLoss(config.logit_temperature)
        if config.reliability == "vos":
            features = cast(nn.Linear, classifier_head(self.model)).in_features
            return VirtualOutlierLoss(
                classes, features, config.epochs, start=config.outliers_from, weight=config.outlier_weight
            )
        return nn.CrossEntropyLoss(
            label_smoothing=config.label_smoothing if config.reliability == "label-smoothing" else 0.0
        )

    def _build_average(self) -> WeightAverage | TicketAverage | None:
        if self.config.reliability == "sup-tickets":
            return TicketAverage(self.model)
        return WeightAverage(self.model, self.mask, rescale=self.config.rescale) if self.config.averages else None

    def _keep_features(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.features = inputs[0]

    def _learning_rate(self, step: int) -> float:
        """Half a cosine and then constant; with Sup-tickets cycles over the late epochs in place of the end."""
        config, length = self.config, len(self.batches)
        starts = [(config.first_vote - 1) * length, *(epoch * length for epoch in config.ticket_epochs)]
        if config.reliability != "sup-tickets" or step < starts[0]:
            return self.lr(step)
        cycle = min(bisect(starts, step), len(starts) - 1)
        first, last = starts[cycle - 1], starts[cycle]
        return Cosine(_TICKET_RATE * self.lr.end, self.lr.end, last - first)(step - first)

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
            updates += self._step(images, labels, totals)
            if step % _CHECK_EVERY == 0 or step + 1 == len(self.batches):
                self._look(bar, totals)
            bar.update()
        loss, correct, count = totals.tolist()
        row: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "loss": loss / count,
            "train_accuracy": correct / count,
            "lr": self.optimizer.param_groups[0]["lr"],
            "density": 1.0 - overall_sparsity(self.model),
            "topology_updates": updates,
        }
        if isinstance(self.loss, AbstentionLoss):
            row |= {"w": self.loss.w.item(), "mean_u": self.loss.mean_u.item()}
        if isinstance(self.loss, AbstentionLoss | VirtualOutlierLoss):
            self.loss.end_epoch()
        if self.mask is not None:
            self.mask.clear()
        self.epoch += 1
        self._vote()
        row["test_accuracy"] = self._test_accuracy()
        row["time_s"] = time.perf_counter() - started
        self.history.append(row)

    def _vote(self) -> None:
        """Take the network at the end of an epoch into the average that the run makes, if any."""
        tickets = self.config.reliability == "sup-tickets"
        votes = self.epoch in self.config.ticket_epochs if tickets else self.epoch >= self.config.first_vote
        if not votes:
            return
        if self.average is not None:
            self.average.update(self.model)
        if self.config.averages_predictions:
            member = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            if self.mask is not None:  # the sparser network that this epoch's last batch trained
                for stream, (name, layer) in enumerate(sparse_layers(self.model).items()):
                    member[f"{name}.values"] *= self.mask.mask(stream, layer)
            self.members.append(member)

    def _step(self, images: Tensor, labels: Tensor, totals: Tensor) -> bool:
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(self.method.steps)
        if self.mask is not None:
            # growth is chosen by the gradient of the whole sparse network
            self.mask.clear() if self.method.updates_now else self.mask.draw()
        targets = labels
        if self.config.reliability == "mixup":
            images, targets = mixup(images, labels, self.dataset.num_classes, self.config.mixup_alpha)
        with self._autocast():
            logits = self.parallel(images)
            more = (self.features, classifier_head(self.model)) if isinstance(self.loss, VirtualOutlierLoss) else ()
            loss = self.loss(logits, targets, *more)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        for parameter in self.loss.parameters():  # which DistributedDataParallel does not know
            if parameter.grad is not None:
                mean_over_processes_(parameter.grad)
        updated = self.method.step(self.scaler)
        self.optimizer.zero_grad()
        if updated and world_size() > 1 and isinstance(self.method, DynamicMethod) and self.method.resizes:
            self.parallel = self._wrap()  # its buckets have the old sizes
        with torch.no_grad():
            correct = logits[:, : self.dataset.num_classes].argmax(1) == labels
            totals += torch.stack([loss.float() * len(labels), correct.sum(), correct.numel() * torch.ones_like(loss)])
        return updated

    def _autocast(self) -> Any:
        dtype = _DTYPES[self.config.amp]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def _look(self, bar: tqdm, totals: Tensor) -> None:
        loss, correct, count = totals.tolist()
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} in epoch {self.epoch + 1}, batch {self.method.steps} of {self.total_steps}; "
                f"the last good epoch is in the checkpoint. Try a lower lr than {self.config.lr}"
            )
        shown = {"epoch": f"{self.epoch + 1}/{self.config.epochs}", "loss": f"{loss / count:.3f}",
                 "acc": f"{correct / count:.3f}"}  # fmt: skip
        if isinstance(self.loss, AbstentionLoss):
            shown |= {"w": f"{self.loss.w.item():.3f}", "u": f"{self.loss.mean_u.item():.1e}"}
        bar.set_postfix(shown | {"density": f"{1.0 - overall_sparsity(self.model):.3f}"}, refresh=False)

    def _test_accuracy(self) -> float:
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.model.eval()
        with torch.no_grad(), self._autocast():
            for images, labels in plain_batches(self.dataset.test, self.dataset, self.config):
                correct += (self.model(images)[:, : self.dataset.num_classes].argmax(1) == labels).sum()
        return correct.item() / len(self.dataset.test)

    def finish(self) -> nn.Module:
        """Turn the model into the average of the late epochs, if the run makes one, with batch norm refreshed.

        Returns:
            What to predict with; see :func:`sparse_moon.app.evaluate.predictor`.
        """
        if self.average is not None:
            self.average.copy_to(self.model)
            with self._autocast():
                refresh_batch_norm(self.model, plain_batches(self.dataset.train, self.dataset, self.config))
        return predictor(self.config, self.dataset, self.model, self.members)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs; tensors, numbers, strings and containers only."""
        return {
            "epoch": self.epoch,
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.state_dict(),
            "loss": self.loss.state_dict(),
            "mask": None if self.mask is None else self.mask.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "members": self.members,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "random_state": torch.get_rng_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Raises:
            ValueError: a state that does not fit this run's model or method.
        """
        try:
            check_dtypes(self.model, state["model"])
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.method.load_state_dict(state["method"])
            self.loss.load_state_dict(state["loss"])
            if self.mask is not None:
                self.mask.load_state_dict(state["mask"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            if self.scaler is not None:
                self.scaler.load_state_dict(state["scaler"])
            self.members = [{k: v.to(self.device) for k, v in member.items()} for member in state.get("members", [])]
            torch.set_rng_state(state["random_state"])
            self.epoch, self.history = state["epoch"], list(state["history"])
            if not 0 <= self.epoch == len(self.history) <= self.config.epochs:
                raise ValueError(f"{self.epoch} epochs, {len(self.history)} of them with metrics")
        except Exception as error:  # what does not fit has no one kind of error
            raise ValueError(f"the checkpoint does not fit this run: {error}") from None


def train(config: TrainConfig, folder: Path, *, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    """Train, evaluate and report one run; returns what ``results.json`` holds.

    Args:
        folder: where the run is written; it must not hold another run unless ``resume``.
        resume: continue from the folder's checkpoint (from the start if there is none yet); the end is the same, bit
            for bit, as that of an uninterrupted run. A finished run stays as it is.
        progress: show a progress bar on a terminal, and elsewhere print a line an epoch.

    Raises:
        ValueError: bad settings or data, a folder that holds a run or that another process writes to, a checkpoint
            that cannot be read or is of other settings, a loss that is not finite. Earlier results stay intact.
        OSError: the folder cannot be written.
    """
    with run_folder.only_writer(folder) if rank() == 0 else nullcontext():
        return _train(config, folder, resume=resume, progress=progress)


def _train(config: TrainConfig, folder: Path, *, resume: bool, progress: bool) -> dict[str, Any]:
    if not resume and (folder / run_folder.CONFIG).exists():
        raise ValueError(f"{folder} holds a run already: continue it with --resume, or choose another --out")
    state = run_folder.read_checkpoint(folder) if resume and (folder / run_folder.CHECKPOINT).exists() else None
    finished = state is not None and state["finished"]
    if state is not None:
        _check_settings(config, TrainConfig.from_dict(state["config"]))
    if finished and all((folder / name).exists() for name in run_folder.FILES):
        return files.read_json(folder / run_folder.RESULTS)
    dataset = load_dataset(config)
    ood_sets = load_ood_sets(config, dataset)
    if config.headline not in scores_for(config):
        raise ValueError(f"headline must be a score that fits this run, {scores_for(config)}, got {config.headline!r}")
    trainer = Trainer(config, dataset)
    if state is not None:
        trainer.load_state_dict(state)
    main = rank() == 0
    if main:
        files.write_json(folder / run_folder.CONFIG, asdict(config))
        run_folder.write_metrics(folder, trainer.history)

    done = trainer.epoch * len(trainer.batches)
    shown = progress and main
    on_terminal = shown and sys.stderr.isatty()
    with tqdm(total=trainer.total_steps, initial=done, unit="batch", disable=not on_terminal) as bar:
        while trainer.epoch < config.epochs:
            trainer.run_epoch(bar)
            if main:
                run_folder.write_checkpoint(folder, _checkpoint(trainer))
                run_folder.write_metrics(folder, trainer.history)
            if shown and not on_terminal:
                print(_line(trainer), file=sys.stderr, flush=True)
    # a finished run is here again because files were removed since
    model = predictor(config, dataset, trainer.model, trainer.members) if finished else trainer.finish()
    return _results(trainer, model, ood_sets, folder, finished) if main else {}


def _check_settings(config: TrainConfig, saved: TrainConfig) -> None:
    """A run goes on with the settings that it began with; where it computes and finds its data may change."""
    for field in fields(TrainConfig):
        asked, kept = getattr(config, field.name), getattr(saved, field.name)
        if asked != kept and field.name not in ("device", "data_root", "download", "ood", "headline"):
            raise ValueError(f"the checkpoint does not fit this run: it has {field.name} {kept!r}, not {asked!r}")


def _line(trainer: Trainer) -> str:
    """The last epoch in a line of a log."""
    row = trainer.history[-1]
    return (
        f"epoch {row['epoch']}/{trainer.config.epochs}: loss {row['loss']:.4f}, accuracy {row['train_accuracy']:.4f}, "
        f"test accuracy {row['test_accuracy']:.4f}, {row['time_s']:.1f} s"
    )


def _checkpoint(trainer: Trainer, *, finished: bool = False) -> dict[str, Any]:
    return {"config": asdict(trainer.config), "finished": finished, **trainer.state_dict()}


def _results(
    trainer: Trainer, model: nn.Module, ood_sets: Mapping[str, datasets.Images], folder: Path, finished: bool
) -> dict[str, Any]:
    """Evaluate the finished model; write what is made from it, and its checkpoint unless that is there."""
    config, dataset = trainer.config, trainer.dataset
    checkpoint = _checkpoint(trainer, finished=True)  # with the random state from which the model is evaluated
    figures, arrays = evaluate_model(model, config, dataset, ood_sets)
    results = {
        **figures,
        "sparsity": {
            "target": 0.0 if config.method == "dense" else config.sparsity,
            "actual": overall_sparsity(trainer.model),
            "layers": layer_sparsities(trainer.model),
            "live_outputs": live_outputs(trainer.model),
        },
        "flops": _flops(trainer),
        "memory": flops.memory_report(trainer.model, trainer.optimizer),
        "epochs": trainer.epoch,
        "time_s": sum(row["time_s"] for row in trainer.history),
        "environment": environment(config.device),
    }
    run_folder.write_scores(folder, arrays)
    files.write_json(folder / run_folder.RESULTS, results)
    write_report(folder)
    # last, because this checkpoint holds the finished model: a run killed before comes here again
    if not finished:
        run_folder.write_checkpoint(folder, checkpoint)
    return results


def _flops(trainer: Trainer) -> dict[str, float]:
    config = trainer.config
    costs = flops.layer_costs(trainer.model, trainer.dataset.train.shape)
    dense, sparse = sum(c.forward_dense for c in costs), sum(c.forward_sparse for c in costs)
    ratio = flops.training_flops_ratio(
        config.method, sparse, dense, interval=config.interval, update_fraction=config.topology_stop,
        f_start=max(trainer.start_flops, sparse),
        # the mean of the cosine; the share of a layer's weights, which is that of its FLOPs
        growth=config.drop_fraction / 2 * config.topology_stop if config.soft_memory_bound else 0.0,
    )  # fmt: skip
    passes = {"mc-dropout": config.samples}.get(config.reliability, max(len(trainer.members), 1))
    return {"forward_dense": dense, "forward_sparse": sparse, "passes": passes, "train_ratio": ratio}
