"""The two-layer perceptron of a block: GELU, SwiGLU or GeGLU."""

import torch.nn.functional as F
from torch import Tensor, nn

from launcher.config.schema import MLPKind, ModelConfig
from launcher.config.shape import is_gated
from launcher.models.block_context import BlockContext, residual_draw
from launcher.models.dropout import Seed
from launcher.models.lora import ColumnAdapter, RowAdapter, adapted, adapter_of, seed_of_adapter
from launcher.parallel.initializer import normal
from launcher.parallel.layers import ColumnParallelLinear, RowParallelLinear


class MLP(nn.Module):
    """H -> F -> H with GELU (tanh form, as in GPT-2, or exact), or gated: gate and up in one projection.

    SwiGLU gates by SiLU, GeGLU by the tanh form of GELU.
    """

    def __init__(
        self, name: str, model: ModelConfig, context: BlockContext, columns: int | None = None
    ) -> None:
        """`columns` is F; by default that of the model's MLPs."""
        super().__init__()
        self.model = model
        h, f, tp, biases = model.hidden_size, columns or model.ffn_hidden_size, context.tp, model.biases
        up, segments = (f"{name}.gate_up", (f, f)) if is_gated(model) else (f"{name}.up", (f,))
        self.up = ColumnParallelLinear(up, h, segments, tp, bias=biases.up, draw=normal(model.init_std))
        self.down = RowParallelLinear(f"{name}.down", f, h, tp, bias=biases.down, draw=residual_draw(model))
        self.up_adapter = adapter_of(ColumnAdapter, up, "up", model, context)
        self.down_adapter = adapter_of(RowAdapter, f"{name}.down", "down", model, context)

    def adapter_seeds(self) -> tuple[int | None, int | None]:
        """Return the seeds of the next dropout masks of the adapters."""
        return seed_of_adapter(self.up_adapter), seed_of_adapter(self.down_adapter)

    def forward(self, x: Tensor, up_seed: Seed | None = None, down_seed: Seed | None = None) -> Tensor:
        y = adapted(self.up, self.up_adapter, x, up_seed)
        return adapted(self.down, self.down_adapter, activated(self.model, y), down_seed)


def activated(model: ModelConfig, y: Tensor) -> Tensor:
    """Return the activation of the first projection, (..., F) or with a gate (..., 2F) -> (..., F)."""
    if not is_gated(model):
        return _activated(model.mlp, y)
    gate, up = y.chunk(2, dim=-1)
    return _activated(model.mlp, gate) * up


def _activated(kind: MLPKind, y: Tensor) -> Tensor:
    if kind is MLPKind.swiglu:
        return F.silu(y)
    return F.gelu(y, approximate="none" if kind is MLPKind.gelu_erf else "tanh")
