"""Make and check training sets: the same command as edm2kit-dataset."""

try:
    from edm2kit.cli import help_pages

    if __name__ == "__main__":
        help_pages.answer("dataset")  # before torch is imported, which takes a second

    from edm2kit.cli.dataset import main
except ModuleNotFoundError as error:
    if error.name != "edm2kit":
        raise
    raise SystemExit("Error: the package edm2kit is not installed in this Python. Run: pip install -e .") from error

if __name__ == "__main__":
    main()
