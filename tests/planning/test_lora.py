"""Plans and warnings of runs with adapters (LoRA)."""

from launcher.config.finetune_rules import adapter_warnings
from launcher.config.validate import validate
from launcher.config.world import World
from launcher.models.arithmetic import adapter_parameters, parameters, step_flops, trained_parameters
from launcher.planning.cost.run_plan import Plan, make_plan
from tests.config.composing import run_of

QWEN = ["experiment=qwen3_8b_lora", "data=stdlib"]


def plan_of(*overrides: str) -> Plan:
    run = run_of(*overrides)
    return make_plan(run, validate(run, World("cuda", 1, 1, fixed=True)))


def test_frozen_weights_take_two_bytes_and_adapters_eighteen() -> None:
    plan = plan_of(*QWEN)
    [stage] = plan.stages
    trained = adapter_parameters(plan.run)
    h, f, qkv, layers, rank = 4096, 12288, 4096 + 2 * 1024, 36, 16
    columns = 3 * h + qkv + h + h + 2 * h + 2 * f + f + h  # of A and B of qkv, output, gate and up, down
    assert trained == trained_parameters(plan.run) == layers * rank * columns
    assert abs(stage.memory.weights / (2 * (parameters(plan.run.model) + trained)) - 1) < 0.01
    assert abs(stage.memory.optimizer / (12 * trained) - 1) < 0.01  # masters and two states in fp32
    assert abs(stage.memory.gradients / (4 * trained) - 1) < 0.01


def test_a_frozen_weight_saves_a_third_of_its_products() -> None:
    whole = step_flops(run_of(*QWEN, "finetune.lora.rank=null"))
    assert 0.6 < step_flops(run_of(*QWEN)) / whole < 0.75
    adapters, all_weights = plan_of(*QWEN).time, plan_of(*QWEN, "finetune.lora.rank=null").time
    assert adapters is not None
    assert all_weights is not None
    # The outputs of the adapters are written and added to those of the projections.
    assert 0.7 < adapters.compute / all_weights.compute < 0.9
    assert adapters.optimizer < all_weights.optimizer / 50


def test_adapters_of_random_weights_are_a_warning() -> None:
    [warning] = adapter_warnings(run_of(*QWEN))
    assert "checkpoint.init_from=PATH" in warning
    assert adapter_warnings(run_of(*QWEN, "checkpoint.init_from=qwen")) == []
    assert adapter_warnings(run_of(*QWEN, "finetune.lora.rank=0")) == []
