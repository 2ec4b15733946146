import pytest
import torch
from torch.library import opcheck

from sparse_moon import ops
from sparse_moon.ops.bernoulli_mask import philox

M = 0xFFFFFFFF


def philox_naive(counter, key):
    """Philox4x32-10 in Python integers, from the paper's definition."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & M, (p0 >> 32) ^ c[3] ^ k1, p0 & M]
        k0, k1 = (k0 + 0x9E3779B9) & M, (k1 + 0xBB67AE85) & M
    return c


def test_the_naive_version_gives_the_published_vectors():
    """Random123's known answers for philox4x32-10."""
    assert philox_naive([0] * 4, (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox_naive([M] * 4, (M, M)) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], (0xA4093822, 0x299F31D0)
    assert philox_naive(*pi) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("seed", [0, 1, 0xA4093822299F31D0, 2**64 - 1])
@pytest.mark.parametrize("stream", [0, 7, 2**32 - 1])
@pytest.mark.parametrize("step", [0, 5, 2**40 + 3])
def test_philox(seed, stream, step):
    words = philox(11, seed, stream, torch.tensor(step))
    key = (seed & M, seed >> 32)
    expected = [w for i in range(3) for w in philox_naive([i, stream, step & M, step >> 32], key)]
    assert words.tolist() == expected[:11]


def test_mask_follows_the_words():
    like, step = torch.empty(3, 5), torch.tensor(9)
    mask = ops.bernoulli_mask(like, 0.3, seed=4, stream=2, step=step)
    assert mask.shape == like.shape and mask.dtype == torch.bool
    assert torch.equal(mask.flatten(), philox(15, 4, 2, step) < 0.3 * 2**32)
    assert ops.bernoulli_mask(like, 1.0, seed=4, stream=2, step=step).all()
    assert not ops.bernoulli_mask(like, 0.0, seed=4, stream=2, step=step).any()


def test_keep_rate_and_independence():
    like, n = torch.empty(100_000), 100_000
    masks = [
        ops.bernoulli_mask(like, 0.9, seed=seed, stream=stream, step=torch.tensor(step)).double()
        for seed, stream, step in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    for i, a in enumerate(masks):
        assert abs(a.mean() - 0.9) < 5 * (0.09 / n) ** 0.5
        for b in masks[i + 1 :]:
            assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 5 / n**0.5


def test_opcheck_and_errors():
    args = (torch.empty(6), 0.5, 3, 1, torch.tensor(2))
    opcheck(torch.ops.sparse_moon.bernoulli_mask.default, args)
    with pytest.raises(ValueError, match=r"keep must be in \[0, 1\], got 1.1"):
        ops.bernoulli_mask(torch.empty(6), 1.1, seed=0, stream=0, step=torch.tensor(0))
    with pytest.raises(ValueError, match="stream must be in"):
        ops.bernoulli_mask(torch.empty(6), 0.5, seed=0, stream=-1, step=torch.tensor(0))
    with pytest.raises(ValueError, match="0-d int64"):
        ops.bernoulli_mask(torch.empty(6), 0.5, seed=0, stream=0, step=torch.tensor(0.0))
