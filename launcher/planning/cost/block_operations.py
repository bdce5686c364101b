"""Operations of a transformer block."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from launcher.config.schema import ActivationCheckpointing
from launcher.planning.cost.adapter_operations import adapted_column, adapted_row
from launcher.planning.cost.attention_operations import attention, head_norms
from launcher.planning.cost.expert_operations import experts
from launcher.planning.cost.layer_operations import activation, dropout, dropped, norm, residual
from launcher.planning.cost.operations import Operation
from launcher.planning.cost.sizes import Sizes


def block(s: Sizes) -> list[Operation]:
    """Return the operations from `input` to the residual sum `output`, as models/blocks.py computes it."""
    return _block(s, _mlp)


def sparse_block(s: Sizes) -> list[Operation]:
    """Return the operations of a block with experts in place of the MLP.

    Compiled blocks run eager after the sum of attention, because the sizes of experts differ from step to
    step (models/blocks.py).
    """
    if not s.compiled:
        return _block(s, experts)
    compiled, eager = _block(s, experts), _block(replace(s, compiled=False), experts)
    half = 1 + next(index for index, operation in enumerate(compiled) if operation.name == "residual")
    return [*compiled[:half], *(replace(operation, is_eager=True) for operation in eager[half:])]


def _block(s: Sizes, second: Callable[[Sizes, str], list[Operation]]) -> list[Operation]:
    attended = "input" if s.is_parallel else "residual"
    return [
        *_branch(s, "attention", "input", _attention(s, "attention_norm" if s.norm_before else "input")),
        residual(s, "residual", "input", _end(s, "attention")),
        *_branch(s, "mlp", attended, second(s, "mlp_norm" if s.norm_before else attended)),
        residual(s, "output", "residual", _end(s, "mlp")),
    ]


def _branch(s: Sizes, name: str, x: str, inner: list[Operation]) -> list[Operation]:
    """Return attention or the MLP with its norms and its dropout."""
    before = [norm(s, f"{name}_norm", x)] if s.norm_before else []
    after = [norm(s, f"{name}_output_norm", name)] if s.norm_after else []
    return [*before, *inner, *after, *dropout(s, _last(s, name))]


def _last(s: Sizes, name: str) -> str:
    return f"{name}_output_norm" if s.norm_after else name


def _end(s: Sizes, name: str) -> str:
    return dropped(s, _last(s, name))


def _attention(s: Sizes, x: str) -> list[Operation]:
    core, query_columns = attention(s), s.heads * s.head_size
    qkv_columns = query_columns + 2 * s.kv_heads * s.head_size
    return [
        *adapted_column(s, "qkv", x, qkv_columns, target="qkv", segments=3, has_bias=s.biases.qkv),
        *head_norms(s),
        *core,
        *adapted_row(s, "attention", core[-1].name, query_columns, target="output", has_bias=s.biases.output),
    ]


def _mlp(s: Sizes, x: str) -> list[Operation]:
    columns, segments = s.ffn_hidden_size // s.tensor, 2 if s.is_gated else 1
    up = adapted_column(s, "up", x, columns * segments, target="up", segments=segments, has_bias=s.biases.up)
    return [
        *up,
        *activation(s, "up", "activated", s.ffn),
        *adapted_row(s, "mlp", "activated", columns, target="down", has_bias=s.biases.down),
    ]


def recomputed(s: Sizes, program: Sequence[Operation]) -> list[Operation]:
    """Return the operations of a block that activation checkpointing drops after the forward pass."""
    if s.checkpointing is ActivationCheckpointing.full:
        return list(program)
    core = attention(s) if s.checkpointing is ActivationCheckpointing.selective else []
    return [operation for operation in program if operation in core]
