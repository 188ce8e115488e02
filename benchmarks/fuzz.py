"""Damaged files for every parser: whatever is in a file, it is read or refused in one line.

    python -m benchmarks.fuzz --inputs 1000000 --parser labels

Valid files are the seeds; each input is one of them with a few random changes. tests/test_parsers.py uses hypothesis.
"""

import copy
import io
import json
import pickle
import random
import signal
import tempfile
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image

from benchmarks import harness
from edm2kit.cli import click_types as cli
from edm2kit.cli.field_options import Interval
from edm2kit.cli.generation import parse_classes
from edm2kit.data.archive import open_archive
from edm2kit.data.dataset import FILE_EXTENSIONS, ImageDataset
from edm2kit.data.image_files import decode_array, encode_npy, encode_png, find_layout, open_image, to_8bit
from edm2kit.data.labels import read_label_vectors
from edm2kit.ema.power_function import PowerFunctionEMA
from edm2kit.metrics.card import explain, markdown, read_card, scores_side_by_side
from edm2kit.metrics.moments import FeatureStatistics
from edm2kit.metrics.reference import Reference, load_reference, save_reference
from edm2kit.models import Precond, full_architecture
from edm2kit.snapshots.file_format import Header, network_on_meta, read_header, save_snapshot
from edm2kit.torch_utils.arrays import read_npz
from edm2kit.torch_utils.dist import printable
from edm2kit.torch_utils.files import provenance
from edm2kit.torch_utils.pickles.reader import load_pickle
from edm2kit.torch_utils.pickles.writer import dump_arrays
from edm2kit.training.checkpoint import checkpoint_state, damage, read_run_id, save_checkpoint
from edm2kit.training.config import config_from_dict, preset_path, read_yaml
from edm2kit.training.log import drop_later_lines

LIMIT_SEC = 20  # of CPU time for one input
REFUSALS = (ValueError, OSError, click.UsageError)
# what a value in JSON or YAML may be changed to
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 10**30, 1.5, -0.0, float("nan"), float("inf"), "", "x", "auto", "\x1b[31m",
    "\ud800", [], [[]], [1], [1, "x"], {}, {"kind": "rgb"}, {"": 0},
)  # fmt: skip
ODD_BYTES = (0, 1, 10, 32, 40, 46, 47, 58, 91, 93, 123, 127, 128, 192, 254, 255)


@dataclass(frozen=True)
class Change:
    """One change of an input: which one (`kind`), where (`place`, taken modulo the size), and to what (`value`)."""

    kind: int
    place: int
    value: int


def mutate(seed: bytes, changes: Sequence[Change]) -> bytes:
    """`seed` with bytes replaced, flipped, inserted, removed, repeated, or cut off."""
    data = bytearray(seed)
    for change in changes:
        place = change.place % (len(data) + 1)
        size = 1 + change.value % 16
        match change.kind % 6:
            case 0 if place < len(data):
                data[place] ^= 1 << change.value % 8
            case 1 if place < len(data):
                data[place] = ODD_BYTES[change.value % len(ODD_BYTES)]
            case 2:
                data[place:place] = bytes([ODD_BYTES[change.value % len(ODD_BYTES)]]) * size
            case 3:
                del data[place : place + size]
            case 4:
                data[place:place] = data[place : place + size]
            case 5 if change.value % 4 == 0:
                del data[place:]
    return bytes(data)


def mutate_values(seed: Any, changes: Sequence[Change]) -> Any:
    """`seed`, as JSON holds it, with values replaced by odd ones, removed, or put elsewhere."""
    root = {"": json.loads(json.dumps(seed))}
    for change in changes:
        places = list(_places(root))
        parent, key = places[change.place % len(places)]
        if change.kind % 4 == 0 and isinstance(parent, dict) and key:
            del parent[key]
        elif change.kind % 4 == 1:
            other, name = places[change.value % len(places)]
            parent[key] = json.loads(json.dumps(other[name]))
        else:
            parent[key] = copy.deepcopy(ODD_VALUES[change.value % len(ODD_VALUES)])
    return root[""]


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside nested lists and mappings."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    for key in keys:
        yield node, key
        yield from _places(node[key])


@dataclass(frozen=True)
class Parser:
    """A parser, and how inputs for it are made.

    `seeds(folder)` gives valid inputs: bytes, or values that JSON can hold. `parse(data, folder)` reads one; a parser
    of values gets their JSON text.
    """

    seeds: Callable[[Path], list[Any]]
    parse: Callable[[bytes, Path], object]

    def input_of(self, seed: Any, changes: Sequence[Change]) -> bytes:
        """An input: the seed with these changes."""
        if isinstance(seed, bytes):
            return mutate(seed, changes)
        return json.dumps(mutate_values(seed, changes)).encode("utf-8", "surrogatepass")


