"""Helpers of the tests: fakes, tiny networks, golden values, and where the checkout is."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
