"""An output never replaces a file of another kind, and a place that cannot be written is found out before the work."""

import io
import json
import os
import shutil
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from edm2kit.cli.click_types import IntRanges, Size, check_output, check_writable, parse_duration_sec
from edm2kit.cli.dataset import main as dataset
from edm2kit.cli.flops import main as flops
from edm2kit.cli.generate import main as generate
from edm2kit.cli.generation import parse_classes
from edm2kit.cli.metrics import main as metrics
from edm2kit.cli.output_kinds import OUTPUT_KINDS, sheet_notes
from edm2kit.cli.phema import FloatSeries
from edm2kit.cli.phema import main as phema
from edm2kit.cli.report import main as report
from edm2kit.cli.train import main as train
from edm2kit.data.dataset import open_source
from edm2kit.torch_utils.files import sampled_sha256
from tests.support.fakes import tiny_snapshot
from tests.support.pictures import some_files, write_folder


def png_with_notes(notes):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=notes)
    return file.getvalue()


CONTENT = {
    "contact sheet": png_with_notes(sheet_notes()),
    "record of scores": b'{"results": {}}',
    "page of this program": b'<!doctype html>\n<html lang="en">\n<link rel="icon" href="data:,">',
    "safetensors file": b"\x02\0\0\0\0\0\0\0{}",
}
OTHERS = {
    "photo": png_with_notes(None),
    "labels": b'{"images": [], "annotations": []}',
    "list": b"[1]",
    "website": b"<!doctype html><title>mine</title>",
}


@pytest.mark.parametrize("kind", OUTPUT_KINDS)
def test_an_output_replaces_only_its_own_kind(tmp_path, kind):
    np.savez(tmp_path / "ref", mu=np.zeros(1))
    np.savez(tmp_path / "images", images=np.zeros(1))
    np.savez(tmp_path / "adm", arr_0=np.zeros(1), mu=np.zeros(1), mu_s=np.zeros(1))
    content = {
        **CONTENT,
        **OTHERS,
        "set of reference statistics": (tmp_path / "ref.npz").read_bytes(),
        "reference batch for ADM": (tmp_path / "adm.npz").read_bytes(),
        "set of generated images": (tmp_path / "images.npz").read_bytes(),
        "other": b"precious",
    }
    for found, data in content.items():
        (tmp_path / "x").write_bytes(data)
        if found == kind:
            check_output(tmp_path / "x", kind)
        else:
            with pytest.raises(ValueError, match=f"exists and is not a {kind}"):
                check_output(tmp_path / "x", kind)
    check_output(tmp_path / "new" / "x", kind)


def test_a_place_that_cannot_be_written_is_found_out_before_the_work(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="file is a file"):
        check_writable(tmp_path / "file" / "folder")
    (tmp_path / "link").symlink_to("nowhere")
    for path in (tmp_path / "link", tmp_path / "link" / "folder"):
        with pytest.raises(ValueError, match="link is a link to nowhere"):
            check_writable(path)
    with pytest.raises(ValueError, match="is a folder"):
        check_output(tmp_path, "record of scores")
    (tmp_path / "closed").mkdir(mode=0o500)
    if os.geteuid():
        with pytest.raises(ValueError, match="not writable"):
            check_writable(tmp_path / "closed")


def test_a_data_set_that_cannot_be_written_is_refused_before_its_source_is_read(tmp_path):
    (tmp_path / "file.zip").write_bytes(b"precious")
    (tmp_path / "link.zip").symlink_to(tmp_path / "nowhere.zip")
    for dest, reason in (("file.zip/set", "file.zip is a file"), ("link.zip", "is a link to nowhere")):
        arguments = ["convert", "--source", str(tmp_path / "absent"), "--dest", str(tmp_path / dest)]
        result = CliRunner().invoke(dataset, arguments)
        assert result.exit_code == 2
        assert reason in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.zip", "link.zip"]


