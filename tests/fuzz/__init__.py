"""Draw layouts and automatic faults from a seed, and count what `launcher verify` and the tests catch."""
