"""The forecast of step times: its closed forms and its limits."""

import dataclasses

import pytest

from benchmarks.step_model import Links, Machine, TrainingJob, all_reduce_sec, reading, step_time

MIB = 1 << 20
LINKS = Links(group=8, inside=100e9, between=10e9, latency_sec=0)
MACHINE = Machine(multiply_adds=1e12, memory_bytes=1e12, links=LINKS, overlap=1)
JOB = TrainingJob(parameters=100 * MIB, multiply_adds=1e9, batch_size=1024)


def test_one_rank_computes_three_forward_passes_and_waits_for_nobody():
    time = step_time(JOB, MACHINE, 1)
    by_weight = 76 * 100 * MIB / 1e12
    assert time.compute == pytest.approx(3 * 1024 * 1e9 / 1e12 + by_weight)
    assert time.communication == 0
    assert step_time(dataclasses.replace(JOB, recompute=True), MACHINE, 1).compute == pytest.approx(
        4 * 1.024 + by_weight
    )
    assert step_time(JOB, dataclasses.replace(MACHINE, pass_sec=0.5), 1).compute == pytest.approx(time.compute + 0.5)


def test_a_ring_moves_each_byte_twice_but_for_one_part():
    assert all_reduce_sec(1e9, LINKS, 1) == 0
    assert all_reduce_sec(1e9, LINKS, 2) == pytest.approx(1e9 / 100e9)
    assert all_reduce_sec(1e9, LINKS, 8) == pytest.approx(2 * 7 / 8 * 1e9 / 100e9)


def test_between_nodes_each_rank_carries_its_part():
    within = 2 * 7 / 8 * 1e9 / 100e9
    assert all_reduce_sec(1e9, LINKS, 16) == pytest.approx(within + 2 * 1 / 2 * 1e9 / 8 / 10e9)


def test_latency_counts_messages():
    late = dataclasses.replace(LINKS, latency_sec=1e-3)
    assert all_reduce_sec(100 * MIB, late, 8) - all_reduce_sec(100 * MIB, LINKS, 8) == pytest.approx(4 * 2 * 3 * 1e-3)


def test_compute_hides_all_but_the_last_bucket():
    few = step_time(JOB, MACHINE, 8)
    assert few.communication == pytest.approx(all_reduce_sec(25 * MIB, LINKS, 8))
    bare = step_time(JOB, dataclasses.replace(MACHINE, overlap=0), 8)
    assert bare.communication == pytest.approx(all_reduce_sec(400 * MIB, LINKS, 8))
    assert bare.total - few.total == pytest.approx(few.hidden)


def test_so_many_ranks_that_nothing_is_left_to_hide_behind():
    machine = dataclasses.replace(MACHINE, memory_bytes=1e15)
    time = step_time(dataclasses.replace(JOB, batch_size=512, multiply_adds=1e6), machine, 512)
    assert time.hidden == pytest.approx(2e-6)  # the backward pass of one image
    assert time.communication > 100 * time.compute


def test_sharing_divides_what_is_kept_and_sends_the_weights_once():
    whole, shared = step_time(JOB, MACHINE, 8), step_time(dataclasses.replace(JOB, shard=True), MACHINE, 8)
    assert whole.update - shared.update == pytest.approx(JOB.parameters * (28 + 24) * 7 / 8 / 1e12)
    assert shared.communication - whole.communication == pytest.approx(all_reduce_sec(400 * MIB, LINKS, 8) / 2)


def test_reading_is_one_read_an_image():
    assert vars(reading(1000, 12288)) == {"bytes_per_sec": 12288000, "reads_per_sec": 1000}
