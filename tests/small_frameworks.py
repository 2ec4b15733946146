"""What the snippets of docs/frameworks.md need: a small module, model and loader of each framework."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

EXTRA = "is not installed: pip install 'sparse_moon[integrations]'"
HIDDEN = (
    # Lightning's own: of torch 2.14's pytrees, few workers, a logger that logs less often than an epoch, or is another
    {"message": ".isinstance.treespec, LeafSpec.. is deprecated", "category": FutureWarning},
    {"message": ".*(does not have many workers|is smaller than the logging interval|TensorBoardLogger|tensorboardX)"},
)


def _loader():
    x, y = torch.randn(2000, 64), torch.randint(0, 10, (2000,))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=10)


def _mlp():
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def lightning_module():
    lightning = pytest.importorskip("lightning", reason=f"lightning {EXTRA}")
    for hidden in HIDDEN:
        warnings.filterwarnings("ignore", **hidden)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = _mlp()

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    return {"module": Module(), "loader": _loader()}


def trainer():
    transformers = pytest.importorskip("transformers", reason=f"transformers {EXTRA}")
    pytest.importorskip("accelerate", reason=f"accelerate {EXTRA}")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    arguments = transformers.TrainingArguments(
        output_dir=".", max_steps=140, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
        dataloader_pin_memory=False,
    )  # fmt: skip
    dataset = [{"input_ids": torch.arange(8) + i, "labels": torch.tensor(i % 3)} for i in range(16)]
    return {"model": transformers.BertForSequenceClassification(config), "arguments": arguments, "dataset": dataset}


def accelerated():
    pytest.importorskip("accelerate", reason=f"accelerate {EXTRA}")
    return {"model": _mlp(), "loader": _loader(), "criterion": nn.CrossEntropyLoss(), "epochs": 2}


PRELUDES = {"lightning_module": lightning_module, "trainer": trainer, "accelerated": accelerated}
