"""Train a small classifier of noisy images, for generate.py --guidance-method classifier."""

from edm2kit.cli import help_pages

if __name__ == "__main__":
    help_pages.answer("classifier")  # before torch is imported

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from edm2kit.cli import click_types as cli
from edm2kit.cli.field_options import options_from
from edm2kit.data.batches import GlobalOrder, training_batches
from edm2kit.data.dataset import Source, open_source
from edm2kit.guidance.classifier.noise_classifier import (
    ClassifierHeader,
    NoiseClassifier,
    load_classifier,
    save_classifier,
)
from edm2kit.models.encoders import Encoder, make_encoder
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.rng import StackedGenerator, derive_seed

_LEVELS = (0.1, 0.3, 1.0, 3.0, 10.0)
_MAX_SETTING = 1 << 50
_NUM_EVALUATED = 512  # images at each noise level


def _setting(default: Any, option: str, metavar: str, help: str) -> Any:
    return field(default=default, metadata={"option": option, "metavar": metavar, "help": help})


@dataclass(frozen=True)
class ClassifierTraining:
    """How a classifier is trained; the header of its file records all of it.

    ln(sigma) ~ N(P_mean, P_std^2), wider than for denoisers, because guidance evaluates the classifier at every noise
    level of the sampler.
    """

    duration_nimg: int = _setting(2 << 20, "--duration", "NIMG", "Training duration in images")
    batch_size: int = _setting(256, "--batch", "NIMG", "Images per step")
    lr: float = _setting(1e-3, "--lr", "FLOAT", "Initial learning rate; falls to 0 linearly")
    P_mean: float = _setting(0.0, "--P_mean", "FLOAT", "Mean of ln(sigma) during training")
    P_std: float = _setting(1.5, "--P_std", "FLOAT", "Standard deviation of ln(sigma) during training")
    seed: int = _setting(0, "--seed", "N", "Random seed of the weights, the order and the noise")

    def __post_init__(self) -> None:
        for name in ("duration_nimg", "batch_size", "lr", "P_std"):
            if not 0 < getattr(self, name) < _MAX_SETTING:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a number above 0")
        if not abs(self.P_mean) < _MAX_SETTING:
            raise ValueError(f"P_mean is {self.P_mean}; expected a finite number")


@click.command(cls=cli.Command)
@click.option("--data", metavar="ZIP|DIR", required=True, help="Training images with labels, from dataset_tool.py")
@click.option(
    "--dest",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="File to write, .safetensors",
)
@cli.section(cli.OTHER, *options_from(ClassifierTraining))
@click.option("--width", metavar="N", type=int, default=32, help="Channels of the first level")
@click.option(
    "--levels", metavar="N", type=cli.AtLeast(int, 1, 16), default=3, help="Levels, each half as wide and high"
)
@click.option("--workers", metavar="N", type=cli.AtLeast(int, 0), default=0, help="Processes that read images")
@cli.device_option()
@cli.timeout_option()
@click.option("--overwrite", is_flag=True, help="Replace an existing file")
def main(
    data: str, dest: Path, width: int, levels: int, workers: int, device: str, overwrite: bool, **settings: Any
) -> None:
    """Train a classifier p(class | noisy image, noise level), in one process.

    \b
    python scripts/train_classifier.py --data img64.zip --dest classifier.safetensors
    python generate.py --net main.safetensors --guidance-method classifier \\
        --classifier-file classifier.safetensors --guidance 2 --outdir out
    """
    cli.check_output(dest, "safetensors file")
    if dest.exists() and not overwrite:
        raise ValueError(f"{dest} exists; choose another --dest, or use --overwrite to replace it")
    if dest.exists():
        load_classifier(dest)  # refuses a network, which is a safetensors file too
    training = ClassifierTraining(**cli.given_options(settings, list(settings)))
    with dist.session(device) as where:
        if dist.world_size() > 1:
            raise ValueError("a classifier is small; train it in one process, without torchrun")
        dataset = open_source(data)
        if dataset.condition_space.kind != "classes":
            raise ValueError(
                f"{data} has {dataset.condition_space}; a classifier needs class labels: add them with "
                "scripts/dataset_tool.py convert"
            )
        pixels = dataset.item_dtype == np.uint8
        architecture = {
            "img_resolution": dataset.resolution,
            "img_channels": dataset.num_channels if pixels else dataset.num_channels // 2,
            "num_classes": dataset.label_dim,
            "width": width,
            "levels": levels,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(training.seed, "classifier"))
            net = NoiseClassifier(**architecture)
        encoder = make_encoder({"kind": "rgb" if pixels else "vae"})
        train_(net.to(where), dataset, encoder, training, workers, where)
        for sigma, share in accuracies(net.eval(), dataset, encoder, training.seed, where):
            dist.print0(f"sigma {sigma:<5g} {share:6.1%} of training images correct")
        header = ClassifierHeader(architecture, training.duration_nimg, dataset.label_names, asdict(training))
        save_classifier(dest, net, header)


