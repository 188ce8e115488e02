"""Measure the order of convergence of every solver."""

try:
    from edm2kit.experiments.solvers.report import main
except ModuleNotFoundError as error:
    if error.name != "edm2kit":
        raise
    raise SystemExit("Error: the package edm2kit is not installed in this Python. Run: pip install -e .") from error

if __name__ == "__main__":
    main()
