"""A request for images, and the engine that generates them.

request = ...                                   # from generation_options, or built by hand
generation = prepare(request, device)           # loads and checks the networks; ValueError in one line
for batch in generation.batches(seeds, 32):     # this rank's share, progress bar on rank 0
    batch.images                                # uint8 [N,C,H,W]; also .seeds, .classes, .latents
generation.settings                             # for the JSON record: everything that decides an image but its seed
"""

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from edm2kit.conditions import parse_classes
from edm2kit.data.labels import read_label_vectors
from edm2kit.guidance.base import Parts
from edm2kit.guidance.interval import guided_steps
from edm2kit.guidance.registry import NO_GUIDANCE, Choice, drops_condition, guide, methods_of, name_by_networks
from edm2kit.guidance.reuse import NO_REUSE
from edm2kit.models.compilation import COMPILE, compile_, compile_for_images_, graph_
from edm2kit.models.encoders import RGBEncoder, StabilityVAEEncoder, make_encoder
from edm2kit.models.networks import NETWORKS
from edm2kit.models.preconditioning import PRECISIONS, Preconditioner, resolve_precision, slow_precision
from edm2kit.models.vae import vae_sha256
from edm2kit.sampling.engine import Engine, ImageBatch, share_of_rank
from edm2kit.sampling.fitted_levels import with_fitted_levels
from edm2kit.sampling.solvers import PUBLISHED, Sampler
from edm2kit.snapshots.loading import Snapshot, Weights, load_snapshot, load_weights, local_file
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.files import plain_json, sha256_of


def _option(option: str, help: str, default: Any = None, **metadata: Any) -> Any:
    return field(default=default, metadata={"option": option, "help": help, **metadata})


@dataclass(frozen=True)
class Request:
    """What images to generate. The metadata of a field describes its command-line option.

    - `net`, `gnet`, `uncond`: snapshots (paths or URLs), run folders, or diffusers:FOLDER and diffusers:HUB_NAME.
    - `classes`: None for a random class from each seed; ALL_CLASSES, or a text such as "3,7" or "cat,dog", to cycle
      through classes by seed (seed modulo the number of classes).
    - `labels`: for a network trained on label vectors, a file of vectors to cycle through by seed: a .npy array [K, D]
      or a JSON list of lists.
    - `precision`: inside the networks, a key of PRECISIONS or "auto" (fp16 on a CUDA device, fp32 elsewhere).
    - `vae`: hub name or folder that replaces the VAE named in the snapshot.
    - `compile`: one of COMPILE. on: torch.compile the networks; graphs: CUDA graphs, for small batches; auto: compile
      on CUDA if that pays for the number of images, not on a CPU, where results repeat to the last bit.
    - `prompt`, `prompts`, `negative`, `gnet_lora`, `gnet_lora_scale`, `pixels`, `offload`, `vae_tiling`: for networks
      of diffusers only; see docs/any-model.md.
    """

    net: str = field(
        metadata={
            "option": "--net",
            "metavar": "PATH|URL",
            "help": "Snapshot, run folder, or model (--help-diffusers)",
        }
    )
    gnet: str | None = _option("--gnet", "Guide network: weaker, or unconditional (CFG)", metavar="PATH|URL")
    guidance: Choice = NO_GUIDANCE
    sampler: Sampler = PUBLISHED
    classes: str | None = _option(
        "--class", "Classes to cycle through by seed, such as 3,7-9 or cat", metavar="LIST", default_shown="random"
    )
    precision: str = _option(
        "--precision",
        "Inside the networks: fp32, fp16, bf16, or auto (fp16 on CUDA, else fp32)",
        "auto",
        metavar="NAME",
        choices=("auto", *PRECISIONS),
    )
    vae: str | None = _option(
        "--vae", "VAE that decodes latents", metavar="NAME|DIR", default_shown="as in the snapshot"
    )
    uncond: str | None = _option("--uncond", "Unconditional network beside --gnet, if needed", metavar="PATH|URL")
    compile: str = _option(
        "--compile",
        "torch.compile: on, off, auto (default), or graphs",
        "auto",
        default_shown="",
        metavar="MODE",
        choices=COMPILE,
        bare="on",
    )
    prompt: str | None = _option("--prompt", "Prompt, for a network that takes text", metavar="TEXT", hidden=True)
    prompts: str | None = _option(
        "--prompts", "Prompts, a text file with one per line or a JSON list", metavar="FILE", hidden=True
    )
    negative: str | None = _option(
        "--negative",
        "Prompt to lead away from in classifier-free guidance",
        metavar="TEXT",
        default_shown="none, as the pipeline encodes it",
        hidden=True,
    )
    gnet_lora: str | None = _option(
        "--gnet-lora", "Guide network: the main one with this LoRA", metavar="PATH", hidden=True
    )
    gnet_lora_scale: float = _option("--gnet-lora-scale", "Strength of that LoRA", 1.0, metavar="X", hidden=True)
    pixels: int | None = _option(
        "--pixels", "Height and width of images", metavar="N", min=1, default_shown="as trained", hidden=True
    )
    offload: str | None = _option(
        "--offload",
        "Keep the network in main memory and move parts to the GPU when needed: blocks, or layers (least memory)",
        metavar="PARTS",
        choices=("blocks", "layers"),
        hidden=True,
    )
    vae_tiling: bool = _option(
        "--vae-tiling", "Decode large images in tiles: less memory, blended seams", False, hidden=True
    )
    labels: str | None = _option(
        "--labels", "Label vectors to cycle through, .npy [K, D] or JSON, if the network takes vectors", metavar="FILE"
    )


