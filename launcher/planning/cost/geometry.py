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
    layer_has_experts,
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
    is_trained: bool = True  # with adapters (LoRA) only the weights of adapters are trained
    is_distributed: bool = False  # experts that are distributed over the ranks of the expert group


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
KINDS = (False, True)  # of a block: whether it has experts


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers that a pipeline rank runs as one stage."""

    first_block: int
    blocks: int
    has_embedding: bool
    has_head: bool
    kinds: tuple[bool, ...]  # for each block, whether it has experts


RankKind = tuple[tuple[tuple[bool, ...], bool, bool], ...]  # per stage: kinds, has embedding, has head


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
    expert: int = 1  # ranks of the expert group

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

    @cached_property
    def kind(self) -> RankKind:
        """Key that is equal for ranks that hold and compute the same."""
        return tuple((chunk.kinds, chunk.has_embedding, chunk.has_head) for chunk in self.chunks)

    @cached_property
    def kinds(self) -> list[bool]:
        """For each block in order, whether it has experts."""
        return [has_experts for chunk in self.chunks for has_experts in chunk.kinds]

    @cached_property
    def trained_of_blocks(self) -> list[int]:
        """Parameters of each block that the optimizer updates."""
        return [self.trained_of_block(has_experts) for has_experts in self.kinds]

    def trained_of_block(self, has_experts: bool) -> int:
        """Return the parameters of a block that the optimizer updates."""
        return self._trained_by_kind[has_experts]

    @cached_property
    def _trained_by_kind(self) -> dict[bool, int]:
        if self.trains_whole_model:
            sizes = (parameters_of_block(self.model, self.tensor, kind, self.expert) for kind in KINDS)
            return dict(zip(KINDS, sizes, strict=True))
        modules = adapter_weights(self.model, self.tensor, self.adapters)
        return dict.fromkeys(KINDS, sum(numel for module in modules for numel, _ in module))

    @cached_property
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
        """Sizes of the optimizer's parameter groups without distributed experts: matrices, then vectors.

        Empty groups are left out.
        """
        weights = [weight for weight in self.trained if not weight.is_distributed]
        matrices = tuple(weight.numel for weight in weights if weight.is_matrix)
        vectors = tuple(weight.numel for weight in weights if not weight.is_matrix)
        return tuple(group for group in (matrices, vectors) if group)

    @cached_property
    def expert_groups(self) -> tuple[tuple[int, ...], ...]:
        """Sizes of the optimizer's group of distributed experts (parallelism.expert); empty without them."""
        shared = tuple(weight.numel for weight in self.trained if weight.is_distributed)
        return (shared,) if shared else ()

    @property
    def distributed_parameters(self) -> int:
        """Trained parameters of distributed experts on this rank."""
        return sum(sum(group) for group in self.expert_groups)

    @property
    def distributed_of_block(self) -> int:
        """Trained parameters of distributed experts of a block on this rank."""
        return self.distributed_parameters // max(1, sum(self.kinds))


def pipeline_ranks(run: RunConfig, layout: Layout) -> tuple[Rank, ...]:
    """Return every pipeline rank, with the weights of tensor rank 0."""
    multiple = vocabulary_multiple(run, layout.device)
    outputs = padded_length(output_size(run.model), layout.tensor, multiple) // layout.tensor
    model = replace(run.model, biases=replace(run.model.biases), experts=replace(run.model.experts))
    arguments = layout.pipeline, layout.stages_per_rank, layout.tensor, outputs
    return _ranks(model, *arguments, Adapters.of(run), layout.expert)


@cache
def _ranks(
    model: ModelConfig,
    pipeline: int,
    stages_per_rank: int,
    tensor: int,
    outputs: int,
    adapters: Adapters,
    expert: int,
) -> tuple[Rank, ...]:
    """Return the pipeline ranks. `model` is the key of a cache, so callers must not change it."""
    stages = pipeline * stages_per_rank
    dealt = blocks_of_stages(model.num_layers, stages)
    kinds = [layer_has_experts(model, layer) for layer in range(model.num_layers)]
    starts = [sum(dealt[:index]) for index in range(stages)]
    chunks = [
        Chunk(start, blocks, index == 0, index == stages - 1, tuple(kinds[start : start + blocks]))
        for index, (start, blocks) in enumerate(zip(starts, dealt, strict=True))
    ]
    # DualPipeV's V: out through the first half of the stages, back through the second.
    back = chunks[:0] if stages_per_rank == 1 else chunks[::-1]
    return tuple(
        Rank(
            rank,
            (chunks[rank], *back[rank : rank + 1]),
            model,
            tensor,
            outputs,
            pipeline == 1,
            adapters,
            expert,
        )
        for rank in range(pipeline)
    )


