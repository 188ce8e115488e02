"""What a training run is: one frozen, complete record, read from YAML and options, written beside the results."""

import dataclasses
import difflib
import hashlib
import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from edm2kit.ema.power_function import std_to_exp
from edm2kit.models.edm2 import UNet
from edm2kit.torch_utils.files import atomic_write
from edm2kit.torch_utils.precision import PRECISIONS

PRESET_FOLDER = Path(__file__).parents[1] / "configs" / "train"


def _setting(default: Any, help: str, **metadata: Any) -> Any:
    """A field of TrainConfig whose help text is also that of its option and of the table in the documents.

    Metadata: `option`, its name on the command line; `metavar`, what stands for the value in --help (NIMG: a number of
    images, which may be written 128Ki or 8Mi); `choices`, the values it takes; `free`, whether it may change when a
    run is resumed.
    """
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class TrainConfig:
    """A training run: one frozen, complete record.

    Counts of images end in `_nimg` and may be written 128Ki, 8Mi or 1Gi in YAML. Resuming a run refuses a change in
    any field that is not marked "free".
    """

    data: str = _setting(
        "", "Training images, a zip or folder made by dataset_tool.py", option="--data", metavar="ZIP|DIR", free=True
    )  # free because the content of the data is compared instead of its path
    cond: bool = _setting(True, "Train with class labels", option="--cond", metavar="BOOL")
    encoder: Mapping[str, Any] = field(
        default_factory=lambda: {"kind": "auto"},
        metadata={"help": "What turns stored items into what the network sees; auto: as the data say"},
    )
    network: Mapping[str, Any] = field(
        default_factory=dict, metadata={"help": "Arguments of the network that differ from its defaults"}
    )
    init_from: str | None = _setting(
        None,
        "Snapshot to start from (fine-tuning); its classes may differ",
        option="--init-from",
        metavar="SNAPSHOT",
        free=True,
    )  # free because its hash is compared instead of its path
    init_sha256: str | None = _setting(None, "SHA-256 of the snapshot to start from; filled in by the program")
    sigma_data: float = _setting(0.5, "Standard deviation of the data that the network sees")
    label_dropout: float = _setting(
        0.0,
        "Share of images shown without their label, for CFG with one network",
        option="--label-dropout",
        metavar="P",
    )
    P_mean: float = _setting(-0.4, "Mean of ln(sigma) in training", option="--P_mean", metavar="FLOAT")
    P_std: float = _setting(1.0, "Standard deviation of ln(sigma) in training", option="--P_std", metavar="FLOAT")
    ref_lr: float = _setting(0.01, "Reference learning rate", option="--lr", metavar="FLOAT")
    ref_batches: float = _setting(
        70_000, "Batches before the learning rate decays; 0: never", option="--decay", metavar="BATCHES"
    )
    rampup_nimg: int = _setting(
        10_000_000, "Images of linear learning-rate warm-up; 0: none", option="--rampup", metavar="NIMG"
    )
    adam_betas: tuple[float, float] = _setting((0.9, 0.99), "Decay rates of Adam's two moments")
    adam_eps: float = _setting(1e-8, "Adam's epsilon")
    ema_stds: tuple[float, ...] = _setting((0.050, 0.100), "EMA lengths to track, as relative standard deviations")
    duration_nimg: int = _setting(1 << 30, "Images to train for", option="--duration", metavar="NIMG", free=True)
    batch_size: int = _setting(2048, "Images per step, over all processes", option="--batch", metavar="NIMG")
    batch_gpu: int | None = _setting(
        None, "Limit on the images of one pass on each process", option="--batch-gpu", metavar="NIMG", free=True
    )
    precision: str = _setting("fp32", "Precision inside the network", option="--precision", choices=PRECISIONS)
    recompute: bool = _setting(
        False,
        "Recompute activations in the backward pass: 1/3 slower, less memory, same results",
        option="--recompute",
        metavar="BOOL",
        free=True,
    )
    shard: bool = _setting(
        False,
        "Split Adam's moments and the EMAs over the processes: less memory, same results",
        option="--shard",
        metavar="BOOL",
        free=True,
    )
    loss_scaling: float = _setting(
        1.0, "Loss scaling, undone before the optimizer step", option="--ls", metavar="FLOAT"
    )
    cudnn_benchmark: bool = _setting(
        True, "Let cuDNN pick its fastest algorithms", option="--bench", metavar="BOOL", free=True
    )
    seed: int = _setting(0, "Random seed of the run", option="--seed", metavar="N")
    workers: int = _setting(
        2, "Processes that read images; 0: the training process", option="--workers", metavar="N", free=True
    )
    status_every_nimg: int = _setting(
        128 << 10, "Images between status lines", option="--status", metavar="NIMG", free=True
    )
    snapshot_every_nimg: int = _setting(
        8 << 20, "Images between EMA snapshots", option="--snapshot", metavar="NIMG", free=True
    )
    checkpoint_every_nimg: int = _setting(
        128 << 20, "Images between checkpoints", option="--checkpoint", metavar="NIMG", free=True
    )
    keep_checkpoints: int = _setting(2, "Checkpoints to keep; 0: all", free=True)
    snapshot_dtype: str = _setting(
        "float16", "Precision of stored snapshots", choices=("float16", "bfloat16", "float32")
    )

    def __post_init__(self) -> None:
        _check(self)