@dataclass(frozen=True)
class Generation:
    """An engine that is ready; `settings` is JSON and holds everything that decides an image but its seed.

    `compilable` are the networks that `batches` may compile, if that pays for the images to generate.
    """

    engine: Engine
    settings: Mapping[str, Any]
    summary: str
    compilable: tuple[Preconditioner, ...] = ()

    def batches(self, seeds: Sequence[int], batch_size: int) -> Generator[ImageBatch]:
        """Yield the images of this rank's share of `seeds`, possibly none, with a progress bar on rank 0."""
        share = share_of_rank(seeds)
        engine = self.engine
        if self.compilable:
            steps = getattr(engine.sampler, "num_steps", 1)
            compiled = compile_for_images_(self.compilable, engine.shape, len(share), batch_size, steps, engine.device)
            engine = dataclasses.replace(engine, pad=compiled)
        with dist.progress_bar(len(share), hidden=not share) as bar:
            for batch in engine.batches(share, batch_size):
                yield batch
                bar.update(len(batch.seeds))


def prepare(
    request: Request,
    device: torch.device,
    labels_from_data: bool = False,
    loaded: Mapping[str, Snapshot] | None = None,
    networks: Any = None,
) -> Generation:
    """Load the networks of a request, check that they fit together, and combine them by guidance.

    With `labels_from_data`, only the denoiser is used, on labels from a data set: a network that takes label vectors
    then needs no `request.labels`. `loaded` holds networks that are in memory already, as from `load_for_sampling`, by
    the field of the request that they stand for; the text in that field then only names them. `networks` is the result
    of `diffusers_networks.load_networks` for this request, if there is one already.

    Raises ValueError if a file is not a snapshot, the networks do not fit each other, a class is unknown, or the
    guidance method refuses its settings.
    """
    if loaded is None:
        request = with_files(request)
    sources = {"net": request.net, "gnet": request.gnet, "uncond": request.uncond}
    of_diffusers = any(source is not None and source.startswith("diffusers:") for source in sources.values())
    precision = resolve_precision(request.precision, device)
    if of_diffusers:
        from edm2kit.cli.diffusers_networks import load_networks, precision_of

        precision = precision_of(request, device)
    slow = None if precision == "fp32" else slow_precision(PRECISIONS[precision], device)
    if slow:
        dist.warn0(f"--precision {precision}: {slow}")
    loaded, foreign = loaded or {}, networks
    if of_diffusers:
        if foreign is None:
            foreign = load_networks(request, device, lambda source: _load(source, device, precision, "off"))
        snapshots = dict(foreign.snapshots)
    else:
        _refuse_options_of_diffusers(request)
        snapshots = {}
        for name, source in sources.items():
            if source is not None:
                in_memory = loaded.get(name)
                snapshots[name] = in_memory or _load(source, device, precision, request.compile)
    main = snapshots["net"] = _with_vae(snapshots["net"], request.vae)
    classes, vectors = (None, None) if labels_from_data else _pick_labels(request, main)
    for name in ("gnet", "uncond"):
        if name in snapshots:
            check_pair(main, snapshots[name])
    nets: Mapping[str, Any] = {name: snapshot.net for name, snapshot in snapshots.items()}
    if foreign is not None:
        nets = foreign.denoisers
        request = dataclasses.replace(request, sampler=foreign.sampler(request.sampler, device))
    parts = Parts(**nets, pixels=None if isinstance(main.encoder, RGBEncoder) else main.encoder.pixels)
    request = dataclasses.replace(request, guidance=name_by_networks(request.guidance, parts))
    if drops_condition(request.guidance, parts) and not main.header.training_config.get("label_dropout"):
        dist.warn0(
            "according to its header, the network was not trained without labels (train.py --label-dropout); its "
            "answer without them may not be unconditional"
        )
    net = main.net
    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    _check_decoder(main, shape, device)
    denoiser = guide(request.guidance, parts)
    if foreign is not None:
        denoiser = foreign.limited(denoiser)
    engine = Engine(
        denoiser,
        main.encoder.decode,
        request.sampler,
        shape,
        net.label_dim,
        device,
        classes,
        vectors,
        pad=request.compile in ("on", "graphs"),
        empty_classes=main.header.classes_without_images,
        prompts=None if foreign is None else foreign.prompts,
        class_names=main.header.label_names,
    )
    if request.sampler.levels == "gits" and not labels_from_data:
        request = dataclasses.replace(request, sampler=dist.on_rank0(with_fitted_levels, engine, request.sampler))
        engine = dataclasses.replace(engine, sampler=request.sampler)
    settings = {
        **{name: None for name in ("net", "gnet", "uncond")},
        **{
            name: _identity(None if name in loaded else sources[name], snapshot, foreign, name)
            for name, snapshot in snapshots.items()
        },
        "guidance": _guidance_settings(request),
        "sampler": _settings_of_sampler(request.sampler),
        "classes": None if classes is None or vectors is not None else list(classes),
        "vae_sha256": vae_sha256(main.encoder.vae_name) if isinstance(main.encoder, StabilityVAEEncoder) else None,
        "precision": precision,
        "device": device.type,  # generators on another kind of device give other numbers
    }
    if engine.empty_classes and classes is None:
        settings["classes_left_out"] = list(engine.empty_classes)
    if request.labels is not None:
        settings["labels_sha256"] = sha256_of(request.labels)
    if foreign is not None:
        settings["diffusers"] = plain_json(foreign.settings(request))
    # a network in memory is replaced by another one soon
    stays = foreign is None and not loaded
    automatic = stays and request.compile == "auto" and device.type == "cuda" and not dist.repeats_bits(device)
    compilable = tuple(nets.values()) if automatic else ()
    return Generation(engine, settings, _summary(request, snapshots, classes, precision), compilable)


