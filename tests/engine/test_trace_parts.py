"""The parts of a step, from traces that are made up: each instant belongs to one part."""

from typing import Any

import pytest

from launcher.engine import trace_parts
from launcher.engine.trace_parts import (
    ATTENTION,
    COLLECTIVE,
    COPIES,
    ELEMENTWISE,
    GROUPS,
    MATMUL,
    OPTIMIZER,
    STEP,
    UPDATE,
    Overlap,
    StepParts,
    collective_name,
    kind_of_kernel,
    kind_of_operator,
    parts_of_trace,
)

MAIN, GLOO, STREAM, COMMUNICATION = (1, 10), (1, 11), (0, 7), (0, 13)  # process and thread, or GPU and stream


def event(
    name: str, start: float, end: float, lane: tuple[int, int] = MAIN, category: str = "cpu_op", **args: Any
) -> dict[str, Any]:
    """Return an event from `start` to `end` in seconds; a Chrome trace counts microseconds."""
    pid, tid = lane
    times = {"ts": start * 1e6, "dur": (end - start) * 1e6}
    return {"ph": "X", "cat": category, "name": name, "pid": pid, "tid": tid, "args": args, **times}


def mark(name: str, start: float, end: float, lane: tuple[int, int] = MAIN) -> dict[str, Any]:
    return event(name, start, end, lane, "user_annotation")


def kernel(
    name: str, start: float, end: float, lane: tuple[int, int] = STREAM, **args: Any
) -> dict[str, Any]:
    return event(name, start, end, lane, "kernel", **args)


def parts(*events: dict[str, Any], **extra: Any) -> StepParts:
    found = parts_of_trace({"traceEvents": [{"ph": "M", "name": "process_name"}, *events], **extra})
    exposed = sum(overlap.exposed for overlap in found.collectives.values())
    assert sum(found.work.values()) + exposed + found.idle == pytest.approx(found.seconds)
    return found


def work(found: StepParts) -> dict[str, float]:
    return {kind: pytest.approx(seconds) for kind, seconds in found.work.items() if seconds}


def test_an_operator_is_counted_once_with_the_operators_inside_it() -> None:
    found = parts(
        mark(f"{STEP}6", 0, 10),
        event("aten::linear", 1, 4),
        event("aten::copy_", 2, 3),  # inside the product
        event("aten::addmm", 3, 4),
        event("autograd::engine::evaluate_function: AddmmBackward0", 5, 9),
        event("AddmmBackward0", 5, 9),
        event("aten::mm", 6, 7),
        event("aten::clone", 7, 8),
    )
    assert found.steps == 1
    assert found.seconds == pytest.approx(10)
    assert work(found) == {MATMUL: 4, COPIES: 1}
    assert found.idle == pytest.approx(5)  # also autograd's own time between operators


def test_seconds_are_the_mean_of_the_steps_without_the_time_between_them() -> None:
    found = parts(
        mark(f"{STEP}6", 0, 4),
        event("aten::add", 1, 3),
        event("aten::mm", 5, 9),  # a validation between the steps
        mark(f"{STEP}7", 10, 16),
        event("aten::add", 10, 16),
    )
    assert (found.steps, found.seconds, found.idle) == (2, pytest.approx(5), pytest.approx(1))
    assert work(found) == {ELEMENTWISE: 4}


def test_all_work_of_the_optimizer_step_is_the_optimizers() -> None:
    found = parts(
        mark(f"{STEP}6", 0, 10),
        mark(OPTIMIZER, 1, 9),
        event("aten::mm", 2, 3),
        mark("Optimizer.step#AdamW.step", 4, 6),
        event("aten::add_", 4, 6),
        mark(f"{COLLECTIVE}all_gather (data)", 7, 8),
        event("c10d::_allgather_base_", 7, 7.5),
    )
    assert work(found) == {UPDATE: 3}
    assert found.collectives == {"all_gather (data)": Overlap(pytest.approx(1), 0)}
    assert found.idle == pytest.approx(6)


def test_a_collective_is_hidden_beside_work_and_exposed_without() -> None:
    label = "all_reduce (tensor)"
    found = parts(
        mark(f"{STEP}6", 0, 10),
        mark(f"{COLLECTIVE}{label}", 0, 1),  # the call
        event("c10d::allreduce_", 0, 1),
        mark("gloo:all_reduce", 0.5, 6, GLOO),
        event("aten::copy_", 5, 6, GLOO),  # gloo's own copy is no work of the step
        event("aten::mm", 1, 4),
        mark(f"{COLLECTIVE}{label}", 4, 7),  # the wait, a little longer than the transfer
    )
    assert work(found) == {MATMUL: 3}
    assert found.collectives == {label: Overlap(exposed=pytest.approx(4), hidden=pytest.approx(3))}
    assert found.idle == pytest.approx(3)


