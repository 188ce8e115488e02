"""Search spaces without networks, run folders without training, and scores from a formula."""

from pathlib import Path

import torch

from edm2kit.cli.generation import Request
from edm2kit.experiments.tune.sources import NetworkSource
from edm2kit.experiments.tune.space import Candidate, Space, Way
from edm2kit.models.edm2 import Precond
from edm2kit.snapshots.file_format import Header, save_snapshot, snapshot_name
from edm2kit.snapshots.loading import Weights

ARCHITECTURE = {
    "img_resolution": 8,
    "img_channels": 3,
    "label_dim": 4,
    "model_channels": 4,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [],
    "channels_per_head": 4,
}


def header(name: str, nimg: int, std: float | None = 0.1, **architecture: object) -> Header:
    return Header({**ARCHITECTURE, **architecture}, {"kind": "rgb"}, nimg, std, dtype="float32", run_id=name)


def make_run(folder: Path, seed: int, times=(1000, 2000, 3000), stds=(0.05, 0.1), **architecture: object) -> Path:
    """A folder with the snapshots of a run, as if trained: random weights that drift with time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        start = Precond(**{**ARCHITECTURE, **architecture}).state_dict()
        end = Precond(**{**ARCHITECTURE, **architecture}).state_dict()
    learned = {name for name, _ in Precond(**{**ARCHITECTURE, **architecture}).named_parameters()}
    for nimg in times:
        for std in stds:
            share = nimg / max(times) * (1 - std)
            state = {}
            for name, value in start.items():
                mixed = value + share * (end[name] - value) if name in learned else value
                state[name] = torch.ones([]) if name.endswith("gain") else mixed
            path = folder / snapshot_name(nimg, std)
            save_snapshot(path, state, header(f"run {seed}", nimg, std, **architecture))
    return folder


def source(name: str, times: tuple[int, ...]) -> NetworkSource:
    return NetworkSource(name, name, tuple(Weights(f"{name}-{nimg}", header(name, nimg), {}) for nimg in times))


def simulated_space(weight_steps: int = 8) -> Space:
    """256 combinations of age, two EMA lengths and weight; no files behind it."""
    main, guide = source("main", (4000,)), source("guide", (1000, 2000))
    request = Request("main")
    lengths = (0.05, 0.07, 0.1, 0.14)
    return Space(
        main,
        request,
        {"autoguidance": Way("autoguidance", "autoguidance", guide, request)},
        lengths,
        {("guide", 1000): lengths, ("guide", 2000): lengths},
        {"guide": (1000, 2000)},
        {"autoguidance": (1.0, 3.0)},
        weight_intervals=weight_steps,
    )


def true_value(candidate: Candidate) -> float:
    """A landscape like those of guidance: valleys in every direction, the best weight depending on the EMA length."""
    if candidate.guide is None:
        return 160.0
    main, guide = torch.tensor([candidate.main.ema_std, candidate.guide.ema_std]).log2().tolist()
    ridge = candidate.weight - 2.0 - 0.4 * (main + 3.3)
    return (
        100
        * (1 + 0.08 * (main + 3.8) ** 2 + 0.05 * (guide + 2.9) ** 2 + 0.3 * ridge**2)
        * (1.0 if candidate.guide.nimg == 1000 else 1.07)
    )
