"""Measure the kernels and links of a GPU, for `hardware.card`. Tests run the probes on a CPU."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import linear_regression, median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from launcher.calibrate.engine_overhead import rounded
from launcher.calibrate.probes import finish, seconds, stream
from launcher.config.schema import AttentionRate, CardRates, Dtype, PeakFlops, ShapeRates
from launcher.engine.distributed import join, leave
from launcher.engine.watchdog import MEASURING_MINUTES, Watchdog
from launcher.launch.local import run_local_ranks, start_method_for
from launcher.launch.scratch import scratch_directory
from launcher.parallel.dtypes import TORCH_DTYPES
from launcher.planning.cost.operations import BYTES

GIGA = 1e9
CALLS = 20  # of a collective


@dataclass(frozen=True)
class ProbeSizes:
    """Sizes as large models have them, at which a GPU is measured in about a minute."""

    tokens: int = 8192
    few_tokens: int = 1024  # of a small micro-batch
    products: tuple[tuple[int, int], ...] = ((4096, 4096), (8192, 2048), (2048, 8192), (3072, 768))  # (n, k)
    skinny: tuple[tuple[int, int], ...] = ((1280, 8192), (8192, 1024))  # (n, k) of an eighth of a large layer
    head_sizes: tuple[int, ...] = (64, 80, 96, 128)
    lengths: tuple[int, ...] = (512, 2048, 8192)
    heads: int = 16
    parameters: int = 2**27  # of the optimizer
    copied: int = 2**28  # bytes
    messages: tuple[int, ...] = (2**16, 2**22, 2**28)  # bytes


def measure_card(gpus: int) -> tuple[CardRates, int]:
    """Return the rates of the first GPU and of the links between all, and the bytes of its memory."""
    print(f"measuring {gpus} GPUs", flush=True)
    with scratch_directory() as folder:
        target = partial(_rank, ranks=gpus, folder=folder)
        run_local_ranks(target, gpus, log_dir=folder / "logs", start_method=start_method_for("cuda"))
        measured = json.loads((folder / "card.json").read_text())
    return card_of(measured["card"]), measured["memory"]


def card_of(measured: dict[str, Any]) -> CardRates:
    """Return the rates that a rank wrote as JSON."""
    parts = {
        "products": PeakFlops(**measured["products"]),
        "shapes": ShapeRates(**measured["shapes"]),
        "attention": [AttentionRate(**rate) for rate in measured["attention"]],
    }
    return CardRates(**measured | parts)


def _rank(rank: int, *, ranks: int, folder: Path) -> None:
    store = f"file://{folder / 'store'}"
    device = join(
        rank=rank, world_size=ranks, local_rank=rank, device="cuda", init_method=store,
        timeout_minutes=MEASURING_MINUTES,
    )  # fmt: skip
    with Watchdog(folder / "logs", MEASURING_MINUTES) as watchdog:
        watchdog.at("the probes of a GPU")
        # Alone: a GPU that computes beside others may be slowed down by their heat.
        card = card_rates(device) if rank == 0 else CardRates()
        context = bytes_beside_allocator(device)
        dist.barrier()
        watchdog.at("the probe of collectives")
        if ranks > 1:
            card.link_gb_s, card.gather_gb_s, card.hop_s = link_rates(ranks, device, ProbeSizes().messages)
            card.group_bytes = max(0.0, bytes_beside_allocator(device) - context)
        if rank == 0:
            card.context_bytes = context
            memory = torch.cuda.get_device_properties(device).total_memory
            (folder / "card.json").write_text(json.dumps({"card": asdict(card), "memory": memory}))
        leave()


def bytes_beside_allocator(device: torch.device) -> float:
    """Return the bytes of a GPU that are not free and that torch's allocator does not hold.

    After the probes this is the CUDA context with the kernels of its libraries, if no other process uses the
    GPU. The first collective of a group adds NCCL's buffers.
    """
    free, total = torch.cuda.mem_get_info(device)
    return float(total - free - torch.cuda.memory_reserved(device))


def card_rates(device: torch.device, sizes: ProbeSizes | None = None) -> CardRates:
    """Return the rates of a device that computes alone."""
    sizes = sizes or ProbeSizes()
    memory = copy_rate(device, device, sizes.copied)
    is_gpu = device.type == "cuda"
    dtypes = (Dtype.fp32, Dtype.bf16, Dtype.fp16) if is_gpu else (Dtype.fp32, Dtype.bf16)
    shapes = {dtype: shape_rates(device, dtype, sizes) for dtype in dtypes}
    products = {dtype.name: large_rate(rates, dtype, sizes, memory) for dtype, rates in shapes.items()}
    half = half_dtype(device)
    odd = [product_rate(device, half, (sizes.tokens, n + 1, k)) for n, k in sizes.products]
    unaligned = large_rate(odd, half, sizes, memory) / products[half.name]
    return CardRates(
        name=torch.cuda.get_device_name(device) if is_gpu else "CPU",
        measured_on=datetime.now(UTC).date().isoformat(),
        versions=f"torch {torch.__version__}",
        products=PeakFlops(**products),
        shapes=ShapeRates(**{dtype.name: by_name(rates) for dtype, rates in shapes.items()}),
        unaligned=min(1.0, rounded(unaligned)),
        attention=[attention_rate(device, size, sizes) for size in sizes.head_sizes],
        memory_gb_s=rounded(memory / GIGA),
        update_gb_s=rounded(stream(device, sizes.parameters) / GIGA),
        launch_s=launch_seconds(device),
        host_gb_s=rounded(copy_rate(torch.device("cpu"), device, sizes.copied) / 2 / GIGA),
    )


def half_dtype(device: torch.device) -> Dtype:
    """Return the precision of 16 bits that a device trains in: fp16 on a GPU that emulates bf16 (V100, T4).

    There attention in bf16 would run without a fused kernel, and keep all scores.
    """
    emulates = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return Dtype.fp16 if emulates else Dtype.bf16


class ProductRate(NamedTuple):
    """FLOP/s of a product (m, k) x (k, n), with the time to write its result."""

    m: int
    n: int
    k: int
    per_s: float


def by_name(rates: Sequence[ProductRate]) -> dict[str, float]:
    return {f"{rate.m}x{rate.n}x{rate.k}": rate.per_s for rate in rates}


def shape_rates(device: torch.device, dtype: Dtype, sizes: ProbeSizes) -> list[ProductRate]:
    """Return the rates of large products, then of small and skinny ones and of gradients of weights."""
    every = (*sizes.products, *sizes.skinny)
    shapes = [(sizes.tokens, n, k) for n, k in every]
    shapes += [(sizes.few_tokens, n, k) for n, k in every]
    shapes += [(n, k, sizes.tokens) for n, k in every]
    return [product_rate(device, dtype, shape) for shape in shapes]


def product_rate(device: torch.device, dtype: Dtype, shape: tuple[int, int, int]) -> ProductRate:
    """Return the rate of a product (m, k) x (k, n), whose second operand is laid out as a weight (n, k)."""
    m, n, k = shape
    draw = partial(torch.randn, device=device, dtype=TORCH_DTYPES[dtype])
    taken = seconds(partial(F.linear, draw(m, k), draw(n, k)), device)
    return ProductRate(m, n, k, rounded(2 * m * n * k / taken))


def large_rate(rates: Sequence[ProductRate], dtype: Dtype, sizes: ProbeSizes, memory: float) -> float:
    """Return FLOP/s of large products without the time to write their result, as plans count it.

    `rates` begins with the large products; `memory` is bytes per second (planning/cost/rates.py). Pure.
    """
    large = []
    for rate in rates[: len(sizes.products)]:
        flops = 2 * rate.m * rate.n * rate.k
        written, taken = rate.m * rate.n * BYTES[dtype] / memory, flops / rate.per_s
        large.append(flops / max(taken - written, taken / 2))
    return rounded(median(large))


def attention_rate(device: torch.device, head_size: int, sizes: ProbeSizes) -> AttentionRate:
    """Return the rate of fused causal attention, fitted to several lengths with equal numbers of tokens."""
    forward, backward = [], []
    for length in sizes.lengths:
        shape = max(1, max(sizes.lengths) // length), sizes.heads, length, head_size
        dtype = TORCH_DTYPES[half_dtype(device)] if device.type == "cuda" else torch.float32
        q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
        attend = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
        mixed = attend()
        gradient = torch.randn_like(mixed)
        back = partial(torch.autograd.grad, mixed, (q, k, v), gradient, retain_graph=True)
        product = shape[0] * sizes.heads * length**2 * head_size  # FLOPs, of the causal half
        forward.append((length, seconds(attend, device) / (2 * product)))
        backward.append((length, seconds(back, device) / (5 * product)))
    (ahead, ahead_ramp), (behind, behind_ramp) = fitted_ramp(forward), fitted_ramp(backward)
    return AttentionRate(head_size, ahead, ahead_ramp, behind, behind_ramp)


def fitted_ramp(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Return FLOP/s and ramp of (length, seconds of a FLOP): seconds = (1 + ramp / length) / FLOP/s. Pure.

    The rate is that of endless sequences, at most a quarter above the fastest measured one: a slow probe of
    short sequences would put it at any height (1079 TFLOP/s on an H100, whose products reach 780).
    """
    line = linear_regression([1 / length for length, _ in points], [taken for _, taken in points])
    if line.slope < 0:  # noise: longer sequences were not faster
        return rounded(1 / median(taken for _, taken in points)), 0.0
    highest = 1.25 / min(taken for _, taken in points)
    rate = min(1 / line.intercept, highest) if line.intercept > 0 else highest
    ramps = [(taken * rate - 1) * length for length, taken in points]
    return rounded(rate), rounded(max(0.0, median(ramps)))


