"""A request for images, and the engine that fulfils it.

request = ...                                   # from generation_options, or built by hand
generation = prepare(request, device)           # loads, checks, guides; ValueError in one line
for batch in generation.batches(seeds, 32):     # this rank's share, progress bar on rank 0
    batch.images                                # uint8 [N,C,H,W]; also .seeds, .classes, .latents
generation.settings                             # for the JSON record: all that decides an image but its seed
"""

import dataclasses
import difflib
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from edm2kit.data.labels import read_label_vectors
from edm2kit.guidance.base import Parts
from edm2kit.guidance.interval import guided_steps
from edm2kit.guidance.registry import NO_GUIDANCE, Choice, drops_condition, guide, methods_of, name_by_networks
from edm2kit.models.encoders import RGBEncoder, StabilityVAEEncoder, make_encoder
from edm2kit.models.frozen import compile_
from edm2kit.models.networks import NETWORKS
from edm2kit.models.vae import vae_sha256
from edm2kit.sampling.engine import Engine, ImageBatch, share_of_rank
from edm2kit.sampling.solvers import PUBLISHED, Sampler
from edm2kit.snapshots.loading import Snapshot, load_snapshot
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.dist import progress_bar
from edm2kit.torch_utils.files import fetch, sha256_of
from edm2kit.torch_utils.precision import PRECISIONS, resolve_precision, slow_precision
from edm2kit.torch_utils.records import plain_json

ALL_CLASSES = ""  # the value of Request.classes that stands for all classes of the network


@dataclass(frozen=True)
class Request:
    """What images to generate. The metadata of a field describes its command-line option.

    - `net`, `gnet`, `uncond`: paths or URLs of snapshots.
    - `classes`: None for a random class from each seed; ALL_CLASSES, or a text such as "3,7" or "cat,dog", to cycle
      through classes by seed (seed modulo the number of classes).
    - `labels`: for a network trained on label vectors, a file of vectors to cycle through by seed: a .npy array [K, D]
      or a JSON list of lists.
    - `precision`: inside the networks, a key of PRECISIONS or "auto" (fp16 on a CUDA device, fp32 elsewhere).
    - `vae`: hub name or folder that replaces the VAE named in the snapshot.
    - `compiled`: compile the networks with torch.compile.
    """

    net: str = field(metadata={"option": "--net", "metavar": "PATH|URL", "help": "Network snapshot"})
    gnet: str | None = field(
        default=None,
        metadata={"option": "--gnet", "metavar": "PATH|URL", "help": "Guide network: weaker, or unconditional (CFG)"},
    )
    guidance: Choice = NO_GUIDANCE
    sampler: Sampler = PUBLISHED
    classes: str | None = field(
        default=None,
        metadata={
            "option": "--class",
            "metavar": "LIST",
            "help": "Classes to cycle through by seed, such as 3,7-9 or cat",
            "default": "random",
        },
    )
    precision: str = field(
        default="auto",
        metadata={
            "option": "--precision",
            "metavar": "NAME",
            "choices": ("auto", *PRECISIONS),
            "help": "Inside the networks: fp32, fp16, bf16, or auto (fp16 on CUDA, else fp32)",
        },
    )
    vae: str | None = field(
        default=None,
        metadata={
            "option": "--vae",
            "metavar": "NAME|DIR",
            "help": "VAE that decodes latents",
            "default": "as in the snapshot",
        },
    )
    uncond: str | None = field(
        default=None,
        metadata={
            "option": "--uncond",
            "metavar": "PATH|URL",
            "help": "Unconditional network beside --gnet, if a method takes both",
        },
    )
    compiled: bool = field(
        default=False,
        metadata={
            "option": "--compile",
            "help": "torch.compile the networks; pays off for thousands of images",
        },
    )
    labels: str | None = field(
        default=None,
        metadata={
            "option": "--labels",
            "metavar": "FILE",
            "help": "Label vectors to cycle through by seed: .npy [K, D] or JSON, if the network takes vectors",
        },
    )


@dataclass(frozen=True)
class Generation:
    """A request made ready: `settings` is JSON and holds everything that decides an image but its seed."""

    engine: Engine
    settings: Mapping[str, Any]
    summary: str

    def batches(self, seeds: Sequence[int], batch_size: int) -> Generator[ImageBatch]:
        """The images of this rank's share of `seeds`, possibly none, with a progress bar on rank 0."""
        share = share_of_rank(seeds)
        with progress_bar(len(share), hidden=not share) as bar:
            for batch in self.engine.batches(share, batch_size):
                yield batch
                bar.update(len(batch.seeds))


