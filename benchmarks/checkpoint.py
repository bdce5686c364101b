"""Measure a save: the time the step waits, and the write speed compared with a plain write.

`python -m benchmarks.checkpoint [FOLDER]`: one rank, the shape of GPT-2 small with 4 layers, AdamW, fp32.
Files go to FOLDER (default: a temporary folder). Medians of five synchronous and five asynchronous saves.
"""

import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np

from launcher.checkpoint.integrity import sha256_of
from launcher.checkpoint.manifest import CHECKPOINTS, Manifest, read_manifest, step_name
from launcher.config.compose import compose_jobs
from launcher.config.schema import RunConfig
from launcher.config.validate import validate
from launcher.config.world import World
from launcher.engine.distributed import join, leave, prepare_deepspeed

SAVES = 5
OVERRIDES = [
    "model=gpt2_small", "model.num_layers=4", "parallelism=single", "hardware=cpu",
    "data.sequence_length=128",
    "training.micro_batch_size=1", "training.global_batch_size=1",
]  # fmt: skip


def main(folder: Path) -> None:
    sys.argv = ["launcher"]
    [job] = compose_jobs("config", RunConfig, OVERRIDES)
    run = job.config
    layout = validate(run, World("cpu", 1, 1))
    prepare_deepspeed("cpu")
    from launcher.checkpoint.load import restore
    from launcher.checkpoint.save import CheckpointWriter
    from launcher.engine.build import build_engine
    from launcher.engine.optimizer import state_keys
    from launcher.engine.state import updates_made

    device = join(rank=0, world_size=1, local_rank=0, device="cpu", init_method=f"file://{folder / 'store'}")
    engine, keys = build_engine(run, layout, device), state_keys(run.optimizer)
    writer = CheckpointWriter(engine, run.checkpoint, folder, keys)
    batch = np.arange(129, dtype=np.int64).reshape(1, 129)
    steps, stalls, beside, writes, hashes, plain = [], [], [], [], [], []

    def step() -> float:
        started = time.perf_counter()
        engine.train_batch(iter([batch]))
        return time.perf_counter() - started

    for number in range(1, 2 * SAVES + 1):
        steps.append(step())
        manifest = Manifest(number, number, updates_made(engine), {}, {}, "", "", {}, None, {}, {})
        started = time.perf_counter()
        stalls.append(writer.save(manifest))
        if number > SAVES:
            beside.append(step())
            writer.wait()
            continue
        writer.wait()
        writes.append(time.perf_counter() - started - stalls[-1])
        files = read_manifest(folder / CHECKPOINTS / step_name(number)).files
        size = sum(file.bytes for file in files.values())
        started = time.perf_counter()
        for name in files:
            sha256_of(folder / CHECKPOINTS / step_name(number) / name)
        hashes.append(time.perf_counter() - started)
        plain.append(plain_write(folder / "plain", size))
    saved = folder / CHECKPOINTS / step_name(number)
    started = time.perf_counter()
    read = restore(engine, saved, replace(read_manifest(saved), updates=updates_made(engine)), keys)
    restored = time.perf_counter() - started
    print(f"bytes          {size / 1e6:,.0f} MB, {os.cpu_count()} cores")
    print(f"step           {median(steps):.3f} s")
    print(f"stall          {median(stalls):.3f} s, {median(stalls) / median(steps):.0%} of a step")
    print(f"beside it      {median(beside):.3f} s for a step while it is written")
    print(f"written        {median(writes):.2f} s behind it, {size / 1e6 / median(writes):,.0f} MB/s")
    print(f"plain write    {median(plain):.2f} s, {size / 1e6 / median(plain):,.0f} MB/s, synced")
    print(f"throughput     {median(plain) / median(writes):.0%} of a plain write (SHA-256 included)")
    print(f"SHA-256 alone  {size / 1e6 / median(hashes):,.0f} MB/s")
    print(f"restored       {restored:.2f} s, {read / 1e6:,.0f} MB read")
    leave()


def plain_write(path: Path, size: int) -> float:
    """Return the seconds to write and sync that many bytes."""
    data = np.random.default_rng(0).bytes(size)
    started = time.perf_counter()
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    elapsed = time.perf_counter() - started
    path.unlink()
    return elapsed


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as name:
            main(Path(name))
