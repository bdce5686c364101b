"""Operations of attention between its two projections: norms, rotary positions, the core, merged heads."""

from launcher.config.schema import Dtype, QueryKeyNorm
from launcher.planning.cost.context_operations import context_core
from launcher.planning.cost.operations import FP32, Collective, FusedAttention, Matmul, Operation
from launcher.planning.cost.sizes import Sizes


def head_norms(s: Sizes) -> list[Operation]:
    """Return the norms of queries and keys (models/norms.py, HeadNorm), if there are any."""
    if s.query_key_norm is QueryKeyNorm.none:
        return []
    sizes = (("query_normed", s.query, s.heads), ("key_normed", s.key, s.kv_heads))
    return [_head_norm(s, name, size, heads) for name, size, heads in sizes]


def _head_norm(s: Sizes, name: str, size: int, heads: int) -> Operation:
    joins_heads, split = s.query_key_norm is QueryKeyNorm.projection, s.tensor > 1
    low = s.dtype is not Dtype.fp32
    fp32 = size // s.element * FP32
    rows = FP32 * s.tokens * (1 if joins_heads else heads)
    sums = (Collective("all_reduce", rows),) if joins_heads and split else ()
    has_copies_of_weight = not joins_heads and split and not s.is_frozen
    weight = (Collective("all_reduce", s.head_size * s.element),) if has_copies_of_weight else ()
    is_composite = s.device == "cpu" or bool(sums)
    copies = fp32 * (low + (not s.is_frozen)) if is_composite else 0
    return Operation(
        name, ("qkv",), size, saves=() if is_composite and low else ("qkv",), extra=rows + copies,
        scratch=fp32 if is_composite else 0, gradients=(size,), joins=True,
        backward_scratch=3 * fp32 if is_composite else 0,
        forward_traffic=sums, backward_traffic=sums + weight,
        forward_bytes=2 * size + 3 * copies, backward_bytes=3 * size + 6 * copies,
        kernels=8 if is_composite else 1,
    )  # fmt: skip


def attention(s: Sizes) -> list[Operation]:
    """Return the operations from queries, keys and values to the mixed values of all heads."""
    separate = ("query_normed", "key_normed") if s.query_key_norm is not QueryKeyNorm.none else ()
    operations = _rotation(s, separate) if s.rotates else []
    inputs = (*(("rotated",) if s.rotates else separate), "qkv")
    if s.context > 1:
        return [*operations, context_core(s, inputs, _gradients(s))]
    if s.caps_scores:
        operations += _capped(s, inputs)
    else:
        operations += stored_scores(s, inputs) if s.stores_scores else [fused_attention(s, inputs)]
    if s.stores_scores or s.caps_scores:
        # (B, heads, T, D) -> (B, T, heads D): fused attention writes in that order.
        operations.append(
            Operation("merged", ("core",), s.query, forward_bytes=2 * s.query, backward_bytes=0)
        )
    return operations


def _rotation(s: Sizes, separate: tuple[str, ...]) -> list[Operation]:
    turned = s.query + s.key
    # Compiled: one kernel. Eager: halves are multiplied by cosines and sines, added and joined.
    passes, kernels = (2, 1) if s.compiled else (5, 14)
    return [
        Operation(
            "rotated", separate or ("qkv",), turned, scratch=s.query // 2,
            gradients=(s.query, s.key) if separate else (turned,), joins=True,
            backward_scratch=s.query // 2,
            forward_bytes=passes * turned, backward_bytes=passes * turned, kernels=kernels,
        ),
    ]  # fmt: skip


def _gradients(s: Sizes) -> tuple[int, ...]:
    """Return the sizes of the gradients of the inputs: queries and keys apart from values, or one of all."""
    if s.rotates:
        return (s.query + s.key, s.key)
    return (s.query, s.key, s.key) if s.query_key_norm is not QueryKeyNorm.none else (s.fused,)


def fused_attention(s: Sizes, inputs: tuple[str, ...]) -> Operation:
    """Return FlashAttention (arXiv 2205.14135): keeps a number per row and recomputes the scores."""
    fused = FusedAttention(s.length, s.head_size, s.micro_batch * s.heads, s.is_causal)
    copies, kept, saves = 0, 0, (*inputs, "core")
    if s.repeats_keys:  # copies are kept instead of keys and values
        copies, kept, saves = 2 * s.query, s.query if s.rotates else 0, ("core",)
        saves = saves if s.rotates else (inputs[0], "core")
    # A GPU's kernel moves its operands within its rate, so only the join of the gradients is left.
    moved = s.fused + s.query if s.device == "cpu" else 0
    return Operation(
        "core", inputs, s.query, saves=saves, extra=FP32 * s.tokens * s.heads + copies + kept,
        # The gradients of queries, keys and values, and their join.
        backward_scratch=s.fused + copies, gradients=_gradients(s), joins=True,
        forward_matmuls=(fused.product,) * 2, backward_matmuls=(fused.product,) * 5, attention=fused,
        forward_bytes=moved + 2 * copies,
        backward_bytes=2 * (moved or s.fused) + 2 * copies,
    )  # fmt: skip


def _capped(s: Sizes, inputs: tuple[str, ...]) -> list[Operation]:
    """Return attention with a soft cap, which keeps the tanh of the scores and their softmax."""
    product = Matmul(s.length, s.length, s.head_size, s.micro_batch * s.heads)
    low = s.dtype is not Dtype.fp32
    scores = s.scores // FP32 * s.element
    weights = s.scores + (scores if low else 0)
    copies = 3 * s.query
    # Dropout keeps a byte per weight on CUDA, on CPU the scaled mask, and its result.
    dropped = scores + (scores // s.element if s.device == "cuda" else scores) if s.dropout else 0
    return [
        Operation(
            "scores", inputs, weights, extra=copies + scores + dropped, scratch=2 * scores, saves=("scores",),
            gradients=_gradients(s), joins=True,
            forward_matmuls=(product,), backward_matmuls=(product,) * 2,
            backward_scratch=s.scores,
            forward_bytes=s.fused + 10 * scores + 2 * s.scores, backward_bytes=10 * scores + 3 * s.scores,
            kernels=12,
        ),
        Operation(
            "core", ("scores",), s.query, saves=("scores",), gradients=(scores,),
            forward_matmuls=(product,), backward_matmuls=(product,) * 2,
            forward_bytes=scores, backward_bytes=2 * scores,
        ),
    ]  # fmt: skip


def stored_scores(s: Sizes, inputs: tuple[str, ...]) -> list[Operation]:
    """Return torch's math kernel: keeps the scores' softmax; with dropout also the mask and the result."""
    product = Matmul(s.length, s.length, s.head_size, s.micro_batch * s.heads)
    low = s.dtype is not Dtype.fp32
    copies = 3 * s.query // s.element * FP32  # queries, keys and values, repeated for their group
    return [
        Operation(
            "scores", inputs, s.scores, extra=copies + (2 * s.scores if s.dropout else 0),
            scratch=s.scores // 2 + 12 * s.query if low else s.scores, gradients=_gradients(s), joins=True,
            forward_matmuls=(product,), backward_matmuls=(product,) * 2,
            forward_bytes=s.fused + 6 * s.scores, backward_bytes=2 * s.fused + 8 * s.scores, kernels=8,
        ),
        Operation(
            "core", ("scores",), s.query, saves=("scores",), backward_scratch=6 * s.query if low else s.query,
            forward_matmuls=(product,), backward_matmuls=(product,) * 2,
            forward_bytes=s.scores, backward_bytes=2 * s.scores,
        ),
    ]  # fmt: skip
