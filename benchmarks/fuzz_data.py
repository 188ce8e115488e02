"""Damaged training data and generated images for `benchmarks.fuzz`: archives, arrays, pictures, labels."""

import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

from benchmarks.fuzz_inputs import Parser, in_file, text_of, values_and_text, zip_of
from edm2kit.cli.image_source import NpzImages
from edm2kit.cli.npz import write_npz
from edm2kit.data.archive import open_archive
from edm2kit.data.array_dataset import ArrayDataset
from edm2kit.data.checksums import Journal, entry_of
from edm2kit.data.cifar import CifarArchive
from edm2kit.data.dataset import FILE_EXTENSIONS, ImageDataset, enlarged_fraction, read_encoder_record
from edm2kit.data.image_files import decode_array, encode_npy, encode_png, find_layout, open_header, open_image, to_8bit
from edm2kit.data.labels import folder_labels, noted_labels, read_label_vectors, read_labels
from edm2kit.data.output import PartialDataset, is_finished
from edm2kit.guidance.option_types import read_picture

_PICTURES = [encode_png(Image.new("RGB", (4, 4), (index, 2, 3))) for index in range(2)]


def _file(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# archives


def _zips(folder: Path) -> list[Any]:
    found = []
    for method, names in ((zipfile.ZIP_STORED, ("a/0.png", "b/1.png")), (zipfile.ZIP_DEFLATED, ("x/0.png", "ü/1.png"))):
        labels = text_of({"labels": [[name, 0] for name in names]})
        found.append(zip_of({**dict(zip(names, _PICTURES, strict=True)), "dataset.json": labels}, method))
    return found


def _read_zip(path: Path) -> object:
    source = ImageDataset(path)
    found = [source.identity(), read_encoder_record(source), *(source[k] for k in range(min(len(source), 4)))]
    archive = open_archive(path, FILE_EXTENSIONS)
    return [found, folder_labels(archive.names)]


def _python2(value: Any) -> bytes:
    """A value as Python 2 pickled it with protocol 2, without start and end."""
    if isinstance(value, str | bytes):
        data = value.encode() if isinstance(value, str) else value
        return (b"U" + bytes([len(data)]) if len(data) < 256 else b"T" + struct.pack("<i", len(data))) + data
    if isinstance(value, int):
        return b"K" + bytes([value]) if value < 256 else b"M" + struct.pack("<H", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(_python2, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(_python2(key) + _python2(item) for key, item in value.items()) + b"u"
    rows, width = value.shape
    return (
        (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + _python2(0) + b"\x85" + _python2("b") + b"\x87R")
        + (b"(" + _python2(1) + _python2(rows) + _python2(width) + b"\x86")
        + (b"cnumpy\ndtype\n" + _python2("u1") + _python2(0) + _python2(1) + b"\x87R")
        + (b"(" + _python2(3) + _python2("|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + _python2(0) + b"tb")
        + (b"\x89" + _python2(value.tobytes()) + b"tb")
    )


def _cifar_batch(labels: str, count: int) -> bytes:
    pixels = np.zeros([count, 3072], np.uint8)
    entries = {"batch_label": "1 of 1", labels: list(range(count)), "data": pixels}
    return b"\x80\x02" + _python2(entries) + b"."


def _cifar_names(key: str) -> bytes:
    return b"\x80\x02" + _python2({key: ["cat", "dog"], "num_vis": 3072}) + b"."


def _tar(members: Mapping[str, bytes], mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _cifar(folder: Path) -> list[Any]:
    ten = {"cifar/data_batch_1": _cifar_batch("labels", 2), "cifar/batches.meta": _cifar_names("label_names")}
    hundred = {"cifar/train": _cifar_batch("fine_labels", 1), "cifar/meta": _cifar_names("fine_label_names")}
    return [_tar(ten, "w"), _tar(hundred, "w"), _tar(ten, "w:gz")]


def _read_cifar(path: Path) -> object:
    archive = CifarArchive(path)
    return archive.read_labels(), [archive.read(k) for k in range(min(len(archive.names), 2))]


def _in_cifar(name: str) -> Callable[[bytes, Path], object]:
    """Reads CIFAR's archive with the input as one of its pickles."""

    def parse(data: bytes, folder: Path) -> object:
        members = {"data_batch_1": _cifar_batch("labels", 1), "batches.meta": _cifar_names("label_names"), name: data}
        (folder / "a.tar").write_bytes(_tar(members, "w"))
        return _read_cifar(folder / "a.tar")

    return parse


def _hugging_face(name: str) -> Parser:
    """A file in a folder that Hugging Face's `save_to_disk` has written."""

    def seeds(folder: Path) -> list[Any]:
        import datasets

        columns = {"image": [{"bytes": data, "path": None} for data in _PICTURES], "label": [0, 1]}
        kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
        datasets.Dataset.from_dict(columns, datasets.Features(kinds)).save_to_disk(str(folder / "hf"))
        data = (folder / "hf" / name).read_bytes()
        return [json.loads(data), data] if name.endswith(".json") else [data]

    def parse(data: bytes, folder: Path) -> object:
        from edm2kit.data.hugging_face import HuggingFaceDataset

        (folder / "hf" / name).write_bytes(data)
        source = HuggingFaceDataset(folder / "hf")
        return source.identity(), source.read(np.arange(min(len(source), 2)))

    return Parser(seeds, parse)


# arrays


def _arrays(folder: Path) -> list[Any]:
    return [encode_npy(np.zeros((8, 4, 4), np.float32)), encode_npy(np.zeros((3, 4, 4), np.uint8))]


def _array_sets(folder: Path) -> list[Any]:
    found = [np.zeros((2, 3, 4, 4), np.uint8), np.zeros((2, 8, 4, 4), np.float16)]
    return [encode_npy(array) for array in found]


def _read_array_set(path: Path) -> object:
    source = ArrayDataset(path)
    return source.identity()


def _array_labels() -> Parser:
    def parse(data: bytes, folder: Path) -> object:
        place = folder / "arrays"
        if not place.exists():
            place.mkdir()
            np.save(place / "images.npy", np.zeros((2, 3, 4, 4), np.uint8))
        (place / "labels.npy").write_bytes(data)
        source = ArrayDataset(place)
        return source.identity(), source.read_labels(np.arange(2))

    return Parser(lambda folder: [encode_npy(np.arange(2)), encode_npy(np.zeros((2, 3), np.float32))], parse)


def _generated(folder: Path) -> list[Any]:
    pixels = np.zeros((3, 4, 4), np.uint8)
    write_npz(folder / "labels.npz", [3, 4], [(pixels, 0), (pixels, 1)], ["cat", "dog"])
    write_npz(folder / "plain.npz", [3], [(pixels, None)])
    np.savez(folder / "adm.npz", arr_0=np.zeros((1, 4, 4, 3), np.uint8))
    return [(folder / name).read_bytes() for name in ("labels.npz", "plain.npz", "adm.npz")]


def _read_generated(path: Path) -> object:
    images = NpzImages(path)
    return images.labels(), images.read(0)


# pictures


def _images(folder: Path) -> list[Any]:
    grey, colour = Image.new("L", (4, 4), 7), Image.new("RGB", (4, 4), (1, 2, 3))
    found = [_file(image, kind) for image in (colour, grey) for kind in ("PNG", "JPEG", "BMP", "GIF", "TIFF", "PPM")]
    found += [_file(colour, "WEBP"), _file(Image.new("I;16", (4, 4), 700), "PNG"), encode_png(colour)]
    found += [_file(colour.convert("P"), "PNG"), _file(colour.convert("CMYK"), "JPEG")]
    exif, profile = Image.Exif(), ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    exif[0x0112] = 6
    return [*found, _file(colour, "JPEG", exif=exif), _file(colour, "PNG", exif=exif, icc_profile=profile)]


def _read_image(data: bytes, folder: Path) -> object:
    image = open_image(data, "a.png")
    return to_8bit(image, 3, "a.png"), open_image(data, "a.png", as_stored=True)


def _training_images(folder: Path) -> list[Any]:
    return [*_PICTURES, encode_png(Image.new("L", (4, 4), 7)), _file(Image.new("RGB", (4, 4)), "JPEG")]


def _read_training_image(data: bytes, folder: Path) -> object:
    return find_layout(data), open_header(data, "a.png").info


def _noted(text: str) -> bytes:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("class", text)
    notes.add_text("seed", "16")
    return _file(Image.new("RGB", (4, 4)), "PNG", pnginfo=notes)


# labels


def _beside_images(name: str, read: Callable[[Path], object], **others: bytes) -> Callable[[bytes, Path], object]:
    """Reads a folder of two images, and of the files `others` (by name without suffix), with the input as `name`."""

    def parse(data: bytes, folder: Path) -> object:
        place = folder / "set"
        if not place.exists():
            place.mkdir()
            for index, picture in enumerate(_PICTURES):
                (place / f"{index}.png").write_bytes(others.get("picture", picture))
        (place / name).write_bytes(data)
        return read(place)

    return parse


def _read_labels(folder: Path) -> object:
    found = read_labels(open_archive(folder, FILE_EXTENSIONS))
    return None if found is None else found.space.encode(found.values)


def _read_noted(folder: Path) -> object:
    return noted_labels(open_archive(folder, (".png",)))


def _read_notes_of_set(folder: Path) -> object:
    source = ImageDataset(folder)
    return read_encoder_record(source), enlarged_fraction(source)


def _read_finished(folder: Path) -> object:
    settings = {"resolution": [4, 4], "source_content": "0"}
    return is_finished(folder, settings)


def _checksums(folder: Path) -> list[Any]:
    entries = {f"{k}.npy": list(entry_of(data)) for k, data in enumerate(_LATENTS)}
    contents = ({"labels": None, "checksums": found} for found in (entries, {"0.npy": entries["0.npy"]}))
    return [value for content in contents for value in (content, json.dumps(content).encode())]


def _read_with_checksums(data: bytes, folder: Path) -> object:
    for k, latent in enumerate(_LATENTS):
        (folder / f"{k}.npy").write_bytes(latent)
    (folder / "dataset.json").write_bytes(data)
    return ImageDataset(folder).read(np.arange(2))


def _read_journal(path: Path) -> object:
    return Journal(path).entries


def _read_unfinished(path: Path) -> object:
    """Goes on with a zip of `dataset_tool.py convert` that a killed process has left."""
    dest = path.parent.with_name("b.zip")
    (path.parent / "settings.json").write_text("{}")
    with PartialDataset(dest, {}) as files:
        return files.names


def _unfinished(data: bytes, folder: Path) -> object:
    place = folder / "b.zip.partial"
    place.mkdir(exist_ok=True)
    (place / "data").write_bytes(data)
    return _read_unfinished(place / "data")


def _unfinished_settings(data: bytes, folder: Path) -> object:
    place = folder / "c.zip.partial"
    place.mkdir(exist_ok=True)
    (place / "data").write_bytes(b"")
    (place / "settings.json").write_bytes(data)
    with PartialDataset(folder / "c.zip", _SETTINGS) as files:
        return files.names


_LATENTS = [encode_npy(np.full((2, 4, 4), k, np.float32)) for k in range(2)]
_SETTINGS: dict[str, Any] = {"resolution": [4, 4], "transform": "center-crop"}
_GENERATION = {
    "settings": {"net": "a", "guidance": {"method": "none"}},
    "runs": [{"seeds": "16-17", "label_names": ["cat", "dog"], "num_classes": 2}],
}
PARSERS: Mapping[str, Parser] = {
    "zip": Parser(_zips, in_file("a.zip", _read_zip)),
    "unfinished zip": Parser(_zips, _unfinished),
    "CIFAR archive": Parser(_cifar, in_file("a.tar.gz", _read_cifar)),
    "CIFAR batch": Parser(lambda folder: [_cifar_batch("labels", 1)], _in_cifar("data_batch_1")),
    "CIFAR names": Parser(lambda folder: [_cifar_names("label_names")], _in_cifar("batches.meta")),
    "Hugging Face info": _hugging_face("dataset_info.json"),
    "Hugging Face state": _hugging_face("state.json"),
    "npy": Parser(_arrays, lambda data, folder: decode_array(data, "a.npy")),
    "array set": Parser(_array_sets, in_file("a.npy", _read_array_set)),
    "array labels": _array_labels(),
    "generated npz": Parser(_generated, in_file("a.npz", _read_generated)),
    "image": Parser(_images, _read_image),
    "training image": Parser(_training_images, _read_training_image),
    "measured picture": Parser(_images, in_file("a.png", read_picture)),
    "labels": Parser(
        values_and_text(
            {"labels": [["0.png", 0], ["1.png", 1]], "label_names": ["cat", "dog"]},
            {"labels": [["0.png", 0], ["1.png", 1]], "num_classes": 3},
            {"labels": [["0.png", [0.5, 1]], ["1.png", [1, 2]]]},
        ),
        _beside_images("dataset.json", _read_labels),
    ),
    "label vectors": Parser(values_and_text([[1.0, 2.0], [3.0, 4.0]]), in_file("a.json", read_label_vectors)),
    "label vectors npy": Parser(
        lambda folder: [encode_npy(np.zeros((2, 3))), encode_npy(np.zeros((1, 4), np.float32))],
        in_file("a.npy", read_label_vectors),
    ),
    "noted classes": Parser(
        lambda folder: [_noted("0"), _noted("1")], _beside_images("2.png", _read_noted, picture=_noted("1"))
    ),
    "generation record": Parser(
        values_and_text(_GENERATION), _beside_images("generation.json", _read_noted, picture=_noted("1"))
    ),
    "encoder record": Parser(
        values_and_text({"vae_name": "stabilityai/sd-vae-ft-mse", "vae_sha256": "0123"}),
        _beside_images("encoder.json", _read_notes_of_set),
    ),
    "finished data set": Parser(
        values_and_text({"labels": None, "files": 2, "settings": {"resolution": [4, 4], "source_digest": "0"}}),
        _beside_images("dataset.json", _read_finished),
    ),
    "unfinished settings": Parser(values_and_text(_SETTINGS), _unfinished_settings),
    "recorded checksums": Parser(_checksums, _read_with_checksums),
    "journal of checksums": Parser(
        lambda folder: [b'["0.png", 70, 1234567]\n["1.png", 80, 7654321]\n'], in_file("checksums", _read_journal)
    ),
}
