"""Records: written as JSON, compared setting by setting."""

import json
import math

import torch

from edm2kit.torch_utils.records import differences, plain_json, short_json, write_json


def test_equal_settings_have_no_differences():
    settings = {"solver": {"num_steps": 32, "rho": 7.0}, "classes": [1, 2]}
    assert differences(settings, json.loads(json.dumps(settings))) == []


def test_every_difference_is_named_with_both_values():
    recorded = {"solver": {"num_steps": 32, "rho": 7.0}, "net": "a"}
    current = {"solver": {"num_steps": 16, "rho": 7.0}, "net": "a", "vae": None, "batch": 4}
    assert differences(recorded, current) == ["solver.num_steps 32, now 16", "batch null, now 4"]
    assert differences(None, {"net": "a"}, "teacher") == ['teacher null, now {"net": "a"}']


def test_long_values_are_cut():
    assert short_json("a" * 40) == '"' + "a" * 20 + "..."
    assert short_json([1, 2]) == "[1, 2]"


def test_values_become_plain_json():
    value = {3: (1, range(2)), "dtype": torch.float32, "S_max": math.inf, "none": None, "on": True}
    assert plain_json(value) == {"3": [1, [0, 1]], "dtype": "torch.float32", "S_max": "inf", "none": None, "on": True}


def test_a_record_is_written_as_json(tmp_path):
    write_json(tmp_path / "new" / "record.json", {"a": [1]})
    assert json.loads((tmp_path / "new" / "record.json").read_text()) == {"a": [1]}
