"""Damaged settings for `benchmarks.fuzz`: YAML files, the words of command lines, prompts, environment variables."""

import functools
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import click
import yaml

from benchmarks.fuzz_inputs import REFUSALS, Parser, in_file, text_of, values_and_text
from edm2kit.cli import click_types as cli
from edm2kit.cli.diffusers_networks import read_prompts
from edm2kit.cli.field_options import Interval
from edm2kit.cli.generation import Request, parse_classes
from edm2kit.cli.generation_options import generation_options
from edm2kit.cli.grids import parse_weights
from edm2kit.cli.presets import preset_words
from edm2kit.experiments.compare_guidance.rows import load_comparison
from edm2kit.experiments.paper_tables.tables import load_table
from edm2kit.experiments.tune.budget import parse_budget
from edm2kit.guidance.registry import all_options
from edm2kit.metrics.detectors.exported import read_preprocessing
from edm2kit.models.diffusers_pipeline import open_repository
from edm2kit.torch_utils import dist, launchers
from edm2kit.torch_utils.cache import cache_folder
from edm2kit.torch_utils.download import max_bytes
from edm2kit.training.config import config_from_dict, parse_batch_gpu, read_yaml
from edm2kit.training.micro_batches import free_memory

# YAML files


_CONFIG: dict[str, Any] = {
    "network": {"model_channels": 192, "channel_mult": [1, 2], "attn_resolutions": [16], "dropout": 0.1},
    "encoder": {"kind": "rgb"}, "batch_size": 2048, "duration_nimg": "128Mi", "P_mean": -0.4, "ema_stds": [0.05, 0.1],
    "cond": True, "precision": "fp16", "data": "img64.zip", "batch_gpu": "auto",
}  # fmt: skip
_PRESET = {
    "options": {
        "net": "a.pkl", "gnet": "b.pkl", "guidance": 2, "interval": [0.28, 2.9], "guidance-also": ["pag=3", "cads=2"],
        "balanced": True,
    },
    "about": {"fid": 2.5},
}  # fmt: skip
_COMPARISON = {
    "common": "--net {main} --steps 16",
    "rows": {
        "none": {"title": "no guidance", "options": ""},
        "auto": {"title": "autoguidance", "options": "--gnet {guide}", "weights": [1.5, 2]},
    },
    "metric": "fid",
    "tune": {"images": 100, "seeds": [0]},
    "report": {"images": 500, "seeds": [1000, 2000]},
}
_TABLE = {
    "title": "a", "source": "b", "sampler": {"num_steps": 16},
    "datasets": {"x": {"reference": "x.pkl", "img_resolution": 64, "img_channels": 4, "label_dim": 10}},
    "rows": [
        {
            "name": "s", "group": "EDM2-S", "setting": "c", "dataset": "x", "note": "d",
            "fid": {
                "value": 2.5, "net": "edm2-img512-s-2147483-0.130", "gnet": "edm2-img512-xs-0134217-0.125",
                "guidance": 2, "interval": [0.28, 2.9],
            },
        }
    ],
}  # fmt: skip
_PREPROCESSING = {
    "size": 8, "resize": "bicubic", "value_range": [0, 1], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]
}  # fmt: skip


def _values_and_yaml(*values: Any) -> Callable[[Path], list[Any]]:
    """Seeds: `values`, in which values change, and their text in YAML, in which bytes change."""
    return lambda folder: [*values, *(yaml.safe_dump(value, sort_keys=False).encode() for value in values)]


def _read_pipeline(path: Path) -> object:
    """A folder of diffusers, without its models, which diffusers loads itself."""
    repository = open_repository(str(path.parent))
    return repository, [repository.has(component) for component in ("unet", "transformer", "vae", "safety_checker")]


# words of command lines


def _read_words(data: bytes, folder: Path) -> object:
    """Texts of the command line: read if any of these readers takes it."""
    text = data.decode("utf-8", "replace")
    found: list[object] = []
    refusal: Exception | None = None
    for reader in _readers():
        try:
            found.append(reader(text))
        except REFUSALS as error:
            refusal = error
    if not found and refusal is not None:
        raise refusal
    return found


@functools.cache
def _readers() -> list[Callable[[str], object]]:
    types = (cli.IntRanges(), cli.Size(), Interval(), cli.AtLeast(int, 1), cli.AtLeast(float, 0))
    readers: list[Callable[[str], object]] = [functools.partial(kind.convert, param=None, ctx=None) for kind in types]
    readers += [cli.parse_duration_sec, parse_batch_gpu, parse_budget, parse_weights]
    readers.append(lambda text: parse_classes(text, 4, ["cat", "dog", "0", "1-2"]))
    return readers


def _read_option(data: bytes, folder: Path) -> object:
    """An option of a guidance method and its value, such as apg-momentum=-0.5."""
    name, _, text = data.decode("utf-8", "replace").partition("=")
    options = {option.name: option for _, option in all_options()}
    if name not in options:
        raise ValueError(f"no option {name!r:.60}")
    return options[name].parse(text)


