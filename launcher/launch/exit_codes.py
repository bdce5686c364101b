"""Exit codes of a command that failed without a stop signal."""

FAILED = 1  # a rank failed, a comparison found a difference, or no planned run fits into memory
REFUSED = 2  # the config or the command line is wrong
