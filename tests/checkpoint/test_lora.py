"""Adapters (LoRA): training against PEFT in every layout, checkpoints, and exports."""

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from launcher.checkpoint import adapters
from launcher.checkpoint.conversion import export, export_adapters
from launcher.checkpoint.manifest import checkpoints_in, read_manifest
from launcher.checkpoint.sources import WeightSource, weights_at
from launcher.config.errors import ConfigError
from launcher.config.schema import CheckpointConfig, Dtype, ExchangeConfig, ModelConfig, RunConfig
from launcher.data.tokenizer import write_byte_tokenizer
from launcher.parity.reference import GlobalBatch, probe_batches
from tests.checkpoint.saving import LAYOUTS, Outcome, assert_close, load_and_save, run_in, saved, train
from tests.models.families import transformers_model
from tests.models.small import batch
from tests.parity.running import small_run
from tests.runtime.command import SMALL, launcher, metrics, trained

OPTIONS = ExchangeConfig()
STEPS = 3
LORA = ["finetune.lora.rank=4", "finetune.lora.alpha=6"]
ADAMW = ["optimizer=adamw", "optimizer.lr=1e-3"]  # with SGD the matrices A would hardly move
MOMENTUM = ["optimizer=sgd", "optimizer.momentum=0.9", "optimizer.lr=0.1"]
LLAMA = ["model=llama_tiny", "model.vocab_size=257", "model.num_kv_heads=4"]
FAMILIES = ["Llama 3.1", "Qwen3", "GPT-2", "Pythia"]  # projections apart, fused, and mixed by heads
QUICK = ["single", "tp2", "pp2", "dp", "zero1", "zero2", "zero3"]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that returns the save_pretrained directory of a family."""
    folder = tmp_path_factory.mktemp("families")

    def written(family: str) -> Path:
        path = folder / family.replace(" ", "-")
        if not path.exists():
            transformers_model(family).save_pretrained(path)
        return path

    return written


def run_of(model: ModelConfig, source: Path, overrides: Iterable[str]) -> RunConfig:
    begun = ["model=moe_tiny"] if model.experts.count else []
    run = small_run(*begun, *ADAMW, *LORA, *overrides, "training.compile=false", steps=STEPS)
    run.training.global_batch_size, run.training.micro_batch_size = 16, 2
    run.checkpoint.init_from = str(source)
    return replace(run, model=model)


def adapter_after(steps: int, source: WeightSource, overrides: Iterable[str], folder: Path) -> WeightSource:
    """Train adapters of `source` on real ranks; return their checkpoint."""
    run = run_of(source.model, source.path, overrides)
    checkpoint = weights_at(load_and_save(run, source.path, folder, batches=steps), "x")
    return replace(checkpoint, model_type=source.model_type)


def exported(adapter: WeightSource, folder: Path) -> dict[str, Tensor]:
    export_adapters(adapter, folder, OPTIONS)
    return load_file(folder / "adapter_model.safetensors")


def base_model(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")


def trained_by_peft(model: Any, run: RunConfig, batches: list[GlobalBatch]) -> dict[str, Tensor]:
    """Train a PeftModel by torch's AdamW, the whole batch in one piece; return its adapters."""
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    o = run.optimizer
    assert o.beta1 is not None
    assert o.beta2 is not None
    assert o.epsilon is not None
    optimizer = torch.optim.AdamW(
        parameters, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.epsilon, weight_decay=o.weight_decay
    )
    for tokens, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, run.optimizer.gradient_clipping or float("inf"))
        optimizer.step()
    state: dict[str, Tensor] = get_peft_model_state_dict(model)
    return state


def assert_equal(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert found.keys() == right.keys()
    for name, tensor in right.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def peft_adapters(
    theirs: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[WeightSource, dict[str, Tensor]]:
    """Return a Llama, and its adapters after three steps of PEFT from our initial values."""
    return after_peft("Llama 3.1", LAYOUTS["single"], theirs, tmp_path_factory.mktemp("peft"))


def after_peft(
    family: str, layout: list[str], theirs: Callable[[str], Path], folder: Path, *overrides: str
) -> tuple[WeightSource, dict[str, Tensor]]:
    """Return a model, and its adapters after three steps of PEFT from our initial values."""
    source, settings = weights_at(theirs(family), "x"), [*layout, *overrides]
    began = exported(adapter_after(0, source, settings, folder / "run"), folder / "began")
    run = run_of(source.model, source.path, settings)
    model = PeftModel.from_pretrained(base_model(source.path), folder / "began", is_trainable=True)
    right = trained_by_peft(model, run, list(probe_batches(run)))
    moved = {name: float((tensor - began[name]).norm()) for name, tensor in right.items()}
    assert min(moved.values()) > 1e-3, moved
    return source, right


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in LAYOUTS]
)
def test_three_steps_in_any_layout_are_those_of_peft(
    layout: str, peft_adapters: tuple[WeightSource, dict[str, Tensor]], tmp_path: Path
) -> None:
    source, right = peft_adapters
    adapter = adapter_after(STEPS, source, LAYOUTS[layout], tmp_path / "run")
    assert_equal(exported(adapter, tmp_path / "peft"), right)


