"""Images to score, from folders, zips, .npz files and arrays."""

import json
import re
import threading
import unicodedata
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from edm2kit.cli.image_source import class_numbers, image_batches, image_labels, open_images
from edm2kit.cli.npz import write_npz
from edm2kit.conditions import parse_classes
from edm2kit.torch_utils import dist
from tests.support.hostile_arrays import HOSTILE
from tests.support.pictures import encoded, npy, picture, some_files, write_folder, write_zip


def all_images(path, batch_size=4, workers=2, indices=None):
    images = open_images(path)
    return torch.cat(
        list(image_batches(images, range(len(images)) if indices is None else indices, batch_size, workers))
    )


def expected(files):
    return torch.stack([torch.from_numpy(np.array(picture(k))).permute(2, 0, 1) for k in range(len(files))])


@pytest.mark.parametrize("write", [write_folder, write_zip])
def test_folder_and_zip_in_the_order_of_names_whatever_else_lies_there(tmp_path, write):
    files = some_files(10)
    others = {"dataset.json": b"{}", "generation.json": b"{}", "readme.txt": b"x", ".hidden.png": b"x"}
    path = write(tmp_path / "images.zip", dict(reversed({**files, **others}.items())))
    assert torch.equal(all_images(path), expected(files))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("workers", [1, 7])
def test_batches_and_workers_change_nothing(tmp_path, batch_size, workers):
    files = some_files(10)
    path = write_folder(tmp_path / "images", files)
    assert torch.equal(all_images(path, batch_size, workers), expected(files))
    assert torch.equal(all_images(path, batch_size, workers, [7, 2, 2]), expected(files)[[7, 2, 2]])


def test_any_mode_becomes_rgb(tmp_path):
    files = {f"{mode}.png": encoded(picture(0, mode=mode)) for mode in ("L", "RGB", "RGBA", "LA", "1")}
    images = all_images(write_folder(tmp_path / "images", {**files, "x.jpg": encoded(picture(0), "jpeg")}))
    assert images.shape == (6, 3, 8, 8)
    grey = images[list(sorted([*files, "x.jpg"])).index("L.png")]
    assert torch.equal(grey[0], grey[2])


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_of_generate(tmp_path, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (10, channels, 6, 5), np.uint8)
    write_npz(tmp_path / "images.npz", range(10), [(one, None) for one in pixels])
    images = all_images(tmp_path / "images.npz")
    assert torch.equal(images, torch.from_numpy(pixels).expand(-1, 3, -1, -1))


def test_npz_of_numpy(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (10, 6, 5, 3), np.uint8)
    np.savez(tmp_path / "images.npz", labels=np.arange(10), images=pixels)
    assert torch.equal(all_images(tmp_path / "images.npz").permute(0, 2, 3, 1), torch.from_numpy(pixels))


def saved(path, save=np.savez, **arrays):
    with open(path, "wb") as file:
        save(file, **arrays)
    return path


@pytest.mark.parametrize(
    ("arrays", "save", "reason"),
    [
        ({"x": np.zeros((2, 4, 4, 3), np.uint8)}, np.savez, "no array of images"),
        ({"images": np.zeros((2, 4, 4, 3), np.float32)}, np.savez, r"float32 \[2, 4, 4, 3\]"),
        ({"images": np.zeros((2, 4, 4), np.uint8)}, np.savez, r"uint8 \[2, 4, 4\]"),
        ({"images": np.zeros((2, 3, 4, 4), np.uint8)}, np.savez, r"expected uint8 \[N, H, W, 1 or 3\]"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8)}, np.savez_compressed, "compressed"),
        ({"images": np.array([None])}, np.savez, "objects"),
        ({"images": np.zeros((0, 4, 4, 3), np.uint8)}, np.savez, r"images\.npz: `images` is .* contains no images"),
    ],
)
def test_other_npz_is_refused(tmp_path, arrays, save, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        open_images(saved(tmp_path / "images.npz", save, **arrays))
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_in_an_npz_is_found(tmp_path):
    path = saved(tmp_path / "images.npz", images=np.zeros((20, 8, 8, 3), np.uint8))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"images\.npz: contains no array of images, or is damaged: .*CRC"):
        open_images(path)


