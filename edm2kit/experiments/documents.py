"""The parts of documents that are written by commands: each between two marks of its own."""


def fill_in(text: str, name: str, part: str) -> str:
    """`text` with `part` between the marks of `name`. Raises ValueError where it has no such marks."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"expected one {begin} and, below it, one {end}")
    return f"{text.split(begin)[0]}{begin}\n{part}\n{end}{text.split(end)[1]}"
