"""The global order: a function of (seed, position) alone, the same batches for any number of ranks and workers."""

import itertools
import multiprocessing
import os
import queue
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from edm2kit.data import batches
from edm2kit.data.batches import GlobalOrder, micro_batch_sizes, training_batches
from edm2kit.data.dataset import ImageDataset
from edm2kit.data.image_files import encode_png
from edm2kit.torch_utils import dist
from tests.support import ROOT
from tests.support.pictures import encoded, picture, some_files, with_labels, write_folder, write_zip


def test_every_image_comes_once_per_epoch_in_an_order_of_its_own():
    order = GlobalOrder(100, seed=3)
    epochs = order.indices(0, 300).reshape(3, 100)
    assert epochs.dtype == np.int64
    assert (np.sort(epochs, axis=1) == np.arange(100)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert (GlobalOrder(100, seed=4).indices(0, 100) != epochs[0]).any()


def test_a_stretch_depends_on_seed_and_position_alone():
    whole = GlobalOrder(7, seed=1).indices(0, 200)
    order = GlobalOrder(7, seed=1)
    for start, count in [(150, 50), (0, 1), (6, 2), (3, 60), (199, 1), (0, 0), (100, 0)]:
        np.testing.assert_array_equal(order.indices(start, count), whole[start : start + count])


def test_the_order_never_changes():
    # a resumed run depends on it: these numbers may not change with any version of anything
    assert GlobalOrder(8, seed=0).indices(0, 16).tolist() == PINNED


PINNED = [1, 7, 3, 2, 4, 6, 5, 0, 3, 0, 2, 6, 7, 5, 1, 4]


def test_one_image_and_huge_positions():
    assert GlobalOrder(1, seed=0).indices(10**12, 3).tolist() == [0, 0, 0]
    assert sorted(GlobalOrder(5, seed=0).indices(5 * 10**12, 5).tolist()) == [0, 1, 2, 3, 4]


def test_at_most_two_permutations_are_held():
    order = GlobalOrder(4, seed=0)
    order.indices(0, 40)
    assert sorted(order._permutations) == [8, 9]


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="cannot order 0 images"):
        GlobalOrder(0, seed=0)
    with pytest.raises(ValueError, match="start_nimg is -1 and count 4"):
        GlobalOrder(5, seed=0).indices(-1, 4)


@pytest.mark.parametrize(
    ("batch_size", "world_size", "batch_gpu", "sizes"),
    [(8, 1, None, [8]), (8, 2, None, [4]), (8, 2, 2, [2, 2]), (8, 1, 3, [3, 3, 2]), (8, 2, 99, [4]), (1, 1, 1, [1])],
)
def test_micro_batch_sizes(batch_size, world_size, batch_gpu, sizes):
    assert micro_batch_sizes(batch_size, world_size, batch_gpu) == sizes


@pytest.mark.parametrize(("batch_size", "world_size"), [(9, 2), (3, 4), (0, 1)])
def test_shares_that_would_differ_are_refused(batch_size, world_size):
    with pytest.raises(ValueError, match=f"{batch_size} images cannot be divided among {world_size} processes"):
        micro_batch_sizes(batch_size, world_size)
    with pytest.raises(ValueError, match="batch_gpu is 0; expected at least 1 image"):
        micro_batch_sizes(4, 1, batch_gpu=0)


@pytest.fixture
def dataset(tmp_path):
    files = {name: encode_png(picture(k)) for k, name in enumerate(some_files(11))}  # read without decoding
    dataset = ImageDataset(write_zip(tmp_path / "d.zip", with_labels(files, [k % 3 for k in range(11)])))
    assert not dataset.needs_decoding
    return dataset


def take(dataset, steps, start=0, batch_size=8, world_size=1, batch_gpu=None, workers=0):
    """Positions and raw pixels of some global batches, put together from all ranks; checks labels on the way."""
    order = GlobalOrder(len(dataset), seed=5)
    rounds = len(micro_batch_sizes(batch_size, world_size, batch_gpu))
    parts = []
    for rank in range(world_size):
        options = {"rank": rank, "world_size": world_size, "batch_gpu": batch_gpu, "workers": workers}
        batches = training_batches(dataset, order, start, batch_size, **options)
        parts.append([list(itertools.islice(batches, rounds)) for _ in range(steps)])
        batches.close()
    found = [batch for step in range(steps) for rank in range(world_size) for batch in parts[rank][step]]
    positions = torch.cat([batch.positions for batch in found])
    images = order.indices(start, steps * batch_size)
    labels = torch.cat([batch.labels for batch in found])
    torch.testing.assert_close(labels, torch.eye(3)[dataset.labels[images[positions - start]]])
    return positions, torch.cat([batch.raw for batch in found])


def test_batches_follow_the_order(dataset):
    positions, raw = take(dataset, steps=4, start=16)
    assert positions.tolist() == list(range(16, 48))
    for image, pixels in zip(GlobalOrder(11, seed=5).indices(16, 32), raw, strict=True):
        np.testing.assert_array_equal(pixels.numpy(), dataset[int(image)][0])


