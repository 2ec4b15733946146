"""Sparse training in Lightning.

trainer = lightning.Trainer(callbacks=[SparseTraining(method="rigl", sparsity=0.9)])
"""

import warnings
from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"sparse_moon.integrations.lightning needs lightning ({error}): pip install 'sparse_moon[integrations]'"
    ) from error

from sparse_moon.integrations.callback import SparseCallback
from sparse_moon.nn import sparse_layers


class SparseTraining(SparseCallback, Callback):
    """Makes the module sparse before its optimizers are configured, and trains it with a method.

    The topology and the method's state are in Lightning's checkpoints; a run that goes on from one ends as one that
    was not interrupted, bit for bit, as far as Lightning restores the order of the batches. ``density`` and ``step_ms``
    are logged every ``log_every_n_steps`` batches and after each epoch.

    The arguments are those of :class:`sparse_moon.integrations.callback.SparseCallback`; ``method`` is there for the
    user after the training has begun. Layers that the module makes in ``configure_model`` it has to make sparse there
    itself: give the callback ``sparsity=None``.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Convert the module; of any stage, as a checkpoint may be loaded in each."""
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy):
            raise ValueError(
                "SparseTraining works on one device, with DDP and with ModelParallelStrategy (FSDP2), got strategy "
                f"{type(trainer.strategy).__name__}"
            )
        compiled = getattr(pl_module, "_compiler_ctx", None) is not None
        if compiled and self.sparsity is not None:
            raise ValueError(
                "the module is compiled already: call sparse_moon.sparsify before torch.compile, and give "
                "SparseTraining sparsity=None"
            )
        if stage != "fit" and self.sparsity is not None and not sparse_layers(pl_module):
            warnings.warn(
                "SparseTraining makes a dense module sparse that is not to be trained now: unless a checkpoint is "
                "loaded, it leaves out weights that the module has learned to use",
                stacklevel=2,
            )
        self.convert(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the method; Lightning has made the optimizers.

        It has loaded the module's and the callback's state, too, but for sharded modules, whose state it loads next.
        """
        if self.method is not None and trainer.global_step:
            self.restore(self.saved())  # another fit of the same training
        model, steps = trainer.strategy.model or pl_module, trainer.estimated_stepping_batches
        self.begin(model, trainer.optimizers, steps, trainer.accumulate_grad_batches)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on from a checkpoint of a sharded module, and look whether the method has a state to go on from."""
        self.go_on()
        self.check_resumed(trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        if self.clock is not None:
            self.clock.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock, and log as often as the trainer does."""
        if self.clock is not None:
            self.clock.stop()
        if trainer.log_every_n_steps and (batch_idx + 1) % trainer.log_every_n_steps == 0:
            pl_module.log_dict(self.figures(), on_step=True, on_epoch=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log."""
        pl_module.log_dict(self.figures())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look whether the method has come to its end."""
        self.check_finished(trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """State for Lightning's checkpoint."""
        return self.saved()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """State of Lightning's checkpoint."""
        self.restore(state_dict)