def with_files(request: Request) -> Request:
    """`request` with the newest snapshot of each run folder in its place; prints which. Raises as `prepare`."""
    sources = {"net": request.net, "gnet": request.gnet, "uncond": request.uncond}
    if not any(source is not None and Path(source).is_dir() for source in sources.values()):
        return request
    from edm2kit.snapshots.run_folder import newest_of_folders  # most requests name files

    found: dict[str, Any] = {**newest_of_folders(sources)}
    return dataclasses.replace(request, **found)


def load_for_sampling(weights: Weights, device: torch.device, precision: str) -> Snapshot:
    """A network in memory that is ready to generate; `precision` is a key of PRECISIONS."""
    snapshot = load_weights(weights, device, PRECISIONS[precision])
    return dataclasses.replace(snapshot, net=NETWORKS[snapshot.header.network].freeze_(snapshot.net))


def _refuse_options_of_diffusers(request: Request) -> None:
    fields = {field.name: field for field in dataclasses.fields(Request)}
    for name in ("prompt", "prompts", "negative", "gnet_lora", "pixels", "offload", "vae_tiling", "gnet_lora_scale"):
        if getattr(request, name) != fields[name].default:
            option = fields[name].metadata["option"]
            raise ValueError(f"{option} is for networks of diffusers (--net diffusers:...); leave it out")
    if request.sampler.levels == "own":
        raise ValueError("--levels own is for networks of diffusers; leave it out, or use --levels karras")