def test_a_data_set_behind_a_link_is_written_there_and_a_volume_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    write_folder(tmp_path / "images", some_files(2))

    def convert(dest: str) -> Result:
        arguments = ["convert", "--source", tmp_path / "images", "--dest", tmp_path / dest, "--workers", 1]
        return CliRunner().invoke(dataset, list(map(str, arguments)))

    assert convert("link").exit_code == 0
    assert "nothing to do" in convert("link").output
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "00000" / "img00000000.png").exists()
    assert "set.tar.gz has the suffix of another kind of file; name a folder or a .zip" in convert("set.tar.gz").output
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "volume")
    assert "volume is a mounted volume, which cannot be replaced; name a folder in it" in convert("volume").output


@pytest.mark.parametrize("size", ["1048576", "16384x16384"])
def test_an_endless_resolution_is_refused_before_any_image_is_read(tmp_path, size):
    arguments = ["convert", "--source", str(tmp_path), "--dest", str(tmp_path / "set.zip"), "--resolution", size]
    assert "is beyond 8192 pixels a side" in CliRunner().invoke(dataset, arguments).output


def test_a_device_is_not_an_output(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(ValueError, match="is a device or pipe"):
            check_output(Path(path), "record of scores")


@pytest.mark.parametrize("arguments", [["--outdir", ""], ["--outdir="], ["--outdir=", "--cond", "false"]])
def test_an_empty_path_is_not_this_folder(arguments):
    result = CliRunner().invoke(train, ["--data", "set.zip", *arguments])
    assert result.exit_code == 2
    assert "--outdir is empty; give a path" in result.output


@pytest.mark.parametrize(
    ("command", "words", "name"),
    [
        (generate, ["--net", "", "--outdir", "o"], "--net"),
        (generate, ["--net=", "--outdir", "o"], "--net"),
        (generate, ["--net", "a", "--gnet", "", "--guidance", "2", "--outdir", "o"], "--gnet"),
        (generate, ["--preset", "", "--outdir", "o"], "--preset"),
        (train, ["--init-from", "", "--data", "a", "--outdir", "o"], "--init-from"),
        (train, ["--config", "", "--data", "a", "--outdir", "o"], "--config"),
        (metrics, ["calc", "--images", "", "--ref", "a"], "--images"),
        (metrics, ["calc", "--images", "a", "--ref", ""], "--ref"),
        (phema, ["--indir", "", "--outdir", "o", "--outstd", "0.1"], "--indir"),
        (dataset, ["check", "--source", ""], "--source"),
        (report, [""], "RUN..."),
        (report, ["a", ""], "RUN..."),
        (flops, [""], "PRESET|YAML|SNAPSHOT..."),
    ],
)
def test_an_empty_name_of_a_file_is_not_this_folder(command, words, name):
    result = CliRunner().invoke(command, words)
    assert result.exit_code == 2
    assert f"Error: {name} is empty; give a path" in result.output


def test_an_empty_text_that_is_no_path_is_left_alone(net, tmp_path):
    assert "for networks of diffusers" in generated(net, "--outdir", tmp_path / "o", "--negative", "", code=1)


def test_folders_called_like_a_kind_of_data_are_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("arrays", "hf", "image_files"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(png_with_notes(None))
        assert open_source(name).path == Path(name)
        with pytest.raises(ValueError, match="the path of the data set is empty"):
            open_source(f"{name}:")


@pytest.mark.parametrize("path", ["https://example.com/set.zip", "file:///tmp/set.zip", ""])
def test_data_are_not_read_from_urls_or_nowhere(path):
    with pytest.raises(ValueError, match=r"is a URL; data sets are read from disk|the path of the data set is empty"):
        open_source(path)


def test_a_time_is_at_most_a_life():
    with pytest.raises(ValueError, match="is not a time limit"):
        parse_duration_sec("9" * 400 + "d")
    assert parse_duration_sec("365d") == 365 * 86400


def test_scores_do_not_replace_the_images(tmp_path):
    images = tmp_path / "images.npz"
    np.savez(images, images=np.zeros([3, 8, 8, 3], np.uint8))
    before = images.read_bytes()
    arguments = ["ref", "--data", str(images), "--dest", str(images), "--metrics", "fd_random", "--device", "cpu"]
    result = CliRunner().invoke(metrics, arguments)
    assert "is not a set of reference statistics" in result.output
    assert images.read_bytes() == before


def test_a_sample_file_of_another_project_is_scored(tmp_path):
    np.savez(tmp_path / "samples.npz", np.zeros([3, 8, 8, 3], np.uint8))
    arguments = ["--data", str(tmp_path / "samples.npz"), "--dest", str(tmp_path / "ref.NPZ"), "--metrics", "fd_random"]
    result = CliRunner().invoke(metrics, ["ref", *arguments, "--device", "cpu"])
    assert "of 3 images" in result.output
    images = [
        "calc",
        "--images",
        str(tmp_path / "samples.npz"),
        "--num",
        "3",
        "--ref",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    result = CliRunner().invoke(metrics, images)
    assert "is a folder; it takes reference" in result.output


def test_a_hash_of_pieces_shows_other_weights(tmp_path):
    (tmp_path / "a").write_bytes(bytes(100_000))
    (tmp_path / "b").write_bytes(b"\1" + bytes(99_999))
    assert sampled_sha256(tmp_path / "a") != sampled_sha256(tmp_path / "b")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10", (1,)),
        ("10,11", (1, 2)),
        ("3-9", (4,)),
        ("3-9,10", (4, 1)),
        ("0", (0,)),
        ("10-12", (1, 2, 3)),
        ("", (0, 2, 4)),
    ],
)
def test_a_class_name_comes_before_a_number(text, expected):
    assert parse_classes(text, 5, ("1", "10", "11", "12", "3-9"), empty=(1, 3)) == expected


def test_a_range_of_classes_means_its_numbers_one_by_one():
    names = ("1", "10", "2", "20", "3")
    assert parse_classes("1-3", 5, names) == parse_classes("1,2,3", 5, names) == (0, 2, 4)
    assert parse_classes("1-3", 5, ("a", "b", "c", "d", "e")) == parse_classes("1-3", 5, None) == (1, 2, 3)
    for text in ("0-2", "0,1", "3-5"):
        with pytest.raises(ValueError, match=r"is the name of a class, but \d is not"):
            parse_classes(text, 6, (*names, "x"))
    for text in ("19-21", "1-9999999999"):
        with pytest.raises(ValueError, match="out of range"):
            parse_classes(text, 5, names)


def test_a_name_that_several_classes_share_is_refused():
    names = ("crane", "owl", "crane", " a,b ")
    for text in ("crane", "owl,crane"):
        with pytest.raises(ValueError, match=r"several classes are called 'crane'.*: 0, 2"):
            parse_classes(text, 4, names)
    assert parse_classes("0,owl,2", 4, names) == (0, 1, 2)
    assert parse_classes(" a,b ", 4, names) == (3,)
    assert parse_classes("owl,cat ", 3, ("cat ", "owl", "cat")) == (1, 0)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (IntRanges(), "0-99999999999"),
        (IntRanges(), "9" * 5000),
        (Size(), "9" * 400),
        (FloatSeries(), "0.01,0.02,...,nan"),
        (FloatSeries(), "0.01,0.02,...,1e300"),
        (FloatSeries(), "inf"),
    ],
)
def test_absurd_numbers_are_one_line(kind, text):
    with pytest.raises(click.BadParameter) as error:
        kind.convert(text, None, None)
    assert len(str(error.value)) < 200


