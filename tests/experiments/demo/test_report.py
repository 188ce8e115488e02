"""The demo's picture and table come from records, and only from records that compare."""

import json

import pytest
from click.testing import CliRunner
from PIL import Image

from edm2kit.experiments.demo import report

VALUES = {"real": [1.0, 1.5], "unguided": [30.25, 31.0], "autoguided": [12.0, 13.0]}


def record(values, num_images=1000):
    each = {f"seeds {k}": value for k, value in enumerate(values)}
    found = {"min": min(values), "mean": sum(values) / len(values), "values": each}
    return {"num_images": num_images, "results": {report.METRICS[0]: found}}


@pytest.fixture
def outcome(tmp_path):
    """A finished demo: three records and four pictures of either kind, red and green."""
    for name, values in VALUES.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record(values)))
    for name, colour in (("unguided", "red"), ("autoguided", "lime")):
        (tmp_path / name).mkdir()
        for seed in range(4):
            Image.new("RGB", (32, 32), colour).save(tmp_path / name / f"{seed:06d}.png")
    return tmp_path


def run(folder, *options):
    return CliRunner().invoke(report.main, ["--out", str(folder), "--columns", "2", "--rows", "2", *options])


def test_the_table_holds_mean_least_and_each_value(outcome):
    done = run(outcome)
    assert done.exit_code == 0, done.output
    lines = (outcome / "table.md").read_text().splitlines()
    assert lines[0].startswith("| 1,000 images each | fd_lite0, mean of 2 |")
    assert lines[3] == "| main network alone | 30.62 | 30.25 | 30.25, 31 |"
    assert lines[4] == "| main network, autoguided | 12.5 | 12 | 12, 13 |"


def test_the_picture_shows_unguided_left_and_autoguided_right(outcome):
    assert run(outcome).exit_code == 0
    picture = Image.open(outcome / "demo.png").convert("RGB")
    middle = picture.height * 3 // 4
    assert picture.getpixel((picture.width // 4, middle)) == (255, 0, 0)
    assert picture.getpixel((picture.width * 3 // 4, middle)) == (0, 255, 0)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda out: (out / "real.json").unlink(), "real.json is missing"),
        (lambda out: (out / "real.json").write_text(json.dumps(record([1.0], 500))), "different numbers of images"),
        (lambda out: (out / "unguided" / "000003.png").unlink(), "has 3 images, but the picture needs 4"),
    ],
)
def test_an_unfinished_or_uneven_demo_is_refused(outcome, spoil, reason):
    spoil(outcome)
    done = run(outcome)
    assert done.exit_code == 1
    assert reason in done.output
    assert not (outcome / "demo.png").exists()
