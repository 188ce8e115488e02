"""Multiply-adds of what is compared, also of methods that compute gradients."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from edm2kit.cli.generation import Generation, prepare
from edm2kit.cli.generation_options import parse_request
from edm2kit.experiments.compare_guidance.cost import count_multiply_adds


def generation(*words: str) -> Generation:
    return prepare(
        parse_request(["--preset", "cifar10", "--steps", "2", "--precision", "fp32", *words]), torch.device("cpu")
    )


@pytest.mark.parametrize("words", [[], ["--guidance-method", "cfg", "--guidance", "2"]])
def test_they_are_those_that_pytorch_counts(words):
    counted = count_multiply_adds(generation(*words), 2)
    with FlopCounterMode(display=False) as counter:
        generation(*words).engine.generate(range(2))
    assert counted == counter.get_total_flops() / 2 / 2 > 1e8


def test_a_loss_takes_about_three_times_as_many():
    loss = ["--guidance-method", "loss", "--loss-kind", "colour", "--loss-colour", "1,2,3", "--guidance", "1.1"]
    guided, alone = (count_multiply_adds(generation(*words), 2) for words in (loss, []))
    assert guided / alone == pytest.approx(3, rel=0.02)
