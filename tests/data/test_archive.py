"""Folders and zips give the same files by number; damaged files are named."""

import io
import os
import pickle
import struct
import sys
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from edm2kit.data.archive import open_archive
from tests.support.pictures import encoded, picture, write_folder, write_zip

FILES = {f"{k % 3}/{name}.png": os.urandom(50 + k) for k, name in enumerate("bdacfe")}


@pytest.fixture(params=["folder", "stored", "deflated", "prefixed"])
def archive(request, tmp_path):
    others = {"note.txt": b"x", ".hidden.png": b"x", "a/.b/c.png": b"x", "__MACOSX/d.png": b"x", "dataset.json": b"{}"}
    if request.param == "folder":
        return open_archive(write_folder(tmp_path / "d", FILES | others), (".png",))
    method = zipfile.ZIP_DEFLATED if request.param == "deflated" else zipfile.ZIP_STORED
    path = write_zip(tmp_path / "d.zip", FILES | others, method)
    if request.param == "prefixed":
        path.write_bytes(b"#!/bin/sh\n" + path.read_bytes())
    return open_archive(path, (".png",))


def test_files_come_in_the_order_of_their_names_and_others_are_listed(archive):
    assert archive.names == sorted(FILES)
    assert archive.ignored == ["dataset.json", "note.txt"]
    assert [archive.read(k) for k in range(6)] == [FILES[name] for name in sorted(FILES)]
    assert [archive.checksum(k) for k in range(6)] == [(len(FILES[n]), zlib.crc32(FILES[n])) for n in sorted(FILES)]
    assert archive.read_extra("dataset.json") == b"{}"
    assert archive.read_extra("other.json") is None


def test_copies_and_other_processes_read_the_same(archive):
    assert pickle.loads(pickle.dumps(archive)).read(3) == archive.read(3)
    for method in ("fork", "spawn"):
        with ProcessPoolExecutor(1, mp_context=get_context(method)) as pool:
            assert pool.submit(archive.read, 4).result() == archive.read(4)


def test_reading_a_file_interns_no_name(archive, monkeypatch):
    # each name would take a place in Python's table of interned strings, and rebuilding the table makes a reader grow
    interned, name = [], archive.names[0].rpartition("/")[2]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "intern", lambda text: interned.append(text) or text)
        assert Path("folder", name).parts  # a path does it
        assert name in interned
        interned.clear()
        archive.read(0)
        archive.checksum(0)
    assert name not in interned


def test_a_linked_folder_is_followed_once(tmp_path):
    write_folder(tmp_path / "real", {"x.png": b"1"})
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "cat").symlink_to(tmp_path / "real")
    (tmp_path / "d" / "round").symlink_to(tmp_path / "d")
    assert open_archive(tmp_path / "d", (".png",)).names == ["cat/x.png"]


def test_the_comment_of_a_zip_may_look_like_its_end(tmp_path):
    path = write_zip(tmp_path / "a.zip", FILES)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"PK\5\6 is how a zip ends" + bytes(40)
    assert open_archive(path, (".png",)).names == sorted(FILES)


def test_zip64_entries_are_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file, file.open("a.png", "w", force_zip64=True) as member:
        member.write(b"abc")
    assert open_archive(tmp_path / "a.zip", (".png",)).read(0) == b"abc"
    # sizes and offset moved to the extra field, as beyond 4 GiB
    local = struct.pack("<4s5H3L2H", b"PK\x03\x04", 45, 0, 0, 0, 33, zipfile.crc32(b"abc"), 3, 3, 5, 0) + b"a.pngabc"
    extra = struct.pack("<4H", 9, 2, 0, 0)[:6] + struct.pack("<2H3Q", 1, 24, 3, 3, 0)
    wide = 0xFFFFFFFF
    fields = (45, 45, 0, 0, 0, 33, zipfile.crc32(b"abc"), wide, wide, 5, len(extra), 0, 0, 0, 0, wide)
    central = struct.pack("<4s6H3L5H2L", b"PK\x01\x02", *fields) + b"a.png" + extra
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, len(central), len(local))
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, len(local + central), 1)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, wide, wide, 0)
    (tmp_path / "b.zip").write_bytes(local + central + end64 + locator + end)
    assert open_archive(tmp_path / "b.zip", (".png",)).read(0) == b"abc"


def test_what_is_not_an_archive_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none: no such file"):
        open_archive(tmp_path / "none", (".png",))
    (tmp_path / "a.zip").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"a\.zip: not a zip archive, or cut short"):
        open_archive(tmp_path / "a.zip", (".png",))
    write_folder(tmp_path / "d", {"note.txt": b""})
    with pytest.raises(ValueError, match=r"d: contains no images \(\.png\); .* 1 other file, such as note\.txt"):
        open_archive(tmp_path / "d", (".png",))


