"""Operations of the layers that blocks and ends share: norm, linear layers, dropout, residual."""

from launcher.config.schema import Dtype, NormKind
from launcher.planning.cost.operations import BOOL, FP32, Collective, CollectiveKind, Matmul, Operation
from launcher.planning.cost.sizes import Sizes


def norm(s: Sizes, name: str, x: str, *, is_last: bool = False) -> Operation:
    """Return a norm; `is_last` if no other operation has a gradient of its input, as after the last block."""
    is_rms = s.norm is NormKind.rms_norm
    fp32 = FP32 * s.own_tokens * s.hidden_size
    statistics = s.own_tokens * (FP32 if is_rms or s.device != "cpu" else 2 * s.element)
    if s.device != "cpu" and not is_rms:
        statistics *= 2
    composite = is_rms and s.device == "cpu"  # torch has no fused RMSNorm there
    low = s.dtype is not Dtype.fp32
    # A composite norm keeps the normalised input in fp32, unless its weight is frozen, and an fp32 copy of a
    # low-precision input.
    copies = fp32 * (low + (not s.is_frozen)) if composite else 0
    kept, backward_scratch = statistics + copies, 3 * fp32 if composite else 0
    if composite and is_last and not low:
        # The peak is in the derivative of the square: five fp32 tensors. The normalised input and the
        # statistics are freed by then; in a block, the gradient that waits for the sum takes their place.
        backward_scratch -= kept
    vectors = 1 if is_rms else 2
    traffic = (Collective("all_reduce", vectors * s.hidden_size * s.element),)
    return Operation(
        name, (x,), s.stretch, saves=() if composite and low else (x,), extra=kept,
        scratch=fp32 if composite else 0, backward_scratch=backward_scratch,
        backward_traffic=traffic if s.sequence_parallel and not s.is_frozen else (),
        forward_bytes=2 * s.stretch + 3 * copies, backward_bytes=3 * s.stretch + 6 * copies,
        kernels=8 if composite else 1,
    )  # fmt: skip


def column(s: Sizes, name: str, x: str, outputs: int, *, has_bias: bool) -> Operation:
    """Return the operations of ColumnParallelLinear or the head: (b, H) -> (b, `outputs` of this rank)."""
    h, size = s.hidden_size, s.tokens * outputs * s.element
    split = s.tensor > 1
    scratch, backward_scratch = 0, s.summing
    traffic: tuple[Collective, ...] = ()
    overlapped = Collective("all_reduce", s.whole)
    if s.sequence_parallel:
        # Gathered pieces, then the whole sequence; backward also the gradient before it is scattered.
        scratch = max(s.whole, s.whole + s.laid_out - size)
        backward_scratch = 2 * s.whole + s.laid_out
        traffic, overlapped = (Collective("all_gather", s.whole),), Collective(s.scatters, s.whole)
    product = Matmul(s.tokens, outputs, h)
    if s.is_frozen:
        # No product for the weight's gradient: nothing overlaps the collective, and the input is not kept.
        return Operation(
            name, (x,), size, scratch=scratch,
            backward_scratch=s.whole + s.scattering + s.summing if split else 0,
            forward_matmuls=(product,), backward_matmuls=(Matmul(s.tokens, h, outputs),),
            forward_traffic=traffic, backward_traffic=(overlapped,) if split else (),
        )  # fmt: skip
    return Operation(
        name, (x,), size, saves=(x,), scratch=scratch, backward_scratch=backward_scratch,
        weight=h * outputs * s.element, forward_matmuls=(product,),
        backward_matmuls=(Matmul(s.tokens, h, outputs), Matmul(outputs, h, s.tokens)),
        forward_traffic=traffic, backward_traffic=traffic, overlapped_traffic=(overlapped,) if split else (),
        backward_bytes=size if has_bias else 0,
    )  # fmt: skip


