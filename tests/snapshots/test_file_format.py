"""Snapshots: written, read back, corrupted, refused."""

import dataclasses
import itertools
import json
import pickle
import random
import stat
import sys
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from edm2kit.models import full_architecture
from edm2kit.snapshots.file_format import (
    Header,
    SnapshotWriter,
    read_header,
    read_tensors,
    save_snapshot,
    snapshot_name,
    tensor_layout,
)
from edm2kit.snapshots.loading import TensorInFile, WeightReader, Weights, is_published_pickle, load_snapshot
from tests.support import DATA, golden


@pytest.fixture
def net():
    return golden.network("cond", golden.part(golden.load("network_cond.npz"), "state/"))


@pytest.fixture
def header() -> Header:
    return Header(
        architecture=golden.architecture("cond"),
        encoder={"kind": "rgb"},
        nimg=123_457,
        ema_std=0.05,
        label_names=("ant", "bee", "cat", "dog"),
        run_id="run",
        training_config={"batch": 8},
    )


def test_round_trip_in_float32_is_exact(net, header, tmp_path):
    header = dataclasses.replace(header, dtype="float32")
    path = tmp_path / snapshot_name(header.nimg, header.ema_std)
    assert path.name == "network-snapshot-0000123-0.050.safetensors"
    save_snapshot(path, net.state_dict(), header)
    snapshot = load_snapshot(path)
    assert snapshot.header == header
    assert not snapshot.net.training
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in snapshot.net.state_dict().items())
    assert snapshot.encoder.spec() == {"kind": "rgb"}
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(snapshot.net(x, 1.0, torch.eye(4)[:2]), net(x, 1.0, torch.eye(4)[:2]))


def test_files_of_version_1_hold_edm2_networks_and_become_version_2(tmp_path):
    with zipfile.ZipFile(DATA / "before_the_move" / "generate.zip") as archive:
        old = Path(archive.extract("main.safetensors", tmp_path))
    with safe_open(old, framework="pt") as file:
        fields = json.loads(file.metadata()["edm2_snapshot"])
    assert fields["format_version"] == 1
    assert "network" not in fields
    snapshot = load_snapshot(old)
    assert (snapshot.header.network, snapshot.header.format_version) == ("edm2", 2)
    new = tmp_path / "new.safetensors"
    save_snapshot(new, snapshot.net.state_dict(), snapshot.header)
    assert read_header(new) == read_header(old)
    with safe_open(new, framework="pt") as file:
        assert json.loads(file.metadata()["edm2_snapshot"])["network"] == "edm2"


def test_an_unknown_kind_and_a_missing_package_are_named(net, header, tmp_path, monkeypatch):
    save_snapshot(tmp_path / "s", net.state_dict(), dataclasses.replace(header, network="unheard"))
    assert read_header(tmp_path / "s").network == "unheard"  # a folder with such a file can still be listed
    with pytest.raises(ValueError, match=r"s holds a network of kind 'unheard', .* \(it knows edm2, dit\); update"):
        load_snapshot(tmp_path / "s")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    architecture = full_architecture(8, 3, 4, 0.5, {"kind": "dit"})
    dit = dataclasses.replace(header, network="dit", architecture=architecture)
    save_snapshot(tmp_path / "s", net.state_dict(), dit)
    with pytest.raises(ValueError, match=r"s: cannot build its network: .*pip install 'diffusers"):
        load_snapshot(tmp_path / "s")
    endless = dataclasses.replace(dit, architecture={**architecture, "num_layers": 10**9})
    save_snapshot(tmp_path / "s", net.state_dict(), endless)
    with pytest.raises(ValueError, match="it asks for 1000000000 blocks; at most 1000 are allowed"):
        load_snapshot(tmp_path / "s")


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_read_the_same_weights_and_notice_damage(net, header, tmp_path, threads):
    path = tmp_path / "s"
    save_snapshot(path, net.state_dict(), dataclasses.replace(header, dtype="float32"))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = load_snapshot(path).net.state_dict()
        content = bytearray(path.read_bytes())
        content[-1] ^= 1  # of the last tensor
        path.write_bytes(content)
        with pytest.raises(ValueError, match="do not match their checksum"):
            load_snapshot(path)
        assert torch.get_num_threads() == threads  # as the caller had it
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[name], tensor) for name, tensor in net.state_dict().items())


