"""Each model type of Hugging Face: import, logits, three steps in a 3D layout, export and its files."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from launcher.checkpoint.certificate import our_logits
from launcher.checkpoint.conversion import export, import_
from launcher.checkpoint.sources import weights_at
from launcher.config.layout import resolve_layout
from launcher.config.schema import ExchangeConfig, ModelConfig, RunConfig
from launcher.config.world import World
from launcher.data.tokenizer import write_byte_tokenizer
from launcher.parity.reference import GlobalBatch, probe_batches
from tests.checkpoint.saving import load_and_save
from tests.models.families import FAMILIES, QUICK, transformers_model
from tests.models.small import batch
from tests.parity.running import small_run

OPTIONS = ExchangeConfig()
STEPS = 3
LAYOUT = [
    "parallelism=tp2_pp2", "parallelism.data=2", "parallelism.zero_stage=1",
    "parallelism.sequence_parallel=true", "parallelism.activation_checkpointing=selective",
    "optimizer=sgd", "optimizer.momentum=0.9", "optimizer.lr=0.05",
]  # fmt: skip
some_families = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)


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


def from_pretrained(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


def tensors_in(path: Path) -> dict[str, Tensor]:
    return load_file(path / "model.safetensors")


def test_logits_and_tensors_survive_import_and_export(
    theirs: Callable[[str], Path], tmp_path: Path, subtests: pytest.Subtests
) -> None:
    for family in FAMILIES:
        with subtests.test(family):
            folder = tmp_path / family.replace(" ", "-")
            source, (tokens, _) = weights_at(theirs(family), "x"), batch(61)
            with torch.no_grad():
                right = from_pretrained(source.path)(tokens).logits
            torch.testing.assert_close(our_logits(source, tokens), right, rtol=0, atol=1e-4)
            import_(source, folder / "ours", OPTIONS)
            imported = weights_at(folder / "ours", "x")
            assert (imported.model, imported.model_type) == (source.model, source.model_type)
            export(imported, folder / "back", OPTIONS, write_byte_tokenizer)
            before, after = tensors_in(source.path), tensors_in(folder / "back")
            assert before.keys() == after.keys()
            is_gemma = family.startswith("Gemma")  # 1 + weight rounds in fp32
            for name, tensor in before.items():
                exact = torch.equal(tensor, after[name])
                assert exact or (is_gemma and "norm" in name and (tensor - after[name]).abs().max() < 1e-6)
            assert weights_at(folder / "back", "x").model == source.model
            certificate = json.loads((folder / "back" / "certificate.json").read_text())
            assert certificate["ok"] is True
            assert certificate["largest_difference"] <= certificate["allowed"]


def test_the_text_part_of_a_model_that_reads_images(tmp_path: Path) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    _, text = FAMILIES["Gemma 3"]
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    torch.manual_seed(3)
    images = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=60)
    )
    for parameter in images.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    images.save_pretrained(tmp_path / "images")
    source, (tokens, _) = weights_at(tmp_path / "images", "x"), batch(60)
    with torch.no_grad():
        right = images.eval()(tokens).logits
    torch.testing.assert_close(our_logits(source, tokens), right, rtol=0, atol=1e-4)
    import_(source, tmp_path / "ours", OPTIONS)
    export(weights_at(tmp_path / "ours", "x"), tmp_path / "back", OPTIONS, write_byte_tokenizer)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("gemma3_text", ["Gemma3ForCausalLM"])
    with torch.no_grad():
        torch.testing.assert_close(
            from_pretrained(tmp_path / "back")(tokens).logits, right, rtol=0, atol=1e-4
        )


def run_of(model: ModelConfig) -> RunConfig:
    run = small_run("model=llama_tiny", "model.num_kv_heads=4", *LAYOUT, steps=STEPS)
    run.data.sequence_length = 16
    run.optimizer.gradient_clipping = 0.5
    return replace(run, model=model)


def trained_by_transformers(model: Any, run: RunConfig, batches: list[GlobalBatch]) -> Any:
    """Train a model of transformers by torch's SGD, the whole batch in one piece."""
    model.train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=run.optimizer.lr, momentum=run.optimizer.momentum or 0.0
    )
    for tokens, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.gradient_clipping or float("inf"))
        optimizer.step()
    return model.eval()


@some_families
def test_three_steps_in_a_3d_layout_are_those_of_transformers(
    family: str, theirs: Callable[[str], Path], tmp_path: Path
) -> None:
    source = weights_at(theirs(family), "x")
    run = run_of(source.model)
    layout = resolve_layout(run, World("cpu", 8, 8))
    assert (layout.tensor, layout.pipeline, layout.data, layout.zero_stage) == (2, 2, 2, 1)
    saved = weights_at(load_and_save(run, source.path, tmp_path / "run", batches=STEPS), "x")
    export(replace(saved, model_type=source.model_type), tmp_path / "back", OPTIONS, write_byte_tokenizer)
    right = trained_by_transformers(from_pretrained(source.path), run, list(probe_batches(run)))
    began, found = from_pretrained(source.path).state_dict(), from_pretrained(tmp_path / "back").state_dict()
    for name, weight in right.state_dict().items():
        moved = float((weight - began[name]).norm())
        assert moved > 0, name
        assert float((weight - found[name]).norm()) <= 1e-3 * moved + 1e-6, name
