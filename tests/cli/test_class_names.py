"""Names and numbers of classes through every command: from folders to a data set, networks, images, scores and back."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edm2kit.cli import dataset, generate, metrics, phema, train
from edm2kit.cli.image_source import image_labels, open_images
from edm2kit.data.dataset import open_source
from edm2kit.data.labels import Labels
from edm2kit.snapshots.file_format import read_header
from tests.support.fakes import tiny_snapshot, tiny_vae
from tests.support.pictures import encoded, picture, write_folder
from tests.support.tiny import write_config

NAMES = ("ape", "bee", "cat", "dog")
FEW_STEPS = ("--steps", "2", "--device", "cpu")


def invoke(command, *arguments, code=0):
    done = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    return done.output


def photos(folder, names, each=4, start=0):
    files = {
        f"{name}/{k}.png": encoded(picture(start + 10 * n + k)) for n, name in enumerate(names) for k in range(each)
    }
    write_folder(folder, files)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Photos in class folders, a data set, a run on it, and images of some of its classes."""
    folder = tmp_path_factory.mktemp("names")
    photos(folder / "photos", NAMES)
    invoke(dataset.main, "convert", "--source", folder / "photos", "--dest", folder / "data.zip", "--resolution", 8)
    config = write_config(folder / "tiny.yaml", duration_nimg=32)
    arguments = ["--config", config, "--data", folder / "data.zip", "--outdir", folder / "run", "--samples", 0]
    invoke(train.main, *arguments, "--device", "cpu")
    (net,) = folder.glob("run/*-0.100.safetensors")
    net.rename(folder / "net.safetensors")
    images = ["--net", folder / "net.safetensors", "--class", "ape,cat", "--seeds", "0-23", *FEW_STEPS]
    invoke(generate.main, *images, "--outdir", folder / "images")
    invoke(generate.main, *images, "--npz", folder / "images.npz")
    return folder


def test_the_data_set_and_the_network_have_the_names_of_the_folders(place):
    assert open_source(place / "data.zip").label_names == NAMES
    assert read_header(place / "net.safetensors").label_names == NAMES


def test_a_rebuilt_ema_keeps_them(place, tmp_path):
    arguments = ["--indir", place / "run", "--indir", place / "net.safetensors", "--outdir", tmp_path, "--outstd", 0.07]
    invoke(phema.main, *arguments)
    (rebuilt,) = tmp_path.glob("*.safetensors")
    assert read_header(rebuilt).label_names == NAMES


@pytest.mark.parametrize("source", ["images", "images.npz"])
def test_generated_images_know_the_names_of_all_classes(place, source):
    found = image_labels(open_images(place / source))
    assert found.class_names == NAMES
    assert found.values.tolist() == [0, 2] * 12


def test_a_data_set_of_generated_images_has_the_classes_of_the_network(place, tmp_path):
    invoke(dataset.main, "convert", "--source", place / "images", "--dest", tmp_path / "synthetic.zip")
    synthetic = open_source(tmp_path / "synthetic.zip")
    assert synthetic.label_names == NAMES
    assert synthetic.label_dim == 4  # although none of the images is a dog
    assert sorted(synthetic.labels.tolist()) == [0] * 12 + [2] * 12


@pytest.mark.slow  # loads diffusers
def test_encoding_and_decoding_keep_names_and_numbers(place, tmp_path):
    vae = tiny_vae(tmp_path / "vae")
    names = ["data.zip", "latents.zip", "again.zip"]
    for what, source, dest in (("encode", place / names[0], names[1]), ("decode", tmp_path / names[1], names[2])):
        invoke(dataset.main, what, "--source", source, "--dest", tmp_path / dest, "--vae", vae, "--device", "cpu")
        assert open_source(tmp_path / dest).label_names == NAMES


def test_classes_without_names_and_without_images_are_counted_all_along(tmp_path):
    tiny_snapshot(tmp_path / "net")  # 4 classes without names
    images = ["--net", tmp_path / "net", "--class", "0,2", "--seeds", "0-3", *FEW_STEPS]
    invoke(generate.main, *images, "--outdir", tmp_path / "images")
    for source, dest in (("images", "one.zip"), ("one.zip", "two.zip")):
        invoke(dataset.main, "convert", "--source", tmp_path / source, "--dest", tmp_path / dest)
        assert open_source(tmp_path / dest).label_dim == 4
    vae = tiny_vae(tmp_path / "vae")
    invoke(dataset.main, "encode", "--source", tmp_path / "two.zip", "--dest", tmp_path / "latents.zip", "--vae", vae)
    assert open_source(tmp_path / "latents.zip").label_dim == 4
    few = ["--max-images", 2]
    invoke(dataset.main, "convert", "--source", tmp_path / "one.zip", "--dest", tmp_path / "few.zip", *few)
    assert open_source(tmp_path / "few.zip").label_dim == 4


