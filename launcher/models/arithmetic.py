"""Counts from a model's config alone: parameters and FLOPs. Held against the real modules by tests."""

from launcher.config.schema import Family, ModelConfig, Pooling
from launcher.config.shape import output_size, vision_tokens


def block_matrix_parameters(model: ModelConfig) -> int:
    """Those of all blocks, which multiply every token: projections, not norms or biases."""
    h, head_size = model.hidden_size, model.hidden_size // model.num_heads
    kv = (model.num_kv_heads or model.num_heads) * head_size
    mlp_matrices = 3 if model.family is Family.llama else 2
    return model.num_layers * (h * (h + 2 * kv) + h * h + mlp_matrices * h * model.ffn_hidden_size)


def matrix_parameters(model: ModelConfig) -> int:
    """Weights that multiply: projections, the head and a vit's patches, not look-ups, norms or biases."""
    head = output_size(model) * model.hidden_size
    return block_matrix_parameters(model) + head + _patch_parameters(model)


def _patch_parameters(model: ModelConfig) -> int:
    return model.image_channels * model.patch_size**2 * model.hidden_size


def parameters(model: ModelConfig) -> int:
    """All logical parameters; a tied embedding once, vocabulary padding not at all."""
    h = model.hidden_size
    embedding = 0 if model.tie_embeddings else model.vocab_size * h
    total = matrix_parameters(model) + embedding
    if model.family is Family.llama:
        return total + (2 * model.num_layers + 1) * h
    qkv_output_and_mlp_biases = 3 * h + h + model.ffn_hidden_size + h
    norms = (2 * model.num_layers + 1) * 2 * h
    total += norms + model.num_layers * qkv_output_and_mlp_biases
    if model.family is Family.gpt:
        return total + model.max_sequence_length * h
    patch_bias_and_class_token = (2 if model.pooling is Pooling.class_token else 1) * h
    return total + vision_tokens(model) * h + patch_bias_and_class_token + model.num_classes


def reduce_bucket(model: ModelConfig) -> int:
    """Elements of the bucket that gradients are reduced through: DeepSpeed's own number, or all there are.

    DeepSpeed allocates it whole, 2 GB in fp32, however small the model.
    """
    return min(500_000_000, parameters(model))


def train_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Model FLOPs of forward and backward per token: 6 per matrix weight, 12 L H T for attention.

    The PaLM paper's count (arXiv 2204.02311, appendix B): the whole T x T matrix, causal or not, and no
    recomputation, so that MFU compares across layouts and frameworks. A vit's head multiplies once per image,
    and its patches, whose pixels need no gradient, 4 times; over an image's tokens that is an average.
    """
    attention = 12 * model.num_layers * model.hidden_size * sequence_length
    if model.family is not Family.vit:
        return 6 * matrix_parameters(model) + attention
    # The class token's place is projected along.
    per_image = 4 * _patch_parameters(model) * sequence_length + 6 * model.num_classes * model.hidden_size
    return 6 * block_matrix_parameters(model) + per_image / sequence_length + attention
