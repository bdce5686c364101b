"""Sizes of DeepSpeed's buffers: from `deepspeed.*` of the run, else our settings, else its defaults."""

import sys
from dataclasses import dataclass

from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.models.arithmetic import prefetched_and_live, reduce_bucket

ALL_REDUCE_BUCKET = 500_000_000  # elements that DeepSpeed reduces at once in a pipeline (runtime/engine.py)


@dataclass(frozen=True)
class BufferSizes:
    """Buffer sizes and thresholds, in elements (DeepSpeed 0.19.8, runtime/zero/config.py)."""

    reduce_bucket: int
    prefetch_bucket: int
    max_live: int
    reduce_buffers: int = 1
    sub_group: int = 1_000_000_000
    persistence_threshold: int = 100_000
    model_persistence: int = sys.maxsize
    max_reuse: int = 1_000_000_000

    @classmethod
    def of(cls, run: RunConfig, layout: Layout) -> "BufferSizes":
        zero = run.deepspeed.get("zero_optimization", {})
        default = cls(reduce_bucket(run, layout), *prefetched_and_live(run, layout))

        def setting(name: str, otherwise: int) -> int:
            return int(zero.get(name, otherwise))

        return cls(
            reduce_bucket=setting("reduce_bucket_size", default.reduce_bucket),
            # With overlap_comm a second bucket fills while the first is reduced; a pipeline turns it off.
            reduce_buffers=2 if zero.get("overlap_comm") and run.parallelism.pipeline == 1 else 1,
            sub_group=setting("sub_group_size", default.sub_group) or default.sub_group,
            prefetch_bucket=setting("stage3_prefetch_bucket_size", default.prefetch_bucket),
            persistence_threshold=setting(
                "stage3_param_persistence_threshold", default.persistence_threshold
            ),
            model_persistence=setting("stage3_model_persistence_threshold", default.model_persistence),
            max_live=setting("stage3_max_live_parameters", default.max_live),
            max_reuse=setting("stage3_max_reuse_distance", default.max_reuse),
        )
