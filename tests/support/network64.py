"""A network in float64 with an interior, small enough to be written out by hand where a test needs it."""

from dataclasses import dataclass, field

import torch

from edm2kit.denoiser import AttentionRole
from edm2kit.guidance.attention_blocks import attend

CLASSES, WIDTH = 4, 6
ROLES = {
    "enc.8x8_block0": AttentionRole("encoder", 8, 0),
    "dec.8x8_in0": AttentionRole("middle", 8, 1),
    "dec.8x8_block0": AttentionRole("decoder", 8, 2),
}
EDITS = frozenset({"attention", "embedding", "dropout", "skip", "return_attention"})


@dataclass(frozen=True)
class Network64:
    """A network with an embedding, three blocks with attention, and dropout; `generator` draws its weights.

    `sides` are those of its blocks whose attention it declares; `supported_edits` are the edits that it takes.
    """

    generator: torch.Generator
    label_dim: int = CLASSES
    sides: tuple[str, ...] = ("encoder", "middle", "decoder")
    supported_edits: frozenset[str] = EDITS
    images: list = field(default_factory=list)  # the number of images of each evaluation

    def __post_init__(self):
        sizes = {
            "inwards": (3, WIDTH),
            "qkv": (3, 3, WIDTH, WIDTH),
            "labels": (CLASSES, WIDTH),
            "outwards": (WIDTH, 3),
        }
        draw = {name: torch.randn(size, generator=self.generator, dtype=torch.float64) for name, size in sizes.items()}
        object.__setattr__(self, "weights", draw)

    @property
    def attention_roles(self):
        return {name: role for name, role in ROLES.items() if role.side in self.sides}

    def __call__(self, x, sigma, labels=None, **edits):
        assert set(edits) <= self.supported_edits
        self.images.append(len(x))
        attention, skip, maps = edits.get("attention", {}), edits.get("skip", {}), {}
        s = torch.as_tensor(sigma, dtype=torch.float64).expand(len(x)).reshape(-1, 1, 1, 1)
        emb = (s.log().reshape(-1, 1) * torch.arange(WIDTH) / 4).cos()
        emb = edits.get("embedding", lambda same: same)(emb)
        emb = emb + (0 if labels is None else labels.double() @ self.weights["labels"])
        h = torch.nn.functional.avg_pool2d(x / (s**2 + 0.25).sqrt(), 2)
        tokens = h.flatten(2).transpose(1, 2) @ self.weights["inwards"]
        for k, name in enumerate(ROLES):
            q, key, v = ((tokens @ weight)[:, None] for weight in self.weights["qkv"][k] / WIDTH)
            if name in edits.get("return_attention", ()):
                maps[name] = (q @ key.transpose(2, 3) / WIDTH**0.5).softmax(dim=3)
            y = attention.get(name, attend)(q, key, v)[:, 0] * (1 + emb[:, None])
            y = edits.get("dropout", lambda block, same: same)(name, y)
            kept = ~skip.get(name, torch.zeros(len(x), dtype=torch.bool))
            tokens = tokens + y * kept[:, None, None]
        f = (tokens @ self.weights["outwards"]).transpose(1, 2).reshape(h.shape).tanh()
        f = torch.nn.functional.interpolate(f, x.shape[2:], mode="nearest")
        D = 0.25 / (s**2 + 0.25) * x + 0.5 * s / (s**2 + 0.25).sqrt() * f
        return (D, maps) if "return_attention" in edits else D
