"""The numbers of docs/scale.md are those of its formulas, and its bound on an index holds."""

import re
from pathlib import Path

import pytest

import sparse_moon as sm

PAGE = (Path(__file__).parents[1] / "docs" / "scale.md").read_text(encoding="utf-8")
ROWS = re.search(r"<!-- plan -->\n.*?\n.*?\n(.*?)<!-- end -->", PAGE, re.S)[1].strip().splitlines()
DENSITY, INTERVAL, STATE, INDEX = 0.05, 100, 16, 12


@pytest.mark.parametrize("row", ROWS)
def test_the_plan_is_that_of_the_formulas(row):
    weights, gpus, *bytes_ = (cell.strip() for cell in row.strip("|").split("|"))
    factor, exponent = re.fullmatch(r"(?:(\d+) x )?10\^(\d+)", weights).groups()
    p, w = int(factor or 1) * 10 ** int(exponent), int(gpus.replace(",", ""))
    ring, index = (w - 1) / w, INDEX * DENSITY * p
    expected = [
        STATE * p / w,
        STATE * DENSITY * p + index,
        STATE * DENSITY * p / w + index,
        index,
        index / 8,
        12 * p * ring,
        (12 * DENSITY + 8 / INTERVAL) * p * ring,
    ]
    assert [float(number) for number in bytes_] == pytest.approx([number / 1e9 for number in expected], abs=0.0051)


@pytest.mark.parametrize("pattern", ["unstructured", "vector8", "block32"])
def test_an_index_takes_what_the_page_says(pattern):
    topology = sm.SparseLinear(96, 64, sparsity=0.5, pattern=pattern).topology
    rows, columns = topology.grid
    assert sum(tensor.nbytes for tensor in topology.index) == 12 * topology.num_blocks + 4 * (rows + columns + 2)
