"""Images belong to their seeds: the same noise, class and result in any batch and on any rank."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from edm2kit.guidance.interval import GuidanceInterval
from edm2kit.guidance.network_call import Perturbed
from edm2kit.guidance.own_network.dropout_and_noise import InputNoise
from edm2kit.sampling.engine import Engine, share_of_rank
from edm2kit.sampling.solvers import Churn, Sampler
from edm2kit.torch_utils import dist
from tests.support import golden
from tests.support.fake_gpu import DEVICE, FakeGPU
from tests.support.fakes import ByLabel, Constant, Counting, Following, Gaussian, Jittered

SEEDS = tuple(range(100, 113))


def decode(latents):
    return (latents * 40 + 128).clamp(0, 255).to(torch.uint8)


def engine(denoiser, *, label_dim=4, classes=None, churn=0.0, shape=(1, 4, 4)):
    sampler = Sampler(num_steps=4, churn=Churn(S_churn=churn))
    return Engine(denoiser, decode, sampler, shape, label_dim, torch.device("cpu"), classes)


def gathered(batches, name):
    return torch.cat([getattr(batch, name) for batch in batches])


def noise_of(drawing, seeds, batch_size):
    """The noise that a run starts from, its labels, and its images."""
    counting = Counting(Constant(0.0))
    starts = []

    def denoiser(x, sigma, labels):
        if float(sigma) == 80:
            starts.append(x / 80)
        return counting(x, sigma, labels)

    batches = list(engine(denoiser, **drawing).batches(seeds, batch_size))
    return torch.cat(starts), gathered(batches, "classes"), batches


def test_noise_and_labels_of_a_seed_are_those_of_the_reference():
    reference = golden.load("sampler.npz")
    start, classes, _ = noise_of({"shape": (3, 16, 16)}, reference["seeds"].tolist(), 3)
    torch.testing.assert_close(start, reference["noise"], atol=0, rtol=1e-6)
    assert torch.equal(torch.nn.functional.one_hot(classes, 4).float(), reference["labels"])


@pytest.mark.parametrize("batch_size", [1, 8])
def test_noise_and_labels_are_bitwise_the_same_in_any_batch(batch_size):
    start, classes, batches = noise_of({}, SEEDS, batch_size)
    whole_start, whole_classes, _ = noise_of({}, SEEDS, len(SEEDS))
    assert torch.equal(start, whole_start)
    assert torch.equal(classes, whole_classes)
    assert [len(batch.seeds) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert sum((batch.seeds for batch in batches), ()) == SEEDS


def test_noise_and_labels_are_bitwise_the_same_on_two_ranks(monkeypatch):
    whole_start, whole_classes, _ = noise_of({}, SEEDS, 8)
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        start, classes, _ = noise_of({}, share_of_rank(SEEDS), 3)
        assert torch.equal(start, whole_start[rank::2])
        assert torch.equal(classes, whole_classes[rank::2])


def test_shares_cover_every_seed_once_and_may_be_empty(monkeypatch):
    monkeypatch.setattr(dist, "world_size", lambda: 4)
    shares = []
    for rank in range(4):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        shares.append(share_of_rank((7, 8, 9)))
    assert sorted(sum(shares, ())) == [7, 8, 9]
    assert shares[3] == ()
    assert list(engine(Constant(0.0)).batches(shares[3], 8)) == []


def test_sampler_noise_belongs_to_the_image():
    churned = [gathered(engine(Gaussian(0, 1), churn=3).batches(SEEDS, n), "latents") for n in (1, 8)]
    torch.testing.assert_close(*churned, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(churned[0], gathered(engine(Gaussian(0, 1)).batches(SEEDS, 8), "latents"), atol=0.01)


def test_forcing_a_class_moves_no_noise():
    for churn in (0, 3):
        free = list(engine(Gaussian(0, 1), churn=churn).batches(SEEDS, 4))
        forced = list(engine(Gaussian(0, 1), churn=churn, classes=[2]).batches(SEEDS, 4))
        assert torch.equal(gathered(free, "latents"), gathered(forced, "latents"))
        assert gathered(forced, "classes").tolist() == [2] * len(SEEDS)
    assert len(set(gathered(free, "classes").tolist())) > 1


def test_listed_classes_take_turns_by_seed():
    classes = gathered(engine(Constant(0.0), classes=[3, 1]).batches(SEEDS, 4), "classes")
    assert classes.tolist() == [[3, 1][seed % 2] for seed in SEEDS]


def test_the_class_reaches_the_denoiser_as_one_hot():
    batch = engine(ByLabel((0.0, 1.0, 2.0, 3.0))).generate(SEEDS)
    torch.testing.assert_close(batch.latents, batch.classes.float()[:, None, None, None].expand(-1, 1, 4, 4))
    assert torch.equal(batch.images, decode(batch.latents))


def test_without_labels_the_denoiser_gets_none():
    counting = Counting(Constant(0.0))
    batch = engine(counting, label_dim=0).generate(SEEDS)
    assert batch.classes is None
    assert all(labels is None for _, labels in counting.calls)


def test_a_method_that_draws_at_random_shifts_no_sampler_noise():
    drawing = engine(Jittered(Gaussian(0, 1), scale=0.0), churn=3).generate(SEEDS)
    assert torch.equal(drawing.latents, engine(Gaussian(0, 1), churn=3).generate(SEEDS).latents)


class Drawing(Gaussian):
    drawn: ClassVar = []

    def for_images(self, rng):
        self.drawn.append(rng.randn([len(rng), 1, 4, 4]))
        return self


def test_what_a_method_draws_is_not_the_noise_over_again():
    drawing = Drawing(0, 1)
    engine(drawing).generate(SEEDS)
    start, _, _ = noise_of({}, SEEDS, 13)
    assert torch.corrcoef(torch.stack([drawing.drawn[0].flatten(), start.flatten()]))[0, 1].abs() < 0.3


def test_what_a_method_draws_belongs_to_the_image():
    jittered = [gathered(engine(Jittered(Gaussian(0, 1))).batches(SEEDS, n), "latents") for n in (1, 8, 13)]
    torch.testing.assert_close(jittered[0], jittered[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(jittered[0], jittered[2], atol=1e-5, rtol=1e-5)


def test_the_denoiser_follows_the_run():
    following = Following(Gaussian(0, 1))
    engine(following).generate(SEEDS)
    assert following.heard[:2] == [("for_images", len(SEEDS)), ("for_step", 0)]


def test_an_image_that_is_not_finite_is_refused_by_seed():
    def denoiser(x, sigma, labels):
        D = x.clone()
        D[1] = torch.nan
        return D

    with pytest.raises(ValueError, match="seed 101 is not finite"):
        engine(denoiser).generate((100, 101))


def test_a_denoiser_of_float_vectors_gets_rows_of_those_given():
    vectors = torch.tensor([[0.5, 1.5], [2.0, 3.0], [4.0, 5.0]])
    seen = []

    def denoiser(x, sigma, condition):
        seen.append(condition)
        return torch.zeros_like(x)

    made = Engine(denoiser, decode, Sampler(num_steps=1), (1, 4, 4), 2, torch.device("cpu"), vectors=vectors)
    batch = made.generate(SEEDS)
    assert batch.classes is None
    assert {tuple(row) for row in seen[0].values.tolist()} <= {tuple(row) for row in vectors.tolist()}
    alone = made.generate(SEEDS[3:4])
    assert torch.equal(alone.latents, batch.latents[3:4])
    assert torch.equal(seen[1].values, seen[0].values[3:4])
    replace(made, classes=[1]).generate(SEEDS)
    assert torch.equal(seen[2].values, vectors[[1] * len(SEEDS)])


def test_padding_gives_all_batches_one_size_and_drops_what_it_added():
    sizes = []

    def denoiser(x, sigma, labels):
        sizes.append(len(x))
        return 0.9 * x

    padded = list(replace(engine(denoiser), pad=True).batches(SEEDS, 8))
    assert set(sizes) == {8}
    plain = list(engine(denoiser).batches(SEEDS, 8))
    for name in ("latents", "images", "classes"):
        assert torch.equal(gathered(padded, name), gathered(plain, name))
    assert [batch.seeds for batch in padded] == [batch.seeds for batch in plain]
    sizes.clear()
    list(replace(engine(denoiser), pad=True).batches(SEEDS[:3], 8))
    assert set(sizes) == {3}


def test_a_sampling_step_on_a_gpu_mixes_no_devices_and_waits_for_nothing():
    def denoiser(x, sigma, labels):
        return x / (1 + sigma)

    noisy = Perturbed(denoiser, InputNoise(0.1))
    waits = []
    for num_steps in (3, 6):
        sampler = Sampler(num_steps)
        with FakeGPU() as gpu:
            guided = GuidanceInterval(noisy, denoiser, 0.0, 80.0)
            Engine(guided, decode, sampler, (3, 8, 8), 4, DEVICE).generate([0, 1])
        assert gpu.mixed == []
        waits.append(len(gpu.waits))
    assert waits == [1, 1]  # whether the images are finite