def train_(
    net: NoiseClassifier,
    dataset: Source,
    encoder: Encoder,
    training: ClassifierTraining,
    workers: int,
    device: torch.device,
) -> None:
    """Train `net` in place: Adam on the cross-entropy, with a learning rate that falls to 0 linearly.

    The noise of an image derives from the seed and its position in the global order. Raises ValueError if the loss is
    not finite.
    """
    optimizer = torch.optim.Adam(net.parameters(), lr=training.lr)
    order = GlobalOrder(len(dataset), training.seed)
    batches = training_batches(dataset, order, 0, training.batch_size, rank=0, world_size=1, workers=workers)
    seen, total, right = 0, 0.0, 0
    bar = None
    for raw, labels, positions in batches:
        if bar is None:  # after the reading processes have started
            bar = dist.progress_bar(training.duration_nimg)
        rng = StackedGenerator(device, [derive_seed(training.seed, "noise", int(p)) for p in positions])
        images, classes = encoder.encode(raw.to(device), rng), labels.to(device).argmax(dim=1)
        sigma = (rng.randn([len(images)]) * training.P_std + training.P_mean).exp()
        logits = net(images + sigma[:, None, None, None] * rng.randn_like(images), sigma)
        loss = torch.nn.functional.cross_entropy(logits, classes)
        if not loss.isfinite():
            raise ValueError(f"the loss is {loss.item()} after {seen} images; try a smaller --lr")
        optimizer.param_groups[0]["lr"] = training.lr * max(1 - seen / training.duration_nimg, 0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        seen, total = seen + len(images), total + loss.item()
        right += (logits.argmax(dim=1) == classes).sum().item()
        bar.set_postfix_str(f"loss {total * training.batch_size / seen:.3f}, {right / seen:.1%} correct", refresh=False)
        bar.update(len(images))
        if seen >= training.duration_nimg:
            break
    batches.close()
    if bar is not None:
        bar.close()
    mean = total * training.batch_size / seen
    known = f"{right / seen:.1%} correct, over all noise levels and all of the training"
    dist.print0(f"{seen} images: loss {mean:.3f}, {known}")


@torch.no_grad()
def accuracies(
    net: NoiseClassifier, dataset: Source, encoder: Encoder, seed: int, device: torch.device
) -> Iterator[tuple[float, float]]:
    """Yield (sigma, accuracy) at a few noise levels, on images spread over the data set."""
    picked = np.linspace(0, len(dataset) - 1, min(_NUM_EVALUATED, len(dataset))).astype(int)
    raw, labels = zip(*(dataset[int(index)] for index in picked), strict=True)
    rng = StackedGenerator(device, [derive_seed(seed, "judge", int(index)) for index in picked])
    images = encoder.encode(torch.from_numpy(np.stack(raw)).to(device), rng)
    classes = torch.from_numpy(np.stack(labels)).argmax(dim=1).to(device)
    for sigma in _LEVELS:
        logits = net(images + sigma * rng.randn_like(images), sigma)
        yield sigma, (logits.argmax(dim=1) == classes).float().mean().item()


if __name__ == "__main__":
    main()