def prepare(request: Request, device: torch.device, labels_from_data: bool = False) -> Generation:
    """Load the networks of a request and pair them.

    With `labels_from_data`, only the denoiser is used, on labels from a data set: a network that takes label vectors
    then needs no `request.labels`.

    Raises ValueError where a file is no snapshot, the two networks do not fit each other, a class is unknown, or the
    guidance method refuses its settings.
    """
    precision = resolve_precision(request.precision, device)
    if slow := slow_precision(PRECISIONS[precision], device):
        dist.warn0(f"--precision {precision}: {slow}")
    main = _with_vae(_load(request, request.net, device, precision), request.vae)
    net = main.net
    classes, vectors = (None, None) if labels_from_data else _pick_labels(request, main)
    gmain = None if request.gnet is None else _load(request, request.gnet, device, precision)
    umain = None if request.uncond is None else _load(request, request.uncond, device, precision)
    for other in (gmain, umain):
        if other is not None:
            check_pair(main, other)
    pixels = None if isinstance(main.encoder, RGBEncoder) else main.encoder.pixels
    parts = Parts(net, None if gmain is None else gmain.net, None if umain is None else umain.net, pixels)
    request = dataclasses.replace(request, guidance=name_by_networks(request.guidance, parts))
    if drops_condition(request.guidance, parts) and not main.header.training_config.get("label_dropout"):
        dist.warn0(
            "according to its header, the network was not trained without labels (train.py --label-dropout); its "
            "answer without them may not be unconditional"
        )
    denoiser = guide(request.guidance, parts)
    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    _check_pixels(main.encoder.decode(torch.zeros([1, *shape], device=device)))
    engine = Engine(denoiser, main.encoder.decode, request.sampler, shape, net.label_dim, device, classes, vectors)
    settings = {
        "net": _identity(request.net, main),
        "gnet": None if gmain is None else _identity(request.gnet, gmain),
        "uncond": None if umain is None else _identity(request.uncond, umain),
        "guidance": {**_settings_of(request.guidance), "steps": plain_json(_steps(request))},
        "sampler": plain_json(dataclasses.asdict(request.sampler)),
        "classes": None if classes is None or vectors is not None else list(classes),
        "vae_sha256": vae_sha256(main.encoder.vae_name) if isinstance(main.encoder, StabilityVAEEncoder) else None,
        "precision": precision,
        "device": device.type,  # generators on another kind of device give other numbers
    }
    if request.labels is not None:
        settings["labels_sha256"] = sha256_of(request.labels)
    return Generation(engine, settings, _summary(request, main, gmain, classes, precision))


def _load(request: Request, source: str, device: torch.device, precision: str) -> Snapshot:
    snapshot = load_snapshot(source, device, PRECISIONS[precision])
    net = NETWORKS[snapshot.header.network].freeze_(snapshot.net)
    return dataclasses.replace(snapshot, net=compile_(net) if request.compiled else net)


def check_pair(main: Snapshot, gmain: Snapshot) -> None:
    """Raise ValueError where a guide network cannot guide the main one, naming each reason."""
    reasons = [
        f"its {what} is {theirs}, the main network's {ours}"
        for what, ours, theirs in (
            ("resolution", main.net.img_resolution, gmain.net.img_resolution),
            ("number of channels", main.net.img_channels, gmain.net.img_channels),
            ("encoder", _latent_space(main), _latent_space(gmain)),
        )
        if ours != theirs
    ]
    if gmain.net.label_dim and gmain.header.label_kind != main.header.label_kind:
        reasons.append(f"its labels are {gmain.header.label_kind}, the main network's {main.header.label_kind}")
    elif gmain.net.label_dim not in (0, main.net.label_dim):
        reasons.append(f"it has {gmain.net.label_dim} classes, the main network {main.net.label_dim}")
    names = [main.header.label_names, gmain.header.label_names]
    if None not in names and names[0] != names[1]:
        reasons.append("its classes have other names, or stand in another order")
    if reasons:
        raise ValueError(f"the guide network does not fit the main network: {'; '.join(reasons)}")


def _with_vae(snapshot: Snapshot, vae: str | None) -> Snapshot:
    if vae is None:
        return snapshot
    if not isinstance(snapshot.encoder, StabilityVAEEncoder):
        raise ValueError("the network draws pixels; leave out --vae")
    return dataclasses.replace(snapshot, encoder=make_encoder({**snapshot.encoder.spec(), "vae_name": vae}))


def _check_pixels(pixels: torch.Tensor) -> None:
    """A first image, before hours of work: loads the decoder, and shows whether there is a picture at all."""
    if pixels.shape[1] not in (1, 3):
        raise ValueError(f"the network draws images of {pixels.shape[1]} channels; expected 1 (grey) or 3 (RGB)")


