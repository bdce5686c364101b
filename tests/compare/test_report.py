"""The layouts that are compared, and their report. Pure."""

from dataclasses import replace
from math import prod

import pytest

from launcher.commands.compare import planned, refusal_of_all
from launcher.compare.compared_layouts import ComparedLayout, chosen_layouts, in_layout, named_layouts
from launcher.compare.comparison_report import (
    ComparisonRow,
    as_json,
    bubble,
    differing,
    metric_rows,
    print_comparison,
    shown_groups,
    shown_parts,
)
from launcher.compare.measured_layout import MeasuredLayout, combined
from launcher.compare.rank_record import RankRecord
from launcher.config.errors import ConfigError
from launcher.config.layout import EXPERT_GROUPS, GROUPS, STEP_PARTS
from launcher.config.schema import ContextMethod, MeasuredRates, PipelineSchedule
from launcher.config.world import World
from tests.config.composing import run_of

PARTS = {"compute": 1.0, "tensor": 0.0, "context": 0.0, "data": 0.0, "pipeline": 0.5, "optimizer": 0.0}

CORES = World("cpu", 2, 2)


def compared(name: str, ranks: int = 4, *overrides: str) -> ComparedLayout:
    run = run_of("hardware=cpu", "parallelism=single", *overrides)
    return planned(name, in_layout(run, named_layouts(ranks)[name], CORES), CORES)


def row(name: str, *losses: float) -> ComparisonRow:
    sent = dict.fromkeys(("tensor", "context", "data", "pipeline"), 0.0)
    return ComparisonRow(compared(name), MeasuredLayout(list(losses), 1.5, PARTS, 7, sent))


@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 8])
def test_every_layout_is_of_all_ranks(ranks: int) -> None:
    for name, sizes in named_layouts(ranks).items():
        world = prod(sizes.get(axis, 1) for axis in ("data", "context", "tensor", "pipeline"))
        assert world == (1 if name == "single" else ranks)
    assert list(chosen_layouts([], ranks)) == list(named_layouts(ranks))
    assert list(chosen_layouts(["tp", "dp"], ranks)) == ["tp", "dp"]


def test_a_layout_that_there_is_not_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        ConfigError,
        match=r"compare.layouts=dp_pt: unknown layout; with compare.ranks=4 there are: single, dp,",
    ):
        chosen_layouts(["dp_pt"], 4)
    with pytest.raises(ConfigError, match=r"try: compare.layouts=\[dp_tp\]"):
        chosen_layouts(["dp_tpp"], 4)


def test_what_is_illegal_or_too_large_is_told_and_not_trained() -> None:
    illegal = compared("tp", 3)
    assert illegal.layout is None
    assert illegal.refused.startswith("parallelism.tensor=3: ")
    doomed = compared("dp", 4, "hardware.memory_bytes=20e6")
    assert doomed.plan is not None
    assert "too much" in doomed.refused
    assert not compared("tp", 4, "hardware.memory_bytes=20e6").refused


def test_one_rank_has_a_core_as_each_of_many_has() -> None:
    run = run_of("hardware=cpu", "parallelism=single")
    measured = [MeasuredRates(ranks, stream=1.0, operation_s=1.0) for ranks in (1, 2, 4)]
    run.hardware = replace(run.hardware, measured=measured)
    alone = in_layout(run, {}, CORES)
    assert [rates.ranks for rates in alone.hardware.measured] == [2, 4]


def test_losses_that_differ_are_found() -> None:
    first = row("single", 5.0, 4.0)
    assert differing([first, row("dp", 5.0001, 4.0)]) == {}
    assert differing([first, row("dp", 5.0, 4.01)]) == {"dp": pytest.approx(0.0025)}
    assert list(differing([first, row("tp", float("nan"), 4.0)])) == ["tp"]
    assert list(differing([first, row("tp", 5.0, float("nan"))])) == ["tp"]
    assert list(differing([row("single", 5.0, float("nan")), row("dp", 5.0, 4.0)])) == ["dp"]


def test_options_of_the_parallelism_group_are_kept() -> None:
    options = {
        "offload_optimizer": True, "offload_parameters": True, "vocabulary_multiple": 64,
        "context_method": ContextMethod.ulysses,
    }  # fmt: skip
    run = run_of("hardware=cpu", "parallelism=single")
    run.parallelism = replace(
        run.parallelism, **options, sequence_parallel=True, pipeline_schedule=PipelineSchedule.dualpipev
    )
    for name, sizes in named_layouts(4).items():
        kept = in_layout(run, sizes, CORES).parallelism
        assert {option: getattr(kept, option) for option in options} == options
        assert kept.sequence_parallel == (kept.tensor > 1)
        assert (kept.pipeline_schedule is PipelineSchedule.dualpipev) == (kept.pipeline > 1)
        assert name != "zero3" or (kept.data, kept.zero_stage) == (4, 3)


def test_a_layout_for_which_an_option_is_illegal_is_refused_alone() -> None:
    assert compared("dp", 4, "parallelism.offload_optimizer=true").refused.startswith(
        "parallelism.offload_optimizer=true: ZeRO-0 has no partitioned optimizer"
    )
    assert not compared("zero1", 4, "parallelism.offload_optimizer=true").refused


