"""Score generated images: the same command as edm2kit-metrics."""

from edm2kit.cli import help_pages

if __name__ == "__main__":
    help_pages.answer("metrics")  # before torch is imported, which takes a second

from edm2kit.cli.metrics import main

if __name__ == "__main__":
    main()
