"""Figures of text-to-image networks: prompts by guidance weight and share of autoguidance, as one labelled sheet.

Karras et al. 2024 (autoguidance, arXiv 2406.02507), Figures 4 and 5: DeepFloyd IF XL guided by M, mixed with
classifier-free guidance. Only the first stage is guided; super-resolution is that of its own pipeline.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from edm2kit.cli.diffusers_networks import load_networks, read_prompts
from edm2kit.cli.generation import Request, prepare
from edm2kit.experiments.compare_guidance.sheet import Strip, draw_sheet
from edm2kit.experiments.documents import read_object
from edm2kit.guidance.records import settings_differences
from edm2kit.guidance.registry import Choice
from edm2kit.models.diffusers_pipeline import diffusers_package, dtype_option, open_repository
from edm2kit.models.encoders import to_image
from edm2kit.models.preconditioning import PRECISIONS
from edm2kit.sampling.solvers import Sampler
from edm2kit.torch_utils.dist import progress_bar
from edm2kit.torch_utils.files import atomic_write, plain_json, write_json

METHOD, SHARE = "cfg-plus-autoguidance", "cfg_plus_autoguidance_share"


@dataclass(frozen=True)
class Needed:
    """A download: its name on the hub, what it is for, parameters in billions, and whether it is optional."""

    name: str
    purpose: str
    billions: float
    is_optional: bool = False


@dataclass(frozen=True)
class Figure:
    """A published figure: networks, prompts and the grid of weights (rows) and shares of autoguidance (columns)."""

    title: str
    net: str
    gnet: str
    prompts: tuple[str, ...]
    weights: tuple[float, ...]
    shares: tuple[float, ...]
    needs: tuple[Needed, ...]


FIGURES: dict[str, Figure] = {
    "if-mix": Figure(
        "DeepFloyd IF: XL guided by M, mixed with classifier-free guidance (Karras et al. 2024, Figures 4 and 5)",
        "diffusers:DeepFloyd/IF-I-XL-v1.0",
        "diffusers:DeepFloyd/IF-I-M-v1.0",
        ("A blue jay standing on a large basket of rainbow macarons",),
        (1.0, 2.0, 3.0, 4.0),
        (0.0, 0.25, 0.5, 0.75, 1.0),
        (
            Needed("DeepFloyd/IF-I-XL-v1.0", "main network, 64x64 pixels", 4.3),
            Needed("DeepFloyd/IF-I-XL-v1.0", "text encoder (T5-XXL), only while prompts are encoded", 4.7),
            Needed("DeepFloyd/IF-I-M-v1.0", "guide network", 0.4),
            Needed("DeepFloyd/IF-II-L-v1.0", "super-resolution to 256x256 pixels", 1.2, is_optional=True),
        ),
    ),
}


def plan_lines(figure: Figure, num_prompts: int, num_seeds: int, num_steps: int) -> list[str]:
    """What a figure takes: downloads, memory at 2 bytes per parameter, and evaluations; nothing is downloaded."""
    lines = [figure.title, ""]
    for need in figure.needs:
        size = 2 * need.billions
        optional = "; with --super-resolution only" if need.is_optional else ""
        lines.append(f"{need.name}: {need.purpose}; {need.billions:g} B parameters, {size:.1f} GB in bf16{optional}")
        lines.append(f"  https://huggingface.co/{need.name} (gated: accept the licence, then `hf auth login`)")
    guided = sum(weight != 1 for weight in figure.weights)
    main = guide = 0
    for share in figure.shares:
        main += guided * (1 if share == 1 else 2)
        guide += guided * (0 if share == 0 else 1)
    main += len(figure.weights) - guided  # at weight 1 all columns are the same image
    images = num_prompts * num_seeds
    largest = max(need.billions for need in figure.needs)
    lines += [
        "",
        f"{images} x {len(figure.weights)} x {len(figure.shares)} images of {num_steps} steps:",
        f"  {main * images * num_steps} evaluations of the main network, {guide * images * num_steps} of the guide",
        f"GPU memory: about {2 * largest + 3:.0f} GB at a time (the largest part, and 3 GB for activations); less with "
        "--offload",
        "Time: evaluations times that of one on your GPU; generate.py shows images per second. Not measured here.",
    ]
    return lines


def make_figure(
    figure: Figure,
    outdir: Path,
    device: torch.device,
    seeds: Sequence[int],
    num_steps: int = 50,
    precision: str = "auto",
    offload: str | None = None,
    super_resolution: str | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Generate every image of the grid that `outdir` lacks, and write sheet.png there; returns its path.

    Images are in base/, and in large/ with `super_resolution`, a pipeline of diffusers that takes images and prompt
    embeddings. Raises ValueError if `outdir` holds images of other settings, and as `load_networks`.
    """
    request = Request(
        figure.net,
        figure.gnet,
        guidance=Choice(METHOD, 2.0, options={SHARE: 0.5}),
        sampler=Sampler(num_steps, solver="euler", levels="own"),
        prompts=str(_written_prompts(outdir, figure.prompts)),
        precision=precision,
        offload=offload,
    )
    networks = load_networks(request, device, _no_snapshots)
    prompts = networks.prompts
    if prompts is None:
        raise ValueError(f"{figure.net} takes no text, so it cannot make this figure")
    settings = {**dataclasses.asdict(figure), "steps": num_steps, "identities": networks.identities}
    _claim(outdir / "figure.json", settings)
    upscale = None
    if super_resolution is not None:
        upscale = _upscaler(super_resolution, prompts.encodings["net"], device, request.precision)

    def image_of(k: int, weight: float, share: float, seed: int) -> Image.Image:
        path = outdir / "base" / f"prompt{k:03d}-w{weight:g}-share{share:g}-{seed:06d}.png"
        if not path.exists():
            choice = Choice(METHOD, weight, options={SHARE: share})
            generation = prepare(dataclasses.replace(request, guidance=choice), device, networks=networks)
            engine = dataclasses.replace(generation.engine, classes=[k])
            _write(path, to_image(engine.generate([seed]).images[0].cpu().numpy()))
            say(f"Wrote {path}")
        if upscale is None:
            return Image.open(path)
        large = outdir / "large" / path.name
        if not large.exists():
            _write(large, upscale(Image.open(path), k, seed))
            say(f"Wrote {large}")
        return Image.open(large)

    lines = []
    total = len(figure.prompts) * len(figure.weights) * len(figure.shares) * len(seeds)
    with progress_bar(total, what=figure.net) as bar:
        for k, prompt in enumerate(figure.prompts):
            for weight in figure.weights:
                strips = []
                for share in figure.shares:
                    known = share if weight != 1 else figure.shares[0]  # off, so all shares are one image
                    images = []
                    for seed in seeds:
                        images.append(image_of(k, weight, known, seed))
                        bar.update()
                    strips.append(Strip(f"share {share:g}", images))
                lines.append((f"w = {weight:g}\n{prompt}", strips))
    sheet = outdir / "sheet.png"
    _write(sheet, draw_sheet(lines))
    return sheet


