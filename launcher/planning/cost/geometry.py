"""Blocks, embedding, head and weights of each pipeline rank. Pure arithmetic."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property

from launcher.config.layout import Layout
from launcher.config.schema import InputKind, ModelConfig, NormKind, PositionKind, QueryKeyNorm, RunConfig
from launcher.config.shape import (
    has_class_token,
    has_norm_after,
    has_norm_before,
    is_gated,
    lora_segments,
    output_size,
    position_count,
    qkv_sizes,
    query_key_norm_sizes,
    vocabulary_multiple,
)
from launcher.parallel.vocabulary import padded_length


@dataclass(frozen=True)
class Weight:
    """A parameter as a tensor rank holds it."""

    numel: int
    is_matrix: bool  # matrices get weight decay, vectors do not
    module: int  # parameters of one module are gathered together under ZeRO-3
    is_trained: bool = True  # with adapters (LoRA) only theirs are


@dataclass(frozen=True)
class Adapters:
    """Adapters of the projections of each block (LoRA); none with rank 0."""

    rank: int = 0
    targets: tuple[str, ...] = ()
    dropout: float = 0.0

    @classmethod
    def of(cls, run: RunConfig) -> "Adapters":
        lora = run.finetune.lora
        return cls(lora.rank, tuple(lora.targets), lora.dropout) if lora.rank else NO_ADAPTERS


NO_ADAPTERS = Adapters()


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers that a pipeline rank runs as one stage."""

    first_block: int
    blocks: int
    has_embedding: bool
    has_head: bool


RankKind = tuple[tuple[int, bool, bool], ...]  # per stage: blocks, has embedding, has head


@dataclass(frozen=True)
class Rank:
    """A pipeline rank: its stages (two under DualPipeV) and its weights."""

    stage: int
    chunks: tuple[Chunk, ...]
    model: ModelConfig
    tensor: int
    outputs: int  # logits per position of a tensor rank, padding included
    is_flat: bool  # no pipeline: one module holds all layers
    adapters: Adapters = NO_ADAPTERS

    @property
    def blocks(self) -> int:
        return sum(chunk.blocks for chunk in self.chunks)

    @property
    def has_embedding(self) -> bool:
        return any(chunk.has_embedding for chunk in self.chunks)

    @property
    def has_head(self) -> bool:
        return any(chunk.has_head for chunk in self.chunks)

    @property
    def trains_whole_model(self) -> bool:
        return not self.adapters.rank

    @property
    def shares_tied_weight(self) -> bool:
        """Whether embedding and head share a weight on this rank."""
        return self.model.tie_embeddings and self.has_embedding and self.has_head

    @property
    def copies_tied_weight(self) -> bool:
        """Whether another pipeline rank holds the same weight, frozen or not."""
        return self.model.tie_embeddings and self.has_embedding != self.has_head

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """Weights in the order of the modules."""
        return tuple(_weights(self))

    @cached_property
    def sizes(self) -> Counter[int]:
        """Numbers of weights by size."""
        return Counter(weight.numel for weight in self.weights)

    @cached_property
    def parameters(self) -> int:
        return sum(weight.numel for weight in self.weights)

    @cached_property
    def trained(self) -> tuple[Weight, ...]:
        """Weights that the optimizer updates, in the order of the modules."""
        return tuple(weight for weight in self.weights if weight.is_trained)

    @cached_property
    def trained_parameters(self) -> int:
        return sum(weight.numel for weight in self.trained)

    @property
    def trained_of_block(self) -> int:
        """Parameters of a block that the optimizer updates."""
        if self.trains_whole_model:
            return block_parameters(self.model, self.tensor)
        modules = adapter_weights(self.model, self.tensor, self.adapters)
        return sum(numel for module in modules for numel, _ in module)

    @property
    def parameters_before_core(self) -> int:
        """Parameters of a block that are used before the core of attention."""
        modules = block_weights(self.model, self.tensor)
        before = 1 + has_norm_before(self.model) + len(_head_norms(self.model, self.tensor))
        return sum(numel for module in modules[:before] for numel, _ in module)

    @property
    def trained_of_its_own(self) -> int:
        """Trained parameters without the head's copy of a tied weight, which the embedding's rank counts."""
        if not self.trains_whole_model:
            return self.trained_parameters
        is_copy = self.copies_tied_weight and self.has_head
        return self.parameters - (self.outputs * self.model.hidden_size if is_copy else 0)

    @property
    def parameters_of_embedding(self) -> int:
        """Parameters of embedding or patches and of learned positions."""
        modules = embedding_weights(self.model, self.outputs) if self.has_embedding else []
        return sum(numel for module in modules for numel, _ in module)

    @cached_property
    def largest_weight(self) -> int:
        return max(weight.numel for weight in self.weights)

    @cached_property
    def largest_trained(self) -> int:
        return max(weight.numel for weight in self.trained)

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Sizes of the optimizer's parameter groups: matrices, then vectors; empty groups are left out."""
        matrices = tuple(weight.numel for weight in self.trained if weight.is_matrix)
        vectors = tuple(weight.numel for weight in self.trained if not weight.is_matrix)
        return tuple(group for group in (matrices, vectors) if group)


def kind_of(rank: Rank) -> RankKind:
    """Return a key that ranks share if they hold and compute the same."""
    return tuple((chunk.blocks, chunk.has_embedding, chunk.has_head) for chunk in rank.chunks)