def blocks_of_stages(num_layers: int, stages: int) -> list[int]:
    """Return the blocks per stage as DeepSpeed's partition_balanced assigns them, larger stages first."""
    each, more = divmod(num_layers, stages)
    return [each + 1] * more + [each] * (stages - more)


Module = list[tuple[int, bool]]  # the weights of a module on a tensor rank: numel, is a matrix


def block_weights(
    model: ModelConfig, tensor: int, *, has_experts: bool = False, expert: int = 1
) -> list[Module]:
    """Return the modules of a block in order: attention and MLP or experts, each between its norms."""
    h, f, biases = model.hidden_size, model.ffn_hidden_size // tensor, model.biases
    qkv, query = sum(qkv_sizes(model)) // tensor, qkv_sizes(model)[0] // tensor
    up = 2 * f if is_gated(model) else f
    before = [_norm(model)] if has_norm_before(model) else []
    after = [_norm(model)] if has_norm_after(model) else []
    attention = [_linear(qkv * h, qkv, biases.qkv), *_head_norms(model, tensor)]
    attention.append(_linear(query * h, h, biases.output))
    mlp = [_linear(up * h, up, biases.up), _linear(f * h, h, biases.down)]
    if has_experts:
        mlp = _expert_weights(model, tensor, expert)
    return [*before, *attention, *after, *before, *mlp, *after]


def _expert_weights(model: ModelConfig, tensor: int, expert: int) -> list[Module]:
    """Return the experts, the router inside them, and the shared experts."""
    e, h = model.experts, model.hidden_size
    up, down = ((2 if is_gated(model) else 1) * e.ffn_hidden_size // tensor, e.ffn_hidden_size // tensor)
    held = e.count // expert
    experts = [(held * up * h, True), (held * down * h, True)]
    shared = [[(e.shared * up * h, True)], [(e.shared * down * h, True)]] if e.shared else []
    return [experts, [(e.count * h, True)], *shared]


def _head_norms(model: ModelConfig, tensor: int) -> list[Module]:
    """Return the norms of queries and keys; only over all heads the weight is split over tensor ranks."""
    ranks = tensor if model.query_key_norm is QueryKeyNorm.projection else 1
    return [[(size // ranks, False)] for size in query_key_norm_sizes(model)]


def _norm(model: ModelConfig) -> Module:
    return [(model.hidden_size, False)] * (2 if model.norm is NormKind.layer_norm else 1)


def _linear(matrix: int, bias: int, has_bias: bool) -> Module:
    return [(matrix, True), (bias, False)] if has_bias else [(matrix, True)]


def block_parameters(model: ModelConfig, tensor: int) -> int:
    """Return the parameters of the block that has most, on a tensor rank."""
    return max(parameters_of_block(model, tensor, has_experts) for has_experts in _kinds(model))


def _kinds(model: ModelConfig) -> set[bool]:
    return {layer_has_experts(model, layer) for layer in range(model.num_layers)}


def parameters_of_block(model: ModelConfig, tensor: int, has_experts: bool, expert: int = 1) -> int:
    modules = block_weights(model, tensor, has_experts=has_experts, expert=expert)
    return sum(numel for module in modules for numel, _ in module)


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
    adapters = adapter_weights(model, rank.tensor, rank.adapters)
    base = {
        kind: block_weights(model, rank.tensor, has_experts=kind, expert=rank.expert)
        for kind in (False, True)
    }
    modules: list[tuple[Module, bool]] = []  # with whether it is trained
    shared: set[int] = set()  # places of the experts in `modules`
    for chunk in rank.chunks:
        if chunk.has_embedding:
            modules += [(module, trains_all) for module in embedding_weights(model, rank.outputs)]
        for has_experts in chunk.kinds:
            if has_experts and rank.expert > 1:
                shared.add(len(modules) + _place_of_experts(model))
            modules += [(module, trains_all) for module in base[has_experts]]
            modules += [(module, True) for module in adapters]
        if chunk.has_head:
            modules.append((_norm(model), trains_all))
            if not rank.shares_tied_weight:
                matrix = rank.outputs * model.hidden_size
                modules.append((_linear(matrix, rank.outputs, model.biases.head), trains_all))
    for index, (module, is_trained) in enumerate(modules):
        for numel, is_matrix in module:
            yield Weight(numel, is_matrix, index, is_trained, index in shared)


def _place_of_experts(model: ModelConfig) -> int:
    """Return the place of the experts among the modules of a block with experts."""
    before, after = has_norm_before(model), has_norm_after(model)
    return 2 * before + 2 + len(query_key_norm_sizes(model)) + after
