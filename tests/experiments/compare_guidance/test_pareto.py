"""The picture of the trade-offs compares values of equally many images only."""

import pytest

from edm2kit.experiments.compare_guidance.pareto import comparable_rows


@pytest.mark.parametrize(("tuned_on", "shown"), [(1000, ["alone", "pair"]), (500, ["pair"])])
def test_rows_with_values_of_another_number_of_images_are_left_out(tuned_on, shown):
    real = {"name": "real", "tuned_on": None}
    rows = [real, {"name": "alone", "tuned_on": None}, {"name": "pair", "tuned_on": tuned_on}]
    number, found = comparable_rows({"num_images": 1000, "rows": rows})
    assert number == tuned_on
    assert [row["name"] for row in found] == shown


def test_without_tuned_rows_all_are_comparable():
    number, found = comparable_rows({"num_images": 8, "rows": [{"name": "alone", "tuned_on": None}]})
    assert (number, len(found)) == (8, 1)
