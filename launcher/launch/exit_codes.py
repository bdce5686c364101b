"""The exit codes of a command that did not succeed and was not stopped by a signal."""

FAILED = 1  # a rank failed, or a comparison found a difference
REFUSED = 2  # the config or the command line is wrong
