"""Compare the launcher on one GPU with its peers, in one run: `python -m benchmarks.gpu --help`.

`--device cpu --model tiny --quick` tries the scripts on a machine without a GPU.
"""

import sys

from benchmarks.contest.classes import BenchmarkModel, Class, Peer
from benchmarks.contest.command import Benchmark, main

_COMPILED = "plain loop, compiled"
# Without warm-up, a higher rate would soon multiply the differences of rounding.
_RATE = "optimizer.lr=1e-4"
_LLAMA = (
    "model=llama3_8b", "model.hidden_size=2048", "model.num_layers=16", "model.num_heads=32",
    "model.num_kv_heads=8", "model.ffn_hidden_size=8192", "model.max_sequence_length=4096",
    "model.vocab_size=128256", "model.tie_embeddings=true", _RATE,
)  # fmt: skip
_TINY = ("model=llama_tiny", "model.dropout=0", "model.vocab_size=500", "model.tie_embeddings=true")

GPU = Benchmark(
    name="gpu",
    models=(
        BenchmarkModel("gpt2-124m", ("model=gpt2_small", "model.dropout=0", _RATE), 32, "bf16"),
        BenchmarkModel("llama-1.24b", _LLAMA, 4, "bf16"),
        BenchmarkModel("gpt2-1.56b", ("model=gpt2_xl", "model.dropout=0", _RATE), 8, "bf16"),
    ),
    tiny=BenchmarkModel("tiny", _TINY, 2, "bf16"),
    classes=(
        Class(
            "single",
            ("parallelism=single",),
            (
                Peer(_COMPILED, "plain", 1.0, {"compile": True}),
                Peer("plain loop, eager", "plain"),
                Peer(
                    "bare DeepSpeed ZeRO-1, compiled", "bare_deepspeed", 1.03, {"stage": 1, "compile": True}
                ),
                Peer(
                    "bare DeepSpeed autocast, compiled",
                    "bare_deepspeed",
                    1.03,
                    {"stage": 0, "autocast": True, "compile": True},
                ),
            ),
            memory_target=0.9,
            memory_peer=_COMPILED,
        ),
    ),
    device="cuda",
    turn_s=2.0,
    settling=3,
    least_rounds=3,
    most_rounds=20,
    minutes=25,
    resident_models=frozenset({"gpt2-124m", "tiny"}),
)

if __name__ == "__main__":
    sys.exit(main(GPU, sys.argv[1:]))
