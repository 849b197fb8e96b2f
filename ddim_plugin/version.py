"""The package's version, read at build time without importing anything else."""

__version__ = "0.2.0"
