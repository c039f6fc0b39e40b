"""Configuration values: types and ranges are checked in one place, with one sentence, for every way in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from etude.core.config import Count, Fraction, NonNegative, Positive, Probability, Whole, check, describe, flag, replace
from etude.core.errors import UserError, nearest


@dataclass(frozen=True)
class Config:
    count: Count = 1
    whole: Whole = 0
    positive: Positive = 1.0
    non_negative: NonNegative = 0.0
    probability: Probability = 0.5
    fraction: Fraction = 0.5
    number: float = 0.0
    switch: bool = False
    style: Literal["modern", "1998"] = "modern"
    size: Literal[28, 32] = 28
    name: str = "x"
    perhaps: Count | None = None
    widths: tuple[Count, ...] = (3,)
    pair: tuple[int, float] = (1, 2.0)
    either: Literal["a"] | Probability = "a"


GOOD = {
    "count": [1, 10**9],
    "whole": [0],
    "positive": [1e-37, 5],
    "non_negative": [0.0, 0],
    "probability": [0, 1, 1.0],
    "fraction": [0, 0.999],
    "number": [-1e37, 3],
    "switch": [True],
    "style": ["1998"],
    "size": [32],
    "name": [""],
    "perhaps": [None, 2],
    "widths": [(), (1, 2)],
    "pair": [(3, 4)],
    "either": ["a", 0.3],
}
BAD = {
    "count": [0, -1, 1.0, True, "1", None],
    "whole": [-1, 0.5, False],
    "positive": [0, -1.0, math.inf, math.nan, "1", True, None],
    "non_negative": [-1e-9, math.nan, math.inf],
    "probability": [-0.1, 1.1, math.nan],
    "fraction": [1, 1.0, -0.1],
    "number": ["a", math.nan, None],
    "switch": [0, 1, "yes", None],
    "style": [1998, "old", None],
    "size": [28.0, True, 29, "28"],
    "name": [1, None],
    "perhaps": [0, "none", 1.5],
    "widths": [[1, 0], (0,), 5, "12", None],
    "pair": [(1,), (1, 2, 3), (1.5, 2)],
    "either": ["b", 1.5, None],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in GOOD.items() for value in values])
def test_good_values_pass(name, value) -> None:
    config = replace(Config(), {name: value}, "x")
    assert getattr(config, name) == value
    check(config)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_values_are_refused_in_one_sentence(name, value) -> None:
    with pytest.raises(UserError) as caught:
        replace(Config(), {name: value}, "x")
    assert str(caught.value).startswith(f"{flag(name)} is ")
    assert "; it must be " in str(caught.value)


def test_every_field_is_in_both_tables() -> None:
    assert GOOD.keys() == BAD.keys() == Config.__dataclass_fields__.keys()


def test_values_of_other_libraries_are_taken() -> None:
    """JSON's lists, numpy's numbers, a Path where text is meant, 1 where 1.0 is meant: as plain Python values."""
    given = {
        "widths": [4, 5],
        "count": np.int64(7),
        "positive": np.float32(0.5),
        "name": Path("a/b"),
        "number": 3,
        "switch": np.bool_(True),
    }
    config = replace(Config(), given, "x")
    found = {name: getattr(config, name) for name in given}
    assert found == {"widths": (4, 5), "count": 7, "positive": 0.5, "name": "a/b", "number": 3.0, "switch": True}
    assert [type(value) for value in found.values()] == [tuple, int, float, str, float, bool]
    with pytest.raises(UserError):
        replace(Config(), {"count": np.zeros(3)}, "x")


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (Count, "a whole number at least 1"),
        (Positive, "a number greater than 0"),
        (Fraction, "a number between 0 and 1 (1 excluded)"),
        (Probability, "a number between 0 and 1"),
        (Literal["a", "b"], "one of a, b"),
        (Count | None, "a whole number at least 1 or none"),
        (tuple[Count, ...], "a list, each a whole number at least 1"),
        (bool, "true or false"),
        (str, "text"),
    ],
)
def test_describe_says_what_is_allowed(hint, words) -> None:
    assert describe(hint) == words


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="vision/lenet has no setting 'cuont'; did you mean 'count'"):
        replace(Config(), {"cuont": 1}, "vision/lenet")
    known = ["vision/lenet", "gans/wgan_gp", "basics/mlp"]
    assert nearest("lenet", known) == "; did you mean 'vision/lenet'?"
    assert nearest("wgan-gp", known) == "; did you mean 'gans/wgan_gp'?"
    assert nearest("qqqq", known) == ""
    assert nearest("", known) == ""
