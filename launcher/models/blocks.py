"""The transformer block: norm, attention, norm and MLP with two residual additions."""

from torch import Tensor, nn

from launcher.config.schema import ActivationCheckpointing, ModelConfig
from launcher.models.attention import Attention
from launcher.models.context import BlockContext, HiddenDropout, recompute, run_once
from launcher.models.dropout import Seed
from launcher.models.mlp import MLP
from launcher.models.norms import Norm


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
        # Positions and seeds are arguments of the body, for a recomputation and for a compiled body.
        places = self.context.positions(x)
        seeds = self.attention.seed(), self.dropout.seed(), self.dropout.seed()
        call = recompute if self.context.checkpointing is ActivationCheckpointing.full else run_once
        return self.context.blocks(call, type(self)._body, self, x, *places, *seeds)

    def _body(
        self,
        x: Tensor,
        mask: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        attention_seed: Seed | None,
        first_seed: Seed | None,
        second_seed: Seed | None,
    ) -> Tensor:
        """Return the output of the block. All blocks of a rank share its compiled form."""
        mixed = self.attention(self.attention_norm(x), mask, cos, sin, attention_seed)
        x = x + self.dropout(mixed, first_seed)
        return x + self.dropout(self.mlp(self.mlp_norm(x)), second_seed)  # type: ignore[no-any-return]