def test_default_storage_is_half_precision_except_for_small_tensors(net, header, tmp_path):
    save_snapshot(tmp_path / "s", net.state_dict(), header)
    stored = load_file(tmp_path / "s")  # any safetensors reader can read it
    for name, tensor in stored.items():
        assert tensor.dtype == (torch.float16 if tensor.ndim > 1 else torch.float32)
        assert torch.equal(tensor, net.state_dict()[name].to(tensor.dtype))
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) & 0o044  # others may read it, umask permitting


def test_compute_dtype_is_the_callers(net, header, tmp_path):
    save_snapshot(tmp_path / "s", net.state_dict(), header)
    snapshot = load_snapshot(tmp_path / "s", dtype=torch.bfloat16)
    assert snapshot.net.compute_dtype == torch.bfloat16
    assert next(snapshot.net.parameters()).dtype == torch.float32


def test_header_reads_without_weights(net, header, tmp_path):
    save_snapshot(tmp_path / "s", net.state_dict(), header)
    assert read_header(tmp_path / "s") == header


@pytest.mark.parametrize("keep", [0, 5, 200, -1], ids=["empty", "length", "head", "tail"])
def test_truncated_file_is_refused_by_name(net, header, tmp_path, keep):
    save_snapshot(tmp_path / "s", net.state_dict(), header)
    whole = (tmp_path / "s").read_bytes()
    (tmp_path / "s").write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=r"s is not a complete snapshot"):
        load_snapshot(tmp_path / "s")


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "a pointer of Git LFS, not the file itself; run `git lfs pull`",
        ),
        (b"<!DOCTYPE html>", "a web page"),
        (b"PK\3\4", "a zip, or weights that torch.save wrote"),
    ],
)
def test_what_is_there_instead_of_a_snapshot_is_named(tmp_path, start, kind):
    (tmp_path / "net.safetensors").write_bytes(start + bytes(300))
    with pytest.raises(ValueError, match=f"net.safetensors is not a snapshot, but {kind}"):
        read_header(tmp_path / "net.safetensors")


