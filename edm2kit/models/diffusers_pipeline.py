"""What surrounds a model of diffusers: its folder or hub repository, scheduler, VAE and text encoders.

Only safetensors are read, and no code of a repository runs. diffusers and transformers are optional packages:
`pip install 'edm2kit[diffusers]'`.
"""

import copy
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError

from edm2kit.models.adapters import DiscreteVP, Flow, Schedule
from edm2kit.models.diffusers_interior import patch_size
from edm2kit.models.diffusers_network import FAMILIES, DiffusersNetwork
from edm2kit.torch_utils.cache import cache_folder
from edm2kit.torch_utils.dist import one_line
from edm2kit.torch_utils.files import atomic_write, sampled_sha256, short

PREFIX = "diffusers:"  # of the paths and hub names that mean such a model
_INSTALL = "pip install 'edm2kit[diffusers]'"
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
_FIRST_FLOW_LEVEL = 1e8  # for t = 1, pure noise: in float32, t = sigma / (1 + sigma) is 1 from 2^24 on
_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?")
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder", "watermarker")
_PROMPTS_AT_ONCE = 16
_MAX_CACHE_BYTES = 1 << 30


def diffusers_package() -> Any:
    """The diffusers library. Raises ValueError if it is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(f"models of diffusers need diffusers and transformers: {_INSTALL}") from error
    return diffusers


def dtype_option(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The keyword argument of `from_pretrained` that asks for weights in `dtype`."""
    version = tuple(int(part) for part in diffusers_package().__version__.split(".")[:2] if part.isdigit())
    return {"dtype" if version >= (0, 42) else "torch_dtype": dtype}


# ---- noise schedules


def schedule_of(scheduler: Any) -> tuple[Schedule, str]:
    """The noise schedule and the kind of prediction that a scheduler of diffusers stands for.

    Raises ValueError for a scheduler that is neither a flow nor variance-preserving in discrete time.

    Example: `DiffusersNetwork(unet, *schedule_of(DDIMScheduler.from_pretrained(folder)))`.
    """
    config, name = scheduler.config, type(scheduler).__name__
    prediction = config.get("prediction_type", "epsilon")
    if name.startswith("FlowMatch") or prediction == "flow_prediction":
        return Flow(float(config.num_train_timesteps)), "flow"
    if getattr(scheduler, "alphas_cumprod", None) is None or prediction not in _PREDICTIONS:
        raise ValueError(
            f"the scheduler {name} with predictions of the type {prediction!r} is not known; known are flow matching, "
            f"and schedulers with alphas_cumprod and the types {', '.join(_PREDICTIONS)}"
        )
    return DiscreteVP(scheduler.alphas_cumprod.double()), _PREDICTIONS[prediction]