@pytest.mark.parametrize(
    ("world_size", "batch_gpu", "workers"),
    [(1, 1, 0), (1, 3, 0), (2, None, 0), (2, 3, 0), (4, None, 0), (4, 1, 0), (1, 3, 2), (2, None, 2)],
)
def test_any_number_of_ranks_and_workers_sees_the_same_global_batches(dataset, world_size, batch_gpu, workers):
    expected = take(dataset, steps=5)
    for found, wanted in zip(
        take(dataset, steps=5, world_size=world_size, batch_gpu=batch_gpu, workers=workers), expected, strict=True
    ):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("workers", [0, 1])
def test_no_global_random_number_is_drawn(dataset, workers):
    before = torch.get_rng_state()
    take(dataset, steps=1, workers=workers)
    assert torch.equal(torch.get_rng_state(), before)


def test_label_free_batches(tmp_path):
    dataset = ImageDataset(write_folder(tmp_path, some_files(3)))
    batch = next(training_batches(dataset, GlobalOrder(3, 0), 0, 4, rank=0, world_size=1))
    assert batch.labels.shape == (4, 0)
    assert (batch.raw.shape, batch.raw.dtype) == ((4, 3, 8, 8), torch.uint8)


def test_workers_end_when_the_iterator_is_closed(dataset):
    batches = training_batches(dataset, GlobalOrder(11, 0), 0, 4, rank=0, world_size=1, workers=2)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_is_one_value_error_that_names_it(tmp_path, workers):
    files = some_files(5) | {"z.png": encoded(picture(0))[:100]}
    dataset = ImageDataset(write_folder(tmp_path / "d", files))
    batches = training_batches(dataset, GlobalOrder(6, 0), 0, 2, rank=0, world_size=1, workers=workers)
    with pytest.raises(ValueError, match=r"^\S*/d/z\.png: the image is damaged or cut short: [^\n]*$"):
        list(itertools.islice(batches, 3))
    assert multiprocessing.active_children() == []


def test_an_order_of_other_length_is_refused(dataset):
    with pytest.raises(ValueError, match="the order is for 5 images, but the data set has 11"):
        training_batches(dataset, GlobalOrder(5, 0), 0, 4, rank=0, world_size=1)


