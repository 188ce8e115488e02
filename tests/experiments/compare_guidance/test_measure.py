"""Records of a comparison stay in its folder, and are reused for the same settings and real images only."""

import json

import pytest
import yaml

from edm2kit.experiments.compare_guidance.measure import read_record
from edm2kit.experiments.compare_guidance.rows import ROWS_FILE, load_comparison

ASKED = {"row": "cfg", "num_images": 4, "real": "4 of 8", "real_content": "a"}


def test_other_real_images_under_the_same_path_are_refused_and_older_records_read(tmp_path):
    path = tmp_path / "cfg.json"
    assert read_record(path, ASKED) == {"asked": ASKED, "points": []}
    path.write_text(json.dumps({"asked": ASKED, "points": []}))
    assert read_record(path, ASKED)["asked"] == ASKED
    with pytest.raises(ValueError, match=r'measured with other settings \(real_content "a", now "b"\)'):
        read_record(path, {**ASKED, "real_content": "b"})
    older = {name: value for name, value in ASKED.items() if name != "real_content"}
    path.write_text(json.dumps({"asked": older, "points": []}))
    assert read_record(path, ASKED)["asked"] == older


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/b", ".x", "a\\0", "", 5])
def test_the_name_of_a_row_cannot_lead_out_of_the_folder(tmp_path, name):
    content = {"extends": "default", "rows": {name: {"title": "t", "options": ""}}}
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(
        ValueError, match=r"c\.yaml is not a comparison: (row .* the name becomes a file name|rows must be)"
    ):
        load_comparison(path)
    assert load_comparison(ROWS_FILE).rows
