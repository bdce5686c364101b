"""Norms, rotary positions, attention, MLP and the transformer block, written once for every model.

Shapes: B batch, T sequence, H hidden, D head size; N query heads and K key/value heads of the whole model.
Between modules activations are (B, T, H), or (B, T/tp, H) under sequence parallelism.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from launcher.config.schema import ActivationCheckpointing, Family, ModelConfig, RunConfig
from launcher.config.shape import end_of_document
from launcher.models.documents import Documents
from launcher.parallel.layers import ColumnParallelLinear, RowParallelLinear, TensorParallel
from launcher.parallel.mesh import ProcessMesh
from launcher.parallel.random import DropoutRandom
from launcher.parallel.sharding import DrawFunction, Initializer, LogicalTensor, normal, ones, zeros


@dataclass(frozen=True)
class BlockContext:
    """What the layers of a model share besides its config."""

    tp: TensorParallel
    random: DropoutRandom
    checkpointing: ActivationCheckpointing
    documents: Documents

    @classmethod
    def create(cls, run: RunConfig, mesh: ProcessMesh, device: torch.device) -> "BlockContext":
        """That of one rank. Seeds torch's default generator (see DropoutRandom)."""
        seed = run.training.seed
        initializer = Initializer(seed, mesh.tensor)
        random = DropoutRandom(
            seed, stage=mesh.stage, data_rank=mesh.data.rank, tensor_rank=mesh.tensor.rank, device=device
        )
        tp = TensorParallel(mesh.tensor, run.parallelism.sequence_parallel, initializer)
        documents = Documents(end_of_document(run) if run.data.document_attention else None)
        return cls(tp, random, run.parallelism.activation_checkpointing, documents)