def _load(source: str, device: torch.device, precision: str, compile: str) -> Snapshot:
    snapshot = load_snapshot(source, device, PRECISIONS[precision])
    net = NETWORKS[snapshot.header.network].freeze_(snapshot.net)
    if compile == "on":
        net = compile_(net)
    elif compile == "graphs":
        net = graph_(net, device)
    return dataclasses.replace(snapshot, net=net)


def check_pair(main: Snapshot, guide_snapshot: Snapshot) -> None:
    """Raise ValueError if a guide network cannot guide the main one, with every reason."""
    net, other = main.net, guide_snapshot.net
    reasons = []
    for what, ours, theirs in (
        ("resolution", net.img_resolution, other.img_resolution),
        ("number of channels", net.img_channels, other.img_channels),
        ("encoder", _latent_space(main), _latent_space(guide_snapshot)),
    ):
        if ours != theirs:
            reasons.append(f"its {what} is {theirs}, the main network's {ours}")
    kinds = main.header.label_kind, guide_snapshot.header.label_kind
    if other.label_dim and kinds[0] != kinds[1]:
        reasons.append(f"its labels are {kinds[1]}, the main network's {kinds[0]}")
    elif kinds[0] != "text" and other.label_dim not in (0, net.label_dim):
        reasons.append(f"it has {other.label_dim} classes, the main network {net.label_dim}")
    names = main.header.label_names, guide_snapshot.header.label_names
    if None not in names and names[0] != names[1]:
        reasons.append("its classes have other names or another order")
    if reasons:
        raise ValueError(f"the guide network does not fit the main network: {'; '.join(reasons)}")


def _latent_space(snapshot: Snapshot) -> dict[str, Any]:
    # where the weights of the decoder are makes no difference to the latents
    return {key: value for key, value in snapshot.encoder.spec().items() if key != "vae_name"}


def _with_vae(snapshot: Snapshot, vae: str | None) -> Snapshot:
    if vae is None:
        return snapshot
    if not isinstance(snapshot.encoder, StabilityVAEEncoder):
        raise ValueError("the network generates pixels; leave out --vae")
    return dataclasses.replace(snapshot, encoder=make_encoder({**snapshot.encoder.spec(), "vae_name": vae}))


def _check_decoder(main: Snapshot, shape: tuple[int, int, int], device: torch.device) -> None:
    """Decode a first image before hours of work: this loads the decoder, and shows whether its output is a picture."""
    if main.header.network == "diffusers" and not isinstance(main.encoder, RGBEncoder):
        return  # loaded already, and always RGB
    pixels = main.encoder.decode(torch.zeros([1, *shape], device=device))
    if pixels.shape[1] not in (1, 3):
        raise ValueError(f"the network generates images of {pixels.shape[1]} channels; expected 1 (grey) or 3 (RGB)")


def _pick_labels(request: Request, main: Snapshot) -> tuple[Sequence[int] | None, torch.Tensor | None]:
    """The classes to cycle through, None for random ones; or the vectors, float32 [K, label_dim], and their numbers.

    Raises ValueError if the request does not suit the kind of labels that the network takes.
    """
    label_dim = main.net.label_dim
    if main.header.label_kind == "text":
        return None, None
    if main.header.label_kind != "vectors":
        if request.labels is not None:
            raise ValueError("--labels is for networks that take label vectors, and this one does not; use --class")
        empty = main.header.classes_without_images
        if request.classes is None:
            return None, None
        classes = parse_classes(request.classes, label_dim, main.header.label_names, empty)
        if classes is not None and (untrained := sorted(set(classes).intersection(empty))):
            dist.warn0(f"class {untrained[0]} had no image in training; what the network makes of it means nothing")
        return classes, None
    if request.classes is not None:
        raise ValueError("the network takes label vectors; use --labels FILE instead of --class and --balanced")
    if request.labels is None:
        raise ValueError(
            f"the network takes label vectors of {label_dim} numbers; give some with --labels FILE, a .npy array "
            f"[K, {label_dim}] or a JSON list of lists"
        )
    vectors = read_label_vectors(request.labels)
    if vectors.shape[1] != label_dim:
        raise ValueError(
            f"--labels {request.labels}: has vectors of {vectors.shape[1]} numbers, but the network takes {label_dim}"
        )
    return range(len(vectors)), torch.from_numpy(vectors)


