"""Operations of the experts of a layer, as models/experts.py computes them, for an even router.

N tokens run through k of E experts each: N k rows. No token is dropped, so without expert parallelism the
rows of a rank, and with them its memory and its FLOPs, do not depend on the router. With it the experts of a
rank receive N k rows times the stated imbalance.
"""

import math

from launcher.config.schema import RouterKind
from launcher.planning.cost.layer_operations import activation, column, row
from launcher.planning.cost.operations import FP32, INT64, Collective, CollectiveKind, Matmul, Operation
from launcher.planning.cost.sizes import Sizes


def experts(s: Sizes, x: str) -> list[Operation]:
    """Return the operations from the input `x` of the experts to `mlp`, their output."""
    routed = [*_router(s, x), *_products(s, x)]
    if not s.experts.shared:
        return [*routed, _leave(s, "mlp")]
    columns = s.experts.shared * s.experts.ffn_hidden_size // s.tensor
    segments = 2 if s.is_gated else 1
    return [
        *routed,
        _leave(s, "routed"),
        column(s, "shared.up", x, columns * segments, has_bias=False),
        *activation(s, "shared.up", "shared.activated", s.tokens * columns * s.element),
        row(s, "shared", "shared.activated", columns, has_bias=False),
        Operation("mlp", ("routed", "shared"), s.stretch, adds=True, forward_bytes=3 * s.stretch),
    ]


def _router(s: Sizes, x: str) -> list[Operation]:
    """Return logits, scores and the weights of the chosen experts, alike on every tensor rank, in fp32."""
    e, h = s.experts, s.hidden_size
    logits, chosen = s.tokens * e.count * FP32, s.tokens * e.top_k
    matrix = e.count * h
    is_low, trains = s.element < FP32, not s.is_frozen
    copies = FP32 * (s.own_tokens * h + matrix) if is_low else 0
    # Without a gradient of the weight (LoRA) the input, or its copy in fp32, is not kept.
    kept = copies if trains else FP32 * matrix * is_low
    gathered = (Collective("all_gather", logits),) if s.sequence_parallel else ()
    reduced = (Collective("all_reduce", matrix * s.element),) if s.sequence_parallel and trains else ()
    product = Matmul(s.own_tokens, e.count, h)
    of_weight = (Matmul(e.count, h, s.own_tokens),) if trains else ()
    is_softmax = e.router is RouterKind.softmax
    shares = logits + s.tokens * FP32 if e.auxiliary_loss and not is_softmax else 0
    normalized = chosen * FP32 + s.tokens * FP32 if e.normalize_top_k else 0
    # With tensor ranks, the gradients of the weights of the chosen experts are all-reduced.
    split = (Collective("all_reduce", chosen * FP32),) if s.tensor > 1 else ()
    # Context ranks add up the uses of the experts of each sequence.
    shared = (Collective("all_reduce", s.micro_batch * e.count * FP32),) if s.context > 1 else ()
    return [
        Operation(
            "logits", (x,), logits, saves=(x,) if trains and not is_low else (), extra=kept,
            scratch=max(logits if s.sequence_parallel else 0, copies - kept),
            backward_scratch=copies if trains else FP32 * s.own_tokens * h * is_low,
            weight=matrix * (FP32 if is_low else s.element) * trains, forward_matmuls=(product,),
            backward_matmuls=(Matmul(s.own_tokens, h, e.count), *of_weight),
            forward_traffic=gathered, backward_traffic=reduced, forward_bytes=3 * copies,
            backward_bytes=3 * copies, kernels=1 + 2 * is_low,
        ),
        Operation(
            "routing", ("logits",), logits, saves=("routing", *(("logits",) if e.z_loss else ())),
            extra=2 * s.tokens * FP32 * bool(e.z_loss) + shares,
            backward_scratch=logits if e.auxiliary_loss or e.z_loss else 0,
            forward_bytes=4 * logits, backward_bytes=6 * logits, kernels=8,
        ),
        Operation(
            "chosen", ("routing",), chosen * FP32, extra=chosen * INT64 + normalized, scratch=chosen * INT64,
            backward_traffic=split, forward_context=shared, forward_bytes=2 * logits,
            backward_bytes=2 * logits, kernels=8,
        ),
    ]  # fmt: skip


