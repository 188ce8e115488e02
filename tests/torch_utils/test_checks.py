"""One check for the types of values from files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from edm2kit.torch_utils.files import check_fields, check_type
from edm2kit.training.config import _count_nodes


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (1, int),
        (1, float),
        (1.5, float),
        (None, int | None),
        ([0.9, 1], tuple[float, float]),
        ([1, 2, 3], tuple[int, ...]),
        ({"a": 1}, Mapping[str, Any]),
        (object(), Any),
    ],
)
def test_fitting_values(value, hint):
    check_type(value, hint, "x")


@pytest.mark.parametrize(
    ("value", "hint", "said"),
    [
        (True, int, "x must be int; got True"),
        (1.0, int, "x must be int"),
        (1 << 70, int, "a number of 71 bits"),
        (10**400, float, "a number of 1329 bits"),
        (float("nan"), float, "x must be float; got nan"),
        (float("inf"), float, "got inf"),
        ("4", int | None, "x must be int or null; got '4'"),
        ([0.9], tuple[float, float], "a list of 2 float"),
        (0.9, tuple[float, ...], "a list of float"),
        ([1, "a"], tuple[int, ...], "a list of int"),
        ([], Mapping[str, Any], "a mapping"),
        ({1: 2}, Mapping[str, Any], "a mapping"),
    ],
)
def test_other_values_are_refused_with_both_sides(value, hint, said):
    with pytest.raises(ValueError, match="x must be") as error:
        check_type(value, hint, "x")
    assert said in str(error.value)
    assert len(str(error.value)) < 120


def test_fields_of_a_dataclass_are_checked_by_name():
    @dataclass
    class Record:
        nimg: int
        name: str = ""

    check_fields({"nimg": 3}, Record)
    with pytest.raises(ValueError, match="nimg must be int"):
        check_fields({"nimg": "x"}, Record)
    with pytest.raises(ValueError, match="unknown field 'other'"):
        check_fields({"nimg": 1, "other": 2}, Record)


def test_shared_parts_count_each_time_and_loops_end():
    part = [1] * 10
    for _ in range(6):
        part = [part] * 10
    assert _count_nodes(part) == 10_000
    part.append(part)
    assert _count_nodes(part) == 10_000
    assert _count_nodes({"a": [1, 2], "b": 3}) == 5
