"""A campaign of faults: `python -m tests.faults --help`."""
