"""What the checks of a run return."""

from collections.abc import Sequence
from dataclasses import dataclass

# the checks that evaluate networks, on request
EMA_LENGTH, COPIES = "EMA length", "copies of training images"


@dataclass(frozen=True)
class Finding:
    """Something that is wrong: `what`, the number that shows it, and what to do."""

    what: str
    evidence: str
    advice: str


@dataclass(frozen=True)
class Check:
    """The result of looking at one thing: what was `seen`, with `rows` below it, or why it was `not_looked`
    at."""

    name: str
    seen: str = ""
    findings: Sequence[Finding] = ()
    not_looked: str = ""
    rows: Sequence[str] = ()
