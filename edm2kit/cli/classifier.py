"""Train a small classifier of noisy images, for generate.py --guidance-method classifier."""

from edm2kit.cli import help_pages

if __name__ == "__main__":
    help_pages.answer("classifier")  # before torch is imported

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from edm2kit.cli import click_types as cli
from edm2kit.cli.field_options import options_from
from edm2kit.data.batches import GlobalOrder, MicroBatch, next_step, training_batches
from edm2kit.data.dataset import Source, open_source
from edm2kit.ema.power_function import PowerFunctionEMA
from edm2kit.guidance.classifier.noise_classifier import (
    ClassifierHeader,
    NoiseClassifier,
    load_classifier,
    save_classifier,
)
from edm2kit.models.encoders import Encoder, make_encoder
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.files import LOCK_NAME, exclusive
from edm2kit.torch_utils.rng import StackedGenerator, derive_seed
from edm2kit.training.checkpoint import (
    check_finite,
    checkpoint_state,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    read_run_id,
    save_checkpoint,
    usable_checkpoint,
)
from edm2kit.training.run import StopRequest
from edm2kit.training.stop import stopped_exit_code

_LEVELS = (0.1, 0.3, 1.0, 3.0, 10.0)
_MAX_SETTING = 1 << 50
_NUM_EVALUATED = 512  # images at each noise level
_KEPT_CHECKPOINTS = 2


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


@dataclass(frozen=True)
class Saving:
    """How often the state of a training is saved; it has no influence on the classifier."""

    checkpoint_every_nimg: int = _setting(1 << 17, "--checkpoint", "NIMG", "Images between checkpoints; 0: none")


@click.command(cls=cli.Command)
@click.option("--data", metavar="ZIP|DIR", required=True, help="Training images with labels, from dataset_tool.py")
@click.option(
    "--dest",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="File to write, .safetensors",
)
@cli.section(cli.OTHER, *options_from(ClassifierTraining), *options_from(Saving))
@click.option("--width", metavar="N", type=int, default=32, help="Channels of the first level")
@click.option(
    "--levels", metavar="N", type=cli.AtLeast(int, 1, 16), default=3, help="Levels, each half as wide and high"
)
@click.option("--workers", metavar="N", type=cli.AtLeast(int, 0), default=0, help="Processes that read images")
@cli.device_option()
@cli.timeout_option()
@click.option("--overwrite", is_flag=True, help="Replace an existing file")
def main(
    data: str,
    dest: Path,
    checkpoint_every_nimg: int | None,
    width: int,
    levels: int,
    workers: int,
    device: str,
    overwrite: bool,
    **settings: Any,
) -> None:
    """Train a classifier p(class | noisy image, noise level), in one process.

    \b
    python scripts/train_classifier.py --data img64.zip --dest classifier.safetensors
    python generate.py --net main.safetensors --guidance-method classifier \\
        --classifier-file classifier.safetensors --guidance 2 --outdir out

    Checkpoints are in DEST.partial until the classifier is complete; run the same command again to resume. A signal
    (SIGTERM, SIGUSR1, Ctrl-C) saves and stops, with exit code 75.
    """
    cli.check_output(dest, "safetensors file")
    folder = dest.with_name(f"{dest.name}.partial")
    if dest.exists() and not overwrite:
        left = f"; {folder} has checkpoints of a training that would replace it" if list_checkpoints(folder) else ""
        raise ValueError(f"{dest} exists{left}; choose another --dest, or use --overwrite to replace it")
    if dest.exists():
        load_classifier(dest)  # refuses a network, which is a safetensors file too
    training = ClassifierTraining(**cli.given_options(settings, list(settings)))
    saving = Saving() if checkpoint_every_nimg is None else Saving(checkpoint_every_nimg)
    stop = StopRequest()
    with dist.session(device) as where, stop:
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
        header = ClassifierHeader(architecture, training.duration_nimg, dataset.label_names, asdict(training))
        with unfinished(folder):
            trainer = ClassifierTrainer(net.to(where), encoder, training, where, folder, run_id(header, dataset))
            if not trainer.train(dataset, workers, saving.checkpoint_every_nimg, stop):
                raise click.exceptions.Exit(stopped_exit_code(can_resume=saving.checkpoint_every_nimg > 0))
            for sigma, share in accuracies(net.eval(), dataset, encoder, training.seed, where):
                dist.print0(f"sigma {sigma:<5g} {share:6.1%} of training images correct")
            save_classifier(dest, net, header)
            for path in folder.glob("training-state-*.pt*"):
                path.unlink()


@contextlib.contextmanager
def unfinished(folder: Path) -> Iterator[None]:
    """Hold the folder of checkpoints inside the block; it is removed at the end if there are none.

    Raises ValueError if another process holds it, or if it has other files.
    """
    if folder.exists() and (others := [path.name for path in folder.glob("[!.]*") if not _is_checkpoint(path)]):
        raise ValueError(f"{folder} is needed for checkpoints, but has other files, such as {others[0]}; move it")
    with exclusive(folder):
        try:
            yield
        finally:
            if not any(folder.glob("training-state-*")):
                (folder / LOCK_NAME).unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _is_checkpoint(path: Path) -> bool:
    return path.name.startswith("training-state-")


