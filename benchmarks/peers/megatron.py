"""Megatron-core's tensor-parallel layers, embedding and cross-entropy; the rest of the model is plain torch.

Sequence parallelism is left out: Megatron-core's collectives for it allocate on the current CUDA device.
Activations are (T, B, H), as Megatron-core has them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
)
from torch import Tensor, nn

from benchmarks.contest.job import AfterStep, Job, Sizes
from benchmarks.peers.batches import initial_weights, micro_batches
from benchmarks.peers.model import attention, norm
from benchmarks.peers.optimizer import adamw, clip_sharded
from benchmarks.peers.ranks import join
from benchmarks.peers.tensor_shards import with_rows_by_rank


def train(job: Job, rank: int, after_step: AfterStep) -> None:
    join(job, rank)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=job.ranks)
    model = Transformer(job)
    model.load(with_rows_by_rank(initial_weights(job), job.sizes, job.ranks), rank, job.ranks)
    optimizer, group = adamw(job, model.parameters()), parallel_state.get_tensor_model_parallel_group()
    for [(tokens, labels)] in micro_batches(job, data_rank=0):
        loss = model(tokens, labels)
        loss.backward()
        gradients = {
            p.grad: rank == 0 or getattr(p, "tensor_model_parallel", False)
            for p in model.parameters()
            if p.grad is not None
        }
        clip_sharded(gradients, job.adamw.clipping, group)
        optimizer.step()
        optimizer.zero_grad()
        after_step(loss.detach())


class Parallel:
    """Makes Megatron-core's layers with one config."""

    def __init__(self, job: Job) -> None:
        self.config = ModelParallelConfig(tensor_model_parallel_size=job.ranks, use_cpu_initialization=True)

    def column(self, inputs: int, outputs: int, **options: Any) -> nn.Module:
        return ColumnParallelLinear(
            inputs, outputs, config=self.config, init_method=nn.init.zeros_, gather_output=False, **options
        )

    def row(self, inputs: int, outputs: int) -> nn.Module:
        return RowParallelLinear(
            inputs, outputs, config=self.config, init_method=nn.init.zeros_, bias=True,
            input_is_parallel=True, skip_bias_add=False,
        )  # fmt: skip

    def embedding(self, rows: int, hidden: int) -> nn.Module:
        return VocabParallelEmbedding(rows, hidden, config=self.config, init_method=nn.init.zeros_)


class Attention(nn.Module):
    def __init__(self, sizes: Sizes, parallel: Parallel) -> None:
        super().__init__()
        self.sizes = sizes
        self.qkv = parallel.column(sizes.hidden, 3 * sizes.hidden)
        self.output = parallel.row(sizes.hidden, sizes.hidden)

    def forward(self, x: Tensor) -> Tensor:
        fused = self.qkv(x)[0].transpose(0, 1)
        return self.output(attention(fused, self.sizes, None).transpose(0, 1))[0]


class MLP(nn.Module):
    def __init__(self, sizes: Sizes, parallel: Parallel) -> None:
        super().__init__()
        self.up, self.down = parallel.column(sizes.hidden, sizes.ffn), parallel.row(sizes.ffn, sizes.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)[0], approximate="tanh"))[0]


class Block(nn.Module):
    def __init__(self, sizes: Sizes, parallel: Parallel) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = norm(sizes), norm(sizes)
        self.attention, self.mlp = Attention(sizes, parallel), MLP(sizes, parallel)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """GPT-2's parts, untied; parameters have the launcher's logical names."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        sizes, parallel = job.sizes, Parallel(job)
        assert not sizes.is_llama, "only GPT-2 is built of these layers here"
        assert not sizes.is_tied, "the head has its own weight here"
        self.length = sizes.length
        self.embedding = parallel.embedding(sizes.vocabulary, sizes.hidden)
        self.positions = nn.Embedding(sizes.length, sizes.hidden)
        self.blocks = nn.ModuleList(Block(sizes, parallel) for _ in range(sizes.layers))
        self.final_norm = norm(sizes)
        self.head = parallel.column(sizes.hidden, sizes.vocabulary, bias=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions(torch.arange(self.length))
        x = x.transpose(0, 1).contiguous()
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.final_norm(x))[0]
        return vocab_parallel_cross_entropy(logits.float(), labels.t().contiguous()).mean()

    def load(self, weights: dict[str, Tensor], rank: int, ranks: int) -> None:
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                full = weights[name]
                if getattr(parameter, "tensor_model_parallel", False):
                    full = full.chunk(ranks, dim=parameter.partition_dim)[rank]
                parameter.copy_(full)
