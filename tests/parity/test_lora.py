"""Adapters (LoRA) against the reference, in every layout and in the presence of faults."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import launcher.models.lora as lora_module
import launcher.parallel.initializer as initializer
from launcher.models.block_context import BlockContext
from launcher.models.blocks import TransformerBlock
from launcher.models.lora import ColumnAdapter, RowAdapter
from launcher.parallel.mesh import ProcessMesh
from launcher.parallel.sharding import LogicalTensor
from tests.checkpoint.saving import LAYOUTS
from tests.compiling import trace_only
from tests.parity.running import passes, plain_sgd_pass, run_pass, small_run, worst

LLAMA = ["model=llama_tiny", "model.vocab_size=257", "model.num_kv_heads=4"]
LORA = ["finetune.lora.rank=4", "finetune.lora.alpha=6"]
BF16 = ["precision=bf16"]
CASES = {
    **{name: [*LLAMA, *overrides] for name, overrides in LAYOUTS.items()},
    "tp2 without sequence parallelism": [*LLAMA, "parallelism=tp2", "parallelism.data=1"],
    "tied embeddings over two stages": ["model=gpt_tiny", "parallelism=pp2", "parallelism.data=1"],
    "some targets": [*LLAMA, "parallelism=tp2", "parallelism.data=1", "finetune.lora.targets=[qkv,down]"],
    "recomputed blocks": [*LLAMA, *LAYOUTS["tp2"], "parallelism.activation_checkpointing=full"],
    "recomputed attention": [*LLAMA, *LAYOUTS["zero1"], "parallelism.activation_checkpointing=selective"],
}
# Adapters of attention, and experts that are frozen.
MOE = ["model=moe_tiny", "model.experts.count=8", "finetune.lora.targets=[qkv,output]"]
OF_EXPERTS = {
    "expert 2": ["parallelism.data=2", "parallelism.expert=2"],
    "expert 2, ZeRO-1, dense layers": [
        "parallelism.data=2", "parallelism.expert=2", "parallelism.zero_stage=1",
        "model.experts.first_dense_layers=1", "model.experts.shared=1",
    ],
    "sequence, recomputed": [
        "parallelism.tensor=2", "parallelism.data=1", "parallelism.sequence_parallel=true",
        "parallelism.activation_checkpointing=full",
    ],
    "ZeRO-3": ["parallelism.data=2", "parallelism.zero_stage=3"],
}  # fmt: skip
CASES |= {name: [*MOE, *layout] for name, layout in OF_EXPERTS.items()}
CASES |= {
    f"expert 2, {name}": [*MOE, "parallelism.data=2", "parallelism.expert=2", *more]
    for name, more in {
        "ZeRO-2": ["parallelism.zero_stage=2"],
        "tensor": ["parallelism.tensor=2"],
        "pipeline": ["parallelism.pipeline=2"],
    }.items()
}
SLOW = (
    "recomputed blocks",
    "some targets",
    "expert 2",
    "sequence, recomputed",
    "expert 2, ZeRO-2",
    "expert 2, tensor",
    "expert 2, pipeline",
)
# LAYOUTS has context ranks of the ring alone and with ZeRO-3.
CONTEXT = ["parallelism.data=1", "parallelism.context=2"]
WITH_CONTEXT = {
    "ring, sequence parallel, recomputed, documents": [
        *LLAMA, *CONTEXT, "parallelism.tensor=2", "parallelism.sequence_parallel=true",
        "parallelism.activation_checkpointing=full", "data.document_attention=true",
    ],
    "ulysses, one KV head, ZeRO-1": [
        *LLAMA, *CONTEXT, "parallelism.context_method=ulysses", "model.num_kv_heads=1",
        "parallelism.zero_stage=1", "parallelism.data=2",
    ],
    "gather, two stages, some targets": [
        *LLAMA, *CONTEXT, "parallelism.context_method=gather", "parallelism.pipeline=2",
        "finetune.lora.targets=[qkv,down]",
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] * (number > 0)) for number, case in enumerate(WITH_CONTEXT)],
)
def test_adapters_over_context_ranks_train_as_in_the_reference(case: str) -> None:
    result = plain_sgd_pass(small_run(*WITH_CONTEXT[case], *LORA, steps=3))
    assert result.ok, worst(result)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if case in SLOW else []) for case in CASES]
)
def test_adapters_train_as_in_the_reference(case: str) -> None:
    small = small_run(*CASES[case], *LORA, steps=3)
    result = plain_sgd_pass(small)
    assert result.ok, worst(result)


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])
def test_a_frozen_tied_embedding_has_no_gradient_in_bf16(schedule: str) -> None:
    """Found by `python -m tests.fuzz --clean`: under DualPipeV DeepSpeed asked for the gradient."""
    words = ["model=gpt_tiny", "parallelism=pp2", "parallelism.data=1"]
    small = small_run(*words, f"parallelism.pipeline_schedule={schedule}", *BF16, *LORA, steps=1)
    result = run_pass(*passes(small)[-1])
    assert result.ok, worst(result)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters_train_as_in_the_reference_in_bf16_and_with_adamw(layout: str) -> None:
    for title, run, plain in passes(small_run(*LLAMA, *LAYOUTS[layout], *BF16, *LORA, steps=3)):
        result = run_pass(title, run, plain)
        assert result.ok, (title, worst(result))


def scale_missing() -> None:
    build = lora_module.Adapter.__init__

    def unscaled(self: lora_module.Adapter, *arguments: Any) -> None:
        build(self, *arguments)
        self.scale = 1.0

    lora_module.Adapter.__init__ = unscaled  # type: ignore[method-assign]


def b_not_reduced() -> None:
    """Each tensor rank applies its rows of B, and the gradient of A x is not summed over the ranks."""

    def forward(self: ColumnAdapter, x: Tensor, seed: Any = None) -> Tensor:
        low = F.linear(x, self.a) * self.scale
        pieces = zip(low.split(self.rank, dim=-1), self.b.split(self.widths), strict=True)
        return torch.cat([F.linear(of_segment, rows) for of_segment, rows in pieces], dim=-1)

    ColumnAdapter.forward = forward  # type: ignore[method-assign]


def a_not_reduced() -> None:
    """Each tensor rank uses the product of its own columns of A."""

    def forward(self: RowAdapter, x: Tensor, seed: Any = None) -> Tensor:
        return F.linear(F.linear(x, self.a) * self.scale, self.b)

    RowAdapter.forward = forward  # type: ignore[method-assign]


def base_trained() -> None:
    make = initializer.Initializer.parameter

    def trained(self: initializer.Initializer, logical: LogicalTensor, draw: Any, **_: Any) -> Any:
        return make(self, logical, draw, is_adapter=True)

    initializer.Initializer.parameter = trained  # type: ignore[method-assign]


def one_a_for_all_segments() -> None:
    """Query, key and value share the first A."""
    split = Tensor.split

    def forward(self: ColumnAdapter, x: Tensor, seed: Any = None) -> Tensor:
        low = self.tp.enter(F.linear(x, self.tp.replicated(self.a)) * self.scale)
        first = split(low, self.rank, dim=-1)[0]
        return F.linear(first, self.b)

    ColumnAdapter.forward = forward  # type: ignore[method-assign]


def gradients_of_the_first_context_rank() -> None:
    """Column adapters learn from one part of each sequence."""
    right = ColumnAdapter.forward

    def forward(self: ColumnAdapter, x: Tensor, seed: Any = None) -> Tensor:
        y, cp = right(self, x, seed), self.context.cp
        return y.detach() + 0 * y if cp is not None and cp.axis.rank else y

    ColumnAdapter.forward = forward  # type: ignore[method-assign]


def experts_trained() -> None:
    """The weights of router and experts change too."""
    make = initializer.Initializer.parameter

    def trained(
        self: initializer.Initializer, logical: LogicalTensor, draw: Any, *, is_adapter: bool = False
    ) -> Any:
        return make(self, logical, draw, is_adapter=is_adapter or ".mlp." in logical.name)

    initializer.Initializer.parameter = trained  # type: ignore[method-assign]


FAULTS = {
    "scale missing": (scale_missing, "single"),
    "gradient of A x not summed": (b_not_reduced, "tp2 without sequence parallelism"),
    "A x not summed": (a_not_reduced, "tp2 without sequence parallelism"),
    "base weights trained": (base_trained, "dp"),
    "one A for all segments": (one_a_for_all_segments, "single"),
    "gradients of the first context rank": (gradients_of_the_first_context_rank, "cp4"),
    "experts trained": (experts_trained, "ZeRO-3"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_deliberate_fault_is_detected(fault: str) -> None:
    inject, case = FAULTS[fault]
    assert not plain_sgd_pass(small_run(*CASES[case], *LORA, steps=3), inject).ok


def a_block_with_adapters(rate: float) -> tuple[TransformerBlock, Tensor]:
    run = small_run(*LLAMA, *LORA, "parallelism=single", f"finetune.lora.dropout={rate}")
    run.model.dropout = 0.0
    mesh = ProcessMesh.single()
    context = BlockContext.create(run, mesh, initializer.Initializer(1, mesh.tensor, frozen=True))
    block = TransformerBlock("blocks.0", run.model, context, 0)
    return block, torch.randn(2, 8, run.model.hidden_size, generator=torch.Generator().manual_seed(0))


def test_dropout_changes_the_input_of_adapters_alone() -> None:
    """While B is zero the adapters add nothing, so their dropout must not show."""
    (block, x), (plain, _) = a_block_with_adapters(0.5), a_block_with_adapters(0.0)
    assert torch.equal(block(x), plain(x))
    for trained, other in zip(block.parameters(), plain.parameters(), strict=True):
        if trained.requires_grad:
            with torch.no_grad():
                trained.add_(0.1)
                other.add_(0.1)
    assert not torch.equal(block(x), block(x))  # another mask
    assert torch.equal(block.eval()(x), plain.eval()(x))


def test_dropout_on_the_base_path_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    def dropped(linear: Any, adapter: Any, x: Tensor, seed: Any) -> Tensor:
        y: Tensor = linear(x if seed is None else F.dropout(x, 0.5))
        return y

    monkeypatch.setattr("launcher.models.attention.adapted", dropped)
    (block, x), (plain, _) = a_block_with_adapters(0.5), a_block_with_adapters(0.0)
    assert not torch.equal(block(x), plain(x))


def test_compiled_adapters_train_as_in_the_reference() -> None:
    small = small_run(*LLAMA, *LAYOUTS["tp2"], *LORA, "training.compile=true", steps=3)
    [(title, run, plain)] = [each for each in passes(small) if each[1].training.compile and each[2]]
    result = run_pass(title, run, plain, trace_only)
    assert result.ok, worst(result)
