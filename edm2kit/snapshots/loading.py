"""Opening a snapshot of any format, by path or URL: as a network, or as weights that are read on demand."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from edm2kit.models.encoders import Encoder, make_encoder
from edm2kit.models.preconditioning import Preconditioner
from edm2kit.snapshots.file_format import Header, check_weights, network_on_meta, read_header, tensor_layout
from edm2kit.snapshots.published import is_published_pickle, read_published
from edm2kit.snapshots.weights import TensorInFile, WeightReader, Weights
from edm2kit.torch_utils.files import fetch

_SUFFIXES = (".safetensors", ".pkl")


@dataclass(frozen=True)
class Snapshot:
    """A network ready to evaluate, its encoder, and its header."""

    net: Preconditioner
    encoder: Encoder
    header: Header


def load_snapshot(
    path_or_url: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Snapshot:
    """Load a network for evaluation: in eval mode, without gradients, float32 weights, `dtype` inside the network.

    Accepts snapshots of this project and NVIDIA's published pickles (read without executing them), as paths or URLs.
    Raises ValueError with the reason if the file is missing, damaged, or does not fit its own header.

    Example: `net = load_snapshot("network-snapshot-0134217-0.100.safetensors", "cuda", torch.float16).net`.
    """
    weights = open_weights(path_or_url)
    source = weights.path or weights.name
    net = network_on_meta(weights.header, source)
    check_weights(source, net, weights.tensors)
    state = {}
    with WeightReader(weights) as reader:
        for name, tensor in weights.tensors.items():
            values = reader.read(name, 0, tensor.shape.numel())
            state[name] = values.reshape(tensor.shape).to(device, torch.float32)
    net.load_state_dict(state, assign=True)
    net.compute_dtype = dtype
    return Snapshot(net.eval().requires_grad_(False), make_encoder(weights.header.encoder), weights.header)


def open_weights(path_or_url: str | Path) -> Weights:
    """The header and the tensors of a snapshot, without reading weights.

    Accepts the same files as `load_snapshot`. Raises ValueError if the file is missing or damaged.
    """
    path = fetch(path_or_url)
    if path.is_file() and is_published_pickle(path):
        header, stored = read_published(path)
        tensors: dict[str, TensorInFile | torch.Tensor] = {}
        for name, tensor in stored.items():
            if tensor.position is None:  # strides scatter its values over the file
                tensors[name] = tensor.read()
            else:
                tensors[name] = TensorInFile(tensor.position, tensor.dtype, torch.Size(tensor.shape))
        return Weights(path.name, header, tensors, path)
    header = read_header(path)  # also refuses files that are too short or too long
    return Weights(path.name, header, {name: TensorInFile(*where) for name, where in tensor_layout(path).items()}, path)


def open_sources(sources: Sequence[str | Path], prefix: str = "", stds: Iterable[float] | None = None) -> list[Weights]:
    """The training snapshots in folders, and at single paths and URLs, sorted by training time and EMA length.

    `prefix` selects file names that start with it; `stds` selects EMA lengths, None for all. Rebuilt EMAs in a folder
    are left out. Raises ValueError for a file that is not a snapshot, and if nothing is found.
    """
    where = ", ".join(map(str, sources))
    found: list[Weights] = []
    for source in sources:
        if "://" not in str(source) and Path(source).is_dir():
            files = (path for path in Path(source).iterdir() if path.suffix in _SUFFIXES and path.is_file())
            opened = [open_weights(path) for path in sorted(files) if path.name.startswith(prefix)]
            found += [weights for weights in opened if weights.header.recipe is None]
        else:
            weights = open_weights(source)
            if weights.name.startswith(prefix):
                found.append(weights)
    if not found:
        condition = f" with names that start with {prefix!r}" if prefix else ""
        raise ValueError(f"found no training snapshots{condition} in {where}")
    if stds is not None:
        wanted = set(stds)
        available = {weights.header.ema_std for weights in found}
        if missing := wanted - available:
            lengths = ", ".join(str(std) for std in sorted(std for std in available if std is not None))
            raise ValueError(f"no snapshot in {where} has the EMA length {min(missing)}; available: {lengths}")
        found = [weights for weights in found if weights.header.ema_std in wanted]
    return sorted(found, key=lambda weights: (weights.header.nimg, weights.header.ema_std or 0))
