"""Record what reproducing each published table takes."""

from pathlib import Path

import click

try:
    from edm2kit.cli import click_types as cli
    from edm2kit.experiments.documents import checkout
    from edm2kit.experiments.paper_tables.document import RECORD, make_record
    from edm2kit.torch_utils.files import write_json
except ModuleNotFoundError as error:
    if error.name != "edm2kit":
        raise
    raise SystemExit("Error: the package edm2kit is not installed in this Python. Run: pip install -e .") from error


@click.command(cls=cli.Command)
@click.option(
    "--dest",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"JSON file to write.  [default: {RECORD} in the checkout]",
)
def main(dest: Path | None) -> None:
    """Count files, evaluations and multiply-adds of every cell of every table, which takes a minute.

    Nothing is downloaded. Run scripts/write_documents.py afterwards to update docs/reproduction.md.
    """
    write_json(dest or checkout() / RECORD, make_record("python scripts/reproduction_record.py"))


if __name__ == "__main__":
    main()
