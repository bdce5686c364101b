"""Exit codes of a command that failed without a stop signal."""

FAILED = 1  # a rank failed, or a comparison found a difference
REFUSED = 2  # the config or the command line is wrong
