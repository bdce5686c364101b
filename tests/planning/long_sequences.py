"""Memory of one sequence of 65,536 tokens on 1, 2 and 4 context ranks of this machine.

`python -m tests.planning.long_sequences` prints the table of docs/long-context.md in two minutes.
"""

from tests.planning import measured

MODEL = [
    "model=llama_tiny", "model.hidden_size=32", "model.ffn_hidden_size=64", "model.num_layers=1",
    "model.num_heads=2", "model.num_kv_heads=1", "model.max_sequence_length=65536",
    "training.global_batch_size=1", "training.micro_batch_size=1",
]  # fmt: skip


def main() -> None:
    measured.STEPS = 2
    for context in (1, 2, 4):
        name = f"context {context}, 65,536 tokens"
        measured.CASES[name] = [*measured.axes(context=context), *MODEL]
        [memory], _ = measured.measure(name)
        print(f"| {context} | {memory.measured / 1e6:.1f} | {memory.predicted / 1e6:.1f} |", flush=True)


if __name__ == "__main__":
    main()
