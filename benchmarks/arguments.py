"""Types of command-line arguments."""

from argparse import ArgumentTypeError


def at_least_one(text: str) -> int:
    """Return the integer. Raises ArgumentTypeError, which argparse prints, for any other text."""
    if not (text.isdecimal() and int(text) >= 1):
        raise ArgumentTypeError(f"{text} is not an integer of at least 1")
    return int(text)
