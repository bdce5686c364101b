"""Operations before the first block and after the last: embedding, positions, head and loss."""

from collections import Counter

from launcher.config.schema import Dtype
from launcher.parallel.vocabulary import chunk_sizes
from launcher.planning.cost.layer_operations import dropout, norm
from launcher.planning.cost.operations import BOOL, FP32, INT64, Collective, CollectiveKind, Matmul, Operation
from launcher.planning.cost.sizes import Sizes


def embedding(s: Sizes) -> list[Operation]:
    """Return the operations from token ids or images to `embedded`, and learned positions."""
    first = _patches(s) if s.is_vision else [_lookup(s)]
    if s.scales_embedding:
        bytes_moved = 2 * s.stretch
        scaled = ("scaled", (first[-1].name,), s.stretch)
        first.append(Operation(*scaled, forward_bytes=bytes_moved, backward_bytes=bytes_moved))
    return first if s.rotates else [*first, _positions(s, first[-1].name), *dropout(s, "positions")]


def _positions(s: Sizes, x: str) -> Operation:
    size = s.length * s.hidden_size * s.element
    return Operation(
        "positions", (x,), s.stretch,
        # With documents, each token has a position of its own.
        scratch=s.whole if s.masks_documents else 0, weight=0 if s.is_frozen else 2 * size, adds=True,
        backward_traffic=(Collective("all_reduce", size),) if s.sequence_parallel and not s.is_frozen else (),
        forward_bytes=2 * s.stretch, backward_bytes=0 if s.is_frozen else s.stretch,
    )  # fmt: skip


def head(s: Sizes) -> list[Operation]:
    """Return the final norm, the pooling of images, and the projection with the loss."""
    last = [norm(s, "final_norm", "input", is_last=True)]
    if s.is_vision:
        last.append(_pool(s))
    return [*last, _loss(s.scored, last[-1].name)]


def _loss(s: Sizes, x: str) -> Operation:
    """Return linear_cross_entropy, which makes all gradients in the forward pass, chunk by chunk."""
    h, columns, low = s.hidden_size, s.vocabulary, s.dtype is not Dtype.fp32
    sizes = chunk_sizes(s.tokens, columns, s.device, fused=s.compiled)
    chunks = Counter(sizes).items()
    products = [Matmul(n, columns, h, times) for n, times in chunks]
    products += [Matmul(n, h, columns, times) for n, times in chunks]
    weights = [Matmul(columns, h, n, times) for n, times in chunks]
    chunk, matrix = sizes[0] * columns, columns * h
    # On a CPU torch has no product of bf16 matrices that is added to fp32.
    has_product = low and s.device == "cpu"
    # Memory: logits in the run's precision and in fp32, the hidden states without ignored tokens, a product,
    # and with a soft cap its tanh. A compiled loss has no fp32 logits (parallel/loss_kernels.py). It makes
    # one pass for the statistics of the rows, which takes as long as two, and one for the gradients.
    logits = s.element + FP32 + (s.element if s.caps_logits else 0)
    logit_bytes, kernels = 3 * FP32 + s.element + (s.element + FP32 if low else 0), 20
    if s.compiled:
        # On a CPU the step whose memory is measured runs eager, and no step holds more.
        logits = s.element if s.device == "cuda" else logits
        logit_bytes, kernels = 4 * s.element, 14
    scratch = chunk * logits + sizes[0] * h * s.element + (matrix * s.element if has_product else 0)
    gathered: tuple[Collective, ...] = ()
    traffic: tuple[Collective, ...] = ()
    reduced: tuple[Collective, ...] = ()
    if s.tensor > 1:
        traffic = tuple(Collective("all_reduce", FP32 * n * values) for n in sizes for values in (1, 2))
        reduced = (Collective("all_reduce", s.whole),)
    if s.sequence_parallel:
        gathered, reduced = (Collective("all_gather", s.whole),), (Collective(s.scatters, s.whole),)
        scratch += s.whole
    vectors = FP32 * columns if s.biases.head and not s.is_frozen else 0
    if s.is_frozen:
        matrix, weights = 0, []
    return Operation(
        "loss", (x,), FP32, extra=s.whole + vectors + s.tokens * INT64, made=FP32 * matrix,
        # Sums, masks and indices of the labels in a chunk.
        scratch=scratch + sizes[0] * (8 * FP32 + INT64),
        # The gradient of the hidden states as it is scaled, then ordered for its reduce-scatter.
        backward_scratch=max(s.whole - s.stretch, s.scattering) if s.sequence_parallel else s.summing,
        weight=matrix * s.element if low else 0,
        forward_matmuls=(*products, *weights),
        forward_traffic=gathered + traffic, backward_traffic=reduced,
        # Logits in fp32, log-softmax and exponential; each product is added to the weight's gradient.
        forward_bytes=s.tokens * columns * logit_bytes
        + len(sizes) * matrix * (2 * FP32 + (2 * s.element if has_product else 0)) + 4 * s.whole,
        backward_bytes=matrix * (FP32 + s.element) + 3 * s.whole, kernels=kernels * len(sizes),
    )  # fmt: skip


