"""Rates of an accelerator and its links: seconds of a product, of moved bytes, of a collective. Pure.

A rate is what was measured on the card (`hardware.card`); else its specification in conf/hardware times the
share that training reaches. benchmarks/narayanan.py fits the shares `product`, `memory` and `link` to one
published table.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil, log2
from typing import NamedTuple

from launcher.config.schema import CardRates, Device, Dtype, HardwareConfig, PeakFlops
from launcher.planning.cost.operations import BYTES, Collective, FusedAttention, Matmul
from launcher.planning.cost.product_shapes import NO_SHAPES, MeasuredShapes, correction, measured_shapes
from launcher.planning.cost.traffic import GroupShape

GIGA = 1e9
ALIGNMENT = 8  # elements of 2 bytes: 16 bytes, the smallest piece that tensor cores are fed with


@dataclass(frozen=True)
class Shares:
    """Shares of the data sheet's rates that training reaches, and latencies."""

    product: float = 0.93  # of the rate of large matrix products; fitted, and 740 of 794 TFLOP/s on an H100
    memory: float = 0.90  # of the memory bandwidth; fitted, and 3.0 of 3.35 TB/s on an H100
    link: float = 0.745  # of the bandwidth of a link; fitted
    update: float = 0.78  # of the memory bandwidth in fused AdamW: 2.6 of 3.35 TB/s on an H100
    # Share of the memory's rate in norms, activations and residuals that are not compiled: from a profile of
    # GPT-2 124M on an H100, 23 ms of a step for 30 GB (the norms' backward pass reads its input twice).
    eager: float = 0.60
    unaligned: float = 0.135  # of a product's rate: 50,257 columns beside 50,304 on an H100
    kernel_s: float = 2e-6  # between two kernels of a stream
    launch_s: float = 6.6e-6  # of the host, to start an operation: measured with an H100
    # Starts of a bare operation that the host takes for an operation of a block that is not compiled, with
    # Python, autograd and the hooks of gradients: a step of GPT-2 124M with 8 sequences took 54 ms beside an
    # H100, which computed for 32 ms.
    interpreted: float = 9.5
    hop_intra_s: float = 2e-6  # of each step of a collective within a node
    hop_inter_s: float = 8e-6  # of each step of a collective between nodes
    # Transfers that a stage waits for when it sends a tensor. DeepSpeed's pipeline sends and receives in
    # turn, on the stream that computes (runtime/pipe/p2p.py); Megatron-LM does both at the same time.
    exchange: float = 2.0
    # Seconds that computation loses to each second of a collective beside it, which takes processors and
    # memory: 18.9% on average in "Characterizing Compute-Communication Overlap in GPU-Accelerated Distributed
    # Deep Learning" (arXiv 2507.03114).
    beside: float = 0.19
    overlaps: bool = True  # whether collectives run while the rank computes, as NCCL's do on their own stream


class FusedRate(NamedTuple):
    """Rate of fused attention by head size: see AttentionRate in config/schema.py."""

    head_size: int
    forward: float
    forward_ramp: float
    backward: float
    backward_ramp: float


# Shares of the rate of large products, measured on an H100: conf/hardware/h100_80gb.yaml.
ATTENTION_SHARES = (
    FusedRate(64, 0.628, 440, 0.642, 1180),
    FusedRate(80, 0.588, 440, 0.520, 880),
    FusedRate(96, 0.682, 420, 0.622, 920),
    FusedRate(128, 0.872, 400, 0.757, 940),
)
# Host time of DeepSpeed's engine on a GPU, from `launcher calibrate` with an H100: a step of 54 tensors took
# 6.3 ms beside its micro-batches, and a block under ZeRO-3, with 12 tensors, 12 ms in each micro-batch.
TENSOR_STEP_S = 1.2e-4  # of each tensor in a step: casts, norm, clipping, zeroing, copies
ZERO_3_BLOCK_S = 12e-3  # of a block in a micro-batch, for its gathers, releases and reductions


