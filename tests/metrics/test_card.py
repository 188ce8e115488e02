"""Score cards: what differs between two, and which way that moves a score."""

import json

import pytest

from edm2kit.metrics.card import (
    EFFECTS,
    explain,
    label_balance,
    markdown,
    read_card,
    run_line,
    scores_side_by_side,
    summary,
    table,
)
from edm2kit.metrics.scoring import Measurement

RUNS = {"seeds 0-9": {"fid": 2.0, "fd_dinov2": 50.25}, "seeds 10-19": {"fid": 3.0, "fd_dinov2": 40.0}}


def card(**changes):
    settings = {"guidance": {"weight": 1.4}, "sampler": {"num_steps": 32}, "classes": None, "precision": "fp32"}
    return {
        "command": "x",
        "results": summary({"seeds 0-9": {"fid": 2.0}}),
        "intervals": {"fid": {"seeds 0-9": [1.9, 2.1]}},
        "num_images": 50000,
        "settings": settings,
        "reference": {"path": "a.npz", "sha256": "1"},
        "detectors": {"fid": "one"},
        "torch": "2.5",
        **changes,
    }


def test_summary_keeps_every_value():
    assert summary(RUNS)["fid"] == {"min": 2, "mean": 2.5, "values": {"seeds 0-9": 2, "seeds 10-19": 3}}
    assert summary(RUNS)["fd_dinov2"]["min"] == 40


def test_table_lines_up():
    assert table(RUNS).splitlines() == [
        "             fid  fd_dinov2",
        "seeds 0-9      2      50.25",
        "seeds 10-19    3         40",
        "min            2         40",
        "mean         2.5     45.125",
    ]
    assert len(table({"one": {"fid": 1.0}}).splitlines()) == 2


def test_a_line_shows_intervals_where_known():
    found = Measurement({"fid": 2.0, "fid.kid": 0.5}, {"fid": (1.9, 2.125)}, 10)
    assert run_line(found) == "fid 2 [1.9, 2.125], fid.kid 0.5"


def test_the_balance_of_labels_is_counted():
    runs = {
        "a": Measurement({}, {}, 5, class_counts={0: 1, 2: 4}),
        "b": Measurement({}, {}, 5, class_counts={0: 2, 1: 1, 2: 2}),
    }
    assert label_balance(runs) == {"labels": {"classes": 3, "fewest_images": 1, "most_images": 4}}
    assert label_balance({"a": Measurement({}, {}, 5)}) == {}
    balanced, other = ({"classes": 3, "fewest_images": count, "most_images": 4} for count in (4, 1))
    assert explain(card(labels=balanced), card(labels=other)) == [
        "labels.fewest_images: 4 -> 1",
        *explain(card(), card(settings={**card()["settings"], "classes": [0]}))[1:],
    ]


def test_equal_cards_differ_in_nothing():
    assert explain(card(), card(command="another", results={})) == []


@pytest.mark.parametrize(
    ("change", "difference", "effect"),
    [
        ({"num_images": 5000}, "num_images: 50000 -> 5000", "larger Frechet distance"),
        ({"reference": {"path": "a.npz", "sha256": "2"}}, "reference.sha256: 1 -> 2", "another reference"),
        ({"detectors": {"fid": "two"}}, "detectors.fid: one -> two", "cannot be compared"),
        ({"settings": {**card()["settings"], "guidance": {"weight": 2}}}, "weight: 1.4 -> 2", "raises precision"),
        ({"settings": {**card()["settings"], "sampler": {"num_steps": 8}}}, "num_steps: 32 -> 8", "fewer steps"),
        ({"settings": {**card()["settings"], "classes": [0]}}, "classes: None -> [0]", "lower FID than random labels"),
        ({"torch": "2.6"}, "torch: 2.5 -> 2.6", "round differently"),
        ({"novelty": 1}, "novelty: absent -> 1", "no usual effect known"),
    ],
)
def test_a_difference_comes_with_the_way_it_moves_the_score(change, difference, effect):
    lines = explain(card(), card(**change))
    assert difference in lines[0]
    assert effect in lines[1]
    assert len(lines) == 2


def test_effects_name_their_sources():
    assert all(effect.source or "other images" in effect.text for effect in EFFECTS)


def test_scores_stand_side_by_side():
    other = card(results=summary({"a": {"fid": 3.0, "kid": 1.0}}), intervals={"fid": {"a": [2.9, 3.1]}})
    assert scores_side_by_side(card(), other) == ["fid: 2 and 3; intervals apart"]
    other["intervals"]["fid"]["a"] = [2.05, 3.9]
    assert scores_side_by_side(card(), other) == ["fid: 2 and 3; intervals overlap"]
    assert scores_side_by_side(card(), card(intervals={})) == ["fid: 2 and 2"]


def test_markdown_has_values_and_all_settings():
    text = markdown(card(cautions={"fid": "careful"}))
    assert "| fid | 2 | 1.9 to 2.1 | careful |" in text
    assert "| settings.guidance.weight | 1.4 |" in text
    assert "| reference.sha256 | 1 |" in text


def test_cards_are_read_and_other_files_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(card()))
    assert read_card(path) == card()
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_card(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a score card"):
        read_card(path)


@pytest.mark.parametrize(
    ("table", "entry", "said"),
    [
        ("results", {"fid": 3.2}, r"results\.fid must be numbers min, mean and values by run; got 3\.2"),
        ("results", {"fid": {"min": 1, "mean": 1, "values": {}}}, r"results\.fid must be numbers"),
        ("intervals", {"fid": {"seeds 0-1": [1]}}, r"intervals\.fid must be two numbers by run"),
        ("intervals", [], "intervals must be two numbers by run"),
        ("cautions", {"fid": 5}, r"cautions\.fid must be text; got 5"),
        ("by_class", {"seeds 0-1": {"cat": {}}}, r"by_class\.seeds 0-1 must be distances"),
        (
            "results",
            {"fid": {"min": 10**400, "mean": 1, "values": {"a": 1}}},
            r"results\.fid must be numbers min, mean",
        ),
    ],
)
def test_a_card_with_a_wrong_entry_names_it(tmp_path, table, entry, said):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({**card(), table: entry}))
    with pytest.raises(ValueError, match=said):
        read_card(path)


def test_names_of_classes_cannot_break_the_table_of_a_card(tmp_path):
    classes = {"0 a|b\n| c\x1b[2K": {"num_images": 1, "num_real": 2, "distances": {"fid": 3.0}}}
    text = markdown(card(by_class={"seeds 0-9": classes}, images="a\nb"))
    assert r"| 0 a/b\n/ c\x1b[2K | 1 | 2 | 3 |" in text.splitlines()
    assert r"| images | a\nb |" in text.splitlines()


def test_a_card_saved_by_an_editor_on_windows_is_read(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(card()), encoding="utf-8-sig")
    assert read_card(tmp_path / "a.json") == card()
