"""Generated parts of documents: written from records by a program, never by hand.

The part called `demo` stands between the lines `<!-- demo: begin -->` and `<!-- demo: end -->`.
`python scripts/write_documents.py` writes every part of every document; with --check it only compares.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edm2kit.torch_utils.files import atomic_write

_ALIGNMENT = {"l": "---", "r": "---:"}


def checkout() -> Path:
    """The checkout that this package is part of: documents are in its docs/, records in its experiments/.

    Raises ValueError if the package was installed without a checkout.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / "docs").is_dir():
        raise ValueError(
            f"{root} has no docs/ folder: documents are only written in a checkout. Clone the project and run "
            "pip install -e . there"
        )
    return root


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError, naming the file, if it holds anything else."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not complete JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a JSON {type(found).__name__}; expected an object, {{...}}")
    return found


def fill(text: str, parts: Mapping[str, str]) -> str:
    """`text` with each of `parts` between the marks of its name.

    Raises ValueError if `text` does not have exactly one pair of marks for a part.
    """
    for name, part in parts.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"the document has no place for {name!r}: it needs one line {begin} and, below it, {end}")
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"the document has {end} above {begin}; swap the two lines")
        text = f"{before}{begin}\n{part}\n{end}{after}"
    return text


def is_current(document: Path, parts: Mapping[str, str]) -> bool:
    """Whether a document holds `parts` already. Raises ValueError, naming it, if it lacks the marks of a part."""
    return _filled(document, parts) == document.read_text(encoding="utf-8")


def write_parts(document: Path, parts: Mapping[str, str]) -> None:
    """Put `parts` into a document. Raises ValueError, naming it, if it lacks the marks of a part."""
    text = _filled(document, parts)
    with atomic_write(document, "w") as file:
        file.write(text)


def _filled(document: Path, parts: Mapping[str, str]) -> str:
    try:
        return fill(document.read_text(encoding="utf-8"), parts)
    except ValueError as error:
        raise ValueError(f"{document}: {error}") from error


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str = "") -> str:
    """A Markdown table. `align` has a letter per column, l (left) or r (right); the default is left for all."""
    rule = [_ALIGNMENT[letter] for letter in align or "l" * len(head)]
    lines = [_table_line(head), f"| {' | '.join(rule)} |"]
    lines += [_table_line(row) for row in rows]
    return "\n".join(lines)


def _table_line(cells: Sequence[str]) -> str:
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"
