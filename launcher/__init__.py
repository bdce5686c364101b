"""Launcher: one Hydra config trains one model in any parallel layout, and proves it is the same run."""

__version__ = "0.1.0"
