"""Power-function EMA of any PyTorch module: track two lengths, rebuild a third one afterwards.

    python examples/ema_of_any_module.py

Snapshots of two lengths, stored now and then, are enough to make any other length after training (Karras et al. 2023,
Section 3). Here the module is a line fitted to noisy points. The rebuilt average is compared with one that was tracked.
"""

import torch

import edm2kit

BATCH, STEPS, SNAPSHOT_EVERY = 16, 256, 16
STORED, WANTED = (0.05, 0.10), 0.07  # relative lengths


def main() -> None:
    torch.manual_seed(0)
    line = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(line.parameters(), lr=0.1)
    stored = edm2kit.PowerFunctionEMA(line, stds=STORED)
    tracked = edm2kit.PowerFunctionEMA(line, stds=(WANTED,))
    snapshots = []  # (images seen, length, weights)
    for step in range(1, STEPS + 1):
        x = torch.rand(BATCH, 1)
        loss = (line(x) - (2 * x + 1 + 0.3 * torch.randn(BATCH, 1))).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for ema in (stored, tracked):
            ema.update(step * BATCH, BATCH)
        if step % SNAPSHOT_EVERY == 0:
            for number, std in enumerate(STORED):
                weights = {name: value.clone() for name, value in stored.weights(number).items()}
                snapshots.append((step * BATCH, std, weights))

    times, lengths, weights = zip(*snapshots, strict=True)
    (coefficients,) = edm2kit.solve_posthoc_coefficients(times, lengths, STEPS * BATCH, [WANTED]).T
    for name, value in tracked.weights(0).items():
        rebuilt = sum(c * w[name] for c, w in zip(coefficients.tolist(), weights, strict=True))
        print(
            f"{name}: rebuilt {rebuilt.item():.5f}, tracked {value.item():.5f}, last {getattr(line, name).item():.5f}"
        )


if __name__ == "__main__":
    main()