def own_levels(scheduler: Any, net: DiffusersNetwork, num_steps: int) -> tuple[float, ...]:
    """The noise levels at which the model's own pipeline would run about `num_steps` steps, falling, without the 0.

    A flow begins with pure noise, at the level 1e8; the solver's state should be float64 then.

    Raises ValueError if the scheduler refuses the number of steps.
    """
    scheduler = copy.deepcopy(scheduler)
    options: dict[str, Any] = {}
    if type(net.model).__name__ == "FluxTransformer2DModel":
        options["sigmas"] = [1 - k / num_steps for k in range(num_steps)]
    config = scheduler.config
    if config.get("use_dynamic_shifting"):
        tokens = (net.img_resolution // patch_size(net.model)) ** 2
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        first, last = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        options["mu"] = first + (last - first) * (tokens - low) / (high - low)
    try:
        if "sigmas" in options:
            scheduler.set_timesteps(**options)
        else:
            scheduler.set_timesteps(num_steps, **options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the scheduler {type(scheduler).__name__} refuses {num_steps} steps: {error}") from error
    if isinstance(net.schedule, DiscreteVP):
        return _levels_at(net.schedule, scheduler.timesteps)
    t = scheduler.sigmas.double()
    levels = (t / (1 - t)).clamp(max=_FIRST_FLOW_LEVEL)
    return tuple(dict.fromkeys(level for level in levels.tolist() if level > 0))


def _levels_at(schedule: DiscreteVP, timesteps: torch.Tensor) -> tuple[float, ...]:
    t = timesteps.double().cpu().unique().flip(0)  # some schedulers evaluate a time twice
    low = t.floor().long().clamp(0, len(schedule.sigmas) - 2)
    logs = schedule.sigmas.log()
    return tuple(logs[low].lerp(logs[low + 1], t - low).exp().tolist())


@dataclass(frozen=True)
class Limit:
    """What a scheduler does to D before each step: limit it to [-`value`, `value`], or by dynamic thresholding.

    With `ratio`, the limit is that quantile of |D|, from 1 to `value`, and D is divided by it. Saharia et al. 2022
    (Imagen), Section 2.3.
    """

    value: float
    ratio: float | None = None

    def __call__(self, D: torch.Tensor) -> torch.Tensor:
        if self.ratio is None:
            return D.clamp(-self.value, self.value)
        limit = D.abs().flatten(1).float().quantile(self.ratio, dim=1).clamp(1, self.value)
        limit = limit.reshape(-1, 1, 1, 1).to(D.dtype)
        return D.clamp(-limit, limit) / limit


def limit_of(scheduler: Any) -> Limit | None:
    """How a scheduler limits D; None if it does not."""
    config = scheduler.config
    if config.get("thresholding"):
        return Limit(float(config.sample_max_value), float(config.dynamic_thresholding_ratio))
    if config.get("clip_sample") and type(scheduler).__name__ in ("DDPMScheduler", "DDIMScheduler"):
        return Limit(float(config.clip_sample_range))
    return None


# ---- folders


@dataclass(frozen=True)
class Repository:
    """A local folder of diffusers: a pipeline, or a single model (`model_name` is then "").

    `index` is its model_index.json: component -> (library, class). `name` is what the user called it.
    """

    name: str
    folder: Path
    index: Mapping[str, Any]
    model_name: str

    @property
    def is_pipeline(self) -> bool:
        """Whether the folder holds a pipeline, and not a model alone."""
        return bool(self.model_name)

    def has(self, component: str) -> bool:
        """Whether the pipeline has this component."""
        return _class_of(self.index, component, self.name) is not None


def open_repository(source: str, dtype: torch.dtype = torch.float32) -> Repository:
    """The folder behind a path or a hub name `org/name[@revision]`, with or without "diffusers:", downloaded if needed.

    For half precision, weights stored in half precision are preferred. Raises ValueError, in one line, if there is
    neither such a folder nor such a repository, without a connection, and for an incomplete folder.
    """
    name = source.removeprefix(PREFIX)
    folder = Path(name)
    if not name:
        raise ValueError(f"{source} is followed by nothing; write {PREFIX}FOLDER, or {PREFIX}org/name of the hub")
    if not folder.is_dir():
        match = _HUB_NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{name}: no such folder; give one, or a hub name such as {PREFIX}org/name")
        folder = _download(name, match[1], match[2], dtype)
    if (folder / "model_index.json").is_file():
        index = _read_json(folder / "model_index.json")
        for component in ("unet", "transformer"):
            if _class_of(index, component, name) is not None:
                return Repository(name, folder, index, component)
        found = ", ".join(key for key in index if not key.startswith("_")) or "nothing"
        raise ValueError(f"{name}: the pipeline has neither a unet nor a transformer; it has {one_line(found)}")
    if (folder / "config.json").is_file():
        return Repository(name, folder, {}, "")
    raise ValueError(
        f"{name} has neither model_index.json (a pipeline) nor config.json (a model); give the folder that holds one"
    )


def _download(name: str, repo: str, revision: str | None, dtype: torch.dtype) -> Path:
    diffusers = diffusers_package()
    options: dict[str, Any] = {"use_safetensors": True, "revision": revision}
    options.update(dict.fromkeys(_UNUSED))
    variants = ("fp16", None) if dtype != torch.float32 else (None,)
    advice = (
        "check the name at huggingface.co and, for gated models, log in with `hf auth login`; without a network "
        f"connection, copy the repository into a folder and give {PREFIX}FOLDER"
    )
    error: Exception | None = None
    for variant in variants:
        try:
            return Path(diffusers.DiffusionPipeline.download(repo, variant=variant, **options))
        except Exception as caught:  # the hub client raises many kinds: HTTP, offline, no such variant, no such file
            error = caught
    raise ValueError(f"{name} is not a folder here and cannot be downloaded ({_reason(error)}); {advice}") from error


def load_component(repository: Repository, component: str, dtype: torch.dtype) -> Any:
    """A component of a pipeline, or the model of a folder that holds one alone (component ""), on the CPU.

    Raises ValueError if its class is not of diffusers, or its files are missing or damaged.
    """
    diffusers = diffusers_package()
    folder = repository.folder / component
    if component:
        found = _class_of(repository.index, component, repository.name)
        if found is None:
            raise ValueError(f"{repository.name}: the pipeline has no {component}")
        library, kind = found
    else:
        library, kind = "diffusers", str(_read_json(folder / "config.json").get("_class_name"))
    if library != "diffusers" or not hasattr(diffusers, kind):
        raise ValueError(f"{repository.name}: {component or 'the model'} is a {kind} of {library}, not of diffusers")
    if component == repository.model_name and kind not in FAMILIES and kind != "Transformer2DModel":
        raise ValueError(f"{repository.name}: models of the class {kind} are not known; known: {', '.join(FAMILIES)}")
    options: dict[str, Any] = {}
    if component != "scheduler":
        has_half = any(folder.glob("*.fp16.safetensors")) or any(folder.glob("*.fp16-*.safetensors"))
        has_full = any(file for file in folder.glob("*.safetensors") if ".fp16" not in file.name)
        variant = "fp16" if has_half and (dtype != torch.float32 or not has_full) else None
        options = {**dtype_option(dtype), "use_safetensors": True, "variant": variant}
    try:
        return getattr(diffusers, kind).from_pretrained(str(folder), local_files_only=True, **options)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} does not hold a {kind} that diffusers can load: {_reason(error)}") from error


def _class_of(index: Mapping[str, Any], component: str, name: str) -> tuple[str, str] | None:
    """Library and class of a component of a pipeline; None if it has none, which is written null or [null, null]."""
    entry = index.get(component)
    if entry in (None, [None, None]):
        return None
    if isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry):
        return entry[0], entry[1]
    raise ValueError(f"{name}: model_index.json has {component} {short(entry)}; expected a library and a class")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); copy or download it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged (not a JSON object); copy or download it again")
    return found


