"""Builds the API pages from the docstrings: see --help."""

import importlib
import pkgutil
from pathlib import Path

import click

import edm2kit


def modules() -> list[str]:
    """The dotted names of all modules and subpackages of edm2kit."""
    return sorted(found.name for found in pkgutil.walk_packages(edm2kit.__path__, "edm2kit."))


def _is_found_by_pdoc(module: str) -> bool:
    """Whether pdoc documents a module with its package; if a package lists its contents, it leaves out modules."""
    package = importlib.import_module(module.rpartition(".")[0])
    return not hasattr(package, "__all__")


@click.command()
@click.option(
    "--dest",
    type=click.Path(path_type=Path, file_okay=False),
    default="site",
    show_default=True,
    help="Folder for the pages; site/index.html is the first one.",
)
def main(dest: Path) -> None:
    """Write an HTML page for every module of edm2kit, from its docstrings. Needs pdoc: pip install -e ".[docs]"."""
    try:
        import pdoc
    except ImportError as error:
        raise click.ClickException('pdoc is not installed; run: pip install -e ".[docs]"') from error
    pdoc.render.configure(docformat="markdown")
    more = [module for module in modules() if not _is_found_by_pdoc(module)]
    pdoc.pdoc("edm2kit", *more, output_directory=dest)
    click.echo(f"Wrote {len(list(dest.rglob('*.html')))} pages; open {dest / 'index.html'}")


if __name__ == "__main__":
    main()
