"""Compiled blocks: one graph for all of them, without a break, and the same numbers as eager blocks."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from launcher.config.schema import ActivationCheckpointing, DataConfig, ModelConfig
from launcher.config.shape import windows
from launcher.models.blocks import TransformerBlock
from launcher.parallel import compiling
from tests.compiling import forget_graphs, graphs_and_breaks, trace_only
from tests.distributed import mesh, pool
from tests.models.small import PARTS, batch, build, gradients, images_of, relative_error, small, small_vit

TOLERANCE = 2e-5  # of a gradient's largest value, in fp32
Steps = list[tuple[float, dict[str, Tensor]]]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "compiled", compiling.compiled)
    trace_only()


def steps_of(model: ModelConfig, world: int, compiled: bool, **options: Any) -> Steps:
    """Run two steps, whose dropout masks differ."""
    forget_graphs()
    ours = build(model, mesh(tensor=world) if world > 1 else None, compiled=compiled, **options)
    inputs = images_of(model) if model.num_classes else batch(model.vocab_size)
    steps: Steps = []
    for _ in range(2):
        ours.zero_grad()
        steps.append(gradients(ours, *inputs))
    return steps


def error_and_graphs(model: ModelConfig, world: int, **options: Any) -> tuple[float, tuple[int, int]]:
    """Return the largest difference between eager and compiled steps, and the graphs and breaks."""
    eager = steps_of(model, world, False, **options)
    steps = steps_of(model, world, True, **options)
    errors = [
        max(abs(loss - expected), *(relative_error(own[name], right[name]) for name in right))
        for (loss, own), (expected, right) in zip(steps, eager, strict=True)
    ]
    return max(errors), graphs_and_breaks()


def of_rank(
    rank: int, world: int, model: ModelConfig, options: dict[str, Any]
) -> tuple[float, tuple[int, int]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "compiled", compiling.compiled)
        trace_only()
        return error_and_graphs(model, world, **options)


DOCUMENTS = DataConfig(document_attention=True)
FULL, SELECTIVE = ActivationCheckpointing.full, ActivationCheckpointing.selective


@pytest.mark.usefixtures("traced")
@pytest.mark.slow
def test_all_blocks_share_one_graph_without_a_break(subtests: pytest.Subtests) -> None:
    """Blocks with a window and blocks without one have a graph each: they get a mask, or none."""
    models = {**{name: small(name, num_layers=3) for name in PARTS}, "vit": small_vit(num_layers=3)}
    for name, model in models.items():
        with subtests.test(name):
            error, graphs = error_and_graphs(model, 1)
            assert graphs == (len(windows(model)), 0)
            assert error < TOLERANCE


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_recomputation_dropout_and_documents_need_no_break(subtests: pytest.Subtests) -> None:
    for checkpointing in ActivationCheckpointing:
        for probability, data in ((0.3, None), (0.0, DOCUMENTS), (0.3, DOCUMENTS)):
            with subtests.test(f"{checkpointing.name}, dropout {probability}, {data}"):
                model = small("llama", dropout=probability)
                error, graphs = error_and_graphs(model, 1, checkpointing=checkpointing, data=data)
                assert graphs == (1, 0)
                assert error < TOLERANCE


@pytest.mark.slow
def test_tensor_and_sequence_parallelism_need_no_break(subtests: pytest.Subtests) -> None:
    for architecture, sequence_parallel, checkpointing in (
        ("gpt", False, SELECTIVE),
        ("gpt", True, FULL),
        ("llama", True, SELECTIVE),
    ):
        with subtests.test(f"{architecture}, {sequence_parallel}, {checkpointing.name}"):
            model = small(architecture, dropout=0.3)
            options = {"sequence_parallel": sequence_parallel, "checkpointing": checkpointing}
            for error, graphs in pool(2).run(of_rank, model, options):
                assert graphs == (1, 0)
                assert error < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "forward_and_backward"), [("gpt", 4 + 6), ("llama", 5 + 8)])
def test_a_block_runs_few_generated_kernels(architecture: str, forward_and_backward: int) -> None:
    """Besides matrix products and attention."""
    import torch._inductor.config  # takes seconds

    forget_graphs()
    model = small(architecture)
    ours = build(model, compiled=True)
    named = torch._inductor.config.patch({"cpp.enable_kernel_profile": True})
    with torch.compiler.config.patch(force_disable_caches=True), named:  # type: ignore[attr-defined]
        gradients(ours, *batch(model.vocab_size))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gradients(ours, *batch(model.vocab_size))
    runs = [event.count for event in profile.key_averages() if "_cpp_fused_" in event.key]
    in_blocks = [
        count for count in runs if count % model.num_layers == 0
    ]  # the loss has two, of one run each
    assert len(runs) - len(in_blocks) == 2
    assert sum(in_blocks) == model.num_layers * forward_and_backward


@pytest.mark.usefixtures("traced")
def test_a_break_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TransformerBlock._body

    def with_a_break(self: TransformerBlock, x: Tensor, *inputs: Any) -> Tensor:
        torch._dynamo.graph_break()
        return right(self, x, *inputs)

    monkeypatch.setattr(TransformerBlock, "_body", with_a_break)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        steps_of(small("gpt"), 1, True)


@pytest.mark.parametrize("checkpointing", ActivationCheckpointing, ids=lambda mode: mode.name)
def test_a_failed_compiler_leaves_the_blocks_eager(
    checkpointing: ActivationCheckpointing, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor.graph  # takes seconds

    def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no space left for kernels\nand more")

    monkeypatch.setattr(torch._inductor.graph.GraphLowering, "run", failing)
    model = small("llama", dropout=0.3)
    eager = steps_of(model, 1, False, checkpointing=checkpointing)
    forget_graphs()
    ours = build(model, checkpointing=checkpointing, compiled=True)
    runner = next(m for m in ours.modules() if isinstance(m, TransformerBlock)).context.blocks
    runner._strict = runner._loss._strict = False
    for expected_loss, expected in eager:
        ours.zero_grad()
        with torch.compiler.config.patch(force_disable_caches=True):  # type: ignore[attr-defined]
            loss, own = gradients(ours, *batch(model.vocab_size))
        assert loss == expected_loss
        assert all(torch.equal(own[name], expected[name]) for name in expected)
    assert runner.failure == "RuntimeError: no space left for kernels"
    assert runner.seconds > 0


def failing_on_rank_1(rank: int, world: int, model: ModelConfig) -> tuple[Steps, Steps, str | None]:
    """Return the steps of eager blocks, and of blocks that only rank 0 could compile."""
    options: dict[str, Any] = {"sequence_parallel": True, "checkpointing": FULL}
    eager = steps_of(model, world, False, **options)
    forget_graphs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "compiled", compiling.compiled)
        trace_only()
        if rank == 1:

            def failing(body: Any) -> Any:
                def call(*_: Any) -> Tensor:
                    raise torch._dynamo.exc.Unsupported("only here")

                return call

            compiling.compiled = failing
        ours = build(model, mesh(tensor=world), compiled=True, **options)
        runner = next(m for m in ours.modules() if isinstance(m, TransformerBlock)).context.blocks
        runner._strict = runner._loss._is_on = False  # the loss of each rank goes on as it can
        steps: Steps = []
        for _ in range(2):
            ours.zero_grad()
            steps.append(gradients(ours, *batch(model.vocab_size)))
    return eager, steps, runner.failure


def test_ranks_of_a_tensor_group_go_on_eager_together() -> None:
    model = small("gpt", dropout=0.3)
    ranks = pool(2).run(failing_on_rank_1, model)
    for eager, steps, _ in ranks:
        for (expected_loss, expected), (loss, own) in zip(eager, steps, strict=True):
            assert loss == expected_loss
            assert all(torch.equal(own[name], expected[name]) for name in expected)
    assert ranks[0][2] == "another rank could not compile"
    assert ranks[1][2] is not None
    assert ranks[1][2].startswith("Unsupported: only here")


@pytest.mark.usefixtures("traced")
def test_recomputation_saves_memory_in_compiling() -> None:
    saved = {mode: saved_bytes(mode) for mode in ActivationCheckpointing}
    assert saved[FULL] < saved[SELECTIVE] < saved[ActivationCheckpointing.none]


def saved_bytes(checkpointing: ActivationCheckpointing) -> int:
    """Return the bytes that the blocks keep for the backward pass, without their weights."""
    forget_graphs()
    model = small("llama")
    ours = build(model, checkpointing=checkpointing, compiled=True)
    weights = {parameter.untyped_storage().data_ptr() for parameter in ours.parameters()}
    saved: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden = ours.hidden(batch(model.vocab_size)[0])
    del hidden
    return sum(saved.values())


CACHED = """
import torch._dynamo.utils
from tests.models.small import batch, build, gradients, small
model = small("gpt", num_layers=2)
loss, _ = gradients(build(model, compiled=True), *batch(model.vocab_size))
counters = torch._dynamo.utils.counters["inductor"]
print(loss, counters["fxgraph_cache_hit"], counters["fxgraph_cache_miss"])
"""


@pytest.mark.slow
def test_a_second_run_finds_the_kernels_of_the_first(tmp_path: Path) -> None:
    """Forward and backward graph, and the two passes of the loss: four misses, then four hits."""
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    losses = []
    for expected in (["0", "4"], ["4", "0"]):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", CACHED], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        loss, *counts = done.stdout.split()
        assert counts == expected
        losses.append(loss)
    assert losses[0] == losses[1]
