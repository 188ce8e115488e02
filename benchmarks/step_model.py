"""A model of training steps on many ranks: compute, communication of gradients, optimizer and averages, data."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Links:
    """Connections between ranks: fast within groups of `group` (the GPUs of a node), slower between groups.

    Bandwidths in bytes per second, rank and direction; `latency_sec` per message.
    """

    group: int
    inside: float
    between: float
    latency_sec: float


@dataclass(frozen=True)
class Machine:
    """One rank's speed: `multiply_adds` and `memory_bytes` per second as reached in training, and its links.

    `overlap` is the share of the backward pass that can hide communication: 0 if the processor that computes also moves
    the bytes. `pass_sec` is the constant part of a forward and backward pass, independent of the number of images.
    """

    multiply_adds: float
    memory_bytes: float
    links: Links
    overlap: float
    pass_sec: float = 0.0


@dataclass(frozen=True)
class TrainingJob:
    """A network and the settings of its training."""

    parameters: int
    multiply_adds: float  # of one evaluation of one image
    batch_size: int
    ema_outputs: int = 2
    recompute: bool = False
    shard: bool = False


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step; `communication` is the part that the step waits for, `hidden` the part behind compute."""

    compute: float
    communication: float
    hidden: float
    update: float

    @property
    def total(self) -> float:
        return self.compute + self.communication + self.update


BACKWARD_COST = 2  # multiply-adds of the backward pass in forward passes: gradients of inputs and of weights
_BUCKET_BYTES = 25 << 20  # of DistributedDataParallel
# Bytes of memory traffic per weight. A pass: norm, scaling twice, convolution, and their backward pass. Adam reads
# weight, gradient and moments, and writes all but the gradient. Gradients are checked and cleaned. Weights are
# normalised in place. An average is read and written, and the weight is read for it.
_PASS_BYTES, _ADAM_BYTES, _GRADIENT_BYTES, _NORMALISE_BYTES, _AVERAGE_BYTES = 76, 28, 16, 12, 12


def step_time(job: TrainingJob, machine: Machine, ranks: int) -> StepTime:
    """Forecast a step of `job.batch_size` images, divided evenly among `ranks`."""
    images = job.batch_size / ranks
    forward = images * job.multiply_adds / machine.multiply_adds
    backward = forward * (BACKWARD_COST + job.recompute)
    wire = all_reduce_sec(4 * job.parameters, machine.links, ranks)
    last = all_reduce_sec(
        min(4 * job.parameters, _BUCKET_BYTES), machine.links, ranks
    )  # its gradients are computed last
    hidden = min(wire - last, machine.overlap * backward)
    kept = ranks if job.shard else 1
    traffic = _ADAM_BYTES / kept + _GRADIENT_BYTES + _NORMALISE_BYTES + _AVERAGE_BYTES * job.ema_outputs / kept
    update = job.parameters * traffic / machine.memory_bytes
    if job.shard:
        wire += broadcast_sec(4 * job.parameters, machine.links, ranks)  # the new weights, after the update
    by_weight = job.parameters * _PASS_BYTES / machine.memory_bytes + machine.pass_sec
    return StepTime(forward + backward + by_weight, wire - hidden, hidden, update)


def all_reduce_sec(count: float, links: Links, ranks: int) -> float:
    """Seconds to sum `count` bytes over all ranks: first within groups, then each rank's part between groups."""
    inside = min(ranks, links.group)
    groups = math.ceil(ranks / links.group)
    seconds = 2 * (inside - 1) / inside * count / links.inside
    seconds += 2 * (groups - 1) / groups * count / inside / links.between
    messages = max(1, math.ceil(count / _BUCKET_BYTES)) * 2 * math.ceil(math.log2(max(ranks, 1)))
    return seconds + messages * links.latency_sec


def broadcast_sec(count: float, links: Links, ranks: int) -> float:
    """Seconds until every rank has the shares of all ranks, `count` bytes together: half of an all-reduce."""
    return all_reduce_sec(count, links, ranks) / 2


@dataclass(frozen=True)
class Reading:
    """Load of a run on shared storage."""

    bytes_per_sec: float
    reads_per_sec: float


def reading(images_per_sec: float, bytes_per_image: float) -> Reading:
    """The load of training, which reads each image separately at a random position, on any number of ranks."""
    return Reading(images_per_sec * bytes_per_image, images_per_sec)
