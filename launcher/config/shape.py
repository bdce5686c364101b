"""What follows from a run's model and data alone: arithmetic that the rules and the layout share."""

import math
from collections.abc import Sequence
from fractions import Fraction

from launcher.config.schema import CorpusSource, Family, ModelConfig, PipelineSchedule, Pooling, RunConfig

END_OF_TEXT = 0  # the byte that ends each file of text


def kv_heads(run: RunConfig) -> int:
    return run.model.num_kv_heads or run.model.num_heads


def sequence_length(run: RunConfig) -> int:
    """Tokens per sample, T."""
    if run.model.family is Family.vit:
        return vision_tokens(run.model)
    return run.data.sequence_length or run.model.max_sequence_length


def vision_tokens(model: ModelConfig) -> int:
    """The patches of an image, and the class token if there is one."""
    patches: int = (model.image_size // model.patch_size) ** 2
    return patches + (model.pooling is Pooling.class_token)


def output_size(model: ModelConfig) -> int:
    """What the head tells apart: tokens, or classes."""
    return model.num_classes if model.family is Family.vit else model.vocab_size


def end_of_document(run: RunConfig) -> int | None:
    """The token that ends each document, where that is known."""
    return run.data.end_of_document if run.data.source is CorpusSource.tokens else END_OF_TEXT


def is_of_images(run: RunConfig) -> bool:
    return run.data.source in (CorpusSource.digits, CorpusSource.image_folder)


def stages_per_rank(run: RunConfig) -> int:
    """Pipeline stages that one rank holds."""
    return 2 if run.parallelism.pipeline_schedule is PipelineSchedule.dualpipev else 1


def least_micro_batches(run: RunConfig) -> int:
    """The micro-batches per step that the pipeline's schedule needs at least."""
    return 1 if stages_per_rank(run) == 1 else 2 * run.parallelism.pipeline


def legal_tensor_sizes(run: RunConfig) -> list[int]:
    """Every tensor-parallel size that divides what it splits, in rising order."""
    m, length = run.model, sequence_length(run)
    sizes = divisors(math.gcd(m.num_heads, kv_heads(run), m.ffn_hidden_size))
    if not run.parallelism.sequence_parallel:
        return sizes
    return [size for size in sizes if size > 1 and length % size == 0]


def legal_pipeline_sizes(run: RunConfig) -> list[int]:
    """Every number of stages that the layers can fill and ZeRO allows."""
    if run.parallelism.zero_stage > 1:
        return [1]
    of_each = stages_per_rank(run)
    return list(range(of_each, run.model.num_layers // of_each + 1))


def legal_heads(run: RunConfig) -> list[int]:
    """Every number of heads that fits the other sizes of the model and the tensor-parallel size."""
    m = run.model
    return [
        heads
        for heads in divisors(m.hidden_size)
        if heads % math.lcm(m.num_kv_heads or 1, run.parallelism.tensor) == 0
        and m.hidden_size // heads % head_size_multiple(run) == 0
    ]


def head_size_multiple(run: RunConfig) -> int:
    """Rotary positions turn pairs of channels."""
    return 2 if run.model.family is Family.llama else 1


def whole_weights(weights: Sequence[float]) -> list[int]:
    """The least whole numbers in the same proportion. 0.1 is a tenth, not the closest binary number."""
    typed = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in typed))
    whole = [int(weight * scale) for weight in typed]
    return [one // math.gcd(*whole) for one in whole]


def divisors(n: int) -> list[int]:
    """The divisors of n > 0 in rising order."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def multiples_around(n: int, factor: int) -> list[int]:
    """The positive multiples of `factor` on either side of n."""
    below = n // factor * factor
    return [multiple for multiple in (below, below + factor) if multiple]


def nearest(options: list[int], value: int, count: int = 2) -> list[int]:
    """The `count` options closest to value, in rising order."""
    return sorted(sorted(options, key=lambda option: (abs(option - value), option))[:count])