def figure_with(
    name: str,
    *,
    net: str | None = None,
    gnet: str | None = None,
    prompts: Path | None = None,
    weights: Sequence[float] | None = None,
    shares: Sequence[float] | None = None,
) -> Figure:
    """The figure `name` with parts replaced. Raises ValueError for an unknown name and impossible shares."""
    if name not in FIGURES:
        raise ValueError(f"figure {name!r} is unknown; available: {', '.join(FIGURES)}")
    changes: dict[str, Any] = {"net": net, "gnet": gnet, "weights": weights, "shares": shares}
    changes["prompts"] = None if prompts is None else tuple(read_prompts(prompts))
    figure = dataclasses.replace(FIGURES[name], **{key: value for key, value in changes.items() if value is not None})
    if not all(0 <= share <= 1 for share in figure.shares):
        raise ValueError(f"shares of autoguidance are from 0 to 1; got {', '.join(f'{s:g}' for s in figure.shares)}")
    return figure


def _no_snapshots(source: str) -> Any:
    raise ValueError(f"{source} is not a network of diffusers; give diffusers:FOLDER or diffusers:org/name")


def _written_prompts(outdir: Path, prompts: Sequence[str]) -> Path:
    path = outdir / "prompts.txt"
    with atomic_write(path, "w") as file:
        file.write("\n".join(prompts) + "\n")
    return path


def _claim(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings of the images in a folder, or raise ValueError if it has others."""
    wanted = plain_json(settings)
    # another grid or other prompts may share a folder: file names tell their images apart, prompts apart
    for key in ("weights", "shares", "title", "needs"):
        wanted.pop(key)
    if path.exists():
        found = read_object(path)
        reasons = settings_differences(found, wanted)
        if reasons:
            raise ValueError(f"{path.parent} holds images of other settings ({'; '.join(reasons[:3])}); use another")
    write_json(path, wanted)


def _write(path: Path, image: Image.Image) -> None:
    with atomic_write(path) as file:
        image.save(file, "PNG")


def _upscaler(
    source: str, encoded: Any, device: torch.device, precision: str
) -> Callable[[Image.Image, int, int], Image.Image]:
    """(image, number of its prompt, seed) -> larger image, by a pipeline that has its own classifier-free guidance."""
    dtype = PRECISIONS.get(precision, torch.float32 if device.type == "cpu" else torch.float16)
    repository = open_repository(source, dtype)
    kind = getattr(diffusers_package(), str(repository.index.get("_class_name")), None)
    if kind is None or "SuperResolution" not in kind.__name__:
        raise ValueError(f"{source} is not a pipeline for super-resolution, such as DeepFloyd/IF-II-L-v1.0")
    left_out = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "watermarker")
    pipe = kind.from_pretrained(
        str(repository.folder), local_files_only=True, use_safetensors=True, **dtype_option(dtype),
        **dict.fromkeys(left_out),
    )  # fmt: skip
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    embeddings = encoded["prompt_embeds"].to(device, dtype)

    def upscale(image: Image.Image, prompt: int, seed: int) -> Image.Image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].to(device, dtype) / 127.5 - 1
        found = pipe(
            image=pixels,
            prompt_embeds=embeddings[prompt : prompt + 1],
            negative_prompt_embeds=embeddings[-1:],
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="pil",
        )
        return found.images[0]

    return upscale