def _patches(s: Sizes) -> list[Operation]:
    """Return the conversion of bytes to floats, and a product per patch; pixels need no gradient."""
    h, pixels = s.hidden_size, s.own_tokens * s.patch_pixels * s.element
    weights = tuple(Collective("all_reduce", h * s.element * rows) for rows in (s.patch_pixels, 1))
    operations = [
        Operation(
            "embedded", (), s.stretch, extra=pixels, scratch=s.tokens * s.patch_pixels * s.element,
            weight=h * s.patch_pixels * s.element,
            forward_matmuls=(Matmul(s.own_tokens, h, s.patch_pixels),),
            backward_matmuls=(Matmul(h, s.patch_pixels, s.own_tokens),),
            backward_traffic=weights if s.sequence_parallel else (),
            forward_bytes=6 * pixels, backward_bytes=s.stretch, kernels=6,
        ),
    ]  # fmt: skip
    if s.has_class_token:
        operations.append(
            Operation(
                "with_token", ("embedded",), s.stretch, extra=s.own_tokens // s.micro_batch * BOOL,
                backward_scratch=s.stretch, backward_traffic=weights[1:] if s.sequence_parallel else (),
                forward_bytes=2 * s.stretch, backward_bytes=4 * s.stretch, kernels=3,
            ),
        )  # fmt: skip
    return operations


def _pool(s: Sizes) -> Operation:
    pooled = s.scored.stretch
    # The class token is a view.
    is_view = s.has_class_token and not s.sequence_parallel
    return Operation(
        "pooled", ("final_norm",), 0 if is_view else pooled,
        forward_traffic=(Collective("all_reduce", pooled),) if s.sequence_parallel else (),
        forward_bytes=s.stretch, backward_bytes=2 * s.stretch, kernels=2,
    )  # fmt: skip


def _lookup(s: Sizes) -> Operation:
    weight = s.vocabulary * s.hidden_size * s.element
    split = s.tensor > 1
    traffic: tuple[Collective, ...] = ()
    backward: tuple[Collective, ...] = ()
    if s.is_frozen:
        return _frozen_lookup(s)
    if split and s.sequence_parallel:
        traffic, backward = (Collective(s.scatters, s.whole),), (Collective("all_gather", s.whole),)
    elif split:
        traffic = (Collective("all_reduce", s.whole),)
    return Operation(
        "embedded", (), s.stretch, extra=s.tokens * (INT64 + BOOL) if split else 0,
        scratch=_copies_of_rows(s) * s.whole + s.summing, backward_scratch=2 * s.whole if split else 0,
        weight=weight,
        forward_traffic=traffic, backward_traffic=backward,
        forward_bytes=2 * s.whole * (1 + _copies_of_rows(s)), backward_bytes=2 * s.whole + weight,
        kernels=6 if split else 1,
    )  # fmt: skip


def _frozen_lookup(s: Sizes) -> Operation:
    """Return the look-up in a frozen embedding; it has no backward pass."""
    kind: CollectiveKind = s.scatters if s.sequence_parallel else "all_reduce"
    split = s.tensor > 1
    return Operation(
        "embedded", (), s.stretch, scratch=_copies_of_rows(s) * s.whole + s.summing,
        forward_traffic=(Collective(kind, s.whole),) if split else (),
        forward_bytes=2 * s.whole * (1 + _copies_of_rows(s)), kernels=6 if split else 1,
    )  # fmt: skip


def _copies_of_rows(s: Sizes) -> int:
    """Return the copies of the rows that are looked up: as found, masked, and ordered by rank."""
    return 0 if s.tensor == 1 else 1 + s.sequence_parallel
