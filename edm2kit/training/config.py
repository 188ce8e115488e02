"""The configuration of a training run: read from YAML and options, checked, and written beside the results."""

import dataclasses
import difflib
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from edm2kit.ema.power_function import std_to_exp
from edm2kit.models.encoders import make_encoder
from edm2kit.models.networks import DEFAULT_NETWORK, NETWORKS
from edm2kit.models.preconditioning import PRECISIONS
from edm2kit.snapshots.file_format import STORED_DTYPES
from edm2kit.torch_utils.files import atomic_write, check_type

PRESET_FOLDER = Path(__file__).parents[1] / "configs" / "train"
_COUNT_UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}
# more is a typing error, which would fail much later: no memory, too many processes, or numbers beyond 64 bits
_LARGEST = {"batch_size": 1 << 24, "workers": 1024, "duration_nimg": 1 << 50, "rampup_nimg": 1 << 50}
_MAX_LN_SIGMA, _MAX_SIGMA_DATA = 40, 1e9  # their squares, and quotients of those, are float32 numbers
_MAX_YAML_BYTES, _MAX_YAML_VALUES, _MAX_MERGED = 1 << 17, 10_000, 16
# PyYAML's own, and what its constructors raise for a date that does not exist and for !!bool, !!int and others on text
_CONSTRUCTOR_ERRORS = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError)
_BROKEN_YAML = (yaml.YAMLError, RecursionError, *_CONSTRUCTOR_ERRORS)
AUTO = "auto"
_SIZES = ("xxs", "xs", "s", "m", "l", "xl", "xxl")


def _setting(default: Any, help: str, *, option: str | None = None, metavar: str | None = None, **more: Any) -> Any:
    """A field of TrainConfig; see there for the metadata."""
    metadata = {"help": help, "option": option, "metavar": metavar, **more}
    factory = {"default_factory": lambda: dict(default)} if isinstance(default, dict) else {"default": default}
    return field(metadata={key: value for key, value in metadata.items() if value is not None}, **factory)


