"""Counts from the config against the real modules: parameters, and the FLOPs that torch counts."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from launcher.config.fields import config_directory
from launcher.config.schema import InputKind, ModelConfig, Pooling, PositionKind
from launcher.config.shape import vision_tokens
from launcher.config.validate import validate
from launcher.config.world import World
from launcher.models.architecture import FlatModel
from launcher.models.arithmetic import (
    active_parameters,
    largest_block_matrices,
    matrix_parameters,
    mfu,
    parameters,
    train_flops_per_token,
)
from launcher.models.blocks import TransformerBlock
from launcher.parallel.initializer import DrawFunction, Initializer
from launcher.parallel.sharding import LogicalTensor, logical_of
from launcher.planning.cost.run_plan import make_plan
from launcher.runtime.training import performance
from tests.config.composing import run_of
from tests.models.small import PARTS, biases, build, small, small_vit

SHIPPED = sorted(path.stem for path in (config_directory() / "model").glob("*.yaml"))
LENGTH = 256


def shipped(name: str) -> ModelConfig:
    path: Path = config_directory() / "model" / f"{name}.yaml"
    model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(path)))
    assert isinstance(model, ModelConfig)
    return model


def without_values(model: ModelConfig) -> FlatModel:
    """Return the real modules on the meta device, which needs no storage for 70 billion parameters."""
    make = Initializer.parameter

    def parameter(self: Initializer, logical: LogicalTensor, draw: DrawFunction) -> nn.Parameter:
        return make(replace(self, drawn=False, device=torch.device("meta")), logical, draw)

    with patch.object(Initializer, "parameter", parameter):
        return build(model)


ROPE_VIT = small_vit(positions=PositionKind.rope, biases=biases("down"), head_size=6, num_kv_heads=2)
VARIANTS = (
    {name: shipped(name) for name in SHIPPED}
    | {name: small(name) for name in PARTS}
    | {
        "gpt, untied": small("gpt", tie_embeddings=False),
        "llama, tied": small("llama", tie_embeddings=True),
        "llama, no grouping": small("llama", num_kv_heads=None),
        "vit, mean": small_vit(pooling=Pooling.mean),
        "vit, class token": small_vit(),
        "vit, rope, no head bias": ROPE_VIT,
    }
)
variants = pytest.mark.parametrize("name", VARIANTS)


def test_parameters_are_those_of_the_modules(subtests: pytest.Subtests) -> None:
    for name in VARIANTS:
        with subtests.test(name):
            model = VARIANTS[name]
            assert parameters(model) == sum(p.numel() for p in without_values(model).parameters())


def test_matrix_parameters_are_the_weights_that_multiply_every_token(subtests: pytest.Subtests) -> None:
    """All matrices except look-ups; a tied embedding counts as the head."""
    for name in VARIANTS:
        with subtests.test(name):
            model = VARIANTS[name]
            looked_up = (
                {"positions.weight"} if model.tie_embeddings else {"positions.weight", "embedding.weight"}
            )
            # A vit's patches and head are matrices, too, though not of every token.
            matrices = [p for p in without_values(model).parameters() if p.dim() == 2]
            counted = sum(p.numel() for p in matrices if logical_of(p).name not in looked_up)
            assert matrix_parameters(model) == counted


def test_the_largest_block_is_that_of_the_modules(subtests: pytest.Subtests) -> None:
    for name in VARIANTS:
        with subtests.test(name):
            model = without_values(VARIANTS[name])
            blocks = [module for module in model.modules() if isinstance(module, TransformerBlock)]
            matrices = [sum(p.numel() for p in block.parameters() if p.dim() > 1) for block in blocks]
            assert largest_block_matrices(VARIANTS[name]) == max(matrices)


PUBLISHED = {
    "gpt2_small": 124_439_808,  # transformers' GPT2LMHeadModel of "gpt2"
    "gpt2_xl": 1_557_611_200,  # and of "gpt2-xl"
    "llama3_8b": 8_030_261_248,  # meta-llama/Meta-Llama-3-8B's safetensors
    "llama3_70b": 70_553_706_496,  # meta-llama/Meta-Llama-3-70B's
    "llama3_1_8b": 8_030_261_248,  # meta-llama/Llama-3.1-8B's
    "llama3_2_1b": 1_235_814_400,  # meta-llama/Llama-3.2-1B's
    "qwen3_0_6b": 596_049_920,  # Qwen/Qwen3-0.6B's
    "qwen3_8b": 8_190_735_360,  # Qwen/Qwen3-8B's
    "mixtral_8x7b": 46_702_792_704,  # mistralai/Mixtral-8x7B-v0.1's
    "qwen3_30b_a3b": 30_532_122_624,  # Qwen/Qwen3-30B-A3B's
    "mistral_7b": 7_241_732_096,  # mistralai/Mistral-7B-v0.1's
    "gemma2_2b": 2_614_341_888,  # google/gemma-2-2b's
    "olmo2_7b": 7_298_617_344,  # allenai/OLMo-2-1124-7B's
    "vit_b16": 86_567_656,  # transformers' ViTForImageClassification of "google/vit-base-patch16-224"
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_equal_the_published_numbers(name: str) -> None:
    assert parameters(shipped(name)) == PUBLISHED[name]


def test_active_parameters_are_those_published() -> None:
    """The papers round: 12.9B of Mixtral 8x7B, 3.3B of Qwen3 30B-A3B."""
    assert round(active_parameters(shipped("mixtral_8x7b")) / 1e9, 1) == 12.9
    assert round(active_parameters(shipped("qwen3_30b_a3b")) / 1e9, 2) == 3.35
    dense = shipped("llama3_8b")
    assert active_parameters(dense) == parameters(dense)


def inputs_of(model: ModelConfig, length: int, device: str) -> tuple[Tensor, Tensor]:
    """Return two samples and their labels."""
    if model.inputs is InputKind.patches:
        images = torch.zeros(2, model.image_channels, model.image_size, model.image_size, dtype=torch.uint8)
        return images.to(device), torch.zeros(2, 1, dtype=torch.long, device=device)
    tokens = torch.zeros(2, length, dtype=torch.long, device=device)
    return tokens, tokens


def counted_flops(model: ModelConfig, length: int, device: str) -> float:
    """Return torch's count for a forward and a backward pass, per token."""
    module = without_values(model) if device == "meta" else build(model)
    # The math backend's products are counted as they are, the whole T x T matrix; a fused backward
    # would count the scores that it recomputes.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module(*inputs_of(model, length, device)).backward()
    return float(counter.get_total_flops()) / (2 * length)


