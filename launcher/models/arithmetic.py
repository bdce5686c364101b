"""Parameter and FLOP counts from a model's config alone. Tests compare them with the real modules."""

from launcher.config.layout import Layout
from launcher.config.schema import InputKind, ModelConfig, NormKind, PositionKind, RunConfig
from launcher.config.shape import (
    expert_layers,
    has_class_token,
    has_norm_after,
    has_norm_before,
    is_gated,
    lora_segments,
    output_size,
    position_count,
    qkv_sizes,
    query_key_norm_sizes,
    sequence_length,
)
from launcher.parallel.buckets import FILLED, reduces_during_backward

# Elements of bf16 gradients: an eager update casts at most so many at once; a weight with at least so many is
# updated alone, and smaller neighbours together (engine/direct_update.py).
CAST_AT_ONCE, UPDATED_ALONE = 1 << 24, 1 << 20
PREFETCHED, LIVE = 50_000_000, 1_000_000_000  # DeepSpeed's defaults under ZeRO-3, in elements of weights


def block_matrix_parameters(model: ModelConfig, *, active: bool = False) -> int:
    """Return the projection weights of all blocks; no norms, no biases.

    With `active` only those that multiply a token: of the experts of a layer the chosen and the shared ones.
    """
    sparse = expert_layers(model)
    dense = (model.num_layers - sparse) * _dense_columns(model)
    attention = model.num_layers * _attention_columns(model)
    return model.hidden_size * (attention + dense + sparse * _expert_columns(model, active))


def largest_block_matrices(model: ModelConfig) -> int:
    """Return the projection weights of the block that has most."""
    sparse = expert_layers(model)
    dense = _dense_columns(model) if sparse < model.num_layers else 0
    experts = _expert_columns(model, False) if sparse else 0
    return model.hidden_size * (_attention_columns(model) + max(dense, experts))


def _attention_columns(model: ModelConfig) -> int:
    """Return the parameters of the projections of attention in a layer, over the hidden size."""
    qkv = qkv_sizes(model)
    return sum(qkv) + qkv[0]


def _dense_columns(model: ModelConfig) -> int:
    """Return the parameters of the projections of a layer's MLP, over the hidden size."""
    return _up_size(model) + model.ffn_hidden_size


def _expert_columns(model: ModelConfig, active: bool) -> int:
    """Return the parameters of the experts of a layer, with their router, over the hidden size."""
    e = model.experts
    experts = e.shared + (e.top_k if active else e.count)
    return e.count + experts * (3 if is_gated(model) else 2) * e.ffn_hidden_size


def matrix_parameters(model: ModelConfig, *, active: bool = False) -> int:
    """Return the weights that multiply: projections, head and patches; no look-ups, norms or biases.

    With `active` only those that multiply each token.
    """
    head = output_size(model) * model.hidden_size
    return block_matrix_parameters(model, active=active) + head + _patch_parameters(model)


def _up_size(model: ModelConfig) -> int:
    """Return the outputs of the first projection of the MLP, with the gate if there is one."""
    return (2 if is_gated(model) else 1) * model.ffn_hidden_size


def _patch_parameters(model: ModelConfig) -> int:
    return model.image_channels * model.patch_size**2 * model.hidden_size


def parameters(model: ModelConfig) -> int:
    """Return the number of logical parameters; a tied embedding counts once, vocabulary padding never."""
    return matrix_parameters(model) + _vector_parameters(model) + _first_layer_parameters(model)


def active_parameters(model: ModelConfig) -> int:
    """Return the number of parameters that compute a token; of experts those that it chooses and shares."""
    return parameters(model) - matrix_parameters(model) + matrix_parameters(model, active=True)


def _vector_parameters(model: ModelConfig) -> int:
    """Return the parameters of norms and of the biases of projections."""
    h, biases = model.hidden_size, model.biases
    norm = (2 if model.norm is NormKind.layer_norm else 1) * h
    norms = 2 * (has_norm_before(model) + has_norm_after(model)) * norm + sum(query_key_norm_sizes(model))
    qkv, up = biases.qkv * sum(qkv_sizes(model)), biases.up * _up_size(model)
    block = norms + qkv + up + (biases.output + biases.down) * h
    return model.num_layers * block + norm + biases.head * output_size(model)


