import math

import pytest

from sparse_moon.allocation import allocate, exact

# ResNet-like: one small first layer that ERK keeps dense at moderate sparsity
SHAPES = {"stem": (16, 3, 3, 3), "a": (64, 32, 3, 3), "b": (128, 64, 1, 1), "fc": (10, 128)}


def total(densities):
    return sum(densities[name] * math.prod(shape) for name, shape in SHAPES.items())


def test_erk_by_hand():
    # two layers, no cap: eps = (N - floor(S N)) / sum of scores x sizes
    shapes = {"a": (8, 4, 3, 3), "b": (20, 10)}
    scores = {"a": (8 + 4 + 3 + 3) / (8 * 4 * 9), "b": 30 / 200}
    budget = (288 - math.floor(0.8 * 288)) + (200 - math.floor(0.8 * 200))
    eps = budget / (scores["a"] * 288 + scores["b"] * 200)
    densities = allocate(shapes, 0.8, "erk")
    assert densities == pytest.approx({name: eps * score for name, score in scores.items()})
    # ER leaves the kernel out of the score
    er = {"a": (8 + 4) / 32, "b": 30 / 200}
    eps = budget / (er["a"] * 288 + er["b"] * 200)
    assert allocate(shapes, 0.8, "er") == pytest.approx({name: eps * score for name, score in er.items()})


@pytest.mark.parametrize("method", ["er", "erk"])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8, 0.9, 0.95, 0.99])
def test_overall_sparsity_is_met_with_capped_layers(method, sparsity):
    densities = allocate(SHAPES, sparsity, method)
    weights = sum(math.prod(shape) for shape in SHAPES.values())
    assert total(densities) == pytest.approx((1 - sparsity) * weights, abs=len(SHAPES))
    assert all(0 < d <= 1 for d in densities.values())


def test_layers_at_the_cap_stay_dense_and_the_rest_keeps_its_proportions():
    densities = allocate(SHAPES, 0.7, "erk")
    assert densities["stem"] == densities["fc"] == 1.0
    ratio = (64 + 32 + 6) / (64 * 32 * 9) / ((128 + 64 + 2) / (128 * 64))
    assert densities["a"] / densities["b"] == pytest.approx(ratio)


@pytest.mark.parametrize("method", ["er", "erk"])
def test_the_sparsity_is_taken_as_it_is_written(method):
    """0.7 of 90 weights are 63; the product of floating point is below."""
    assert allocate({"a": (9, 10)}, 0.7, method) == {"a": pytest.approx(27 / 90, abs=1e-12)}
    assert [exact(0.7) * 90, exact(0.29) * 100, exact(1e-7) * 10**7, exact(0)] == [63, 29, 1, 0]


@pytest.mark.parametrize("method", ["er", "erk"])
@pytest.mark.parametrize("sparsity", [0.3, 0.8, 0.99])
def test_layers_without_weights_take_no_part(method, sparsity):
    empty = {"none in": (5, 0), "none out": (0, 8), "no kernel": (8, 8, 0, 1), "no channels": (4, 0, 3, 3)}
    expected = allocate(SHAPES, sparsity, method)
    assert allocate({**empty, **SHAPES}, sparsity, method) == {**dict.fromkeys(empty, 1.0), **expected}
    assert allocate(empty, sparsity, method) == dict.fromkeys(empty, 1.0)


def test_uniform_keeps_the_first_layer_dense_unless_told_otherwise():
    assert allocate(SHAPES, 0.75, "uniform") == {"stem": 1.0, "a": 0.25, "b": 0.25, "fc": 0.25}
    assert set(allocate(SHAPES, 0.75, "uniform", first_dense=False).values()) == {0.25}


@pytest.mark.parametrize("method", ["uniform", "er", "erk"])
def test_sparsity_zero_is_dense(method):
    assert set(allocate(SHAPES, 0.0, method).values()) == {1.0}


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, math.nan])
def test_sparsity_outside_the_range(sparsity):
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        allocate(SHAPES, sparsity)


def test_other_errors():
    with pytest.raises(ValueError, match="unknown allocation 'ekr'"):
        allocate(SHAPES, 0.5, "ekr")
    with pytest.raises(ValueError, match="no layers"):
        allocate({}, 0.5)
