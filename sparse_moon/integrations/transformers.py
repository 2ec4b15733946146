"""Sparse training by the Trainer of Hugging Face's transformers.

trainer = transformers.Trainer(model, arguments, callbacks=[SparseTraining(method="rigl", sparsity=0.9)])
"""

import base64
import io
from typing import Any

import torch

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"sparse_moon.integrations.transformers needs transformers ({error}): pip install 'sparse_moon[integrations]'"
    ) from error

from sparse_moon.integrations.callback import SparseCallback


class SparseTraining(SparseCallback, TrainerCallback, ExportableState):
    """Makes the model sparse when the Trainer is made, and trains it with a method.

    The topology is in a checkpoint's file of the model, and the method's state in ``trainer_state.json``; a run that
    goes on from one ends as one that was not interrupted, bit for bit. ``density`` and ``step_ms`` join the logs of the
    training in ``state.log_history``. The Trainer calls the reporters of ``report_to`` before the user's callbacks: to
    have both in TensorBoard, give ``report_to="none"`` and the reporter itself as a later callback.

    The arguments are those of :class:`sparse_moon.integrations.callback.SparseCallback`; ``method`` is there for the
    user after the training has begun. The callback has to be among the ``callbacks`` of the Trainer's constructor,
    because the optimizer is made of the converted model.
    """

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Convert the model."""
        if kwargs["optimizer"] is not None and self.sparsity is not None:
            raise ValueError(
                "the optimizer given to the Trainer was made of the dense model: leave it to the Trainer, or call "
                "sparse_moon.sparsify before it and give SparseTraining sparsity=None"
            )
        self.convert(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach the method; the Trainer has loaded a checkpoint's model, and made the optimizer."""
        if self.sparsity is None:
            self.convert(kwargs["model"])
        if not self.has_converted(kwargs["model"]):
            raise ValueError(
                "SparseTraining did not make this model sparse: it has to be among the callbacks of the Trainer's "
                "constructor, without model_init and restore_callback_states_from_checkpoint"
            )
        saved = (state.stateful_callbacks or {}).get(type(self).__name__) if state.global_step else None
        if saved is not None:
            self.restore(_from_text(saved["attributes"]["state"]))
        self.begin(kwargs["model"], [kwargs["optimizer"]], state.max_steps, args.gradient_accumulation_steps)
        self.check_resumed(state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        if self.clock is not None:
            self.clock.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clock."""
        if self.clock is not None:
            self.clock.stop()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look whether the method has come to its end."""
        self.check_finished(state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add figures to logs of the training."""
        if "loss" in kwargs["logs"]:
            figures = self.figures()
            kwargs["logs"].update(figures)
            state.log_history[-1].update(figures)

    def state(self) -> dict[str, Any]:
        """State for ``trainer_state.json``, where tensors have to be text."""
        return {"args": {}, "attributes": {"state": _to_text(self.saved())}}


def _to_text(state: dict[str, Any]) -> str:
    file = io.BytesIO()
    torch.save(state, file)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _from_text(text: str) -> dict[str, Any]:
    return torch.load(io.BytesIO(base64.b64decode(text)), map_location="cpu", weights_only=True)
