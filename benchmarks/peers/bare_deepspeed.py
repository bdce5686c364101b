"""DeepSpeed driven by its own interface: ZeRO-0 to 3, and with `compile` its engine.compile().

The option `stage` is the ZeRO stage; `autocast` keeps fp32 weights and computes under torch.autocast, where
bf16 otherwise means DeepSpeed's bf16 weights with fp32 master weights.
"""

import logging
import os
import warnings
from typing import Any

from benchmarks.contest.job import AfterStep, Job
from benchmarks.peers.batches import initial_weights, micro_batches


def train(job: Job, rank: int, after_step: AfterStep) -> None:
    os.environ["DS_ACCELERATOR"] = job.device
    import deepspeed
    from deepspeed.utils import logger

    from benchmarks.peers.model import built
    from benchmarks.peers.optimizer import adamw
    from benchmarks.peers.ranks import join

    logger.setLevel(logging.ERROR)
    # torch warns at every all_gather_into_tensor and reduce_scatter_tensor that DeepSpeed calls.
    warnings.filterwarnings("ignore", category=FutureWarning)
    join(job, rank)
    # Else init_distributed compiles a shared-memory operation for 20 s.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    model = built(job, initial_weights(job))
    size = sum(parameter.numel() for parameter in model.parameters())
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=adamw(job, model.parameters()), config=config(job, size)
    )
    if job.options.get("compile"):
        engine.compile(compile_kwargs={"dynamic": False})
    for batches in micro_batches(job, rank):
        [(tokens, labels)] = batches
        loss = engine(tokens, labels)
        engine.backward(loss)
        engine.step()
        after_step(loss.detach())


def config(job: Job, size: int) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": job.micro_batch,
        "gradient_accumulation_steps": job.accumulation,
        "gradient_clipping": job.adamw.clipping,
        # The bucket is allocated whole: no larger than the model.
        "zero_optimization": {"stage": job.options["stage"], "reduce_bucket_size": min(size, 500_000_000)},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "timers": {"throughput": {"enabled": False}},
        "steps_per_print": 1_000_000,
    }
    if job.precision == "bf16" and job.options.get("autocast"):
        safe = {"lower_precision_safe_modules": ["torch.nn.Linear"]}
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", **safe}
    elif job.precision == "bf16":
        settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return settings