@dataclass(frozen=True)
class Rates:
    """Rates of a rank and its links."""

    flops: float  # per second, in large products
    memory: float  # bytes per second that operations read and write
    element: int  # bytes
    intra: float  # bytes per second that a rank sends within a node in an all-reduce
    gather: float  # the same in other collectives: switches that sum (NVLink SHARP) speed up all-reduces
    inter: float  # bytes per second that a rank sends to other nodes
    host: float  # bytes per second between a GPU and the host's memory
    shares: Shares
    attention_rates: tuple[FusedRate, ...]  # in rising order of head size
    update: float  # bytes per second in the optimizer
    shapes: MeasuredShapes = NO_SHAPES  # of products measured in this precision
    crowding: float = 1.0  # ranks per processor
    step_s: float = 0.0
    micro_batch_s: float = 0.0
    tensor_step_s: float = 0.0
    zero_2_block_s: float = 0.0
    zero_3_block_s: float = 0.0
    pipeline_batch_s: float = 0.0

    @property
    def overlaps(self) -> bool:
        return self.shares.overlaps

    @property
    def beside(self) -> float:
        return self.shares.beside

    def product(self, matmul: Matmul) -> float:
        """Return seconds of a product, corrected by measured products of a similar shape if there are any."""
        seconds = self.product_by_formula(matmul)
        if not self.shapes or not self._is_aligned(matmul):
            return seconds
        return seconds * correction(self.shapes, matmul.m, matmul.n, matmul.k)

    def product_by_formula(self, matmul: Matmul) -> float:
        """Return seconds of the main loop, then of writing the result; at least of moving the operands.

        A tile is written when its sum is complete, so short sums (small k) are slower: 750 TFLOP/s with
        k = 8192, 570 with k = 768 on an H100. Mean error 6% over the 61 products of its file, which take
        more than 60 us; shorter ones wait for the host that starts them.
        """
        m, n, k = matmul.m, matmul.n, matmul.k
        flops, output = self.flops, matmul.count * m * n * self.element
        if not self._is_aligned(matmul):
            flops *= self.shares.unaligned
        operands = matmul.count * (m * k + k * n) * self.element
        return max(matmul.flops / flops, operands / self.memory) + output / self.memory

    def _is_aligned(self, matmul: Matmul) -> bool:
        return self.element != 2 or not any(size % ALIGNMENT for size in (matmul.m, matmul.n, matmul.k))

    def attention(self, attention: FusedAttention, products: int) -> float:
        """Return seconds of a fused kernel: two products forward, five backward."""
        per_s, ramp = _between(self.attention_rates, attention.head_size, is_forward=products == 2)
        return products * attention.flops * (1 + ramp / attention.length) / per_s

    def moving(self, size: float, kernels: int = 1) -> float:
        """Return seconds to read and write `size` bytes of memory in `kernels` operations."""
        return size / self.memory + kernels * self.shares.kernel_s

    def pointwise(self, size: float, kernels: int, *, compiled: bool) -> float:
        """Return seconds of the operations between the products of a block, compiled or each on its own."""
        return self.moving(size if compiled else size / self.shares.eager, kernels)

    def starting(self, kernels: int, *, compiled: bool) -> float:
        """Return seconds of the host to start operations. The device waits for it if they are short."""
        return kernels * self.shares.launch_s * (1 if compiled else self.shares.interpreted)

    def scale(self, flops: float, *, waits: bool) -> float:
        """Return 1: a data sheet has no factor between a pass and the sum of its operations."""
        return 1.0

    def collective(self, collective: Collective, group: GroupShape) -> float:
        """Return seconds. Ranks communicate within their node first, then between nodes."""
        if group.ranks == 1:
            return 0.0
        if collective.kind == "send":
            link, hop = (self.gather, self.shares.hop_intra_s) if group.is_within_node else (
                self.inter, self.shares.hop_inter_s
            )  # fmt: skip
            return self.shares.exchange * (collective.size / link + hop)
        inside, nodes = group.per_node, -(-group.ranks // group.per_node)
        seconds = self._moving_between(collective, group.ranks, inside, nodes)
        # NCCL all-reduces over a tree of nodes, twice, and gathers and scatters around a ring of all ranks.
        if collective.kind == "all_reduce":
            intra, inter = 2 * (inside - 1), 2 * ceil(log2(nodes))
        else:
            intra, inter = nodes * (inside - 1), nodes - 1
        return seconds + intra * self.shares.hop_intra_s + inter * self.shares.hop_inter_s

    def _moving_between(self, collective: Collective, ranks: int, inside: int, nodes: int) -> float:
        """Return seconds to move the bytes of a collective within a node, then between nodes."""
        if collective.kind == "all_to_all":
            # Each rank gets other bytes, so nothing is combined within a node before it leaves it.
            part = collective.size / ranks
            return part * (inside - 1) / self.gather + part * (ranks - inside) / self.inter
        seconds = collective.sent(inside) / (self.intra if collective.kind == "all_reduce" else self.gather)
        return seconds + Collective(collective.kind, collective.size // inside).sent(nodes) / self.inter

    def passing_on(self, collective: Collective, group: GroupShape) -> float:
        """Return seconds of a send around a ring, where each rank sends and receives at the same time."""
        if collective.kind != "send":
            return self.collective(collective, group)
        return self.collective(collective, group) / self.shares.exchange


def _between(rates: tuple[FusedRate, ...], head_size: int, *, is_forward: bool) -> tuple[float, float]:
    """Return FLOP/s and ramp, interpolated by head size; smaller heads are padded to the smallest."""
    curve = [
        (rate.head_size, rate.forward, rate.forward_ramp)
        if is_forward
        else (rate.head_size, rate.backward, rate.backward_ramp)
        for rate in rates
    ]
    smallest, largest = curve[0], curve[-1]
    if head_size <= smallest[0]:
        return smallest[1] * head_size / smallest[0], smallest[2]
    if head_size >= largest[0]:
        return largest[1], largest[2]
    above = next(index for index, point in enumerate(curve) if point[0] >= head_size)
    (low, *slow), (high, *fast) = curve[above - 1], curve[above]
    part = (head_size - low) / (high - low)
    per_s, ramp = (before * (1 - part) + after * part for before, after in zip(slow, fast, strict=True))
    return per_s, ramp


def specified(hardware: HardwareConfig, dtype: Dtype, shares: Shares | None = None) -> Rates | None:
    """Return the rates of the card and its data sheet; None if the hardware config has no speeds."""
    if shares is None:
        # A CPU is its own host: starting an operation is part of the operation.
        shares = Shares(launch_s=0.0) if hardware.device is Device.cpu else Shares()
    card = hardware.card
    peak: float | None = getattr(hardware.peak_flops, dtype.name)
    product: float | None = getattr(card.products, dtype.name)
    if product is None and peak is not None:
        product = peak * (hardware.gemm_efficiency or DEFAULT_EFFICIENCY) * shares.product
    memory = _rate(card.memory_gb_s, hardware.memory_bandwidth_gb_s, shares.memory)
    # A calibration with a single GPU measures no link: another GPU is reached through the host.
    intra = _rate(card.link_gb_s, hardware.bandwidth_intra_node_gb_s or card.host_gb_s, shares.link)
    if product is None or memory is None or intra is None:
        return None
    host = _rate(card.host_gb_s, hardware.host_bandwidth_gb_s, shares.link) or intra
    rates = Rates(
        flops=product / hardware.compute_scale,
        memory=memory / hardware.compute_scale,
        element=BYTES[dtype],
        intra=intra,
        gather=_rate(card.gather_gb_s, None, 1.0) or intra,
        # A network card is on the bus of the host's link, and so is not faster.
        inter=_rate(None, hardware.bandwidth_inter_node_gb_s, shares.link) or min(intra, host),
        host=host,
        shares=_of_card(card, shares),
        attention_rates=_attention(card, product, hardware.compute_scale),
        update=_rate(card.update_gb_s, hardware.memory_bandwidth_gb_s, shares.update) or memory,
        tensor_step_s=TENSOR_STEP_S,
        zero_3_block_s=ZERO_3_BLOCK_S,
    )
    measured = getattr(card.shapes, dtype.name)
    return replace(rates, shapes=measured_shapes(measured, _on_the_card(rates, hardware.compute_scale)))


def _on_the_card(rates: Rates, scale: float) -> Callable[[Matmul], float]:
    """Return the planned seconds of a product without the factor of `hardware.compute_scale`."""
    return lambda matmul: rates.product_by_formula(matmul) / scale


def _rate(measured: float | None, stated: float | None, share: float) -> float | None:
    """Return bytes per second: measured, else a share of the data sheet's. Both are in GB/s."""
    if measured is not None:
        return measured * GIGA
    return None if stated is None else stated * GIGA * share


def _of_card(card: CardRates, shares: Shares) -> Shares:
    def known(measured: float | None, otherwise: float) -> float:
        return otherwise if measured is None else measured

    return replace(
        shares,
        unaligned=known(card.unaligned, shares.unaligned),
        launch_s=known(card.launch_s, shares.launch_s),
        hop_intra_s=known(card.hop_s, shares.hop_intra_s),
    )


def _attention(card: CardRates, product: float, scale: float) -> tuple[FusedRate, ...]:
    if card.attention:
        return tuple(
            sorted(
                FusedRate(
                    rate.head_size,
                    rate.forward / scale,
                    rate.forward_ramp,
                    rate.backward / scale,
                    rate.backward_ramp,
                )
                for rate in card.attention
            )
        )
    return tuple(
        share._replace(forward=share.forward * product / scale, backward=share.backward * product / scale)
        for share in ATTENTION_SHARES
    )


DEFAULT_EFFICIENCY = 0.8  # share of the peak that large products reach, if not measured


def _nominal(flops: float, memory: float, intra: float, inter: float, shares: Shares) -> Rates:
    hardware = HardwareConfig(
        peak_flops=PeakFlops(bf16=flops),
        memory_bandwidth_gb_s=memory,
        bandwidth_intra_node_gb_s=intra,
        bandwidth_inter_node_gb_s=inter,
    )
    rates = specified(hardware, Dtype.bf16, shares)
    assert rates is not None
    return rates


# Placeholder rates, used only to rank layouts when the hardware config has no speeds.
CPU_SHARES = Shares(unaligned=1.0, kernel_s=1e-5, launch_s=0.0, hop_intra_s=5e-5, overlaps=False)
NOMINAL = {
    "cpu": _nominal(6e10, 11, 1.2, 0.12, CPU_SHARES),
    "cuda": _nominal(2.6e14, 1700, 250, 25, Shares()),
}