def _products(s: Sizes, x: str) -> list[Operation]:
    """Return the operations that sort rows by expert, multiply them, and add them up for each token."""
    e, h = s.experts, s.hidden_size
    rows = s.tokens * e.top_k
    columns, segments = e.ffn_hidden_size // s.tensor, 2 if s.is_gated else 1
    whole = rows * h * s.element
    entered = Collective("all_gather", s.whole), Collective(s.scatters, s.whole)
    reduced = (Collective("all_reduce", s.whole),) if s.tensor > 1 else ()
    is_split, is_distributed = s.sequence_parallel, s.expert > 1
    # Experts.forward refers to the rows until the experts have run, even if no weight's gradient needs them.
    held = _received(s) * h * s.element if s.is_frozen else 0
    return [
        Operation(
            "rows", (x,), whole, extra=2 * rows * INT64,
            scratch=2 * s.whole if is_split else 0, backward_scratch=whole + s.whole + s.summing,
            forward_traffic=entered[:1] if is_split else (),
            backward_traffic=entered[1:] if is_split else reduced,
            forward_bytes=2 * whole, backward_bytes=3 * whole, kernels=6,
        ),
        *(_dispatch(s) if is_distributed else []),
        _product(s, "up", "sorted" if is_distributed else "rows", h, columns * segments),
        *activation(s, "up", "activated", _received(s) * columns * s.element),
        _product(s, "down", "activated", columns, h, scratch=held),
        *(_combine(s, held) if is_distributed else []),
        Operation(
            "collected", ("returned" if is_distributed else "down", "chosen"), s.whole,
            extra=whole + (rows * s.element if s.element < FP32 else 0),
            forward_matmuls=(Matmul(1, h, e.top_k, s.tokens),),
            backward_matmuls=(Matmul(1, e.top_k, h, s.tokens), Matmul(e.top_k, h, 1, s.tokens)),
            forward_bytes=3 * whole, backward_bytes=5 * whole, kernels=3,
        ),
    ]  # fmt: skip


def _received(s: Sizes) -> int:
    """Return the rows that the experts of a rank compute."""
    return math.ceil(s.tokens * s.experts.top_k * s.imbalance)


def _dispatch(s: Sizes) -> list[Operation]:
    """Return the operations that send rows to the ranks of their experts, and sort the received rows."""
    row = s.hidden_size * s.element
    received, rows = _received(s), Collective("all_to_all", s.tokens * s.experts.top_k * row)
    numbers = Collective("all_to_all", s.experts.count * INT64)
    return [
        Operation(
            "exchanged", ("rows",), received * row, forward_exchange=(numbers, rows),
            backward_exchange=(rows,), kernels=8,
        ),
        Operation(
            "sorted", ("exchanged",), received * row, extra=2 * received * INT64,
            backward_scratch=received * row, forward_bytes=2 * received * row,
            backward_bytes=3 * received * row, kernels=6,
        ),
    ]  # fmt: skip


def _combine(s: Sizes, held: int) -> list[Operation]:
    """Return the operations that send results back to the ranks of their tokens, while `held` bytes stay."""
    row = s.hidden_size * s.element
    received, rows = _received(s), Collective("all_to_all", s.tokens * s.experts.top_k * row)
    moved = 2 * received * row
    return [
        Operation(
            "unsorted", ("down",), received * row, scratch=held, forward_bytes=moved, backward_bytes=moved
        ),
        Operation(
            "returned", ("unsorted",), rows.size, scratch=held, forward_exchange=(rows,),
            backward_exchange=(rows,),
        ),
    ]  # fmt: skip


def _product(s: Sizes, name: str, x: str, inputs: int, outputs: int, *, scratch: int = 0) -> Operation:
    """Return a product of each expert with its own rows."""
    count, rows = s.experts.count // s.expert, _received(s)
    each, more = divmod(rows, count)
    stretches = [(each + 1, more), (each, count - more)]
    used = [(m, number) for m, number in stretches if m and number]
    trains = not s.is_frozen
    of_rows = tuple(Matmul(m, inputs, outputs, number) for m, number in used)
    of_weights = tuple(Matmul(outputs, inputs, m, number) for m, number in used) if trains else ()
    return Operation(
        name, (x,), rows * outputs * s.element, saves=(x,) if trains else (), scratch=scratch,
        weight=count * inputs * outputs * s.element * trains,
        forward_matmuls=tuple(Matmul(m, outputs, inputs, number) for m, number in used),
        backward_matmuls=of_rows + of_weights,
        kernels=min(count, rows), is_loop=True,
    )  # fmt: skip


def _leave(s: Sizes, name: str) -> Operation:
    """Return the sum over the tensor ranks."""
    split, is_scattered = s.tensor > 1, s.sequence_parallel
    kind: CollectiveKind = s.scatters if is_scattered else "all_reduce"
    return Operation(
        name, ("collected",), s.stretch, scratch=s.scattering + s.summing,
        backward_scratch=s.laid_out, gradients=(s.whole,),
        forward_traffic=(Collective(kind, s.whole),) if split else (),
        backward_traffic=(Collective("all_gather", s.whole),) if is_scattered else (),
        forward_bytes=2 * s.whole if split else 0, kernels=int(split),
    )  # fmt: skip
