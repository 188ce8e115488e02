"""Records of a comparison are reused for the same settings and the same real images only."""

import json

import pytest

from edm2kit.experiments.compare_guidance.measure import read_record

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
