"""Compare the launcher on CPU with its peers in one run: `make bench` or `python -m benchmarks.cpu`."""

import sys

from benchmarks.contest.classes import BenchmarkModel, Class, Peer
from benchmarks.contest.command import Benchmark, main

# The head is not tied: torch's pipelining has no tied weights.
_GPT = (
    "model=gpt_mini", "model.num_layers=6", "model.max_sequence_length=256", "model.tie_embeddings=false",
)  # fmt: skip
_TINY = ("model=gpt_tiny", "model.dropout=0", "model.vocab_size=512", "model.tie_embeddings=false")


def _deepspeed(stage: int, target: float | None = 1.0) -> Peer:
    return Peer(f"bare DeepSpeed ZeRO-{stage}", "bare_deepspeed", target, {"stage": stage})


def _zero(stage: int) -> Class:
    fsdp2 = Peer("FSDP2", "fsdp2", 1.0, {"reshard": stage == 3})
    return _two(f"zero{stage}", f"parallelism=zero{stage}", _deepspeed(stage), fsdp2, data_ranks=2)


def _two(name: str, overrides: str, *peers: Peer, data_ranks: int = 1, accumulation: int = 1) -> Class:
    """Return a class of two ranks; `overrides` are of the launcher."""
    return Class(
        name,
        tuple(overrides.split()),
        peers,
        ranks=2,
        data_ranks=data_ranks,
        accumulation=accumulation,
        memory_target=1.02,
    )


CPU = Benchmark(
    name="cpu",
    models=(
        BenchmarkModel("vocab2048", (*_GPT, "model.vocab_size=2048"), micro_batch=4),
        BenchmarkModel("vocab32000", (*_GPT, "model.vocab_size=32000"), micro_batch=4),
    ),
    tiny=BenchmarkModel("tiny", _TINY, micro_batch=2),
    classes=(
        Class(
            "single",
            ("parallelism=single",),
            (
                Peer("plain loop", "plain", 1.0),
                _deepspeed(0, None),
                Peer("Hugging Face Trainer", "huggingface"),
            ),
            memory_target=1.02,
        ),
        _two("dp", "parallelism=dp parallelism.data=2", Peer("DDP", "ddp", 1.0), _deepspeed(0), data_ranks=2),
        _zero(1),
        _zero(2),
        _zero(3),
        _two(
            "tp",
            "parallelism=tp2",
            Peer("megatron-core's layers", "megatron", 1.05),
            Peer("DTensor", "dtensor", 1.3, {"sequence_parallel": False}),
        ),
        _two(
            "sp",
            "parallelism=tp2 parallelism.sequence_parallel=true",
            Peer("DTensor", "dtensor", 1.3, {"sequence_parallel": True}),
        ),
        _two(
            "pp",
            "parallelism=pp2 parallelism.zero_stage=0",
            Peer("torch pipelining 1F1B", "pipelining", 1.0),
            accumulation=8,
        ),
    ),
    device="cpu",
    turn_s=1.0,
    settling=0,
    least_rounds=5,
    most_rounds=40,
    minutes=22,
    resident_models=frozenset({"vocab2048", "vocab32000", "tiny"}),
)

if __name__ == "__main__":
    sys.exit(main(CPU, sys.argv[1:]))
