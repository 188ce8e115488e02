"""Reading code out of Markdown pages."""

import re
from pathlib import Path

from tests.support import ROOT


def page(name: str) -> str:
    """A page of the checkout, e.g. "docs/extend.md"."""
    return (ROOT / name).read_text(encoding="utf-8")


def code_blocks(text: str, language: str = "") -> list[str]:
    """The fenced blocks of one language, without their fences."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def sections(text: str) -> dict[str, str]:
    """The text under each second-level heading."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def broken_links(file: Path) -> list[str]:
    """Relative links and pictures of a Markdown file that lead to nothing."""
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", file.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    return [f"{file.relative_to(ROOT)}: {target}" for target in local if not (file.parent / target).exists()]
