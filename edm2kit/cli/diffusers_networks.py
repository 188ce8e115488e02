"""Networks of diffusers in a request: loading them as snapshots are loaded, their prompts, and their noise levels."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from edm2kit.conditions import TextPrompts
from edm2kit.denoiser import Denoiser, Wrapper
from edm2kit.models.diffusers_loading import Loaded, in_space_of, load_diffusers, with_lora
from edm2kit.models.diffusers_pipeline import (
    PREFIX,
    Limit,
    diffusers_package,
    encode_prompts,
    fingerprint,
    prompt_encoder_identity,
)
from edm2kit.models.preconditioning import PRECISIONS, resolve_precision
from edm2kit.sampling.solvers import Sampler
from edm2kit.snapshots.file_format import Header
from edm2kit.snapshots.loading import Snapshot
from edm2kit.torch_utils.files import sha256_of

if TYPE_CHECKING:
    from edm2kit.cli.generation import Request

_LISTED = 64  # prompts that a record lists one by one
_TOLERANCE = 1e-3  # relative, of noise levels at the ends of a network's range
_FLOAT64_FROM = 1e3  # noise level from which on the solver's state is float64: float32 would lose x0 in the noise


@dataclass(frozen=True)
class Limited(Wrapper):
    """A denoiser whose D is limited after guidance as the main network's own scheduler limits it."""

    denoiser: Denoiser
    limit: Limit

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, condition: Any = None) -> torch.Tensor:
        return self.limit(self.denoiser(x, sigma, condition))


@dataclass(frozen=True)
class DiffusersNetworks:
    """The networks of a request, some of them of diffusers, in the form that `prepare` takes.

    `loaded` are those of diffusers by their role: "net", "gnet", "uncond". `denoisers` are all networks by role, those
    beside the main one converted to its latents. `prompts` is None without text. `identities` are for records.
    """

    snapshots: Mapping[str, Snapshot]
    loaded: Mapping[str, Loaded]
    denoisers: Mapping[str, Any]
    prompts: TextPrompts | None
    identities: Mapping[str, Any]

    def sampler(self, sampler: Sampler, device: torch.device) -> Sampler:
        """`sampler` with the noise levels of the main network's own scheduler, if these are asked for.

        Raises ValueError if a noise level is beyond what a network knows.
        """
        if sampler.levels == "own":
            if "net" not in self.loaded:
                raise ValueError("--levels own needs a network of diffusers; EDM2's noise levels are karras")
            levels = self.loaded["net"].levels(sampler.num_steps)
            if device.type == "mps":  # has no float64
                levels = tuple(dict.fromkeys(min(level, _FLOAT64_FROM) for level in levels))
            high, low = levels[0], levels[-1]
            sampler = dataclasses.replace(sampler, levels=levels, num_steps=len(levels), sigma_max=high, sigma_min=low)
        if sampler.sigma_max > _FLOAT64_FROM and device.type != "mps":
            sampler = dataclasses.replace(sampler, dtype=torch.float64)
        for role, loaded in self.loaded.items():
            low, high = loaded.net.sigma_range
            if sampler.sigma_max > high * (1 + _TOLERANCE) or sampler.sigma_min < low * (1 - _TOLERANCE):
                raise ValueError(
                    f"the noise levels go from {sampler.sigma_max:g} to {sampler.sigma_min:g}, but the network of "
                    f"--{role} knows {high:.6g} to {low:.6g}; use --levels own, or set --sigma_max and --sigma_min"
                )
        return sampler

    def limited(self, denoiser: Denoiser) -> Denoiser:
        """`denoiser`, limited as the main network's scheduler does it."""
        limit = self.loaded["net"].limit if "net" in self.loaded else None
        return denoiser if limit is None else Limited(denoiser, limit)

    def settings(self, request: "Request") -> dict[str, Any]:
        """What decides an image besides what every request has, for records."""
        found: dict[str, Any] = {"pixels": request.pixels, "vae_tiling": request.vae_tiling}
        if "net" in self.loaded:
            limit = self.loaded["net"].limit
            found["limit"] = None if limit is None else dataclasses.asdict(limit)
        if self.prompts is not None:
            texts = self.prompts.texts
            found["prompts"] = list(texts) if len(texts) <= _LISTED else {"count": len(texts), "hash": _hash(texts)}
            found["negative"] = request.negative
        return found


def load_networks(request: "Request", device: torch.device, load_own: Callable[[str], Snapshot]) -> DiffusersNetworks:
    """Load the networks of a request, of which at least one is of diffusers; `load_own` loads the others.

    Raises ValueError in one line if something does not exist, does not fit together, or is missing.
    """
    quieten()
    dtype = PRECISIONS[precision_of(request, device)]
    compiled = request.compile in ("on", "graphs")
    if compiled or request.vae is not None:
        given = "--compile" if compiled else "--vae"
        raise ValueError(f"{given} is for snapshots of this project; leave it out with networks of diffusers")
    loaded: dict[str, Loaded] = {}
    snapshots: dict[str, Snapshot] = {}
    identities: dict[str, Any] = {}
    for role, source in (("net", request.net), ("gnet", request.gnet), ("uncond", request.uncond)):
        if source is None:
            continue
        if not source.startswith(PREFIX):
            snapshots[role] = load_own(source)
            continue
        loaded[role] = load_diffusers(
            source,
            device,
            dtype,
            pixels=request.pixels if role == "net" else _pixels(snapshots["net"], loaded.get("net")),
            offload=request.offload,
            tiled=request.vae_tiling,
            main=loaded.get("net"),
        )
        snapshots[role] = _as_snapshot(loaded[role], role)
        identities[role] = _identity(loaded[role])
    if request.gnet_lora is not None:
        if "net" not in loaded:
            raise ValueError("--gnet-lora needs a main network of diffusers")
        loaded["gnet"] = with_lora(loaded["net"], request.gnet_lora, request.gnet_lora_scale)
        snapshots["gnet"] = _as_snapshot(loaded["gnet"], "gnet")
        identities["gnet"] = {"lora_sha256": _lora_hash(request.gnet_lora), "scale": request.gnet_lora_scale}
    prompts = _prompts(request, loaded, device, dtype)
    main_space = _space(snapshots["net"])
    denoisers: dict[str, Any] = {"net": snapshots["net"].net}
    for role in [role for role in snapshots if role != "net"]:
        denoisers[role] = in_space_of(snapshots[role].net, _space(snapshots[role]), main_space)
        # converted above, so from here on it counts as being in the main network's space
        snapshots[role] = dataclasses.replace(snapshots[role], encoder=snapshots["net"].encoder)
    return DiffusersNetworks(snapshots, loaded, denoisers, prompts, identities)