def row(s: Sizes, name: str, x: str, inputs: int, *, has_bias: bool) -> Operation:
    """Return RowParallelLinear: `inputs` columns on this rank -> (b, H)."""
    h = s.hidden_size
    product = Matmul(s.tokens, h, inputs)
    split = s.tensor > 1
    kind: CollectiveKind = s.scatters if s.sequence_parallel else "all_reduce"
    gathered = (Collective("all_gather", s.whole),) if s.sequence_parallel else ()
    trains = not s.is_frozen
    weight_product = (Matmul(h, inputs, s.tokens),) if trains else ()
    copies, adds_bias = split and (s.sequence_parallel or s.compiled), split and has_bias
    return Operation(
        name, (x,), s.stretch, saves=(x,) if trains else (),
        # Partial sums and their copy ordered by rank. Without sequence parallelism they are summed in place.
        scratch=(s.whole if copies else 0) + s.scattering + s.summing,
        backward_scratch=s.whole if s.sequence_parallel else 0,
        backward_entry=s.whole + s.laid_out if s.sequence_parallel else 0,
        weight=h * inputs * s.element * trains,
        forward_matmuls=(product,),
        backward_matmuls=(Matmul(s.tokens, inputs, h), *weight_product),
        forward_traffic=(Collective(kind, s.whole),) if split else (),
        backward_traffic=gathered,
        forward_bytes=(2 * s.whole if copies else 0) + (2 * s.stretch if adds_bias else 0),
        backward_bytes=s.whole if has_bias and trains else 0, kernels=1 + copies + adds_bias,
    )  # fmt: skip


def activation(s: Sizes, x: str, name: str, size: int) -> list[Operation]:
    """Return the activation of the first projection `x` of an MLP; `size` is the bytes of its output."""
    if not s.is_gated:
        return [Operation(name, (x,), size, saves=(x,), forward_bytes=2 * size, backward_bytes=3 * size)]
    if s.compiled:  # one kernel, which the backward pass runs again instead of keeping silu's result
        return [
            Operation(
                name, (x,), size, saves=(x,), gradients=(2 * size,),
                forward_bytes=3 * size, backward_bytes=5 * size,
            ),
        ]  # fmt: skip
    gate = name.replace("activated", "gate")
    return [
        Operation(
            gate, (x,), size, saves=(x,), gradients=(size,), joins=True,
            forward_bytes=2 * size, backward_bytes=7 * size,
        ),
        Operation(
            name, (gate, x), size, saves=(gate, x), gradients=(size, size), joins=True,
            forward_bytes=3 * size, backward_bytes=6 * size,
        ),
    ]  # fmt: skip


def dropout(s: Sizes, x: str) -> list[Operation]:
    if s.dropout == 0.0:
        return []
    elements = s.stretch // s.element
    # CUDA's fused kernel keeps a byte per element, the CPU's composite kernel the scaled mask.
    mask = elements * BOOL if s.device == "cuda" else s.stretch
    return [
        Operation(
            f"{x}.dropped", (x,), s.stretch, extra=mask,
            # Compiled: part of the residual's kernels.
            forward_bytes=mask if s.compiled else 2 * s.stretch + mask,
            backward_bytes=mask if s.compiled else 2 * s.stretch + mask, kernels=0 if s.compiled else 1,
        ),
    ]  # fmt: skip


def dropped(s: Sizes, x: str) -> str:
    """Return the name of `x` after its dropout, if there is any."""
    return x if s.dropout == 0.0 else f"{x}.dropped"


def residual(s: Sizes, name: str, x: str, branch: str) -> Operation:
    # Compiled: the norm's kernels add its gradient, and read the sum while they write it.
    passes = 1 if s.compiled else 3
    return Operation(
        name, (x, branch), s.stretch, adds=True, forward_bytes=(passes + s.compiled) * s.stretch,
        backward_bytes=passes * s.stretch, kernels=0 if s.compiled else 1,
    )  # fmt: skip
