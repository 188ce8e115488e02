"""Every parser reads a damaged file or refuses it in one line (hypothesis; `benchmarks.fuzz` does it for millions)."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import ODD_VALUES, PARSERS, Change, mutate, mutate_values, outcome

CHANGES = st.lists(
    st.builds(Change, st.integers(0, 11), st.integers(0, 1 << 20), st.integers(0, 1 << 16)), min_size=1, max_size=6
)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """The valid inputs of each parser."""
    return {name: parser.seeds(tmp_path_factory.mktemp("seeds")) for name, parser in PARSERS.items()}


@pytest.mark.parametrize("name", PARSERS)
def test_valid_inputs_are_read(seeds, tmp_path, name):
    for seed in seeds[name]:
        assert outcome(PARSERS[name], PARSERS[name].input_of(seed, []), tmp_path) == "read"


@pytest.mark.parametrize("name", PARSERS)
def test_damaged_inputs_are_read_or_refused_in_one_line(seeds, tmp_path, name):
    @settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(changes=CHANGES, which=st.integers(0, 99))
    def check(changes, which):
        seed = seeds[name][which % len(seeds[name])]
        assert outcome(PARSERS[name], PARSERS[name].input_of(seed, changes), tmp_path) in ("read", "refused")

    check()


def test_what_is_neither_read_nor_refused_is_noticed(tmp_path):
    def crash(data, folder):
        raise KeyError("a defect")

    def shout(data, folder):
        raise ValueError("one line\nand another")

    with pytest.raises(KeyError):
        outcome(type(PARSERS["card"])(lambda folder: [], crash), b"", tmp_path)
    with pytest.raises(AssertionError, match="several lines"):
        outcome(type(PARSERS["card"])(lambda folder: [], shout), b"", tmp_path)


def test_changes_change_something_and_nothing_else_than_the_input():
    seed, values = bytes(range(40)), {"a": [1, {"b": "c"}], "d": None}
    every = [Change(kind, place, value) for kind in range(12) for place in (0, 17, 39) for value in (0, 4, 9)]
    assert len({mutate(seed, [change]) for change in every}) > 30
    assert len({str(mutate_values(values, [change])) for change in every}) > 10
    assert values == {"a": [1, {"b": "c"}], "d": None}
    assert [] in ODD_VALUES  # nothing was put into it
