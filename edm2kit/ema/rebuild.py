"""Post-hoc EMA: EMAs of any length and time, rebuilt from stored snapshots in one pass over their files.

Karras et al. 2023, Section 3.2 and Algorithm 3.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from edm2kit.ema.power_function import profile_fit, solve_posthoc_coefficients
from edm2kit.ema.weighted_sums import network_tensors, weighted_sums
from edm2kit.snapshots.file_format import STORED_DTYPES, Header, SnapshotWriter
from edm2kit.snapshots.loading import Weights, open_weights
from edm2kit.torch_utils.files import code_commit, sampled_sha256

# RMS rounding error relative to the RMS value, per eps: uniform on half a unit in the last place, mantissas log-uniform
_ROUNDING = math.sqrt(math.log(2) / 18)


@dataclass(frozen=True)
class Fit:
    """How well an EMA can be rebuilt; known before any weights are read.

    - `error`: L2 distance between the rebuilt and the target profile, relative to the norm of the target.
    - `width`: relative standard deviation of the rebuilt profile, None if it oscillates too much to have one.
    - `rounding`: expected error of the weights due to the precision of the inputs, relative to the norm of the weights.
      Large coefficients of alternating sign magnify it.
    """

    error: float
    width: float | None
    rounding: float


@dataclass(frozen=True)
class Output:
    """A snapshot to rebuild: its header, including the recipe, and float64 coefficients [inputs]."""

    header: Header
    coefficients: np.ndarray

    @property
    def fit(self) -> Fit:
        assert self.header.recipe is not None
        return Fit(**self.header.recipe["fit"])


def reconstruct(
    sources: Sequence[Weights | str | Path], out_std: float, out_nimg: int | None = None
) -> tuple[dict[str, torch.Tensor], Header]:
    """Rebuild one EMA in memory; returns a float32 state dict, and the header with the recipe.

    `sources` are snapshots of one run: paths, URLs or `Weights`, which may be in memory. `out_nimg` is the time of one
    of them, by default the latest. Raises ValueError as `plan_outputs`.

    Example: `state, header = reconstruct(sorted(Path("runs/main").glob("network-snapshot-*")), out_std=0.07)`
    """
    inputs = []
    for source in sources:
        inputs.append(source if isinstance(source, Weights) else open_weights(source))
    times = None if out_nimg is None else [out_nimg]
    [output] = plan_outputs(inputs, [out_std], times, dtype="float32")
    tensors = network_tensors(inputs[0])
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in tensors}
    for name, values in weighted_sums(inputs, output.coefficients[None]):
        parts[name].append(values[0].clone())
    state = {}
    for name, tensor in tensors.items():
        state[name] = torch.cat(parts.pop(name)).reshape(tensor.shape)
    return state, output.header


def plan_outputs(
    inputs: Sequence[Weights], out_std: Sequence[float], out_nimg: Sequence[int] | None = None, dtype: str = "float16"
) -> list[Output]:
    """Solve for every length in `out_std` at every time in `out_nimg`, in this order; reads no weights.

    The default time is that of the latest input. A length and time that is stored comes out exactly as stored. Raises
    ValueError, naming the snapshot, if the inputs are too few or are not distinct training snapshots of a single run;
    if there is no snapshot at a time; or if no profile has a length.
    """
    check_inputs(inputs)
    nimg, std = _header_values(inputs, "nimg"), _header_values(inputs, "ema_std")
    times = [int(nimg.max())] if out_nimg is None else list(out_nimg)
    for time in times:
        if time not in nimg:
            available = np.unique(nimg)
            nearest = sorted(available[np.argsort(np.abs(available - time))[:4]])
            listed = ", ".join(f"{near:.0f}" for near in nearest)
            raise ValueError(f"no snapshot at {time} images; the nearest of {len(available)} times are {listed}")
    wanted = [(time, float(length)) for time in times for length in out_std]
    coefficients = solve_posthoc_coefficients(nimg, std, [time for time, _ in wanted], [length for _, length in wanted])
    outputs = []
    for column, (time, length) in zip(coefficients.T, wanted, strict=True):
        stored = np.flatnonzero((nimg == time) & (std == length))
        if len(stored):
            column[:] = 0
            column[stored] = 1
        elif (nimg <= time).sum() < 2:
            raise ValueError(
                f"there is one snapshot up to {time} images; rebuilding other lengths takes at least two. Give more "
                "snapshots"
            )
        outputs.append(Output(_output_header(inputs, column, time, length, dtype), column))
    return outputs


def write_outputs(
    inputs: Sequence[Weights],
    outputs: Sequence[Output],
    paths: Sequence[str | Path],
    on_progress: Callable[[int], object] = lambda count: None,
) -> None:
    """Write every output to its path in one pass over the inputs' files.

    Needs a few MB of memory per output, independent of the number and size of the inputs. Files appear when all of
    them are complete. `on_progress(count)` is called after each `count` values, of `count_values` in total. Raises
    ValueError, naming the input, if a file is truncated, weights are not finite, or buffers differ.
    """
    shapes = {name: tensor.shape for name, tensor in network_tensors(inputs[0]).items()}
    with ExitStack() as stack:
        writers = [
            stack.enter_context(SnapshotWriter(path, output.header, shapes))
            for path, output in zip(paths, outputs, strict=True)
        ]
        coefficients = np.stack([output.coefficients for output in outputs])
        for name, values in weighted_sums(inputs, coefficients, outputs[0].header.dtype):
            for writer, row in zip(writers, values, strict=True):
                writer.write_part(name, row)
            on_progress(values.shape[1])


def count_values(weights: Weights) -> int:
    """The number of values in a snapshot's network: what `on_progress` counts up to in one pass."""
    return sum(tensor.shape.numel() for tensor in network_tensors(weights).values())


