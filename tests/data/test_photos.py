"""Photos as cameras and phones store them: turned, in other colors, as HEIC, among videos; the size of the result."""

import io
import json
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from click.testing import CliRunner
from PIL import Image, ImageCms

from edm2kit.cli import image_source
from edm2kit.cli.image_source import open_images
from edm2kit.cli.metrics import main as calculate_metrics
from edm2kit.data import convert as data_convert
from edm2kit.data import image_files, output
from edm2kit.data.dataset import ImageDataset, open_source
from edm2kit.data.image_files import open_image
from tests.support.dataset_tool import convert, run
from tests.support.fakes import tiny_vae
from tests.support.pictures import encoded, picture, write_folder

CROP = ("--resolution", 16, "--transform", "center-crop")
SKY, GROUND, LEFT = (40, 90, 220), (60, 160, 50), (220, 200, 40)
# EXIF orientation -> how a phone that reports it has stored an upright picture
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def portrait() -> Image.Image:
    """A portrait photo: sky above, ground below, something yellow on the left."""
    image = Image.new("RGB", (48, 64), SKY)
    image.paste(GROUND, (0, 32, 48, 64))
    image.paste(LEFT, (0, 24, 12, 40))
    return image


def phone_photo(orientation: int, kind: str = "jpeg", image: Image.Image | None = None) -> bytes:
    """The portrait, or another image, as a file that a phone stores turned.

    PNG files have an eXIf chunk, and HEIC files the properties irot and imir, which count there instead of EXIF.
    """
    image, turn = image or portrait(), STORED[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    (image if turn is None else image.transpose(turn)).save(file, kind, quality=95, exif=exif.tobytes())
    return file.getvalue()


def turned_photos(folder: Path, kind: str, suffix: str, image: Image.Image | None = None) -> Path:
    """A folder with the portrait, or another image, in all eight orientations."""
    return write_folder(folder, {f"0/{k}{suffix}": phone_photo(k, kind, image) for k in STORED})


def is_upright(pixels: np.ndarray) -> bool:
    """Whether sky, ground and the yellow thing are where they belong; uint8 [3, 16, 16]."""
    places = {(1, 8): SKY, (14, 8): GROUND, (8, 1): LEFT}
    found = [np.abs(pixels[:, y, x].astype(int) - color).max() < 40 for (y, x), color in places.items()]
    return all(found)


def test_portrait_photos_of_a_phone_become_upright(tmp_path):
    source = write_folder(tmp_path / "photos", {f"{k}.jpg": phone_photo(k) for k in STORED})
    said = convert(source, tmp_path / "out.zip", "--resolution", 16, "--transform", "center-crop")
    assert "7 of 8 sampled images are stored turned or mirrored; they become upright (EXIF)" in said
    pictures = [ImageDataset(tmp_path / "out.zip")[k][0] for k in range(8)]
    assert [is_upright(picture) for picture in pictures] == [True] * 8
    options = ["--resolution", 16, "--transform", "center-crop", "--as-stored"]
    said = convert(source, tmp_path / "stored.zip", *options)
    assert "Warning: 7 of 8 sampled images stay turned or mirrored" in said
    stored = [is_upright(ImageDataset(tmp_path / "stored.zip")[k][0]) for k in range(8)]
    assert stored == [True] + [False] * 7


def test_training_directly_on_photos_sees_what_a_converted_copy_holds(tmp_path):
    image = portrait().resize((16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.transpose(Image.Transpose.ROTATE_90).save(file, "jpeg", exif=exif)
    source = write_folder(tmp_path / "photos", {"00000/img00000000.jpg": file.getvalue()})
    convert(source, tmp_path / "out")
    direct, converted = open_source(source), open_source(tmp_path / "out")
    np.testing.assert_array_equal(direct[0][0], converted[0][0])
    assert is_upright(direct[0][0])


KINDS = [("jpeg", ".jpg"), ("png", ".png"), ("webp", ".webp"), ("tiff", ".tif"), ("heif", ".heic")]


@pytest.mark.parametrize(("kind", "suffix"), KINDS)
def test_all_eight_orientations_become_upright_in_every_kind_of_file(tmp_path, kind, suffix):
    pillow_heif.register_heif_opener()
    source = turned_photos(tmp_path / "photos", kind, suffix)
    convert(source, tmp_path / "out", *CROP)
    dataset = ImageDataset(tmp_path / "out")
    assert [is_upright(dataset[k][0]) for k in range(8)] == [True] * 8
    # what is scored, and made into statistics
    scored = open_images(source)
    assert {scored.read(k).shape for k in range(8)} == {(3, 64, 48)}
    square = [np.asarray(Image.fromarray(scored.read(k).transpose(1, 2, 0)).resize((16, 16))) for k in range(8)]
    assert [is_upright(pixels.transpose(2, 0, 1)) for pixels in square] == [True] * 8


@pytest.mark.parametrize(("kind", "suffix"), [("jpeg", ".jpg"), ("png", ".png")])
def test_all_eight_orientations_are_trained_on_upright_without_convert(tmp_path, kind, suffix):
    source = open_source(turned_photos(tmp_path / "photos", kind, suffix, portrait().resize((16, 16))))
    together = source.read(np.arange(8))
    assert [is_upright(pixels) for pixels in together] == [True] * 8
    assert [is_upright(source[k][0]) for k in range(8)] == [True] * 8


def test_latents_and_statistics_of_turned_photos_are_those_of_upright_ones(tmp_path):
    upright = write_folder(tmp_path / "upright", {f"0/{k}.png": phone_photo(1, "png", picture(k)) for k in STORED})
    turned = write_folder(tmp_path / "turned", {f"0/{k}.png": phone_photo(k, "png", picture(k)) for k in STORED})
    vae, latents = str(tiny_vae(tmp_path / "vae")), []
    for source in (upright, turned):
        dest = tmp_path / f"{source.name}-latents"
        run("encode", "--source", source, "--dest", dest, "--vae", vae, "--device", "cpu")
        latents.append(ImageDataset(dest).read(np.arange(8)))
    np.testing.assert_array_equal(*latents)
    words = ["--metrics", "fd_random", "--device", "cpu"]
    reference, record = tmp_path / "ref.npz", tmp_path / "card.json"
    measure("ref", "--data", turned, "--dest", reference, *words)
    measure("calc", "--images", upright, "--ref", reference, "--num", 8, "--real", turned, "--bootstrap", 0,
            "--metrics", "fd_random,fd_random.precision", "--record", record, "--device", "cpu")  # fmt: skip
    found = {name: entry["mean"] for name, entry in json.loads(record.read_text())["results"].items()}
    assert found["fd_random"] == pytest.approx(0, abs=1e-6)
    assert found["fd_random.precision"] == 1


def measure(*words: object) -> str:
    done = CliRunner().invoke(calculate_metrics, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


def swapped_profile() -> bytes:
    """A color profile whose red is sRGB's blue, and the other way around."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile = bytearray(bytes(profile).replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be")))
    count = int.from_bytes(profile[128:132], "big")
    tags = {bytes(profile[k : k + 4]): k + 4 for k in range(132, 132 + 12 * count, 12)}
    red, blue = tags[b"rXYZ"], tags[b"bXYZ"]
    profile[red : red + 8], profile[blue : blue + 8] = profile[blue : blue + 8], profile[red : red + 8]
    return bytes(profile)


def with_profile(image: Image.Image, profile: bytes) -> bytes:
    file = io.BytesIO()
    image.save(file, "png", icc_profile=profile)
    return file.getvalue()


def test_colors_are_converted_to_srgb():
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    data = with_profile(red, swapped_profile())
    assert np.abs(np.asarray(open_image(data, "x"))[0, 0].astype(int) - (0, 0, 255)).max() <= 2
    assert open_image(data, "x", as_stored=True).getpixel((0, 0)) == (255, 0, 0)
    transparent = with_profile(red.convert("RGBA"), swapped_profile())
    assert open_image(transparent, "x").getpixel((0, 0))[2] >= 253


def test_srgb_damaged_profiles_and_grey_stay_what_they_are():
    red = Image.new("RGB", (4, 4), (200, 10, 30))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"not a profile"):
        assert open_image(with_profile(red, profile), "x").getpixel((0, 0)) == (200, 10, 30)
    grey = Image.new("L", (4, 4), 100)
    assert open_image(with_profile(grey, swapped_profile()), "x").getpixel((0, 0)) == 100  # not for grey images


def test_photos_in_other_colors_are_reported(tmp_path):
    files = {
        "0.png": with_profile(Image.new("RGB", (8, 8), (255, 0, 0)), swapped_profile()),
        "1.png": encoded(portrait().resize((8, 8))),
    }
    said = convert(write_folder(tmp_path / "photos", files), tmp_path / "out")
    assert "1 of 2 sampled images have another color profile; they are converted to sRGB" in said


@pytest.fixture
def heic_photos(tmp_path):
    pillow_heif.register_heif_opener()
    files = {"b.png": encoded(portrait()), "note.txt": b"x", "clip.MOV": b"x", "clip2.mp4": b"x"}
    source = write_folder(tmp_path / "photos", files)
    portrait().save(source / "a.heic", quality=95)
    return source


def test_heic_photos_are_read_and_other_files_are_listed_once(tmp_path, heic_photos):
    said = convert(heic_photos, tmp_path / "out", *CROP)
    assert "Ignoring 3 other files: 2 videos (such as clip.MOV), 1 .txt (such as note.txt)" in said
    assert said.count("clip") == 1
    for name in ("clip2.mp4", "note.txt"):
        (heic_photos / name).unlink()
    assert "Ignoring 1 other file: 1 video (such as clip.MOV)" in convert(heic_photos, tmp_path / "again", *CROP)
    dataset = ImageDataset(tmp_path / "out")
    assert [is_upright(dataset[k][0]) for k in range(2)] == [True, True]


def test_without_the_package_heic_photos_are_refused_in_one_line(tmp_path, heic_photos, monkeypatch):
    for module in (data_convert, image_files):
        monkeypatch.setattr(module, "heif_is_readable", lambda: False)
    said = convert(heic_photos, tmp_path / "out", *CROP, code=1)
    assert said.strip().endswith(
        "1 HEIC photos, such as a.heic, need the package pillow-heif: pip install 'edm2kit[heic]'. Or use "
        "--skip-broken to leave them out"
    )
    said = convert(heic_photos, tmp_path / "out", *CROP, "--skip-broken")
    assert "Warning: 1 of them are images of types that are not read" in said
    assert len(ImageDataset(tmp_path / "out")) == 1
    (heic_photos / "b.png").unlink()
    assert "1 HEIC photos" in convert(heic_photos, tmp_path / "none", *CROP, code=1)


def test_heic_photos_are_scored_or_refused_and_other_types_are_reported(heic_photos, monkeypatch, capsys):
    write_folder(heic_photos, {"c.avif": b"x"})
    assert len(open_images(heic_photos)) == 2
    assert "1 images of types that are not read are left out, such as c.avif" in capsys.readouterr().err
    monkeypatch.setattr(image_source, "heif_is_readable", lambda: False)
    with pytest.raises(ValueError, match=r"photos: 1 HEIC photos, such as a\.heic, need the package pillow-heif"):
        open_images(heic_photos)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_size_is_announced_before_it_is_written(tmp_path, channels):
    mode = "L" if channels == 1 else "RGB"
    files = {f"{k}.png": encoded(portrait().convert(mode)) for k in range(20)}
    said = convert(write_folder(tmp_path / "photos", files), tmp_path / "out.zip", "--resolution", 64, *CROP[2:])
    (line,) = [line for line in said.splitlines() if "will be" in line]
    announced = float(line.split("will be ")[1].split(" ")[0])
    real = (tmp_path / "out.zip").stat().st_size / 1000
    assert announced == pytest.approx(real, rel=0.05)


def test_a_disk_that_is_too_small_is_noticed_before_the_work(tmp_path, monkeypatch):
    source = write_folder(tmp_path / "photos", {"0.png": encoded(portrait())})
    monkeypatch.setattr(output, "free_bytes", lambda folder: 500)
    said = convert(source, tmp_path / "out", *CROP, code=1)
    assert "but 0.5 KB are free on its disk; compress the images (--store compact)" in said
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_compact_storage_holds_the_same_pixels_in_less_space(tmp_path):
    source = write_folder(tmp_path / "photos", {f"{k}.png": encoded(portrait()) for k in range(3)})
    convert(source, tmp_path / "plain.zip", *CROP)
    said = convert(source, tmp_path / "compact.zip", *CROP, "--store", "compact")
    assert "will be smaller than" in said
    plain, compact = ImageDataset(tmp_path / "plain.zip"), ImageDataset(tmp_path / "compact.zip")
    np.testing.assert_array_equal(plain.read(np.arange(3)), compact.read(np.arange(3)))
    assert (tmp_path / "compact.zip").stat().st_size < (tmp_path / "plain.zip").stat().st_size
    assert compact.needs_decoding
    assert not plain.needs_decoding
    assert "nothing to do" in convert(source, tmp_path / "compact.zip", *CROP, "--store", "compact")
    assert "store" in convert(source, tmp_path / "compact.zip", *CROP, code=1)


def test_enlarged_images_are_reported_and_recorded(tmp_path):
    files = {"0.png": encoded(portrait()), "1.png": encoded(portrait().resize((12, 16)))}
    said = convert(write_folder(tmp_path / "photos", files), tmp_path / "out", "--resolution", 32, *CROP[2:])
    assert "Warning: 1 of 2 sampled images are smaller than 32 pixels and are enlarged" in said
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["enlarged"] == 0.5
    convert(tmp_path / "photos", tmp_path / "small", "--resolution", 8, *CROP[2:])
    assert "enlarged" not in json.loads((tmp_path / "small" / "dataset.json").read_text())
