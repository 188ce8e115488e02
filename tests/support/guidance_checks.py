"""What every guidance method and rule must do, as functions: built-in ones, registered ones, and wrong ones fail."""

import re
from dataclasses import dataclass, field

import torch

from edm2kit.denoiser import after_step, for_images, for_step
from edm2kit.guidance import Choice, Parts, guide
from edm2kit.guidance.registry import all_methods, all_rules
from edm2kit.sampling.solvers import edm_sampler
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support.fakes import CountingNetwork

SIGMAS = torch.tensor([5.0, 1.0, 0.2, 0.0])
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Nets:
    """Networks to guide with; `x` [3, 3, 16, 16] and `labels` [3, 4] are what they are evaluated on."""

    net: object
    gnet: object
    uncond: object
    x: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Case:
    """A method, or a rule with autoguidance, together with the networks and options that it is checked with.

    `gnet` is None, "weak" or "unconditional"; `uncond` says whether an unconditional network is given in addition.
    """

    method: str = "autoguidance"
    rule: str = "linear"
    gnet: str | None = None
    uncond: bool = False
    options: dict = field(default_factory=dict)
    also: tuple[str, ...] = ()

    def __str__(self) -> str:
        name = self.method if self.rule == "linear" else f"rule-{self.rule}"
        given = [name, *self.also, *(str(value) for value in self.options.values() if isinstance(value, str))]
        if self.gnet == "unconditional":
            given.append("with-guide")
        if self.uncond:
            given.append("with-uncond")
        return "-".join(given)

    def choice(self, weight: float, **settings) -> Choice:
        also = tuple((name, weight) for name in self.also)
        return Choice(self.method, weight, options=self.options, also=also, rule=self.rule, **settings)

    def parts(self, nets: Nets) -> Parts:
        gnets = {None: None, "weak": nets.gnet, "unconditional": nets.uncond}
        return Parts(nets.net, gnets[self.gnet], nets.uncond if self.uncond else None)

    def cost(self) -> str:
        """The stated cost with the networks that are given."""
        wanted = (self.gnet is not None, self.uncond)
        stated = all_methods()[self.method].evaluations.split(" or ")
        found = [text for text in stated if (" guide" in text, " unconditional" in text) == wanted]
        return found[0] if found else stated[0]


def cases(examples: dict[str, list[dict]]) -> list[Case]:
    """Every method with each way to give it networks, and every rule; `examples` has options for those that need some.

    A method without an entry in `examples` is checked with its defaults.
    """
    found = []
    for name, method in all_methods().items():
        for options in examples.get(name, [{}]):
            gnet = "weak" if method.needs_gnet else None
            found.append(Case(name, gnet=gnet, options=options))
            if method.takes_gnet and not method.needs_gnet:
                found.append(Case(name, gnet="unconditional", options=options))
            if method.takes_uncond:
                found.append(Case(name, gnet=gnet, uncond=True, options=options))
    for name in all_rules():
        found.append(Case(rule=name, gnet="weak"))
        found.append(Case(rule=name, gnet="weak", also=("truncation",)))
    return found


def steps_of(denoiser, nets: Nets, rows=(0, 1, 2)) -> list[torch.Tensor]:
    """For each step of a run over these images, D and what the step makes of x at its end: [N, 2, C, H, W].

    Each step starts at the same place whatever the guidance, so that rounding is not amplified over the run.
    """
    rows = list(rows)
    x, labels = nets.x[rows], nets.labels[rows]
    followed = for_images(denoiser, StackedGenerator("cpu", [SEEDS[row] for row in rows]))
    results = []
    with torch.no_grad():
        for i, sigma in enumerate(SIGMAS[:-1]):
            step = for_step(followed, i, SIGMAS)
            D = step(x * sigma, sigma, labels)
            results.append(torch.stack([D, after_step(step, D, i, SIGMAS)], dim=1))
    return results


def guided_or_refusal(choice: Choice, parts: Parts):
    """(the guided denoiser, ""), or (None, the reason why there is none)."""
    try:
        return guide(choice, parts), ""
    except ValueError as error:
        return None, str(error)


def counting(nets: Nets) -> Nets:
    """The same networks, each of which counts the images it evaluates."""
    return Nets(*(CountingNetwork(net) for net in (nets.net, nets.gnet, nets.uncond)), nets.x, nets.labels)


def plain_steps(nets: Nets) -> list[torch.Tensor]:
    return steps_of(nets.net, nets)


def check_off_at_weight_1(case: Case, nets: Nets) -> None:
    """The same images bit for bit, at the cost of the main network alone."""
    counted = counting(nets)
    denoiser = for_images(guide(case.choice(1.0), case.parts(counted)), StackedGenerator("cpu", SEEDS))
    sampled = edm_sampler(denoiser, nets.x, nets.labels, num_steps=3)
    assert torch.equal(sampled, edm_sampler(nets.net, nets.x, nets.labels, num_steps=3)), "images change at weight 1"
    assert counted.net.images == [3] * 5, "the main network is evaluated more often at weight 1"
    assert counted.gnet.images == counted.uncond.images == [], "another network is evaluated at weight 1"
    for step, plain in zip(steps_of(guide(case.choice(1.0), case.parts(nets)), nets), plain_steps(nets), strict=True):
        assert torch.equal(step, plain), "steps change at weight 1"


def check_images_do_not_depend_on_their_batch(case: Case, nets: Nets) -> None:
    denoiser = guide(case.choice(2.0), case.parts(nets))
    together = steps_of(denoiser, nets)
    for rows in ([0], [2, 1]):
        for some, everything in zip(steps_of(denoiser, nets, rows), together, strict=True):
            torch.testing.assert_close(some, everything[rows], atol=2e-5, rtol=2e-5)