def test_cut_npz_is_refused(tmp_path):
    path = saved(tmp_path / "images.npz", images=np.zeros((20, 8, 8, 3), np.uint8))
    whole = path.read_bytes()
    for count in (0, 50, 1000, len(whole) - 30):
        path.write_bytes(whole[:count])
        with pytest.raises(ValueError, match=r"images\.npz"):
            open_images(path)


def damaged(name):
    files = some_files(6)
    key = list(files)[4]
    content = {
        "cut": files[key][:-40],
        "text": b"no image",
        "empty": b"",
        "larger": encoded(picture(0, (16, 8))),
    }[name]
    return {**files, key: content}, key


@pytest.mark.parametrize("write", [write_folder, write_zip])
@pytest.mark.parametrize(
    ("name", "reason"),
    [("cut", "cut short"), ("text", "is not an image"), ("empty", "is not an image"), ("larger", "16x8 pixels")],
)
def test_a_bad_image_is_named(tmp_path, write, name, reason):
    files, key = damaged(name)
    path = write(tmp_path / "images.zip", files)
    with pytest.raises(ValueError, match=reason) as caught:
        all_images(path)
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)


def test_latents_are_refused(tmp_path):
    path = write_folder(tmp_path / "latents", {"0.npy": npy(np.zeros((8, 4, 4), np.float32))})
    with pytest.raises(ValueError, match=r"0\.npy, which is not an image"):
        open_images(path)


@pytest.mark.parametrize(
    ("files", "reason"), [(None, "no such file"), ({}, "contains no images"), ({"a.txt": b"x"}, "such as a.txt")]
)
def test_nothing_to_read_is_refused(tmp_path, files, reason):
    path = tmp_path / "images"
    if files is not None:
        path.mkdir()
        write_folder(path, files)
    with pytest.raises(ValueError, match=reason):
        open_images(path)


class Watched:
    """Images that note which of them were asked for."""

    def __init__(self, images):
        self.images, self.asked = images, []

    def where(self, index):
        return self.images.where(index)

    def read(self, index):
        self.asked.append(index)
        return self.images.read(index)


def test_no_more_than_a_few_batches_are_read_ahead(tmp_path):
    images = Watched(open_images(write_folder(tmp_path / "images", some_files(30))))
    batches = image_batches(images, range(30), 2, 2)
    next(batches)
    assert len(images.asked) <= 1 + 3 * 2
    batches.close()


@pytest.mark.parametrize("stuck", [0, 3])
def test_an_image_that_is_never_read_is_named(tmp_path, stuck):
    images, answer = open_images(write_folder(tmp_path / "images", some_files(5))), threading.Event()

    class Stuck(Watched):
        def read(self, index):
            if index == stuck:
                answer.wait()
            return super().read(index)

    name = re.escape(f"{images.where(stuck)}: not done after 0 s; its disk may not answer. Run the same command again")
    with dist.waiting_at_most(0.1), pytest.raises(ValueError, match=name):
        list(image_batches(Stuck(images), range(5), 2, 2))
    answer.set()


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_npz_is_refused_in_one_line(tmp_path, case):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", HOSTILE[case][0])
    with pytest.raises(ValueError, match=r"a\.npz: contains no array of images, or is damaged") as error:
        open_images(tmp_path / "a.npz")
    assert "\n" not in str(error.value)


def test_arrays_are_scored_like_image_files(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8), np.uint8)
    np.save(tmp_path / "x.npy", pixels)
    images = open_images(tmp_path / "x.npy")
    (batch,) = image_batches(images, range(5), 8, workers=2)
    np.testing.assert_array_equal(batch.numpy(), pixels.repeat(3, axis=1))
    assert images.where(3) == f"{tmp_path / 'x.npy'}[3]"
    np.save(tmp_path / "y.npy", np.zeros((2, 8, 4, 4), np.float32))
    with pytest.raises(ValueError, match=r"y\.npy: contains latents; metrics compare images, not latents"):
        open_images(tmp_path / "y.npy")


