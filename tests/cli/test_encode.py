"""dataset_tool.py encode and decode: their files, on one rank or two, stopped and resumed."""

import json
import re
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from edm2kit.cli import dataset as dataset_tool
from edm2kit.data import dataset
from edm2kit.data import encode as dataset_latents
from edm2kit.data.dataset import EncoderRecord, ImageDataset, read_encoder_record
from edm2kit.data.image_files import encode_npy
from edm2kit.data.output import PartialDataset
from edm2kit.models.vae import load_vae, vae_decode, vae_encode, vae_sha256
from edm2kit.torch_utils import dist
from tests.support import tiny
from tests.support.fakes import tiny_vae
from tests.support.pictures import encoded as encoded_png
from tests.support.pictures import picture, some_files, write_folder, write_zip

NUM_IMAGES = 21


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    return tiny_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def pixels(tmp_path_factory) -> Path:
    folder = tiny.make_dataset(tmp_path_factory.mktemp("pixels"), NUM_IMAGES)
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**content, "label_names": ["a", "b", "c", "d", "e"]}))
    return folder


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, vae, pixels) -> Path:
    dest = tmp_path_factory.mktemp("encoded") / "latents.zip"
    result = invoke("encode", vae, pixels, dest)
    assert result.exit_code == 0, result.output
    assert f"{NUM_IMAGES} of {NUM_IMAGES} files to write" in result.output
    return dest


def arguments(what: str, vae: Path, source: Path, dest: Path, *more: object) -> list[str]:
    options = ["--source", source, "--dest", dest, "--vae", vae, "--device", "cpu", "--batch", 4, *more]
    return [what, *map(str, options)]


def invoke(*given: object) -> Result:
    return CliRunner().invoke(dataset_tool.main, arguments(*given))


def raw(path: Path) -> torch.Tensor:
    dataset = ImageDataset(path)
    return torch.from_numpy(np.stack([dataset[k][0] for k in range(len(dataset))]))


def test_encode_stores_mean_and_std_and_carries_names_and_labels_over(vae, pixels, encoded):
    source, dest = ImageDataset(pixels), ImageDataset(encoded)
    assert (dest.item_shape, dest.item_dtype) == ((8, 4, 4), np.float32)
    assert [dest.item_name(k) for k in (0, 20)] == ["00000/img00000000.npy", "00000/img00000020.npy"]
    assert np.array_equal(dest.labels, source.labels)
    assert (dest.label_dim, dest.label_names) == (5, ("a", "b", "c", "d", "e"))
    expected = vae_encode(load_vae(str(vae), torch.device("cpu")), raw(pixels))
    torch.testing.assert_close(raw(encoded), expected, atol=1e-5, rtol=1e-5)
    assert read_encoder_record(dest) == EncoderRecord(str(vae), vae_sha256(str(vae)))


