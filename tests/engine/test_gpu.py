"""What only a GPU can show: a step that does not wait for it, and the loss's products in fp32."""

import numpy as np
import pytest
import torch

from launcher.config.schema import RunConfig
from launcher.config.shape import sequence_length
from launcher.config.validate import validate
from launcher.config.world import World
from launcher.parallel import vocabulary
from launcher.parallel.cross_entropy import linear_cross_entropy
from launcher.parallel.loss_kernels import LossKernels
from launcher.parallel.mesh import Axis
from tests.config.composing import run_of
from tests.distributed import run_fresh

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def step_without_synchronisation(rank: int, world: int, init_method: str, run: RunConfig) -> None:
    """Take a step in which torch raises at each operation that waits for the GPU."""
    from launcher.engine.distributed import join, leave, prepare_deepspeed

    prepare_deepspeed("cuda")
    from launcher.engine.build import build_engine

    layout = validate(run, World("cuda", 1, 1))
    device = join(rank=rank, world_size=world, local_rank=rank, device="cuda", init_method=init_method)
    engine = build_engine(run, layout, device)
    size = run.training.micro_batch_size, sequence_length(run) + 1
    batches = [np.random.default_rng(0).integers(run.model.vocab_size, size=size)] * layout.accumulation
    for _ in range(3):
        engine.train_batch(batches)
    torch.cuda.set_sync_debug_mode("error")
    engine.train_batch(batches)
    torch.cuda.set_sync_debug_mode("default")
    leave()


@pytest.mark.parametrize(
    "settings", [("precision=bf16",), ("precision=bf16", "model.dropout=0.1"), ("precision=fp32",)]
)
def test_a_step_does_not_wait_for_the_gpu(settings: tuple[str, ...]) -> None:
    small = ("model=gpt_tiny", "training.global_batch_size=8", "training.micro_batch_size=2")
    run_fresh(step_without_synchronisation, 1, run_of(*small, *settings, "hardware.device=cuda"))


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