def outcome(parser: Parser, data: bytes, folder: Path) -> str:
    """What a parser does with an input: "read" or "refused".

    Raises whatever else the parser raises, and AssertionError for a refusal of several lines.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parser.parse(data, folder)
    except REFUSALS as error:
        message = printable(error.format_message() if isinstance(error, click.UsageError) else str(error))
        assert message, "a refusal without a reason"
        assert "\n" not in message.strip(), f"a refusal in several lines: {message!r:.200}"
        assert len(message) < 2000, f"a refusal of {len(message)} characters"
        return "refused"
    return "read"


def _in_file(name: str, read: Callable[[Path], object]) -> Callable[[bytes, Path], object]:
    def parse(data: bytes, folder: Path) -> object:
        path = folder / name
        path.write_bytes(data)
        return read(path)

    return parse


def _tiny() -> tuple[Precond, Header]:
    architecture = full_architecture(
        img_resolution=4, img_channels=3, label_dim=2, sigma_data=0.5,
        network={
            "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "channels_per_head": 8
        },
    )  # fmt: skip
    header = Header(
        architecture=architecture, encoder={"kind": "rgb"}, nimg=1000, ema_std=0.1, label_names=["cat", "dog"],
        dtype="float16", run_id="0123", training_config={"loss": {"P_mean": -0.4}},
    )  # fmt: skip
    return Precond(**architecture), header


def _snapshot(folder: Path) -> bytes:
    net, header = _tiny()
    save_snapshot(folder / "seed.safetensors", net.state_dict(), header)
    return (folder / "seed.safetensors").read_bytes()


def _headers(folder: Path) -> list[Any]:
    data = _snapshot(folder)
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    return [json.loads(metadata["edm2_snapshot"])]


def _read_header_text(data: bytes, folder: Path) -> object:
    text = json.dumps({"__metadata__": {"edm2_snapshot": data.decode("utf-8", "replace"), "format": "pt"}}).encode()
    return _read_snapshot(len(text).to_bytes(8, "little") + text, folder)


def _read_snapshot(data: bytes, folder: Path) -> object:
    path = folder / "a.safetensors"
    path.write_bytes(data)
    return network_on_meta(read_header(path), path)


def _checkpoint(folder: Path) -> list[Any]:
    net, header = _tiny()
    state = checkpoint_state(
        net, torch.optim.Adam(net.parameters()), PowerFunctionEMA(net, [0.1]), {"nimg": 8, "run_id": header.run_id}
    )
    save_checkpoint(folder, state)
    return [next(folder.glob("training-state-*.pt")).read_bytes()]


def _read_checkpoint(path: Path) -> object:
    if (reason := damage(path)) is not None:
        raise ValueError(printable(reason))
    return read_run_id(path)


def _pickles(folder: Path) -> list[Any]:
    buffer = io.BytesIO()
    dump_arrays({"mu": np.arange(4.0), "sigma": np.eye(4), "n": 3}, buffer)
    plain = {"a": [1, 2.5, "b", None, True], "b": {"c": (1, 2)}}
    arrays = pickle.dumps({"d": np.arange(3, dtype=np.float32)}, 4)
    return [buffer.getvalue(), arrays, *(pickle.dumps(plain, protocol) for protocol in (2, 4, 5))]


def _read_yaml_config(path: Path) -> object:
    return config_from_dict(read_yaml(path), "the file")


def _folder_of(name: str) -> Callable[[bytes, Path], object]:
    """Opens a folder of two images and the file `name`."""

    def parse(data: bytes, folder: Path) -> object:
        for index in range(2):
            image = folder / "set" / f"{index}.png"
            if not image.exists():
                image.parent.mkdir(exist_ok=True)
                image.write_bytes(encode_png(Image.new("RGB", (4, 4), (index, 2, 3))))
        (folder / "set" / name).write_bytes(data)
        source = ImageDataset(folder / "set")
        return source.identity(), source.read_labels(np.arange(2)) if source.label_dim else None

    return parse


def _zips(folder: Path) -> list[Any]:
    import zipfile

    found = []
    for method, names in ((zipfile.ZIP_STORED, ("a/0.png", "b/1.png")), (zipfile.ZIP_DEFLATED, ("0.png", "ü/1.png"))):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as archive:
            for index, name in enumerate(names):
                archive.writestr(name, encode_png(Image.new("RGB", (4, 4), (index, 2, 3))))
            archive.writestr("dataset.json", json.dumps({"labels": [[name, 0] for name in names]}))
        found.append(buffer.getvalue())
    return found


def _read_zip(path: Path) -> object:
    archive = open_archive(path, FILE_EXTENSIONS)
    source = ImageDataset(path)
    return [archive.names, *(source.read(np.array([k])) for k in range(min(len(source), 4)))]


def _images(folder: Path) -> list[Any]:
    found = []
    for image in (Image.new("RGB", (4, 4), (1, 2, 3)), Image.new("L", (4, 4), 7)):
        for kind in ("PNG", "JPEG", "BMP"):
            buffer = io.BytesIO()
            image.save(buffer, kind)
            found.append(buffer.getvalue())
    return [*found, encode_png(Image.new("RGB", (4, 4), (1, 2, 3)))]


def _read_image(data: bytes, folder: Path) -> object:
    find_layout(data)
    return to_8bit(open_image(data, "a.png"), 3, "a.png")


def _npz(folder: Path) -> list[Any]:
    save_reference(folder / "seed.npz", Reference(9, {"fid": FeatureStatistics(np.zeros(3), np.eye(3), "0123")}, {}))
    return [(folder / "seed.npz").read_bytes()]


def _read_references(path: Path) -> object:
    arrays = read_npz(path)
    with suppress(ValueError):  # those of a valid file would be too large for millions of inputs
        load_reference(path)
    return arrays


def _card() -> dict[str, Any]:
    values = {"min": 3.2, "mean": 3.2, "values": {"selection 0": 3.2}}
    return {
        "command": "calculate_metrics.py", "results": {"fid": values},
        "intervals": {"fid": {"selection 0": [3.1, 3.3]}},
        "detectors": {"fid": "0123"}, "reference": {"path": "a.npz", "sha256": "0", "num_images": 9, "source": {}},
        "num_images": 9, "seeds": [0], "settings": {"guidance": {"method": "none"}},
    }  # fmt: skip


def _read_cards(path: Path) -> object:
    card = read_card(path)
    return markdown(card), explain(card, _card()), scores_side_by_side(card, _card())


def _read_words(data: bytes, folder: Path) -> object:
    """Texts of the command line."""
    text = data.decode("utf-8", "replace")
    found: list[object] = []
    readers: tuple[Callable[[], object], ...] = (
        lambda: cli.IntRanges().convert(text, None, None),
        lambda: cli.Size().convert(text, None, None),
        lambda: Interval().convert(text, None, None),
        lambda: cli.Parsed(cli.parse_duration_sec).convert(text, None, None),
        lambda: parse_classes(text, 4, ["cat", "dog", "0", "1-2"]),
    )
    refusal: Exception | None = None
    for reader in readers:
        try:
            found.append(reader())
        except REFUSALS as error:
            refusal = error
    if not found and refusal is not None:
        raise refusal
    return found


_LINE = {"nimg": 1000, "elapsed_sec": 1.5, "loss": 0.7, "lr": 0.01}
PARSERS: Mapping[str, Parser] = {
    "snapshot header": Parser(_headers, _read_header_text),
    "snapshot file": Parser(lambda folder: [_snapshot(folder)], _read_snapshot),
    "checkpoint": Parser(_checkpoint, _in_file("training-state-0000001.pt", _read_checkpoint)),
    "pickle": Parser(_pickles, lambda data, folder: load_pickle(io.BytesIO(data))),
    "config": Parser(
        lambda folder: [read_yaml(preset_path(name)) for name in ("edm2-img64-s", "pictures32-dit")],
        _in_file("a.yaml", _read_yaml_config),
    ),
    "config text": Parser(
        lambda folder: [preset_path(name).read_bytes() for name in ("edm2-img64-s", "pictures32-dit")],
        _in_file("a.yaml", _read_yaml_config),
    ),
    "labels": Parser(
        lambda folder: [{"labels": [["0.png", 0], ["1.png", 1]]}, {"labels": [["0.png", [0.5, 1]], ["1.png", [1, 2]]]}],
        _folder_of("dataset.json"),
    ),
    "zip": Parser(_zips, _in_file("a.zip", _read_zip)),
    "npy": Parser(
        lambda folder: [encode_npy(np.zeros((8, 4, 4), np.float32)), encode_npy(np.zeros((3, 4, 4), np.uint8))],
        lambda data, folder: decode_array(data, "a.npy"),
    ),
    "reference npz": Parser(_npz, _in_file("a.npz", _read_references)),
    "label vectors": Parser(lambda folder: [[[1.0, 2.0], [3.0, 4.0]]], _in_file("a.json", read_label_vectors)),
    "image": Parser(_images, _read_image),
    "statistics": Parser(
        lambda folder: [b"".join(json.dumps({**_LINE, "nimg": n}).encode() + b"\n" for n in (1, 2, 3))],
        _in_file("stats.jsonl", lambda path: drop_later_lines(path, 2)),
    ),
    "card": Parser(lambda folder: [_card()], _in_file("a.json", _read_cards)),
    "words": Parser(
        lambda folder: [b"0-63,70", b"128Ki", b"0.28,2.90", b"11.5h", b"cat,1-2,0"],
        _read_words,
    ),
}  # fmt: skip


@click.command(cls=cli.Command)
@click.option("--parser", "names", metavar="NAME", type=click.Choice(list(PARSERS)), multiple=True, help="Only these")
@click.option("--inputs", metavar="N", type=cli.AtLeast(int, 1), default=1_000_000, help="Inputs per parser")
@click.option("--max-sec", metavar="SEC", type=cli.AtLeast(float, 0), default=3600.0, help="Time per parser, at most")
@click.option("--seed", metavar="N", type=int, default=0, help="Seed of the changes")
@click.option("--add", is_flag=True, help="Add to the record, with the seeds after those in it")
@harness.out_option
def main(names: tuple[str, ...], inputs: int, max_sec: float, seed: int, add: bool, out: Path) -> None:
    """Feed damaged files to every parser; writes fuzz.json with the number of inputs and outcomes.

    With --add, every call feeds other inputs, and the record holds the sums.

    The exit code is 1 if an input is neither read nor refused in one line; the record then holds the first ones.
    """
    torch.set_num_threads(1)
    path = out / "fuzz.json"
    record = json.loads(path.read_text()) if path.exists() else {"job": "fuzz", "parsers": {}}
    for name in names or PARSERS:
        before = record["parsers"].get(name) if add else None
        found = run(name, inputs, max_sec, before["seed"] + 1 if before else seed)
        record["parsers"][name] = found = harness.added(before, found) if before else found
        record |= {"command": harness.command(), "limit_sec": LIMIT_SEC, **provenance()}
        harness.save(record, out)
        click.echo(
            f"{name}: {found['inputs']} inputs, {found['read']} read, {len(found['failures'])} kinds of failures"
        )
    if any(found["failures"] for found in record["parsers"].values()):
        raise ValueError(f"some inputs are neither read nor refused in one line; see {path}")


def run(name: str, inputs: int, max_sec: float, seed: int) -> dict[str, Any]:
    """The outcomes of random inputs for a parser: counts, and the first input of each kind of failure."""
    rng, parser = random.Random(f"{name} {seed}"), PARSERS[name]
    counts: Counter[str] = Counter()
    failures: dict[str, dict[str, str]] = {}
    slowest_sec, started = 0.0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder, _alarm():
        seeds = parser.seeds(Path(folder))
        while sum(counts.values()) < inputs and time.monotonic() - started < max_sec:
            changes = [
                Change(rng.randrange(12), rng.randrange(1 << 20), rng.randrange(1 << 16))
                for _ in range(rng.choice((1, 1, 1, 2, 3, 8)))
            ]
            data = parser.input_of(rng.choice(seeds), changes)
            begin = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, LIMIT_SEC)
            try:
                counts[outcome(parser, data, Path(folder))] += 1
            except Exception as error:
                counts["failed"] += 1
                kind = f"{type(error).__name__}: {error!s:.120}"
                failures.setdefault(kind, {"kind": kind, "input": data[:4000].hex()})
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            slowest_sec = max(slowest_sec, time.process_time() - begin)
    return {
        "inputs": sum(counts.values()),
        "read": counts["read"],
        "refused": counts["refused"],
        "failed": counts["failed"],
        "failures": list(failures.values())[:20],
        "slowest_sec": round(slowest_sec, 3),
        "elapsed_sec": round(time.monotonic() - started, 1),
        "seed": seed,
    }


class _TooSlowError(Exception):
    """An input took longer than LIMIT_SEC."""


@contextmanager
def _alarm() -> Iterator[None]:
    def ring(number: int, frame: types.FrameType | None) -> None:
        raise _TooSlowError(f"more than {LIMIT_SEC} s of CPU time")

    former = signal.signal(signal.SIGPROF, ring)
    try:
        yield
    finally:
        signal.signal(signal.SIGPROF, former)


if __name__ == "__main__":
    main()