def test_scores_by_class_mean_the_class_of_the_same_name(place, tmp_path):
    """The real images have one class more, which comes first: all other numbers differ by one."""
    photos(tmp_path / "real", ("ant", *NAMES), each=8, start=100)
    invoke(metrics.main, "ref", "--data", tmp_path / "real", "--dest", tmp_path / "ref.npz", "--metrics", "fd_random")
    common = ["--ref", tmp_path / "ref.npz", "--real", tmp_path / "real", "--per-class", "--num", 24, "--device", "cpu"]
    invoke(metrics.main, "calc", "--images", place / "images", *common, "--record", tmp_path / "calc.json")
    net = ["--net", place / "net.safetensors", "--class", "ape,cat", "--seed", 0, "--steps", 2]
    invoke(metrics.main, "gen", *net, *common, "--record", tmp_path / "gen.json")
    records = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("calc", "gen")]
    found = [record["by_class"] for record in records]
    (by_name,) = {json.dumps(one, sort_keys=True) for one in map(_by_class, found)}
    assert [name for name in ("1 ape", "3 cat") if name not in by_name] == []
    assert "bee" not in by_name


def _by_class(found):
    """The distances by class of the only selection, or the only range of seeds, with three digits."""
    (classes,) = found.values()
    return _rounded(classes)


def _rounded(value):
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return f"{value:.3g}" if isinstance(value, float) else value


def test_a_class_that_the_real_images_lack_is_refused_if_classes_count(place, tmp_path):
    photos(tmp_path / "real", ("ape", "bee"), each=8)
    invoke(metrics.main, "ref", "--data", tmp_path / "real", "--dest", tmp_path / "ref.npz", "--metrics", "fd_random")
    words = ["gen", "--net", place / "net.safetensors", "--seed", 0, *FEW_STEPS, "--ref", tmp_path / "ref.npz"]
    words += ["--real", tmp_path / "real", "--num", 12]
    output = invoke(metrics.main, *words, "--per-class", code=1)
    assert "the generated images have the class 'cat', which the real images lack" in output
    invoke(metrics.main, *words, "--metrics", "fd_random")  # no classes needed
    invoke(metrics.main, *words, "--per-class", "--class", "bee")


@pytest.mark.parametrize(
    ("runs", "reason"),
    [
        ("[{'num_classes': 4, 'label_names': ['ape']}]", "1 names of 4 classes"),
        ("[{'num_classes': 'x'}]", "invalid literal"),
        ("[7]", "get"),
        ("{", "is damaged"),
    ],
)
def test_a_damaged_record_is_named(place, tmp_path, runs, reason):
    (tmp_path / "images").mkdir()
    for file in (place / "images").glob("*.png"):
        (tmp_path / "images" / file.name).write_bytes(file.read_bytes())
    (record,) = (place / "images").glob("*.json")
    (tmp_path / "images" / record.name).write_text('{"settings": {}, "runs": ' + runs.replace("'", '"') + "}")
    with pytest.raises(ValueError, match=rf"{record.name}.*is damaged.*{reason}|{record.name}: is damaged"):
        image_labels(open_images(tmp_path / "images"))


def test_the_number_of_classes_is_written_only_if_it_says_more():
    values = np.array([0, 2, 1])
    assert Labels(values).to_json(["a", "b", "c"]) == {"labels": [["a", 0], ["b", 2], ["c", 1]]}
    assert Labels(values, num_classes=3).to_json(["a", "b", "c"]).keys() == {"labels"}
    assert Labels(values, num_classes=7).to_json(["a", "b", "c"])["num_classes"] == 7
    named = Labels(values, NAMES, 4).to_json(["a", "b", "c"])
    assert named.keys() == {"labels", "label_names"}


@pytest.mark.parametrize("count", [2, -1, True, "7", 1 << 40])
def test_an_impossible_number_of_classes_is_refused(tmp_path, count):
    write_folder(tmp_path / "data", {f"{k}.png": encoded(picture(k)) for k in range(3)})
    labels = [[f"{k}.png", k] for k in range(3)]
    (tmp_path / "data" / "dataset.json").write_text(json.dumps({"labels": labels, "num_classes": count}))
    with pytest.raises(ValueError, match=r'"num_classes" is .*, but the labels go up to 2'):
        open_source(Path(tmp_path / "data"))