EXPERTS = "Qwen3-MoE, a dense layer"
OF_ATTENTION = ["finetune.lora.targets=[qkv,output]"]
WITH_EXPERTS = {
    "single": ["parallelism=single"],
    "expert 2, ZeRO-1": ["parallelism.data=2", "parallelism.expert=2", "parallelism.zero_stage=1"],
    "tensor 2": ["parallelism=tp2", "parallelism.data=1"],
    "expert 2, pipeline 2": ["parallelism.data=2", "parallelism.expert=2", "parallelism.pipeline=2"],
    "ZeRO-3": ["parallelism=zero3", "parallelism.data=2"],
}
QUICK_WITH_EXPERTS = ("expert 2, ZeRO-1",)


@pytest.fixture(scope="module")
def peft_beside_experts(
    theirs: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[WeightSource, dict[str, Tensor]]:
    """Return a Qwen3-MoE, and its adapters of attention after three steps of PEFT."""
    return after_peft(EXPERTS, LAYOUTS["single"], theirs, tmp_path_factory.mktemp("experts"), *OF_ATTENTION)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(name, marks=[] if name in QUICK_WITH_EXPERTS else pytest.mark.slow)
        for name in WITH_EXPERTS
    ],
)
def test_adapters_beside_experts_are_those_of_peft(
    layout: str, peft_beside_experts: tuple[WeightSource, dict[str, Tensor]], tmp_path: Path
) -> None:
    source, right = peft_beside_experts
    overrides = *WITH_EXPERTS[layout], *OF_ATTENTION
    adapter = adapter_after(STEPS, source, overrides, tmp_path / "run")
    assert_equal(exported(adapter, tmp_path / "peft"), right)
    # The frozen experts are read from `init_from` again: the certificate compares the merged model.
    export(adapter, tmp_path / "merged", OPTIONS, write_byte_tokenizer)


def test_a_checkpoint_holds_the_adapters_alone(
    peft_adapters: tuple[WeightSource, dict[str, Tensor]], tmp_path: Path
) -> None:
    source, _ = peft_adapters
    checkpoint = adapter_after(1, source, LAYOUTS["zero3"], tmp_path / "run")
    names = read_manifest(checkpoint.path).tensors["weight"]
    assert names
    assert all(name.endswith((".lora_a", ".lora_b")) for name in names)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_loads_in_peft_and_equals_the_merged_export(
    family: str, theirs: Callable[[str], Path], tmp_path: Path
) -> None:
    source, (tokens, _) = weights_at(theirs(family), "x"), batch(61)
    adapter = adapter_after(STEPS, source, LAYOUTS["single"], tmp_path / "run")
    export_adapters(adapter, tmp_path / "adapter", OPTIONS)
    found = certificate_in(tmp_path / "adapter")
    assert found["ok"] is True
    assert {"transformers", "peft"} < found.keys()
    # The certificate compares the merged weights in transformers with ours.
    export(adapter, tmp_path / "merged", OPTIONS, write_byte_tokenizer)
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(base_model(source.path), tmp_path / "adapter").eval()
        logits = loaded(tokens).logits
        began = base_model(source.path).eval()(tokens).logits
        merged = base_model(tmp_path / "merged").eval()(tokens).logits
    assert float((logits - began).abs().max()) > 1e-3
    torch.testing.assert_close(logits, merged, rtol=1e-5, atol=1e-5)


def certificate_in(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "certificate.json").read_text())
    return content


