"""Multiply-adds of what is compared, also of methods that compute gradients."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from edm2kit.cli.generation import Generation, prepare
from edm2kit.cli.generation_options import parse_request
from edm2kit.experiments.compare_guidance.cost import count_multiply_adds, describe_student
from edm2kit.models import Precond
from tests.support import runs
from tests.support.fake_published import ARCHITECTURE


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


def test_a_damaged_line_of_statistics_does_not_hide_what_the_training_took(tmp_path):
    weights = runs.snapshot(2000, 0.05, Precond(**ARCHITECTURE).state_dict())
    runs.write(tmp_path, [runs.changed(weights, training_config={"teacher": "main"})])
    (tmp_path / "stats.jsonl").write_text('{"nimg": 1000, "ela\n{"nimg": 2000, "elapsed_sec": 9.5}\n')
    (tmp_path / "run.json").write_text('{"command": ["distill"], "commit": "a", "hardware": "b"}')
    found = describe_student(tmp_path / weights.name)
    assert found["teacher"] == "main"
    assert found["training"]["seconds"] == 9.5
