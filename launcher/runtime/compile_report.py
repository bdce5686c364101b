"""Reports the time that compiling took, apart from the time of steps, and a failure of the compiler."""

from launcher.models.compiled import BlockRunner
from launcher.runtime.metrics.rows import Row


class CompileReport:
    """Reports each compilation of this rank once: in the next logged row, and in a line for the user."""

    def __init__(self, blocks: BlockRunner) -> None:
        self._blocks = blocks
        self._seconds, self._has_warned = blocks.seconds, blocks.problem is not None

    def after(self, failed: bool) -> tuple[Row, list[str]]:
        """Return columns of a logged row and lines to print; `failed` says that a rank could not compile."""
        seconds, self._seconds = self._blocks.seconds - self._seconds, self._blocks.seconds
        row: Row = {"perf/compile_time_s": seconds} if seconds else {}
        if failed and not self._has_warned:
            self._has_warned = True
            return row, [f"warning  {words_of(self._blocks.problem)}"]
        if not seconds or self._blocks.problem:
            return row, []
        line = f"compile  {seconds:.1f} s for the transformer blocks and the loss, not counted as step time"
        return row, [line]


def words_of(problem: str | None) -> str:
    """Return the warning about a failure of the compiler, on this rank or on another rank."""
    where = problem or "blocks or loss of another rank run eager"
    return f"{where}\n         try: training.compile=false, which compiles nothing"