def test_an_adapter_that_peft_computes_otherwise_is_not_exported(
    peft_adapters: tuple[WeightSource, dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = peft_adapters
    adapter = adapter_after(1, source, LAYOUTS["single"], tmp_path / "run")
    settings = adapters._peft_settings
    monkeypatch.setattr(adapters, "_peft_settings", lambda *a: {**settings(*a), "lora_alpha": 600.0})
    with pytest.raises(ConfigError, match=r"peft .* computes other logits from this export"):
        export_adapters(adapter, tmp_path / "adapter", OPTIONS)
    assert not (tmp_path / "adapter").exists()
    without_base = replace(adapter, base=tmp_path / "gone")
    export_adapters(without_base, tmp_path / "adapter", OPTIONS)
    reason = "the model that the adapter was trained for is not known"
    assert certificate_in(tmp_path / "adapter") == {"ok": None, "reason": reason}
    export_adapters(adapter, tmp_path / "rounded", ExchangeConfig(dtype=Dtype.bf16))
    assert not (tmp_path / "rounded" / "certificate.json").exists()


def resumed(first: str, second: str, folder: Path) -> tuple[Outcome, Outcome]:
    """Return eight steps in one process, and four in each of two layouts."""
    overrides = [*LLAMA, *MOMENTUM, *LORA]
    run, layout = run_in("single", *overrides)
    whole = train(run, layout, folder / "whole")
    run, layout = run_in(first, *overrides)
    train(run, layout, folder / "a", last=4, save=CheckpointConfig())
    run, layout = run_in(second, *overrides)
    return whole, train(run, layout, folder / "b", first=5, restore=saved(folder / "a", 4))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("zero3", "tp2_pp2"),
        pytest.param("zero2", "dp", marks=pytest.mark.slow),
        pytest.param("tp2", "zero1", marks=pytest.mark.slow),
        pytest.param("pp2", "zero3_tp2", marks=pytest.mark.slow),
        pytest.param("cp4", "tp2_pp2", marks=pytest.mark.slow),
        pytest.param("tp2_pp2", "zero3_cp2", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_run_resumes_in_another_layout(first: str, second: str, tmp_path: Path) -> None:
    whole, second_half = resumed(first, second, tmp_path)
    assert_close(second_half, whole, 1e-4)


def test_a_run_from_the_command_line_resumes_exports_and_generates(
    theirs: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=256, max_position_embeddings=32, pad_token_id=None,
        bos_token_id=None, eos_token_id=0, rms_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "theirs")
    model = [
        "model=llama_tiny", "model.num_heads=4", "model.num_kv_heads=2", "model.vocab_size=256",
        "model.tie_embeddings=false", "model.rope_theta=10000", "checkpoint.init_from=theirs",
    ]  # fmt: skip
    steps = [*model, *LORA, "finetune.lora.dropout=0.1", "training.steps=4"]
    trained(*steps, "training.stop_at=2", "parallelism=tp2", "parallelism.data=1", "run.dir=a", cwd=tmp_path)
    again = trained(*steps, "parallelism=zero3", "parallelism.data=2", "run.dir=a", cwd=tmp_path)
    assert "resumed" in again
    assert len(metrics(tmp_path / "a")) >= 4
    assert checkpoints_in(tmp_path / "a")
    for target, merged in (("adapter", []), ("whole", ["merged=true"])):
        done = launcher("export", "a", target, *merged, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (4, 6.0, "theirs")
    split = launcher("export", "a", "split", "max_file_gb=1", cwd=tmp_path)
    assert split.returncode == 2
    assert "max_file_gb=1.0: PEFT loads an adapter from one file\n  try: max_file_gb=2.0" in split.stderr
    assert launcher("generate", "run.dir=a", "max_new_tokens=3", cwd=tmp_path).returncode == 0
    other = launcher(*SMALL, *steps, "finetune.lora.alpha=8", "training.steps=6", "run.dir=a", cwd=tmp_path)
    assert other.returncode == 2
    assert "finetune.lora.alpha=6.0" in other.stderr
    (tmp_path / "elsewhere").mkdir()
    done = launcher("export", "../a", "adapter", cwd=tmp_path / "elsewhere")  # the final weights are enough
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    again = load_file(tmp_path / "elsewhere" / "adapter" / "adapter_model.safetensors")
    assert_equal(again, load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    unfinished = weights_at(checkpoints_in(tmp_path / "a")[0], "x")
    assert unfinished.base == Path("theirs")
    whole = launcher("export", "whole", "x", "merged=true", cwd=tmp_path)
    assert whole.returncode == 2
    assert "merged=false" in whole.stderr
    shutil.rmtree(checkpoints_in(tmp_path / "a")[0])  # as after a last save that failed
    assert weights_at(tmp_path / "a", "x").path == tmp_path / "a", "the final weights, not the older adapters"