def option_of(name: str) -> str:
    """The name a user knows the field by: its option, or its YAML key."""
    if name == "init_sha256":
        name = "init_from"
    fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
    return fields[name].metadata.get("option", f"{name} (in the YAML file)")


def _check(config: TrainConfig) -> None:
    _check_types(config)
    positive = ("batch_size", "duration_nimg", "status_every_nimg", "snapshot_every_nimg", "checkpoint_every_nimg")
    for name in (*positive, "P_std", "ref_lr", "sigma_data", "loss_scaling"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{option_of(name)} must be above 0; got {getattr(config, name)}")
    for name in ("workers", "ref_batches", "rampup_nimg", "keep_checkpoints"):
        if getattr(config, name) < 0:
            raise ValueError(f"{option_of(name)} must not be negative; got {getattr(config, name)}")
    if not 0 <= config.label_dropout <= 1:
        raise ValueError(f"{option_of('label_dropout')} is a share from 0 to 1; got {config.label_dropout}")
    if config.precision not in PRECISIONS:
        raise ValueError(f"--precision is one of {', '.join(PRECISIONS)}; got {config.precision!r}")
    if config.snapshot_dtype not in ("float16", "bfloat16", "float32"):
        raise ValueError(f"snapshot_dtype is one of float16, bfloat16, float32; got {config.snapshot_dtype!r}")
    if config.snapshot_every_nimg < 1000:
        raise ValueError("--snapshot must be at least 1000 images: snapshot names count thousands")
    if not config.ema_stds or len({f"{std:.3f}" for std in config.ema_stds}) < len(config.ema_stds):
        raise ValueError(f"ema_stds must be lengths that differ in three decimals; got {list(config.ema_stds)}")
    std_to_exp(list(config.ema_stds))
    known = [p for p in inspect.signature(UNet).parameters if p not in ("img_resolution", "img_channels", "label_dim")]
    for name in config.network:
        if name not in known:
            raise ValueError(f"unknown network argument {name!r}{nearest(name, known)}")


_NUMBER_FIELDS = {"int": int, "float": (int, float), "bool": bool, "str": str}


def _check_types(config: TrainConfig) -> None:
    for f in dataclasses.fields(config):
        expected = _NUMBER_FIELDS.get(str(getattr(f.type, "__name__", f.type)))
        value = getattr(config, f.name)
        if expected is None:
            continue
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
            raise ValueError(f"{option_of(f.name)} must be {f.type.__name__}; got {value!r}")


def nearest(name: str, known: list[str]) -> str:
    """ "; did you mean ...?" with the valid name closest to `name`, else the list of all."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else f"; there is: {', '.join(known)}"


def _parse_count(value: Any) -> Any:
    match = re.fullmatch(r"(\d+)(Ki|Mi|Gi)", value) if isinstance(value, str) else None
    return int(match[1]) * {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}[match[2]] if match else value


def config_from_dict(values: Mapping[str, Any], source: str) -> TrainConfig:
    """A checked configuration; ValueError names `source` and the offending key, with the nearest valid one."""
    fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
    parsed: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise ValueError(f"{source}: unknown key {key!r}{nearest(str(key), list(fields))}")
        if key in ("network", "encoder") and not isinstance(value, Mapping):
            raise ValueError(f"{source}: {key} must be a mapping; got {value!r}")
        value = _parse_count(value)
        parsed[key] = tuple(value) if isinstance(value, list) else value
    try:
        return TrainConfig(**parsed)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; ValueError with the reason for anything else."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the configuration {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of option names to values")
    return values


def preset_names() -> list[str]:
    """Names that --preset takes, sorted."""
    return sorted(path.stem for path in PRESET_FOLDER.glob("*.yaml"))


def preset_path(name: str) -> Path:
    """The YAML file of a preset; ValueError with the nearest name where there is none."""
    if name not in preset_names():
        raise ValueError(f"unknown preset {name!r}{nearest(name, preset_names())}")
    return PRESET_FOLDER / f"{name}.yaml"


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain lists, dicts and numbers, as YAML and JSON hold them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def write_config(config: TrainConfig, path: str | Path) -> None:
    """Write the complete configuration as YAML, atomically; `config_from_dict(read_yaml(path))` reads it back."""
    with atomic_write(path, "w") as file:
        yaml.safe_dump(config_to_dict(config), file, sort_keys=False)


def run_id(config: TrainConfig, data_identity: Mapping[str, Any]) -> str:
    """Names the run: a hash of everything that decides its weights. Resuming keeps it, and so does extending."""
    decisive = {k: v for k, v in config_to_dict(config).items() if k not in _free_fields()}
    text = json.dumps([decisive, dict(data_identity)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _free_fields() -> set[str]:
    return {f.name for f in dataclasses.fields(TrainConfig) if f.metadata.get("free")}


def refuse_changes(old: Mapping[str, Any], new: TrainConfig, run_dir: str | Path) -> None:
    """ValueError that names each option whose change would make a resumed run something else."""
    values = config_to_dict(new)
    changed = [k for k in values if k not in _free_fields() and k in old and old[k] != values[k]]
    if changed:
        what = "; ".join(f"{option_of(k)} was {old[k]}, is now {values[k]}" for k in changed)
        raise ValueError(
            f"{run_dir} holds a run with other settings: {what}. Resume it with those, or use another --outdir"
        )
