"""The transformer block: attention and MLP or experts, each with its norms, and two residual additions."""

from typing import Any

from torch import Tensor, nn

from launcher.config.schema import ActivationCheckpointing, ModelConfig, ResidualKind
from launcher.config.shape import has_norm_after, has_norm_before, layer_has_experts, window_of
from launcher.models.attention import Attention
from launcher.models.block_context import BlockContext, HiddenDropout, recompute, run_once
from launcher.models.dropout import Seed
from launcher.models.experts import Experts
from launcher.models.mlp import MLP
from launcher.models.norms import Norm


class TransformerBlock(nn.Module):
    """x + attention(x), then + MLP or experts of the sum, or of x with a parallel residual.

    Norms are before attention and MLP, after them, or both. `layer` counts the blocks of the model from 0.
    """

    def __init__(self, name: str, model: ModelConfig, context: BlockContext, layer: int) -> None:
        super().__init__()
        self.context, self.window = context, window_of(model, layer)
        self.is_parallel = model.residual is ResidualKind.parallel
        before, after = has_norm_before(model), has_norm_after(model)
        tp = context.tp
        self.attention_norm = Norm(f"{name}.attention_norm", model, tp) if before else None
        self.attention = Attention(f"{name}.attention", model, context)
        self.attention_output_norm = Norm(f"{name}.attention_output_norm", model, tp) if after else None
        self.mlp_norm = Norm(f"{name}.mlp_norm", model, tp) if before else None
        self.is_sparse = layer_has_experts(model, layer)
        self.mlp: MLP | Experts = (Experts if self.is_sparse else MLP)(f"{name}.mlp", model, context)
        self.mlp_output_norm = Norm(f"{name}.mlp_output_norm", model, tp) if after else None
        self.dropout = HiddenDropout(model.dropout, context)

    def forward(self, x: Tensor) -> Tensor:
        # Positions and seeds are arguments of the body, for a recomputation and for a compiled body.
        places = self.context.positions(x, self.window)
        seeds = self.attention.seed(), self.dropout.seed(), self.dropout.seed()
        of_attention = self.attention.adapter_seeds()
        call = recompute if self.context.checkpointing is ActivationCheckpointing.full else run_once
        if self.is_sparse:
            return call(self._sparse_body, x, *places, *seeds, *of_attention)
        assert isinstance(self.mlp, MLP)
        of_adapters = *of_attention, *self.mlp.adapter_seeds()
        return self.context.blocks(call, type(self)._body, self, x, *places, *seeds, *of_adapters)

    def _body(
        self,
        x: Tensor,
        mask: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        attention_seed: Seed | None,
        first_seed: Seed | None,
        second_seed: Seed | None,
        qkv_seed: Seed | None,
        output_seed: Seed | None,
        up_seed: Seed | None,
        down_seed: Seed | None,
    ) -> Tensor:
        """Return the output of the block. All blocks of a rank share its compiled form."""
        of_attention = mask, cos, sin, attention_seed, qkv_seed, output_seed
        attended = x + self._attended(x, of_attention, first_seed)
        return self._second_half(x, attended, second_seed, up_seed, down_seed)

    def _sparse_body(
        self,
        x: Tensor,
        mask: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        attention_seed: Seed | None,
        first_seed: Seed | None,
        second_seed: Seed | None,
        qkv_seed: Seed | None,
        output_seed: Seed | None,
    ) -> Tensor:
        """Return the output of a block with experts. They run eager: their sizes differ from step to step."""
        of_attention = x, mask, cos, sin, attention_seed, first_seed, qkv_seed, output_seed
        attended = self.context.blocks(run_once, type(self)._first_half, self, *of_attention)
        return self._second_half(x, attended, second_seed)

    def _first_half(
        self,
        x: Tensor,
        mask: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        attention_seed: Seed | None,
        first_seed: Seed | None,
        qkv_seed: Seed | None,
        output_seed: Seed | None,
    ) -> Tensor:
        """Return the sum after attention. All blocks with experts share its compiled form."""
        of_attention = mask, cos, sin, attention_seed, qkv_seed, output_seed
        return x + self._attended(x, of_attention, first_seed)

    def _second_half(
        self, x: Tensor, attended: Tensor, seed: Seed | None, *of_adapters: Seed | None
    ) -> Tensor:
        """Return the output of the block from its input and the sum after attention."""
        mlp = self.mlp(_normed(self.mlp_norm, x if self.is_parallel else attended), *of_adapters)
        return attended + self.dropout(_normed(self.mlp_output_norm, mlp), seed)  # type: ignore[no-any-return]

    def _attended(self, x: Tensor, of_attention: tuple[Any, ...], seed: Seed | None) -> Tensor:
        """Return attention with its norms and dropout. Apart from the body, which would keep its output."""
        mixed = self.attention(_normed(self.attention_norm, x), *of_attention)
        return self.dropout(_normed(self.attention_output_norm, mixed), seed)  # type: ignore[no-any-return]


def _normed(norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)
