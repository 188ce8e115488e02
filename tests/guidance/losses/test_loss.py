import torch

from edm2kit.guidance.losses.loss import ClassLogits, OnPixels
from edm2kit.guidance.losses.restoration import (
    MeanColourOperator,
    Measurement,
)

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn([3, 2, 8, 8], generator=GENERATOR, dtype=torch.float64)


def test_class_logits_are_the_classes_log_probability():
    logits = IMAGES[:, 0, 0, :4]
    expected = -logits.softmax(1).log()
    assert torch.allclose(ClassLogits(lambda x: logits, 2)(IMAGES), expected[:, 2])
    each = torch.tensor([3, 0, 1])
    assert torch.allclose(ClassLogits(lambda x: logits, each)(IMAGES), expected[range(3), each])


def test_latents_are_decoded_first():
    loss = Measurement(MeanColourOperator(), torch.ones(2), 1.0)
    assert torch.equal(OnPixels(loss, lambda z: z / 2)(IMAGES), loss(IMAGES / 2))
