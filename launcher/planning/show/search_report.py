"""Report the search of `parallelism=auto` as tables and as JSON."""

from typing import TYPE_CHECKING, Any

from launcher.config.errors import as_typed
from launcher.planning.choose.search import LEFT_FREE, Candidate, Search
from launcher.text import four_digits, plain_table, print_table, size

if TYPE_CHECKING:
    from rich.table import Table

BEST = 5
# Words for Candidate.concerns.
CONCERNS = (
    "waits for the host",
    "tensor groups cross nodes",
    f"leaves less than {LEFT_FREE:.0%} of memory",
)


def print_search(search: Search) -> None:
    without = " without offload" if search.leaves_out_offload else ""
    print(f"auto     {len(search.candidates)} legal layouts{without}, {len(search.fitting)} fit")
    ranks, asked = search.fitting[0].layout.world_size if search.fitting else 0, search.world.ranks
    if 0 < ranks < asked:
        print(f"note     no layout of all {asked} ranks divides the batch: planned on {ranks}")
        print("         a larger training.global_batch_size keeps more of them busy")
    for line in reasons(search):
        print(line)
    print()
    best = _columns("The best few")
    for candidate in search.fitting[:BEST]:
        best.add_row(*_row(candidate))
    print_table(best)
    print_table(_kinds(search))


def reasons(search: Search) -> list[str]:
    """Return lines that say why the layout was chosen, and what the next kind of layout costs."""
    if not search.fitting:
        return []
    best, other = search.fitting[0], search.runner_up
    why = f"the fastest, {four_digits(best.seconds)} s a step"
    if best is not search.fastest:
        slower = best.cautious / search.fastest.cautious - 1
        why = f"{four_digits(best.seconds)} s a step, {max(slower, 0):.1%} more than the fastest, and simpler"
    lines = [f"choice   {best.kind}: {why}"]
    for is_so, words in zip(best.concerns, CONCERNS, strict=True):
        lines += [f"         nothing else fits: {words}"] if is_so else []
    if other:
        lines.append(f"next     {other.kind}: {four_digits(other.seconds)} s a step, {why_lost(other, best)}")
    return lines


def _kinds(search: Search) -> "Table":
    table = _columns("Other kinds of layout, the fastest of each", "why not chosen")
    best = search.fitting[0] if search.fitting else None
    for kind, candidate in search.best_of_kinds.items():
        if best is None or kind != best.kind:
            table.add_row(*_row(candidate), why_lost(candidate, best))
    return table


def _columns(title: str, *more: str) -> "Table":
    table = plain_table(title)
    words = ("recompute", "sequence", "on host", *more)
    for name in (
        "pipeline x data (context) x tensor",
        "ZeRO",
        "micro-batch",
        *words[:3],
        "step, s",
        "memory",
        *more,
    ):
        table.add_column(name, justify="left" if name in words else "right", no_wrap=True)
    return table


def _row(candidate: Candidate) -> list[str]:
    layout, p = candidate.layout, candidate.run.parallelism
    context = f" ({p.context} {p.context_method.name})" if p.context > 1 else ""
    experts = f" (experts {layout.expert})" if layout.expert > 1 else ""
    return [
        f"{layout.pipeline} x {layout.data}{context}{experts} x {layout.tensor}",
        str(layout.zero_stage),
        str(candidate.run.training.micro_batch_size),
        p.activation_checkpointing.name,
        "split" if p.sequence_parallel else "",
        "all" if p.offload_parameters else "optimizer" if p.offload_optimizer else "",
        four_digits(candidate.seconds),
        size(candidate.peak),
    ]


def why_lost(candidate: Candidate, best: Candidate | None) -> str:
    if not candidate.fits_device:
        return f"does not fit in {size(candidate.budget or 0)}"
    if not candidate.fits:
        return f"needs {size(candidate.host)} of {size(candidate.host_budget or 0)} host memory"
    assert best is not None
    for is_so, is_of_best, words in zip(candidate.concerns, best.concerns, CONCERNS, strict=True):
        if is_so > is_of_best:
            return words
    slower = candidate.unhidden / best.unhidden - 1
    if slower < -0.0005 and candidate.cautious > best.cautious:
        kind = "with context ranks" if candidate.layout.context > 1 else "of ZeRO-3 between nodes"
        return f"not {candidate.doubt:.0%} faster, as a layout {kind} must be"
    if slower > 0.0005 and candidate.seconds < best.seconds:
        return f"{slower:.1%} slower if its traffic between nodes is not hidden"
    as_fast = f"as fast, with {size(candidate.peak)} instead of {size(best.peak)}"
    if slower < -0.0005:
        return f"{-slower:.1%} faster, and less simple"
    return f"{slower:.1%} slower" if slower > 0.0005 else as_fast


def search_as_json(search: Search) -> dict[str, Any]:
    best = search.fitting[0] if search.fitting else None
    lost = [
        {"class": kind, **_candidate_json(candidate), "why": why_lost(candidate, best)}
        for kind, candidate in search.best_of_kinds.items()
        if best is None or kind != best.kind
    ]
    fastest = [_candidate_json(candidate) for candidate in search.fitting[:BEST]]
    counts = {"legal": len(search.candidates), "fitting": len(search.fitting), "ranks": search.world.ranks}
    return {**counts, "reasons": reasons(search), "best": fastest, "lost": lost}


def _candidate_json(candidate: Candidate) -> dict[str, Any]:
    settings = {
        name: as_typed(value) if not isinstance(value, (int, bool)) else value
        for name, value in candidate.settings.items()
    }
    return {
        "settings": settings,
        "time_s": candidate.seconds,
        "memory": candidate.peak,
        "fits": candidate.fits,
    }