@pytest.mark.parametrize(
    ("names", "typed", "field", "remedy"),
    [
        (["single", "dp", "tp"], ["optimizer.momentum=0.9"], "optimizer.momentum", "optimizer=sgd or "),
        (["dp", "tp"], ["optimizer.momentum=0.9"], "optimizer.momentum", "optimizer=sgd or "),
        (["tp"], ["model.num_heads=2"], "compare.layouts", "compare.layouts=[single]"),
        (["dp", "tp"], ["hardware.memory_bytes=1e3"], "compare.layouts", "hardware.memory_bytes=null"),
    ],
)
def test_if_all_layouts_are_refused_the_remedy_works(
    names: list[str], typed: list[str], field: str, remedy: str
) -> None:
    error = refusal_of_all([compared(name, 4, *typed) for name in names])
    assert error.field == field
    assert error.remedy.startswith(remedy)


def test_rows_for_metrics_and_machines() -> None:
    rows = [
        row("single", 5.0, 4.0),
        row("dp", 5.0, 4.0),
        ComparisonRow(compared("tp"), failed="rank 1 failed"),
    ]
    first, last = metric_rows(rows)
    assert first == {"step": 1, "loss/single": 5.0, "loss/dp": 5.0}
    assert last["step_time_s/dp"] == 1.5
    assert last["tokens_per_s/dp"] == pytest.approx(16 * 128 / 1.5)
    assert last["planned_memory_bytes/tp"] < last["planned_memory_bytes/single"]
    told = as_json(rows)
    assert [one["failed"] for one in told] == [None, None, "rank 1 failed"]
    assert told[2]["measured"] is None
    assert told[1]["planned"]["sent"]["data"] > 0
    assert metric_rows([rows[2]]) == []


SPEEDS = [
    "hardware.peak_flops.fp32=1e11", "hardware.memory_bandwidth_gb_s=10",
    "hardware.bandwidth_intra_node_gb_s=1",
]  # fmt: skip


@pytest.mark.parametrize("name", ["tp", "pp", "dp_pp"])
def test_plans_with_known_speeds_have_every_part_that_is_measured(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    planned_row = ComparisonRow(compared(name, 4, *SPEEDS))
    assert planned_row.planned_parts.keys() == set(STEP_PARTS)
    plan = planned_row.compared.plan
    assert plan is not None
    assert plan.time is not None
    assert sum(planned_row.planned_parts.values()) == pytest.approx(plan.time.total)
    print_comparison([planned_row])
    assert f"({bubble(planned_row.planned_parts):.0%})" in capsys.readouterr().out


def test_expert_parallelism_is_a_layout_if_ranks_and_experts_have_a_common_divisor() -> None:
    assert named_layouts(8, 4)["ep"] == {"data": 8, "expert": 4}
    assert named_layouts(4, 16)["ep"] == {"data": 4, "expert": 4}
    assert "ep" not in named_layouts(4)
    assert "ep" not in named_layouts(3, 16)
    assert list(chosen_layouts(["dp", "ep"], 2, 16)) == ["dp", "ep"]
    with pytest.raises(ConfigError, match=r"compare.layouts=ep: unknown layout"):
        chosen_layouts(["ep"], 2)


def test_groups_of_experts_are_shown_beside_a_layout_that_has_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = run_of("hardware=cpu", "parallelism=single", "model=moe_tiny", *SPEEDS)
    dp, ep = (
        ComparisonRow(planned(name, in_layout(run, named_layouts(4, 16)[name], CORES), CORES))
        for name in ("dp", "ep")
    )
    assert shown_groups([dp]) == [group for group in GROUPS if group not in EXPERT_GROUPS]
    assert shown_groups([dp, ep]) == list(GROUPS)
    assert shown_parts([dp, ep]) == list(STEP_PARTS)
    assert ep.planned_sent["expert"] > 0
    assert ep.planned_parts["expert"] > dp.planned_parts["expert"] == 0
    assert ep.planned_sent["data"] < dp.planned_sent["data"]
    assert ep.planned_memory is not None
    assert dp.planned_memory is not None
    assert ep.planned_memory < dp.planned_memory
    [told] = [one for one in as_json([dp, ep]) if one["layout"] == "ep"]
    assert told["resolved"]["expert"] == 4
    print_comparison([dp, ep])
    shown = capsys.readouterr().out
    assert "expert" in shown
    print_comparison([dp])
    assert "expert" not in capsys.readouterr().out


def test_the_bubble_is_a_share_of_the_step_as_in_a_plan() -> None:
    assert bubble(PARTS) == pytest.approx(1 / 3)


def test_records_of_ranks_are_combined() -> None:
    layout = compared("tp").layout
    assert layout is not None
    slow = RankRecord([5.0], [2.0, 4.0, 3.0], [PARTS, PARTS], 10, [("tensor", "all_reduce", 100, 2)])
    quick = RankRecord([5.0], [1.0], [{**PARTS, "compute": 0.5}], 20, [("tensor", "all_reduce", 100, 4)])
    found = combined(layout, [slow, quick])
    assert (found.seconds, found.memory, found.parts["compute"]) == (3.0, 20, 1.0)
    assert found.sent == {"tensor": 4 * 2 * 100 * 3 / 4, "context": 0.0, "data": 0.0, "pipeline": 0.0}
