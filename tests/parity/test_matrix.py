"""Every legal combination is the same run; every other is refused, for a reason that holds."""

import pytest

from launcher.config.errors import ConfigError
from launcher.config.layout import Layout
from launcher.config.schema import Dtype
from launcher.config.validate import validate
from launcher.config.world import World
from tests.config.composing import run_of
from tests.parity.matrix import (
    COMBINATIONS,
    LEGAL,
    RANKS,
    Combination,
    covering,
    outcome,
    run_of_combination,
    variation,
)
from tests.parity.running import (
    PipelineModule,
    StagedModule,
    passes,
    plain_sgd_pass,
    run_pass,
    shrink,
    small_run,
    worst,
)

QUICK_RANKS = 4
QUICK = covering([c for c in LEGAL if c.ranks <= QUICK_RANKS], 8)


def verify_combination(combination: Combination, *, quick: bool, seed: int = 1234) -> None:
    run = run_of_combination(combination, "verify.steps=2", f"training.seed={seed}")
    small, _ = shrink(run, validate(run, World("cpu", RANKS, RANKS)))
    # The first pass in the run's own precision compares every gradient, the last of all is the run itself.
    every = passes(small)
    first = next(p for p in every if p.run.precision.dtype is run.precision.dtype)
    wanted = [first] if quick else [every[0], every[-1]]
    for title, each, plain_sgd in wanted:
        found = run_pass(title, each, plain_sgd)
        assert found.ok, (title, variation(combination), found.diagnosis, worst(found))


@pytest.mark.parametrize("combination", QUICK, ids=str)
def test_a_covering_selection_is_the_same_run(combination: Combination) -> None:
    verify_combination(combination, quick=True)


def test_without_clipping_layouts_compute_the_same_run() -> None:
    small = small_run("model=gpt_tiny", "parallelism.data=2", "optimizer.gradient_clipping=null")
    found = plain_sgd_pass(small)
    assert found.ok, (found.diagnosis, worst(found))


@pytest.mark.slow
@pytest.mark.parametrize("combination", LEGAL, ids=str)
def test_every_legal_combination_is_the_same_run(combination: Combination) -> None:
    verify_combination(combination, quick=False)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_no_seed_raises_a_false_alarm(seed: int) -> None:
    for combination in QUICK:
        verify_combination(combination, quick=True, seed=seed)


def test_the_selection_has_every_setting_that_four_ranks_can_have() -> None:
    def settings(combinations: list[Combination]) -> set[str]:
        return {setting for c in combinations for setting in [*c.overrides, *variation(c)]}

    assert settings(QUICK) == settings([c for c in LEGAL if c.ranks <= QUICK_RANKS])


@pytest.mark.slow
def test_variations_do_not_depend_on_each_other() -> None:
    runs = [run_of_combination(c) for c in LEGAL]
    for bf16 in (False, True):
        for sequence_parallel in (False, True):
            for offload in (False, True):
                assert any(
                    (r.precision.dtype is Dtype.bf16) is bf16
                    and r.parallelism.sequence_parallel is sequence_parallel
                    and r.parallelism.offload_optimizer is offload
                    for r in runs
                )


def test_variations_are_legal_where_the_combination_is() -> None:
    for combination in LEGAL:
        validate(run_of_combination(combination), World("cpu", RANKS, RANKS))


def why_illegal(c: Combination) -> list[str]:
    """Independently of the rules: what must stand in the refusal, one of these."""
    return [
        words
        for holds, words in (
            (c.pipeline > 1 and c.zero_stage > 1, "ZeRO-0 and ZeRO-1 only"),
            (c.schedule == "dualpipev" and c.pipeline == 1, "needs parallelism.pipeline of 2 or more"),
            (c.sequence_parallel and c.tensor == 1, "sequence parallelism needs parallelism.tensor of 2"),
            (c.ranks > RANKS, f"more than the {RANKS}"),
        )
        if holds
    ]


def test_runs_are_those_that_the_overrides_compose() -> None:
    for combination in (LEGAL[1], LEGAL[-1]):
        assert combination.run == run_of("model=gpt_tiny", *combination.overrides)


def test_legal_or_refused_with_its_reason(subtests: pytest.Subtests) -> None:
    for combination in COMBINATIONS:
        with subtests.test(str(combination)):
            found, reasons = outcome(combination), why_illegal(combination)
            if not reasons:
                assert isinstance(found, Layout)
                assert found.world_size == combination.ranks
            else:
                assert isinstance(found, ConfigError)
                assert any(words in found.why for words in reasons)
                assert found.remedy


@pytest.mark.parametrize("fault", [False, True])
def test_tied_weights_under_a_pipeline_with_offload_in_bf16(fault: bool) -> None:
    """DeepSpeed leaves their gradients unsummed (engine/pipeline.py, StagedModule)."""

    def without_the_workaround() -> None:
        StagedModule.get_tied_weights_and_groups = PipelineModule.get_tied_weights_and_groups  # type: ignore[method-assign]

    layout = ["parallelism=pp2", "parallelism.data=1", "parallelism.offload_optimizer=true"]
    small = small_run("model=gpt_tiny", "precision=bf16", *layout, steps=1)
    [bf16] = [p for p in passes(small) if p.run.precision.dtype is Dtype.bf16]
    found = run_pass(*bf16, without_the_workaround if fault else None)
    assert found.ok is not fault, (found.diagnosis, worst(found))
    assert not fault or "embedding.weight: the copies of this tied weight" in str(found.diagnosis)


@pytest.mark.slow
def test_tied_copies_may_differ_by_the_order_of_sums_over_data_ranks() -> None:
    """Four data ranks in bf16: stages round the tied weight's gradient differently in a few elements."""
    layout = ["parallelism=pp2", "parallelism.data=4", "parallelism.offload_optimizer=true"]
    small = small_run("model=gpt_tiny", "precision=bf16", "training.micro_batch_size=1", *layout, steps=1)
    [bf16] = [p for p in passes(small) if p.run.precision.dtype is Dtype.bf16]
    found = run_pass(*bf16)
    assert found.ok, (found.diagnosis, worst(found))
    [copy] = [d for d in found.differences if d.kind == "tied_copy" and d.step == 1]
    assert copy.measured > 0
