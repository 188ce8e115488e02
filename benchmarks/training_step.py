"""One training step with Adam and both averages: plain, and by the training loop."""

import statistics
from dataclasses import replace
from pathlib import Path

import click
import torch

from benchmarks import harness, networks
from benchmarks.harness import Comparison, Work
from benchmarks.plain import PlainTraining
from edm2kit.cli import click_types as cli
from edm2kit.data.batches import MicroBatch
from edm2kit.ema.power_function import std_to_exp
from edm2kit.models.cost import evaluation_cost
from edm2kit.models.encoders import make_encoder
from edm2kit.models.preconditioning import slow_precision
from edm2kit.snapshots.file_format import Header
from edm2kit.training.config import TrainConfig
from edm2kit.training.loop import Trainer

JOBS = {"training_small": (networks.SMALL, 16), "training_xs64": (networks.XS64, 4)}
_LR = 1e-3
CPU = torch.device("cpu")


@click.command(cls=cli.Command)
@harness.runs_option()
@harness.only_option(JOBS)
@harness.out_option
def main(runs: int, only: tuple[str, ...], out: Path) -> None:
    """Compare training steps, and the share of the averages; writes training_*.json."""
    for name in only or JOBS:
        record = harness.measure(make_job(name), runs, warmup=1)
        notes, step_sec = record["notes"], record["contenders"]["training loop"]["median_sec"]
        notes["averages_share"] = notes["averages_sec"] / step_sec
        print(f"both averages take {notes['averages_share']:.1%} of a step")
        harness.save(record, out)


def make_job(name: str) -> Comparison:
    """Both ways to train one network from the same weights, on random images."""
    architecture, size = JOBS[name]
    state = networks.random_network(architecture).state_dict()
    config = TrainConfig(batch_size=size, ref_lr=_LR, ref_batches=0, rampup_nimg=0)
    slow = slow_precision(torch.bfloat16)
    precisions = {"training loop": "fp32"} if slow else {"training loop": "fp32", "training loop, bf16": "bf16"}
    trainers = {}
    for way, precision in precisions.items():
        header = Header(architecture, {"kind": "rgb"}, 0, None)
        trainers[way] = Trainer(replace(config, precision=precision), header, make_encoder({"kind": "rgb"}), CPU)
        trainers[way].net.load_state_dict(state)
    trainer = trainers["training loop"]
    plain = PlainTraining(architecture, state, tuple(std_to_exp(config.ema_stds)), config.P_mean, config.P_std)
    labels = networks.random_batch(architecture, size).labels
    raw = torch.randint(256, [size, 3, *2 * [architecture["img_resolution"]]]).to(torch.uint8)
    images = raw.float() / 127.5 - 1
    batch = MicroBatch(raw, labels, torch.arange(size))
    errors = {way: compare(plain, one, images, labels) for way, one in trainers.items()}
    averages = harness.interleave({"both": lambda: trainer.ema.update(size, size)})["both"]
    return Comparison(
        name,
        {
            "plain": lambda: plain.step(images, labels, _LR),
            **{way: (lambda one=one: one.step(iter([batch]), rounds=1)) for way, one in trainers.items()},
        },
        # the backward pass is twice the forward pass
        work=Work(3 * size * evaluation_cost(architecture).multiply_adds, "multiply-adds", "matmul_fp32"),
        ceilings={"training loop, bf16": "matmul_bf16"},
        goals={"training loop": 1.3, "training loop, bf16": 2.2},
        errors={way: found["gradient"] for way, found in errors.items()},
        error_kind="of the gradient at the same weights and noise, relative norm",
        notes={
            "batch": size,
            "error_of_loss": errors["training loop"]["loss"],
            "averages_sec": statistics.median(averages),
            "skipped": {} if slow is None else {"training loop, bf16": slow},
        },
    )


def compare(plain: PlainTraining, trainer: Trainer, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Relative errors of the loss and of its gradient with respect to all weights, with the same random numbers."""
    torch.manual_seed(0)
    expected = plain.loss(images, labels)
    expected.sum().backward()
    torch.manual_seed(0)
    found = trainer.loss_fn(trainer.net, images, labels)
    found.sum().backward()
    pairs = [(p.grad.flatten(), plain.weights[n].grad.flatten()) for n, p in trainer.net.named_parameters()]
    ours, theirs = (torch.cat(side) for side in zip(*pairs, strict=True))
    errors = {"loss": harness.relative_error(found.detach(), expected.detach())}
    errors["gradient"] = harness.relative_error(ours, theirs)
    trainer.optimizer.zero_grad()
    plain.adam.zero_grad()
    return errors


if __name__ == "__main__":
    main()
