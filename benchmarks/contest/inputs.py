"""The token file, batches and initial weights of a class, written before its contestants start."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.contest.job import BATCHES, ROOT, WEIGHTS, Job
from launcher.config.schema import RunConfig
from launcher.config.shape import sequence_length
from launcher.data.open import blend_of, open_data
from launcher.data.token_file import bin_path, index_path, smallest_dtype, write_index

STEPS = 32  # distinct steps of batches; the peers begin again after them
_SPARE = 1.2  # the validation part and incomplete samples


def write_tokens(prefix: Path, *, vocabulary: int, tokens: int) -> None:
    """Write a token file of one document of random tokens."""
    dtype = smallest_dtype(vocabulary)
    ids = np.random.default_rng(0).integers(vocabulary, size=int(tokens * _SPARE)).astype(dtype)
    bin_path(prefix).write_bytes(ids.tobytes())
    write_index(index_path(prefix), np.array([len(ids)], dtype=np.int32), dtype)


def write_batches(run: RunConfig, folder: Path) -> None:
    """Write the global batches (steps, global batch, T+1) in the launcher's order of samples."""
    blend = open_data(run).blend([blend_of(run)])
    size = run.training.global_batch_size
    steps = [blend.take(np.arange(step * size, (step + 1) * size)) for step in range(STEPS)]
    np.save(folder / BATCHES, np.stack(steps))


def tokens_needed(run: RunConfig) -> int:
    return STEPS * run.training.global_batch_size * (sequence_length(run) + 1)


def write_weights(job: Job) -> Path:
    """Write the launcher's initial weights, which are the same in every layout; return their path."""
    path = Path(job.folder) / "weights_job.json"
    job.write(path)
    subprocess.run([sys.executable, "-m", "benchmarks.contest.inputs", str(path)], check=True, cwd=ROOT)
    return Path(job.folder) / WEIGHTS


def _main(path: str) -> None:
    """Build the launcher's engine on one rank, and save its weights by logical name."""
    job = Job.read(Path(path))
    from launcher.engine.distributed import prepare_deepspeed

    prepare_deepspeed(job.device)
    from safetensors.torch import save_file

    from benchmarks.peers.launcher import composed
    from launcher.config.validate import validate
    from launcher.config.world import World
    from launcher.engine.build import build_engine
    from launcher.engine.distributed import join

    run = composed(job.overrides)
    meeting = f"file://{path}.store"
    device = join(rank=0, world_size=1, local_rank=0, device=job.device, init_method=meeting)
    engine = build_engine(run, validate(run, World(job.device, 1, 1)), device)
    weights = {logical.name: weight.contiguous() for logical, weight in engine.full_weights()}
    save_file(weights, Path(job.folder) / WEIGHTS)


if __name__ == "__main__":
    _main(sys.argv[1])