def test_gloos_transfers_have_the_names_of_their_calls() -> None:
    """gloo runs a reduce-scatter as an all-reduce; a send may end after the next receive has begun."""
    found = parts(
        mark(f"{STEP}6", 0, 20),
        mark(f"{COLLECTIVE}reduce_scatter (data)", 0, 1),
        event("c10d::_reduce_scatter_base_", 0, 1),
        mark("gloo:all_reduce", 1, 3, GLOO),
        mark(f"{COLLECTIVE}send (pipeline)", 4, 5),
        event("c10d::send", 4, 5),
        mark("gloo:send", 5, 7),
        mark(f"{COLLECTIVE}recv (pipeline)", 8, 9),
        event("c10d::recv_", 8, 9),
        mark("gloo:recv", 6, 10),
    )
    exposed = {name: overlap.exposed for name, overlap in found.collectives.items()}
    # From 6 to 7 both run, and one of them gets the time.
    assert exposed == {
        "reduce_scatter (data)": pytest.approx(3),
        "send (pipeline)": pytest.approx(2),
        "recv (pipeline)": pytest.approx(4),
    }


def test_a_transfer_without_its_call_keeps_the_name_of_gloo() -> None:
    found = parts(mark(f"{STEP}6", 0, 4), mark("gloo:all_reduce", 1, 3, GLOO))
    assert found.collectives == {"all_reduce": Overlap(exposed=pytest.approx(2))}


def test_a_compiled_region_is_elementwise_work_around_its_products() -> None:
    found = parts(
        mark(f"{STEP}6", 0, 10),
        event("Torch-Compiled Region: 0/0", 1, 8),
        event("aten::mm", 2, 4),
        mark(f"{COLLECTIVE}all_reduce (tensor)", 5, 7),
        event("c10d::allreduce_", 5, 6),
    )
    assert work(found) == {ELEMENTWISE: 3, MATMUL: 2}
    assert found.collectives["all_reduce (tensor)"].exposed == pytest.approx(2)


def test_work_of_other_threads_is_not_the_steps() -> None:
    found = parts(mark(f"{STEP}6", 0, 4), event("aten::copy_", 1, 3, (1, 12)))
    assert found.idle == pytest.approx(4)


def test_on_a_gpu_kernels_count_and_operators_do_not() -> None:
    update = event(OPTIMIZER, 6, 8, STREAM, "gpu_user_annotation")
    found = parts(
        mark(f"{STEP}6", 0, 10),
        event("aten::mm", 0, 9),
        kernel("sm90_xmma_gemm_bf16bf16_bf16f32", 1, 3),
        kernel("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 2, 5, COMMUNICATION, **{
            "Collective name": "allreduce", "Process Group Name": "3",
        }),
        update,
        kernel("elementwise_kernel", 6, 7),
        event("Memcpy HtoD (Pinned -> Device)", 8, 9, STREAM, "gpu_memcpy"),
        **{GROUPS: {"3": "data"}},
    )  # fmt: skip
    assert work(found) == {MATMUL: 2, UPDATE: 1, COPIES: 1}
    assert found.collectives == {"all_reduce (data)": Overlap(pytest.approx(2), pytest.approx(1))}
    assert found.idle == pytest.approx(4)


def test_kernels_that_run_at_once_count_once() -> None:
    found = parts(
        mark(f"{STEP}6", 0, 4), kernel("elementwise_kernel", 0, 3), kernel("nvjet_tst_128x256", 1, 2, (0, 8))
    )
    assert work(found) == {ELEMENTWISE: 2, MATMUL: 1}


def test_kinds_of_operators_and_kernels() -> None:
    operators = {
        "aten::linear": MATMUL, "aten::bmm": MATMUL, "mkldnn::_linear_pointwise": MATMUL,
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward": ATTENTION, "aten::_to_copy": COPIES,
        "aten::cat": COPIES, "aten::native_layer_norm": ELEMENTWISE, "aten::gelu": ELEMENTWISE,
    }  # fmt: skip
    kernels = {
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16>": MATMUL, "nvjet_tst_192x192_64x4": MATMUL,
        "void pytorch_flash::flash_fwd_kernel": ATTENTION, "cudnn_generated_fort_native_sdpa_sm90": ATTENTION,
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>": UPDATE,
        "triton_poi_fused__to_copy_add_3": ELEMENTWISE, "triton_tem_fused_mm_5": MATMUL,
        "void at::native::direct_copy_kernel_cuda": COPIES, "Memset (Device)": COPIES,
        "void at::native::vectorized_layer_norm_kernel": ELEMENTWISE,
    }  # fmt: skip
    assert {name: kind_of_operator(name) for name in operators} == operators
    assert {name: kind_of_kernel(name) for name in kernels} == kernels


def test_a_collective_has_one_name_in_every_library() -> None:
    names = ["all_reduce", "c10d::allreduce_", "gloo:all_reduce", "allreduce", "AllReduce"]
    assert {collective_name(name) for name in names} == {"all_reduce"}
    gathers = ["all_gather_into_tensor", "c10d::_allgather_base_", "_allgather_base", "AllGather"]
    assert {collective_name(name, "data") for name in gathers} == {"all_gather (data)"}
    assert collective_name("batch_isend_irecv") == collective_name("SendRecv") == "send and recv"


def test_the_sum_of_the_parts_notices_a_part_that_counts_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    give = trace_parts._give

    def twice(found: StepParts, active: Any, seconds: float) -> None:
        give(found, active, seconds)
        found.idle += seconds

    monkeypatch.setattr(trace_parts, "_give", twice)
    with pytest.raises(AssertionError):
        parts(mark(f"{STEP}6", 0, 4), event("aten::mm", 1, 3))