def test_only_score_cards_are_records_of_scores(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"results": {}, "num_images": 8}))
    check_output(tmp_path / "a.json", "record of scores")
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not a record of scores"):
        check_output(tmp_path / "a.json", "record of scores")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": []}))
    with pytest.raises(ValueError, match=r"dataset\.json exists and is not a record of scores"):
        check_output(tmp_path / "dataset.json", "record of scores")


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    return tiny_snapshot(tmp_path_factory.mktemp("net") / "net.safetensors")


def generated(net, *arguments, code):
    words = ["--net", net, "--steps", 1, "--seeds", "0-1", "--device", "cpu", *arguments]
    done = CliRunner().invoke(generate, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return done.output


def test_a_sheet_replaces_sheets_and_no_photo(net, tmp_path):
    sheet, photo = tmp_path / "sheet.png", tmp_path / "photo.png"
    for _ in range(2):
        generated(net, "--grid", sheet, code=0)
    photo.write_bytes(png_with_notes(None))
    before = photo.read_bytes()
    assert "photo.png exists and is not a contact sheet" in generated(net, "--grid", photo, code=1)
    assert photo.read_bytes() == before


@pytest.mark.parametrize(("option", "name"), [("--grid", "sheet.jpg"), ("--grid", "a.NPZ"), ("--npz", "a.png")])
def test_an_output_with_the_suffix_of_another_kind_is_refused(net, tmp_path, option, name):
    assert f"{name} would hold a ." in generated(net, option, tmp_path / name, code=1)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["cat.JPG", "dataset.json", "000000.png"])
