"""Adapters (LoRA) against the reference, in every layout and in the presence of faults."""

import pytest

from tests.checkpoint.saving import LAYOUTS
from tests.parity.running import passes, plain_sgd_pass, run_pass, small_run, worst

LLAMA = ["model=llama_tiny", "model.vocab_size=257", "model.num_kv_heads=4"]
LORA = ["finetune.lora.rank=4", "finetune.lora.alpha=6"]
BF16 = ["precision=bf16"]
CASES = {
    **{name: [*LLAMA, *overrides] for name, overrides in LAYOUTS.items()},
    "tp2 without sequence parallelism": [*LLAMA, "parallelism=tp2", "parallelism.data=1"],
    "tied embeddings over two stages": ["model=gpt_tiny", "parallelism=pp2", "parallelism.data=1"],
    "some targets": [*LLAMA, "parallelism=tp2", "parallelism.data=1", "finetune.lora.targets=[qkv,down]"],
    "recomputed blocks": [*LLAMA, *LAYOUTS["tp2"], "parallelism.activation_checkpointing=full"],
    "recomputed attention": [*LLAMA, *LAYOUTS["zero1"], "parallelism.activation_checkpointing=selective"],
}


@pytest.mark.parametrize("case", CASES)
def test_adapters_train_as_in_the_reference(case: str) -> None:
    small = small_run(*CASES[case], *LORA, steps=3)
    result = plain_sgd_pass(small)
    assert result.ok, worst(result)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters_train_as_in_the_reference_in_bf16_and_with_adamw(layout: str) -> None:
    for title, run, plain in passes(small_run(*LLAMA, *LAYOUTS[layout], *BF16, *LORA, steps=3)):
        result = run_pass(title, run, plain)
        assert result.ok, (title, worst(result))
