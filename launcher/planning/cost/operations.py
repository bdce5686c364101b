"""The operations of launcher/models as data: what each makes, keeps for the backward pass, and sends.

From this one list follow activation memory (tape.py), FLOPs, tensor-parallel traffic and time. It is held
against the real modules by tests, which trace them (trace.py). Bytes throughout, of one tensor rank.

b tokens of a micro-batch, H hidden, F FFN, V vocabulary, tp tensor-parallel size. Between the parallel
regions a rank holds (b, H), or (b / tp, H) under sequence parallelism (Korthikanti et al., arXiv 2205.05198).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from launcher.config.schema import ActivationCheckpointing, Dtype, Family, Pooling, RunConfig
from launcher.config.shape import kv_heads, output_size, sequence_length
from launcher.planning.cost.geometry import padded_length

BYTES = {Dtype.fp32: 4, Dtype.bf16: 2, Dtype.fp16: 2}
FP32, INT64, BOOL = 4, 8, 1

CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter", "send"]


@dataclass(frozen=True)
class Collective:
    """`size` is what it works on, in bytes: the tensor reduced, the whole gathered or scattered."""

    kind: CollectiveKind
    size: int

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends in a ring of `ranks` (Thakur et al., IJHPCA 19, 2005)."""
        if ranks == 1:
            return 0.0
        rounds = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
        return self.size if self.kind == "send" else rounds[self.kind] * self.size * (ranks - 1) / ranks


@dataclass(frozen=True)
class Matmul:
    """(m, k) x (k, n), `count` times; 2 m n k FLOPs each."""

    m: int
    n: int
    k: int
    count: int = 1

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k * self.count


@dataclass(frozen=True)
class Operation:
    """One step of the forward pass, and its counterpart in the backward pass."""

    name: str
    inputs: tuple[str, ...]
    size: int  # of its output, which has the operation's name
    saves: tuple[str, ...] = ()  # of its inputs and its output, for the backward pass
    extra: int = 0  # what else it saves: statistics, a mask, a copy in another precision
    scratch: int = 0  # alive besides for a moment of the forward pass
    backward_scratch: int = 0  # beside the gradients of its inputs
    backward_entry: int = 0  # before there are any
    weight: int = 0  # bytes of its weight's gradient, for a moment beside the one that accumulates
    gradients: tuple[int, ...] = ()  # of its inputs, where not their size
    joins: bool = False  # its gradients are pieces of one tensor, not terms of a sum
    adds: bool = False  # a residual: its output's gradient is that of both inputs
    forward_matmuls: tuple[Matmul, ...] = ()
    backward_matmuls: tuple[Matmul, ...] = ()
    forward_traffic: tuple[Collective, ...] = ()
    backward_traffic: tuple[Collective, ...] = ()
    overlapped_traffic: tuple[Collective, ...] = ()  # of the backward pass, behind the weight's product
    forward_bytes: int = 0  # read and written by operations that memory bounds
    backward_bytes: int = 0
    kernels: int = 1  # launched in the forward pass


