"""A small module and data for Lightning; as a program, a training in two processes: ``small_lightning.py FOLDER``."""

import sys
import warnings

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from torch import nn

from sparse_moon.integrations.lightning import SparseTraining

BATCHES, EPOCHS = 10, 4


class Net(L.LightningModule):
    def __init__(self, optimizer="adam"):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 6))
        self.kind = optimizer

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        if self.kind == "none":
            return None
        kinds = {
            "adam": torch.optim.Adam, "adamw": torch.optim.AdamW,
            "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        }  # fmt: skip
        optimizer = kinds[self.kind](self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)]


def loader():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(BATCHES * 8, 32, generator=generator), torch.randint(0, 6, (BATCHES * 8,), generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)


def trainer(callbacks, epochs=EPOCHS, **options):
    return L.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=callbacks, enable_progress_bar=False,
        enable_model_summary=False, **{"logger": False, "enable_checkpointing": False, **options},
    )  # fmt: skip


def callback(method="rigl", sparsity=0.7, **options):
    return SparseTraining(method, sparsity, **{"interval": 4, "stop": 0.8, **options})


class Sharded(Net):
    """In float64, where DDP and FSDP2 sum in another order."""

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        if self.trainer.strategy.__class__.__name__ == "ModelParallelStrategy":
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net[2], mesh=mesh)
            fully_shard(self, mesh=mesh)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0].double()), batch[1])

    def forward(self, input):
        return self.net(input)


def whole_state(model):
    from sparse_moon.sharding import whole

    return {name: whole(tensor).clone() for name, tensor in model.state_dict().items()}


def sharded_and_resumed(folder):
    """A training in DDP, the same in FSDP2, and that one gone on with from its middle."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    states = {}
    for name in "ddp", "fsdp", "resumed":
        torch.manual_seed(0)
        model = Sharded().double()
        strategy = "ddp"
        if name != "ddp":
            strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        saving = L.callbacks.ModelCheckpoint(folder, f"{name}-{{epoch}}", save_top_k=-1, every_n_epochs=2)
        run = trainer([callback(), saving], devices=2, strategy=strategy, enable_checkpointing=True)
        run.fit(model, loader(), ckpt_path=f"{folder}/fsdp-epoch=1.ckpt" if name == "resumed" else None)
        states[name] = whole_state(model)
    torch.save(states, f"{folder}/{run.global_rank}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if sys.argv[2:] == ["sharded"]:
        sharded_and_resumed(sys.argv[1])
        sys.exit()
    model = Net()  # from random numbers of each process' own: DistributedDataParallel makes them the same
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = trainer([callback()], devices=2, strategy="ddp")
    run.fit(model, loader())
    torch.save((start, model.state_dict()), f"{sys.argv[1]}/{run.global_rank}.pt")
