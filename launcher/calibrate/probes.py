"""Measure the machine on one rank while the other ranks measure too.

The conditions are those of training: operands are not in a cache from the previous call, and collectives
follow a computation, so that ranks do not arrive at the same moment.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from statistics import mean, median

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from launcher.config.schema import Dtype
from launcher.parallel.all_reduce import all_reduce_
from launcher.parallel.dtypes import TORCH_DTYPES

LEAST_S = 0.03  # of each run of calls: a shared machine changes its speed within milliseconds
# (m, n, k) as in a transformer: tokens by widths; square products as in attention scores.
PRODUCTS = [
    (32, 32, 32),
    (64, 64, 64),
    (128, 128, 64),
    (256, 128, 128),
    (512, 256, 128),
    (512, 512, 384),
    (512, 1536, 512),
    (1024, 1024, 1024),
]
ELEMENTS = [2**12, 2**15, 2**18, 2**20, 2**22]  # of a tensor of activations
PARAMETERS = 2**22  # of an optimizer's update
MESSAGES = [2**10, 2**14, 2**17, 2**20, 2**22, 2**24]  # bytes
MEASURED_DTYPES = ("fp32", "bf16")
OPERATIONS = 200
POOL, MOST_COPIES = 2**26, 256  # bytes and copies of operands that are used in turn
MODEL_WIDTH = 512
OPERAND_WIDTH = 256  # rows and columns of the product before a collective


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a call: the median of three runs of calls, each long enough for the clock."""
    work()
    calls = 1
    while True:
        elapsed = _run(work, calls, device)
        if elapsed >= LEAST_S:
            break
        calls = max(calls + 1, int(calls * 1.2 * LEAST_S / max(elapsed, 1e-6)))
    return median(_run(work, calls, device) for _ in range(3)) / calls


def _run(work: Callable[[], object], calls: int, device: torch.device) -> float:
    finish(device)
    started = time.perf_counter()
    for _ in range(calls):
        work()
    finish(device)
    return time.perf_counter() - started


def finish(device: torch.device) -> None:
    """Wait until the device has done all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def products(dtype: str, device: torch.device) -> Iterator[tuple[float, float]]:
    """Yield (FLOPs of a product, FLOP/s) of the three products of a linear layer, forward and backward."""
    for m, n, k in PRODUCTS:
        shapes, copies = ((m, k), (n, k), (m, n)), range(_copies(4 * (m * k + n * k + m * n)))
        draw = partial(torch.randn, device=device)
        pool = cycle([[draw(shape).to(TORCH_DTYPES[Dtype[dtype]]) for shape in shapes] for _ in copies])

        def three(pool: Iterator[list[Tensor]] = pool) -> None:
            x, weight, gradient = next(pool)
            F.linear(x, weight)
            gradient.matmul(weight)
            gradient.t().matmul(x)

        flops = 2.0 * m * n * k
        yield flops, 3 * flops / seconds(three, device)


def elementwise(device: torch.device, operation_s: float) -> Iterator[tuple[float, float]]:
    """Yield (bytes of a tensor, bytes/s) of a norm, a GELU and a residual, forward and backward.

    Bytes and operations are counted as a plan counts them: 7 tensors read and written forward, 9 backward;
    3 operations forward, 6 backward. Their fixed `operation_s`, which a plan adds, is not part of the rate.
    """
    for elements in ELEMENTS:
        shape = elements // MODEL_WIDTH, MODEL_WIDTH
        weight = torch.ones(MODEL_WIDTH, device=device, requires_grad=True)
        draw, copies = partial(torch.randn, shape, device=device), range(_copies(8 * elements))
        pool = cycle([(draw(requires_grad=True), draw()) for _ in copies])

        def block(pool: Iterator[tuple[Tensor, Tensor]] = pool, weight: Tensor = weight) -> None:
            x, gradient = next(pool)
            normed = F.layer_norm(x, (MODEL_WIDTH,), weight, weight)
            (x + F.gelu(normed, approximate="tanh")).backward(gradient)
            x.grad = weight.grad = None

        size, taken = 4.0 * elements, seconds(block, device)
        yield size, 16 * size / max(taken - 9 * operation_s, taken / 2)


def _copies(size: int) -> int:
    return max(1, min(MOST_COPIES, POOL // size))


def stream(device: torch.device, parameters: int = PARAMETERS) -> float:
    """Return bytes/s of AdamW on more than caches can hold: 4 tensors read, 3 written."""
    weight = torch.zeros(parameters, device=device, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight], fused=True)
    return 28.0 * parameters / seconds(lambda: optimizer.step(), device)


def operation(device: torch.device) -> float:
    """Return seconds of an operation on a tiny tensor: half of a forward and a backward operation."""
    x = torch.ones(8, device=device, requires_grad=True)

    def many() -> None:
        y = x
        for _ in range(OPERATIONS):
            y = y * 1.0
        y.sum().backward()
        x.grad = None

    return seconds(many, device) / OPERATIONS / 2


def collectives(
    group: dist.ProcessGroup, ranks: int, device: torch.device
) -> dict[str, list[tuple[float, float]]]:
    """Return (bytes, bytes/s) by kind of collective. Collective over the group."""
    rates: dict[str, list[tuple[float, float]]] = {}
    for size in MESSAGES:
        whole = torch.ones(size // 4, device=device)
        piece = torch.ones(size // 4 // ranks, device=device)
        gathered = torch.empty(piece.numel() * ranks, device=device)
        parts = torch.ones_like(gathered)
        work: dict[str, Callable[[], object]] = {
            "all_reduce": lambda: all_reduce_(whole, group),  # noqa: B023
            "all_gather": lambda: dist.all_gather_into_tensor(gathered, piece, group=group),  # noqa: B023
            "reduce_scatter": lambda: dist.reduce_scatter_tensor(piece, gathered, group=group),  # noqa: B023
            "all_to_all": lambda: dist.all_to_all_single(gathered, parts, group=group),  # noqa: B023
            "send": lambda: _send_around(whole, group, ranks),  # noqa: B023
        }
        for kind, call in work.items():
            rates.setdefault(kind, []).append((float(size), size / _mean_seconds(call, size, device)))
    return rates


def _send_around(message: Tensor, group: dist.ProcessGroup, ranks: int) -> None:
    """Send to the next rank, even ranks first; each rank sends once and receives once."""
    rank = dist.get_rank(group)
    ahead, behind = (dist.get_global_rank(group, (rank + step) % ranks) for step in (1, -1))
    if rank % 2 == 0:
        dist.send(message, ahead, group=group)
        dist.recv(message, behind, group=group)
    else:
        dist.recv(message, behind, group=group)
        dist.send(message, ahead, group=group)


def _mean_seconds(work: Callable[[], object], size: int, device: torch.device) -> float:
    """Return the mean seconds of a call, not the median: the few slow calls take much of the time.

    A slow call waits for a rank that the operating system had paused. All ranks make the same number of
    calls and compute before each.
    """
    operand = torch.randn(OPERAND_WIDTH, OPERAND_WIDTH, device=device)
    times = []
    for _ in range(max(8, min(80, 2**24 // size))):
        operand = torch.tanh(operand @ operand)
        times.append(_run(work, 1, device))
    return mean(times[1:])