@dataclass(frozen=True)
class Sizes:
    """What the tensors of one tensor rank take, for one micro-batch."""

    family: Family
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    output_size: int  # of the vocabulary, or classes
    dropout: float
    tensor: int
    micro_batch: int
    length: int
    dtype: Dtype
    sequence_parallel: bool
    checkpointing: ActivationCheckpointing
    device: str  # "cpu" or "cuda"
    patch_pixels: int  # of a vit's patch, channels counted
    image_pixels: int  # and of an image
    has_class_token: bool
    masks_documents: bool

    @classmethod
    def of(cls, run: RunConfig, device: str) -> "Sizes":
        m, p = run.model, run.parallelism
        return cls(
            family=m.family,
            hidden_size=m.hidden_size,
            ffn_hidden_size=m.ffn_hidden_size,
            num_heads=m.num_heads,
            num_kv_heads=kv_heads(run),
            output_size=output_size(m),
            dropout=m.dropout,
            tensor=p.tensor,
            micro_batch=run.training.micro_batch_size,
            length=sequence_length(run),
            dtype=run.precision.dtype,
            sequence_parallel=p.sequence_parallel,
            checkpointing=p.activation_checkpointing,
            device=device,
            patch_pixels=m.image_channels * m.patch_size**2,
            image_pixels=m.image_channels * m.image_size**2,
            has_class_token=m.family is Family.vit and m.pooling is Pooling.class_token,
            masks_documents=run.data.document_attention,
        )

    @property
    def element(self) -> int:
        return BYTES[self.dtype]

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.length

    @property
    def own_tokens(self) -> int:
        """Between the parallel regions."""
        return self.tokens // self.tensor if self.sequence_parallel else self.tokens

    @property
    def inputs(self) -> int:
        """Token ids (B, T), or images (B, C, S, S) of bytes."""
        return self.micro_batch * self.image_pixels if self.is_vit else self.tokens * INT64

    @property
    def boundaries(self) -> int:
        """Of documents: which positions attend to which (B, 1, T, T), and the positions (B, T)."""
        return (self.tokens * self.length * BOOL + self.tokens * INT64) if self.masks_documents else 0

    @property
    def mask(self) -> int:
        """What attention adds to the scores, made of the boundaries anew in every block."""
        return self.tokens * self.length * self.element if self.masks_documents else 0

    @property
    def whole(self) -> int:
        """(B, T, H)."""
        return self.tokens * self.hidden_size * self.element

    @property
    def laid_out(self) -> int:
        """A copy of (B, T, H) in the order of a collective over the sequence; of one sample it takes none."""
        return self.whole if self.sequence_parallel and self.micro_batch > 1 else 0

    @property
    def stretch(self) -> int:
        """(B, T, H), or (B, T/tp, H) under sequence parallelism."""
        return self.own_tokens * self.hidden_size * self.element

    @property
    def heads(self) -> int:
        return self.num_heads // self.tensor

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads // self.tensor

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def query(self) -> int:
        return self.tokens * self.heads * self.head_size * self.element

    @property
    def key(self) -> int:
        return self.tokens * self.kv_heads * self.head_size * self.element

    @property
    def fused(self) -> int:
        """Queries, keys and values."""
        return self.query + 2 * self.key

    @property
    def scores(self) -> int:
        """(B, heads, T, T); the math kernel computes in fp32."""
        return self.tokens * self.length * self.heads * FP32

    @property
    def ffn(self) -> int:
        return self.tokens * (self.ffn_hidden_size // self.tensor) * self.element

    @property
    def vocabulary(self) -> int:
        """Columns of this tensor rank, padding included."""
        return padded_length(self.output_size, self.tensor) // self.tensor

    @property
    def is_padded(self) -> bool:
        return self.output_size % self.tensor != 0

    @property
    def is_llama(self) -> bool:
        return self.family is Family.llama

    @property
    def is_vit(self) -> bool:
        return self.family is Family.vit

    @cached_property
    def scored(self) -> "Sizes":
        """Where there are logits: at every token, or once for an image, which no sequence is then."""
        return replace(self, length=1, sequence_parallel=False) if self.is_vit else self

    @property
    def logits(self) -> int:
        """In the run's precision."""
        return self.scored.tokens * self.vocabulary * self.element

    @cached_property
    def stores_scores(self) -> bool:
        """Whether attention runs torch's math kernel, which keeps the scores.

        torch 2.13 falls back to it on CPU with dropout, and on CUDA in fp32 with grouped heads.
        """
        if self.device == "cpu":
            return self.dropout > 0.0
        return self.dtype is Dtype.fp32 and self.kv_heads != self.heads


def block(s: Sizes) -> list[Operation]:
    """TransformerBlock: from `input` to the residual sum `output`."""
    mlp_width = s.ffn_hidden_size // s.tensor
    return [
        _norm(s, "attention_norm", "input"),
        _column(s, "qkv", "attention_norm", (s.heads + 2 * s.kv_heads) * s.head_size),
        *_attention(s),
        *_row(s, "attention", _attention(s)[-1].name, s.heads * s.head_size),
        *_dropout(s, "attention"),
        _residual(s, "residual", "input", _dropped(s, "attention")),
        _norm(s, "mlp_norm", "residual"),
        _column(s, "up", "mlp_norm", mlp_width * (2 if s.is_llama else 1)),
        *_activation(s),
        *_row(s, "mlp", "activated", mlp_width),
        *_dropout(s, "mlp"),
        _residual(s, "output", "residual", _dropped(s, "mlp")),
    ]


def recomputed(s: Sizes, program: Sequence[Operation]) -> list[Operation]:
    """The stretch of a block that activation checkpointing drops after the forward pass."""
    if s.checkpointing is ActivationCheckpointing.full:
        return list(program)
    core = _attention(s) if s.checkpointing is ActivationCheckpointing.selective else []
    return [operation for operation in program if operation in core]


def run_again(stretch: Sequence[Operation]) -> list[Operation]:
    """What of it the backward pass runs: torch stops where the last tensor to be kept is there."""
    last = max((index for index, one in enumerate(stretch) if one.saves or one.extra), default=-1)
    if last < 0:
        return []
    # A product keeps its input only, and is not run for that.
    runs_it = stretch[last].extra or stretch[last].name in stretch[last].saves
    return list(stretch[: last + 1 if runs_it else last])


def embedding(s: Sizes) -> list[Operation]:
    """From token ids or images to `embedded`; but in Llama also the positions, which are added."""
    lookup = _patches(s) if s.is_vit else _lookup(s)
    if s.is_llama:
        return lookup
    positions = s.length * s.hidden_size * s.element
    added = Operation(
        "positions",
        (lookup[-1].name,),
        s.stretch,
        # With documents, each token has a position of its own.
        scratch=s.whole if s.masks_documents else 0,
        weight=2 * positions,
        adds=True,
        backward_traffic=(Collective("all_reduce", positions),) if s.sequence_parallel else (),
        forward_bytes=2 * s.stretch,
        backward_bytes=s.stretch,
    )
    return [*lookup, added, *_dropout(s, "positions")]


def head(s: Sizes) -> list[Operation]:
    """The final norm and the projection to this rank's logits; in a vit of one vector for each image."""
    norm = _norm(s, "final_norm", "input")
    if not s.is_vit:
        return [norm, _column(s, "logits", "final_norm", s.vocabulary, bias=False)]
    return [norm, _pool(s), _column(s.scored, "logits", "pooled", s.vocabulary, bias=True)]


def loss(s: Sizes) -> Operation:
    """vocab_parallel_cross_entropy: keeps the softmax in fp32."""
    s = s.scored
    per_token = FP32 * s.tokens
    softmax = per_token * s.vocabulary
    low, cut = s.dtype is not Dtype.fp32, s.is_padded
    logits = s.logits
    kept = s.tokens * (2 * INT64 + 2 * BOOL)  # the labels too, which the caller holds
    return Operation(
        "loss",
        ("logits",),
        4,
        extra=softmax + kept,
        # The logits in fp32, without padding; then sums, masks, indices.
        scratch=softmax * (low or cut) + s.tokens * (4 * FP32 + INT64),
        # The gradient in fp32 beside the softmax; its copy in the logits' precision is the gradient.
        backward_scratch=softmax if low else 0,
        forward_traffic=(Collective("all_reduce", per_token),) * 3 if s.tensor > 1 else (),
        forward_bytes=(2 * logits if low else 0) + 6 * softmax,
        backward_bytes=3 * softmax + (logits if low else 0),
        kernels=20,
    )


def _norm(s: Sizes, name: str, x: str) -> Operation:
    fp32 = FP32 * s.own_tokens * s.hidden_size
    statistics = s.own_tokens * (FP32 if s.is_llama or s.device != "cpu" else 2 * s.element)
    if s.device != "cpu" and not s.is_llama:
        statistics *= 2
    composite = s.is_llama and s.device == "cpu"  # where torch has no fused RMSNorm
    low = s.dtype is not Dtype.fp32
    # Composite, it keeps the normalised input in fp32, and the input itself where that is not.
    copies = fp32 * (1 + low) if composite else 0
    vectors = 1 if s.is_llama else 2
    traffic = (Collective("all_reduce", s.hidden_size * s.element),) * vectors
    return Operation(
        name,
        (x,),
        s.stretch,
        saves=() if composite and low else (x,),
        extra=statistics + copies,
        scratch=fp32 if composite else 0,
        backward_scratch=3 * fp32 if composite else 0,
        backward_traffic=traffic if s.sequence_parallel else (),
        forward_bytes=2 * s.stretch + 3 * copies,
        backward_bytes=3 * s.stretch + 6 * copies,
        kernels=8 if composite else 1,
    )


def _column(s: Sizes, name: str, x: str, outputs: int, *, bias: bool | None = None) -> Operation:
    h, size = s.hidden_size, s.tokens * outputs * s.element
    has_bias = not s.is_llama if bias is None else bias
    split = s.tensor > 1
    scratch = backward_scratch = 0
    traffic: tuple[Collective, ...] = ()
    overlapped = Collective("all_reduce", s.whole)
    if s.sequence_parallel:
        # The pieces, then the sequence they make; backward both, and the gradient before it is scattered.
        scratch = max(s.whole, s.whole + s.laid_out - size)
        backward_scratch = 2 * s.whole + s.laid_out
        traffic, overlapped = (Collective("all_gather", s.whole),), Collective("reduce_scatter", s.whole)
    product = Matmul(s.tokens, outputs, h)
    return Operation(
        name,
        (x,),
        size,
        saves=(x,),
        scratch=max(scratch, size if split and has_bias else 0),
        backward_scratch=backward_scratch,
        weight=h * outputs * s.element,
        forward_matmuls=(product,),
        backward_matmuls=(Matmul(s.tokens, h, outputs), Matmul(outputs, h, s.tokens)),
        forward_traffic=traffic,
        backward_traffic=traffic,
        overlapped_traffic=(overlapped,) if split else (),
        forward_bytes=2 * size if split and has_bias else 0,
        backward_bytes=size if has_bias else 0,
        kernels=2 if split and has_bias else 1,
    )


def _row(s: Sizes, name: str, x: str, inputs: int) -> list[Operation]:
    h = s.hidden_size
    product = Matmul(s.tokens, h, inputs)
    split, kind = s.tensor > 1, "reduce_scatter" if s.sequence_parallel else "all_reduce"
    forward = (Collective(kind, s.whole),) if split else ()  # type: ignore[arg-type]
    backward = (Collective("all_gather", s.whole),) if s.sequence_parallel else ()
    biased = not s.is_llama
    return [
        Operation(
            name,
            (x,),
            s.stretch,
            saves=(x,),
            # The partial sums, and their copy laid out by rank; or the output before its bias.
            scratch=s.whole + s.laid_out if split else s.stretch if biased else 0,
            backward_scratch=s.whole if s.sequence_parallel else 0,
            backward_entry=s.whole + s.laid_out if s.sequence_parallel else 0,
            weight=h * inputs * s.element,
            forward_matmuls=(product,),
            backward_matmuls=(Matmul(s.tokens, inputs, h), Matmul(h, inputs, s.tokens)),
            forward_traffic=forward,
            backward_traffic=(
                *backward,
                *([Collective("all_reduce", h * s.element)] if biased and s.sequence_parallel else []),
            ),
            forward_bytes=(2 * s.whole if split else 0) + (2 * s.stretch if biased else 0),
            backward_bytes=s.stretch if biased else 0,
            kernels=1 + split + biased,
        )
    ]


def _attention(s: Sizes) -> list[Operation]:
    operations = []
    inputs: tuple[str, ...] = ("qkv",)
    if s.is_llama:
        # Cosines and sines, for queries and for keys.
        tables = 4 * s.length * (s.head_size // 2) * s.element
        turned = s.query + s.key
        operations.append(
            Operation(
                "rotated",
                ("qkv",),
                turned,
                extra=tables,
                scratch=s.query // 2,
                gradients=(turned,),
                joins=True,
                backward_scratch=s.query // 2,
                forward_bytes=5 * turned,
                backward_bytes=5 * turned,
                kernels=20,
            )
        )
        inputs = ("rotated", "qkv")
    operations += _stored_scores(s, inputs) if s.stores_scores else [_fused_attention(s, inputs)]
    if s.is_llama or s.stores_scores:
        # (B, heads, T, D) -> (B, T, heads D): a copy unless the kernel wrote it so.
        operations.append(
            Operation("merged", ("core",), s.query, forward_bytes=2 * s.query, backward_bytes=0)
        )
    return operations


def _fused_attention(s: Sizes, inputs: tuple[str, ...]) -> Operation:
    """Dao et al., arXiv 2205.14135: keeps a number per row of scores, and computes the scores again."""
    product = Matmul(s.length, s.length, s.head_size, s.micro_batch * s.heads)
    return Operation(
        "core",
        inputs,
        s.query,
        saves=(*inputs, "core"),
        extra=FP32 * s.tokens * s.heads + s.mask,
        # The gradients of queries, keys and values are joined, then laid out as the projection's.
        backward_scratch=s.fused,
        gradients=(s.query + s.key, s.key) if s.is_llama else (s.fused,),
        joins=True,
        forward_matmuls=(product,) * 2,
        backward_matmuls=(product,) * 5,
        forward_bytes=s.fused + s.query,
        backward_bytes=2 * s.fused + 2 * s.query,
    )


def _stored_scores(s: Sizes, inputs: tuple[str, ...]) -> list[Operation]:
    """torch's math kernel: the scores' softmax is kept, with dropout also the mask and what is left."""
    product = Matmul(s.length, s.length, s.head_size, s.micro_batch * s.heads)
    low = s.dtype is not Dtype.fp32
    copies = 3 * s.query // s.element * FP32  # of queries, keys (repeated for their group) and values
    return [
        Operation(
            "scores",
            inputs,
            s.scores,
            extra=copies + (2 * s.scores if s.dropout else 0),
            scratch=s.scores // 2 + 12 * s.query if low else s.scores,
            gradients=(s.query + s.key, s.key) if s.is_llama else (s.fused,),
            joins=True,
            forward_matmuls=(product,),
            backward_matmuls=(product,) * 2,
            forward_bytes=s.fused + 6 * s.scores,
            backward_bytes=2 * s.fused + 8 * s.scores,
            kernels=8,
        ),
        Operation(
            "core",
            ("scores",),
            s.query,
            saves=("scores",),
            backward_scratch=6 * s.query if low else s.query,
            forward_matmuls=(product,),
            backward_matmuls=(product,) * 2,
            forward_bytes=s.scores,
            backward_bytes=2 * s.scores,
        ),
    ]


def _activation(s: Sizes) -> list[Operation]:
    if not s.is_llama:
        return [
            Operation(
                "activated",
                ("up",),
                s.ffn,
                saves=("up",),
                forward_bytes=2 * s.ffn,
                backward_bytes=3 * s.ffn,
            )
        ]
    return [
        Operation(
            "silu",
            ("up",),
            s.ffn,
            saves=("up",),
            gradients=(s.ffn,),
            joins=True,
            backward_scratch=0,
            forward_bytes=2 * s.ffn,
            backward_bytes=7 * s.ffn,
        ),
        Operation(
            "activated",
            ("silu", "up"),
            s.ffn,
            saves=("silu", "up"),
            gradients=(s.ffn, s.ffn),
            joins=True,
            forward_bytes=3 * s.ffn,
            backward_bytes=6 * s.ffn,
        ),
    ]


def _dropout(s: Sizes, x: str) -> list[Operation]:
    if s.dropout == 0.0:
        return []
    elements = s.stretch // s.element
    # The fused kernel of CUDA keeps a byte per element, the composite one of CPU the scaled mask.
    mask = elements * BOOL if s.device == "cuda" else s.stretch
    return [
        Operation(
            f"{x}.dropped",
            (x,),
            s.stretch,
            extra=mask,
            forward_bytes=2 * s.stretch + mask,
            backward_bytes=2 * s.stretch + mask,
        )
    ]


def _dropped(s: Sizes, x: str) -> str:
    return x if s.dropout == 0.0 else f"{x}.dropped"


def _residual(s: Sizes, name: str, x: str, branch: str) -> Operation:
    return Operation(
        name, (x, branch), s.stretch, adds=True, forward_bytes=3 * s.stretch, backward_bytes=3 * s.stretch
    )


def _patches(s: Sizes) -> list[Operation]:
    """Bytes become numbers, and a patch one product, whose input wants no gradient."""
    h, pixels = s.hidden_size, s.own_tokens * s.patch_pixels * s.element
    weights = tuple(Collective("all_reduce", h * s.element * rows) for rows in (s.patch_pixels, 1))
    operations = [
        Operation(
            "embedded",
            (),
            s.stretch,
            extra=pixels,
            scratch=s.tokens * s.patch_pixels * s.element,
            weight=h * s.patch_pixels * s.element,
            forward_matmuls=(Matmul(s.own_tokens, h, s.patch_pixels),),
            backward_matmuls=(Matmul(h, s.patch_pixels, s.own_tokens),),
            backward_traffic=weights if s.sequence_parallel else (),
            forward_bytes=6 * pixels,
            backward_bytes=s.stretch,
            kernels=6,
        )
    ]
    if s.has_class_token:
        operations.append(
            Operation(
                "with_token",
                ("embedded",),
                s.stretch,
                extra=s.own_tokens // s.micro_batch * BOOL,
                backward_scratch=s.stretch,
                backward_traffic=weights[1:] if s.sequence_parallel else (),
                forward_bytes=2 * s.stretch,
                backward_bytes=4 * s.stretch,
                kernels=3,
            )
        )
    return operations


def _pool(s: Sizes) -> Operation:
    pooled = s.scored.stretch
    # The class token is a view of the whole, which is kept for it.
    is_view = s.has_class_token and not s.sequence_parallel
    return Operation(
        "pooled",
        ("final_norm",),
        0 if is_view else pooled,
        saves=("final_norm",) if is_view else (),
        forward_traffic=(Collective("all_reduce", pooled),) if s.sequence_parallel else (),
        forward_bytes=s.stretch,
        backward_bytes=2 * s.stretch,
        kernels=2,
    )


def _lookup(s: Sizes) -> list[Operation]:
    weight = s.vocabulary * s.hidden_size * s.element
    split = s.tensor > 1
    traffic: tuple[Collective, ...] = ()
    backward: tuple[Collective, ...] = ()
    if split and s.sequence_parallel:
        traffic, backward = (Collective("reduce_scatter", s.whole),), (Collective("all_gather", s.whole),)
    elif split:
        traffic = (Collective("all_reduce", s.whole),)
    return [
        Operation(
            "embedded",
            (),
            s.stretch,
            extra=s.tokens * (INT64 + BOOL) if split else 0,
            scratch=(2 if split else 0) * s.whole,
            backward_scratch=2 * s.whole if split else 0,
            weight=weight,
            forward_traffic=traffic,
            backward_traffic=backward,
            forward_bytes=2 * s.whole * (3 if split else 1),
            backward_bytes=2 * s.whole + weight,
            kernels=6 if split else 1,
        )
    ]
