"""Tests that need a GPU: a step does not wait for it; sums of the loss in fp32; the ring's attention."""

import subprocess
import sys
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch

from benchmarks import ring_attention
from launcher.config.schema import RunConfig
from launcher.config.shape import sequence_length
from launcher.config.validate import validate
from launcher.config.world import World
from launcher.engine.stochastic import Conditions, CounterRange, StochasticAdamW
from launcher.models import grouped
from launcher.parallel import vocabulary
from launcher.parallel.cross_entropy import linear_cross_entropy
from launcher.parallel.loss_kernels import LossKernels
from launcher.parallel.mesh import Axis
from tests.config.composing import run_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def take_steps(run: RunConfig, device_type: str) -> None:
    """Take steps; in the last, torch raises at each operation that waits for the GPU."""
    from launcher.engine.distributed import join, leave, prepare_deepspeed

    prepare_deepspeed(device_type)
    from launcher.engine.build import build_engine

    layout = validate(run, World(device_type, 1, 1))
    with TemporaryDirectory() as folder:
        meeting = f"file://{folder}/store"
        device = join(rank=0, world_size=1, local_rank=0, device=device_type, init_method=meeting)
        engine = build_engine(run, layout, device)
        size = run.training.micro_batch_size, sequence_length(run) + 1
        batches = [np.random.default_rng(0).integers(run.model.vocab_size, size=size)] * layout.accumulation
        for _ in range(3):
            engine.train_batch(batches)
        if device_type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        engine.train_batch(batches)
        if device_type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        leave()


@pytest.mark.parametrize(
    "settings",
    [
        ("precision=bf16",),
        ("precision=bf16", "training.global_batch_size=2", "training.micro_batch_size=2"),
        ("precision=bf16", "model.dropout=0.1"),
        ("precision=fp32", "parallelism=single"),
    ],
)
def test_a_step_does_not_wait_for_the_gpu(settings: tuple[str, ...]) -> None:
    """In a process of its own: a fork of this one could not use CUDA."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.test_gpu", "cuda", *settings], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_ring_of_simulated_ranks_computes_whole_attention(ranks: int, dtype: torch.dtype) -> None:
    """As exact as torch's fused attention, with its kernel for causal pairs and without it for fp32."""
    inputs = ring_attention.draw(512, dtype, "cuda", 8, 2, 64)
    parts, right = ring_attention.parts_of(inputs, ranks), ring_attention.exact(inputs)
    of_ring = ring_attention.errors(ring_attention.joined(parts, ring_attention.ring(parts)), right)
    of_torch = ring_attention.errors(ring_attention.fused(inputs), right)
    assert all(error < 1.5 * of_torch[name] + 1e-5 for name, error in of_ring.items()), (of_ring, of_torch)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_loss_of_chunks_equals_that_of_whole_logits(
    dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vocabulary.CHUNK_TOKENS, "cuda", 96)
    torch.manual_seed(0)
    x = torch.randn(4, 64, 128, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(1024, 128, device="cuda") / 8).to(dtype).requires_grad_()
    labels = torch.randint(1000, (4, 64), device="cuda")
    kernels = LossKernels(is_compiled=compiled, strict=True)
    ours = linear_cross_entropy(x, weight, None, labels, 1000, Axis(), "cuda", kernels=kernels)
    ours.backward()
    full = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    logits = torch.nn.functional.linear(full[0], full[1])[..., :1000]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    expected.backward()
    allowed = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 1e-3}[dtype]  # fp32: of TF32
    assert abs(float(ours) - float(expected)) < allowed * float(expected)
    for tensor, right in zip((x, weight), full, strict=True):
        assert tensor.grad is not None
        assert right.grad is not None
        assert (tensor.grad - right.grad).abs().max() < allowed * right.grad.abs().max()


def test_a_compiled_update_of_unaligned_slices_is_the_eager_one() -> None:
    """Up to a fused multiplication and addition, which may turn a rounding."""
    results = []
    for compiled in (False, True):
        generator = torch.Generator("cuda").manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(8000, device="cuda", generator=generator).bfloat16())
        optimizer = StochasticAdamW([weight], lr=1e-3)
        optimizer.conditions = Conditions(
            seed=7,
            step=lambda: 1,
            kept=lambda: torch.tensor(True, device="cuda"),
            factor=lambda: torch.tensor(0.5, device="cuda"),
            counter_ranges={weight: [CounterRange(3001, 1 << 40), CounterRange(4999, 1 << 50)]},
            compiled=compiled,
        )
        gradient = torch.randn(8000, device="cuda", generator=generator).bfloat16()
        for _ in range(2):
            optimizer.conditions.pieces[weight] = list(gradient.split([1001, 7, 6992]))
            optimizer.step()
        assert optimizer.conditions.compiled == compiled
        states = optimizer.state[weight]
        results.append(torch.stack([weight.detach(), states["exp_avg"], states["exp_avg_sq"]]))
    assert float((results[0] == results[1]).float().mean()) > 0.999


def test_the_kernel_of_all_experts_is_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """With experts without rows; on GPUs older than Hopper the loop is compared with itself."""
    generator = torch.Generator("cuda").manual_seed(0)
    chosen = torch.randint(1, 6, (300, 1), device="cuda", generator=generator)
    order = grouped.sorted_by_expert(chosen, 8)
    x = torch.randn(300, 64, device="cuda", generator=generator).bfloat16().requires_grad_()
    weights = torch.randn(8, 96, 64, device="cuda", generator=generator).bfloat16().requires_grad_()
    target = torch.randn(300, 96, device="cuda", generator=generator).bfloat16()
    results = []
    for _ in range(2):
        y = grouped.grouped_linear(x, weights, order)
        results.append([y, *torch.autograd.grad((y * target).sum(), [x, weights])])
        monkeypatch.setattr(grouped, "_kernel_for", lambda *_: None)
    for ours, right in zip(*results, strict=True):
        assert float((ours - right).float().norm()) < 2**-8 * float(right.float().norm())
    assert not results[0][2][[0, 6, 7]].any()


if __name__ == "__main__":
    SMALL = ["model=gpt_tiny", "training.global_batch_size=8", "training.micro_batch_size=2"]
    take_steps(run_of(*SMALL, f"hardware.device={sys.argv[1]}", *sys.argv[2:]), sys.argv[1])
