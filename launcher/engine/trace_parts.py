"""Divide the time of profiled steps by kind of work, from the events of a Chrome trace. Pure.

Every instant of a step belongs to exactly one part, so that the parts add up to the step's wall time:

- to the kind of work that runs at that instant, whatever is sent meanwhile;
- else to the collective that is waited for or runs: its exposed time;
- else to idle.

Hidden time of a collective is the time in which it runs beside work. On CPU, work is the outermost operator
of the thread that takes the step; on a GPU, the kernels and copies of all streams.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# Names that engine/profiler_trace.py gives to stretches of the trace, and its key for the names of groups.
STEP, OPTIMIZER, COLLECTIVE = "launcher step ", "launcher optimizer", "launcher collective "
GROUPS = "launcherGroups"

MATMUL, ATTENTION, UPDATE = "matrix products", "attention", "optimizer"
ELEMENTWISE, COPIES = "norms, elementwise and other", "copies"
# If several kinds run at once, as on several streams, the first one gets the time.
KINDS = (MATMUL, ATTENTION, UPDATE, ELEMENTWISE, COPIES)

TraceEvent = Mapping[str, Any]  # of a Chrome trace: name, cat, ph, ts and dur in microseconds, pid, tid, args

_MATMULS = set(
    "linear linear_backward matmul mm addmm bmm baddbmm addbmm mv addmv dot einsum convolution conv1d conv2d "
    "convolution_backward _linear_pointwise _mkl_linear _scaled_mm _grouped_mm".split()
)
_COPIES = set(
    "to _to_copy copy_ clone contiguous reshape flatten cat concat stack repeat pad pin_memory "
    "_foreach_copy_ _pin_memory".split()
)
_ATTENTION_WORDS = ("scaled_dot_product", "flash", "efficient_attention", "fmha", "sdpa")
_MATMUL_WORDS = ("gemm", "gemv", "cutlass", "cublas", "xmma", "nvjet", "wgmma", "triton_tem", "conv2d")
_COPY_WORDS = ("memcpy", "memset", "copy", "catarray")
_UPDATE_WORDS = ("multi_tensor_apply", "adam")
_COMPILED = ("Torch-Compiled Region", "CompiledFunction", "## Call CompiledFxGraph")
_NO_OPERATOR = ("autograd::", "torch::autograd::", "c10d::", "profiler::")

# One name for each collective, whether torch.distributed, c10d, gloo or NCCL names it.
_COLLECTIVE_NAMES = {
    "allreduce": "all_reduce", "allreduce_coalesced": "all_reduce", "all_reduce_coalesced": "all_reduce",
    "allgather": "all_gather", "allgather_base": "all_gather",
    "all_gather_into_tensor": "all_gather", "reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter", "reducescatter": "reduce_scatter",
    "batch_isend_irecv": "send and recv", "sendrecv": "send and recv", "alltoall": "all_to_all",
    "alltoall_base": "all_to_all", "all_to_all_single": "all_to_all",
}  # fmt: skip


class Span(NamedTuple):
    """A stretch of time in microseconds and what happens in it: a kind of work, or a collective."""

    start: float
    end: float
    name: str


@dataclass
class Overlap:
    """Seconds of a collective per step: alone, and beside work."""

    exposed: float = 0.0
    hidden: float = 0.0


@dataclass
class StepParts:
    """Mean seconds of a step by part. `work`, the exposed times and `idle` add up to `seconds`."""

    steps: int
    seconds: float = 0.0
    work: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    collectives: dict[str, Overlap] = field(default_factory=dict)
    idle: float = 0.0


@dataclass
class _Spans:
    """Intervals of a trace. In `waited` the thread of the step does nothing but wait for a collective."""

    windows: list[Span]
    work: list[Span] = field(default_factory=list)
    waited: list[Span] = field(default_factory=list)
    running: list[Span] = field(default_factory=list)


def parts_of_trace(trace: Mapping[str, Any]) -> StepParts:
    """Return the parts of the steps that a Chrome trace of profiler_trace.py contains."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    windows = [_span(event, event["name"]) for event in _annotations(events, STEP)]
    spans = _Spans(windows)
    if any(event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") for event in events):
        _add_device(spans, events, trace.get(GROUPS, {}))
    else:
        _add_host(spans, events)
    return _parts(spans)


def kind_of_operator(name: str) -> str:
    """Return the kind of work of a CPU operator, such as aten::addmm."""
    base = name.rpartition("::")[2]
    if base in _MATMULS:
        return MATMUL
    if any(word in base for word in _ATTENTION_WORDS):
        return ATTENTION
    return COPIES if base in _COPIES else ELEMENTWISE


def kind_of_kernel(name: str) -> str:
    """Return the kind of work of a GPU kernel, or of a copy, by its name."""
    lower = name.lower()
    if any(word in lower for word in _ATTENTION_WORDS):
        return ATTENTION
    if any(word in lower for word in _MATMUL_WORDS):
        return MATMUL
    if lower.startswith("triton_"):  # a fused kernel names everything that it does, casts and copies too
        return ELEMENTWISE
    if any(word in lower for word in _UPDATE_WORDS):
        return UPDATE
    return COPIES if any(word in lower for word in _COPY_WORDS) else ELEMENTWISE


def collective_name(name: str, group: str | None = None) -> str:
    """Return the name of a collective in the table: `all_reduce (data)`."""
    plain = name.rpartition(":")[2].strip("_").lower()
    common = _COLLECTIVE_NAMES.get(plain, plain)
    return f"{common} ({group})" if group else common


def _add_device(spans: _Spans, events: Iterable[TraceEvent], groups: Mapping[str, str]) -> None:
    """Add the kernels and copies of a GPU."""
    updates: dict[tuple[Any, Any], list[Span]] = {}
    for event in events:
        if event.get("cat") == "gpu_user_annotation" and _is_update(event["name"]):
            updates.setdefault(_lane(event), []).append(_span(event, UPDATE))
    for lane in updates.values():
        lane.sort()
    for event in events:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        if "nccl" in event["name"].lower():
            spans.running.append(_span(event, _nccl_name(event, groups)))
        elif _is_within(event["ts"], updates.get(_lane(event), [])):
            spans.work.append(_span(event, UPDATE))
        else:
            spans.work.append(_span(event, kind_of_kernel(event["name"])))


def _nccl_name(event: TraceEvent, groups: Mapping[str, str]) -> str:
    """Return the name of the collective of a kernel such as ncclDevKernel_AllReduce_Sum_f32_RING_LL."""
    arguments = event.get("args", {})
    group = arguments.get("Process Group Name")
    kernel = event["name"].partition("Kernel_")[2].partition("_")[0] or event["name"]
    return collective_name(arguments.get("Collective name") or kernel, groups.get(str(group)))


def _add_host(spans: _Spans, events: Sequence[TraceEvent]) -> None:
    """Add the operators of the thread that takes the steps, and the collectives of gloo's threads."""
    lanes = {_lane(event) for event in _annotations(events, STEP)}
    issued: list[Span] = []
    for lane in lanes:
        nested = (e for e in events if _lane(e) == lane and not _is_gloo(e))
        for span, is_collective in _innermost(nested, issued):
            (spans.waited if is_collective else spans.work).append(span)
    transfers = sorted((e for e in events if _is_gloo(e)), key=lambda event: float(event["ts"]))
    for is_between_two in (True, False):
        chosen = [e for e in transfers if _is_send(e["name"]) is is_between_two]
        calls = [call for call in sorted(issued) if _is_send(call.name) is is_between_two]
        # gloo takes up collectives in the order of their calls, and runs a reduce-scatter as an all-reduce.
        names = [call.name for call in calls] if len(calls) == len(chosen) else [e["name"] for e in chosen]
        spans.running += [
            _span(event, collective_name(name)) for event, name in zip(chosen, names, strict=True)
        ]


class _Frame(NamedTuple):
    """An event that encloses others of its thread."""

    end: float
    name: str | None = None  # the kind of work or the collective; None: neither
    is_collective: bool = False
    is_settled: bool = False  # whether the events inside count as this event
    is_update: bool = False  # inside the optimizer's step


def _innermost(events: Iterable[TraceEvent], issued: list[Span]) -> Iterator[tuple[Span, bool]]:
    """Yield the stretches of a thread that are work or a collective; append calls of c10d to `issued`."""
    stack = [_Frame(float("inf"))]
    now = float("-inf")
    closing: TraceEvent = {"ts": float("inf"), "dur": 0.0, "name": ""}
    for event in [*sorted(events, key=lambda e: (e["ts"], -e["dur"])), closing]:
        while stack and stack[-1].end <= event["ts"]:
            frame = stack.pop()
            if frame.name is not None and frame.end > now:
                yield Span(now, frame.end, frame.name), frame.is_collective
            now = max(now, frame.end)
        if not stack:
            return
        parent = stack[-1]
        if event["name"].startswith("c10d::"):
            named = parent.name if parent.is_collective else None
            issued.append(_span(event, named or event["name"]))
        if parent.is_settled:
            continue
        if parent.name is not None and event["ts"] > now:
            yield Span(now, event["ts"], parent.name), parent.is_collective
        now = event["ts"]
        stack.append(_frame(event, parent))


def _frame(event: TraceEvent, parent: _Frame) -> _Frame:
    """Return the frame of an event inside a parent that is not settled."""
    name: str = event["name"]
    inside = parent._replace(end=min(float(event["ts"]) + float(event["dur"]), parent.end))
    if name.startswith(COLLECTIVE):
        return inside._replace(name=name.removeprefix(COLLECTIVE), is_collective=True, is_settled=True)
    if name.startswith("c10d::"):
        return inside._replace(name=collective_name(name), is_collective=True, is_settled=True)
    if _is_update(name):
        return inside._replace(is_update=True)
    if name.startswith(_COMPILED):  # its fused loops are no operators of their own
        return inside._replace(name=ELEMENTWISE)
    if "::" in name and not name.startswith(_NO_OPERATOR):
        kind = UPDATE if parent.is_update else kind_of_operator(name)
        return inside._replace(name=kind, is_settled=True)
    return inside


def _parts(spans: _Spans) -> StepParts:
    """Sweep over the time of the steps and give every stretch to one part."""
    parts = StepParts(steps=len(spans.windows))
    active: dict[str, Counter[str]] = {name: Counter() for name in ("windows", "work", "waited", "running")}
    changes = sorted(
        (moment, step, place, span.name)
        for place in active
        for span in getattr(spans, place)
        for moment, step in ((span.start, 1), (span.end, -1))
    )
    before = 0.0
    for moment, step, place, name in changes:
        if moment > before and +active["windows"]:
            _give(parts, active, (moment - before) / 1e6 / parts.steps)
        before = moment
        active[place][name] += step
    return parts


def _give(parts: StepParts, active: Mapping[str, Counter[str]], seconds: float) -> None:
    parts.seconds += seconds
    work = next((kind for kind in KINDS if active["work"][kind] > 0), None)
    waited, running = sorted(+active["waited"]), sorted(+active["running"])
    if work is None:
        if collectives := waited or running:
            parts.collectives.setdefault(collectives[0], Overlap()).exposed += seconds
        else:
            parts.idle += seconds
        return
    parts.work[work] += seconds
    for name in running:
        parts.collectives.setdefault(name, Overlap()).hidden += seconds


def _annotations(events: Iterable[TraceEvent], prefix: str) -> Iterator[TraceEvent]:
    return (e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith(prefix))


def _is_update(name: str) -> bool:
    return name == OPTIMIZER or name.startswith("Optimizer.step#")  # the latter is torch's own


def _is_gloo(event: TraceEvent) -> bool:
    return str(event["name"]).startswith("gloo:")


def _is_send(name: str) -> bool:
    return "send" in name or "recv" in name


def _is_within(moment: float, spans: Sequence[Span]) -> bool:
    """Return whether one of the sorted spans, which do not overlap, contains the moment."""
    index = bisect_right(spans, moment, key=lambda span: span.start) - 1
    return index >= 0 and moment < spans[index].end


def _lane(event: TraceEvent) -> tuple[Any, Any]:
    return event.get("pid"), event.get("tid")


def _span(event: TraceEvent, name: str) -> Span:
    return Span(float(event["ts"]), float(event["ts"]) + float(event["dur"]), name)
