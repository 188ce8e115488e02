"""Folders of generated images, and when their images are reused."""

import json
import re
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from edm2kit.cli.click_types import IntRanges
from edm2kit.cli.generate import RECORD, ImageFolder, seed_ranges
from edm2kit.cli.npz import write_npz
from edm2kit.data.image_files import contact_sheet
from edm2kit.models.encoders import to_image
from edm2kit.sampling.engine import ImageBatch
from edm2kit.torch_utils import dist, file_threads

SETTINGS = {"net": {"sha256": "abc"}, "guidance": {"weight": 2.0}}


def batch(seeds, channels=3, classes=True):
    pixels = np.random.default_rng(0).integers(0, 256, [len(seeds), channels, 4, 6], dtype=np.uint8)
    index = torch.tensor([seed % 5 for seed in seeds]) if classes else None
    return ImageBatch(tuple(seeds), index, torch.zeros(len(seeds), 1), torch.from_numpy(pixels))


def filled(path, seeds=(0, 1, 2), subdirs=False, settings=SETTINGS, channels=3):
    folder = ImageFolder(path, subdirs, settings)
    folder.claim(seeds, overwrite=False)
    folder.note_run({"seeds": seed_ranges(seeds)})
    folder.save([batch(seeds, channels)], seeds)
    return folder


@pytest.mark.parametrize("channels", [1, 3])
def test_images_and_classes_read_back_as_they_were(tmp_path, channels):
    folder = filled(tmp_path, (7, 1200), subdirs=True, channels=channels)
    assert folder.file(7) == tmp_path / "000000" / "000007.png"
    assert folder.file(1200) == tmp_path / "001000" / "001200.png"
    made = batch((7, 1200), channels)
    pixels, classes = zip(*folder.read((7, 1200)), strict=True)
    assert np.array_equal(np.stack(pixels), made.images.numpy())
    assert list(classes) == made.classes.tolist()
    assert Image.open(folder.file(7)).mode == ("L" if channels == 1 else "RGB")


def test_images_of_no_class_have_none(tmp_path):
    folder = ImageFolder(tmp_path, False, SETTINGS)
    folder.save([batch([3], classes=False)], [3])
    assert next(folder.read([3]))[1] is None


def test_an_image_that_cannot_be_written_is_named_and_given_up(tmp_path, monkeypatch, capsys):
    answer, written, write = threading.Event(), threading.Semaphore(0), ImageFolder._write
    folder = ImageFolder(tmp_path, False, SETTINGS)

    def stuck(self, seed, *image):
        if seed == 2:
            answer.wait()  # as a disk that does not answer
        write(self, seed, *image)
        written.release()

    def batches():
        for seeds, before in (([0, 1], 0), ([2, 3], 2), ([4, 5], 1)):
            for _ in range(before):
                written.acquire()
            yield batch(seeds)

    monkeypatch.setattr(ImageFolder, "_write", stuck)
    monkeypatch.setattr(file_threads, "LOOK_SEC", 0.05)
    named = f"writing {folder.file(2)}: not done after 0 s; its disk may not answer"
    with dist.waiting_at_most(0.12), pytest.raises(ValueError, match=re.escape(f"{named}. Run the same command again")):
        folder.save(batches(), range(6))
    assert f"Warning: {named} (gives up after 0 s; see --timeout)" in capsys.readouterr().err
    assert {0, 1, 3}.isdisjoint(folder.missing(range(6)))
    assert not folder.file(4).exists()
    answer.set()


def test_what_is_generated_is_written_even_if_the_next_batch_fails(tmp_path):
    def batches():
        for start in range(0, 12, 6):
            yield batch(range(start, start + 6))
        raise ValueError("no memory left")

    folder = ImageFolder(tmp_path, False, SETTINGS)
    with pytest.raises(ValueError, match="no memory left"):
        folder.save(batches(), range(12))
    assert folder.missing(range(12)) == []


@pytest.mark.parametrize("damage", ["missing", "empty", "cut short", "one bit", "not an image"])
def test_an_incomplete_image_counts_as_missing(tmp_path, damage):
    folder = filled(tmp_path)
    assert folder.missing((0, 1, 2, 3)) == [3]
    whole = folder.file(1).read_bytes()
    if damage == "missing":
        folder.file(1).unlink()
    else:
        flipped = whole[:-30] + bytes([whole[-30] ^ 1]) + whole[-29:]
        contents = {"empty": b"", "cut short": whole[:-20], "one bit": flipped, "not an image": b"text"}
        folder.file(1).write_bytes(contents[damage])
    assert folder.missing((2, 1, 0)) == [1]


