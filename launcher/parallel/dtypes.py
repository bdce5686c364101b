"""The torch dtype of each precision in a config."""

import torch

from launcher.config.schema import Dtype

TORCH_DTYPES = {Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16, Dtype.fp16: torch.float16}