def check_inputs(inputs: Sequence[Weights]) -> None:
    """Raise ValueError, naming the snapshot, unless all are distinct training snapshots of a single run."""
    if not inputs:
        raise ValueError("no snapshots to rebuild from")
    first, seen = inputs[0], dict[tuple[int, float], Weights]()
    shapes = {name: tensor.shape for name, tensor in network_tensors(first).items()}
    for weights in inputs:
        header, name = weights.header, weights.name
        if header.recipe is not None:
            raise ValueError(f"{name} is itself a rebuilt EMA; give snapshots that training wrote")
        if header.ema_std is None or header.nimg <= 0:
            raise ValueError(f"{name} holds no EMA (length {header.ema_std}, {header.nimg} images); leave it out")
        _check_same_network(weights, first)
        twin = seen.get((header.nimg, header.ema_std))
        if twin is not None:
            pair = (name, twin.name) if name != twin.name else (weights.path, twin.path)
            raise ValueError(
                f"{pair[0]} and {pair[1]} are both at {header.nimg} images with EMA length {header.ema_std}; leave one "
                "of them out"
            )
        seen[header.nimg, header.ema_std] = weights
        found = {tensor: values.shape for tensor, values in weights.tensors.items()}
        for tensor in {**shapes, **found}:
            if found.get(tensor) != shapes.get(tensor):
                raise ValueError(f"{name}: weights do not fit the network of this run (first at {tensor})")


def _check_same_network(weights: Weights, first: Weights) -> None:
    for field in ("network", "architecture", "encoder", "run_id"):
        # a header made in memory may hold tuples where one from a file has lists
        theirs = json.loads(json.dumps(getattr(weights.header, field)))
        ours = json.loads(json.dumps(getattr(first.header, field)))
        if theirs == ours:
            continue
        where = f"{weights.name} and {first.name} differ in {field}"
        if not isinstance(ours, dict):
            raise ValueError(f"{where}: {theirs!r}, not {ours!r}")
        keys = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
        if keys:
            raise ValueError(f"{where}: {keys[0]} is {theirs.get(keys[0])}, not {ours.get(keys[0])}")


def _output_header(inputs: Sequence[Weights], coefficients: np.ndarray, nimg: int, std: float, dtype: str) -> Header:
    used = [int(i) for i in np.flatnonzero(coefficients)]
    chosen = [inputs[i] for i in used]
    error, width = profile_fit(
        coefficients[used], _header_values(chosen, "nimg"), _header_values(chosen, "ema_std"), nimg, std
    )
    eps = np.array([torch.finfo(STORED_DTYPES[weights.header.dtype][1]).eps for weights in chosen])
    rounding = _ROUNDING * float(np.linalg.norm(coefficients[used] * eps))
    candidates = [i for i, weights in enumerate(inputs) if weights.header.nimg <= nimg]
    latest = max((inputs[i].header for i in candidates), key=lambda header: header.nimg)
    recipe = {
        "method": "post-hoc EMA (Karras et al. 2023, Algorithm 3)",
        "inputs": [
            {
                "name": w.name,
                "nimg": w.header.nimg,
                "ema_std": w.header.ema_std,
                "dtype": w.header.dtype,
                "content": None if w.path is None else sampled_sha256(w.path),
                "checksum": w.checksum(),
            }
            for w in (inputs[i] for i in candidates)
        ],
        "coefficients": [float(coefficients[i]) for i in candidates],
        "fit": dataclasses.asdict(Fit(error, width, rounding)),
    }
    return dataclasses.replace(latest, nimg=nimg, ema_std=std, dtype=dtype, recipe=recipe, commit=code_commit())


def _header_values(inputs: Sequence[Weights], field: str) -> np.ndarray:
    return np.array([getattr(weights.header, field) for weights in inputs], dtype=np.float64)
