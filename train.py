"""Train a diffusion network: the same command as edm2kit-train."""

from edm2kit.cli import help_pages

if __name__ == "__main__":
    help_pages.answer("train")  # before torch is imported, which takes a second

from edm2kit.cli.train import main

if __name__ == "__main__":
    main()
