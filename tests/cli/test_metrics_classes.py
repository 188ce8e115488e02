"""Classes in calculate_metrics.py: distances by class, equal names on both sides, and early refusals."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from edm2kit.cli import metrics as calculate_metrics
from edm2kit.cli.image_source import image_classes, image_labels, open_images
from tests.support.fakes import tiny_snapshot
from tests.support.pictures import encoded, picture, write_folder

CLASSES = ("ape", "bee", "cat")


def files(names, start, each=6):
    return {
        f"{name}/{k}.png": encoded(picture(start + 10 * n + k)) for n, name in enumerate(names) for k in range(each)
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    write_folder(folder / "real", files(CLASSES, 0))
    write_folder(folder / "fake", files(("bee", "cat"), 100))  # without apes: bee is its class 0
    write_folder(folder / "dogs", files(("bee", "dog"), 100))
    write_folder(folder / "plain", {f"{k}.png": encoded(picture(k)) for k in range(12)})
    tiny_snapshot(folder / "net")
    tiny_snapshot(folder / "uncond", label_dim=0)
    code, output = run("ref", "--data", folder / "real", "--dest", folder / "ref.npz", "--metrics", "fd_random")
    assert code == 0, output
    return folder


def run(*words):
    result = CliRunner().invoke(calculate_metrics.main, [str(word) for word in words] + ["--device", "cpu"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def score(place, *words, num=12, real="real", code=0):
    common = ["--ref", place / "ref.npz", "--num", num, "--real", place / real, "--record", place / "out.json"]
    found, output = run(*words, *common)
    assert found == code, output
    return output


def test_equal_names_are_equal_classes(place):
    real = image_labels(open_images(place / "real"))
    assert real.class_names == CLASSES
    assert image_classes(open_images(place / "fake"), real.class_names).tolist() == [1] * 6 + [2] * 6
    with pytest.raises(ValueError, match="class 'dog', which the real images lack"):
        image_classes(open_images(place / "dogs"), real.class_names)
    assert image_classes(open_images(place / "plain"), real.class_names) is None


def test_labels_in_an_npz_of_generate_and_in_arrays_are_found(tmp_path):
    pixels = np.zeros((4, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.array([3, 1, 0, 1]))
    assert image_classes(open_images(tmp_path / "a.npz")).tolist() == [3, 1, 0, 1]
    np.savez(tmp_path / "b.npz", images=pixels)
    assert image_classes(open_images(tmp_path / "b.npz")) is None
    np.savez(tmp_path / "c.npz", images=pixels, labels=np.array([3, 1]))
    with pytest.raises(ValueError, match=r"`labels` has shape \[2\]; expected \[4\]"):
        image_classes(open_images(tmp_path / "c.npz"))


def test_distances_by_class_are_printed_and_recorded(place):
    output = score(place, "calc", "--images", place / "fake", "--per-class", "--num", 12)
    lines = [line.split() for line in output.splitlines()]
    assert ["class", "images", "real", "fd_random"] in lines
    table = {line[1]: line for line in lines if line[:2] in (["1", "bee"], ["2", "cat"])}
    record = json.loads((place / "out.json").read_text())
    (by_class,) = record["by_class"].values()
    assert list(by_class) == ["1 bee", "2 cat"]
    for name in ("bee", "cat"):
        one = next(found for title, found in by_class.items() if title.endswith(name))
        assert table[name][2:4] == [str(one["num_images"]), str(one["num_real"])]
        assert float(table[name][4]) == pytest.approx(one["distances"]["fd_random"], rel=1e-5)
        assert one["num_images"] == 6
    assert "far too large" in output
    assert "| 1 bee | 6 |" in (place / "out.md").read_text()


def test_a_network_with_classes_is_scored_by_class(place):
    score(place, "gen", "--net", place / "net", "--steps", 2, "--class", "1,2", "--per-class")
    (by_class,) = json.loads((place / "out.json").read_text())["by_class"].values()
    assert [one["num_images"] for one in by_class.values()] == [6, 6]


@pytest.mark.parametrize(
    ("words", "real", "reason"),
    [
        (["calc", "--images", "plain", "--per-class"], "real", "--per-class needs the classes of generated images"),
        (["calc", "--images", "fake", "--per-class"], "plain", "--per-class needs real images with classes"),
        (["calc", "--images", "dogs", "--per-class"], "real", "class 'dog', which the real images lack"),
        (["calc", "--images", "plain", "--metrics", "knn_agreement"], "real", "needs the classes of generated"),
        (["gen", "--net", "uncond", "--per-class"], "real", "unconditional"),
        (["gen", "--net", "uncond", "--metrics", "fd_random.knn_agreement"], "real", "unconditional"),
        (["gen", "--net", "net", "--per-class"], "plain", "--per-class needs real images with classes"),
    ],
)
def test_missing_classes_are_refused_before_work(place, monkeypatch, words, real, reason):
    def reached(*arguments):
        raise AssertionError("images were read or generated")

    monkeypatch.setattr(calculate_metrics, "_score", reached)
    monkeypatch.chdir(place)
    assert reason in score(place, *words, real=real, code=1).replace("\n", " ")
