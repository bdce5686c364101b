"""GPT-2 and Llama in plain torch, written as one would write them without a framework.

Parameters have the launcher's logical names, so that every peer loads the same weights. Shapes: B batch, T
sequence, H hidden, D head size, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contest.job import Job, Sizes

_COLUMNS = 128  # tensor cores are slow for a number of columns that is no multiple of this


class Attention(nn.Module):
    """Causal self-attention; works on all heads, or on those of a tensor rank."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes, self.head_size = sizes, sizes.hidden // sizes.heads
        outputs = (sizes.heads + 2 * sizes.kv_heads) * self.head_size
        self.qkv = nn.Linear(sizes.hidden, outputs, bias=not sizes.is_llama)
        self.output = nn.Linear(sizes.hidden, sizes.hidden, bias=not sizes.is_llama)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        return self.output(attention(self.qkv(x), self.sizes, rotary))


def attention(fused: Tensor, sizes: Sizes, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """Queries, keys and values (B, T, heads x D) of some or all heads -> (B, T, query heads x D)."""
    heads = fused.unflatten(-1, (-1, sizes.hidden // sizes.heads)).transpose(1, 2)
    per_group = sizes.heads // sizes.kv_heads + 2
    groups = heads.shape[1] // per_group
    q, k, v = heads.split([groups * (per_group - 2), groups, groups], dim=1)
    if rotary is not None:
        q, k = rotate(q, *rotary), rotate(k, *rotary)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=sizes.heads != sizes.kv_heads)
    return mixed.transpose(1, 2).flatten(2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class GeluMLP(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(sizes.hidden, sizes.ffn), nn.Linear(sizes.ffn, sizes.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class SwiGLU(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate_up = nn.Linear(sizes.hidden, 2 * sizes.ffn, bias=False)
        self.down = nn.Linear(sizes.ffn, sizes.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def norm(sizes: Sizes) -> nn.Module:
    return (nn.RMSNorm if sizes.is_llama else nn.LayerNorm)(sizes.hidden, eps=sizes.norm_epsilon)


class Block(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = norm(sizes), norm(sizes)
        self.attention, self.mlp = Attention(sizes), (SwiGLU if sizes.is_llama else GeluMLP)(sizes)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """The whole model, or the blocks of one of several pipeline stages with what comes before or after."""

    def __init__(self, job: Job, stage: int = 0, stages: int = 1) -> None:
        super().__init__()
        sizes = self.sizes = job.sizes
        first, last = stage == 0, stage == stages - 1
        columns = _COLUMNS if job.device == "cuda" else 1
        self.columns = -(-sizes.vocabulary // columns) * columns
        self.embedding = nn.Embedding(self.columns, sizes.hidden) if first else None
        has_positions = first and not sizes.is_llama
        self.positions = nn.Embedding(sizes.length, sizes.hidden) if has_positions else None
        share = -(-sizes.layers // stages)
        layers = range(stage * share, min((stage + 1) * share, sizes.layers))
        self.blocks = nn.ModuleDict({str(layer): Block(sizes) for layer in layers})
        self.final_norm = norm(sizes) if last else None
        self.head = nn.Linear(sizes.hidden, self.columns, bias=False) if last else None
        if sizes.is_tied and self.head is not None:
            assert self.embedding is not None, "tied weights on several stages are not supported"
            self.head.weight = self.embedding.weight
        if sizes.is_llama:
            dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32
            for name, table in zip(("cos", "sin"), rotary_tables(sizes), strict=True):
                self.register_buffer(name, table.to(job.device, dtype), persistent=False)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the loss; without labels, the logits, or the hidden states of a stage that has no head."""
        if self.embedding is not None:
            x = self.embedding(x)
            if self.positions is not None:
                x = x + self.positions(torch.arange(self.sizes.length, device=x.device))
            if torch.is_autocast_enabled(x.device.type):
                x = x.bfloat16()
        rotary = (self.cos, self.sin) if self.sizes.is_llama else None
        for block in self.blocks.values():
            x = block(x, rotary)
        if self.head is None or self.final_norm is None:
            return x
        logits = self.head(self.final_norm(x))
        return logits if labels is None else cross_entropy(logits, labels, self.sizes.vocabulary)

    def load(self, weights: dict[str, Tensor]) -> "Transformer":
        """Copy the weights of this model's parameters; rows that pad the vocabulary become zero."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                full = weights[name].to(parameter.device)
                parameter.zero_()
                parameter[: len(full)] = full
        return self


def cross_entropy(logits: Tensor, labels: Tensor, vocabulary: int) -> Tensor:
    """Mean cross-entropy in fp32; columns that pad the vocabulary are left out."""
    if logits.shape[-1] != vocabulary:
        logits = logits[..., :vocabulary]
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def rotary_tables(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (T, D/2)."""
    size = sizes.hidden // sizes.heads
    frequencies = sizes.rope_theta ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    angles = torch.arange(sizes.length, dtype=torch.float32).outer(frequencies)
    return angles.cos(), angles.sin()


def built(job: Job, weights: dict[str, Tensor], **stage: Any) -> Transformer:
    """Return the model on the job's device with these weights."""
    with torch.device(job.device):
        return Transformer(job, **stage).load(weights)