@dataclass(frozen=True)
class TrainConfig:
    """A training run, complete. Each field is a key of the YAML file, and most are options of the command line.

    Names say the unit: `_nimg` counts training images, and YAML may write counts as 128Ki, 8Mi, 1Gi. The metadata of
    each field: `help`, a phrase that documents it and is the option's help text; `option`, its name on the command
    line, if it is an option; `metavar`, which is NIMG for a number of images; `choices`, if its values are a fixed set;
    `free`, if it may change when a run is resumed; a change in any other field is refused; `added`, if runs from before
    the field existed keep their names, which its default does not enter. Raises ValueError for a
    value that is out of range, naming the option.
    """

    data: str = _setting(
        "", "Training set: folder, zip, .npy arrays, or hf:FOLDER",
        option="--data", metavar="PATH", free=True,  # the identity of its content is compared instead
    )  # fmt: skip
    cond: bool = _setting(True, "Train with the labels of the data set", option="--cond", metavar="BOOL")
    holdout: float = _setting(
        0.0, "Images to hold out: share (0.05) or number",
        option="--holdout", metavar="P|N", added=True,
    )  # fmt: skip
    encoder: Mapping[str, Any] = _setting(
        {"kind": "auto"}, "Encoder between stored items and what the network sees: rgb, vae, or auto for what fits"
    )
    network: Mapping[str, Any] = _setting(
        {}, "Kind of network (`kind`: edm2 or dit) and its arguments that differ from their defaults"
    )
    init_from: str | None = _setting(
        None, "Snapshot to start from, to fine-tune it",
        option="--init-from", metavar="SNAPSHOT", free=True,  # its hash is compared instead
    )  # fmt: skip
    init_sha256: str | None = _setting(None, "SHA-256 of the snapshot to start from", named="--init-from")
    sigma_data: float = _setting(0.5, "Standard deviation of the training data")
    label_dropout: float = _setting(
        0.0, "Fraction of images without label, for CFG",
        option="--label-dropout", metavar="P",
    )  # fmt: skip
    flip: bool = _setting(
        False, "Mirror half of the images",
        option="--flip", metavar="BOOL", added=True,
    )  # fmt: skip
    augment: float = _setting(
        0.0, "Probability of EDM's augmentations (0.12)",
        option="--augment", metavar="P", added=True,
    )  # fmt: skip
    P_mean: float = _setting(-0.4, "Mean of ln(sigma) in training", option="--P_mean", metavar="FLOAT")
    P_std: float = _setting(1.0, "Standard deviation of ln(sigma)", option="--P_std", metavar="FLOAT")
    ref_lr: float = _setting(0.01, "Learning rate until the decay", option="--lr", metavar="FLOAT")
    ref_batches: float = _setting(70_000, "Batches before the decay; 0: no decay", option="--decay", metavar="BATCHES")
    rampup_nimg: int = _setting(10_000_000, "Images of linear ramp-up; 0: none", option="--rampup", metavar="NIMG")
    adam_betas: tuple[float, float] = _setting((0.9, 0.99), "Adam's beta1 and beta2")
    adam_eps: float = _setting(1e-8, "Adam's epsilon")
    ema_stds: tuple[float, ...] = _setting((0.050, 0.100), "EMA lengths to track, as relative standard deviations")
    duration_nimg: int = _setting(
        1 << 30, "Duration in images, such as 2048Mi", option="--duration", metavar="NIMG", free=True
    )
    batch_size: int = _setting(2048, "Images per step over all processes", option="--batch", metavar="NIMG")
    batch_gpu: int | str | None = _setting(
        None, "Images per forward pass at most, or auto", default_shown="all",
        option="--batch-gpu", metavar="NIMG", parse=lambda text: parse_batch_gpu(text), free=True,
    )  # fmt: skip
    precision: str = _setting(
        "fp32", "Inside the network: fp32, fp16 or bf16",
        option="--precision", metavar="NAME", choices=tuple(PRECISIONS),
    )  # fmt: skip
    recompute: bool = _setting(
        False, "Recompute activations in the backward pass: 1/3 slower, less memory, same results",
        option="--recompute", metavar="BOOL", free=True,
    )  # fmt: skip
    shard: bool = _setting(
        False, "Shard Adam's moments and the EMAs over the processes: less memory, same results",
        option="--shard", metavar="BOOL", free=True,
    )  # fmt: skip
    compile: str = _setting(
        "auto", "torch.compile: on, off or auto (default)", default_shown="",
        option="--compile", metavar="MODE", choices=("auto", "on", "off"), bare="on", free=True,
    )  # fmt: skip
    loss_scaling: float = _setting(1.0, "Loss scaling, undone before the update", option="--ls", metavar="FLOAT")
    cudnn_benchmark: bool = _setting(True, "Let cuDNN choose by benchmark", option="--bench", metavar="BOOL", free=True)
    seed: int = _setting(0, "Random seed of the run", option="--seed", metavar="N")
    workers: int = _setting(2, "Processes that read images; 0: none", option="--workers", metavar="N", free=True)
    status_every_nimg: int = _setting(
        128 << 10, "Images between status lines; 0: none", option="--status", metavar="NIMG", free=True
    )
    snapshot_every_nimg: int = _setting(
        8 << 20, "Images between snapshots; 0: none", option="--snapshot", metavar="NIMG", free=True
    )
    checkpoint_every_nimg: int = _setting(
        128 << 20, "Images between checkpoints; 0: none", option="--checkpoint", metavar="NIMG", free=True
    )
    keep_checkpoints: int = _setting(2, "Number of newest checkpoints to keep; 0 keeps all", free=True)
    max_lost_steps: int = _setting(
        10, "Steps in a row whose gradients are mostly not finite before the run stops; 0 never stops it", free=True
    )
    snapshot_dtype: str = _setting("float16", "Data type of the weights in snapshots", choices=tuple(STORED_DTYPES))

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if not _all_finite(value):
                raise ValueError(f"{option_of(f.name)} must be finite; got {value}")
            check_type(value, f.type, option_of(f.name))
        intervals = ("status_every_nimg", "snapshot_every_nimg", "checkpoint_every_nimg")
        for name in ("batch_size", "duration_nimg", "P_std", "ref_lr", "sigma_data", "loss_scaling"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{option_of(name)} must be above 0; got {getattr(self, name)}")
        for name in ("workers", "ref_batches", "rampup_nimg", "keep_checkpoints", "max_lost_steps", *intervals):
            if getattr(self, name) < 0:
                raise ValueError(f"{option_of(name)} must not be negative; got {getattr(self, name)}")
        for name, largest in _LARGEST.items():
            if getattr(self, name) > largest:
                raise ValueError(f"{option_of(name)} must be at most {largest}; got {getattr(self, name)}")
        if abs(self.P_mean) + 6 * self.P_std > _MAX_LN_SIGMA:
            raise ValueError(
                f"--P_mean {self.P_mean:g} and --P_std {self.P_std:g} give noise levels whose squares float32 cannot "
                f"hold; |P_mean| + 6 P_std must be at most {_MAX_LN_SIGMA}"
            )
        if not 1 / _MAX_SIGMA_DATA <= self.sigma_data <= _MAX_SIGMA_DATA:
            raise ValueError(
                f"sigma_data must be from {1 / _MAX_SIGMA_DATA:g} to {_MAX_SIGMA_DATA:g}; got {self.sigma_data:g}. It "
                "is the standard deviation of the data, 0.5 for pixels and latents as this program scales them"
            )
        if not all(0 <= beta < 1 for beta in self.adam_betas) or self.adam_eps < 0:
            raise ValueError(
                "adam_betas must be from 0 to below 1, and adam_eps not negative; "
                f"got {self.adam_betas}, {self.adam_eps}"
            )
        if isinstance(self.batch_gpu, str) and self.batch_gpu != AUTO:
            raise ValueError(f"{option_of('batch_gpu')} must be a number of images or auto; got {self.batch_gpu!r}")
        for name in ("label_dropout", "augment"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{option_of(name)} must be between 0 and 1; got {getattr(self, name)}")
        for f in dataclasses.fields(self):
            choices, value = f.metadata.get("choices"), getattr(self, f.name)
            if choices and value not in choices:
                raise ValueError(f"{option_of(f.name)} must be one of {', '.join(choices)}; got {value!r}")
        if self.holdout < 0 or (self.holdout >= 1 and self.holdout % 1):
            raise ValueError(f"--holdout must be a share below 1 or a whole number of images; got {self.holdout:g}")
        if self.holdout and not self.snapshot_every_nimg:
            raise ValueError("--holdout is measured with each snapshot, and --snapshot 0 writes none; give an interval")
        if 0 < self.snapshot_every_nimg < 1000:
            raise ValueError(
                "--snapshot must be at least 1000 images: the file names of snapshots count thousands; "
                f"got {self.snapshot_every_nimg}"
            )
        if not self.ema_stds or len({f"{std:.3f}" for std in self.ema_stds}) < len(self.ema_stds):
            raise ValueError(f"ema_stds must be lengths that differ in three decimals; got {list(self.ema_stds)}")
        std_to_exp(self.ema_stds)
        if not isinstance(self.network_kind, str) or self.network_kind not in NETWORKS:
            raise ValueError(f"unknown kind of network {self.network_kind!r}; known kinds: {', '.join(NETWORKS)}")
        NETWORKS[self.network_kind].check_arguments(self.network, self.network_kind)
        if self.encoder != {"kind": AUTO}:
            make_encoder(self.encoder)

    @property
    def max_micro_batch(self) -> int | None:
        """Images per forward pass at most, as far as that is a number: None for all of a process, and for auto."""
        return self.batch_gpu if isinstance(self.batch_gpu, int) else None

    @property
    def network_kind(self) -> str:
        """The kind of network to train, a key of `NETWORKS`."""
        return self.network.get("kind", DEFAULT_NETWORK)


def _all_finite(value: Any) -> bool:
    """Whether no number in `value`, at any depth, is NaN or infinite."""
    if isinstance(value, Mapping):
        return all(_all_finite(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(_all_finite(item) for item in value)
    return not isinstance(value, float) or math.isfinite(value)


def parse_batch_gpu(text: str) -> int | str:
    """A number of images such as 64 or 1Ki, or "auto". Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d{1,9})(Ki)?", text.strip())
    if match is not None:
        return int(match[1]) * (_COUNT_UNITS[match[2]] if match[2] else 1)
    if text != AUTO:
        raise ValueError(f"{text!r:.60} is not a number of images; write for example 32, or auto")
    return AUTO


def option_of(name: str) -> str:
    """What users call the field `name`: its option, or its YAML key."""
    metadata = {f.name: f.metadata for f in dataclasses.fields(TrainConfig)}[name]
    return metadata.get("option") or metadata.get("named") or f"{name} (in the YAML file)"


def nearest(name: str, known: list[str]) -> str:
    """The end of an error message: "; did you mean 'X'?" if a known name is close to `name`, else all known names."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else f"; available: {', '.join(known)}"


def config_from_dict(values: Mapping[str, Any], source: str, options: Collection[str] = ()) -> TrainConfig:
    """A checked configuration from plain values: those of the keys `options` from the command line, others from a file.

    Raises ValueError that names the option, or the file `source` and the key at fault, with the closest known key.
    """
    fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
    parsed: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise ValueError(f"{source}: unknown key {key!r}{nearest(str(key), list(fields))}")
        if key in ("network", "encoder") and not isinstance(value, Mapping):
            raise ValueError(f"{source}: {key} must be a mapping; got {value!r}")
        if isinstance(value, list):
            value = tuple(value)
        if fields[key].type in (int, int | str | None):
            value = _count(value)
        if isinstance(value, bool) and "off" in fields[key].metadata.get("choices", ()):
            value = "on" if value else "off"  # which YAML 1.1 takes for true and false
        if key in ("data", "init_from") and isinstance(value, str) and value.startswith("~/"):
            value = os.path.expanduser(value)
        parsed[key] = value
    network = dict(parsed.get("network", {}))
    if network.get("kind") == DEFAULT_NETWORK:
        del network["kind"]  # the same run as one that does not name the default
        parsed["network"] = network
    try:
        return TrainConfig(**parsed)
    except ValueError as error:
        named = next((key for key in values if str(error).startswith(f"{option_of(key)} ")), None)
        if named in options:
            raise
        key = "" if named is None or named in str(error) else f"{named}: "
        raise ValueError(f"{source}: {key}{error}") from error


def _count(value: Any) -> Any:
    """The number of images in 128Ki, 1.5Mi or 1e6, written as in a YAML file; anything else as it is."""
    if isinstance(value, str) and (written := re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)(Ki|Mi|Gi)", value)):
        number = float(written[1]) * _COUNT_UNITS[written[2]]
        return int(number) if number.is_integer() else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


class _Loader(yaml.SafeLoader):
    """YAML without its traps: a key given twice and numbers that are not what they look like are errors."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, count in counts.items():
            if count > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r:.60} is given twice")
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        merged = [value for key, value in node.value if key.tag == "tag:yaml.org,2002:merge"]
        if any(isinstance(value, yaml.SequenceNode) and len(value.value) > _MAX_MERGED for value in merged):
            raise yaml.constructor.ConstructorError(None, None, f"'<<' merges more than {_MAX_MERGED} mappings")
        super().flatten_mapping(node)
        if merged and len(node.value) > _MAX_YAML_VALUES:  # twice as many with each level of '<<: [*a, *a]'
            raise yaml.constructor.ConstructorError(None, None, f"'<<' merges more than {_MAX_YAML_VALUES} values")

    def construct_plain_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        if not re.fullmatch(r"[-+]?(0|[1-9][0-9_]{0,30})", text):  # 010 would be 8, and 1:30 would be 90
            raise yaml.constructor.ConstructorError(
                None, None, f"{text!r:.60} is not a plain number; write it without leading zeros, colons and prefixes"
            )
        return int(text)

    def construct_plain_float(self, node: yaml.ScalarNode) -> float:
        text = self.construct_scalar(node)
        if ":" in text:
            raise yaml.constructor.ConstructorError(None, None, f"{text!r:.60} is not a plain number")
        return self.construct_yaml_float(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_plain_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_plain_float)
# YAML 1.1 takes 1e-3 for text
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises ValueError if it cannot be read or is not a mapping."""
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_YAML_BYTES + 1)
    except OSError as error:
        raise ValueError(f"cannot read the configuration {path}: {error}") from error
    if len(data) > _MAX_YAML_BYTES:
        raise ValueError(f"{path} is larger than a configuration can be ({_MAX_YAML_BYTES} bytes)")
    try:
        values = yaml.load(data.decode("utf-8-sig"), _Loader)  # a SafeLoader
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start}"
        raise ValueError(f"{path} is not UTF-8 text ({reason}); save it as UTF-8") from error
    except _BROKEN_YAML as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if _count_nodes(values) >= _MAX_YAML_VALUES:
        raise ValueError(f"{path} holds {_MAX_YAML_VALUES} values or more, or repeats its parts that often")
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of names to values")
    return values


def _count_nodes(value: Any) -> int:
    """The number of values in nested lists and mappings, counting shared ones each time; at most 10,000."""
    count, waiting = 0, [value]
    while waiting and count < _MAX_YAML_VALUES:
        node = waiting.pop()
        count += 1
        if isinstance(node, Mapping):
            waiting.extend(node.values())
        elif isinstance(node, list | tuple):
            waiting.extend(node[:_MAX_YAML_VALUES])
    return count


def preset_names() -> list[str]:
    """The names that --preset accepts, each family in order of network size."""

    def by_size(name: str) -> tuple[str, int, str]:
        family, _, size = name.rpartition("-")
        return (family, _SIZES.index(size), name) if size in _SIZES else (name, 0, name)

    return sorted((path.stem for path in PRESET_FOLDER.glob("*.yaml")), key=by_size)


def preset_path(name: str) -> Path:
    """The YAML file of a preset; raises ValueError with the closest name if there is none."""
    if name not in preset_names():
        raise ValueError(f"unknown preset {name!r}{nearest(name, preset_names())}")
    return PRESET_FOLDER / f"{name}.yaml"


def most_epochs(num_images: int, regularised: bool) -> int:
    """How often training may see each of `num_images` images, as published runs did, before it is likely to memorise.

    `regularised` is training with both dropout and augmentation.
    """
    if regularised:
        return 12_000  # EDM on AFHQv2: 200 million images of 15,803 (Karras et al. 2022, Table 7)
    return 2_000 if num_images >= 1_000_000 else 1_000  # EDM2 on ImageNet: 1,676 (Karras et al. 2023, Table 6)


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain lists, dicts and numbers, as YAML and JSON hold them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def write_config(config: TrainConfig, path: str | Path) -> None:
    """Write the complete configuration as YAML, atomically; `config_from_dict(read_yaml(path))` reads it back."""
    with atomic_write(path, "w") as file:
        yaml.safe_dump(config_to_dict(config), file, sort_keys=False)


def _decisive_fields() -> list[str]:
    """The fields that decide the weights of a run, and so must not change when it is resumed."""
    return [f.name for f in dataclasses.fields(TrainConfig) if not f.metadata.get("free")]


def run_id(config: TrainConfig, data_identity: Mapping[str, Any]) -> str:
    """The name of a run: a hash of everything that decides its weights.

    It stays the same if the run is resumed or extended.
    """
    values = config_to_dict(config)
    decisive = {name: values[name] for name in _decisive_fields()}
    for f in dataclasses.fields(TrainConfig):
        if f.metadata.get("added") and decisive[f.name] == f.default:
            del decisive[f.name]
    text = json.dumps([decisive, dict(data_identity)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def refuse_changes(old: Mapping[str, Any], new: TrainConfig, run_dir: str | Path) -> None:
    """Raise ValueError if `new` differs from the configuration `old` of `run_dir` in a field that must not change."""
    values, differences = config_to_dict(new), []
    # what was added later was off before
    known = {**{f.name: f.default for f in dataclasses.fields(TrainConfig) if f.metadata.get("added")}, **old}
    for name in _decisive_fields():
        if name in known and known[name] != values[name]:
            was, now, label = known[name], values[name], option_of(name)
            if isinstance(was, Mapping) and isinstance(now, Mapping):  # only what differs in it
                keys = [key for key in {**was, **now} if was.get(key) != now.get(key)]
                was, now = ({key: part.get(key) for key in keys} for part in (was, now))
            differences.append(f"{label} was {was}, is now {now}")
    if differences:
        raise ValueError(
            f"{run_dir} holds a run with other settings: {'; '.join(differences)}. Resume it with its own settings, or "
            "use another --outdir"
        )
