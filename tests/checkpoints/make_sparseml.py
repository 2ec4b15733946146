"""Writes sparseml-1.8.0.pth, which tests/test_masks.py loads: a network pruned, trained and saved by SparseML itself.

    pip install sparseml==1.8.0 sparsezoo==1.8.1 torch==2.1.2 "numpy<2" "setuptools<70"  # Python 3.11
    python tests/checkpoints/make_sparseml.py

SparseML has ended and asks for a torch that sparse_moon does not run on, so no test can run both.
"""

from pathlib import Path

import torch
from sparseml.pytorch.optim import ScheduledModifierManager
from sparseml.pytorch.utils import ModuleExporter
from torch import nn

RECIPE = """
modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: 4.0
  - !MagnitudePruningModifier
    params: ["3.weight", "6.weight"]
    init_sparsity: 0.05
    final_sparsity: 0.75
    start_epoch: 0.0
    end_epoch: 3.0
    update_frequency: 0.5
    mask_type: unstructured
"""

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1),
    nn.Flatten(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 10),
)  # fmt: skip
manager = ScheduledModifierManager.from_yaml(RECIPE)
optimizer = manager.modify(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), steps_per_epoch=4)
images, labels = torch.randn(32, 4, 8, 8), torch.randint(10, (32,))
for _ in range(4):
    for part in range(0, 32, 8):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[part : part + 8]), labels[part : part + 8]).backward()
        optimizer.step()
manager.finalize(model)
folder = Path(__file__).parent
ModuleExporter(model, folder).export_pytorch(optimizer, epoch=4, name="sparseml-1.8.0.pth")
(folder / "training" / "sparseml-1.8.0.pth").replace(folder / "sparseml-1.8.0.pth")
(folder / "training").rmdir()
