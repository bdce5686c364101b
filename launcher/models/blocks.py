"""The transformer block: norm, attention, norm and MLP with two residual additions."""

from torch import Tensor, nn

from launcher.config.schema import ActivationCheckpointing, ModelConfig
from launcher.models.attention import Attention
from launcher.models.context import BlockContext, HiddenDropout, recompute
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
        places = self.context.positions(x)
        if self.context.checkpointing is ActivationCheckpointing.full:
            return recompute(self._body, self.context, x, *places)
        return self._body(x, *places)

    def _body(self, x: Tensor, *places: Tensor | None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), *places))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))  # type: ignore[no-any-return]