def _option_seeds(folder: Path) -> list[Any]:
    """A valid text of every option."""
    found = []
    for _, option in all_options():
        default = option.default
        text = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        try:
            option.parse(text)
        except ValueError:  # None: not given
            continue
        found.append(f"{option.name}={text}".encode())
    return [*found, b"loss-colour=200,30,30", b"pag-blocks=dec.8x8_in0,enc.8x8_block0"]


@functools.cache
def _asking() -> click.Command:
    @click.command()
    @generation_options
    def ask(request: Request) -> Request:
        return request

    return ask


def _read_command_line(data: bytes, folder: Path) -> object:
    words = shlex.split(data.decode("utf-8", "replace"))
    return _asking().main(words, standalone_mode=False, prog_name="generate.py")


_COMMAND_LINES = (
    b"--net a.pkl --gnet b.pkl --guidance 2.1 --interval 0.28,2.90 --steps 16 --class cat,0-2",
    b"--net a.pkl --guidance-method pag --guidance 3 --guidance-also icg=1.4 --guidance-rule apg --apg-momentum -0.5",
    b"--net a.pkl --solver restart --restart-intervals '4,1,1.09,1.92 6,6,0.06,0.3' --precision fp16 --balanced",
    b"--preset cifar10 --solver heun --S_churn 40 --guidance-schedule cosine --labels v.npy",
)
_PROMPTS = ["a cat", "a dog, 3 of them"]


# environment variables


def _read_environment(data: bytes, folder: Path) -> object:
    lines = (line.partition("=") for line in data.decode("utf-8", "replace").replace("\0", "").splitlines())
    with mock.patch.dict(os.environ, {name: text for name, _, text in lines if name}, clear=True):
        found = launchers.torchrun_variables()
        with mock.patch.dict(os.environ, found):
            dist.pick_device("auto")
            return found, cache_folder(), max_bytes(), free_memory(dist.pick_device("cpu"))


_ENVIRONMENTS = (
    b"SLURM_PROCID=3\nSLURM_NTASKS=8\nSLURM_NNODES=2\nSLURM_NODEID=0\nSLURM_LOCALID=3\nSLURM_TASKS_PER_NODE=4(x2)\n"
    b"SLURM_JOB_NODELIST=rack2-node[03-05,9],gpu1\nSLURM_JOB_ID=77\nSLURM_STEP_ID=1\nHOME=/root",
    b"OMPI_COMM_WORLD_RANK=1\nOMPI_COMM_WORLD_SIZE=2\nOMPI_COMM_WORLD_LOCAL_RANK=1\nOMPI_COMM_WORLD_LOCAL_SIZE=2\n"
    b"XDG_CACHE_HOME=/x",
    b"PMI_RANK=1\nPMI_SIZE=4\nMPI_LOCALRANKID=1\nMPI_LOCALNRANKS=2\nMASTER_ADDR=h\nDNNLIB_CACHE_DIR=/x\n"
    b"EDM2_MAX_DOWNLOAD_GB=100\nLOCAL_WORLD_SIZE=2",
)
_YAML = b"""a: !!bool yes
b: !!timestamp 2001-12-14
c: &x [1, 1e-3]
d: *x
e: {<<: {f: 1}, g: 2001-12-14 21:59:43.10}
h: !!int "3"
i: !!float 0.5
j: !!binary aGk=
k: |
  text
"""
PARSERS: Mapping[str, Parser] = {
    "YAML": Parser(lambda folder: [_YAML], in_file("a.yaml", read_yaml)),
    "config": Parser(
        _values_and_yaml(_CONFIG), in_file("a.yaml", lambda path: config_from_dict(read_yaml(path), "the file"))
    ),
    "preset file": Parser(_values_and_yaml(_PRESET), in_file("a.yaml", preset_words)),
    "comparison": Parser(_values_and_yaml(_COMPARISON), in_file("a.yaml", load_comparison)),
    "table": Parser(_values_and_yaml(_TABLE), in_file("a.yaml", load_table)),
    "preprocessing": Parser(
        _values_and_yaml(_PREPROCESSING), in_file("a.yaml", lambda path: read_preprocessing(path.with_suffix(".pt2")))
    ),
    "pipeline index": Parser(
        values_and_text(
            {
                "_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
                "vae": ["diffusers", "AutoencoderKL"], "safety_checker": [None, None],
            }
        ),
        in_file("model_index.json", _read_pipeline),
    ),
    "prompts": Parser(
        lambda folder: [_PROMPTS, text_of(_PROMPTS)], in_file("a.json", read_prompts)
    ),
    "words": Parser(
        lambda folder: [b"0-63,70", b"128Ki", b"0.28,2.90", b"11.5h", b"cat,1-2,0", b"auto", b"4000img", b"1,1.5,2"],
        _read_words,
    ),
    "guidance option": Parser(_option_seeds, _read_option),
    "command line": Parser(lambda folder: list(_COMMAND_LINES), _read_command_line),
    "environment": Parser(lambda folder: list(_ENVIRONMENTS), _read_environment),
}  # fmt: skip
