"""References in calculate_metrics.py: several of them, of another crop or size, and what is refused before work."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

from edm2kit.cli import metrics as calculate_metrics
from edm2kit.metrics.reference import load_reference
from tests.support.fakes import tiny_snapshot
from tests.support.pictures import encoded, picture, some_files, write_folder

NUM = 12


def converted(folder, transform):
    """A folder as dataset_tool.py writes it."""
    write_folder(folder, some_files(NUM))
    settings = {"transform": transform, "resolution": [32, 32]}
    (folder / "dataset.json").write_text(json.dumps({"labels": None, "settings": settings}))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("references")
    converted(folder / "adm", "center-crop-dhariwal")
    converted(folder / "plain", "center-crop")
    converted(folder / "unknown", "none")
    write_folder(folder / "fake", {f"{k:06d}.png": encoded(picture(100 + k)) for k in range(NUM)})
    (folder / "large").mkdir()
    for k in range(NUM):
        picture(k).resize((64, 64)).save(folder / "large" / f"{k}.png")
    tiny_snapshot(folder / "net")
    for name in ("adm", "plain"):
        run("ref", "--data", folder / name, "--dest", folder / f"{name}.npz", "--metrics", "fd_random")
    return folder


def run(*words, code=0):
    result = CliRunner().invoke(calculate_metrics.main, [str(word) for word in words] + ["--device", "cpu"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return result.output.replace("\n", " ")


def calc(place, *words, ref="adm.npz", images="fake", code=0):
    return run("calc", "--images", place / images, "--ref", place / ref, "--num", NUM, *words, code=code)


def test_a_reference_remembers_the_crop(place):
    assert load_reference(place / "adm.npz").source["crop"] == "center-crop-dhariwal to 32x32"
    run("ref", "--data", place / "unknown", "--dest", place / "u.npz", "--metrics", "fd_random")
    assert "crop" not in load_reference(place / "u.npz").source


def test_images_of_another_crop_than_the_reference_are_warned_of(place):
    warning = "was made with center-crop to 32x32, the images of the reference with center-crop-dhariwal to 32x32"
    assert warning in calc(place, images="plain")
    shown = calc(place, "--real", place / "plain")
    assert f"--real {place / 'plain'}, compared with {place / 'adm.npz'}, {warning}" in shown
    assert "was made with" not in calc(place, "--real", place / "adm", images="adm")
    assert "was made with" not in calc(place, "--real", place / "unknown")
    # each of several references counts
    assert "was made with" in calc(place, "--real", place / "adm", "--ref", place / "plain.npz")


def test_real_images_of_another_size_are_warned_of(place):
    assert "has images of [64, 64] pixels" in calc(place, "--real", place / "large", "--metrics", "fd_random.kid")


def test_several_references_work_with_generated_images_and_may_share_a_file_name(place):
    (place / "other").mkdir(exist_ok=True)
    shutil.copy(place / "plain.npz", place / "other" / "plain.npz")
    record = place / "out.json"
    run("gen", "--net", place / "net", "--steps", 2, "--num", NUM, "--record", record, "--bootstrap", 0,
        "--ref", place / "adm.npz", "--ref", place / "plain.npz", "--ref", place / "other" / "plain.npz")  # fmt: skip
    results = json.loads(record.read_text())["results"]
    assert list(results) == ["fd_random", *(f"fd_random@{place / name}" for name in ("plain.npz", "other/plain.npz"))]
    assert len({result["min"] for result in results.values()}) == 1  # equal images
    run("gen", "--net", place / "net", "--steps", 2, "--num", NUM, "--record", record,
        "--ref", place / "adm.npz", "--ref", place / "plain.npz")  # fmt: skip
    assert list(json.loads(record.read_text())["results"]) == ["fd_random", "fd_random@plain.npz"]


def test_references_are_checked_before_work(place, monkeypatch):
    def reached(*arguments):
        raise AssertionError("images were read")

    monkeypatch.setattr(calculate_metrics, "image_features", reached)
    monkeypatch.setattr(calculate_metrics, "_score", reached)
    assert "is given twice" in calc(place, "--ref", place / "adm.npz", code=1)
    np.savez(place / "old.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    shown = calc(place, "--ref", place / "old.npz", code=1)
    assert f"--ref {place / 'old.npz'}: the reference has no fd_random" in shown
    shown = calc(place, "--real", place / "adm", "--metrics", "fd_random.ct", code=1)
    assert "ct needs heldout images; give --heldout PATH" in shown
