"""Each model type of Hugging Face: import, logits, three steps in a 3D layout, export and its files."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launcher.checkpoint.certificate import our_logits
from launcher.checkpoint.conversion import export, export_adapters, import_
from launcher.checkpoint.huggingface import CONVERTERS
from launcher.checkpoint.sources import weights_at
from launcher.config.errors import ConfigError
from launcher.config.schema import LoraConfig
from launcher.data.tokenizer import write_byte_tokenizer
from tests.checkpoint.family_table import (
    LARGEST_ERROR,
    OPTIONS,
    converted,
    errors_after_training,
    from_pretrained,
    written,
)
from tests.models.families import FAMILIES, QUICK
from tests.models.small import batch

LOGITS = 1e-4  # largest difference
DOCS = Path(__file__).parents[2] / "docs" / "models.md"
some_families = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that returns the save_pretrained directory of a family."""
    folder = tmp_path_factory.mktemp("families")
    return lambda family: written(family, folder)


def test_logits_and_tensors_survive_import_and_export(
    theirs: Callable[[str], Path], tmp_path: Path, subtests: pytest.Subtests
) -> None:
    for family in FAMILIES:
        with subtests.test(family):
            found = converted(theirs(family), tmp_path / family.replace(" ", "-"))
            assert found.logits <= LOGITS
            is_gemma = family.startswith("Gemma")  # 1 + weight rounds in fp32
            for name, difference in found.tensors.items():
                assert is_gemma, name
                assert "norm" in name
                assert difference < 1e-6
            assert found.certificate["ok"] is True
            assert found.certificate["largest_difference"] <= found.certificate["allowed"]


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
    for base in (source.path, tmp_path / "ours"):
        adapter = replace(weights_at(tmp_path / "ours", "x"), lora=LoraConfig(rank=4), base=base)
        with pytest.raises(ConfigError, match=r"is for the text part of .*images") as refused:
            export_adapters(adapter, tmp_path / "adapter", OPTIONS)
        assert refused.value.remedy == "merged=true"
    export(weights_at(tmp_path / "ours", "x"), tmp_path / "back", OPTIONS, write_byte_tokenizer)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("gemma3_text", ["Gemma3ForCausalLM"])
    with torch.no_grad():
        torch.testing.assert_close(
            from_pretrained(tmp_path / "back")(tokens).logits, right, rtol=0, atol=1e-4
        )


@some_families
def test_three_steps_in_a_3d_layout_are_those_of_transformers(
    family: str, theirs: Callable[[str], Path], tmp_path: Path
) -> None:
    errors = errors_after_training(theirs(family), tmp_path)
    assert {name: error for name, error in errors.items() if not error <= LARGEST_ERROR} == {}


def test_the_documentation_shows_each_family() -> None:
    """`python -m tests.checkpoint.family_table` prints the rows."""
    shown = re.search(r"<!-- families -->\n(.*?)\n<!-- /families -->", DOCS.read_text(), re.DOTALL)
    assert shown is not None
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown[1].splitlines()[2:]]
    assert [row[0] for row in rows] == list(FAMILIES)
    assert {row[1] for row in rows} == {f"`{converter.model_type}`" for converter in CONVERTERS}
    for _, _, logits, _, steps, certificate in rows:
        assert float(logits) <= LOGITS
        assert float(steps) <= LARGEST_ERROR
        assert certificate.startswith("yes, ")
