"""Operations of attention between its two projections: rotary positions, the core, the merged heads."""

from launcher.config.schema import Dtype
from launcher.planning.cost.operations import FP32, Attention, Matmul, Operation
from launcher.planning.cost.sizes import Sizes


def attention(s: Sizes) -> list[Operation]:
    """Return the operations from the fused projection `qkv` to the mixed values of all heads."""
    operations = _rotation(s) if s.rotates else []
    inputs = ("rotated", "qkv") if s.rotates else ("qkv",)
    operations += stored_scores(s, inputs) if s.stores_scores else [fused_attention(s, inputs)]
    if s.stores_scores:
        # (B, heads, T, D) -> (B, T, heads D): fused attention writes in that order.
        operations.append(
            Operation("merged", ("core",), s.query, forward_bytes=2 * s.query, backward_bytes=0)
        )
    return operations


def _rotation(s: Sizes) -> list[Operation]:
    turned = s.query + s.key
    # Compiled: one kernel. Eager: halves are multiplied by cosines and sines, added and joined.
    passes, kernels = (2, 1) if s.compiled else (5, 14)
    return [
        Operation(
            "rotated", ("qkv",), turned, scratch=s.query // 2, gradients=(turned,), joins=True,
            backward_scratch=s.query // 2,
            forward_bytes=passes * turned, backward_bytes=passes * turned, kernels=kernels,
        ),
    ]  # fmt: skip


def _gradients(s: Sizes) -> tuple[int, ...]:
    """Return gradient sizes: (queries and keys, values) if rotated, else one of all three."""
    return (s.query + s.key, s.key) if s.rotates else (s.fused,)


def fused_attention(s: Sizes, inputs: tuple[str, ...]) -> Operation:
    """Return FlashAttention (arXiv 2205.14135): keeps a number per row and recomputes the scores."""
    fused = Attention(s.length, s.head_size, s.micro_batch * s.heads, s.is_causal)
    return Operation(
        "core", inputs, s.query, saves=(*inputs, "core"), extra=FP32 * s.tokens * s.heads + s.mask,
        # The gradients of queries, keys and values, and their join.
        backward_scratch=s.fused, gradients=_gradients(s), joins=True,
        forward_matmuls=(fused.product,) * 2, backward_matmuls=(fused.product,) * 5, attention=fused,
        # A GPU's kernel moves its operands within its rate, so only the join of the gradients is left.
        forward_bytes=s.fused + s.query if s.device == "cpu" else 0,
        backward_bytes=2 * s.fused + 2 * s.query if s.device == "cpu" else 2 * s.fused,
    )  # fmt: skip


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
