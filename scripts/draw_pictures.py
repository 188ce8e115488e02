"""Draw the demo's data set."""

try:
    from edm2kit.experiments.demo.pictures import main
except ModuleNotFoundError as error:
    if error.name != "edm2kit":
        raise
    raise SystemExit("Error: the package edm2kit is not installed in this Python. Run: pip install -e .") from error

if __name__ == "__main__":
    main()
