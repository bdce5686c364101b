"""The console entry point: it maps each kind of exit to its message and exit code.

Exit codes: 0 done, 1 a rank failed, a layout differs or a plan does not fit, 2 refused, 130 Ctrl-C,
143 SIGTERM, 129 SIGHUP, 138 SIGUSR1, 141 if nobody reads the output of a command any longer.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    # `python -m` puts the working directory first, where a file of the user such as tokenize.py would replace
    # a module of the standard library. The directory of a checkout stays, as the last place to look.
    _working_directory = sys.path.pop(0)
    if __file__.startswith(f"{_working_directory}/"):
        sys.path.append(_working_directory)

import os
import signal

from launcher.streams import OutputLost, discard_output, open_standard_streams


def main() -> None:
    """Run the command of sys.argv."""
    open_standard_streams()
    # Python processes that this one starts do not import from the working directory either.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    try:
        # Inside, so that a Ctrl-C during these imports ends like any other.
        code = _run(sys.argv[1:])
        sys.stdout.flush()
        sys.exit(code)
    except OutputLost as lost:
        discard_output()  # Python flushes the rest at exit, and would complain
        if not lost.is_reader_gone:  # such as `head`, which has seen enough
            print(f"launcher: the output cannot be written: {lost.why}", file=sys.stderr)
        raise
    except KeyboardInterrupt as interrupt:
        from launcher.command_line import failure_during

        print(f"launcher: interrupted; all ranks have ended{failure_during(interrupt)}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _run(arguments: list[str]) -> int:
    try:
        from launcher.command_line import run_command
    except Exception as error:  # a package that the command line needs is missing or broken
        if arguments[:1] == ["doctor"]:
            from launcher.commands.doctor import main as doctor

            return doctor(arguments[1:])
        print(f"launcher: cannot start: {type(error).__name__}: {error}", file=sys.stderr)
        print("  try: launcher doctor (names the packages that are missing or broken)", file=sys.stderr)
        return 1
    return run_command(arguments)


if __name__ == "__main__":
    main()