def test_folders_of_a_thousand_seeds_are_not_classes(tmp_path):
    for name, noted in (("000000/000000.png", "4"), ("001000/001000.png", "2")):
        (tmp_path / name).parent.mkdir()
        info = PngInfo()
        info.add_text("class", noted)
        Image.new("RGB", (8, 8)).save(tmp_path / name, pnginfo=info)
    (tmp_path / "generation.json").write_text("{}")
    assert open_images(tmp_path).labels().values.tolist() == [4, 2]


@pytest.mark.parametrize(
    ("resolution", "text"), [([64, 64], "64x64"), (5, "5"), (None, "None"), ("a", "a"), ({"a": 1}, "{'a': 1}")]
)
def test_a_record_of_any_type_names_the_crop(tmp_path, resolution, text):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    settings = {"transform": "center-crop", "resolution": resolution}
    (tmp_path / "dataset.json").write_text(json.dumps({"settings": settings}))
    assert open_images(tmp_path).crop() == f"center-crop to {text}"


def test_classes_beside_images_of_another_project_are_kept(tmp_path):
    pixels = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)
    np.savez(tmp_path / "adm.npz", pixels, np.array([4, 0, 4]))  # as ADM's image_sample.py
    np.savez(tmp_path / "named.npz", arr_0=pixels, labels=np.array([1, 2, 3]))
    np.savez(tmp_path / "reference.npz", arr_0=pixels, mu=np.zeros(2), sigma=np.zeros([2, 2]))
    assert image_labels(open_images(tmp_path / "adm.npz")).values.tolist() == [4, 0, 4]
    assert image_labels(open_images(tmp_path / "named.npz")).values.tolist() == [1, 2, 3]
    assert image_labels(open_images(tmp_path / "reference.npz")) is None


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"samples": np.zeros([2, 4, 4, 3], np.uint8)}, "it holds samples; expected `images` or `arr_0`"),
        ({"arr_0": np.zeros([2, 4, 4, 3], np.float32)}, r"`arr_0` is float32 \[2, 4, 4, 3\]; expected uint8"),
        ({"arr_0": np.zeros([2, 3, 4, 4], np.uint8)}, r"`arr_0` is uint8 \[2, 3, 4, 4\]; expected uint8 \[N, H, W"),
        ({"arr_0": np.zeros([0, 4, 4, 3], np.uint8)}, "it contains no images"),
        ({}, "it holds nothing; expected `images` or `arr_0`"),
    ],
)
def test_an_npz_without_images_says_what_it_holds(tmp_path, arrays, reason):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=rf"a\.npz: .*{reason}"):
        open_images(tmp_path / "a.npz")


def test_images_of_generate_are_read_whatever_the_suffix(tmp_path):
    write_npz(tmp_path / "images", [7], [(np.full([3, 4, 4], 9, np.uint8), 2)])
    assert open_images(tmp_path / "images").read(0).mean() == 9


def test_names_of_classes_are_the_same_with_either_kind_of_accent():
    composed, apart = (unicodedata.normalize(form, "\u00e9t\u00e9") for form in ("NFC", "NFD"))
    assert class_numbers(("zebra", apart), ("zebra", composed), [0, 1]) is None
    assert class_numbers((apart,), ("zebra", composed), [0]).tolist() == [1]
    assert parse_classes(composed, 2, ("zebra", apart)) == (1,)
    with pytest.raises(ValueError, match="several classes are called"):
        parse_classes("e\u0301", 2, ("\u00e9", "\u00e9"))


def test_arrays_with_channels_last_say_so(tmp_path):
    (tmp_path / "a.NPY").write_bytes(npy(np.zeros([2, 8, 8, 3], np.uint8)))
    with pytest.raises(ValueError, match=r"\[2, 8, 8, 3\], with channels last; .* images\.transpose\(0, 3, 1, 2\)"):
        open_images(tmp_path / "a.NPY")
    (tmp_path / "b.NPY").write_bytes(npy(np.zeros([2, 3, 8, 8], np.uint8)))
    assert len(open_images(tmp_path / "b.NPY")) == 2
