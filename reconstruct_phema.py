"""Rebuild any EMA length after training: the same command as edm2kit-phema."""

from edm2kit.cli import help_pages

if __name__ == "__main__":
    help_pages.answer("phema")  # before torch is imported, which takes a second

from edm2kit.cli.phema import main

if __name__ == "__main__":
    main()