def test_every_way_to_cut_a_zip_short_or_damage_its_index_is_a_value_error(tmp_path):
    whole = write_zip(tmp_path / "whole.zip", FILES).read_bytes()
    index = whole.index(b"PK\x01\x02")
    damaged = [whole[:size] for size in range(0, len(whole), 7)]
    damaged += [whole[:100] + whole[150:]]
    for at in range(index, len(whole)):
        damaged.append(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
    messages = []
    for data in damaged:
        (tmp_path / "cut.zip").write_bytes(data)
        try:
            archive = open_archive(tmp_path / "cut.zip", (".png",))
            assert all(archive.read(k) == FILES.get(name) for k, name in enumerate(archive.names) if name in FILES)
        except ValueError as error:
            messages.append(str(error))
    assert all(message.startswith(f"{tmp_path}/cut.zip") for message in messages)
    assert len(messages) > len(damaged) / 2


def test_a_damaged_file_in_a_zip_is_named(tmp_path):
    for method, reason in ((zipfile.ZIP_STORED, "checksum is wrong"), (zipfile.ZIP_DEFLATED, "is damaged in the zip")):
        path = write_zip(tmp_path / "d.zip", {"a.png": b"abc" * 50, "b.png": b"abd" * 50}, method)
        data = bytearray(path.read_bytes())
        data[data.index(b"b.png") + 6] ^= 0xFF
        path.write_bytes(data)
        archive = open_archive(path, (".png",))
        assert archive.read(0) == b"abc" * 50
        with pytest.raises(ValueError, match=rf"d\.zip/b\.png: .*{reason}"):
            archive.read(1)


def test_other_compression_and_repeated_names_are_refused(tmp_path):
    path = write_zip(tmp_path / "d.zip", {"a.png": b"abc" * 50}, zipfile.ZIP_LZMA)
    with pytest.raises(ValueError, match=r"a\.png: uses zip compression method 14"):
        open_archive(path, (".png",)).read(0)
    path.write_bytes(write_zip(path, {"a.png": b"1", "b.png": b"2"}).read_bytes().replace(b"b.png", b"a.png"))
    with pytest.raises(ValueError, match=r"contains a\.png twice"):
        open_archive(path, (".png",))


def test_a_file_that_vanishes_is_named(tmp_path):
    archive = open_archive(write_folder(tmp_path / "d", {"a.png": b"1"}), (".png",))
    (tmp_path / "d" / "a.png").unlink()
    with pytest.raises(ValueError, match=r"d/a\.png: cannot be read: No such file"):
        archive.read(0)


@pytest.mark.parametrize("kind", ["pipe", "link to a device", "huge"])
def test_what_is_not_a_file_of_a_possible_size_is_named_and_neither_waited_for_nor_read(tmp_path, kind):
    folder = write_folder(tmp_path / "d", {"b.png": b"1"})
    if kind == "pipe":
        os.mkfifo(folder / "a.png")
    elif kind == "huge":
        with open(folder / "a.png", "wb") as file:
            file.truncate(1 << 40)
    else:
        (folder / "a.png").symlink_to("/dev/zero")
    archive = open_archive(folder, (".png",))
    reason = "1099511627776 bytes, more than" if kind == "huge" else "a device or pipe, not a file"
    with pytest.raises(ValueError, match=f"a.png: cannot be read: it (is|has) {reason}"):
        archive.read(0)
    assert (archive.checksum(0) == (-1, 0)) == (kind != "huge")
    assert archive.read(1) == b"1"
    with pytest.raises(ValueError, match="a.png: is a device or pipe" if kind == "pipe" else "."):
        open_archive(folder / "a.png", (".png",))


def test_a_zip_that_is_cut_within_its_index_is_not_taken_for_a_zip_inside_it(tmp_path):
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("readme.txt", "x")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("0.png", encoded(picture()))
        archive.writestr("inner.zip", inner.getvalue())
    whole = (tmp_path / "set.zip").read_bytes()
    (tmp_path / "set.zip").write_bytes(whole[:-30])
    with pytest.raises(ValueError, match="the zip is cut short: its own index is missing"):
        open_archive(tmp_path / "set.zip", (".png",))
    (tmp_path / "set.zip").write_bytes(b"#!self-extractor" + whole)
    assert open_archive(tmp_path / "set.zip", (".png",)).read(0) == encoded(picture())


def test_a_zip_knows_the_checksums_of_all_files(tmp_path):
    everything = np.arange(len(FILES))
    digests = []
    for content in (b"1", b"2"):
        archive = open_archive(write_zip(tmp_path / "d.zip", {**FILES, "0/b.png": content}), (".png",))
        digests.append(archive.digest(everything))
    assert digests[0] != digests[1]
    assert archive.digest(everything[1:]) != archive.digest(everything)