def run_id(header: ClassifierHeader, dataset: Source) -> str:
    """A hash of everything that decides the weights of a classifier."""
    decisive = [header.architecture, header.training, header.label_names, dataset.identity()]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


class ClassifierTrainer:
    """Trains `net` in place: Adam on the cross-entropy, with a learning rate that falls to 0 linearly.

    The noise of an image derives from the seed and its position in the global order, so that a resumed training repeats
    an uninterrupted one, bit for bit on a CPU. Begins with the newest checkpoint in `folder` that is not damaged, if
    there is one; raises ValueError if it belongs to another training than `run_id`.
    """

    def __init__(
        self,
        net: NoiseClassifier,
        encoder: Encoder,
        training: ClassifierTraining,
        device: torch.device,
        folder: Path,
        run_id: str,
    ):
        self.net, self.encoder, self.training, self.device, self.folder = net, encoder, training, device, folder
        self.optimizer = torch.optim.Adam(net.parameters(), lr=training.lr)
        self.ema = PowerFunctionEMA(net, ())  # a checkpoint has averages; a classifier has none
        self.progress: dict[str, Any] = {"nimg": 0, "loss": 0.0, "right": 0, "run_id": run_id}
        for path in list_checkpoints(folder):
            if read_run_id(path) not in (None, run_id):
                raise ValueError(
                    f"{folder} has checkpoints of a classifier with other settings or images; run with these to finish "
                    "it, or delete the folder"
                )
        if newest := usable_checkpoint(folder, run_id):
            self.progress = load_checkpoint(newest, net, self.optimizer, self.ema, device)
            dist.print0(f"Resuming at {self.nimg} images")

    @property
    def nimg(self) -> int:
        """How many images the classifier has been trained on."""
        return self.progress["nimg"]

    def train(self, dataset: Source, workers: int, checkpoint_every_nimg: int, should_stop: Callable[[], bool]) -> bool:
        """Train to the end, or until `should_stop()`; returns whether the end is reached.

        Saves a checkpoint every `checkpoint_every_nimg` images (0: never), and before it stops or fails. Raises
        ValueError if the loss is not finite.
        """
        duration, size = self.training.duration_nimg, self.training.batch_size
        order = GlobalOrder(len(dataset), self.training.seed)
        batches = training_batches(dataset, order, self.nimg, size, rank=0, world_size=1, workers=workers)
        should_stop()  # from now on, a signal asks to stop instead of ending the set-up
        with contextlib.closing(batches):
            step_batches, error = next_step(batches, 1, self.nimg < duration)
            # after the reading processes have started
            with dist.progress_bar(duration, initial=self.nimg) as bar:
                while self.nimg < duration and error is None:
                    self.step(step_batches[0])
                    bar.set_postfix_str(self.summary(), refresh=False)
                    bar.update(size)
                    step_batches, error = next_step(batches, 1, self.nimg < duration)
                    stopping = self.nimg < duration and (should_stop() or error is not None)
                    is_due = checkpoint_every_nimg > 0 and self.nimg % checkpoint_every_nimg < size
                    if checkpoint_every_nimg and (is_due or stopping):
                        self.save()
                    if stopping:
                        break
        if error is not None:
            raise error
        if self.nimg < duration:
            saved = "state saved. Run the same command to resume." if checkpoint_every_nimg else "no state saved."
            dist.print0(f"Stopped at {self.nimg} images; {saved}")
            return False
        dist.print0(f"{self.nimg} images: {self.summary()}, over all noise levels and all of the training")
        return True

    def step(self, batch: MicroBatch) -> None:
        """One step of the optimizer."""
        training, device = self.training, self.device
        rng = StackedGenerator(device, [derive_seed(training.seed, "noise", int(p)) for p in batch.positions])
        images, classes = self.encoder.encode(batch.raw.to(device), rng), batch.labels.to(device).argmax(dim=1)
        sigma = (rng.randn([len(images)]) * training.P_std + training.P_mean).exp()
        logits = self.net(images + sigma[:, None, None, None] * rng.randn_like(images), sigma)
        loss = torch.nn.functional.cross_entropy(logits, classes)
        if not loss.isfinite():
            raise ValueError(f"the loss is {loss.item()} after {self.nimg} images; try a smaller --lr")
        self.optimizer.param_groups[0]["lr"] = training.lr * max(1 - self.nimg / training.duration_nimg, 0)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.progress["nimg"] += len(images)
        self.progress["loss"] += loss.item()
        self.progress["right"] += (logits.argmax(dim=1) == classes).sum().item()

    def summary(self) -> str:
        """The loss and the share of images that were classified correctly, over all of the training so far."""
        loss = self.progress["loss"] * self.training.batch_size / self.nimg
        return f"loss {loss:.3f}, {self.progress['right'] / self.nimg:.1%} correct"

    def save(self) -> None:
        """Write a checkpoint, and remove old ones."""
        check_finite(self.net, self.optimizer, self.ema, self.nimg)
        save_checkpoint(self.folder, checkpoint_state(self.net, self.optimizer, self.ema, self.progress))
        prune_checkpoints(self.folder, _KEPT_CHECKPOINTS)


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