def copy_rate(source: torch.device, target: torch.device, size: int) -> float:
    """Return bytes per second that a copy reads and writes; copies from the host use pinned memory."""
    x = torch.empty(size, dtype=torch.uint8, device=source, pin_memory=source.type != target.type)
    y = torch.empty(size, dtype=torch.uint8, device=target)
    return 2 * size / seconds(lambda: y.copy_(x, non_blocking=True), target)


def launch_seconds(device: torch.device) -> float:
    """Return the seconds of the host to start an operation."""
    x = torch.ones(1, device=device)
    return rounded(seconds(lambda: x.add_(1), device))


def link_rates(ranks: int, device: torch.device, messages: Sequence[int]) -> tuple[float, float, float]:
    """Return GB/s that a rank sends in all-reduces, GB/s in others, and seconds of a step of an all-reduce.

    The second rate is that of all-gathers or of reduce-scatters: the lower of the two. Collective over the
    world.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for size in messages:
        piece = torch.zeros(size // 4 // ranks, device=device)
        whole = torch.zeros(piece.numel() * ranks, device=device)
        calls: dict[str, Callable[[], object]] = {
            "all_reduce": partial(dist.all_reduce, whole),
            "all_gather": partial(dist.all_gather_into_tensor, whole, piece),
            "reduce_scatter": partial(dist.reduce_scatter_tensor, piece, whole),
        }
        for kind, call in calls.items():
            points.setdefault(kind, []).append((4.0 * whole.numel(), collective_seconds(call, device)))
    link, hop = fitted_link(points["all_reduce"], ranks, steps=2 * (ranks - 1))
    gather, scatter = (
        fitted_link(points[kind], ranks, steps=ranks - 1)[0] for kind in ("all_gather", "reduce_scatter")
    )
    return link, min(gather, scatter), hop


def collective_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the mean seconds of a call. All ranks make the same number of calls."""
    for _ in range(3):
        call()
    finish(device)
    started = time.perf_counter()
    for _ in range(CALLS):
        call()
    finish(device)
    return (time.perf_counter() - started) / CALLS


def fitted_link(points: Sequence[tuple[float, float]], ranks: int, *, steps: int) -> tuple[float, float]:
    """Return GB/s and seconds of a step from (bytes, seconds) of collectives in a ring of `ranks`. Pure.

    Each step sends a rank's part of the bytes.
    """
    largest, smallest = max(points), min(points)
    slope = (largest[1] - smallest[1]) / (largest[0] - smallest[0])
    per_byte = slope if slope > 0 else largest[1] / largest[0]  # noise: small messages were not faster
    hop = max(0.0, smallest[1] - per_byte * smallest[0]) / steps
    return rounded(steps / ranks / per_byte / GIGA), rounded(hop)
