"""What the host's capture refuses, because a GPU's would; see host_graph.py."""

import pytest
import torch
from host_graph import Forbidden, HostGraph

X, SQUARE, MASK = torch.rand(6), torch.eye(3), torch.tensor([True, False, True])

FORBIDDEN = {
    "item": lambda: X.sum().item(),
    "branch": lambda: 1 if X.sum() > 0 else 0,
    "nonzero": lambda: X.nonzero(),
    "mask as an index": lambda: SQUARE[MASK],
    "numbers at the places of a mask": lambda: SQUARE.clone().__setitem__(MASK, torch.ones(2, 3)),
    "tensor of numbers": lambda: torch.tensor([1.0, 2.0]),
    "resize_": lambda: torch.zeros(2).resize_(6),
    "out of another size": lambda: torch.zeros(2).resize_as_(X),
    "storage": lambda: torch.zeros(2).untyped_storage().resize_(48),
    "other storage": lambda: torch.zeros(2).set_(torch.zeros(6)),
    "multinomial": lambda: torch.multinomial(X, 2),
    "normal with deviations": lambda: torch.normal(X, X),
    "solve": lambda: torch.linalg.solve(SQUARE, SQUARE),
    "inverse": lambda: torch.linalg.inv(SQUARE),
    "cholesky": lambda: torch.linalg.cholesky(SQUARE),
    "eigenvalues": lambda: torch.linalg.eigh(SQUARE),
    "singular values": lambda: torch.linalg.svd(SQUARE),
    "to the host": lambda: X.to("cpu"),
    "to the host by name": lambda: X.to(device="cpu"),
    "cpu": lambda: X.cpu(),
}
ALLOWED = {
    "one number at the places of a mask": lambda: SQUARE.clone().masked_fill_(MASK, 0.0),
    "drawn on the device": lambda: torch.rand_like(X).bernoulli_(),
    "to another type": lambda: X.to(torch.bfloat16),
    "to where it is": lambda: X.to(X.device),
    "sort": lambda: X.sort()[0],
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_a_gpu_could_not_capture_is_refused(name):
    with pytest.raises(Forbidden):
        HostGraph(torch.device("cpu")).capture(FORBIDDEN[name])


@pytest.mark.parametrize("name", ALLOWED)
def test_what_a_gpu_captures_is_not(name):
    HostGraph(torch.device("cpu")).capture(ALLOWED[name])


def test_storages_have_other_sizes_again_afterwards():
    storage = torch.zeros(2).untyped_storage()
    with pytest.raises(Forbidden):
        HostGraph(torch.device("cpu")).capture(FORBIDDEN["storage"])
    storage.resize_(48)
    assert storage.nbytes() == 48