def test_images_are_not_added_to_those_of_others(net, tmp_path, name):
    (tmp_path / name).write_bytes(b"precious")
    assert f"holds other images ({name})" in generated(net, "--outdir", tmp_path, code=1)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_images_are_added_to_notes_and_to_images_of_the_same_kind(net, tmp_path):
    (tmp_path / "readme.txt").write_text("notes")
    generated(net, "--outdir", tmp_path, code=0)
    generated(net, "--outdir", tmp_path, "--seeds", "5", code=0)
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_a_sheet_among_the_folders_of_weights_is_no_image_of_others(net, tmp_path):
    guided = ("--guidance-method", "icg", "--guidance", 2, "--grid-weights", "1,2")
    for _ in range(2):
        generated(net, "--outdir", tmp_path, "--grid", tmp_path / "sheet.png", *guided, code=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sheet.png", "weight-1", "weight-2"]


def test_a_file_in_the_place_of_a_record_is_kept(net, tmp_path):
    (tmp_path / "a.npz.json").write_text('{"mine": 1}')
    assert "a.npz.json is damaged; choose another place" in generated(net, "--npz", tmp_path / "a.npz", code=1)
    assert (tmp_path / "a.npz.json").read_text() == '{"mine": 1}'


def test_names_with_commas_stand_in_a_list_and_other_cases_are_suggested():
    names = ("a,b", "no", "Cat", "a")
    assert parse_classes("no,a,b", 4, names) == (1, 0)
    assert parse_classes("a,b,Cat,a", 4, names) == (0, 2, 3)
    with pytest.raises(ValueError, match="class 'CAT' is unknown; did you mean 'Cat'"):
        parse_classes("CAT", 4, names)


def test_an_empty_class_is_not_all_classes(net, tmp_path):
    assert "--class is empty; name a class" in generated(net, "--outdir", tmp_path / "o", "--class", "", code=2)


@pytest.mark.parametrize("name", ["network", "encoder"])
def test_a_part_of_a_configuration_that_is_no_mapping_is_named(tmp_path, name):
    (tmp_path / "c.yaml").write_text(f"{name}: 5")
    options = [
        "--config",
        str(tmp_path / "c.yaml"),
        "--data",
        "absent",
        "--outdir",
        str(tmp_path / "run"),
        "--vae",
        "x",
    ]
    assert f"c.yaml: {name} must be a mapping; got 5" in CliRunner().invoke(train, options).output


def test_suffixes_in_capitals_are_suffixes(net, tmp_path):
    shutil.copy(net, tmp_path / "N.SAFETENSORS")
    (tmp_path / "C.YAML").write_text("network: {num_blocks: 1}")
    for name in ("N.SAFETENSORS", "C.YAML"):
        assert "total, with gains" in CliRunner().invoke(flops, [str(tmp_path / name)]).output