def _reason(error: BaseException | None) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".")[:300] if lines else type(error).__name__


def fingerprint(folder: Path) -> str:
    """A hash that tells the contents of model folders apart: configurations, tokenizers and samples of weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in (".json", ".txt", ".model", ".safetensors"):
            digest.update(f"{path.relative_to(folder)} {sampled_sha256(path)}\n".encode())
    return digest.hexdigest()


# ---- prompts


def prompt_encoder_identity(repository: Repository) -> str:
    """A hash of what turns prompts into embeddings: text encoders, tokenizers, and the pipeline that uses them.

    Two pipelines with the same one give the same embeddings, so these are computed once.
    """
    parts = [str(repository.index.get("_class_name")), str(repository.index.get("force_zeros_for_empty_prompt"))]
    for folder in sorted(repository.folder.iterdir()):
        if folder.is_dir() and folder.name.startswith(("text_encoder", "tokenizer")):
            parts.append(f"{folder.name} {fingerprint(folder)}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def encode_prompts(
    repository: Repository,
    texts: Sequence[str],
    negative: str | None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    cache: Path | None = None,
) -> dict[str, torch.Tensor]:
    """What the pipeline's own text encoders make of prompts: tensors [K + 1, ...] on the CPU, last the null prompt.

    The null prompt is `negative`, or what the pipeline takes for no prompt. The text encoders are loaded for this only,
    and not at all if the result is in `cache` (by default the folder `prompts` in the cache of downloads). Results of
    more than 1 GiB are not stored. Raises ValueError if the pipeline has no text encoder, or it cannot be loaded.
    """
    key = json.dumps([prompt_encoder_identity(repository), list(texts), negative, str(dtype)])
    name = hashlib.sha256(key.encode()).hexdigest()
    path = (cache or cache_folder() / "prompts") / f"{name}.safetensors"
    from safetensors.torch import load_file, save

    if path.is_file():
        try:
            return load_file(path)
        except SafetensorError:  # cut off; written again below
            path.unlink()
    found = _encode(repository, texts, negative, device, dtype)
    if sum(tensor.nbytes for tensor in found.values()) <= _MAX_CACHE_BYTES:
        with atomic_write(path) as file:
            file.write(save(found))
    return found


def _encode(
    repository: Repository, texts: Sequence[str], negative: str | None, device: torch.device | str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    diffusers = diffusers_package()
    try:
        import transformers  # noqa: F401 - diffusers would only fail later, and less clearly
    except ImportError as error:
        raise ValueError(f"text prompts need transformers: {_INSTALL}") from error
    kind = str(repository.index.get("_class_name"))
    left_out = [name for name in ("unet", "transformer", "vae", *_UNUSED) if name in repository.index]
    left_out += [name for name, value in repository.index.items() if value == [None, None] and name not in left_out]
    variant = "fp16" if any((repository.folder / "text_encoder").glob("*.fp16*.safetensors")) else None
    try:
        pipeline = getattr(diffusers, kind).from_pretrained(
            str(repository.folder),
            local_files_only=True,
            use_safetensors=True,
            variant=variant,
            **dtype_option(dtype),
            **dict.fromkeys(left_out),
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError, AttributeError) as error:
        raise ValueError(f"{repository.name}: cannot load the text encoders of {kind}: {_reason(error)}") from error
    encode = PROMPT_ENCODERS.get(kind)
    if encode is None:
        raise ValueError(
            f"{repository.name}: how a {kind} encodes prompts is not known; known: {', '.join(PROMPT_ENCODERS)}"
        )
    pipeline.to(device)
    if "transformer" in left_out:  # SD3 without T5 reads the width of its embeddings there
        config = _read_json(repository.folder / "transformer" / "config.json")
        pipeline.transformer = SimpleNamespace(config=SimpleNamespace(**config))
    parts: list[dict[str, torch.Tensor]] = []
    with torch.no_grad():
        for first in range(0, len(texts), _PROMPTS_AT_ONCE):
            parts.append(encode(pipeline, list(texts[first : first + _PROMPTS_AT_ONCE]), None, device))
        parts.append(encode(pipeline, None, negative, device))
    return {key: torch.cat([part[key].cpu() for part in parts]).contiguous() for key in parts[0]}


def _stable_diffusion(
    pipe: Any, texts: list[str] | None, negative: str | None, device: Any, **more: Any
) -> dict[str, torch.Tensor]:
    """For encode_prompt that returns the embeddings of the prompts, then those of the negative one."""
    found = pipe.encode_prompt(
        prompt=texts or [""],
        device=device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=texts is None,
        negative_prompt=None if texts or negative is None else [negative],
        **more,
    )
    return {"prompt_embeds": found[0 if texts else 1]}


def _with_pooled(
    pipe: Any, texts: list[str] | None, negative: str | None, device: Any, **more: Any
) -> dict[str, torch.Tensor]:
    """For (embeddings, negative ones, pooled, negative pooled): SDXL and SD3."""
    found = pipe.encode_prompt(
        prompt=texts or [""],
        device=device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=texts is None,
        negative_prompt=None if texts or negative is None else [negative],
        **more,
    )
    which = 0 if texts else 1
    return {"prompt_embeds": found[which], "pooled": found[2 + which]}


def _sd3(pipe: Any, texts: list[str] | None, negative: str | None, device: Any) -> dict[str, torch.Tensor]:
    return _with_pooled(pipe, texts, negative, device, prompt_2=None, prompt_3=None)


def _flux(pipe: Any, texts: list[str] | None, negative: str | None, device: Any) -> dict[str, torch.Tensor]:
    prompts = texts or [negative or ""]
    embeddings, pooled, _ = pipe.encode_prompt(prompt=prompts, prompt_2=None, device=device)
    return {"prompt_embeds": embeddings, "pooled": pooled}


def _pixart(pipe: Any, texts: list[str] | None, negative: str | None, device: Any) -> dict[str, torch.Tensor]:
    # the pipeline treats the text of a negative prompt as that of a prompt
    found = pipe.encode_prompt(
        prompt=texts or [negative or ""], do_classifier_free_guidance=False, device=device, num_images_per_prompt=1
    )
    return {"prompt_embeds": found[0], "mask": found[1]}


# class of a pipeline -> (pipeline, texts or None for the null prompt, negative text, device) -> tensors [K, ...]
PROMPT_ENCODERS: dict[str, Callable[..., dict[str, torch.Tensor]]] = {
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _with_pooled,
    "StableDiffusion3Pipeline": _sd3,
    "FluxPipeline": _flux,
    "PixArtAlphaPipeline": _pixart,
    "PixArtSigmaPipeline": _pixart,
    "IFPipeline": _stable_diffusion,
}
