"""Write what reproductions will need into docs/reproduction.md."""

import json
from pathlib import Path

import click

from edm2kit.cli import click_types as cli
from edm2kit.experiments.paper_tables.document import make_record, parts_of, with_parts
from edm2kit.torch_utils.files import atomic_write

DOCUMENT = Path(__file__).parents[1] / "docs" / "reproduction.md"


@click.command(cls=cli.Command)
@click.option("--document", type=click.Path(path_type=Path, dir_okay=False), default=DOCUMENT, help="Where it stands.")
@click.option("--from-record", is_flag=True, help="Only lay out the record beside it anew.")
def main(document: Path, from_record: bool) -> None:
    """Replace the tables in docs/reproduction.md by what the plans say today, by way of a record beside it.

    \b
    python scripts/reproduction_table.py
    """
    path = document.with_suffix(".json")
    if not from_record:
        record = make_record("python scripts/reproduction_table.py")
        with atomic_write(path, "w") as file:
            json.dump(record, file, indent=1)
    record = json.loads(path.read_text(encoding="utf-8"))
    text = with_parts(document.read_text(encoding="utf-8"), parts_of(record))
    with atomic_write(document, "w") as file:
        file.write(text)


if __name__ == "__main__":
    main()
