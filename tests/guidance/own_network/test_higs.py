import pytest
import scipy.fft
import torch

from edm2kit.denoiser import for_images, for_step
from edm2kit.guidance.own_network.higs import high_frequencies
from edm2kit.guidance.registry import Choice, Parts, guide
from edm2kit.sampling.noise_levels import karras_sigmas
from edm2kit.sampling.solvers import heun
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support.fakes import Constant, Counting
from tests.support.rule_spaces import LEVELS, MAIN, NOISE, SHRINK, WEAK, DenoisedSpace, Point

ALONE = Parts(MAIN)
EVERYWHERE = {"higs_t_low": 0.0, "higs_t_high": 1.0}
SIGMAS = karras_sigmas(8, 0.01, 20, 7, torch.float64)


def from_history(weight=2.0, parts=ALONE, method=None, **options):
    choice = Choice("higs", weight, options=options)
    if method is not None:
        choice = Choice(method, 1.5, also=(("higs", weight),), options=options)
    return for_images(guide(choice, parts), StackedGenerator("cpu", range(4)))


def authors_update(D, earlier, weight, alpha=0.75, cut=0.05):
    """D and three earlier answers, the latest first -> the published update, image by image, with scipy's DCT."""
    shares = [alpha * (1 - alpha) ** k for k in range(len(earlier))]
    mean = sum(share * one for share, one in zip(shares, earlier, strict=True)) / sum(shares)
    results = []
    for image, average in zip(D, mean, strict=True):
        difference = image - average
        across = difference - (difference * image).sum() / image.square().sum() * image
        planes = []
        for plane in across.numpy():
            components = scipy.fft.dctn(plane, norm="ortho")
            for k in range(components.shape[0]):
                for m in range(components.shape[1]):
                    if ((k / components.shape[0]) ** 2 + (m / components.shape[1]) ** 2) ** 0.5 <= cut:
                        components[k, m] = 0
            planes.append(torch.from_numpy(scipy.fft.idctn(components, norm="ortho")))
        results.append(image + (weight - 1) * torch.stack(planes))
    return torch.stack(results)


@pytest.mark.parametrize("cut", [0.05, 0.3])
def test_the_authors_step_in_a_flow_of_denoised_images(cut):
    space = DenoisedSpace()
    for sigma in LEVELS:
        points = [Point(sigma / SHRINK**k) for k in (3, 2, 1, 0)]
        sigmas = torch.tensor([*(point.sigma for point in points), points[-1].sigma_next, 0.0], dtype=torch.float64)
        run = from_history(2.0, higs_cut=cut, **EVERYWHERE)
        for i, point in enumerate(points):
            D = for_step(run, i, sigmas)(point.x, sigmas[i])
        now = points[-1]
        earlier = [point.D for point in points[-2::-1]]
        theirs = space.step(authors_update(space.prediction(now.D, now), earlier, 2.0, cut=cut), now)
        ours = now.our_step(D)
        assert (ours - theirs).abs().max() < 1e-6 * theirs.abs().max()
        assert (ours - now.our_step(now.D)).abs().max() > 1e-6 * theirs.abs().max()


def test_without_projection_and_filter_it_leads_away_from_the_weighted_mean():
    run = from_history(3.0, higs_parallel=1.0, higs_cut=-1.0, higs_average=0.5, **EVERYWHERE)
    D = [MAIN(sigma * NOISE, sigma) for sigma in SIGMAS[:3]]
    made = [for_step(run, i, SIGMAS)(SIGMAS[i] * NOISE, SIGMAS[i]) for i in range(3)]
    assert torch.equal(made[0], D[0])
    torch.testing.assert_close(made[1], D[0] + 3 * (D[1] - D[0]))
    mean = (D[1] + 0.5 * D[0]) / 1.5
    torch.testing.assert_close(made[2], mean + 3 * (D[2] - mean))


