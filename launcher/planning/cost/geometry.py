"""What each pipeline rank holds: blocks, embedding, head, and every weight's size. Pure arithmetic."""

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import cache, cached_property
from typing import Any

from launcher.config.layout import Layout
from launcher.config.schema import Family, ModelConfig, Pooling, RunConfig
from launcher.config.shape import output_size, vision_tokens


@dataclass(frozen=True)
class Weight:
    """One parameter as this tensor rank holds it."""

    numel: int
    is_matrix: bool  # the optimizer's two groups: matrices decay, vectors do not
    module: int  # parameters of one module are gathered together under ZeRO-3


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers that one pipeline rank runs as one stage."""

    first_block: int
    blocks: int
    has_embedding: bool
    has_head: bool


Kind = tuple[tuple[int, bool, bool], ...]  # of each stage: blocks, embedding, head


@dataclass(frozen=True)
class Rank:
    """One pipeline rank: its stages (two under DualPipeV) and its weights."""

    stage: int
    chunks: tuple[Chunk, ...]
    model: ModelConfig
    tensor: int
    is_flat: bool  # no pipeline: one module holds everything

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
    def shares_tied_weight(self) -> bool:
        """Whether embedding and head are one weight on this rank."""
        return self.model.tie_embeddings and self.has_embedding and self.has_head

    @property
    def copies_tied_weight(self) -> bool:
        """Whether another pipeline rank holds the same weight."""
        return self.model.tie_embeddings and self.has_embedding != self.has_head

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """In the order of the modules."""
        return tuple(_weights(self))

    @cached_property
    def parameters(self) -> int:
        return sum(weight.numel for weight in self.weights)

    @property
    def parameters_of_its_own(self) -> int:
        """Without the head's copy of a tied weight, which the embedding's rank answers for."""
        is_copy = self.copies_tied_weight and self.has_head
        return self.parameters - (_vocabulary(self.model, self.tensor)[0] if is_copy else 0)

    @property
    def parameters_of_embedding(self) -> int:
        """Look-ups or patches, and positions, with a head that is the same weight."""
        modules = embedding_weights(self.model, self.tensor) if self.has_embedding else []
        return sum(numel for module in modules for numel, _ in module)

    @cached_property
    def largest_weight(self) -> int:
        return max(weight.numel for weight in self.weights)

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The sizes of the optimizer's parameter groups: matrices, then vectors; an empty one left out."""
        groups = (
            tuple(weight.numel for weight in self.weights if weight.is_matrix is matrices)
            for matrices in (True, False)
        )
        return tuple(group for group in groups if group)


def kind_of(rank: Rank) -> Kind:
    """Alike for ranks that hold and compute alike."""
    return tuple((chunk.blocks, chunk.has_embedding, chunk.has_head) for chunk in rank.chunks)


def pipeline_ranks(run: RunConfig, layout: Layout) -> tuple[Rank, ...]:
    """One for each pipeline rank, of tensor rank 0."""
    return _ranks(astuple(run.model), layout.pipeline, layout.stages_per_rank, layout.tensor)


@cache
def _ranks(
    model_fields: tuple[Any, ...], pipeline: int, stages_per_rank: int, tensor: int
) -> tuple[Rank, ...]:
    """Of a model by its fields, which can be a key."""
    model, stages = ModelConfig(*model_fields), pipeline * stages_per_rank
    dealt = blocks_of_stages(model.num_layers, stages)
    chunks = [
        Chunk(sum(dealt[:index]), blocks, has_embedding=index == 0, has_head=index == stages - 1)
        for index, blocks in enumerate(dealt)
    ]
    return tuple(
        Rank(rank, _chunks_of(rank, chunks, stages_per_rank), model, tensor, is_flat=pipeline == 1)
        for rank in range(pipeline)
    )


def _chunks_of(rank: int, chunks: list[Chunk], stages_per_rank: int) -> tuple[Chunk, ...]:
    if stages_per_rank == 1:
        return (chunks[rank],)
    # DualPipeV's V: out through the first half of the stages, back through the second.
    return chunks[rank], chunks[len(chunks) - 1 - rank]


def blocks_of_stages(num_layers: int, stages: int) -> list[int]:
    """As DeepSpeed's partition_balanced deals them out: one more to the first ones if they do not divide."""
    each, more = divmod(num_layers, stages)
    return [each + 1] * more + [each] * (stages - more)


def padded_length(length: int, ranks: int) -> int:
    """As launcher.parallel.sharding pads a vocabulary; here without torch."""
    return -(-length // ranks) * ranks


def block_weights(model: ModelConfig, tensor: int) -> list[list[tuple[int, bool]]]:
    """By module (numel, is a matrix), of one tensor rank: norm, qkv, output, norm, up, down."""
    h, f, heads = model.hidden_size, model.ffn_hidden_size, model.num_heads
    qkv = (h + 2 * (model.num_kv_heads or heads) * (h // heads)) // tensor
    up = (2 if model.family is Family.llama else 1) * f // tensor
    if model.family is Family.llama:
        norm = [(h, False)]
        return [
            norm,
            [(qkv * h, True)],
            [(h * h // tensor, True)],
            norm,
            [(up * h, True)],
            [(h * f // tensor, True)],
        ]
    norm = [(h, False), (h, False)]
    return [
        norm,
        [(qkv * h, True), (qkv, False)],
        [(h * h // tensor, True), (h, False)],
        norm,
        [(up * h, True), (up, False)],
        [(h * f // tensor, True), (h, False)],
    ]


def block_parameters(model: ModelConfig, tensor: int) -> int:
    return sum(numel for module in block_weights(model, tensor) for numel, _ in module)


def embedding_weights(model: ModelConfig, tensor: int) -> list[list[tuple[int, bool]]]:
    """As block_weights: of look-ups or patches, and positions if they are learned."""
    h = model.hidden_size
    if model.family is Family.vit:
        patches = [(model.image_channels * model.patch_size**2 * h, True), (h, False)]
        if model.pooling is Pooling.class_token:
            patches.append((h, False))
        return [patches, [(vision_tokens(model) * h, True)]]
    lookup = [_vocabulary(model, tensor)]
    return [lookup, [(model.max_sequence_length * h, True)]] if model.family is Family.gpt else [lookup]


def _vocabulary(model: ModelConfig, tensor: int) -> tuple[int, bool]:
    return outputs(model, tensor) * model.hidden_size, True


def outputs(model: ModelConfig, tensor: int) -> int:
    """Logits of a tensor rank, padding included."""
    return padded_length(output_size(model), tensor) // tensor


def _weights(rank: Rank) -> Iterator[Weight]:
    model = rank.model
    modules: list[list[tuple[int, bool]]] = []
    for chunk in rank.chunks:
        if chunk.has_embedding:
            modules += embedding_weights(model, rank.tensor)
        modules += block_weights(model, rank.tensor) * chunk.blocks
        if chunk.has_head:
            modules.append(block_weights(model, rank.tensor)[0])
            if not rank.shares_tied_weight:
                bias = [(outputs(model, rank.tensor), False)] if model.family is Family.vit else []
                modules.append([_vocabulary(model, rank.tensor), *bias])
    for index, module in enumerate(modules):
        for numel, is_matrix in module:
            yield Weight(numel, is_matrix, index)
