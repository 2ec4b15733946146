"""KNN against brute force."""

import math

import pytest
import torch

from small_net import K, outputs
from sparse_moon.ood import (
    KNN,
)


@pytest.mark.parametrize("k", [1, 2, 7, 19])
@pytest.mark.parametrize("chunk_elements", [1, 19, 70, 2**24])
def test_knn_against_brute_force(k, chunk_elements):
    train, test = torch.randn(19, 5), 10 * torch.randn(13, 5)
    knn = KNN(K, k, chunk_elements).fit(outputs(torch.zeros(19, K), train))
    expected = []
    for q in test.double():
        distances = sorted(float((q / q.norm() - b / b.norm()).norm()) for b in train.double())
        expected.append(-distances[k - 1])
    score = knn.score(outputs(torch.zeros(13, K), test))
    torch.testing.assert_close(score.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


def test_knn_by_hand():
    # Unit vectors at 0, 90 and 180 degrees; lengths do not matter.
    train = outputs(torch.zeros(3, K), torch.tensor([[2.0, 0.0], [0.0, 0.5], [-3.0, 0.0]]))
    test = outputs(torch.zeros(2, K), torch.tensor([[7.0, 0.0], [0.0, -1.0]]))
    assert KNN(K, 1).fit(train).score(test).tolist() == pytest.approx([0.0, -math.sqrt(2)])
    assert KNN(K, 2).fit(train).score(test).tolist() == pytest.approx([-math.sqrt(2), -math.sqrt(2)])
    assert KNN(K, 3).fit(train).score(test).tolist() == pytest.approx([-2.0, -2.0])


def test_knn_resolves_small_distances():
    # 1 - q.b is below float32 resolution here.
    train = outputs(torch.zeros(1, K), torch.tensor([[1.0, 0.0]]))
    test = outputs(torch.zeros(3, K), torch.tensor([[1.0, 0.0], [1.0, 1e-5], [1.0, 2e-5]]))
    assert KNN(K, 1).fit(train).score(test).tolist() == pytest.approx([0.0, -1e-5, -2e-5], rel=1e-4)


def test_knn_errors():
    train = outputs(torch.zeros(4, K), torch.randn(4, 5))
    with pytest.raises(ValueError, match=r"k = 50 neighbours .* got 4"):
        KNN(K).fit(train)
    with pytest.raises(ValueError, match="not fitted"):
        KNN(K).score(train)
    with pytest.raises(ValueError, match="size 5, got 6"):
        KNN(K, 2).fit(train).score(outputs(torch.zeros(2, K), torch.randn(2, 6)))
    train.features[1, 1] = math.nan
    with pytest.raises(ValueError, match="finite"):
        KNN(K, 2).fit(train)


def test_knn_shows_nan_features():
    knn = KNN(K, 2).fit(outputs(torch.zeros(4, K), torch.randn(4, 5)))
    features = torch.randn(3, 5)
    features[1, 2] = math.nan
    assert knn.score(outputs(torch.zeros(3, K), features)).isnan().tolist() == [False, True, False]