SIGNALLED = """
import os, signal, sys
from edm2kit.data.dataset import ImageDataset
from edm2kit.data.batches import GlobalOrder, training_batches
dataset = ImageDataset(sys.argv[1])
batches = training_batches(dataset, GlobalOrder(len(dataset), 0), 0, 4, rank=0, world_size=1, workers=2)
next(batches)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
    os.killpg(0, number)
for _ in range(50):
    next(batches)
print("read on", flush=True)
if sys.argv[2] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("end", "code"), [("leave", 0), ("kill", -9)])
def test_workers_outlive_signals_to_the_group_but_not_the_training_process(dataset, end, code):
    # the pipe is at its end once every process that holds it is gone
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, str(dataset.path), end],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stdout) == (code, "read on\n"), done.stderr


@pytest.mark.parametrize("trouble", ["long TMPDIR", "small shared memory"])
def test_without_shared_memory_batches_come_through_pipes_and_are_the_same(tmp_path, monkeypatch, capsys, trouble):
    source = ImageDataset(write_folder(tmp_path / "data", some_files(8)))
    expected = list(itertools.islice(training_batches(source, GlobalOrder(8, 0), 0, 4, rank=0, world_size=1), 4))
    if trouble == "long TMPDIR":
        folder = tmp_path / ("x" * 100)
        folder.mkdir()
        monkeypatch.setattr(batches.tempfile, "gettempdir", lambda: str(folder))
    else:
        monkeypatch.setattr(batches.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    stream = training_batches(source, GlobalOrder(8, 0), 0, 4, rank=0, world_size=1, workers=1)
    assert "read more slowly" in capsys.readouterr().err
    for batch, other in zip(itertools.islice(stream, 4), expected, strict=True):
        for a, b in zip(batch, other, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
    stream.close()


class Slow:
    """A source that reads only once the file `gate` exists."""

    def __init__(self, source, gate):
        self.source, self.gate, self.path = source, gate, source.path
        self.item_shape, self.item_dtype = source.item_shape, source.item_dtype

    def __len__(self):
        return len(self.source)

    def read(self, indices):
        with open(self.gate):  # a FIFO: waits until somebody writes
            return self.source.read(indices)

    def read_labels(self, indices):
        return self.source.read_labels(indices)


@pytest.fixture
def gated(tmp_path):
    """A data set that answers as soon as somebody opens the FIFO `gate` for writing."""
    os.mkfifo(tmp_path / "gate")
    return Slow(ImageDataset(write_folder(tmp_path / "data", some_files(8))), tmp_path / "gate")


def test_a_disk_that_does_not_answer_is_reported_and_reading_goes_on_when_it_does(gated, monkeypatch):
    said, held = [], []

    def open_the_gate(text):
        said.append(text)
        held.append(os.open(gated.gate, os.O_RDWR))

    monkeypatch.setattr(batches, "LOOK_SEC", 0.2)
    monkeypatch.setattr(batches.dist, "warn0", open_the_gate)
    stream = training_batches(gated, GlobalOrder(8, 0), 0, 8, rank=0, world_size=1, workers=1)
    assert next(stream).positions.tolist() == list(range(8))
    assert "have read nothing for 0 s: one may be stopped" in said[0]
    stream.close()
    for file in held:
        os.close(file)


def test_reading_processes_that_are_stopped_end_the_run_after_the_time_to_wait(gated, monkeypatch):
    monkeypatch.setattr(batches, "LOOK_SEC", 0.1)
    before = multiprocessing.active_children()
    with batches.dist.waiting_at_most(0.3):
        stream = training_batches(gated, GlobalOrder(8, 0), 0, 8, rank=0, world_size=1, workers=1)
        with pytest.raises(ValueError, match=r"reading processes \(\d+\) have read nothing .*--timeout sets"):
            next(stream)
    assert multiprocessing.active_children() == before


def test_a_reader_that_stops_while_it_hands_over_a_batch_is_given_up(monkeypatch):
    killed = threading.Event()

    class Reader:
        pid = 7

        def kill(self):
            killed.set()

    def hand_over():
        killed.wait(60)  # for the socket of a stopped process, which the loader's own limit does not cover
        raise EOFError
        yield

    monkeypatch.setattr(batches, "_WATCH_SEC", 0.01)
    with dist.waiting_at_most(0.05):
        watch = batches._Watch([Reader()], 0.02, "data")
        with pytest.raises(
            ValueError, match=r"the reading processes \(7\) have read nothing for .* Run the same command"
        ):
            batches._next_watched(hand_over(), watch)
    assert killed.is_set()


def test_a_disk_that_does_not_answer_is_named_and_given_up_without_reading_processes(gated, monkeypatch, capsys):
    monkeypatch.setattr(batches, "LOOK_SEC", 0.05)
    others = threading.active_count()
    with dist.waiting_at_most(0.12):
        stream = training_batches(gated, GlobalOrder(8, 0), 0, 8, rank=0, world_size=1)
        expected = rf"{gated.path}: no images have been read for 0 s; its disk may not answer\. Run the same command"
        with pytest.raises(ValueError, match=expected):
            next(stream)
    stream.close()
    said = capsys.readouterr().err
    assert (
        said.count("no images have been read for 0 s; its disk may not answer (gives up after 0 s; see --timeout)") == 2
    )
    os.close(os.open(gated.gate, os.O_RDWR))  # the thread goes on, and ends
    for thread in threading.enumerate():
        if thread.name == "reader":
            thread.join(60)
    assert threading.active_count() == others


def test_a_disk_that_answers_late_costs_nothing_without_reading_processes(gated, monkeypatch):
    opened = []
    monkeypatch.setattr(batches, "LOOK_SEC", 0.05)
    monkeypatch.setattr(batches.dist, "warn0", lambda text: opened.append(os.open(gated.gate, os.O_RDWR)))
    stream = training_batches(gated, GlobalOrder(8, 0), 0, 8, rank=0, world_size=1)
    found = [next(stream) for _ in range(2)]
    assert [batch.positions.tolist() for batch in found] == [list(range(8)), list(range(8, 16))]
    np.testing.assert_array_equal(found[0].raw, gated.source.read(GlobalOrder(8, 0).indices(0, 8)))
    stream.close()
    for file in opened:
        os.close(file)


@pytest.mark.parametrize("error", [KeyError("a bug"), RuntimeError("timed out"), SystemExit(3)])
def test_other_errors_of_a_source_are_raised_as_they_are_without_reading_processes(tmp_path, error):
    class Odd(ImageDataset):
        def read(self, indices):
            raise error

    source = Odd(write_folder(tmp_path / "data", some_files(8)))
    stream = training_batches(source, GlobalOrder(8, 0), 0, 8, rank=0, world_size=1)
    with pytest.raises(type(error)) as found:
        next(stream)
    assert found.value is error


def test_a_reader_that_dies_while_it_hands_over_a_batch_is_reported():
    class Reader:
        pid = 7

    def hand_over():
        raise ConnectionResetError("Connection reset by peer")
        yield

    watch = batches._Watch([Reader()], 60, "data")
    with pytest.raises(ValueError, match=r"a reading process died \(Connection reset by peer\)"):
        batches._next_watched(hand_over(), watch)
    watch.ended.set()


def test_batches_that_are_read_before_a_disk_stops_answering_are_handed_over():
    answer = threading.Event()

    def items():
        yield from range(10)  # one, two and four at once, then three before the one that never comes
        answer.wait()

    thread = batches._ReadingThread(items(), look_sec=60)
    found = [next(thread) for _ in range(7)]
    thread._look_sec = 1.0
    found += [next(thread) for _ in range(3)]  # an exception if they were held back
    assert found == list(range(10))
    with pytest.raises(queue.Empty):
        next(thread)
    answer.set()
    with pytest.raises(StopIteration):
        next(thread)
    thread.close()
