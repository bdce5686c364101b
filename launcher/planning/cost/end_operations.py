"""Operations before the first block and after the last: embedding, positions, head and loss."""

from launcher.config.schema import Dtype
from launcher.planning.cost.layer_operations import column, dropout, norm
from launcher.planning.cost.operations import BOOL, FP32, INT64, Collective, Matmul, Operation
from launcher.planning.cost.sizes import Sizes


def embedding(s: Sizes) -> list[Operation]:
    """Return the operations from token ids or images to `embedded`, and learned positions."""
    first = _patches(s) if s.is_vision else [_lookup(s)]
    return first if s.rotates else [*first, _positions(s, first[-1].name), *dropout(s, "positions")]


def _positions(s: Sizes, x: str) -> Operation:
    size = s.length * s.hidden_size * s.element
    return Operation(
        "positions", (x,), s.stretch,
        # With documents, each token has a position of its own.
        scratch=s.whole if s.masks_documents else 0, weight=2 * size, adds=True,
        backward_traffic=(Collective("all_reduce", size),) if s.sequence_parallel else (),
        forward_bytes=2 * s.stretch, backward_bytes=s.stretch,
    )  # fmt: skip


def head(s: Sizes) -> list[Operation]:
    """Return the final norm, the pooling of images, and the projection to this rank's logits."""
    last = [norm(s, "final_norm", "input")]
    if s.is_vision:
        last.append(_pool(s))
    return [*last, column(s.scored, "logits", last[-1].name, s.vocabulary, has_bias=s.biases.head)]


def loss(s: Sizes) -> Operation:
    """Return vocab_parallel_cross_entropy, which keeps the softmax in fp32."""
    s = s.scored
    per_token = FP32 * s.tokens
    softmax = per_token * s.vocabulary
    low, cut = s.dtype is not Dtype.fp32, s.is_padded
    logits = s.logits
    kept = s.tokens * (2 * INT64 + 2 * BOOL)  # with the labels, which the caller holds
    return Operation(
        "loss", ("logits",), 4, extra=softmax + kept,
        # Logits in fp32 without padding; then sums, masks and indices.
        scratch=softmax * (low or cut) + s.tokens * (4 * FP32 + INT64),
        # The fp32 gradient beside the softmax; the output is its copy in the logits' precision.
        backward_scratch=softmax if low else 0,
        forward_traffic=(Collective("all_reduce", per_token),) * 3 if s.tensor > 1 else (),
        forward_bytes=(2 * logits if low else 0) + 6 * softmax,
        backward_bytes=3 * softmax + (logits if low else 0), kernels=20,
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
    # The class token is a view, which keeps the whole tensor alive.
    is_view = s.has_class_token and not s.sequence_parallel
    return Operation(
        "pooled", ("final_norm",), 0 if is_view else pooled, saves=("final_norm",) if is_view else (),
        forward_traffic=(Collective("all_reduce", pooled),) if s.sequence_parallel else (),
        forward_bytes=s.stretch, backward_bytes=2 * s.stretch, kernels=2,
    )  # fmt: skip


def _lookup(s: Sizes) -> Operation:
    weight = s.vocabulary * s.hidden_size * s.element
    split = s.tensor > 1
    traffic: tuple[Collective, ...] = ()
    backward: tuple[Collective, ...] = ()
    if split and s.sequence_parallel:
        traffic, backward = (Collective("reduce_scatter", s.whole),), (Collective("all_gather", s.whole),)
    elif split:
        traffic = (Collective("all_reduce", s.whole),)
    return Operation(
        "embedded", (), s.stretch, extra=s.tokens * (INT64 + BOOL) if split else 0,
        scratch=(2 if split else 0) * s.whole, backward_scratch=2 * s.whole if split else 0, weight=weight,
        forward_traffic=traffic, backward_traffic=backward,
        forward_bytes=2 * s.whole * (3 if split else 1), backward_bytes=2 * s.whole + weight,
        kernels=6 if split else 1,
    )  # fmt: skip
