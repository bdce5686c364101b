"""A plan: its parts add up, they move in the right direction, and published facts hold."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from launcher.config.fields import config_directory, options_of
from launcher.config.schema import Dtype
from launcher.planning.choose.changes import helpful, single_changes
from launcher.planning.choose.limits import MEMORY_CLASSES, limit, settings_in_words
from launcher.planning.cost.geometry import pipeline_ranks
from launcher.planning.cost.operations import Collective
from launcher.planning.cost.optimizer_time import optimizer_seconds
from launcher.planning.cost.rates import Shares, specified
from launcher.planning.cost.run_plan import PROCESS_BYTES, Plan, make_plan
from launcher.planning.cost.traffic import GroupShape, group_shapes
from launcher.planning.show.plan_figure import draw_plan
from launcher.planning.show.plan_report import as_json, print_plan
from launcher.text import four_digits, size
from tests.planning.planned import LLAMA, plan_of

H100 = ["hardware=h100_80gb"]
CLUSTER = [*H100, "hardware.nodes=4", "parallelism.tensor=4", "parallelism.pipeline=4"]


BUCKET = "deepspeed.zero_optimization.reduce_bucket_size=500000000"  # DeepSpeed's own


class TestMemory:
    def test_kinds_of_memory_add_up_to_the_total(self) -> None:
        plan = plan_of(*LLAMA, *CLUSTER)
        assert len(plan.stages) == 4
        for stage in plan.stages:
            assert stage.memory.total == sum(getattr(stage.memory, name) for name in MEMORY_CLASSES)
            assert stage.memory.margin > 0
        # Earlier stages hold more micro-batches; the last has the logits.
        in_flight = [stage.memory.activations for stage in plan.stages[:3]]
        assert in_flight == sorted(in_flight, reverse=True)

    @pytest.mark.parametrize(
        ("dtype", "stage", "per_parameter"),
        [
            # Weights, gradients, and fp32 weights with AdamW's two states where there are copies.
            ("fp32", 0, 4 + 4 + 8),
            ("bf16", 1, 2 + 4 + 12),
            ("bf16", 2, 2 + 4 + 12),
            ("bf16", 3, 2 + 4 + 12),
        ],
    )
    def test_bytes_of_a_parameter_on_one_rank(self, dtype: str, stage: int, per_parameter: int) -> None:
        plan = plan_of(
            "model=gpt2_xl", "model.dropout=0", f"precision={dtype}", "hardware=h100_80gb",
            "parallelism.data=1", f"parallelism.zero_stage={stage}", "training.micro_batch_size=1",
        )  # fmt: skip
        memory = plan.stages[0].memory
        held = memory.weights + memory.gradients + memory.optimizer
        # ZeRO-2 keeps gradients flat in fp32 and ZeRO-3 small weights whole besides: a few thousandths.
        assert held / plan.parameters == pytest.approx(per_parameter, rel=0.01)

    @pytest.mark.parametrize("stage", [1, 3])
    def test_bf16_states_take_8_bytes_per_parameter(self, stage: int) -> None:
        plan = plan_of(
            "model=gpt2_xl", "model.dropout=0", "precision=bf16_states", "hardware=h100_80gb",
            "parallelism.data=1", f"parallelism.zero_stage={stage}", "training.micro_batch_size=1",
        )  # fmt: skip
        memory = plan.stages[0].memory
        held = memory.weights + memory.gradients + memory.optimizer
        assert held / plan.parameters == pytest.approx(8, rel=0.01)

    def test_8b_with_bf16_states_on_one_gpu(self) -> None:
        """docs/precision.md: with recomputation in 80 GB, without in 141 GB; with fp32 states in neither."""
        one = ["model=llama3_8b", "parallelism.data=1", "training.micro_batch_size=1"]
        full = "parallelism.activation_checkpointing=full"
        recomputed = plan_of(*one, *H100, "precision=bf16_states", full)
        kept = plan_of(*one, "hardware=h200_141gb", "precision=bf16_states")
        assert (recomputed.fits, kept.fits) == (True, True)
        assert [round(plan.stages[0].memory.total / 1e9) for plan in (recomputed, kept)] == [71, 109]
        assert not plan_of(*one, *H100, "precision=bf16_states").fits
        assert not plan_of(*one, "hardware=h200_141gb", "precision=bf16", full).fits

    @pytest.mark.parametrize("stage", [1, 2, 3])
    def test_zero_divides_by_the_data_ranks(self, stage: int) -> None:
        plans = [
            plan_of(*LLAMA, *H100, f"parallelism.data={data}", f"parallelism.zero_stage={stage}")
            for data in (1, 8)
        ]
        whole, eighth = (plan.stages[0].memory for plan in plans)
        assert eighth.optimizer == pytest.approx(whole.optimizer / 8, rel=1e-3)
        assert (eighth.weights < whole.weights / 2) == (stage == 3)
        assert (eighth.gradients < whole.gradients / 2) == (stage >= 2)

    def test_axes_that_split_a_model_reduce_its_memory(self) -> None:
        alone, tensor, pipeline = (
            plan_of(*LLAMA, *H100, "parallelism.data=1", "parallelism.zero_stage=1", *more)
            for more in ([], ["parallelism.tensor=4"], ["parallelism.pipeline=4"])
        )
        for split in (tensor, pipeline):
            assert split.stages[0].memory.weights < alone.stages[0].memory.weights / 2
            assert max(stage.memory.total for stage in split.stages) < alone.stages[0].memory.total

    @pytest.mark.parametrize(
        "less",
        [
            ["parallelism.activation_checkpointing=full"],
            ["parallelism.activation_checkpointing=selective"],
            ["parallelism.sequence_parallel=true"],
            ["training.micro_batch_size=1"],
        ],
    )
    def test_recomputation_and_splits_reduce_activations(self, less: list[str]) -> None:
        more = [
            *LLAMA,
            *H100,
            "parallelism.tensor=2",
            "parallelism.zero_stage=1",
            "training.micro_batch_size=2",
        ]
        assert (
            plan_of(*more, *less).stages[0].memory.activations < plan_of(*more).stages[0].memory.activations
        )

    def test_offload_goes_to_the_host(self) -> None:
        unsaved = "checkpoint.enabled=false"
        on, off = (
            plan_of(
                *LLAMA, *H100, unsaved, "parallelism.zero_stage=2", f"parallelism.offload_optimizer={flag}"
            )
            for flag in ("true", "false")
        )
        assert on.stages[0].memory.optimizer < off.stages[0].memory.optimizer / 2
        assert on.stages[0].memory.host > off.stages[0].memory.optimizer
        assert off.stages[0].memory.host == 0
        on_cpu = plan_of("parallelism=zero2", "parallelism.offload_optimizer=true")
        assert on_cpu.stages[0].memory.host == 0

    def test_at_start_up_the_host_holds_one_weight_of_a_rank_on_a_gpu(self) -> None:
        vocabulary, block = 128256 * 4096, 4 * 64 * 512
        for settings, numel in (
            (["parallelism.zero_stage=1"], vocabulary),
            (["parallelism.zero_stage=1", "parallelism.tensor=2"], vocabulary // 2),
            (["parallelism.zero_stage=3"], vocabulary // 8),
        ):
            plan = plan_of(*LLAMA, *H100, *settings, "hardware.nodes=1")
            assert plan.stages[0].memory.start_up == 2 * numel + block, settings
        offloaded = plan_of(*LLAMA, *H100, "parallelism=zero3_offload", "hardware.nodes=1").stages[0]
        assert offloaded.memory.start_up == pytest.approx(2 * offloaded.parameters / 8, rel=0.01)

    def test_a_checkpoint_is_copied_to_the_host(self) -> None:
        asynchronous, waited_for, never = (
            plan_of("parallelism=single", f"checkpoint.{setting}").stages[0]
            for setting in ("enabled=true", "asynchronous=false", "enabled=false")
        )
        weights_and_two_states = 12 * asynchronous.parameters
        assert asynchronous.memory.checkpoint == weights_and_two_states
        assert asynchronous.memory.total - never.memory.total == weights_and_two_states
        assert asynchronous.memory.allocated == never.memory.allocated
        assert waited_for.memory.total == asynchronous.memory.total, "it is less than a file"
        a_file = ("checkpoint.asynchronous=false", "checkpoint.max_file_gb=0.001")
        assert plan_of("parallelism=single", *a_file).stages[0].memory.checkpoint == 1e6
        gpu = plan_of(*LLAMA, *H100, "parallelism.zero_stage=1")
        without = plan_of(*LLAMA, *H100, "parallelism.zero_stage=1", "checkpoint.enabled=false")
        assert gpu.stages[0].memory.total == without.stages[0].memory.total
        data = gpu.layout.data
        copied = 12 * gpu.stages[0].parameters / data
        assert gpu.stages[0].memory.host == pytest.approx(copied, rel=1e-6)

    def test_a_bucket_that_is_never_filled_takes_no_memory_of_a_cpu(self) -> None:
        memory = plan_of("parallelism=zero1", BUCKET).stages[0].memory
        assert memory.total < 100e6
        assert memory.allocated > 2e9
        assert (
            plan_of("parallelism=zero1", BUCKET, *H100, "training.global_batch_size=64")
            .stages[0]
            .memory.total
            > 2e9
        )


class TestBudget:
    def test_is_hardware_memory_bytes_if_set(self) -> None:
        plan = plan_of("parallelism.data=2", "hardware=cpu", "hardware.memory_bytes=31e6", memory_here=10**12)
        assert plan.budget == 31e6
        assert not plan.fits
        assert plan.shortages == {0: plan.stages[0].memory.total - 31e6}
        assert limit(plan).startswith("memory: activations take most of it, in stage 0")

    def test_is_the_memory_of_this_machine_on_cpu_and_else_unknown(self) -> None:
        plan = plan_of("hardware=cpu", "parallelism.data=2", memory_here=10**10)
        assert plan.budget == 10**10 / 2 - PROCESS_BYTES
        assert plan.fits
        unknown = plan_of("hardware=cpu")
        assert unknown.budget is None
        assert unknown.fits

    def test_a_change_that_fits_is_offered(self) -> None:
        plan = plan_of(*LLAMA, *H100, "parallelism.zero_stage=1")
        assert not plan.fits
        offered = helpful(plan)
        assert 1 <= len(offered) <= 3
        assert all(change.plan.fits for change in offered)
        times = [change.plan.time.total for change in offered if change.plan.time]
        assert times == sorted(times)

    def test_a_faster_change_is_offered_if_the_run_fits(self) -> None:
        plan = plan_of(*LLAMA, *H100, "parallelism.tensor=8", "parallelism.activation_checkpointing=full")
        assert plan.fits
        assert plan.time is not None
        for change in helpful(plan):
            assert change.plan.fits
            assert change.plan.time is not None
            assert change.plan.time.total < plan.time.total
        assert helpful(plan)

    def test_changes_keep_the_ranks_and_the_batch(self) -> None:
        plan = plan_of(*LLAMA, *CLUSTER, "parallelism.data=2")
        changes = list(single_changes(plan))
        assert len(changes) > 8
        for change in changes:
            assert change.plan.layout.world_size == 32
            assert change.plan.tokens == plan.tokens

    def test_the_margin_of_a_card_is_measured_or_assumed(self) -> None:
        """With tensor, data and pipeline groups; a CPU has none."""

        def margin(*more: str) -> int:
            return plan_of(*LLAMA, *CLUSTER, *more).stages[0].memory.margin

        measured = ["hardware.card.context_bytes=9e8", "hardware.card.group_bytes=5e7"]
        assert margin() == 600_000_000 + 3 * 200_000_000
        assert margin(*measured) == 900_000_000 + 3 * 50_000_000
        assert plan_of("hardware=cpu", *measured).stages[0].memory.margin == 0


class TestTime:
    def test_parts_add_up(self) -> None:
        found = as_json(plan := plan_of(*LLAMA, *CLUSTER), [])
        assert sum(found["step"]["parts_s"].values()) == pytest.approx(found["step"]["time_s"])
        assert found["step"]["tokens_per_s"] == pytest.approx(plan.tokens / found["step"]["time_s"])
        assert 0.1 < found["step"]["mfu"] < 0.8

    def test_traffic_behind_computation_is_shown_and_not_free(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        plan = plan_of(*LLAMA, *H100, "hardware.nodes=2", "parallelism.zero_stage=3")
        assert plan.time is not None
        hidden = plan.time.data_hidden
        assert as_json(plan, [])["step"]["hidden_s"]["data_communication"] == hidden > 0
        print_plan(plan, [])
        out = capsys.readouterr().out
        assert "hidden behind compute, s" in out
        [row] = [line for line in out.splitlines() if line.startswith("data communication")]
        assert row.split()[-1] == four_digits(hidden)
        free = make_plan(plan.run, plan.layout, shares=Shares(beside=0.0)).time
        assert free is not None
        assert plan.time.compute - free.compute == pytest.approx(Shares().beside * hidden)

    def test_gradients_are_reduced_behind_the_last_backward_pass(self) -> None:
        """The plan's time of BF16_Optimizer's buckets does not depend on the number of micro-batches."""
        one, eight = (
            plan_of(
                *LLAMA, *H100, "hardware.nodes=2", "parallelism.zero_stage=1",
                f"training.global_batch_size={batch}",
            ).time
            for batch in (16, 128)
        )  # fmt: skip
        assert one is not None
        assert eight is not None
        assert one.data_hidden > one.data / 10
        assert (eight.data, eight.data_hidden) == pytest.approx((one.data, one.data_hidden))

    def test_there_is_one_bubble(self, capsys: pytest.CaptureFixture[str]) -> None:
        plan = plan_of(*LLAMA, *CLUSTER)
        assert plan.bubble is not None
        step = as_json(plan, [])["step"]
        assert step["bubble"] == plan.bubble == step["parts_s"]["bubble"] / step["time_s"] > 0
        print_plan(plan, [])
        out = capsys.readouterr().out
        [row] = [line for line in out.splitlines() if line.startswith("bubble")]
        assert row.split()[-1] == f"{plan.bubble:.1%}"
        assert f"bubble {plan.bubble:.1%} of the step" in out

    def test_twice_the_accelerators_are_not_twice_as_fast(self) -> None:
        one, two = (
            plan_of(*LLAMA, *H100, f"hardware.nodes={nodes}", "parallelism=zero1").tokens_per_s or 0
            for nodes in (1, 2)
        )
        assert one < two < 2 * one

    def test_slower_links_and_memory_make_a_step_longer(self) -> None:
        def seconds(*more: str) -> float:
            time = plan_of(*LLAMA, *CLUSTER, "hardware=a100_80gb", *more).time
            assert time is not None
            return time.total

        base = seconds()
        for field in ("bandwidth_intra_node_gb_s", "bandwidth_inter_node_gb_s", "memory_bandwidth_gb_s"):
            assert seconds(f"hardware.{field}=10") > base
        assert seconds("hardware.peak_flops.bf16=1e14") > 2 * base

    def test_recomputation_costs_a_third_at_most(self) -> None:
        none, selective, full = (
            plan_of(
                *LLAMA, *H100, "parallelism.tensor=8", f"parallelism.activation_checkpointing={kind}"
            ).time
            for kind in ("none", "selective", "full")
        )
        assert none is not None
        assert selective is not None
        assert full is not None
        assert none.compute < selective.compute < full.compute < 1.34 * none.compute

    def test_offload_takes_time_on_the_link_to_the_host(self) -> None:
        def seconds(*offloaded: str, host_gb_s: int = 55) -> float:
            more = [f"parallelism.offload_{name}=true" for name in offloaded]
            link = f"hardware.card.host_gb_s={host_gb_s}"
            time = plan_of(*LLAMA, *H100, "parallelism.zero_stage=3", link, *more).time
            assert time is not None
            return time.total

        states = 12e9  # bytes of a rank, of 8 billion parameters on 8 ranks
        assert seconds("optimizer") > seconds() + states / 55e9
        assert seconds("optimizer", host_gb_s=5) > seconds("optimizer") + states / 5e9
        assert seconds("optimizer", "parameters") > seconds("optimizer")
        assert seconds(host_gb_s=5) == seconds()

    def test_zero_3_adds_up_offloaded_gradients_over_the_link_to_the_host(self) -> None:
        """fp32 sums come to the device and go back in each of 16 micro-batches, beside the computation."""
        here, there = (
            plan_of(*LLAMA, *H100, "parallelism.zero_stage=3", f"parallelism.offload_optimizer={flag}").time
            for flag in ("false", "true")
        )
        assert here is not None
        assert there is not None
        more = there.data + there.data_hidden - here.data - here.data_hidden
        assert more == pytest.approx(16 * 2 * 4 * 8.03e9 / 8 / 55e9, rel=0.02)
        assert there.data_hidden > here.data_hidden

    @pytest.mark.parametrize(
        "missing", ["peak_flops.bf16", "memory_bandwidth_gb_s", "bandwidth_intra_node_gb_s"]
    )
    def test_without_speeds_of_the_hardware_no_time_is_planned(self, missing: str) -> None:
        plan = plan_of(*LLAMA, "hardware=a100_80gb", f"hardware.{missing}=null")
        assert plan.time is None
        found = as_json(plan, [])
        assert (found["step"]["time_s"], found["step"]["mfu"], found["step"]["tokens_per_s"]) == (None,) * 3
        assert json.loads(json.dumps(found)) == found


class TestTraffic:
    @pytest.mark.parametrize(
        ("kind", "ranks", "sent"),
        [("all_reduce", 4, 150), ("all_gather", 4, 75), ("reduce_scatter", 4, 75), ("send", 4, 100)],
    )
    def test_bytes_that_a_ring_sends(self, kind: Any, ranks: int, sent: float) -> None:
        assert Collective(kind, 100).sent(ranks) == sent

    def test_tensor_parallelism_makes_four_all_reduces_of_activations_per_layer(self) -> None:
        """8 b s h (t-1)/t elements per layer and micro-batch: arXiv 2104.04473, section 3.2."""
        layers, more = 4, ["parallelism.tensor=2", "parallelism.data=1", "training.micro_batch_size=4"]
        one, two = (
            plan_of("model=gpt_tiny", f"model.num_layers={count}", *more, "hardware=cpu")
            for count in (layers, layers + 1)
        )
        b_s_h = 4 * 128 * 128 * 4  # bytes
        of_a_layer = two.traffic["tensor"].sent - one.traffic["tensor"].sent
        assert of_a_layer == one.layout.accumulation * 4 * 2 * b_s_h * 1 / 2

    def test_gradients_are_reduced_once_a_step_and_under_zero_2_in_every_micro_batch(self) -> None:
        sent = {}
        for stage in (0, 1, 2):
            plan = plan_of("parallelism.data=2", f"parallelism.zero_stage={stage}", "hardware=cpu")
            assert plan.layout.accumulation == 2
            sent[stage] = plan.traffic["data"].sent
        ring = 4 * plan.parameters  # 2 (n-1)/n of fp32, for two ranks
        assert sent[0] == ring
        assert sent[1] == pytest.approx(1.5 * ring, rel=1e-4)
        assert sent[2] == pytest.approx(2.5 * ring, rel=1e-4)

    @pytest.mark.parametrize(("recomputation", "times"), [("none", 1), ("full", 2)])
    def test_rows_of_tokens_are_sent_to_their_experts_and_back(self, recomputation: str, times: int) -> None:
        """Two all-to-alls of rows forward and two backward in each layer; recomputation repeats the first."""
        plan = plan_of(
            "model=moe_tiny", "hardware=cpu", "parallelism.data=4", "parallelism.expert=4",
            "training.micro_batch_size=2", "training.global_batch_size=16",
            f"parallelism.activation_checkpointing={recomputation}", "plan.expert_imbalance=2",
        )  # fmt: skip
        m, micro_batches = plan.run.model, 2
        rows = 2 * m.max_sequence_length * m.experts.top_k * m.hidden_size * 4  # bytes, of a micro-batch
        forward, backward = 2 * rows + m.experts.count * 8, 2 * rows  # forward with the numbers of rows
        sent = micro_batches * m.num_layers * (times * forward + backward) * 3 / 4
        assert plan.traffic["expert"].sent == sent
        assert plan.traffic["expert_data"].sent == 0

    def test_the_ring_hides_all_but_its_last_gradients_behind_attention(self) -> None:
        plans = {
            method: plan_of("experiment=llama3_8b_128k", f"parallelism.context_method={method}")
            for method in ("ring", "gather")
        }
        ring, gather = (plans[method].time for method in ("ring", "gather"))
        assert ring is not None
        assert gather is not None
        assert gather.context_hidden == 0
        # Per key and value 7 steps send 2 bytes forward, again in the recomputation, and 2 + 4 backward.
        share = ring.context / (ring.context + ring.context_hidden)
        assert share == pytest.approx(4 / (7 * 10), rel=0.01)
        assert ring.context + ring.context_hidden == pytest.approx(gather.context, rel=0.01)
        assert plans["ring"].traffic["context"].sent == plans["gather"].traffic["context"].sent
        traffic = as_json(plans["ring"], [])["traffic"]
        links = {name: (traffic[name]["ranks"], traffic[name]["link"]) for name in ("context", "data")}
        assert links == {"context": (8, "within a node"), "data": (64, "between nodes")}

    def test_ulysses_sends_less_than_the_ring_over_enough_ranks(self) -> None:
        """32 query and 8 key/value heads, with recomputation: docs/long-context.md."""
        for ranks, ulysses_sends_less in ((2, False), (4, True), (8, True)):
            ring, ulysses = (
                plan_of(
                    "experiment=llama3_8b_128k", f"parallelism.context={ranks}",
                    f"parallelism.context_method={method}",
                )
                for method in ("ring", "ulysses")
            )  # fmt: skip
            sent = ring.traffic["context"].sent, ulysses.traffic["context"].sent
            assert (sent[1] < sent[0]) is ulysses_sends_less

    def test_links(self) -> None:
        shapes = group_shapes(plan_of(*LLAMA, *CLUSTER).layout, 8)
        assert shapes == {
            "tensor": GroupShape(4, 4),
            "context": GroupShape(1, 1),
            "data": GroupShape(2, 2),
            "expert": GroupShape(1, 1),
            "expert_data": GroupShape(2, 2),
            "pipeline": GroupShape(4, 1),
        }
        found = as_json(plan_of(*LLAMA, *CLUSTER), [])["traffic"]
        links = {name: of["link"] for name, of in found.items()}
        assert links == {
            "tensor": "within a node",
            "context": "none",
            "data": "within a node",
            "pipeline": "between nodes",
        }


CATALOGUE = sorted(set(options_of("hardware")) - {"cpu", "local"})


class TestCatalogue:
    def test_has_the_accelerators_of_the_catalogue(self) -> None:
        assert CATALOGUE == [
            "a100_40gb", "a100_80gb", "b200_180gb", "h100_80gb", "h100_pcie_80gb", "h200_141gb",
            "l40s_48gb", "mi300x_192gb", "v100_32gb",
        ]  # fmt: skip

    @pytest.mark.parametrize("name", CATALOGUE)
    def test_has_every_rate_that_a_plan_needs_with_its_source(self, name: str) -> None:
        text = (config_directory() / "hardware" / f"{name}.yaml").read_text()
        assert "data sheet" in text
        hardware = plan_of(f"hardware={name}", "training.global_batch_size=64", "precision=fp16").run.hardware
        said = OmegaConf.to_container(OmegaConf.structured(hardware))
        assert isinstance(said, dict)
        unknown = {key for key, value in said.items() if value is None}
        assert unknown <= {"gemm_efficiency", "cores"}
        card = said["card"]
        assert isinstance(card, dict)
        if card["name"] is not None:
            assert card["measured_on"]
            assert card["versions"]
        assert specified(hardware, Dtype.fp16)
        digits = re.search(r"(\d+)gb", name)
        assert digits
        # A data sheet counts 80 GiB as 80 GB, and the driver keeps a part.
        assert hardware.memory_bytes is not None
        assert 0.98 < hardware.memory_bytes / (float(digits[1]) * 1e9) < 1.08


CONTRACT = {
    "model": {"parameters"},
    "step": {"time_s", "tokens_per_s", "mfu", "bubble"},
    "traffic": {"tensor", "data", "pipeline"},
}


class TestJson:
    def test_has_the_documented_keys(self) -> None:
        found = as_json(plan_of(*LLAMA, *CLUSTER), [])
        assert found.keys() >= {"model", "layout", "stages", "step", "traffic", "fits"}
        for section, keys in CONTRACT.items():
            assert found[section].keys() >= keys
        assert [stage["memory"].keys() >= {*MEMORY_CLASSES, "total"} for stage in found["stages"]] == [
            True
        ] * 4
        assert found["model"]["parameters"] == 8_030_261_248
        assert found["fits"] is True
        assert found["layout"]["world_size"] == 32

    def test_without_a_pipeline_there_is_no_bubble(self) -> None:
        assert as_json(plan_of(), [])["step"]["bubble"] == 0.0
        bubble = as_json(plan_of(*LLAMA, *CLUSTER), [])["step"]["bubble"]
        assert 2 / 64 < bubble < 3 / 60


@pytest.mark.parametrize(
    "more",
    [
        CLUSTER, [*H100, "parallelism=zero3"], [*H100, "parallelism.context=2"], ["hardware=cpu"],
        [*CLUSTER, "parallelism.pipeline_schedule=dualpipev"],
        [*H100, "model=qwen3_30b_a3b", "parallelism.expert=4", "parallelism.zero_stage=2"],
    ],
)  # fmt: skip
def test_a_picture_is_drawn(more: list[str], tmp_path: Path) -> None:
    pytest.importorskip(
        "matplotlib", reason="drawn with the optional dependency: pip install launcher[figures]"
    )
    plan: Plan = plan_of(*LLAMA, *more)
    draw_plan(plan, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "plan.png").stat().st_size > 20_000


def test_the_imbalance_of_experts_is_stated_and_counted() -> None:
    shared = [*H100, "model=qwen3_30b_a3b", "parallelism.expert=4", "parallelism.zero_stage=2"]
    even, uneven = plan_of(*LLAMA, *shared), plan_of(*LLAMA, *shared, "plan.expert_imbalance=1.5")
    assert "expert imbalance 1," in settings_in_words(even.run) + ","
    assert "expert imbalance 1.5" in settings_in_words(uneven.run)
    assert "imbalance" not in settings_in_words(plan_of(*LLAMA, *H100).run)
    assert even.time is not None
    assert uneven.time is not None
    assert uneven.time.total > even.time.total
    assert uneven.peak > even.peak


@pytest.mark.parametrize("experts", [1, 8])
def test_every_weight_of_a_partition_is_updated(experts: int) -> None:
    """ZeRO-1 in fp32: 48 bytes for each weight of the partition, 16 for each gradient of the rank.

    Of the partition the gradient is read four times and written once, new weights are copied, and the weight
    and two states are read and written. All gradients are copied into a buffer and set to zero.
    """
    shared = ["model=moe_tiny", *H100, "parallelism.zero_stage=1", f"parallelism.expert={experts}"]
    plan = plan_of(*shared, "training.global_batch_size=32")
    rates = specified(plan.run.hardware, Dtype.fp32)
    assert rates is not None
    [rank] = pipeline_ranks(plan.run, plan.layout)
    moved = optimizer_seconds(plan.run, plan.layout, rank, rates) * rates.update
    updated = plan.stages[0].memory.optimizer / 12  # weight and two states in fp32
    assert moved == pytest.approx(48 * updated + 16 * rank.trained_parameters)


def test_weights_that_zero_3_never_frees_are_gathered_once() -> None:
    """All weights of gpt_tiny are below the threshold; a bucket of 0 turns prefetching off."""
    off = "deepspeed.zero_optimization.stage3_prefetch_bucket_size=0"
    plan = plan_of("hardware=cpu", "parallelism=zero3", "parallelism.data=2", off)
    collectives = plan.traffic["data"].collectives
    assert sum(count for one, count in collectives.items() if one.kind == "all_gather") == 1


def test_the_memory_of_a_node_is_shared_by_its_own_ranks() -> None:
    nodes = ["hardware=cpu", "hardware.nodes=4", "hardware.accelerators_per_node=8"]
    batch = ["training.global_batch_size=32", "training.micro_batch_size=1"]
    assert plan_of(*nodes, *batch, memory_here=10**10).budget == 10**10 / 8 - PROCESS_BYTES
    assert plan_of(*nodes, *batch, memory_here=10**9).budget == 0


def test_a_change_on_a_cpu_starts_the_planned_ranks() -> None:
    """A command without a number of data ranks takes as many as possible: more with smaller micro-batches."""
    run = ["hardware=cpu", "training.global_batch_size=8", "training.micro_batch_size=2"]
    plan = plan_of(*run)
    assert plan.layout.data == 4
    for change in single_changes(plan):
        typed = plan_of(*run, *change.settings.split(" "))
        assert typed.layout == change.plan.layout, change.settings


@pytest.mark.parametrize(
    ("of", "text"),
    [(0, "0.00 B"), (999, "999 B"), (22.6e9, "22.60 GB"), (1.5e6, "1.50 MB"), (2e12, "2,000 GB")],
)
def test_sizes_are_read(of: float, text: str) -> None:
    assert size(of) == text
