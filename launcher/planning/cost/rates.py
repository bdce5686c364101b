"""Rates of an accelerator and its links: seconds of a product, of moved bytes, of a collective. Pure.

A rate is a specification in conf/hardware times the share that training reaches. The shares are fitted to a
single published table by benchmarks/narayanan.py.
"""

from dataclasses import dataclass
from math import ceil, log2

from launcher.config.schema import Dtype, HardwareConfig
from launcher.planning.cost.operations import BYTES, Collective, Matmul
from launcher.planning.cost.traffic import GroupShape

GIGA = 1e9


@dataclass(frozen=True)
class Shares:
    """Shares of the data sheet's rates that training reaches, and latencies. Fitted: see the module."""

    product: float = 0.96  # of the rate of large matrix products
    memory: float = 0.90  # of the memory bandwidth
    link: float = 0.80  # of the bandwidth of a link
    kernel_s: float = 4e-6  # to launch an operation
    hop_intra_s: float = 2e-6  # of each step of a collective within a node
    hop_inter_s: float = 8e-6  # of each step of a collective between nodes
    overlap: float = 1.0  # share of the communication that computation hides, where it may


@dataclass(frozen=True)
class Rates:
    """Rates of a rank and its links, from the data sheet."""

    flops: float  # per second, in large products
    memory: float  # bytes per second
    element: int  # bytes
    intra: float  # bytes per second that a rank sends within a node
    inter: float  # bytes per second that a rank sends to other nodes
    host: float  # bytes per second between a GPU and the host's memory
    shares: Shares
    step_s: float = 0.0  # overhead of a step
    micro_batch_s: float = 0.0  # overhead of a micro-batch
    zero_3_block_s: float = 0.0  # overhead of a block in a micro-batch under ZeRO-3
    crowding: float = 1.0  # ranks per processor

    def product(self, matmul: Matmul) -> float:
        """Return seconds of arithmetic and of moving the operands (Williams et al., CACM 52, 2009)."""
        m, n, k = matmul.m, matmul.n, matmul.k
        moved = matmul.count * (m * k + k * n + m * n) * self.element
        return matmul.flops / self.flops + moved / self.memory

    def moving(self, size: float, kernels: int = 1) -> float:
        """Return seconds to read and write `size` bytes of memory in `kernels` operations."""
        return size / self.memory + kernels * self.shares.kernel_s

    def scale(self, flops: float) -> float:
        """Return 1: a data sheet says nothing of passes beside their operations."""
        return 1.0

    def collective(self, collective: Collective, group: GroupShape) -> float:
        """Return seconds. Ranks communicate within their node first, then between nodes."""
        if group.ranks == 1:
            return 0.0
        if collective.kind == "send":
            if group.is_within_node:
                return collective.size / self.intra + self.shares.hop_intra_s
            return collective.size / self.inter + self.shares.hop_inter_s
        inside, nodes = group.per_node, -(-group.ranks // group.per_node)
        seconds = collective.sent(inside) / self.intra
        if nodes > 1:
            seconds += Collective(collective.kind, collective.size // inside).sent(nodes) / self.inter
        rounds = 2 if collective.kind == "all_reduce" else 1
        # Between many nodes NCCL all-reduces over a tree, and gathers and scatters around a ring.
        hops = ceil(log2(nodes)) if collective.kind == "all_reduce" else nodes - 1
        return seconds + rounds * ((inside - 1) * self.shares.hop_intra_s + hops * self.shares.hop_inter_s)


def specified(hardware: HardwareConfig, dtype: Dtype, shares: Shares | None = None) -> Rates | None:
    """Return the rates of the data sheet; None if the hardware config has no speeds."""
    shares = shares or Shares()
    peak: float | None = getattr(hardware.peak_flops, dtype.name)
    memory, intra = hardware.memory_bandwidth_gb_s, hardware.bandwidth_intra_node_gb_s
    if peak is None or memory is None or intra is None:
        return None
    inter = hardware.bandwidth_inter_node_gb_s or intra
    return Rates(
        flops=peak * (hardware.gemm_efficiency or DEFAULT_EFFICIENCY) * shares.product,
        memory=memory * GIGA * shares.memory,
        element=BYTES[dtype],
        intra=intra * GIGA * shares.link,
        inter=inter * GIGA * shares.link,
        host=(hardware.host_bandwidth_gb_s or intra) * GIGA * shares.link,
        shares=shares,
    )


# Placeholder rates, used only to rank layouts when the hardware config has no speeds.
NOMINAL = {
    "cpu": Rates(5e10, 1e10, 4, 1e9, 1e8, 1e10, Shares(kernel_s=1e-5, hop_intra_s=5e-5, overlap=0.0)),
    "cuda": Rates(2e14, 1.5e12, 2, 2e11, 2e10, 3e10, Shares()),
}

DEFAULT_EFFICIENCY = 0.8  # share of the peak that large products reach, if not measured
