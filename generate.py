"""Generate images from a trained network: the same command as edm2kit-generate."""

from edm2kit.cli import help_pages

if __name__ == "__main__":
    help_pages.answer("generate")  # before torch is imported, which takes a second

from edm2kit.cli.generate import main

if __name__ == "__main__":
    main()
