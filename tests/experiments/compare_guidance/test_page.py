"""The page of a comparison: a slider for every row, and the scores that there are."""

import json
import re

from PIL import Image

from edm2kit.experiments.compare_guidance.page import write_page
from edm2kit.experiments.compare_guidance.report import FOLDER, RECORD_NAME
from edm2kit.experiments.compare_guidance.sheet import Strip
from edm2kit.experiments.pages.page import image_data
from tests.support import ROOT


def strip(caption: str, colour: str) -> Strip:
    return Strip(caption, [Image.new("RGB", (4, 4), colour)] * 4)


LINES = [
    ("main network alone", [strip("", "white")]),
    ("autoguidance", [strip("w = 1.5", "red"), strip("w = 2", "green")]),
    ("student", [strip("", "blue")]),
]


def groups_of(text: str) -> list[dict]:
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', text)[1])


def test_every_guided_row_is_beside_the_unguided_one(tmp_path):
    assert write_page(LINES, None, tmp_path / "index.html")
    first, second = groups_of((tmp_path / "index.html").read_text())
    assert (first["title"], [stop["label"] for stop in first["stops"]]) == ("autoguidance", ["w = 1.5", "w = 2"])
    assert [stop["label"] for stop in second["stops"]] == ["no weight"]
    assert first["unguided"] == second["unguided"] == image_data(Image.new("RGB", (8, 8), "white"))


def test_scores_of_the_published_record_are_shown(tmp_path):
    record = json.loads((ROOT / FOLDER / RECORD_NAME).read_text())
    write_page(LINES, record, tmp_path / "index.html")
    text = (tmp_path / "index.html").read_text()
    assert text.count("<tr>") == len(record["rows"]) + 1
    assert "<svg" in text


def test_without_an_unguided_row_there_is_no_page(tmp_path):
    assert not write_page(LINES[1:2], None, tmp_path / "index.html")
    assert not list(tmp_path.iterdir())