class Norm(nn.Module):
    """LayerNorm with weight and bias (gpt, vit), or RMSNorm with weight (llama), over H."""

    def __init__(self, name: str, model: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.tp, self.epsilon = tp, model.norm_epsilon
        make = tp.initializer.parameter
        self.weight = make(LogicalTensor(f"{name}.weight", (model.hidden_size,)), ones)
        has_bias = model.family is not Family.llama
        self.bias = make(LogicalTensor(f"{name}.bias", (model.hidden_size,)), zeros) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight, shape = self.tp.replicated(self.weight), (x.shape[-1],)
        if self.bias is None:
            return F.rms_norm(x, shape, weight, self.epsilon)
        return F.layer_norm(x, shape, weight, self.tp.replicated(self.bias), self.epsilon)


class HiddenDropout(nn.Module):
    """Dropout between the parallel regions: one mask for all tensor ranks, or one per sequence stretch."""

    def __init__(self, probability: float, context: BlockContext) -> None:
        super().__init__()
        self.probability, self.context = probability, context

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0.0:
            return x
        if self.context.tp.sequence_parallel:
            with self.context.random.local():
                return F.dropout(x, self.probability)
        return F.dropout(x, self.probability)


class Attention(nn.Module):
    """Self-attention, causal but in a vit, over this rank's N/tp query and K/tp key/value heads.

    `mask` (B, 1, T, T) narrows it further: see models/documents.py.
    """

    def __init__(self, name: str, model: ModelConfig, context: BlockContext) -> None:
        super().__init__()
        tp = context.tp
        self.context, self.model = context, model
        self.head_size = model.hidden_size // model.num_heads
        kv_heads = model.num_kv_heads or model.num_heads
        self.heads, self.kv_heads = model.num_heads // tp.axis.size, kv_heads // tp.axis.size
        has_bias = model.family is not Family.llama
        segments = (model.hidden_size, kv_heads * self.head_size, kv_heads * self.head_size)
        self.qkv = ColumnParallelLinear(
            f"{name}.qkv", model.hidden_size, segments, tp, bias=has_bias, draw=normal(model.init_std)
        )
        self.output = RowParallelLinear(
            f"{name}.output",
            model.hidden_size,
            model.hidden_size,
            tp,
            bias=has_bias,
            draw=residual_draw(model),
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self._split_heads(self.qkv(x))
        if self.context.checkpointing is ActivationCheckpointing.selective:
            return self.output(recompute(self._core, self.context, q, k, v, mask))  # type: ignore[no-any-return]
        return self.output(self._core(q, k, v, mask))  # type: ignore[no-any-return]

    def _split_heads(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, (N + 2K) D / tp) -> q (B, N/tp, T, D), k and v (B, K/tp, T, D)."""
        heads = fused.unflatten(-1, (self.heads + 2 * self.kv_heads, self.head_size)).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        return q, k, v

    def _core(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """-> (B, T, N D / tp)."""
        if self.model.family is Family.llama:
            q, k = rotate(q, self.model.rope_theta), rotate(k, self.model.rope_theta)
        dropout = self.model.dropout if self.training else 0.0
        with self.context.random.local() if dropout else nullcontext():
            mixed = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                # A mask hides the future too, and patches of an image have none.
                is_causal=mask is None and self.model.family is not Family.vit,
                dropout_p=dropout,
                enable_gqa=self.kv_heads != self.heads,
            )
        return mixed.transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """H -> F -> H: GELU (gpt, vit; the tanh form of both's own code) or SwiGLU (llama, gate and up fused)."""

    def __init__(self, name: str, model: ModelConfig, context: BlockContext) -> None:
        super().__init__()
        self.gated = model.family is Family.llama
        ffn, has_bias = model.ffn_hidden_size, model.family is not Family.llama
        segments = (ffn, ffn) if self.gated else (ffn,)
        self.up = ColumnParallelLinear(
            f"{name}.{'gate_up' if self.gated else 'up'}",
            model.hidden_size,
            segments,
            context.tp,
            bias=has_bias,
            draw=normal(model.init_std),
        )
        self.down = RowParallelLinear(
            f"{name}.down", ffn, model.hidden_size, context.tp, bias=has_bias, draw=residual_draw(model)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if self.gated:
            gate, up = y.chunk(2, dim=-1)
            return self.down(F.silu(gate) * up)  # type: ignore[no-any-return]
        return self.down(F.gelu(y, approximate="tanh"))  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, name: str, model: ModelConfig, context: BlockContext) -> None:
        super().__init__()
        self.context = context
        self.attention_norm = Norm(f"{name}.attention_norm", model, context.tp)
        self.attention = Attention(f"{name}.attention", model, context)
        self.mlp_norm = Norm(f"{name}.mlp_norm", model, context.tp)
        self.mlp = MLP(f"{name}.mlp", model, context)
        self.dropout = HiddenDropout(model.dropout, context)

    def forward(self, x: Tensor) -> Tensor:
        # Handed on, not asked for again: by the time of a recomputation another micro-batch is in hand.
        mask = self.context.documents.mask
        if self.context.checkpointing is ActivationCheckpointing.full:
            return recompute(self._body, self.context, x, mask)
        return self._body(x, mask)

    def _body(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), mask))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))  # type: ignore[no-any-return]


def recompute(function: Callable[..., Tensor], context: BlockContext, *inputs: Tensor | None) -> Tensor:
    """Run `function(*inputs)` keeping only its inputs for the backward pass, which runs it again."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    # ZeRO-3 gathers a weight anew for the second run: its metadata then differ, its values do not.
    return checkpoint(  # type: ignore[no-any-return]
        function,
        *inputs,
        use_reentrant=False,
        context_fn=context.random.checkpoint_contexts,
        determinism_check="none",
    )


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary positions (Su et al., arXiv 2104.09864) for (B, heads, T, D), in halves as Llama pairs them."""
    length, size = x.shape[-2:]
    frequencies = theta ** -(torch.arange(0, size, 2, device=x.device, dtype=torch.float32) / size)
    angles = torch.arange(length, device=x.device, dtype=torch.float32).outer(frequencies)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def residual_draw(model: ModelConfig) -> DrawFunction:
    """Normal, with the deviation of a residual branch: std / sqrt(2 layers) (GPT-2, Radford et al., 2019)."""
    return normal(model.init_std / (2 * model.num_layers) ** 0.5)