@pytest.mark.slow
def test_flops_are_those_that_torch_counts(subtests: pytest.Subtests) -> None:
    for longest in [16, LENGTH]:
        for name in (name for name, model in VARIANTS.items() if not model.experts.count):
            with subtests.test(f"{name}, {longest}"):  # rows of experts depend on values: executed below
                # All blocks are alike: six of eighty suffice.
                model = replace(VARIANTS[name], num_layers=min(VARIANTS[name].num_layers, 6), dropout=0.0)
                is_vision = model.inputs is InputKind.patches
                length = vision_tokens(model) if is_vision else min(longest, model.max_sequence_length)
                counted = counted_flops(model, length, "meta")
                assert train_flops_per_token(model, length) == pytest.approx(counted, rel=1e-3)


@pytest.mark.parametrize("architecture", [*PARTS, "vit", "moe_tiny"])
def test_flops_of_a_pass_that_is_executed(architecture: str) -> None:
    models = {"vit": small_vit(), "moe_tiny": replace(shipped("moe_tiny"), dropout=0.0)}
    model = models.get(architecture) or small(architecture)
    length = vision_tokens(model) if architecture == "vit" else 24
    # torch counts the sum of a token's experts as a product.
    sums = 6 * model.experts.top_k * model.hidden_size * model.num_layers if model.experts.count else 0
    counted = counted_flops(model, length, "cpu") - sums
    assert train_flops_per_token(model, length) == pytest.approx(counted, rel=1e-4 if sums else 1e-3)


DOCS = Path(__file__).parents[2] / "docs" / "planning.md"
TOKENS_PER_S, LAYERS, HIDDEN, T = 500_000, 12, 768, 1024  # of the example in the documentation


def test_the_documented_definitions_of_mfu() -> None:
    """The first definition is the launcher's; the two others are computed here only."""
    run = run_of("model=gpt2_small", "hardware=h100_80gb", "precision=bf16", "parallelism=single")
    matrices, everything = matrix_parameters(run.model), parameters(run.model)
    attention = 12 * LAYERS * HIDDEN * T
    table = {
        f"6 x {matrices:,} + 12 L H T": 6 * matrices + attention,
        f"6 x {everything:,} + 12 L H T": 6 * everything + attention,
        f"6 x {matrices:,} + 6 L H T": 6 * matrices + attention // 2,
    }
    text = DOCS.read_text()
    for words, flops in table.items():
        share = flops * TOKENS_PER_S / 989e12
        assert f"| {words} | {flops:,} | {share:.1%} |" in text
    ours, *_ = table.values()
    seconds = run.training.global_batch_size * T / TOKENS_PER_S
    assert mfu(run, 1, seconds) == pytest.approx(ours * TOKENS_PER_S / 989e12)
    assert mfu(run, 8, seconds) == pytest.approx(ours * TOKENS_PER_S / 989e12 / 8)
    run.hardware.peak_flops.bf16 = None
    assert mfu(run, 1, seconds) is None


def test_plans_and_rows_have_the_same_mfu() -> None:
    run = run_of("model=gpt2_small", "hardware=h100_80gb", "precision=bf16", "parallelism.data=2")
    layout = validate(run, World("cuda", 2, 2, fixed=True))
    plan = make_plan(run, layout)
    assert plan.time is not None
    row = performance(run, layout, T, plan.time.total)
    assert row["perf/mfu"] == plan.mfu == mfu(run, 2, plan.time.total)
    assert row["perf/flops_per_s"] * plan.time.total == pytest.approx(plan.model_flops)