def _pick_labels(request: Request, main: Snapshot) -> tuple[Sequence[int] | None, torch.Tensor | None]:
    """The classes to cycle through, None for random ones; or the vectors, float32 [K, label_dim], and their numbers.

    Raises ValueError if the request does not suit the kind of labels that the network takes.
    """
    label_dim = main.net.label_dim
    if main.header.label_kind != "vectors":
        if request.labels is not None:
            raise ValueError("--labels is for networks that take label vectors, and this one does not; use --class")
        return parse_classes(request.classes, label_dim, main.header.label_names), None
    if request.classes is not None:
        raise ValueError("the network takes label vectors, not classes; use --labels FILE instead of --class")
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


def parse_classes(text: str | None, label_dim: int, names: Sequence[str] | None) -> tuple[int, ...] | None:
    """Class indices from numbers, ranges and names separated by commas; "" means all classes, None none in particular.

    Raises ValueError on a network without classes, an index out of range, and an unknown name, with the nearest one.
    """
    if text is None:
        return None
    if label_dim == 0:
        raise ValueError("the network has no classes; leave out --class and --balanced")
    if text == ALL_CLASSES:
        return tuple(range(label_dim))
    if names is not None and text in names:  # a name may itself hold a comma
        return (names.index(text),)
    return tuple(index for part in text.split(",") for index in _parse_class(part.strip(), label_dim, names))


def _parse_class(part: str, label_dim: int, names: Sequence[str] | None) -> Sequence[int]:
    numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
    if numbers is None:
        if names is None:
            raise ValueError(f"class {part!r}: the snapshot names no classes; use numbers from 0 to {label_dim - 1}")
        if part not in names:
            near = difflib.get_close_matches(part, names, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names[:8])}, ..."
            raise ValueError(f"class {part!r} is unknown; {hint}")
        return [names.index(part)]
    first, last = int(numbers[1]), int(numbers[2] or numbers[1])
    if not first <= last < label_dim:
        raise ValueError(f"class {part} is out of range; the network has classes 0 to {label_dim - 1}")
    return range(first, last + 1)


def _identity(source: str, snapshot: Snapshot) -> dict[str, Any]:
    header = dataclasses.asdict(snapshot.header)
    # neither the training configuration, which is long, nor the commit: of a published file it is the reader's own
    known = {key: header[key] for key in ("architecture", "encoder", "nimg", "ema_std", "run_id", "recipe")}
    return plain_json({"sha256": sha256_of(fetch(source)), **known})


def _latent_space(snapshot: Snapshot) -> dict[str, Any]:
    # where the decoder's weights lie says nothing about the latents
    return {key: value for key, value in snapshot.encoder.spec().items() if key != "vae_name"}


def _settings_of(choice: Choice) -> dict[str, Any]:
    # what is left as it was before it could be set is left out, so that older records stay true
    later = {"also": (), "rule": "linear", "schedule": "constant"}
    return plain_json({key: value for key, value in vars(choice).items() if key not in later or value != later[key]})


def _steps(request: Request) -> list[int] | None:
    if request.guidance.interval is None:
        return None
    steps = guided_steps(request.sampler.sigmas(), *request.guidance.interval)
    if not steps:
        dist.warn0("the guidance interval holds no step of this schedule: nothing is guided")
    return list(steps)


def _summary(
    request: Request, main: Snapshot, gmain: Snapshot | None, classes: Sequence[int] | None, precision: str
) -> str:
    def words(snapshot: Snapshot) -> str:
        net, header = snapshot.net, snapshot.header
        size = f"{net.img_channels}x{net.img_resolution}x{net.img_resolution}"
        ema = "raw weights" if header.ema_std is None else f"EMA {header.ema_std:.3f}"
        labels = f"{net.label_dim or 'no'} classes"
        if header.label_kind == "vectors":
            labels = f"label vectors of {net.label_dim} numbers"
        return f"{size}, {labels}, {header.nimg / 1e6:.3g} million images, {ema}, {precision}"

    choice, lines = request.guidance, [f"Network:  {request.net} ({words(main)})"]
    if gmain is not None:
        lines.append(f"Guide:    {request.gnet} ({words(gmain)})")
    if choice.method != "none":
        where = "" if choice.interval is None else " for sigma in ({:g}, {:g}]".format(*choice.interval)
        methods = " + ".join(f"{name}, weight {weight:g}" for name, weight in methods_of(choice).items())
        kind = "".join(f", {word}" for word in (choice.rule, choice.schedule) if word not in ("linear", "constant"))
        lines.append(f"Guidance: {methods}{kind}{where}")
    lines.append(f"Sampler:  {request.sampler.num_steps} steps of {request.sampler.solver}")
    if request.labels is not None and classes is not None:
        lines.append(f"Labels:   {len(classes)} vectors of {request.labels}, in turn")
    elif classes is not None:
        names = main.header.label_names
        shown = [str(k) if names is None else f"{k} ({names[k]})" for k in classes[:8]]
        lines.append(f"Classes:  {', '.join(shown)}{', ...' if len(classes) > 8 else ''}, in turn")
    return "\n".join(lines)