def quieten() -> None:
    """Turn off the progress bars and remarks of diffusers and transformers; for commands only."""
    diffusers = diffusers_package()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    try:
        import transformers
    except ImportError:
        return
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def precision_of(request: "Request", device: torch.device) -> str:
    """The precision of the networks: "auto" is bf16 on GPUs that compute in it, because some overflow in fp16."""
    if request.precision == "auto" and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return "bf16"
    return resolve_precision(request.precision, device)


def _pixels(main: Snapshot, loaded: Loaded | None) -> int:
    enlarges = 1 if loaded is None else loaded.net.pixels_per_latent
    if loaded is None and main.encoder.spec()["kind"] != "rgb":
        enlarges = 8
    return main.net.img_resolution * enlarges


def _space(snapshot: Snapshot) -> dict[str, Any]:
    return {key: value for key, value in snapshot.encoder.spec().items() if key != "vae_name"}


def _as_snapshot(loaded: Loaded, role: str) -> Snapshot:
    """The network with a header, made up from its configuration."""
    model = loaded.net.model
    names = loaded.repository.index.get("id2label")
    label_names = None
    if isinstance(names, Mapping) and len(names) == loaded.net.label_dim:
        full = [str(names[key]) for key in sorted(names, key=int)]
        short = [name.split(",")[0] for name in full]
        label_names = tuple(s if short.count(s) == 1 else f for s, f in zip(short, full, strict=True))
    header = Header(
        architecture={"class": type(model).__name__},
        encoder=loaded.encoder.spec(),
        nimg=0,
        ema_std=None,
        label_names=label_names,
        label_kind="text" if loaded.net.takes_text else "classes",
        # the table of classes has a row for none, and pipelines use the empty prompt: both were trained for guidance
        training_config={"label_dropout": loaded.net.family.takes != "nothing"},
        network="diffusers",
    )
    return Snapshot(cast(Any, loaded.net), loaded.encoder, header)


def _identity(loaded: Loaded) -> dict[str, Any]:
    folder = loaded.repository.folder
    parts = ("scheduler", loaded.repository.model_name) if loaded.repository.is_pipeline else ("",)
    prints = {part or "model": fingerprint(folder / part) for part in parts}
    return {"class": type(loaded.net.model).__name__, "contents": prints, "encoder": loaded.encoder.spec()}


def _lora_hash(lora: str) -> str:
    path = Path(lora)
    return sha256_of(path / "pytorch_lora_weights.safetensors" if path.is_dir() else path)


def _hash(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file: a JSON list of texts, or a text file with one prompt per line; empty lines are skipped.

    Raises ValueError if the file cannot be read, is not such a list, or holds no prompt.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        found = json.loads(text) if path.suffix.lower() == ".json" else text.splitlines()
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"--prompts {path}: cannot be read ({error})") from error
    if not isinstance(found, list) or not all(isinstance(prompt, str) for prompt in found):
        raise ValueError(f"--prompts {path}: expected a JSON list of texts")
    prompts = [prompt.strip() for prompt in found if prompt.strip()]
    if not prompts:
        raise ValueError(f"--prompts {path}: the file holds no prompts; write one per line")
    return prompts


def _prompts(
    request: "Request", loaded: Mapping[str, Loaded], device: torch.device, dtype: torch.dtype
) -> TextPrompts | None:
    """The prompts of a request, encoded for each network that takes text; None if the main network takes none."""
    given = request.prompt is not None or request.prompts is not None
    if "net" not in loaded or not loaded["net"].net.takes_text:
        if given or request.negative is not None:
            raise ValueError("--prompt, --prompts and --negative are for networks that take text; this one does not")
        return None
    if request.classes or request.labels is not None:  # --balanced, an empty text, means all prompts by turns
        raise ValueError("the network takes text; use --prompt or --prompts instead of --class and --labels")
    if not given:
        raise ValueError("the network takes text; give --prompt TEXT, or --prompts FILE with one prompt per line")
    texts = [] if request.prompt is None else [request.prompt]
    if request.prompts is not None:
        texts += read_prompts(Path(request.prompts))
    main = loaded["net"]
    encodings = {"net": encode_prompts(main.repository, texts, request.negative, device, dtype)}
    for role, other in loaded.items():
        repository = other.repository
        if role == "net" or not other.net.takes_text or not repository.is_pipeline or repository is main.repository:
            continue
        if prompt_encoder_identity(repository) != prompt_encoder_identity(main.repository):
            other.net.prompts_name = role
            encodings[role] = encode_prompts(repository, texts, request.negative, device, dtype)
    return TextPrompts(tuple(texts), encodings, torch.arange(len(texts)))