def check_it_is_deterministic(case: Case, nets: Nets) -> None:
    runs = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # images depend on their own generators only
            runs.append(steps_of(guide(case.choice(2.0), case.parts(nets)), nets))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second), "two runs differ"


def check_it_guides_inside_its_interval_only(case: Case, nets: Nets) -> None:
    remembers = all_methods()[case.method].remembers  # so its first step in the interval is not guided
    interval = (0.2, 5.0) if remembers else (1.0, 5.0)
    guided = steps_of(guide(case.choice(2.0, interval=interval), case.parts(nets)), nets)
    pairs = list(zip(guided, plain_steps(nets), strict=True))
    inside, without = pairs.pop(1 if remembers else 0)
    assert (inside - without).abs().max() > 1e-6, "nothing is guided"
    for step, plain in pairs:
        assert torch.equal(step, plain), "guided outside the interval"


def check_it_follows_a_schedule_or_refuses_it(case: Case, nets: Nets) -> None:
    """With `increasing` the first step has full weight, and the last none."""
    scheduled, refusal = guided_or_refusal(case.choice(2.0, schedule="increasing"), case.parts(nets))
    if scheduled is None:
        assert "a schedule needs a weight" in refusal
        return
    first, _, last = steps_of(scheduled, nets)
    assert torch.equal(first, steps_of(guide(case.choice(2.0), case.parts(nets)), nets)[0])
    assert torch.equal(last, plain_steps(nets)[-1])


def check_it_costs_what_is_stated(case: Case, nets: Nets) -> None:
    counted = counting(nets)
    steps_of(guide(case.choice(2.0), case.parts(counted)), counted)
    guides = counted.uncond if case.gnet == "unconditional" else counted.gnet
    for network, word in ((counted.net, "main"), (guides, "guide"), (counted.uncond, "unconditional")):
        if network is guides and word == "unconditional":
            continue
        times = int((re.findall(rf"(\d+) {word}", case.cost()) or ["0"])[0])
        evaluations = sum(network.images) / (3 * len(nets.x))
        assert evaluations == times, f"{evaluations} evaluations of {word}, {times} stated"


class Bare:
    """A conditional network without attention blocks whose interior cannot be changed."""

    label_dim, img_channels = 4, 3
    supported_edits: frozenset[str] = frozenset()
    attention_roles: dict = {}

    def __init__(self, shift: float, label_dim: int = 4):
        self.calls, self.shift, self.label_dim = 0, shift, label_dim

    def __call__(self, x, sigma, condition=None):
        self.calls += 1
        return any_denoiser(x, sigma, condition) + self.shift


def any_denoiser(x, sigma, condition=None):
    """A denoiser that depends on everything: neighbouring pixels, the noise level and the condition."""
    sigma = torch.as_tensor(sigma).reshape(-1, 1, 1, 1)
    told = 0.0 if condition is None else (condition @ torch.arange(1.0, 5.0)).reshape(-1, 1, 1, 1)
    return 0.5 * x / (1 + sigma) + x.mean(dim=(1, 2, 3), keepdim=True) + 0.1 * told + 0.01 * x.square()


def check_it_acts_on_any_denoiser_or_refuses(case: Case, nets: Nets) -> None:
    """On a plain function and on a network without an interior: refused before any work, or it guides."""
    for make in (Bare, counted_function):
        net = make(0.0)
        foreign = Nets(net, make(0.3), make(0.6, label_dim=0), nets.x, nets.labels)
        plain = plain_steps(foreign)
        before = net.calls
        denoiser, refusal = guided_or_refusal(case.choice(3.0), case.parts(foreign))
        if denoiser is None:
            assert net.calls == before, "refused after work was done"
            assert len(refusal.splitlines()) == 1, "refused without a reason in one line"
            continue
        steps = steps_of(denoiser, foreign)
        assert all(step.isfinite().all() for step in steps)
        changes = [(step - without).abs().max() for step, without in zip(steps, plain, strict=True)]
        assert max(changes) > 1e-6, "does nothing on this denoiser, and does not say so"


def counted_function(shift: float, label_dim: int = 4):
    """A denoiser that is a plain function; `calls` counts its evaluations."""

    def denoise(x, sigma, condition=None):
        denoise.calls += 1
        return any_denoiser(x, sigma, condition if label_dim else None) + shift

    denoise.calls = 0
    return denoise


def check_its_repr_is_short(case: Case, nets: Nets) -> None:
    """At most five lines that name the main network; neither module trees nor values of tensors nor addresses."""
    denoiser = guide(case.choice(2.5, interval=(0.2, 5.0)), case.parts(nets))
    for shown in (denoiser, for_images(denoiser, StackedGenerator("cpu", SEEDS))):
        lines = repr(shown).splitlines()
        assert len(lines) <= 5, repr(shown)
        assert max(map(len, lines)) <= 200, repr(shown)
        assert "sigma_lo=0.2" in lines[0], repr(shown)
        assert "Precond" in repr(shown), repr(shown)
        assert not re.search(r"( at 0x|\(\w+\): )", repr(shown)), repr(shown)


CHECKS = [
    check_its_repr_is_short,
    check_off_at_weight_1,
    check_images_do_not_depend_on_their_batch,
    check_it_is_deterministic,
    check_it_guides_inside_its_interval_only,
    check_it_follows_a_schedule_or_refuses_it,
    check_it_costs_what_is_stated,
    check_it_acts_on_any_denoiser_or_refuses,
]