def pipeline_ranks(run: RunConfig, layout: Layout) -> tuple[Rank, ...]:
    """Return every pipeline rank, with the weights of tensor rank 0."""
    multiple = vocabulary_multiple(run, layout.device)
    outputs = padded_length(output_size(run.model), layout.tensor, multiple) // layout.tensor
    model = replace(run.model, biases=replace(run.model.biases))
    arguments = layout.pipeline, layout.stages_per_rank, layout.tensor, outputs
    return _ranks(model, *arguments, Adapters.of(run))


@cache
def _ranks(
    model: ModelConfig, pipeline: int, stages_per_rank: int, tensor: int, outputs: int, adapters: Adapters
) -> tuple[Rank, ...]:
    """Return the pipeline ranks. `model` is the key of a cache, so callers must not change it."""
    stages = pipeline * stages_per_rank
    dealt = blocks_of_stages(model.num_layers, stages)
    chunks = [
        Chunk(sum(dealt[:index]), blocks, has_embedding=index == 0, has_head=index == stages - 1)
        for index, blocks in enumerate(dealt)
    ]
    # DualPipeV's V: out through the first half of the stages, back through the second.
    back = chunks[:0] if stages_per_rank == 1 else chunks[::-1]
    return tuple(
        Rank(rank, (chunks[rank], *back[rank : rank + 1]), model, tensor, outputs, pipeline == 1, adapters)
        for rank in range(pipeline)
    )


def blocks_of_stages(num_layers: int, stages: int) -> list[int]:
    """Return the blocks per stage as DeepSpeed's partition_balanced assigns them, larger stages first."""
    each, more = divmod(num_layers, stages)
    return [each + 1] * more + [each] * (stages - more)


Module = list[tuple[int, bool]]  # the weights of a module on a tensor rank: numel, is a matrix


def block_weights(model: ModelConfig, tensor: int) -> list[Module]:
    """Return the modules of a block in order: attention and MLP, each between its norms."""
    h, f, biases = model.hidden_size, model.ffn_hidden_size // tensor, model.biases
    qkv, query = sum(qkv_sizes(model)) // tensor, qkv_sizes(model)[0] // tensor
    up = 2 * f if is_gated(model) else f
    before = [_norm(model)] if has_norm_before(model) else []
    after = [_norm(model)] if has_norm_after(model) else []
    attention = [_linear(qkv * h, qkv, biases.qkv), *_head_norms(model, tensor)]
    attention.append(_linear(query * h, h, biases.output))
    mlp = [_linear(up * h, up, biases.up), _linear(f * h, h, biases.down)]
    return [*before, *attention, *after, *before, *mlp, *after]


def _head_norms(model: ModelConfig, tensor: int) -> list[Module]:
    """Return the norms of queries and keys; only over all heads the weight is split over tensor ranks."""
    ranks = tensor if model.query_key_norm is QueryKeyNorm.projection else 1
    return [[(size // ranks, False)] for size in query_key_norm_sizes(model)]


def _norm(model: ModelConfig) -> Module:
    return [(model.hidden_size, False)] * (2 if model.norm is NormKind.layer_norm else 1)


def _linear(matrix: int, bias: int, has_bias: bool) -> Module:
    return [(matrix, True), (bias, False)] if has_bias else [(matrix, True)]


def block_parameters(model: ModelConfig, tensor: int) -> int:
    return sum(numel for module in block_weights(model, tensor) for numel, _ in module)


def adapter_weights(model: ModelConfig, tensor: int, adapters: Adapters) -> list[Module]:
    """Return the adapters of a block: each is a module with two matrices (models/lora.py)."""
    modules: list[Module] = []
    for target, (inputs, segments) in lora_segments(model).items():
        if target in adapters.targets:
            of_a, of_b = len(segments) * adapters.rank * inputs, sum(segments) * adapters.rank
            is_column = target in ("qkv", "up")
            sizes = (of_a, of_b // tensor) if is_column else (of_a // tensor, of_b)
            modules.append([(size, True) for size in sizes])
    return modules


def embedding_weights(model: ModelConfig, outputs: int) -> list[Module]:
    """Return the modules before the first block: embedding or patches, and learned positions."""
    h = model.hidden_size
    if model.inputs is InputKind.patches:
        first = [(model.image_channels * model.patch_size**2 * h, True), (h, False)]
        if has_class_token(model):
            first.append((h, False))
    else:
        first = [(outputs * h, True)]
    if model.positions is PositionKind.rope:
        return [first]
    return [first, [(position_count(model) * h, True)]]


def _weights(rank: Rank) -> Iterator[Weight]:
    model, trains_all = rank.model, rank.trains_whole_model
    base, adapters = block_weights(model, rank.tensor), adapter_weights(model, rank.tensor, rank.adapters)
    modules: list[tuple[Module, bool]] = []  # with whether it is trained
    for chunk in rank.chunks:
        if chunk.has_embedding:
            modules += [(module, trains_all) for module in embedding_weights(model, rank.outputs)]
        block = [(module, trains_all) for module in base] + [(module, True) for module in adapters]
        modules += block * chunk.blocks
        if chunk.has_head:
            modules.append((_norm(model), trains_all))
            if not rank.shares_tied_weight:
                matrix = rank.outputs * model.hidden_size
                modules.append((_linear(matrix, rank.outputs, model.biases.head), trains_all))
    for index, (module, is_trained) in enumerate(modules):
        for numel, is_matrix in module:
            yield Weight(numel, is_matrix, index, is_trained)