def test_the_same_settings_may_add_images_and_every_run_is_recorded(tmp_path):
    filled(tmp_path, (0, 1))
    filled(tmp_path, (2, 3))
    record = json.loads((tmp_path / RECORD).read_text())
    assert [run["seeds"] for run in record["runs"]] == ["0-1", "2-3"]
    assert record["settings"]["guidance"] == {"weight": 2.0}


@pytest.mark.parametrize(
    ("settings", "subdirs", "wrong"),
    [
        ({"net": {"sha256": "abc"}, "guidance": {"weight": 2.5}}, False, "guidance.weight 2.0, now 2.5"),
        ({"net": {"sha256": "abd"}, "guidance": {"weight": 2.0}}, False, 'net.sha256 "abc", now "abd"'),
        ({"net": {"sha256": "abc"}, "guidance": None}, False, "guidance .*, now null"),
        (SETTINGS, True, "subdirs false, now true"),
    ],
)
def test_other_settings_are_refused_with_what_differs(tmp_path, settings, subdirs, wrong):
    filled(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=wrong):
        ImageFolder(tmp_path, subdirs, settings).claim((5,), overwrite=False)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_images_without_a_record_are_nobodys(tmp_path):
    filled(tmp_path)
    (tmp_path / RECORD).unlink()
    with pytest.raises(ValueError, match=r"000001.png without generation.json"):
        ImageFolder(tmp_path, False, SETTINGS).claim((1, 9), overwrite=False)
    ImageFolder(tmp_path, False, SETTINGS).claim((9,), overwrite=False)


def test_overwriting_leaves_no_mixture(tmp_path):
    filled(tmp_path, (0, 1, 2), subdirs=True)
    other = ImageFolder(tmp_path, False, {"net": "another"})
    other.claim((0,), overwrite=True)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / RECORD]
    record = json.loads((tmp_path / RECORD).read_text())
    assert (record["settings"]["net"], record["runs"]) == ("another", [])


def test_overwriting_with_the_same_settings_keeps_other_seeds(tmp_path):
    folder = filled(tmp_path, (0, 1, 2))
    folder.claim((1,), overwrite=True)
    assert folder.missing((0, 1, 2)) == [1]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"settings": 1, "runs": []}', '{"settings": {}, "runs": [{}]}'])
def test_a_damaged_record_is_refused(tmp_path, text):
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(ValueError, match=r"generation.json is damaged"):
        ImageFolder(tmp_path, False, SETTINGS).claim((0,), overwrite=False)


def test_an_image_that_cannot_be_written_stops_the_run(tmp_path):
    (tmp_path / "000000").write_text("in the way of a folder")
    with pytest.raises(OSError, match="000000"):
        ImageFolder(tmp_path, True, SETTINGS).save([batch([0]), batch([1])], [0, 1])


@pytest.mark.parametrize("seeds", [[5], [0, 1, 2], [9, 3, 4, 5, 11, 10], list(range(100, 50, -1))])
def test_seed_ranges_read_back(seeds):
    assert list(IntRanges().convert(seed_ranges(seeds), None, None)) == sorted(seeds)


def test_a_contact_sheet_goes_row_by_row():
    images = [to_image(np.full([1, 2, 3], value, np.uint8)) for value in (10, 20, 30)]
    sheet = np.asarray(contact_sheet(images, columns=2))
    assert sheet.shape == (4, 6)
    assert sheet[::2, ::3].tolist() == [[10, 20], [30, 0]]


def test_an_npz_holds_what_the_folder_held(tmp_path):
    folder = filled(tmp_path / "parts", (4, 0, 9))
    write_npz(tmp_path / "all.npz", (9, 4), folder.read((9, 4)))
    with np.load(tmp_path / "all.npz") as arrays:
        assert arrays["images"].dtype == np.uint8
        assert arrays["images"].shape == (2, 4, 6, 3)
        assert np.array_equal(arrays["images"][1], np.asarray(Image.open(folder.file(4))))
        assert arrays["seeds"].tolist() == [9, 4]
        assert arrays["labels"].tolist() == [4, 4]


def test_a_damaged_part_stops_the_npz(tmp_path):
    folder = filled(tmp_path / "parts")
    folder.file(1).write_bytes(folder.file(1).read_bytes()[:60])
    with pytest.raises(ValueError, match=r"000001.png cannot be read"):
        write_npz(tmp_path / "all.npz", (0, 1, 2), folder.read((0, 1, 2)))
    assert not (tmp_path / "all.npz").exists()
