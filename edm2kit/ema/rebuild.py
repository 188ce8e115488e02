"""EMAs of any length and time, rebuilt from stored snapshots in one pass over their files.

Karras et al. 2023, Section 3.2 and Algorithm 3.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from edm2kit.ema.power_function import profile_fit, solve_posthoc_coefficients
from edm2kit.ema.weighted_sums import weighted_sums
from edm2kit.snapshots.file_format import DTYPES, Header, SnapshotWriter, network_on_meta
from edm2kit.snapshots.loading import open_weights
from edm2kit.snapshots.weights import Weights
from edm2kit.torch_utils.provenance import code_commit

# RMS rounding error relative to the RMS value, per eps: uniform on half a unit in the last place, mantissas log-uniform
_ROUNDING = math.sqrt(math.log(2) / 18)


@dataclass(frozen=True)
class Fit:
    """How near a rebuilt average comes to the wanted one; all of it is known before a weight is read.

    `error`: L2 distance of the rebuilt profile from the wanted one, relative to the wanted one's norm. `width`: the
    relative std that the rebuilt profile has, None where it oscillates too much to have one. `rounding`: expected
    error that the inputs' storage leaves in the weights, relative to their norm; large coefficients of alternating
    sign magnify it.
    """

    error: float
    width: float | None
    rounding: float


@dataclass(frozen=True)
class Output:
    """A snapshot to be made: its header (the recipe included), and float64 coefficients [inputs]."""

    header: Header
    coefficients: np.ndarray

    @property
    def fit(self) -> Fit:
        assert self.header.recipe is not None
        return Fit(**self.header.recipe["fit"])


def reconstruct(
    sources: Sequence[Weights | str | Path], out_std: float, out_nimg: int | None = None
) -> tuple[dict[str, torch.Tensor], Header]:
    """Rebuild one average in memory: float32 state dict, and its header with the recipe.

    `sources`: snapshots of one run, as paths, URLs, or `Weights` (those may be in memory). `out_nimg` is the time of
    a snapshot among them, by default the latest. Raises ValueError as `plan_outputs`.
    """
    inputs = [source if isinstance(source, Weights) else open_weights(source) for source in sources]
    [output] = plan_outputs(inputs, [out_std], None if out_nimg is None else [out_nimg], dtype="float32")
    shapes = _network_shapes(output.header)
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in shapes}
    for name, values in weighted_sums(inputs, output.coefficients[None]):
        parts[name].append(values[0].clone())
    return {name: torch.cat(parts.pop(name)).reshape(shape) for name, shape in shapes.items()}, output.header


def plan_outputs(
    inputs: Sequence[Weights], out_std: Sequence[float], out_nimg: Sequence[int] | None = None, dtype: str = "float16"
) -> list[Output]:
    """Solve for every length in `out_std` at every time in `out_nimg` (default: the latest input's), in this order.

    Reads no weights. A length and time that is stored comes out as it is stored. Raises ValueError, naming the
    snapshot, for inputs that are not training snapshots of one network, run and encoder, are there twice, or too
    few; for a time without a snapshot; for a length that no profile has.
    """
    check_inputs(inputs)
    nimg, std = _column(inputs, "nimg"), _column(inputs, "ema_std")
    times = [int(nimg.max())] if out_nimg is None else list(out_nimg)
    for time in times:
        if time not in nimg:
            raise ValueError(f"no snapshot at {time} images; {_times_near(time, np.unique(nimg))}")
    wanted = [(time, float(length)) for time in times for length in out_std]
    coefficients = solve_posthoc_coefficients(nimg, std, [time for time, _ in wanted], [length for _, length in wanted])
    for column, (time, length) in zip(coefficients.T, wanted, strict=True):
        if len(stored := np.flatnonzero((nimg == time) & (std == length))):
            column[:] = 0
            column[stored] = 1
        elif (nimg <= time).sum() < 2:
            raise ValueError(f"one snapshot up to {time} images is too few to rebuild others; it takes two or more")
    fits = [_fit(inputs, column, *target) for column, target in zip(coefficients.T, wanted, strict=True)]
    return [
        Output(_header(inputs, column, time, length, fit, dtype), column)
        for column, (time, length), fit in zip(coefficients.T, wanted, fits, strict=True)
    ]


def write_outputs(
    inputs: Sequence[Weights],
    outputs: Sequence[Output],
    paths: Sequence[str | Path],
    on_progress: Callable[[int], object] = lambda count: None,
) -> None:
    """Write every output to its path in one pass over the inputs' files.

    Holds a few MB per output, whatever the number and size of the inputs. Each file appears when all are whole.
    `on_progress(count)` hears of each `count` values done, of the network's total. Raises ValueError, naming the
    input, where a file ends early, weights are not finite, or buffers disagree.
    """
    with ExitStack() as stack:
        shapes = _network_shapes(outputs[0].header)
        writers = [
            stack.enter_context(SnapshotWriter(path, output.header, shapes))
            for path, output in zip(paths, outputs, strict=True)
        ]
        coefficients = np.stack([output.coefficients for output in outputs])
        for name, values in weighted_sums(inputs, coefficients, outputs[0].header.dtype):
            for writer, row in zip(writers, values, strict=True):
                writer.write_part(name, row)
            on_progress(values.shape[1])


def count_values(output: Output) -> int:
    """How many values `on_progress` hears of in one pass."""
    return sum(shape.numel() for shape in _network_shapes(output.header).values())


def check_inputs(inputs: Sequence[Weights]) -> None:
    """Raise ValueError, naming the snapshot, unless all are raw material of one network's reconstruction."""
    if not inputs:
        raise ValueError("no snapshots to reconstruct from")
    first, seen = inputs[0], dict[tuple[int, float], str]()
    shapes = _network_shapes(first.header)
    for weights in inputs:
        header, name = weights.header, weights.name
        if header.recipe is not None:
            raise ValueError(f"{name} is itself a reconstruction; give snapshots that training wrote")
        if header.ema_std is None or header.nimg <= 0:
            raise ValueError(f"{name} holds no EMA (length {header.ema_std}, {header.nimg} images); leave it out")
        for what in ("architecture", "encoder", "run_id"):
            mine, other = (_plain(getattr(w.header, what)) for w in (first, weights))
            if mine != other:
                raise ValueError(f"{name} and {first.name} differ in {what}: {_difference(other, mine)}")
        if twin := seen.get((header.nimg, header.ema_std)):
            raise ValueError(f"{name} and {twin} are both at {header.nimg} images with EMA length {header.ema_std}")
        seen[header.nimg, header.ema_std] = name
        there = {tensor: values.shape for tensor, values in weights.tensors.items()}
        if wrong := [n for n in {**shapes, **there} if there.get(n) != shapes.get(n)]:
            raise ValueError(f"{name}: weights do not fit the header's architecture (first at {wrong[0]})")


def _fit(inputs: Sequence[Weights], coefficients: np.ndarray, nimg: int, std: float) -> Fit:
    used = np.flatnonzero(coefficients)
    c, t, stds = coefficients[used], _column(inputs, "nimg")[used], _column(inputs, "ema_std")[used]
    error, width = profile_fit(c, t, stds, nimg, std)
    eps = np.array([torch.finfo(DTYPES[inputs[i].header.dtype][1]).eps for i in used])
    return Fit(error, width, rounding=_ROUNDING * float(np.linalg.norm(c * eps)))


def _header(inputs: Sequence[Weights], coefficients: np.ndarray, nimg: int, std: float, fit: Fit, dtype: str) -> Header:
    part = [i for i, weights in enumerate(inputs) if weights.header.nimg <= nimg]
    latest = max((inputs[i].header for i in part), key=lambda header: header.nimg)
    recipe = {
        "method": "post-hoc EMA (Karras et al. 2023, Algorithm 3)",
        "inputs": [
            {"name": w.name, "nimg": w.header.nimg, "ema_std": w.header.ema_std, "dtype": w.header.dtype}
            for w in (inputs[i] for i in part)
        ],
        "coefficients": [float(coefficients[i]) for i in part],
        "fit": dataclasses.asdict(fit),
    }
    return dataclasses.replace(latest, nimg=nimg, ema_std=std, dtype=dtype, recipe=recipe, commit=code_commit())


def _network_shapes(header: Header) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network_on_meta(header).state_dict().items()}


def _column(inputs: Sequence[Weights], field: str) -> np.ndarray:
    return np.array([getattr(weights.header, field) for weights in inputs], dtype=np.float64)


def _plain(value: object) -> object:
    return json.loads(json.dumps(value))  # a header made in memory may hold tuples where a file has lists


def _difference(a: object, b: object) -> str:
    if not (isinstance(a, Mapping) and isinstance(b, Mapping)):
        return f"{a!r}, not {b!r}"
    key = next(key for key in {**a, **b} if a.get(key) != b.get(key))
    return f"{key} is {a.get(key)}, not {b.get(key)}"


def _times_near(nimg: int, times: np.ndarray) -> str:
    near = sorted(times[np.argsort(np.abs(times - nimg))[:4]])
    return f"the nearest of {len(times)} times are {', '.join(f'{time:.0f}' for time in near)}"
