"""What a search may cost: a number of images, or a time."""

import re
from dataclasses import dataclass

_UNITS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600}
_EXAMPLES = "write for example 4000img, 90min or 2h"
_MAX = 1e12


@dataclass(frozen=True)
class Budget:
    """Either `images` to generate, or `seconds` of work, summed over all processes of a search."""

    images: int | None = None
    seconds: float | None = None

    def images_left(self, spent: int, seconds: float, seconds_per_image: float) -> float:
        """How many more images fit, given what has been spent so far and the pace."""
        if self.images is not None:
            return self.images - spent
        assert self.seconds is not None
        return (self.seconds - seconds) / max(seconds_per_image, 1e-9)

    def __str__(self) -> str:
        if self.images is not None:
            return f"{self.images:,} images"
        return duration(self.seconds or 0.0)


def parse_budget(text: str) -> Budget:
    """A budget such as 4000img, 90min or 2h. Raises ValueError for anything else, and if it is not positive."""
    match = re.fullmatch(r"\s*([0-9]{1,12}(?:\.[0-9]{1,6})?)\s*(img|images|s|sec|m|min|h)\s*", text)
    if match is None:
        raise ValueError(f"{text!r:.40} is not a budget; {_EXAMPLES}")
    number, unit = float(match[1]), match[2]
    if not 0 < number < _MAX:
        raise ValueError(f"a budget of {text.strip()} allows nothing; {_EXAMPLES}")
    if unit not in _UNITS:
        if number != int(number):
            raise ValueError(f"{text!r:.60} is not a whole number of images; {_EXAMPLES}")
        return Budget(images=int(number))
    return Budget(seconds=number * _UNITS[unit])


def duration(seconds: float) -> str:
    """A time for people, such as "2.5 h", "12 min" or "8 s"."""
    if seconds >= 5400:
        return f"{seconds / 3600:.3g} h"
    if seconds >= 90:
        return f"{seconds / 60:.3g} min"
    return f"{seconds:.3g} s"
