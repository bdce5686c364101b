"""Sizes in bytes of a tensor rank's activations for one micro-batch.

b tokens of a micro-batch, H hidden, F FFN, V vocabulary, tp tensor-parallel size. Between the parallel
regions a rank holds (b, H), or (b / tp, H) under sequence parallelism (Korthikanti et al., arXiv 2205.05198).
"""

from dataclasses import dataclass, replace
from functools import cached_property

from launcher.config.layout import is_compiled
from launcher.config.schema import (
    ActivationCheckpointing,
    AttentionKind,
    BiasesConfig,
    ContextMethod,
    Dtype,
    ExpertsConfig,
    InputKind,
    NormKind,
    PositionKind,
    QueryKeyNorm,
    ResidualKind,
    RunConfig,
)
from launcher.config.shape import (
    has_class_token,
    has_norm_after,
    has_norm_before,
    head_size,
    is_gated,
    kv_heads,
    output_size,
    rotary_size,
    sequence_length,
    vocabulary_multiple,
    windows,
)
from launcher.parallel.vocabulary import padded_length
from launcher.planning.cost.geometry import NO_ADAPTERS, Adapters
from launcher.planning.cost.operations import BOOL, BYTES, FP32, INT64, CollectiveKind


@dataclass(frozen=True)
class Sizes:
    """The parts of a model that the operations depend on, and the sizes of its tensors."""

    is_vision: bool
    norm: NormKind
    norm_before: bool  # norms before attention and MLP
    norm_after: bool
    is_parallel: bool  # the MLP reads the block's input, like attention
    query_key_norm: QueryKeyNorm
    rotates: bool  # rotary positions
    rotated: int  # channels of a head
    rotary_tables: int  # number of different tables
    caps_scores: bool
    caps_logits: bool
    scales_embedding: bool
    masks: int  # different masks that exist as tensors
    has_windows: bool  # a layer has a sliding window that is shorter than the sequence
    is_gated: bool  # SwiGLU or GeGLU
    biases: BiasesConfig
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocabulary: int  # logits per position on this tensor rank, or classes, padding included
    dropout: float
    tensor: int
    micro_batch: int
    length: int  # tokens of a sequence that a rank holds
    dtype: Dtype
    sequence_parallel: bool
    checkpointing: ActivationCheckpointing
    device: str  # "cpu" or "cuda"
    patch_pixels: int  # per patch, times channels
    image_pixels: int  # per image, times channels
    has_class_token: bool
    masks_documents: bool
    is_causal: bool  # attention that skips the scores of later tokens; a mask of documents does not
    compiled: bool  # the blocks, by torch.compile
    experts: ExpertsConfig
    expert: int = 1  # ranks of the expert group
    imbalance: float = 1.0  # rows that the experts of a rank receive, over the mean of the ranks
    adapters: Adapters = NO_ADAPTERS
    context: int = 1  # ranks over which each sequence is split
    context_method: ContextMethod = ContextMethod.ring

    @classmethod
    def of(cls, run: RunConfig, device: str) -> "Sizes":
        m, p = run.model, run.parallelism
        return cls(
            is_vision=m.inputs is InputKind.patches,
            norm=m.norm,
            norm_before=has_norm_before(m),
            norm_after=has_norm_after(m),
            is_parallel=m.residual is ResidualKind.parallel,
            query_key_norm=m.query_key_norm,
            rotates=m.positions is PositionKind.rope,
            rotated=rotary_size(m),
            rotary_tables=2 if m.local_rope_theta is not None and len(windows(m)) > 1 else 1,
            caps_scores=m.attention_soft_cap is not None,
            caps_logits=m.logit_soft_cap is not None,
            scales_embedding=m.embedding_scale != 1.0,
            masks=_masks(run),
            has_windows=bool(_windows(run) - {None}),
            is_gated=is_gated(m),
            biases=replace(m.biases),
            hidden_size=m.hidden_size,
            ffn_hidden_size=m.ffn_hidden_size,
            num_heads=m.num_heads,
            num_kv_heads=kv_heads(m),
            head_size=head_size(m),
            vocabulary=padded_length(output_size(m), p.tensor, vocabulary_multiple(run, device)) // p.tensor,
            dropout=m.dropout,
            tensor=p.tensor,
            micro_batch=run.training.micro_batch_size,
            length=sequence_length(run) // p.context,
            dtype=run.precision.dtype,
            sequence_parallel=p.sequence_parallel,
            checkpointing=p.activation_checkpointing,
            device=device,
            patch_pixels=m.image_channels * m.patch_size**2,
            image_pixels=m.image_channels * m.image_size**2,
            has_class_token=has_class_token(m),
            masks_documents=run.data.document_attention,
            is_causal=m.attention is AttentionKind.causal and not run.data.document_attention,
            compiled=is_compiled(run, device),
            experts=replace(m.experts),
            expert=p.expert,
            imbalance=run.plan.expert_imbalance,
            adapters=Adapters.of(run),
            context=p.context,
            context_method=p.context_method,
        )

    @property
    def is_frozen(self) -> bool:
        """Whether only adapters are trained (LoRA)."""
        return self.adapters.rank > 0

    def adapts(self, target: str) -> bool:
        return self.is_frozen and target in self.adapters.targets

    @cached_property
    def element(self) -> int:
        return BYTES[self.dtype]

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.length

    @property
    def own_tokens(self) -> int:
        """Tokens that a rank holds between the parallel regions."""
        return self.tokens // self.tensor if self.sequence_parallel else self.tokens

    @property
    def samples(self) -> int:
        """Token ids (B, T), or images (B, C, S, S) of bytes."""
        return self.micro_batch * self.image_pixels if self.is_vision else self.tokens * INT64

    @property
    def boundaries(self) -> int:
        """Masks (B, 1, T, T), positions and ends (B, T) of documents, once for all blocks."""
        if not self.masks_documents:
            return 0
        if self.context > 1:
            # Ends of whole sequences, positions, and for each mask the first position that a query sees.
            seen = self.context if self.context_method is ContextMethod.ulysses else 1
            ends = self.context * self.tokens * BOOL
            return ends + self.tokens * INT64 * (1 + self.masks * seen)
        return self.masks * self.tokens * self.length * self.element + self.tokens * (INT64 + BOOL)

    @property
    def tables(self) -> int:
        """Rotary tables, and masks (T, T) without documents, once for all blocks and micro-batches."""
        rotary = self.rotary_tables * self.length * self.rotated * self.element if self.rotates else 0
        if self.context > 1:  # instead of a mask, the first position that each query sees
            seen = self.length * (self.context if self.context_method is ContextMethod.ulysses else 1)
            return rotary + (self.has_windows and not self.masks_documents) * self.masks * seen * INT64
        return rotary + (0 if self.masks_documents else self.masks * self.length**2 * self.element)

    @property
    def whole(self) -> int:
        """(B, T, H)."""
        return self.tokens * self.hidden_size * self.element

    @property
    def laid_out(self) -> int:
        """A copy of (B, T, H) ordered for a collective over the sequence; a single sample needs none."""
        return self.whole if self.sequence_parallel and self.micro_batch > 1 else 0

    @property
    def scattering(self) -> int:
        """Bytes of a reduce-scatter of (B, T, H) beside its input and result: ordered, on a CPU received."""
        received = self.whole if self.sequence_parallel and self.device == "cpu" else 0
        return self.laid_out + received

    @property
    def summing(self) -> int:
        """Bytes of an all-reduce of (B, T, H) beside its tensor: see parallel/all_reduce.py."""
        sums = self.device == "cpu" and self.tensor == 2 and not self.sequence_parallel
        return self.whole if sums else 0

    @property
    def scatters(self) -> CollectiveKind:
        """The collective of a reduce-scatter over the tensor ranks: see parallel/collectives.py."""
        return "all_to_all" if self.device == "cpu" else "reduce_scatter"

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

    @cached_property
    def scored(self) -> "Sizes":
        """The sizes at the head: every token has logits, or each image once, after pooling."""
        return replace(self, length=1, sequence_parallel=False) if self.is_vision else self

    @cached_property
    def stores_scores(self) -> bool:
        """Whether attention runs torch's math kernel, which keeps the scores.

        torch 2.13 falls back to the math kernel on CPU with dropout, and on CUDA in fp32 with grouped heads.
        """
        if self.device == "cpu":
            return self.dropout > 0.0
        return self.dtype is Dtype.fp32 and self.kv_heads != self.heads and not self.repeats_keys

    @cached_property
    def repeats_keys(self) -> bool:
        """Whether keys and values are copied for each query head (models/attention_kernel.py)."""
        is_masked = self.caps_scores or (self.masks > 0 and self.device == "cuda")
        return is_masked and self.kv_heads != self.heads


def _windows(run: RunConfig) -> set[int | None]:
    """Return the different windows that are shorter than the sequence; None for layers without one."""
    length = sequence_length(run)
    return {window if window is not None and window < length else None for window in windows(run.model)}


def _masks(run: RunConfig) -> int:
    """Return the number of different masks that exist as tensors (models/masks.py)."""
    m, used = run.model, _windows(run)
    if run.data.document_attention:
        return len(used)
    is_explicit = m.attention_soft_cap is not None and m.attention is AttentionKind.causal
    return len(used - {None}) + (is_explicit and None in used)