def test_the_projection_changes_nothing_along_D():
    run = from_history(higs_cut=-1.0, **EVERYWHERE)
    for_step(run, 0, SIGMAS)(SIGMAS[0] * NOISE, SIGMAS[0])
    D = MAIN(SIGMAS[1] * NOISE, SIGMAS[1])
    change = for_step(run, 1, SIGMAS)(SIGMAS[1] * NOISE, SIGMAS[1]) - D
    torch.testing.assert_close((change * D).sum(dim=(1, 2, 3)), torch.zeros(4, dtype=D.dtype), atol=1e-10, rtol=0)
    assert change.abs().max() > 1e-3


@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
def test_the_filter_removes_what_varies_slowly(size):
    images = torch.randn([2, 3, *size], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    without_mean = images - images.mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(high_frequencies(images, 0.0), without_mean)
    torch.testing.assert_close(high_frequencies(images, 0.05), without_mean)  # the next frequency is 0.1 or more
    assert torch.equal(high_frequencies(images, -1.0), images)
    torch.testing.assert_close(high_frequencies(images, 1.5), torch.zeros_like(images))
    once = high_frequencies(images, 0.4)
    torch.testing.assert_close(high_frequencies(once, 0.4), once)


def test_it_acts_at_the_published_times_and_remembers_at_all():
    run = from_history()
    acting = []
    for i, sigma in enumerate(SIGMAS[:-1]):
        x = sigma * NOISE
        if not torch.equal(for_step(run, i, SIGMAS)(x, sigma), MAIN(x, sigma)):
            acting.append(i)
    levels = SIGMAS.tolist()
    assert acting == [i for i in range(1, 8) if 0.4 <= levels[i] / (1 + levels[i]) <= 0.95]
    assert 0 < len(acting) < 7


def test_a_constant_denoiser_is_reached_whatever_the_weight():
    x = heun(from_history(5.0, Parts(Constant(0.3)), **EVERYWHERE), NOISE, SIGMAS)
    torch.testing.assert_close(x, torch.full_like(x, 0.3))


def test_on_top_of_another_method_it_remembers_guided_images():
    guide_net = Counting(WEAK)
    run = from_history(
        3.0, Parts(MAIN, guide_net), "autoguidance", higs_parallel=1.0, higs_cut=-1.0, higs_average=1.0, **EVERYWHERE
    )
    D = []
    for i in range(2):
        x, sigma = SIGMAS[i] * NOISE, SIGMAS[i]
        made = for_step(run, i, SIGMAS)(x, sigma)
        D.append(WEAK(x, sigma) + 1.5 * (MAIN(x, sigma) - WEAK(x, sigma)))
    torch.testing.assert_close(made, D[0] + 3 * (D[1] - D[0]))
    assert len(guide_net.calls) == 2  # nothing else is evaluated


def test_times_the_wrong_way_round_are_refused():
    with pytest.raises(ValueError, match=r"--higs-t-low is 0\.9 and --higs-t-high 0\.1; nothing is in between"):
        from_history(higs_t_low=0.9, higs_t_high=0.1)


def test_weight_1_is_off_bitwise_and_so_is_a_share_of_0():
    assert guide(Choice("higs", 1.0), ALONE) is MAIN
    run = from_history(2.0, **EVERYWHERE)
    for i, sigma in enumerate(SIGMAS[:3]):
        x = sigma * NOISE
        assert torch.equal(for_step(run.scaled(0.0), i, SIGMAS)(x, sigma), MAIN(x, sigma))


def test_pinned_value():
    run = from_history(2.0, **EVERYWHERE)
    for i, sigma in enumerate(SIGMAS[:3]):
        D = for_step(run, i, SIGMAS)(sigma * NOISE, sigma)
    assert [D.mean().item(), D.std().item(), D[1, 1, 2, 3].item()] == pytest.approx(PINNED, rel=1e-6)


PINNED = [0.04417563051767756, 0.8947944719165496, -1.0041114234929802]
