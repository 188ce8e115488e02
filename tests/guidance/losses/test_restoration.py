import pytest
import torch

from edm2kit.guidance.losses.restoration import (
    DownsamplingOperator,
    GaussianBlurOperator,
    InpaintingOperator,
    MeanColourOperator,
    Measurement,
)

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn([3, 2, 8, 8], generator=GENERATOR, dtype=torch.float64)
MASK = (torch.rand([1, 8, 8], generator=GENERATOR) < 0.3).double()
OPERATORS = [
    InpaintingOperator(MASK),
    DownsamplingOperator(2),
    DownsamplingOperator(8),
    GaussianBlurOperator(0.7),
    MeanColourOperator(),
]


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_an_image_shows_itself_costs_nothing_and_anything_else_does(operator):
    measurement = Measurement(operator, operator(IMAGES)[0], 0.1)
    losses = measurement(IMAGES)
    assert losses.shape == (3,)
    assert losses[0] == 0
    assert losses[1:].min() > 0.1


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_are_linear(operator):
    torch.testing.assert_close(
        operator(2 * IMAGES - 3 * IMAGES.flip(0)), 2 * operator(IMAGES) - 3 * operator(IMAGES.flip(0))
    )


def test_a_measurement_is_the_gaussian_log_likelihood():
    target, s = torch.zeros(2), 0.3
    log_p = torch.distributions.Normal(target.double(), s).log_prob(IMAGES.mean((2, 3))).sum(1)
    losses = Measurement(MeanColourOperator(), target, s)(IMAGES)
    torch.testing.assert_close(losses - losses[0], -(log_p - log_p[0]))


def test_the_sum_of_squares():
    losses = Measurement(InpaintingOperator(MASK), torch.zeros(2, 8, 8), 0.5**0.5)(IMAGES)
    torch.testing.assert_close(losses, (IMAGES**2 * MASK).sum((1, 2, 3)))


@pytest.mark.parametrize("operator", [op for op in OPERATORS if not isinstance(op, GaussianBlurOperator)])
def test_rows_are_orthogonal_and_as_long_as_they_say(operator):
    basis = torch.eye(2 * 64, dtype=torch.float64).reshape(128, 2, 8, 8)
    matrix = operator(basis).flatten(1).T
    gram = matrix @ matrix.T
    seen = gram.diagonal() > 0  # a mask leaves rows of zeros
    expected = operator.row_energy(IMAGES.shape) * torch.eye(len(gram), dtype=torch.float64)[seen][:, seen]
    torch.testing.assert_close(gram[seen][:, seen], expected)


def test_a_blur_makes_no_noise_louder():
    basis = torch.eye(64, dtype=torch.float64).reshape(64, 1, 8, 8)
    matrix = GaussianBlurOperator(0.7)(basis).flatten(1).T
    loudest = torch.linalg.eigvalsh(matrix @ matrix.T).max().item()
    # the continued border counts outer pixels more than once
    assert GaussianBlurOperator(0.7).row_energy(IMAGES.shape) == pytest.approx(loudest, rel=0.05)


def test_an_uncertain_image_makes_the_noise_larger():
    target, s, r = torch.zeros(2, 4, 4), 0.3, torch.tensor([0.0, 0.5, 2.0])
    losses = Measurement(DownsamplingOperator(2), target, s)(IMAGES, r)
    for k in range(3):
        wider = Measurement(DownsamplingOperator(2), target, (s**2 + r[k].item() ** 2 / 4) ** 0.5)
        torch.testing.assert_close(losses[k], wider(IMAGES)[k])


def test_a_blur_keeps_constants_and_spreads_a_point_by_its_deviation():
    torch.testing.assert_close(GaussianBlurOperator(1.5)(torch.ones(1, 1, 8, 8)), torch.ones(1, 1, 8, 8))
    point = torch.zeros(1, 1, 33, 33, dtype=torch.float64)
    point[..., 16, 16] = 1
    columns = GaussianBlurOperator(1.5)(point).sum((0, 1, 2))
    offsets = torch.arange(33) - 16
    assert (columns * offsets**2).sum().item() == pytest.approx(1.5**2, rel=0.03)  # cut off at three deviations


def test_losses_of_one_image_do_not_depend_on_the_others():
    for operator in OPERATORS:
        measurement = Measurement(operator, operator(IMAGES)[0] + 1, 0.1)
        torch.testing.assert_close(measurement(IMAGES[1:2]), measurement(IMAGES)[1:2])


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"target has shape \[3\]; the measurement of an image has \[2\]"):
        Measurement(MeanColourOperator(), torch.zeros(3), 1.0)(IMAGES)
    with pytest.raises(ValueError, match="expected a positive number"):
        Measurement(MeanColourOperator(), torch.zeros(2), 0.0)
    with pytest.raises(ValueError, match="no closed form for function"):
        Measurement(lambda images: images**2, IMAGES[0], 0.1)(IMAGES, 0.5)
