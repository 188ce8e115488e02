"""The example scripts run, and what they print is right."""

import re

import pytest

from tests.docs.support import run_commands


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    commands = "python examples/any_denoiser.py\npython examples/ema_of_any_module.py"
    return run_commands(commands, tmp_path_factory.mktemp("examples"))


def test_a_foreign_model_is_sampled_and_guided(output):
    for name in ("model", "guided"):
        mean, share = re.search(rf"^{name}: mean \|x\| ([\d.]+), share above 0 ([\d.]+)", output, re.MULTILINE).groups()
        assert float(mean) == pytest.approx(1, abs=0.01)
        assert float(share) == pytest.approx(0.5, abs=0.05)


def test_the_rebuilt_average_is_the_one_tracked_all_along(output):
    found = re.findall(r"rebuilt ([\d.-]+), tracked ([\d.-]+), last ([\d.-]+)", output)
    assert len(found) == 2
    for rebuilt, tracked, last in (map(float, numbers) for numbers in found):
        assert abs(rebuilt - tracked) < 0.02 * abs(last - tracked)
