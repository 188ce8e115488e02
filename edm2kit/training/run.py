"""From a configuration and a data set to a run that is ready to start or to go on."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edm2kit.data.batches import GlobalOrder, MicroBatch, micro_batch_sizes, training_batches
from edm2kit.data.dataset import ImageDataset, data_identity
from edm2kit.data.latents import read_latent_source
from edm2kit.models.edm2 import full_architecture
from edm2kit.models.encoders import ENCODERS, make_encoder
from edm2kit.snapshots.file_format import Header
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.files import atomic_write
from edm2kit.training.config import TrainConfig, config_to_dict, read_yaml, refuse_changes, run_id, write_config
from edm2kit.training.fine_tuning import adopt_source, check_source

CONFIG_NAME = "config.yaml"
RECORD_NAME = "run.json"


@dataclass(frozen=True)
class Run:
    """A resolved run: `config` complete, `header` as its snapshots will carry it but for nimg and ema_std."""

    config: TrainConfig
    header: Header
    notices: list[str]  # what a user should know before it starts
    data_identity: Mapping[str, Any]
    micro_batches: list[int]  # images of each forward pass of this rank in one step


def resolve(config: TrainConfig, dataset: ImageDataset) -> Run:
    """Settle everything that depends on the data and the number of processes.

    Raises ValueError where they do not fit: labels asked for but not there, a batch that cannot be shared.
    """
    if config.cond and not dataset.label_dim:
        raise ValueError(
            f"{dataset.path} has no labels (no dataset.json, or one without labels); add them with "
            "scripts/dataset_tool.py convert, or train without: --cond false"
        )
    config = adopt_source(dataclasses.replace(config, encoder=_encoder_spec(config, dataset)))
    architecture = full_architecture(
        img_resolution=dataset.resolution,
        img_channels=dataset.num_channels if config.encoder["kind"] == "rgb" else dataset.num_channels // 2,
        label_dim=dataset.label_dim if config.cond else 0,
        sigma_data=config.sigma_data,
        network=config.network,
    )
    identity = data_identity(dataset)
    header = Header(
        architecture=architecture,
        encoder=config.encoder,
        nimg=0,
        ema_std=None,
        label_names=dataset.label_names if config.cond else None,
        dtype=config.snapshot_dtype,
        run_id=run_id(config, identity),
        training_config=config_to_dict(config),
    )
    sizes = micro_batch_sizes(config.batch_size, dist.world_size(), config.batch_gpu)
    notices = [*reading_notices(dataset), *check_source(config, architecture, header.label_names)]
    return Run(config, header, notices, identity, sizes)


def reading_notices(dataset: ImageDataset) -> list[str]:
    """What a user could do for images to be read faster."""
    if not dataset.needs_decoding:
        return []
    return [
        f"the images of {dataset.path} are decoded one by one, in --workers processes. `python scripts/dataset_tool.py "
        f"convert --source {dataset.path} --dest FASTER.zip` stores them as they are, to be read some twenty times as "
        "fast; a run whose images keep their names (00000/img00000000.png, ...) can go on with either"
    ]


def _encoder_spec(config: TrainConfig, dataset: ImageDataset) -> dict[str, Any]:
    """The complete encoder that goes with the data; ValueError where the configuration names one that does not."""
    fitting = "rgb" if dataset.raw_dtype == np.uint8 else "vae"
    spec = dict(config.encoder)
    if spec == {"kind": "auto"}:
        spec = {"kind": fitting}
        if source := read_latent_source(dataset):
            spec["vae_name"] = source.vae_name
    if spec.get("kind") != fitting and spec.get("kind") in ENCODERS:
        what = "pixels" if fitting == "rgb" else "latents"
        raise ValueError(f"{dataset.path} holds {what}, which the encoder {spec['kind']!r} does not take")
    return make_encoder(spec).spec()


def check_run_dir(run: Run, run_dir: Path) -> None:
    """ValueError where the folder holds another run, naming what differs."""
    config_path, record_path = run_dir / CONFIG_NAME, run_dir / RECORD_NAME
    if not config_path.exists():
        return
    refuse_changes(read_yaml(config_path), run.config, run_dir)
    try:
        identity = json.loads(record_path.read_text(encoding="utf-8"))["data_identity"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{record_path} is damaged or missing ({error}); use another --outdir") from error
    if identity != run.data_identity:
        changed = [key for key in identity if identity[key] != run.data_identity.get(key)]
        raise ValueError(
            f"{run_dir} holds a run on other images than --data {run.config.data} (differs in {', '.join(changed)}). "
            "Use the same data to resume it, or another --outdir"
        )


def write_records(run: Run, run_dir: Path, provenance: Mapping[str, str], command: list[str]) -> None:
    """Write the resolved configuration and what else describes the run beside its results."""
    record = {
        "run_id": run.header.run_id,
        "architecture": dict(run.header.architecture),
        "data_identity": dict(run.data_identity),
        "label_names": run.header.label_names,
        "world_size": dist.world_size(),
        "micro_batches": run.micro_batches,
        "command": command,
        **provenance,
    }
    with atomic_write(run_dir / RECORD_NAME, "w") as file:
        json.dump(record, file, indent=2)
    write_config(run.config, run_dir / CONFIG_NAME)


def stream_batches(run: Run, dataset: ImageDataset, start_nimg: int) -> Iterator[MicroBatch]:
    """This rank's micro-batches from image number `start_nimg` on."""
    return training_batches(
        dataset,
        GlobalOrder(len(dataset), run.config.seed),
        start_nimg,
        run.config.batch_size,
        rank=dist.rank(),
        world_size=dist.world_size(),
        batch_gpu=run.config.batch_gpu,
        workers=run.config.workers,
    )
