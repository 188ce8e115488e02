"""Numbers out of option texts."""

import math
from collections.abc import Callable


def number(low: float = -math.inf, high: float = math.inf) -> Callable[[str], float]:
    """A reader of numbers in [low, high]; "inf" where `high` is infinite. ValueError says what was expected."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            within = "" if (low, high) == (-math.inf, math.inf) else f" from {low:g} to {high:g}"
            raise ValueError(f"{text!r} is not a number{within}")
        return value

    return parse


def count(low: int = 1) -> Callable[[str], int]:
    """A reader of whole numbers of at least `low`."""

    def parse(text: str) -> int:
        if not str(text).isdecimal() or int(text) < low:
            raise ValueError(f"{text!r} is not a whole number of at least {low}")
        return int(text)

    return parse


def one_of(*words: str) -> Callable[[str], str]:
    """A reader of one of `words`."""

    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"{text!r} is not one of {', '.join(words)}")
        return text

    return parse
