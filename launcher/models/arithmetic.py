"""Counts from a model's config alone: parameters and FLOPs. Held against the real modules by tests."""

from launcher.config.schema import Family, ModelConfig


def matrix_parameters(model: ModelConfig) -> int:
    """Weights that multiply every token: projections and the output head, not look-ups, norms or biases."""
    h, head_size = model.hidden_size, model.hidden_size // model.num_heads
    kv = (model.num_kv_heads or model.num_heads) * head_size
    mlp_matrices = 3 if model.family is Family.llama else 2
    block = h * (h + 2 * kv) + h * h + mlp_matrices * h * model.ffn_hidden_size
    return model.num_layers * block + model.vocab_size * h


def parameters(model: ModelConfig) -> int:
    """All logical parameters; a tied embedding once, vocabulary padding not at all."""
    h = model.hidden_size
    embedding = 0 if model.tie_embeddings else model.vocab_size * h
    total = matrix_parameters(model) + embedding
    if model.family is Family.llama:
        return total + (2 * model.num_layers + 1) * h
    qkv_output_and_mlp_biases = 3 * h + h + model.ffn_hidden_size + h
    norms = (2 * model.num_layers + 1) * 2 * h
    return total + norms + model.num_layers * qkv_output_and_mlp_biases + model.max_sequence_length * h


def train_flops_per_token(model: ModelConfig, sequence_length: int) -> int:
    """Model FLOPs of forward and backward per token: 6 per matrix weight, 12 L H T for attention.

    The PaLM paper's count (arXiv 2204.02311, appendix B): the whole T x T matrix, causal or not, and no
    recomputation, so that MFU compares across layouts and frameworks.
    """
    return 6 * matrix_parameters(model) + 12 * model.num_layers * model.hidden_size * sequence_length