def _identity(source: str | None, snapshot: Snapshot, foreign: Any, name: str) -> dict[str, Any]:
    """What identifies the weights of a network in records; `source` is None if they are not in a file."""
    if foreign is not None and name in foreign.identities:
        return plain_json(foreign.identities[name])
    header = dataclasses.asdict(snapshot.header)
    # without the training configuration, which is long, and the commit, which is the reader's own for published files
    known = {key: header[key] for key in ("architecture", "encoder", "nimg", "ema_std", "run_id", "recipe")}
    return plain_json({"sha256": None if source is None else sha256_of(local_file(source)), **known})


def _guidance_settings(request: Request) -> dict[str, Any]:
    """The guidance as records hold it; `steps` are the steps inside the interval, None without an interval."""
    settings = dict(vars(request.guidance))
    # records from before these settings existed lack them, and must stay equal
    for name, default in {"also": (), "rule": "linear", "schedule": "constant"}.items():
        if settings[name] == default:
            del settings[name]
    reuse = settings.pop("reuse")
    if reuse != NO_REUSE:
        settings["reuse"] = dataclasses.asdict(reuse)
    settings["steps"] = None
    if request.guidance.interval is not None:
        settings["steps"] = list(guided_steps(request.sampler.sigmas(), *request.guidance.interval))
        if not settings["steps"]:
            dist.warn0("the guidance interval contains no step of this schedule, so nothing is guided")
    return plain_json(settings)


def _settings_of_sampler(sampler: Sampler) -> dict[str, Any]:
    settings = dataclasses.asdict(sampler)
    if settings["levels"] == Sampler.levels:  # as above
        del settings["levels"]
    return plain_json(settings)


def _summary(request: Request, snapshots: Mapping[str, Snapshot], classes: Sequence[int] | None, precision: str) -> str:
    """What will be generated, in a few lines."""
    main = snapshots["net"]
    lines = [f"Network:  {request.net} ({_describe(main, precision)})"]
    if "gnet" in snapshots:
        guide_name = request.gnet or f"the same with the LoRA {request.gnet_lora}"
        lines.append(f"Guide:    {guide_name} ({_describe(snapshots['gnet'], precision)})")
    if request.guidance.method != "none":
        lines.append(f"Guidance: {_describe_guidance(request.guidance)}")
    lines.append(f"Sampler:  {request.sampler.num_steps} steps of {request.sampler.solver}")
    if request.labels is not None and classes is not None:
        lines.append(f"Labels:   cycling through {len(classes)} vectors of {request.labels}")
    elif classes is not None:
        names = main.header.label_names
        shown = [str(k) if names is None else f"{k} ({dist.one_line(names[k])})" for k in classes[:8]]
        if len(classes) > len(shown):
            shown.append("...")
        lines.append(f"Classes:  {', '.join(shown)}, by seed")
    return "\n".join(lines)


def _describe(snapshot: Snapshot, precision: str) -> str:
    net, header = snapshot.net, snapshot.header
    if header.network == "diffusers":
        takes = "text" if header.label_kind == "text" else f"{net.label_dim or 'no'} classes"
        kind, size = header.architecture["class"], f"{net.img_channels}x{net.img_resolution}x{net.img_resolution}"
        return f"{kind} of diffusers, {size}, {takes}, {precision}"
    size = f"{net.img_channels}x{net.img_resolution}x{net.img_resolution}"
    labels = f"{net.label_dim or 'no'} classes"
    if header.label_kind == "vectors":
        labels = f"label vectors of {net.label_dim} numbers"
    ema = "raw weights" if header.ema_std is None else f"EMA {header.ema_std:.3f}"
    return f"{size}, {labels}, {header.nimg / 1e6:.3g} million images, {ema}, {precision}"


def _describe_guidance(choice: Choice) -> str:
    text = " + ".join(f"{name}, weight {weight:g}" for name, weight in methods_of(choice).items())
    for word, default in ((choice.rule, "linear"), (choice.schedule, "constant")):
        if word != default:
            text += f", {word}"
    if choice.reuse != NO_REUSE:
        text += f", {choice.reuse}"
    if choice.interval is not None:
        text += " for sigma in ({:g}, {:g}]".format(*choice.interval)
    return text
