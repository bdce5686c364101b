"""Compare the planner's formulas with a trace of the real modules, for `launcher plan plan.trace=true`."""

import warnings
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.planning.cost.geometry import Rank, pipeline_ranks
from launcher.planning.cost.operations import BOOL, Collective
from launcher.planning.cost.parts import flops, of_context, parts, traffic
from launcher.planning.cost.run_plan import Plan
from launcher.planning.cost.sizes import Sizes
from launcher.tracing.stage_trace import StageTrace, trace_stage


@dataclass(frozen=True)
class FormulaCheck:
    """A quantity of one micro-batch in one stage on one rank, by formula and by trace. Bytes or counts."""

    stage: int
    quantity: str
    formula: int
    traced: int

    @property
    def error(self) -> float:
        return self.formula / self.traced - 1 if self.traced else float(self.formula != 0)


def compare_with_trace(plan: Plan) -> list[dict[str, Any]]:
    """Check the first, the second and the last pipeline rank; the ranks between are like the second."""
    ranks = pipeline_ranks(plan.run, plan.layout)
    chosen = sorted({0, min(1, len(ranks) - 1), len(ranks) - 1})
    return [
        {**asdict(check), "error": check.error}
        for rank in chosen
        for chunk in range(len(ranks[rank].chunks))
        for check in compare_stage(plan.run, plan.layout, ranks[rank], chunk)
    ]


def compare_stage(run: RunConfig, layout: Layout, rank: Rank, chunk: int) -> list[FormulaCheck]:
    with warnings.catch_warnings():
        # torch 2.13 warns at every all_gather_into_tensor and reduce_scatter_tensor that it is deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        traced = trace_stage(run, layout, rank, chunk)
    expected = expect(run, layout, rank, chunk)
    names = ("parameters", "flops", "saved", "peak")
    checks = [
        FormulaCheck(rank.stage, name, getattr(expected, name), getattr(traced, name)) for name in names
    ]
    kinds = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")
    for group, kind in product(("tensor", "context"), kinds):
        formula, counted = expected.bytes_by(kind, group), traced.bytes_by(kind, group)
        if formula or counted:
            checks.append(FormulaCheck(rank.stage, f"{kind} over the {group} group", formula, counted))
    return checks


def expect(run: RunConfig, layout: Layout, rank: Rank, chunk: int) -> StageTrace:
    """Return by formula the quantities that a trace measures."""
    # The trace runs the modules eagerly, whatever torch.compile makes of them.
    sizes, stage = replace(Sizes.of(run, layout.device), compiled=False), rank.chunks[chunk]
    stage_parts = parts(sizes).of(stage)
    # A stage that is not the last keeps its output until the next stage sends the gradient.
    output = 0 if stage.has_head else sizes.stretch
    is_tied = stage.has_embedding and stage.has_head and run.model.tie_embeddings and rank.trains_whole_model
    tied = sizes.vocabulary * sizes.hidden_size * sizes.element if is_tied else 0
    saved, peaks = sizes.boundaries + sizes.tables, []
    for part, count in stage_parts:
        footprint = part.footprint
        peaks.append(saved + (count - 1) * footprint.saved + footprint.forward)
        saved += footprint.saved * count
        is_last = part is stage_parts[-1][0]
        # The gradient that the next stage sent stays meanwhile; beside adapters the frozen norm frees it.
        stays = is_last and not stage.has_head and rank.trains_whole_model
        ending = footprint.sustained if stays else footprint.backward
        peaks.append(saved + ending + output + (0 if is_last else tied))
    if is_tied:
        embedding = stage_parts[0][0].footprint
        peaks.append(sizes.boundaries + embedding.saved + embedding.backward + 2 * tied)
    one_stage = Rank(rank.stage, (stage,), rank.model, rank.tensor, rank.outputs, rank.is_flat, rank.adapters)
    sent = traffic(stage_parts), of_context(stage_parts)
    if sizes.context > 1 and sizes.masks_documents:
        sent[1][Collective("all_gather", sizes.tokens * sizes.context * BOOL)] += 1
    return StageTrace(one_stage.parameters, flops(stage_parts), saved, max(peaks), *sent)