def test_two_ranks_write_the_same_files(vae, pixels, encoded, tmp_path):
    dest = tmp_path / "latents.zip"
    done = tiny.run("scripts/dataset_tool.py", *arguments("encode", vae, pixels, dest, "--batch", 3), ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("files to write") == 1
    with zipfile.ZipFile(dest) as two, zipfile.ZipFile(encoded) as one:
        assert two.namelist() == one.namelist()
        assert two.testzip() is None
        assert dest.stat().st_size == encoded.stat().st_size  # nothing was written twice
        assert two.read("dataset.json") == one.read("dataset.json")
    torch.testing.assert_close(raw(dest), raw(encoded), atol=1e-5, rtol=1e-5)


def test_half_precision_storage(vae, pixels, encoded, tmp_path):
    result = invoke("encode", vae, pixels, tmp_path / "half", "--dtype", "fp16")
    assert result.exit_code == 0, result.output
    assert np.load(tmp_path / "half/00000/img00000003.npy").dtype == np.float16
    assert torch.equal(raw(tmp_path / "half"), raw(encoded).half().float())


KILLED = """
import os, signal, sys
from edm2kit.cli import dataset as dataset_tool
from edm2kit.data import encode as dataset_latents
add = dataset_latents._Output.add
def add_then_die(self, parts):
    count = add(self, parts)
    writer = self._partial._writer
    if len(writer._entries) >= 8:
        writer._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return count
dataset_latents._Output.add = add_then_die
dataset_tool.main(sys.argv[1:])
"""


def test_a_killed_command_resumes(vae, pixels, encoded, tmp_path):
    line = arguments("encode", vae, pixels, tmp_path / "latents.zip")
    code = KILLED.format(root=str(tiny.ROOT))
    killed = subprocess.run([sys.executable, "-c", code, *line], env=tiny.environment(), capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "latents.zip").exists()
    other = CliRunner().invoke(dataset_tool.main, [*line, "--dtype", "fp16"])
    assert other.exit_code == 1
    assert "unfinished data set with dtype" in other.output
    again = CliRunner().invoke(dataset_tool.main, line)
    assert again.exit_code == 0, again.output
    assert f"13 of {NUM_IMAGES} files to write" in again.output
    assert (tmp_path / "latents.zip").read_bytes() == encoded.read_bytes()
    assert "nothing to do" in CliRunner().invoke(dataset_tool.main, line).output


def test_a_command_that_ended_within_a_batch_resumes_with_the_same_bits(vae, pixels, encoded, tmp_path, monkeypatch):
    line = arguments("encode", vae, pixels, tmp_path / "latents.zip")
    whole = PartialDataset.add

    def add_six(self, name, data):
        if len(self.names) == 6:  # batches have 4 images
            raise OSError("the disk is full")
        whole(self, name, data)

    def add_all_but_labels(self, name, data):
        if name == "dataset.json":
            raise OSError("the disk is full")
        whole(self, name, data)

    for add in (add_six, add_all_but_labels):
        with monkeypatch.context() as patch:
            patch.setattr(PartialDataset, "add", add)
            assert "the disk is full" in CliRunner().invoke(dataset_tool.main, line).output
    assert CliRunner().invoke(dataset_tool.main, line).exit_code == 0
    assert (tmp_path / "latents.zip").read_bytes() == encoded.read_bytes()


def test_decode_reads_what_encode_wrote(vae, encoded, tmp_path):
    line = ["decode", "--source", str(encoded), "--dest", str(tmp_path / "pixels"), "--device", "cpu"]
    result = CliRunner().invoke(dataset_tool.main, line)  # the VAE as recorded
    assert result.exit_code == 0, result.output
    dataset = ImageDataset(tmp_path / "pixels")
    assert (dataset.item_shape, dataset.item_dtype) == ((3, 8, 8), np.uint8)
    assert dataset.label_names == ("a", "b", "c", "d", "e")
    expected = vae_decode(load_vae(str(vae), torch.device("cpu")), raw(encoded)[:, :4])
    assert (raw(tmp_path / "pixels").int() - expected.int()).abs().max() <= 1


def test_arrays_are_encoded_like_image_files(vae, pixels, encoded, tmp_path):
    source = ImageDataset(pixels)
    np.save(tmp_path / "x.npy", source.read(np.arange(NUM_IMAGES)))
    np.save(tmp_path / "labels.npy", source.labels)
    assert invoke("encode", vae, tmp_path / "x.npy", tmp_path / "out").exit_code == 0
    found = ImageDataset(tmp_path / "out")
    assert found.item_name(20) == "00000/img00000020.npy"
    assert np.array_equal(found.labels, source.labels)
    torch.testing.assert_close(raw(tmp_path / "out"), raw(encoded), atol=0, rtol=0)


def test_another_vae_is_refused(encoded, tmp_path):
    other = tiny_vae(tmp_path / "other", seed=1)
    result = invoke("decode", other, encoded, tmp_path / "pixels")
    assert result.exit_code == 1
    assert "give the same VAE with --vae" in result.output


def test_wrong_sources_are_refused(vae, pixels, encoded, tmp_path):
    assert "contains latents already" in invoke("encode", vae, encoded, tmp_path / "x").output
    assert "contains pixels" in invoke("decode", vae, pixels, tmp_path / "x").output
    assert "is inside" in invoke("encode", vae, pixels, pixels / "x").output


def test_a_full_disk_is_reported_before_the_start(vae, pixels, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_latents.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    result = invoke("encode", vae, pixels, tmp_path / "latents.zip")
    assert result.exit_code == 1
    assert "not enough space" in result.output


def test_grey_pixels_count_as_rgb(vae, tmp_path):
    grey = tiny.make_dataset(tmp_path / "grey", 3, num_classes=0, channels=1)
    assert invoke("encode", vae, grey, tmp_path / "latents").exit_code == 0
    assert ImageDataset(tmp_path / "latents").labels is None
    expected = vae_encode(load_vae(str(vae), torch.device("cpu")), raw(grey).expand(-1, 3, -1, -1))
    torch.testing.assert_close(raw(tmp_path / "latents"), expected, atol=1e-5, rtol=1e-5)


def test_latents_too_large_for_half_precision_are_refused(vae, pixels):
    class Loud:
        @staticmethod
        def encode(x):
            return type("O", (), {"latent_dist": type("D", (), {"mean": x * 1e6, "std": x})})

    with pytest.raises(ValueError, match="use --dtype fp32"):
        dataset_latents.encode_batch(Loud, torch.device("cpu"), np.float16, raw(pixels)[:2].numpy())


def test_an_image_that_the_sample_of_pixels_misses_is_noticed_in_a_zip(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "_HASHED_BYTES", 0)  # 256 images, as of very large ones
    files = some_files(300)
    unseen = list(files)[min(set(range(300)).difference(dataset.spread_evenly(300, 256)))]

    def work(images):
        return [encode_npy(image) for image in images]

    def write(source):
        job = dataset_latents.make_job(ImageDataset(source), tmp_path / "out.zip", ".npy", work, {}, {})
        dataset_latents.run(job, batch=64, workers=1)

    zipped = write_zip(tmp_path / "d.zip", files)
    write(zipped)
    write(zipped)
    write(write_folder(tmp_path / "d", files))  # has no checksums, but the same names and pixels
    write_zip(zipped, files | {unseen: encoded_png(picture(1000))})
    with pytest.raises(ValueError, match=r"is a data set with source_files .*, now .*; delete it or choose another"):
        write(zipped)


def as_they_are(raw: np.ndarray) -> list[bytes]:
    return [encode_npy(image) for image in raw]


def test_a_picture_of_another_size_that_the_sample_misses_is_noticed_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "_HASHED_BYTES", 0)
    files = some_files(300)
    unseen = list(files)[min(set(range(300)).difference(dataset.spread_evenly(300, 256)))]
    folder = write_folder(tmp_path / "d", files)

    def write():
        source = ImageDataset(folder)
        job = dataset_latents.make_job(
            source, tmp_path / "out.zip", ".npy", lambda raw: list(map(encode_npy, raw)), {}, {}
        )
        dataset_latents.run(job, batch=64, workers=1)

    write()
    (folder / unseen).touch()  # its time may change: a copy of the folder is the same data set
    write()
    (folder / unseen).write_bytes(encoded_png(Image.new("RGB", picture(0).size)))
    with pytest.raises(ValueError, match=r"is a data set with source_sizes .*, now .*; delete it or choose another"):
        write()


def test_an_image_that_is_never_read_is_named(tmp_path):
    answer, folder = threading.Event(), write_folder(tmp_path / "d", some_files(5))

    class Stuck(ImageDataset):
        def __getitem__(self, index):
            if index == 3:
                answer.wait()
            return super().__getitem__(index)

    source = Stuck(folder)
    job = dataset_latents.make_job(source, tmp_path / "out.zip", ".npy", as_they_are, {}, {})
    name = re.escape(
        f"{folder}: {source.item_name(3)}: not done after 0 s; its disk may not answer. Run the same command"
    )
    with dist.waiting_at_most(0.1), pytest.raises(ValueError, match=name):
        dataset_latents.run(job, batch=2, workers=2)
    answer.set()
    dataset_latents.run(job, batch=2, workers=2)
    assert len(ImageDataset(tmp_path / "out.zip")) == 5
