"""Deliberate faults. Each rank calls a fault before it builds its engine.

The fault breaks a class or function of the launcher in the process of that rank only.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.runtime.pipe.module import PipelineModule
from torch import Tensor

import launcher.checkpoint.load as load
import launcher.data.blend as blend
import launcher.data.sampler as sampler
import launcher.data.windows as windows
import launcher.engine.direct_update as direct_update
import launcher.engine.flat as flat
import launcher.engine.optimizer as optimizers
import launcher.engine.overlapped_reduction as overlapped_reduction
import launcher.engine.stochastic as stochastic
import launcher.engine.update_guard as update_guard
import launcher.models.attention as attention
import launcher.models.attention_kernel as attention_kernel
import launcher.models.block_context as context
import launcher.models.blocks as blocks
import launcher.models.context_attention as context_attention
import launcher.models.dropout as dropout
import launcher.models.losses as losses
import launcher.models.masks as masks
import launcher.models.mlp as mlp
import launcher.models.norms as norms
import launcher.models.positions as positions
import launcher.models.rotary as rotary
import launcher.parallel.context as context_ranks
import launcher.parallel.cross_entropy as cross_entropy
import launcher.parallel.initializer as initializer
import launcher.parallel.layers as layers
import launcher.parallel.loss_kernels as loss_kernels
import launcher.parallel.random as random
import launcher.parallel.sharding as sharding
import launcher.runtime.training as training
import launcher.runtime.validation as validation
from launcher.checkpoint.save import CheckpointWriter
from launcher.config.numbers import IGNORED_LABEL
from launcher.config.shape import head_size
from launcher.data.images import ImageFiles
from launcher.data.loader import Loader
from launcher.data.packing import PackedChats
from launcher.engine.base import Engine
from launcher.parallel.mesh import Axis


@dataclass(frozen=True)
class Mutation:
    """A fault, a layout in which it shows, and words that distinguish its diagnosis from all others.

    `in_bf16` are the words of the diagnosis in the run's own precision, if that is another.
    """

    inject: Callable[[], None]
    layout: str
    words: tuple[str, ...]
    in_bf16: tuple[str, ...] = ()


def row_layer_not_reduced() -> None:
    def forward(self: layers.RowParallelLinear, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    layers.RowParallelLinear.forward = forward  # type: ignore[method-assign]


def row_layer_reduced_without_sum_over_sequence() -> None:
    """Under sequence parallelism: each rank keeps its sequence shard of its own partial products."""

    def sequence_shard(partial: Tensor, axis: Axis) -> Tensor:
        return partial.chunk(axis.size, dim=1)[axis.rank].clone()

    def biased(partial: Tensor, bias: Tensor, axis: Axis) -> Tensor:
        return sequence_shard(partial, axis) + bias

    layers.reduce_scatter_sequence_region = sequence_shard
    layers.reduce_scatter_biased_region = biased


def embedding_not_masked() -> None:
    def look_up(self: layers.VocabParallelEmbedding, x: Tensor) -> Tensor:
        rows = F.embedding((x - self.first).clamp(0, len(self.weight) - 1), self.weight)
        return self.tp.leave(rows)

    layers.VocabParallelEmbedding._first_use = look_up  # type: ignore[method-assign]


def norm_weights_not_reduced() -> None:
    layers.TensorParallel.replicated = lambda self, weight: weight  # type: ignore[method-assign]


def gradients_averaged_twice() -> None:
    average = deepspeed.DeepSpeedEngine.backward

    def backward(self: Any, loss: Tensor, **options: Any) -> Any:
        return average(self, loss / self.dp_world_size, **options)

    deepspeed.DeepSpeedEngine.backward = backward


def gradients_not_averaged() -> None:
    class Local(overlapped_reduction._Running):
        """An all-reduce that leaves each rank its own gradients."""

        def __init__(self, *_: Any) -> None:
            pass

        def end(self) -> None:
            pass

    overlapped_reduction._Running = Local  # type: ignore[misc]


def last_bucket_not_averaged() -> None:
    """The gradients that arrive last stay each rank's own."""
    right = overlapped_reduction.OverlappedReduction._begin_bucket

    def begin(self: Any) -> None:
        if self._begun < len(self._buckets) - 1:
            right(self)
        else:
            self._begun += 1

    overlapped_reduction.OverlappedReduction._begin_bucket = begin  # type: ignore[method-assign]


def bucket_sent_before_its_last_gradient() -> None:
    """The last gradient of a bucket is added after the reduction, so it stays on its own rank."""
    reduction = overlapped_reduction.OverlappedReduction
    begin_step, begin_bucket = reduction._begin_step, reduction._begin_bucket

    def early(self: Any) -> None:
        begin_step(self)
        self._missing = [max(1, missing - 1) for missing in self._missing]

    def ended_at_once(self: Any) -> None:
        begin_bucket(self)
        self._end_running()  # else the fault would depend on the time of the collective

    reduction._begin_step = early  # type: ignore[method-assign]
    reduction._begin_bucket = ended_at_once  # type: ignore[method-assign]


def gradients_scaled_by_accumulation() -> None:
    average = deepspeed.DeepSpeedEngine.backward

    def backward(self: Any, loss: Tensor, **options: Any) -> Any:
        return average(self, loss / self.gradient_accumulation_steps(), **options)

    deepspeed.DeepSpeedEngine.backward = backward


def loss_scaled_by_accumulation() -> None:
    mean = losses.mean_loss
    losses.mean_loss = lambda *arguments: mean(*arguments) / 3


