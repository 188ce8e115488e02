"""Which metrics a run computes, and which it refuses."""

import pytest

from edm2kit.metrics.registry import METRICS, check_metrics, detectors_of, metrics_by_detector

IN_ALL = {name for name, metric in METRICS.items() if metric.in_all}
EVERYTHING = {"reference", "head", "real", "heldout", "real_labels"}


def test_all_means_all_that_apply_and_have_what_they_need():
    found = metrics_by_detector(["all"], ["fid", "fd_random", "sfid"], EVERYTHING)
    assert set(found["fid"]) == IN_ALL - {"classifier_score"}
    assert set(found["fd_random"]) == IN_ALL - {"classifier_score", "inception_score"}
    assert found["sfid"] == ()
    without_real = metrics_by_detector(["all"], ["fid"], {"reference", "head"})["fid"]
    assert set(without_real) == {"fd_infinity", "vendi", "inception_score"}
    assert "ct" not in metrics_by_detector(["all"], ["fid"], EVERYTHING - {"heldout"})["fid"]


def test_a_metric_may_be_named_for_all_detectors_or_for_one():
    assert metrics_by_detector(["kid"], ["fid", "fd_lite0"], EVERYTHING) == {"fid": ("kid",), "fd_lite0": ("kid",)}
    assert metrics_by_detector(["fid.kid", "fd_lite0"], ["fid", "fd_lite0"], EVERYTHING) == {
        "fid": ("kid",),
        "fd_lite0": (),
    }
    assert metrics_by_detector(["inception_score"], ["fid", "fd_random"], EVERYTHING)["fd_random"] == ()


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="kid needs real images; give --real"):
        metrics_by_detector(["kid"], ["fid"], {"reference", "head"})
    with pytest.raises(ValueError, match="ct needs heldout images; give --heldout"):
        metrics_by_detector(["fid.ct"], ["fid"], EVERYTHING - {"heldout"})
    with pytest.raises(ValueError, match="inception_score is not defined for fd_random; use fid"):
        metrics_by_detector(["inception_score"], ["fd_random"], EVERYTHING)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fdrandom", "did you mean fd_random"),
        ("recal", "did you mean recall"),
        ("fid.kidd", "did you mean kid"),
        ("fdi.kid", "did you mean fid"),
        ("xyzzy", "available metrics: fid"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name, reason):
    with pytest.raises(ValueError, match=reason):
        check_metrics([name])


def test_known_names_are_accepted():
    check_metrics(["all", "fdr", "fid", "kid", "fd_lite0.recall"])


def test_the_detectors_are_those_named_or_those_of_the_reference():
    there = ("fid", "fd_random")
    assert detectors_of(["fid.kid", "fd_lite0", "recall", "fid"], there) == ("fid", "fd_lite0")
    assert detectors_of(["fd_lite0", "all"], there) == ("fd_lite0",)
    assert detectors_of(["fid.kid"], there) == ("fid",)
    for names in (["all"], ["kid"], ["fdr"], ["all", "fid.mmd"]):
        assert detectors_of(names, there) == there


def test_every_metric_says_what_it_means_and_what_is_good():
    for metric in METRICS.values():
        assert metric.text
        assert metric.better
        assert set(metric.needs) <= EVERYTHING
