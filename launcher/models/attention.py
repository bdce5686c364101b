"""Multi-head and grouped-query self-attention over this tensor rank's heads.

Shapes: B batch, T sequence, H hidden, D head size; N query heads and K key/value heads of the whole model.
Between modules activations are (B, T, H), or (B, T/tp, H) under sequence parallelism.
"""

import torch
from torch import Tensor, nn

from launcher.config.schema import ActivationCheckpointing, AttentionKind, ModelConfig, QueryKeyNorm
from launcher.config.shape import head_size, kv_heads, qkv_sizes
from launcher.models.attention_kernel import Kernel
from launcher.models.block_context import BlockContext, recompute, residual_draw
from launcher.models.context_attention import context_attention
from launcher.models.dropout import Seed, attention
from launcher.models.lora import ColumnAdapter, RowAdapter, adapted, adapter_of, seed_of_adapter
from launcher.models.norms import HeadNorm
from launcher.models.rotary import rotate
from launcher.parallel.initializer import normal
from launcher.parallel.layers import ColumnParallelLinear, RowParallelLinear


class Attention(nn.Module):
    """Self-attention over this rank's N/tp query heads and K/tp key/value heads, causal or full.

    `mask` (T, T) or (B, 1, T, T), if not None, replaces the causal mask: see models/masks.py. `cos` and
    `sin` are the tables of rotary positions, else None: see models/rotary.py. With context parallelism
    x (B, T/C, H) is this rank's part of the sequences, `mask` is the first position to which each query
    attends, and queries attend to the keys of all context ranks: see models/context_attention.py.
    """

    def __init__(self, name: str, model: ModelConfig, context: BlockContext) -> None:
        super().__init__()
        tp, sizes, biases = context.tp, qkv_sizes(model), model.biases
        self.context, self.model = context, model
        self.head_size = head_size(model)
        self.heads, self.kv_heads = model.num_heads // tp.axis.size, kv_heads(model) // tp.axis.size
        self.qkv = ColumnParallelLinear(
            f"{name}.qkv", model.hidden_size, sizes, tp, bias=biases.qkv, draw=normal(model.init_std)
        )
        has_norm = model.query_key_norm is not QueryKeyNorm.none
        self.query_norm = HeadNorm(f"{name}.query_norm", model, model.num_heads, tp) if has_norm else None
        self.key_norm = HeadNorm(f"{name}.key_norm", model, kv_heads(model), tp) if has_norm else None
        size = model.attention_scale_size
        is_causal, scale = model.attention is AttentionKind.causal, None if size is None else size**-0.5
        self.kernel = Kernel(is_causal, scale, model.attention_soft_cap, tp.device)
        self.output = RowParallelLinear(
            f"{name}.output", sizes[0], model.hidden_size, tp, bias=biases.output, draw=residual_draw(model)
        )
        self.qkv_adapter = adapter_of(ColumnAdapter, f"{name}.qkv", "qkv", model, context)
        self.output_adapter = adapter_of(RowAdapter, f"{name}.output", "output", model, context)

    def seed(self) -> int | None:
        """Return the seed of the next dropout mask, of this rank's heads; None without dropout."""
        return self.context.random.local() if self.training and self.model.dropout else None

    def adapter_seeds(self) -> tuple[int | None, int | None]:
        """Return the seeds of the next dropout masks of the adapters."""
        return seed_of_adapter(self.qkv_adapter), seed_of_adapter(self.output_adapter)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        seed: Seed | None = None,
        qkv_seed: Seed | None = None,
        output_seed: Seed | None = None,
    ) -> Tensor:
        q, k, v = self._split_heads(adapted(self.qkv, self.qkv_adapter, x, qkv_seed))
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        arguments = q, k, v, mask, cos, sin, seed
        # In a compiled graph, attention with dropout keeps q, k and v only: see models/dropout.py.
        recomputes_itself = seed is not None and torch.compiler.is_compiling()
        if self.context.checkpointing is ActivationCheckpointing.selective and not recomputes_itself:
            mixed = recompute(self._core, *arguments)
        else:
            mixed = self._core(*arguments)
        return adapted(self.output, self.output_adapter, mixed, output_seed)

    def _split_heads(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split (B, T, (N + 2K) D / tp) into q (B, T, N/tp, D), k and v (B, T, K/tp, D).

        The heads stay after the positions, as in memory, and the kernel gets a view. So its output and the
        gradients of q, k and v need no copy into the order of the projections.
        """
        heads = fused.unflatten(-1, (self.heads + 2 * self.kv_heads, self.head_size))
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        return q, k, v

    def _core(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        seed: Seed | None,
    ) -> Tensor:
        """Return attention (B, T, N D / tp) of q to k and v."""
        if cos is not None and sin is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.context.cp is not None:
            settings = self.model.dropout, seed, self.kernel, self.context.cp
            return context_attention(q, k, v, mask, *settings).flatten(2)
        return attention(q, k, v, mask, self.model.dropout, seed, self.kernel).flatten(2)
