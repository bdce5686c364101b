"""Operations of projections with adapters (LoRA), as models/lora.py computes them."""

from launcher.planning.cost.layer_operations import column, row
from launcher.planning.cost.operations import BOOL, Collective, Matmul, Operation
from launcher.planning.cost.sizes import Sizes


def adapted_column(
    s: Sizes, name: str, x: str, outputs: int, *, target: str, segments: int, has_bias: bool
) -> list[Operation]:
    """Return a column-parallel projection to `outputs` columns of this rank, with its adapters if any."""
    if not s.adapts(target):
        return [column(s, name, x, outputs, has_bias=has_bias)]
    h, rank, split = s.hidden_size, s.adapters.rank, s.tensor > 1
    low, size = s.tokens * segments * rank * s.element, s.tokens * outputs * s.element
    own_low = low // s.tokens * s.own_tokens
    dropped = _dropped(s, name, x, s.stretch)
    matrix, first = segments * rank * h, dropped[0].name if dropped else x
    reduced = (Collective(s.scatters if s.sequence_parallel else "all_reduce", low),) if split else ()
    gathered = (Collective("all_gather", low),) if s.sequence_parallel else ()
    whole = (Collective("all_reduce", matrix * s.element),) if s.sequence_parallel else ()
    return [
        column(s, f"{name}.base", x, outputs, has_bias=has_bias),
        *dropped,
        Operation(
            f"{name}.low", (first,), low, saves=(first,),
            scratch=2 * own_low, weight=matrix * s.element, backward_scratch=own_low,
            forward_matmuls=(Matmul(s.own_tokens, segments * rank, h),),
            backward_matmuls=(
                Matmul(s.own_tokens, h, segments * rank), Matmul(segments * rank, h, s.own_tokens)
            ),
            forward_traffic=gathered, backward_traffic=reduced + whole,
            forward_bytes=2 * own_low, backward_bytes=2 * own_low, kernels=2 + split,
        ),
        Operation(
            f"{name}.adapter", (f"{name}.low",), size, saves=(f"{name}.low",),
            scratch=size if segments > 1 else 0, weight=2 * outputs * rank * s.element,
            forward_matmuls=(Matmul(s.tokens, outputs, rank),),
            backward_matmuls=(Matmul(s.tokens, rank, outputs), Matmul(outputs, rank, s.tokens)),
            # Compiled: the pieces are joined where they are added to the projection's output.
            forward_bytes=2 * size if segments > 1 and not s.compiled else 0, kernels=2 * segments,
        ),
        _sum(s, name, size),
    ]  # fmt: skip


def adapted_row(s: Sizes, name: str, x: str, inputs: int, *, target: str, has_bias: bool) -> list[Operation]:
    """Return a row-parallel projection of `inputs` columns on this rank, with its adapter if it has one."""
    if not s.adapts(target):
        return [row(s, name, x, inputs, has_bias=has_bias)]
    h, rank, split = s.hidden_size, s.adapters.rank, s.tensor > 1
    low = s.tokens * rank * s.element
    own_low = low // s.tokens * s.own_tokens
    dropped = _dropped(s, name, x, s.tokens * inputs * s.element)
    first = dropped[0].name if dropped else x
    leave = (Collective(s.scatters if s.sequence_parallel else "all_reduce", low),) if split else ()
    gathered = (Collective("all_gather", low),) if s.sequence_parallel else ()
    whole = (Collective("all_reduce", h * rank * s.element),) if s.sequence_parallel else ()
    return [
        row(s, f"{name}.base", x, inputs, has_bias=has_bias),
        *dropped,
        Operation(
            f"{name}.low", (first,), own_low, saves=(first,), scratch=2 * low,
            weight=rank * inputs * s.element,
            backward_scratch=low,
            forward_matmuls=(Matmul(s.tokens, rank, inputs),),
            backward_matmuls=(Matmul(s.tokens, inputs, rank), Matmul(rank, inputs, s.tokens)),
            forward_traffic=leave, backward_traffic=gathered,
            forward_bytes=2 * low, backward_bytes=2 * low, kernels=2 + split,
        ),
        Operation(
            f"{name}.adapter", (f"{name}.low",), s.stretch, saves=(f"{name}.low",),
            weight=h * rank * s.element,
            forward_matmuls=(Matmul(s.own_tokens, h, rank),),
            backward_matmuls=(Matmul(s.own_tokens, rank, h), Matmul(h, rank, s.own_tokens)),
            backward_traffic=whole,
        ),
        _sum(s, name, s.stretch),
    ]  # fmt: skip


def _dropped(s: Sizes, name: str, x: str, size: int) -> list[Operation]:
    """Return the dropout of the input of an adapter."""
    if s.adapters.dropout == 0.0:
        return []
    mask = size // s.element * BOOL if s.device == "cuda" else size
    moved = 2 * size + mask
    name = f"{name}.low.dropped"  # {name}.dropped is the dropout of the output
    return [Operation(name, (x,), size, extra=mask, forward_bytes=moved, backward_bytes=moved)]


def _sum(s: Sizes, name: str, size: int) -> Operation:
    parts = (f"{name}.base", f"{name}.adapter")
    return Operation(name, parts, size, adds=True, forward_bytes=3 * size, kernels=0 if s.compiled else 1)
