"""Train small runs on real ranks, with their checkpoints saved and restored in any layout."""

import json
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from launcher.checkpoint.manifest import CHECKPOINTS, Manifest, checkpoints_in, read_manifest, step_name
from launcher.checkpoint.sources import weights_at
from launcher.config.layout import Layout, resolve_layout
from launcher.config.schema import CheckpointConfig, RunConfig
from launcher.config.world import World
from launcher.engine.optimizer import state_keys
from launcher.launch.local import run_local_ranks
from launcher.parallel.sharding import logical_of
from launcher.parity.reference import probe_batches
from launcher.runtime.run_dir import config_as_dict
from tests.parity.running import PipelineModule, small_run  # imported first: silences DeepSpeed

assert PipelineModule

EMPTY = Manifest(
    step=0, samples=0, updates=0, scaler={}, corpus={}, launcher="0", layout="1 rank", config={},
    validation_loss=None, tensors={}, files={},
)  # fmt: skip

LAYOUTS = {
    "single": ["parallelism=single"],
    "dp": ["parallelism=dp", "parallelism.data=2"],
    "tp2": ["parallelism=tp2", "parallelism.data=1", "parallelism.sequence_parallel=true"],
    "pp2": ["parallelism=pp2", "parallelism.data=1"],
    "dualpipev": ["parallelism=pp2", "parallelism.data=1", "parallelism.pipeline_schedule=dualpipev"],
    "zero1": ["parallelism=zero1", "parallelism.data=2"],
    "zero1_offload": ["parallelism=zero1", "parallelism.data=2", "parallelism.offload_optimizer=true"],
    "zero2": ["parallelism=zero2", "parallelism.data=2"],
    "zero3": ["parallelism=zero3", "parallelism.data=2"],
    "zero3_offload": ["parallelism=zero3_offload", "parallelism.data=2"],
    "zero3_tp2": ["parallelism=zero3", "parallelism.data=2", "parallelism.tensor=2"],
    "zero1_tp2": ["parallelism=zero1", "parallelism.data=2", "parallelism.tensor=2"],
    "tp2_pp2": ["parallelism=tp2_pp2", "parallelism.data=1"],
    "cp4": ["parallelism.context=4", "parallelism.data=1"],
    "zero3_cp2": ["parallelism=zero3", "parallelism.data=2", "parallelism.context=2"],
}
GPT = ["model=gpt_tiny", "model.vocab_size=257"]  # tied embeddings; the vocabulary is padded when sharded
LLAMA = ["model=llama_tiny", "model.vocab_size=257", "model.num_kv_heads=4"]
MOMENTUM = ["optimizer=sgd", "optimizer.momentum=0.9", "optimizer.lr=0.1"]
RUNS = {
    "momentum": [*GPT, *MOMENTUM],
    "adamw, bf16": [*LLAMA, "precision=bf16"],
}
STEPS = 8
FAULTY = "blocks.1.attention.qkv.weight"


def load_and_save(run: RunConfig, source: Path, folder: Path, *, batches: int = 0) -> Path:
    """Load initial weights on all ranks, train on some probe batches, and save; return the checkpoint."""
    folder.mkdir(parents=True)
    target = partial(_load_and_save, run=run, source=source, folder=folder, batches=batches)
    layout = resolve_layout(run, World("cpu", 8, 8))
    run_local_ranks(target, layout.world_size, log_dir=folder / "logs", start_method="fork")
    return checkpoints_in(folder)[0]


def config_in(run: RunConfig) -> dict[str, Any]:
    """Return the sections of the config by which a checkpoint is read as weights."""
    config = config_as_dict(run)
    return {name: config[name] for name in ("model", "finetune", "checkpoint")}


def _load_and_save(rank: int, *, run: RunConfig, source: Path, folder: Path, batches: int) -> None:
    from launcher.checkpoint.load import load_initial_weights
    from launcher.checkpoint.save import CheckpointWriter
    from launcher.engine.build import build_engine
    from launcher.engine.distributed import join, leave
    from launcher.parity.recording import rank_batches

    layout = resolve_layout(run, World("cpu", 8, 8))
    meeting = f"file://{folder / 'store'}"
    device = join(rank=rank, world_size=layout.world_size, local_rank=rank, device="cpu", init_method=meeting)
    engine = build_engine(run, layout, device)
    load_initial_weights(engine, weights_at(source, "x"))
    for global_batch in islice(probe_batches(run), batches):
        engine.set_learning_rate(run.optimizer.lr)
        engine.train_batch(rank_batches(run, engine, global_batch))
    writer = CheckpointWriter(engine, CheckpointConfig(), folder, [])
    writer.save(replace(EMPTY, config=config_in(run)))
    writer.wait()
    leave()


@dataclass(frozen=True)
class Outcome:
    """Results of a training run on all ranks."""

    losses: list[float]  # of each step
    norms: list[float]
    skipped: list[bool]
    tensors: dict[str, Tensor]  # logical weights and optimizer states after the last step
    bytes_read: list[int]  # by rank