def test_other_files_are_refused_with_a_reason(net, header, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        load_snapshot(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"{tmp_path} is empty; give a snapshot, or the folder of a run"):
        load_snapshot(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="not a snapshot of this project"):
        load_snapshot(tmp_path / "foreign")
    save_snapshot(tmp_path / "s", net.state_dict(), dataclasses.replace(header, format_version=99))
    with pytest.raises(ValueError, match="newer than 2; update"):
        load_snapshot(tmp_path / "s")
    wider = {**header.architecture, "model_channels": 16}
    save_snapshot(tmp_path / "s", net.state_dict(), dataclasses.replace(header, architecture=wider))
    with pytest.raises(ValueError, match=r"do not fit the header's architecture .*unet"):
        load_snapshot(tmp_path / "s")
    strange = {**header.architecture, "wings": 2}
    save_snapshot(tmp_path / "s", net.state_dict(), dataclasses.replace(header, architecture=strange))
    with pytest.raises(ValueError, match=r"cannot build its network: .*wings"):
        load_snapshot(tmp_path / "s")


@pytest.mark.parametrize(
    ("text", "said"),
    [("[]", "damaged"), ("[" * 100_000, "damaged"), ("{}", "damaged"), ("null", "damaged"), ("{", "damaged")],
)
def test_a_damaged_header_is_reported(tmp_path, text, said):
    save_file({"a": torch.zeros(1)}, tmp_path / "s", {"edm2_snapshot": text})
    with pytest.raises(ValueError, match=f"s: the snapshot header is {said}"):
        read_header(tmp_path / "s")


@pytest.mark.parametrize(
    "change", [{"num_blocks": 10**9}, {"img_channels": -1}, {"channels_per_head": 0}, {"channel_mult": "12"}]
)
def test_an_impossible_architecture_is_reported_with_the_file(net, header, tmp_path, change):
    crooked = {**header.architecture, "num_blocks": 1, "channel_mult": [1, 2], "attn_resolutions": [8], **change}
    save_snapshot(tmp_path / "s", net.state_dict(), dataclasses.replace(header, architecture=crooked))
    with pytest.raises(ValueError, match=r"s: cannot build its network: .") as error:
        load_snapshot(tmp_path / "s")
    assert "\n" not in str(error.value)


def test_failed_write_leaves_the_old_file_and_no_other(net, header, tmp_path):
    path = tmp_path / "s"
    path.write_text("old")
    state = dict(net.state_dict())
    state["unet.out_conv.weight"] = torch.full_like(state["unet.out_conv.weight"], float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        save_snapshot(path, state, header)
    with pytest.raises(ValueError, match="never written"), SnapshotWriter(path, header, {"a": torch.Size([1])}):
        pass
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_writer_keeps_its_order(header, tmp_path):
    shapes = {"a": torch.Size([1]), "b": torch.Size([2])}
    with (
        pytest.raises(ValueError, match="out of order; expected a"),
        SnapshotWriter(tmp_path / "s", header, shapes) as writer,
    ):
        writer.write("b", torch.zeros(2))


def test_tensor_may_come_in_parts(header, tmp_path):
    shapes = {"a": torch.Size([2, 3]), "b": torch.Size([])}
    a, b = torch.arange(6.0).reshape(2, 3), torch.tensor(7.0)
    with SnapshotWriter(tmp_path / "parts", header, shapes) as writer:
        writer.write_part("a", a.flatten()[:4])
        with pytest.raises(ValueError, match="out of order; expected a"):
            writer.write("b", b)
        with pytest.raises(ValueError, match=r"a \[3\] out of order"):
            writer.write_part("a", a.flatten()[:3])
        writer.write_part("a", a.flatten()[4:])
        writer.write("b", b)
    save_snapshot(tmp_path / "whole", {"a": a, "b": b}, header)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


def test_names_tell_lengths_apart():
    names = [snapshot_name(1_500_000, std, "p") for std in (0.05, 0.0125, 0.013, None)]
    assert names == [f"p-0001500-{text}.safetensors" for text in ("0.050", "0.0125", "0.013", "raw")]


def test_unknown_dtype_is_refused(header, tmp_path):
    with pytest.raises(ValueError, match="float16, bfloat16, float32"):
        SnapshotWriter(tmp_path / "s", dataclasses.replace(header, dtype="int8"), {})


def test_a_snapshot_of_any_header_length_is_not_taken_for_a_pickle(net, header, tmp_path):
    # the header's length, the first bytes of the file, grows by 8 until its lowest byte has been a pickle's 0x80
    for padding in range(0, 256, 8):
        save_snapshot(tmp_path / "net", net.state_dict(), dataclasses.replace(header, run_id="r" * padding))
        assert not is_published_pickle(tmp_path / "net")
        (tmp_path / "cut").write_bytes((tmp_path / "net").read_bytes()[:8])
        assert not is_published_pickle(tmp_path / "cut")
    for protocol in (2, 3, 4, 5):
        (tmp_path / "pickle").write_bytes(pickle.dumps({"ema": None}, protocol))
        assert is_published_pickle(tmp_path / "pickle")


def weights_and_header(path):
    snapshot = load_snapshot(path)
    return snapshot.header, {name: tensor.clone() for name, tensor in snapshot.net.state_dict().items()}


def test_no_flipped_bit_changes_a_network(net, header, tmp_path):
    save_snapshot(tmp_path / "s", net.state_dict(), header)
    data, (expected_header, expected) = (tmp_path / "s").read_bytes(), weights_and_header(tmp_path / "s")
    preamble, rng = 8 + int.from_bytes(data[:8], "little"), random.Random(0)
    bits = [rng.randrange(8 * preamble) for _ in range(60)]
    bits += [rng.randrange(8 * preamble, 8 * len(data)) for _ in range(40)]
    refusals = {}
    for bit in bits:
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        (tmp_path / "s").write_bytes(changed)
        try:
            found_header, found = weights_and_header(tmp_path / "s")
        except ValueError as error:
            refusals[bit] = str(error)
        else:  # in the name of a checksum, or a space at the end
            assert found_header == expected_header
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not [text for text in refusals.values() if "\n" in text]
    assert [bit for bit in bits if bit // 8 >= preamble and "s is damaged: the weights " not in refusals[bit]] == []


def test_checksums_are_those_of_the_bytes_and_files_without_them_load(net, header, tmp_path):
    save_snapshot(tmp_path / "s", net.state_dict(), header)
    stored = load_file(tmp_path / "s")
    with safe_open(tmp_path / "s", framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["edm2_weights_crc32"]) == {
        name: f"{zlib.crc32(tensor.numpy().tobytes()):08x}" for name, tensor in stored.items()
    }
    # another program that keeps the metadata may store the tensors in another order
    save_file(dict(reversed(stored.items())), tmp_path / "again", metadata)
    assert load_snapshot(tmp_path / "again").header == header
    save_file(stored, tmp_path / "without", {"edm2_snapshot": metadata["edm2_snapshot"]})
    assert load_snapshot(tmp_path / "without").header == header
    assert [name for name, _ in read_tensors(tmp_path / "without")]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"a": 1}', '{"unet.out_conv.weight": "00000000"}', "[" * 100_000])
def test_checksums_that_cannot_be_read_are_reported(net, header, tmp_path, text):
    save_file(net.state_dict(), tmp_path / "s", {"edm2_snapshot": header.to_json(), "edm2_weights_crc32": text})
    for read in (load_snapshot, lambda path: list(read_tensors(path))):
        with pytest.raises(ValueError, match="s is damaged: its checksums cannot be read") as error:
            read(tmp_path / "s")
        assert "\n" not in str(error.value)


def test_parts_in_any_order_are_compared_once_all_are_read(header, tmp_path):
    values = torch.randn(5000)
    save_snapshot(tmp_path / "s", {"a": values}, header)
    parts = list(itertools.pairwise([0, 1, 17, 4000, 4096, 5000]))
    random.Random(0).shuffle(parts)
    tensors = {"a": TensorInFile(*tensor_layout(tmp_path / "s")["a"])}
    with WeightReader(Weights("s", header, tensors, tmp_path / "s")) as reader:
        for start, stop in [*parts, (10, 20), (0, 5000)]:
            assert torch.equal(reader.read("a", start, stop), values[start:stop])
    data = bytearray((tmp_path / "s").read_bytes())
    data[-9] ^= 4
    (tmp_path / "s").write_bytes(data)
    with WeightReader(Weights("s", header, tensors, tmp_path / "s")) as reader:
        for start, stop in parts[:-1]:
            reader.read("a", start, stop)
        with pytest.raises(ValueError, match="s is damaged: the weights a do not match their checksum"):
            reader.read("a", *parts[-1])
        with pytest.raises(ValueError, match="s is damaged: the weights a"):
            reader.read("a", 0, 5000)


@pytest.mark.parametrize("names", [("ant",), tuple("abcde")])
def test_names_of_another_number_of_classes_are_refused(net, header, tmp_path, names):
    save_snapshot(tmp_path / "s", net.state_dict(), dataclasses.replace(header, label_names=names))
    with pytest.raises(ValueError, match=rf"s: its header names {len(names)} classes, but the network has 4$"):
        load_snapshot(tmp_path / "s")
