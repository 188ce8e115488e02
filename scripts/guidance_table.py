"""Write the table of guidance methods into docs/guidance.md."""

import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from guidance.table import table_markdown, with_table
from torch_utils import cli
from torch_utils.files import atomic_write

DOCUMENT = Path(__file__).parents[1] / "docs" / "guidance.md"


@click.command(cls=cli.Command)
@click.option("--document", type=click.Path(path_type=Path, dir_okay=False), default=DOCUMENT, help="Where it stands.")
def main(document: Path) -> None:
    """Replace the table of guidance methods in docs/guidance.md by what guidance/registry.py says today.

    \b
    python scripts/guidance_table.py
    """
    text = with_table(document.read_text(encoding="utf-8"), table_markdown())
    with atomic_write(document, "w") as file:
        file.write(text)


if __name__ == "__main__":
    main()