def shards_not_counted() -> None:
    """Count the gradients of tensor rank 0 only, as DeepSpeed does with shards that are not marked."""
    update_guard.is_counted = lambda _parameter, mesh: mesh.tensor.rank == 0


def norm_of_the_local_shard() -> None:
    """Under ZeRO-0, and in BF16_Optimizer."""
    combined = update_guard.combined
    flat.combined = update_guard.combined = lambda norms, _, device: combined(norms, None, device)


def not_clipped() -> None:
    """Under ZeRO-0, in BF16_Optimizer and in the update without its sums."""
    flat.clip = update_guard.clip = lambda *_: None  # type: ignore[assignment]
    direct_update.clip_scale = lambda norm, _: torch.ones_like(norm)


def _neighbour(axis: Axis) -> Axis:
    return replace(axis, rank=(axis.rank + 1) % axis.size)


def kv_heads_on_the_wrong_rank() -> None:
    right = sharding.split_segments

    def split_segments(logical: sharding.LogicalTensor, axis: Axis) -> list[tuple[int, int, int]]:
        if "attention.qkv" not in logical.name:
            return right(logical, axis)
        return [*right(logical, axis)[:1], *right(logical, _neighbour(axis))[1:]]

    sharding.split_segments = split_segments


def value_heads_of_another_group() -> None:
    """Reverse the KV heads of each rank: the weights are right, but used for the wrong query heads."""
    right = attention.Attention._split_heads

    def split_heads(self: attention.Attention, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = right(self, fused)
        return q, k.flip(2), v.flip(2)

    attention.Attention._split_heads = split_heads  # type: ignore[method-assign]


def positions_offset_by_stage() -> None:
    """Offset the queries only: rotary positions are relative, so offsetting keys too has no effect."""
    right = attention.Attention._core

    def core(self: attention.Attention, q: Tensor, *arguments: Any) -> Tensor:
        stage = dist.get_rank() // (dist.get_world_size() // 2)
        for _ in range(2 * stage):  # rotate twice more: attention of stage 1 is wrong
            q = rotary.rotate(q, *arguments[3:5])
        return right(self, q, *arguments)

    attention.Attention._core = core  # type: ignore[method-assign]


def learned_positions_not_offset() -> None:
    """Every rank uses the positions of the first sequence shard."""

    def forward(self: positions.LearnedPositions, x: Tensor) -> Tensor:
        x = x + self.tp.replicated(self.weight)[: x.shape[1]]
        return self.dropout(x, self.dropout.seed())  # type: ignore[no-any-return]

    positions.LearnedPositions.forward = forward  # type: ignore[method-assign]


def shards_swapped() -> None:
    right = sharding.split_segments

    def split_segments(logical: sharding.LogicalTensor, axis: Axis) -> list[tuple[int, int, int]]:
        return right(logical, _neighbour(axis) if "mlp" in logical.name else axis)

    sharding.split_segments = split_segments


def weights_differ_between_data_ranks() -> None:
    """Draw other weights on each data rank; disable DeepSpeed's initial broadcast, which hides the fault."""
    right = initializer.seed_of
    initializer.seed_of = lambda *parts: right(*parts, dist.get_rank())
    deepspeed.DeepSpeedEngine._broadcast_model = lambda self: None


def partitions_drawn_alike() -> None:
    """Every data rank draws the first elements of a weight."""
    right = initializer.InitialValues.fill
    initializer.InitialValues.fill = lambda self, flat, start=0: right(self, flat)  # type: ignore[method-assign]


def weights_of_another_seed() -> None:
    right = initializer.seed_of
    initializer.seed_of = lambda seed, *parts: right(seed + 1, *parts)


def same_data_on_all_ranks() -> None:
    right = sampler.sample_indices
    sampler.sample_indices = lambda **where: right(**{**where, "data_rank": 0})


def last_micro_batch_dropped() -> None:
    right = flat.FlatEngine.train_batch

    def train_batch(self: flat.FlatEngine, batches: Any, labels: int | None = None) -> Any:
        boundary = deepspeed.DeepSpeedEngine.is_gradient_accumulation_boundary
        kept = list(batches)[:-1]
        seen = len(kept)

        def early(engine: Any) -> bool:
            return bool(engine.micro_steps % seen == seen - 1)

        deepspeed.DeepSpeedEngine.is_gradient_accumulation_boundary = early
        try:
            return right(self, kept, labels)
        finally:
            deepspeed.DeepSpeedEngine.is_gradient_accumulation_boundary = boundary

    flat.FlatEngine.train_batch = train_batch  # type: ignore[method-assign]


def tied_weight_updated_on_one_stage() -> None:
    PipelineModule.get_tied_weights_and_groups = lambda self: []


def padding_predicted() -> None:
    cross_entropy._unpadded = lambda logits, vocabulary, axis: logits.shape[1]


def loss_of_the_local_shard() -> None:
    right = cross_entropy._reduced

    def reduced(x: Tensor, operation: Any, axis: Axis) -> Tensor:
        return x if operation == dist.ReduceOp.MAX else right(x, operation, axis)

    cross_entropy._reduced = reduced


def last_chunk_without_gradient() -> None:
    right = cross_entropy._Gradients.add

    def add(self: Any, rows: slice, x: Tensor, weight: Tensor, gradient: Tensor, counted: Tensor) -> None:
        right(self, rows, x, weight, gradient, counted & (rows.stop < len(self._x)))

    cross_entropy._Gradients.add = add  # type: ignore[method-assign]


class _NoWait:
    def wait(self) -> None: ...


def column_gradient_not_reduced() -> None:
    layers.all_reduce_ = lambda x, group, *, asynchronous: _NoWait()  # type: ignore[assignment]


def decay_on_norm_weights() -> None:
    right = flat.build_optimizer

    def build(*arguments: Any) -> Any:
        optimizer = right(*arguments)
        for group in optimizer.param_groups:
            if "betas" in group:
                group["weight_decay"] = 0.1
        return optimizer

    flat.build_optimizer = build


def weights_rounded_to_nearest() -> None:
    stochastic.rounded = lambda exact, bits: exact.bfloat16().float()


def documents_unknown_on_inner_stages() -> None:
    from launcher.engine.pipeline import PipelineEngine

    begin = PipelineEngine._begin

    def at_the_ends(self: PipelineEngine, module: Any, inputs: Any) -> None:
        begin(self, module, inputs)
        if 0 < self.mesh.stage < self.mesh.shape.pipeline - 1:
            self.documents.ends = None

    PipelineEngine._begin = at_the_ends  # type: ignore[method-assign]


def positions_begin_again_after_512() -> None:
    right = rotary.tables
    rotary.tables = lambda places, *others: right(places % 512, *others)


def window_of_half_the_width() -> None:
    """Only windows longer than 100 positions."""
    right = masks.additive
    masks.additive = lambda allowed, window, dtype: right(
        allowed, window // 2 if window and window > 100 else window, dtype
    )


def row_biases_left_out() -> None:
    def forward(self: layers.RowParallelLinear, x: Tensor) -> Tensor:
        y = self.tp.leave(F.linear(x, self.weight))
        return y if self.bias is None else y + 0 * self.bias

    layers.RowParallelLinear.forward = forward  # type: ignore[method-assign]


def norm_weights_left_out() -> None:
    norm = norms.Norm.forward

    def forward(self: norms.Norm, x: Tensor) -> Tensor:
        if self.bias is not None:
            return norm(self, x)
        return F.rms_norm(x, (x.shape[-1],), None, self.epsilon) * (0 * self.weight + 1)

    norms.Norm.forward = forward  # type: ignore[method-assign]


def clip_factor_without_its_cap() -> None:
    def clip(optimizer: Any, norm: Tensor, limit: float) -> None:
        optimizer.grad_scale = norm / limit  # below 1, small gradients are scaled up

    flat.clip = update_guard.clip = clip
    direct_update.clip_scale = lambda norm, limit: norm / limit


def learning_rate_one_step_late() -> None:
    right = training.rate_of
    training.rate_of = lambda run, step: right(run, max(1, step - 1))


def decay_by_another_formula() -> None:
    right = optimizers.learning_rate

    def learning_rate(optimizer: Any, scheduler: Any, *, step: int, steps: int) -> float:
        return right(optimizer, scheduler, step=step, steps=steps + 1)

    training.learning_rate = learning_rate


def samples_from_the_beginning() -> None:
    right = Loader.step
    Loader.step = lambda self, consumed: right(self, 0)  # type: ignore[method-assign]


def every_epoch_in_the_same_order() -> None:
    right = sampler.permute
    sampler.permute = lambda positions, size, *, seed, epoch: right(positions, size, seed=seed, epoch=0)


def blend_weights_exchanged() -> None:
    right = blend.Segment.schedule.fget  # type: ignore[attr-defined]
    blend.Segment.schedule = property(  # type: ignore[assignment,method-assign]
        lambda self: blend.Schedule(right(self).weights[::-1])
    )


def windows_one_token_late() -> None:
    """A window begins one token later than the end of the inputs of the window before."""
    right = windows.Windows.read

    def read(self: windows.Windows, places: Any, part: Any = None) -> Any:
        rows = right(self, places, part)
        later = right(self, (places + 1) % len(self), part)
        return np.concatenate([rows[:, 1:], later[:, 1:2]], axis=1)

    windows.Windows.read = read  # type: ignore[method-assign]


def labels_not_shifted() -> None:
    right = Engine._to_device

    def to_device(self: Engine, batch: Any) -> Any:
        return right(self, batch if isinstance(batch, tuple) else (batch[:, :-1], batch[:, :-1].copy()))

    Engine._to_device = to_device  # type: ignore[method-assign]


def labels_of_conversations_not_shifted() -> None:
    right = PackedChats.read

    def read(self: PackedChats, places: Any, part: Any = None) -> Any:
        inputs, labels = right(self, places, part)
        return inputs, np.where(labels == IGNORED_LABEL, labels, inputs)

    PackedChats.read = read  # type: ignore[method-assign]


def questions_are_learned() -> None:
    """The mask of a conversation is ignored: the user's tokens are labels as well."""
    right = PackedChats.read

    def read(self: PackedChats, places: Any, part: Any = None) -> Any:
        inputs, labels = right(self, places, part)
        following = np.concatenate([inputs[:, 1:], labels[:, -1:]], axis=1)
        return inputs, np.where(following == self.end_of_document, labels, following)

    PackedChats.read = read  # type: ignore[method-assign]


def classes_in_another_order() -> None:
    """As if the directories of the classes were numbered in another order."""
    right = ImageFiles.read

    def read(self: ImageFiles, places: Any, part: Any = None) -> Any:
        images, classes = right(self, places, part)
        return images, max(file.label for file in self.files) - classes

    ImageFiles.read = read  # type: ignore[method-assign]


def filled_up_samples_are_evaluated() -> None:
    right = validation._masked_batches

    def unmasked(run: Any, engine: Any, samples: Any, counted: range) -> Any:
        for inputs, _ in right(run, engine, samples, counted):
            yield inputs, np.roll(inputs, -1, axis=1)

    validation._masked_batches = unmasked


def states_saved_in_bf16() -> None:
    right = CheckpointWriter._snapshot

    def snapshot(self: CheckpointWriter) -> Any:
        for piece in right(self):
            low = replace(piece, tensor=piece.tensor.bfloat16().float())
            yield piece if piece.kind == "weight" else low

    CheckpointWriter._snapshot = snapshot  # type: ignore[method-assign]


def number_of_updates_not_restored() -> None:
    right = load.make_states
    load.make_states = lambda engine, keys, updates: right(engine, keys, 0)


def the_same_masks_in_every_step() -> None:
    right = random.DropoutRandom.begin_step
    random.DropoutRandom.begin_step = lambda self, step: right(self, 0)  # type: ignore[method-assign]


def masks_shared_by_tensor_ranks() -> None:
    random.DropoutRandom.local = random.DropoutRandom.shared  # type: ignore[method-assign]


def masks_differ_between_tensor_ranks() -> None:
    right = random.seed_of
    random.seed_of = lambda *parts: right(*parts, dist.get_rank())


def masks_shared_by_data_ranks() -> None:
    right = random.seed_of
    random.seed_of = lambda seed, name, stage, data_rank, *parts: right(seed, name, stage, 0, *parts)


def masks_drawn_anew() -> None:
    """Every draw uses another seed, also the draw of a recomputation."""
    right, draws = dropout.seeded, count()
    dropout.seeded = lambda seed, device: right(seed ^ next(draws), device)


def masks_left_out() -> None:
    context.HiddenDropout.forward = lambda self, x, seed: x  # type: ignore[method-assign]


def attention_dropout_left_out() -> None:
    right = dropout.attend
    dropout.attend = lambda q, k, v, mask, _, kernel: right(q, k, v, mask, 0.0, kernel)


def rotary_scaling_left_out() -> None:
    rotary.scaled = lambda plain, *_: plain


def whole_heads_rotated() -> None:
    rotary.rotary_size = head_size


def attention_scale_ignored() -> None:
    right = attention.Kernel
    attention.Kernel = lambda is_causal, _, cap, device: right(is_causal, None, cap, device)  # type: ignore[misc,assignment]


def embedding_scale_left_out() -> None:
    build = layers.VocabParallelEmbedding.__init__

    def unscaled(self: layers.VocabParallelEmbedding, *arguments: Any, **options: Any) -> None:
        build(self, *arguments, **options)
        self.scale = 1.0

    layers.VocabParallelEmbedding.__init__ = unscaled  # type: ignore[method-assign]


def window_left_out() -> None:
    right = masks.additive
    masks.additive = lambda allowed, _, dtype: right(allowed, None, dtype)


def window_of_one_position_more() -> None:
    right = masks.additive
    masks.additive = lambda allowed, window, dtype: right(allowed, window and window + 1, dtype)


def window_forgets_documents() -> None:
    """With a window, positions see earlier documents."""
    right = masks.additive

    def additive(allowed: Tensor, window: int | None, dtype: Any) -> Tensor:
        return right(allowed if window is None else (allowed | True).tril(), window, dtype)

    masks.additive = additive


def layers_counted_from_the_stage() -> None:
    """Each stage takes its first layer for the first of the model, and so has another pattern of windows."""
    right = blocks.window_of
    blocks.window_of = lambda model, layer: right(model, layer % (model.num_layers // 2))


def norm_of_the_sum() -> None:
    """The norm after the MLP is applied to the sum, as in the first Transformers."""

    def second_half(
        self: blocks.TransformerBlock, x: Tensor, attended: Tensor, seed: Any, *of_adapters: Any
    ) -> Tensor:
        added = self.dropout(self.mlp(blocks._normed(self.mlp_norm, attended), *of_adapters), seed)
        return blocks._normed(self.mlp_output_norm, attended + added)

    blocks.TransformerBlock._second_half = second_half  # type: ignore[method-assign]


def gate_and_up_exchanged() -> None:
    """The activation is that of the second half of the first projection."""
    right = mlp.activated

    def activated(model: Any, y: Tensor) -> Tensor:
        gate, up = y.chunk(2, dim=-1)
        return right(model, torch.cat([up, gate], dim=-1))

    mlp.activated = activated


def factor_of_yarn_left_out() -> None:
    rotary.attention_factor = lambda _: 1.0


def rotary_base_of_windows_ignored() -> None:
    right = rotary.RotaryTables.of
    rotary.RotaryTables.of = lambda self, length, x, **_: right(self, length, x)  # type: ignore[method-assign]


def scores_not_capped() -> None:
    attention_kernel.soft_capped = lambda x, cap: x


def slope_of_the_logits_cap_left_out() -> None:
    right = cross_entropy.soft_cap_
    cross_entropy.soft_cap_ = lambda x, cap: right(x, cap).fill_(1.0)
    loss_kernels.slope_of_cap = lambda x, cap: torch.ones_like(x)  # compiled


def head_norm_gradients_not_reduced() -> None:
    norms.copy_region = lambda x, axis: x


def joined_head_norm_of_the_local_heads() -> None:
    norms.reduce_region = lambda x, axis: x * axis.size


LLAMA, GPT = "model=llama_tiny", "model=gpt_tiny"
TP = "parallelism=tp2 parallelism.data=1"
SP = f"{TP} parallelism.sequence_parallel=true"
DP = "parallelism=dp parallelism.data=2"
PP = "parallelism=pp2 parallelism.data=1"

HEAD_NORM, JOINED = "model.query_key_norm=head", "model.query_key_norm=projection"
WINDOW = "model.sliding_window=64"
SCALED = "model.rope_scaling.kind=llama3 model.rope_scaling.factor=8 model.rope_scaling.original_length=16"
# Attention that is right for the first token, which sees itself alone.
SCORES = ("blocks.0.attention.output", "right for the first token", "mask or scale")


# Faults of context parallelism. In these layouts two ranks share each sequence.


def loss_averaged_by_rank_means() -> None:
    losses.mean_loss = lambda total, labels, _=None: total / (labels != IGNORED_LABEL).sum().clamp(min=1)


def gradients_averaged_over_context_twice() -> None:
    average = deepspeed.DeepSpeedEngine.backward

    def backward(self: Any, loss: Tensor, **options: Any) -> Any:
        return average(self, loss / self.dp_world_size, **options)

    deepspeed.DeepSpeedEngine.backward = backward


def positions_of_the_part() -> None:
    """Rotary positions count from the start of the rank's part."""

    class Local(context_ranks.ContextParallel):
        def positions(self, length: int, device: torch.device) -> Tensor:
            return torch.arange(length // self.axis.size, device=device)

    right = rotary.RotaryTables.of

    def of(self: rotary.RotaryTables, *arguments: Any, **options: Any) -> Any:
        assert self._context is not None
        self._context = Local(self._context.axis, self._context.method)
        return right(self, *arguments, **options)

    rotary.RotaryTables.of = of  # type: ignore[method-assign]


def zigzag_undone_wrongly() -> None:
    """Attention takes the two chunks of a rank for neighbours."""
    right = context_attention.Queries.__init__

    def init(self: Any, q: Tensor, chunks: tuple[int, ...], rules: Any) -> None:
        first = 2 * rules.settings.rank
        right(self, q, (first, first + 1), rules)

    context_attention.Queries.__init__ = init  # type: ignore[method-assign]


def mask_by_local_index() -> None:
    """The places of keys count from the start of their chunk."""
    right = context_attention.Rules.pair

    def pair(self: Any, chunk: int, queries: slice, of_keys: int, dtype: torch.dtype) -> Any:
        size = queries.stop - queries.start
        shifted = replace(self, first=self.first + of_keys * size)
        return right(shifted, chunk, queries, of_keys, dtype)

    context_attention.Rules.pair = pair  # type: ignore[method-assign]


def copies_of_kv_heads_not_summed() -> None:
    context_attention._summed_copies = lambda x, heads, copies: x.unflatten(2, (heads, copies))[:, :, :, 0]


def label_shifted_after_sharding() -> None:
    """The label of a chunk's last token is the next token that the rank holds."""
    right = sampler.part_of_pair

    def part_of_pair(inputs: Any, labels: Any, part: Any) -> Any:
        tokens, shifted = right(inputs, labels, part)
        if part is not None:
            shifted = shifted.copy()
            shifted[:, :-1] = tokens[:, 1:]
        return tokens, shifted

    sampler.part_of_pair = part_of_pair


def last_chunk_sees_the_future() -> None:
    right = context_attention.Rules.pair

    def pair(self: Any, chunk: int, queries: slice, of_keys: int, dtype: torch.dtype) -> Any:
        rules = right(self, chunk, queries, of_keys, dtype)
        is_last = chunk == 2 * self.settings.size - 1
        return replace(rules, is_diagonal=rules.is_diagonal and not is_last)

    context_attention.Rules.pair = pair  # type: ignore[method-assign]


MUTATIONS = {
    "no all-reduce after the row layer": Mutation(
        row_layer_not_reduced,
        f"{LLAMA} {TP}",
        ("output of blocks.0.attention.output", "differs between tensor ranks", "not summed"),
    ),
    "no sum in the row layer's reduce-scatter": Mutation(
        row_layer_reduced_without_sum_over_sequence,
        f"{GPT} {SP}",
        ("output of embedding", "have output zero", "reduce-scatter"),
    ),
    "embedding mask left out": Mutation(
        embedding_not_masked,
        f"{GPT} {TP}",
        ("output of embedding", "equal on every tensor rank", "mask or the first row"),
    ),
    "norm-weight gradients not reduced under sequence parallel": Mutation(
        norm_weights_not_reduced,
        f"{LLAMA} {SP}",
        ("norm.weight", "every sharded weight is right", "norm weights"),
    ),
    "gradients averaged twice over data ranks": Mutation(
        gradients_averaged_twice, f"{GPT} {DP}", ("every gradient", "1 / data size (1/2)", "scaled by data")
    ),
    "gradients not averaged over data ranks": Mutation(
        gradients_not_averaged,
        f"{GPT} {DP}",
        ("differs between data ranks", "not averaged"),
        in_bf16=("data ranks report different gradient norms", "not averaged"),
    ),
    "gradients of the last bucket not averaged": Mutation(
        last_bucket_not_averaged,
        f"{GPT} {DP}",
        ("differs between data ranks", "not averaged"),
        in_bf16=("data ranks report different gradient norms", "not averaged"),
    ),
    "a bucket sent before its last gradient": Mutation(
        bucket_sent_before_its_last_gradient,
        f"{GPT} {DP}",
        ("differs between data ranks", "not averaged"),
        in_bf16=("data ranks report different gradient norms", "not averaged"),
    ),
    "gradients scaled by accumulation": Mutation(
        gradients_scaled_by_accumulation,
        f"{GPT} {DP}",
        ("every gradient", "1 / accumulation size (1/3)", "scaled by accumulation"),
    ),
    "loss scaled by accumulation": Mutation(
        loss_scaled_by_accumulation,
        f"{GPT} {DP}",
        ("every micro-batch's loss", "1 / accumulation size (1/3)", "loss is scaled by accumulation"),
    ),
    "clip norm without the other shards": Mutation(
        shards_not_counted,
        f"{GPT} {TP} parallelism.zero_stage=1",
        ("every gradient is right and the reported norm", "shards are left out"),
    ),
    "clip norm of the local shard": Mutation(
        norm_of_the_local_shard,
        f"{GPT} {TP}",
        ("different gradient norms", "norm is not summed over all shards"),
    ),
    "clipping left out": Mutation(
        not_clipped, f"{GPT} {TP}", ("norm is right", "clipping uses another norm")
    ),
    "KV heads on the wrong rank": Mutation(
        kv_heads_on_the_wrong_rank, f"{LLAMA} {TP}", ("attention.qkv.weight", "KV heads", "wrong tensor rank")
    ),
    "value heads of another group": Mutation(
        value_heads_of_another_group,
        f"{LLAMA} {TP} model.num_heads=8 model.num_kv_heads=4",
        ("attention.output", "wrong from the first token on", "KV heads of another rank or group"),
    ),
    "rotary positions offset by stage": Mutation(
        positions_offset_by_stage,
        f"{LLAMA} {PP}",
        (
            "blocks.2.attention.output on stage 1",
            "all outputs of stage 0 are right",
            "rotary positions offset",
        ),
    ),
    "learned positions not offset by the sequence shard": Mutation(
        learned_positions_not_offset, f"{GPT} {SP}", ("output of positions", "positions offset")
    ),
    "shards swapped": Mutation(shards_swapped, f"{LLAMA} {TP}", ("mlp.gate_up.weight", "shards are swapped")),
    "another weight seed per data rank": Mutation(
        weights_differ_between_data_ranks,
        f"{GPT} {DP}",
        ("differs between data ranks before", "its own initial weights"),
        in_bf16=("before the first step", "another seed"),  # ZeRO-1 takes each part from one rank
    ),
    "another weight seed per data rank, under ZeRO-3": Mutation(
        weights_differ_between_data_ranks,
        f"{GPT} parallelism=zero3 parallelism.data=2",
        ("before the first step", "another seed"),
    ),
    "ZeRO-3 partitions drawn alike": Mutation(
        partitions_drawn_alike,
        f"{GPT} parallelism=zero3 parallelism.data=2",
        ("before the first step", "another seed"),
    ),
    "another weight seed": Mutation(
        weights_of_another_seed, f"{GPT} {TP}", ("before the first step", "another seed")
    ),
    "same data on both data ranks": Mutation(
        same_data_on_all_ranks, f"{GPT} {DP}", ("data rank 1 reports", "read the same samples")
    ),
    "same data on both data ranks, under a pipeline": Mutation(
        same_data_on_all_ranks,
        f"{GPT} parallelism=pp2 parallelism.data=2",
        ("data rank 1 reports", "read the same samples"),
    ),
    "last micro-batch dropped": Mutation(
        last_micro_batch_dropped, f"{GPT} {DP}", ("2 of 3 micro-batches", "usually the last")
    ),
    "tied weight updated on one stage only": Mutation(
        tied_weight_updated_on_one_stage,
        f"{GPT} {PP}",
        ("embedding.weight", "copies", "one stage's gradient only"),
    ),
    "vocabulary padding predicted": Mutation(
        padding_predicted,
        f"{LLAMA} {TP} model.vocab_size=259",
        ("effect of 1 more logits", "padding of the vocabulary enters"),
    ),
    "cross-entropy of the local shard": Mutation(
        loss_of_the_local_shard,
        f"{LLAMA} {TP}",
        ("computed from the logits is wrong", "cross-entropy"),
        in_bf16=("only the losses of", "cross-entropy of some labels"),
    ),
    "no gradient from the head's last chunk of tokens": Mutation(
        last_chunk_without_gradient,
        f"{LLAMA} {DP}",
        ("not by a constant ratio; the loss is right", "goes wrong at head.weight"),
    ),
    "rotary scaling left out": Mutation(rotary_scaling_left_out, f"{LLAMA} {TP} {SCALED}", SCORES),
    "whole heads rotated instead of a part": Mutation(
        whole_heads_rotated, f"{LLAMA} {TP} model.rotary_fraction=0.5", SCORES
    ),
    "attention scale ignored": Mutation(
        attention_scale_ignored, f"{LLAMA} {TP} model.attention_scale_size=4", SCORES
    ),
    "embedding scale left out": Mutation(
        embedding_scale_left_out,
        f"{LLAMA} {TP} model.embedding_scale=8",
        ("output of embedding", "the right one times 0.125", "scale of the embedding"),
    ),
    "sliding window left out": Mutation(window_left_out, f"{LLAMA} {SP} {WINDOW}", SCORES),
    "sliding window of one position more": Mutation(
        window_of_one_position_more, f"{LLAMA} {PP} {WINDOW}", SCORES
    ),
    "sliding window across documents": Mutation(
        window_forgets_documents, f"{LLAMA} {TP} {WINDOW} data.document_attention=true", SCORES
    ),
    "rotary base of windows ignored": Mutation(
        rotary_base_of_windows_ignored, f"{LLAMA} {TP} {WINDOW} model.local_rope_theta=100", SCORES
    ),
    "attention scores not capped": Mutation(
        scores_not_capped, f"{LLAMA} {TP} model.attention_soft_cap=1 model.query_key_norm=head", SCORES
    ),
    "slope of the logits' soft cap left out": Mutation(
        slope_of_the_logits_cap_left_out,
        f"{LLAMA} {DP} model.logit_soft_cap=1",
        ("not by a constant ratio; the loss is right", "goes wrong at head.weight"),
    ),
    "head-norm gradients not reduced over tensor ranks": Mutation(
        head_norm_gradients_not_reduced,
        f"{LLAMA} {TP} {HEAD_NORM}",
        ("norm.weight", "every sharded weight is right", "norm weights"),
    ),
    "norm of all heads taken over the rank's heads": Mutation(
        joined_head_norm_of_the_local_heads, f"{LLAMA} {TP} {JOINED}", SCORES
    ),
    "column layer's input gradient not reduced": Mutation(
        column_gradient_not_reduced, f"{LLAMA} {TP}", ("are wrong too", "column layer's input gradient")
    ),
}

# Two ranks share each sequence.
CP = "parallelism.data=1 parallelism.context=2"
CONTEXT_SCORES = ("right for the first token", "attention over context ranks")
LABELS = ("loss of the logits is not", "labels of context ranks")
MUTATIONS |= {
    "loss averaged by means of context ranks": Mutation(
        loss_averaged_by_rank_means, f"{GPT} {CP} data=chat data.train=chats.jsonl", LABELS
    ),
    "gradients averaged over context ranks twice": Mutation(
        gradients_averaged_over_context_twice, f"{GPT} {CP}", ("scaled by context",)
    ),
    "rotary positions of the part": Mutation(positions_of_the_part, f"{LLAMA} {CP}", CONTEXT_SCORES),
    "zigzag undone wrongly": Mutation(zigzag_undone_wrongly, f"{LLAMA} {CP}", CONTEXT_SCORES),
    "mask by local index": Mutation(
        mask_by_local_index, f"{LLAMA} {CP} data.document_attention=true", CONTEXT_SCORES
    ),
    "gradients of copied KV heads not summed": Mutation(
        copies_of_kv_heads_not_summed,
        f"{LLAMA} {CP} parallelism.context_method=ulysses model.num_kv_heads=1",
        ("right for queries and wrong for keys and values", "copies of a head"),
    ),
    "label shifted after the sequence is shared": Mutation(
        label_shifted_after_sharding, f"{GPT} {CP}", LABELS
    ),
    "last chunk sees the future": Mutation(
        last_chunk_sees_the_future,
        f"{LLAMA} {CP} parallelism.context_method=gather",
        ("only in the last chunk", "see later tokens"),
    ),
}

# Parts of a model, and their place in it.
YARN = "model.rope_scaling.kind=yarn model.rope_scaling.factor=16 model.rope_scaling.original_length=16"
MUTATIONS |= {
    "factor of YaRN left out": Mutation(factor_of_yarn_left_out, f"{LLAMA} {TP} {YARN}", SCORES),
    "windows counted from the first layer of a stage": Mutation(
        layers_counted_from_the_stage,
        f"{LLAMA} {PP} {WINDOW} model.full_attention_every=2",
        ("blocks.3.attention.output on stage 1", "all outputs of stage 0 are right", "mask or scale"),
    ),
    "norm of the sum in place of the MLP's output": Mutation(
        norm_of_the_sum,
        f"{LLAMA} {TP} model.norm_placement=sandwich",
        ("output of blocks.0.mlp_output_norm is the first wrong", "the norm: its input"),
    ),
    "gate and up exchanged": Mutation(
        gate_and_up_exchanged,
        f"{LLAMA} {DP} model.mlp=geglu",
        ("output of blocks.0.mlp.down is the first wrong", "the activation"),
    ),
}

# Faults that show in the first step only because biases and norm weights are perturbed.
PERTURBED_MUTATIONS = {
    "biases of row layers left out": Mutation(
        row_biases_left_out, f"{GPT} {DP}", ("output of blocks.0.attention.output is the first wrong",)
    ),
    "weights of norms left out": Mutation(
        norm_weights_left_out, f"{LLAMA} {DP}", ("output of blocks.0.attention_norm is the first wrong",)
    ),
}

# Faults of inner pipeline stages, which three large axes leave to a second small layout.
THREE_AXES = (
    "parallelism.pipeline=4 parallelism.data=4 parallelism.tensor=2 hardware.accelerators_per_node=32"
)
INNER_MUTATIONS = {
    "documents unknown on inner stages": Mutation(
        documents_unknown_on_inner_stages,
        f"{LLAMA} {THREE_AXES} model.num_layers=8 data.document_attention=true training.micro_batch_size=1",
        ("blocks.2.attention.output on stage 1", "mask or scale"),
    ),
}

# Faults of positions that a small run does not have.
LONG_MUTATIONS = {
    "rotary positions begin again after 512": Mutation(
        positions_begin_again_after_512, f"{LLAMA} {DP} model.max_sequence_length=2048", SCORES
    ),
    "a long window of half the width": Mutation(
        window_of_half_the_width,
        f"{LLAMA} {DP} model.max_sequence_length=1024 model.sliding_window=300",
        SCORES,
    ),
}

# Faults of the whole run: data, schedule, clipping, evaluation, checkpoints.
OTHER_SAMPLES = ("that of other tokens", "other samples are read")
OTHER_LABELS = ("computed from the logits is wrong", "other labels")
CHAT = "data=chat data.train=chats.jsonl"
UPDATES = ("gradients and states are right, and the update of", "schedule")
WHOLE_MUTATIONS = {
    "clip factor without its cap": Mutation(
        clip_factor_without_its_cap, f"{GPT} {DP}", ("the norm is right and every applied gradient",)
    ),
    "learning rate one step late": Mutation(
        learning_rate_one_step_late,
        f"{GPT} {DP}",
        (*UPDATES, "the reference times 0.5000"),
        in_bf16=UPDATES,
    ),
    "decay by another formula": Mutation(
        decay_by_another_formula, f"{GPT} {DP} scheduler=cosine scheduler.warmup_steps=2", UPDATES
    ),
    "samples from the beginning": Mutation(samples_from_the_beginning, f"{GPT} {DP}", OTHER_SAMPLES),
    "every epoch in the same order": Mutation(every_epoch_in_the_same_order, f"{LLAMA} {DP}", OTHER_SAMPLES),
    "weights of the blend exchanged": Mutation(blend_weights_exchanged, f"{GPT} {TP}", OTHER_SAMPLES),
    "windows one token late": Mutation(windows_one_token_late, f"{GPT} {PP}", OTHER_SAMPLES),
    "labels not shifted": Mutation(labels_not_shifted, f"{GPT} {PP}", OTHER_LABELS),
    "labels of conversations not shifted": Mutation(
        labels_of_conversations_not_shifted, f"{GPT} {DP} {CHAT}", OTHER_LABELS
    ),
    "the mask of conversations ignored": Mutation(
        questions_are_learned, f"{LLAMA} {TP} {CHAT}", OTHER_LABELS
    ),
    "classes of images in another order": Mutation(
        classes_in_another_order, f"model=vit_tiny data=digits {DP}", OTHER_LABELS
    ),
    "samples that fill up a batch are evaluated": Mutation(
        filled_up_samples_are_evaluated,
        f"{GPT} {DP}",
        ("every step is right and the validation loss is wrong", "masked labels"),
    ),
    "optimizer states saved in bf16": Mutation(
        states_saved_in_bf16, f"{GPT} {TP}", ("differs after the checkpoint is restored", "its precision")
    ),
    "number of updates not restored": Mutation(
        number_of_updates_not_restored, f"{GPT} {TP}", (*UPDATES, "number of updates that Adam counts")
    ),
}

# Faults that show only under the run's own optimizer.
OPTIMIZER_MUTATIONS = {
    "weight decay on norm weights": Mutation(
        decay_on_norm_weights, f"{GPT} {TP}", ("update or state computed from them", "weight decay")
    ),
}

# Faults that show with bf16 states only.
STATES_MUTATIONS = {
    "weights rounded to nearest": Mutation(
        weights_rounded_to_nearest,
        f"{LLAMA} {DP} precision=bf16_states",
        ("mean of the rounded updates", "rounded to nearest"),
    ),
}

# Faults of dropout, which show in the dropout pass.
DROPOUT = f"{GPT} model.dropout=0.1"
DROPOUT_MUTATIONS = {
    "dropout mask shared across tensor ranks": Mutation(
        masks_shared_by_tensor_ranks, f"{DROPOUT} {TP}", ("attention masks are shared by tensor ranks",)
    ),
    "dropout mask shared across sequence shards": Mutation(
        masks_shared_by_tensor_ranks, f"{DROPOUT} {SP}", ("masks are shared by tensor ranks",)
    ),
    "hidden dropout mask different on each tensor rank": Mutation(
        masks_differ_between_tensor_ranks, f"{DROPOUT} {TP}", ("hidden masks differ between tensor ranks",)
    ),
    "dropout mask shared across data ranks": Mutation(
        masks_shared_by_data_ranks, f"{DROPOUT} {DP}", ("masks are shared by data ranks",)
    ),
    "dropout mask not restored in recomputation": Mutation(
        masks_drawn_anew,
        f"{DROPOUT} {TP} parallelism.activation_checkpointing=selective",
        ("recomputed masks differ",),
    ),
    "the same masks in every step": Mutation(
        the_same_masks_in_every_step, f"{DROPOUT} {TP}", ("masks repeat in the next step",)
    ),
    "hidden dropout left out": Mutation(
        masks_left_out, f"{DROPOUT} {TP}", ("the share dropped is not model.dropout",)
    ),
    "attention dropout left out": Mutation(
        attention_dropout_left_out, f"{DROPOUT} {TP}", ("attention masks are missing",)
    ),
}

BY_PASS = {
    "plain SGD": MUTATIONS | PERTURBED_MUTATIONS,
    "inner stages": INNER_MUTATIONS,
    "long samples": LONG_MUTATIONS,
    "whole run": WHOLE_MUTATIONS,
    "own optimizer": OPTIMIZER_MUTATIONS,
    "bf16 states": STATES_MUTATIONS,
    "dropout": DROPOUT_MUTATIONS,
}
FAULTS = {name: mutation for of_pass in BY_PASS.values() for name, mutation in of_pass.items()}
# The pass in the precision of a run in bf16 that shows the faults of a pass: see tests/parity/in_bf16.py.
IN_BF16 = {
    "plain SGD": "own optimizer",
    "inner stages": "inner stages",
    "long samples": "long samples",
    "whole run": "whole run",
    "own optimizer": "own optimizer",
    "bf16 states": "bf16 states",
    "dropout": "dropout",
}


def _in_bf16(mutation: Mutation) -> str:
    return f" (bf16: {'; '.join(mutation.in_bf16)})" if mutation.in_bf16 else ""


def fault_table() -> str:
    """Return the table of docs/verify.md: each fault, the passes that show it, and its diagnosis."""
    rows = [
        f"| {name} | {title} | {IN_BF16[title]} | {'; '.join(mutation.words)}{_in_bf16(mutation)} |"
        for title, of_pass in BY_PASS.items()
        for name, mutation in of_pass.items()
    ]
    header = "| fault | first shown by | in bf16 shown by | in the diagnosis |"
    return "\n".join([header, "|---|---|---|---|", *rows])


if __name__ == "__main__":
    print(fault_table())
