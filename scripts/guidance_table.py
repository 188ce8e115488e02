"""Write the table of guidance methods into docs/guidance.md."""

from pathlib import Path

import click

from edm2kit.cli import click_types as cli
from edm2kit.guidance.table import table_markdown, with_table
from edm2kit.torch_utils.files import atomic_write

DOCUMENT = Path(__file__).parents[1] / "docs" / "guidance.md"


@click.command(cls=cli.Command)
@click.option("--document", type=click.Path(path_type=Path, dir_okay=False), default=DOCUMENT, help="Where it stands.")
def main(document: Path) -> None:
    """Replace the table of guidance methods in docs/guidance.md by what edm2kit/guidance/registry.py says today.

    \b
    python scripts/guidance_table.py
    """
    text = with_table(document.read_text(encoding="utf-8"), table_markdown())
    with atomic_write(document, "w") as file:
        file.write(text)


if __name__ == "__main__":
    main()
