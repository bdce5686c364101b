"""Operations of a transformer block."""

from collections.abc import Sequence

from launcher.config.schema import ActivationCheckpointing
from launcher.planning.cost.attention_operations import attention
from launcher.planning.cost.layer_operations import column, dropout, dropped, norm, residual, row
from launcher.planning.cost.operations import Operation
from launcher.planning.cost.sizes import Sizes


def block(s: Sizes) -> list[Operation]:
    """Return the operations from `input` to the residual sum `output`, as models/blocks.py computes it."""
    core, query_columns = attention(s), s.heads * s.head_size
    qkv_columns = query_columns + 2 * s.kv_heads * s.head_size
    mlp_columns = s.ffn_hidden_size // s.tensor
    up_columns = mlp_columns * (2 if s.is_gated else 1)
    return [
        norm(s, "attention_norm", "input"),
        column(s, "qkv", "attention_norm", qkv_columns, has_bias=s.biases.qkv),
        *core,
        row(s, "attention", core[-1].name, query_columns, has_bias=s.biases.output),
        *dropout(s, "attention"),
        residual(s, "residual", "input", dropped(s, "attention")),
        norm(s, "mlp_norm", "residual"),
        column(s, "up", "mlp_norm", up_columns, has_bias=s.biases.up),
        *(_swiglu(s) if s.is_gated else [_gelu(s)]),
        row(s, "mlp", "activated", mlp_columns, has_bias=s.biases.down),
        *dropout(s, "mlp"),
        residual(s, "output", "residual", dropped(s, "mlp")),
    ]


def recomputed(s: Sizes, program: Sequence[Operation]) -> list[Operation]:
    """Return the operations of a block that activation checkpointing drops after the forward pass."""
    if s.checkpointing is ActivationCheckpointing.full:
        return list(program)
    core = attention(s) if s.checkpointing is ActivationCheckpointing.selective else []
    return [operation for operation in program if operation in core]


def _gelu(s: Sizes) -> Operation:
    return Operation(
        "activated", ("up",), s.ffn, saves=("up",), forward_bytes=2 * s.ffn, backward_bytes=3 * s.ffn
    )


def _swiglu(s: Sizes) -> list[Operation]:
    if s.compiled:  # one kernel, which the backward pass runs again instead of keeping silu's result
        return [
            Operation(
                "activated", ("up",), s.ffn, saves=("up",), gradients=(2 * s.ffn,),
                forward_bytes=3 * s.ffn, backward_bytes=5 * s.ffn,
            ),
        ]  # fmt: skip
    return [
        Operation(
            "silu", ("up",), s.ffn, saves=("up",), gradients=(s.ffn,), joins=True,
            forward_bytes=2 * s.ffn, backward_bytes=7 * s.ffn,
        ),
        Operation(
            "activated", ("silu", "up"), s.ffn, saves=("silu", "up"), gradients=(s.ffn, s.ffn), joins=True,
            forward_bytes=3 * s.ffn, backward_bytes=6 * s.ffn,
        ),
    ]  # fmt: skip
