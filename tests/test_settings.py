"""Types, bounds and help of settings, and options of one class among them."""

import subprocess
import sys
from dataclasses import dataclass, fields
from typing import Annotated, Literal, get_args

import pytest

import sparse_moon
from sparse_moon import algorithms, ood, options, reliability, settings
from sparse_moon.algorithms import ALGORITHMS
from sparse_moon.app.config import TrainConfig
from sparse_moon.ood import SCORES
from sparse_moon.reliability import RELIABILITY
from sparse_moon.settings import ImportPath, check_settings, helps, options_of


@dataclass(frozen=True)
class Base:
    """Of the base.

    Args:
        share: a share: of something.
    """

    share: Annotated[float, settings.SHARE] = 0.5


@dataclass(frozen=True)
class Some(Base):
    """Args:
    count: how many.
    """

    count: Annotated[int, settings.AT_LEAST_1] | None = None
    kind: Literal["a", "b"] | ImportPath = "a"
    words: tuple[str, ...] = ()
    flag: bool = False


def test_good_values():
    for good in (Some(), Some(share=1, count=3, kind="pack.age.Kind", words=("x",), flag=True), Some(share=0.0)):
        check_settings(good)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 1.1}, r"share must be in \[0, 1\], got 1\.1"),
        ({"share": float("nan")}, "share must be finite, got nan"),
        ({"share": True}, "share must be a number, got True"),
        ({"share": "x"}, "share must be a number, got 'x'"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"count": 1.0}, r"count must be an integer or nothing, got 1\.0"),
        ({"kind": "c"}, r"kind must be one of a, b or your own as package\.module\.name, got 'c'"),
        ({"words": (1,)}, r"words must be a list of texts, got \(1,\)"),
        ({"flag": 1}, "flag must be true or false, got 1"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(ValueError, match=message):
        check_settings(Some(**values))


@pytest.mark.parametrize(
    ("bound", "inside", "outside"),
    [
        (settings.SHARE, (0, 1), (-0.1, 1.1)),
        (settings.SHARE_BELOW_ONE, (0, 0.9), (-0.1, 1)),
        (settings.POSITIVE_SHARE, (0.1, 1), (0, 1.1)),
        (settings.POSITIVE, (0.1, 9), (0, -1)),
        (settings.AT_LEAST_0, (0, 9), (-1,)),
        (settings.AT_LEAST_1, (1, 9), (0,)),
    ],
)
def test_bounds(bound, inside, outside):
    assert all(map(bound.fits, inside)) and not any(map(bound.fits, outside))


def test_help_is_inherited():
    assert helps(Some) == {"share": "a share: of something.", "count": "how many.", "kind": "", "words": "", "flag": ""}
    assert all(helps(TrainConfig).values())


def test_options_come_from_settings_or_from_what_is_besides():
    @dataclass(frozen=True)
    class Wanted:
        share: float = 0.1
        extra: Annotated[int, settings.AT_LEAST_1] = 7

    assert options_of(Wanted, Some(share=0.25), {"extra": 2, "other": 3}) == Wanted(0.25, 2)
    assert options_of(Wanted, Some(), {"share": 0.9}) == Wanted(0.5, 7)
    with pytest.raises(ValueError, match="extra must be at least 1, got 0"):
        options_of(Wanted, Some(), {"extra": 0})


def test_every_option_of_ours_is_a_setting_of_the_same_default():
    all_fields = {option.name: option.default for option in fields(TrainConfig)}
    for kind in (*ALGORITHMS.values(), *RELIABILITY.values()):
        for option in fields(kind.Options):
            where = f"{kind.__name__}: add its options to the bases in sparse_moon/options.py"
            assert option.name in all_fields, where
            assert all_fields[option.name] == option.default, (kind.name, option.name)
    for names, registry in ((options.TrainingMethod, ALGORITHMS), (options.ReliabilityMethod, RELIABILITY)):
        assert set(get_args(names)) == set(registry), "name it in sparse_moon/options.py"


def test_every_class_of_ours_is_exported():
    for registry, package in ((ALGORITHMS, algorithms), (RELIABILITY, reliability), (SCORES, ood)):
        classes = {kind.__name__ for kind in registry.values() if kind.__module__.startswith("sparse_moon.")}
        assert classes <= set(package.__all__), f"export it in {package.__name__}"
    assert {kind.__name__ for kind in ALGORITHMS.values()} <= set(sparse_moon.__all__), "export it in __init__.pyi"


def test_a_run_can_be_made_and_trained_where_options_cannot_be_parsed():
    """Benchmarks on a bare machine have torch, and may not have jsonargparse."""
    code = "import sys; sys.modules['jsonargparse'] = None; import sparse_moon.app.models, sparse_moon.app.start"
    subprocess.run([sys.executable, "-c", code], check=True)
