"""LayerNorm and RMSNorm over the hidden size."""

import torch.nn.functional as F
from torch import Tensor, nn

from launcher.config.schema import ModelConfig, NormKind
from launcher.parallel.initializer import ones, zeros
from launcher.parallel.layers import TensorParallel
from launcher.parallel.sharding import LogicalTensor


class Norm(nn.Module):
    """Normalise the last dimension H: LayerNorm with weight and bias, or RMSNorm with weight only."""

    def __init__(self, name: str, model: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.tp, self.epsilon = tp, model.norm_epsilon
        make, shape = tp.initializer.parameter, (model.hidden_size,)
        self.weight = make(LogicalTensor(f"{name}.weight", shape), ones)
        has_bias = model.norm is NormKind.layer_norm
        self.bias = make(LogicalTensor(f"{name}.bias", shape), zeros) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight, shape = self.tp.replicated(self.weight), (x.shape[-1],)
        if self.bias is None:
            return F.rms_norm(x, shape, weight, self.epsilon)
        return F.layer_norm(x, shape, weight, self.tp.replicated(self.bias), self.epsilon)