def run_in(layout: str, *overrides: str, steps: int = STEPS) -> tuple[RunConfig, Layout]:
    """Return the small run of `overrides` in one of LAYOUTS; model size and batch are the same in each."""
    run = small_run(*overrides, *LAYOUTS[layout], steps=steps)
    m = run.model
    m.num_layers, m.num_heads, m.hidden_size, m.ffn_hidden_size = 4, 4, 32, 44
    m.num_kv_heads = None if m.num_kv_heads is None else 2
    m.vocab_size, m.max_sequence_length, run.data.sequence_length = 257, 16, None
    run.training.global_batch_size, run.training.micro_batch_size = 16, 2
    return run, resolve_layout(run, World("cpu", 8, 8))


def train(
    run: RunConfig,
    layout: Layout,
    folder: Path,
    *,
    first: int = 1,
    last: int = STEPS,
    restore: Path | None = None,
    save: CheckpointConfig | None = None,
    faults: dict[int, float] | None = None,
    left_out: frozenset[int] = frozenset(),
) -> Outcome:
    """Train steps first .. last on real ranks; with `save`, write a checkpoint after the last step.

    `faults` maps a step to a number that its first micro-batch adds to the gradient of FAULTY on one rank.
    The steps `left_out` are not taken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = partial(
        _rank, run=run, layout=layout, folder=folder, first=first, last=last, restore=restore, save=save,
        faults=faults or {}, left_out=left_out,
    )  # fmt: skip
    run_local_ranks(target, layout.world_size, log_dir=folder / "logs", start_method="fork")
    results = json.loads((folder / "results.json").read_text())
    tensors = {}
    for stage in range(layout.pipeline):
        tensors |= load_file(folder / f"stage-{stage}.safetensors")
    return Outcome(results["losses"], results["norms"], results["skipped"], tensors, results["bytes"])


def saved(folder: Path, step: int) -> Path:
    """Return the directory of the checkpoint of `step`."""
    return folder / CHECKPOINTS / step_name(step)


def _rank(
    rank: int,
    *,
    run: RunConfig,
    layout: Layout,
    folder: Path,
    first: int,
    last: int,
    restore: Path | None,
    save: CheckpointConfig | None,
    faults: dict[int, float],
    left_out: frozenset[int],
) -> None:
    from launcher.checkpoint.load import restore as restore_engine
    from launcher.checkpoint.save import CheckpointWriter
    from launcher.engine.build import build_engine
    from launcher.engine.distributed import join, leave
    from launcher.engine.state import updates_made
    from launcher.parity.recording import rank_batches

    store = folder / "store"
    device = join(
        rank=rank, world_size=layout.world_size, local_rank=rank, device="cpu", init_method=f"file://{store}"
    )
    engine, keys = build_engine(run, layout, device), state_keys(run.optimizer)
    bytes_read = restore_engine(engine, restore, read_manifest(restore), keys) if restore else 0
    batches = list(probe_batches(run))
    losses, norms, skipped = [], [], []
    pending: list[float] = []
    add_faults(engine, pending)
    for number in range(first, last + 1):
        if number in left_out:
            continue
        pending += [faults[number]] if number in faults else []
        engine.set_learning_rate(run.optimizer.lr)
        engine.random.begin_step(number)
        result = engine.train_batch(rank_batches(run, engine, batches[number - 1]))
        losses.append(engine.mean_loss(result.loss))
        norms.append(float(result.grad_norm))
        skipped.append(bool(result.skipped))
        pending.clear()
    if save is not None:
        writer = CheckpointWriter(engine, save, folder, keys)
        writer.save(replace(EMPTY, step=last, updates=updates_made(engine), config=config_in(run)))
        writer.wait()
    reads: list[int] = [0] * layout.world_size
    dist.all_gather_object(reads, bytes_read)
    tensors = {f"weight/{logical.name}": tensor.clone() for logical, tensor in engine.full_weights()}
    for key in keys:
        tensors |= {f"{key}/{logical.name}": tensor.clone() for logical, tensor in engine.full_states(key)}
    if engine.mesh.data.rank == 0 and engine.mesh.tensor.rank == 0:
        save_file(tensors, folder / f"stage-{engine.mesh.stage}.safetensors")
    if rank == 0:
        results = {"losses": losses, "norms": norms, "skipped": skipped, "bytes": reads}
        (folder / "results.json").write_text(json.dumps(results))
        store.unlink(missing_ok=True)
    leave()


def add_faults(engine: Any, pending: list[float]) -> None:
    """Let the first data and tensor rank add a pending number to its next gradient of FAULTY."""
    if engine.mesh.data.rank or engine.mesh.tensor.rank:
        return
    for parameter in engine.module.parameters():
        if parameter.requires_grad and logical_of(parameter).name == FAULTY:
            parameter.register_hook(lambda grad: grad + pending.pop() if pending else grad)


def assert_close(outcome: Outcome, expected: Outcome, relative: float) -> None:
    assert outcome.tensors.keys() == expected.tensors.keys()
    for name, tensor in outcome.tensors.items():
        distance = float((tensor - expected.tensors[name]).norm())
        # The gradient of a key's bias, and so its momentum, consists of rounding errors only: hence 1e-6.
        assert distance <= relative * float(expected.tensors[name].norm()) + 1e-6, name