def _first_layer_parameters(model: ModelConfig) -> int:
    """Return the parameters before the first block that _patch_parameters does not count."""
    h = model.hidden_size
    positions = position_count(model) * h if model.positions is PositionKind.learned else 0
    if model.inputs is InputKind.patches:
        return positions + h + (h if has_class_token(model) else 0)  # the patches' bias
    return positions + (0 if model.tie_embeddings else model.vocab_size * h)


def adapter_parameters(run: RunConfig) -> int:
    """Return the parameters of the adapters (LoRA); 0 without adapters."""
    lora = run.finetune.lora
    sizes = lora_segments(run.model)
    return run.model.num_layers * sum(
        (len(segments) * inputs + sum(segments)) * (lora.rank or 0)
        for target, (inputs, segments) in sizes.items()
        if target in lora.targets
    )


def trained_parameters(run: RunConfig) -> int:
    """Return the number of parameters that the optimizer updates."""
    return adapter_parameters(run) or parameters(run.model)


def reduce_bucket(run: RunConfig, layout: Layout) -> int:
    """Return the elements of gradients that are reduced at once.

    If DeepSpeed allocates the whole bucket, the size is at most DeepSpeed's default.
    """
    if reduces_during_backward(run, layout):
        return FILLED[layout.device]
    return min(500_000_000, trained_parameters(run))


def gathers_whole_blocks(run: RunConfig, layout: Layout) -> bool:
    """Return whether ZeRO-3 gathers a block at once, and not each of its modules when it is called.

    A compiled block calls no modules. Otherwise two blocks must fit into DeepSpeed's default of live weights:
    with fewer calls a step is shorter, but a block of 5e9 weights would need 10 GB at once, and a copy.
    """
    return layout.compiled or 2 * gathered_block(run, layout) <= LIVE


def prefetched_and_live(run: RunConfig, layout: Layout) -> tuple[int, int]:
    """Return the elements of weights that ZeRO-3 gathers ahead, and how many it may hold whole.

    At least DeepSpeed's defaults. If blocks are gathered at once, the next one is gathered ahead: otherwise
    most of a large block would be waited for.
    """
    block = gathered_block(run, layout) if gathers_whole_blocks(run, layout) else 0
    return max(PREFETCHED, block), max(LIVE, 2 * block)


def gathered_block(run: RunConfig, layout: Layout) -> int:
    """Return the elements of the largest block that ZeRO-3 gathers: of its projections on a tensor rank."""
    return largest_block_matrices(run.model) // layout.tensor


def update_chunk(device: str) -> int:
    """Return the elements of bf16 weights that are updated at once: few enough for a CPU's cache."""
    return 1 << 22 if device == "cuda" else 1 << 16


def train_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Return the model FLOPs per token, forward and backward: 6 per matrix weight, 12 L N D T for attention.

    Of experts only the active weights count.

    The PaLM paper's count (arXiv 2204.02311, appendix B): the whole T x T matrix, causal or not, and no
    recomputation, so that MFU compares across layouts and frameworks. An image classifier's head multiplies
    once per image. Its patches count 4 times, because pixels need no gradient. Both are averaged over T.
    """
    attention = 12 * model.num_layers * qkv_sizes(model)[0] * sequence_length
    if model.inputs is InputKind.tokens:
        return 6 * matrix_parameters(model, active=True) + attention
    # The class token's position is projected too.
    per_image = 4 * _patch_parameters(model) * sequence_length + 6 * model.num_classes * model.hidden_size
    return 6 * block_matrix_parameters(model) + per_image / sequence_length + attention


def step_flops(run: RunConfig) -> float:
    """Return the model FLOPs of an optimizer step over all ranks.

    Frozen weights (LoRA) count 4 times, not 6: they have no gradient.
    """
    length, of_adapters = sequence_length(run), adapter_parameters(run)
    flops = train_flops_per_token(run.model, length)
    if of_adapters:
        flops += 6 * of_adapters - 2 * matrix_parameters(run.model, active=True)
    return flops * run.training.global_batch_size * length


def mfu(run: RunConfig, ranks: int, step_seconds: float) -> float | None:
    """Return the model FLOPs of a step over the FLOPs that all ranks could do in its time, at their peak.

    None if the peak of the hardware is not known. The only formula of MFU: for plans, rows and the terminal.
    """
    peak: float | None = getattr(run.hardware.peak_flops, run.precision.dtype.name)
    return None if peak is None else step_flops(run) / (step_seconds * ranks * peak)
