"""How fast one accelerator and its links are: seconds for a product, for bytes moved, for a collective. Pure.

From the specifications in conf/hardware, times the shares of them that training reaches. Those shares are
fitted on one published table, by benchmarks/narayanan.py, and nothing else.
"""

from dataclasses import dataclass
from math import ceil, log2

from launcher.config.schema import Dtype, HardwareConfig
from launcher.planning.cost.operations import BYTES, Collective, Matmul
from launcher.planning.cost.traffic import GroupShape

GIGA = 1e9


@dataclass(frozen=True)
class Shares:
    """Of what the data sheets say, what training reaches. Fitted: see the module."""

    product: float = 0.96  # of the rate that large matrix products reach
    memory: float = 0.90  # of the memory's bandwidth
    link: float = 0.80  # of a link's bandwidth
    kernel_s: float = 4e-6  # to launch an operation
    hop_intra_s: float = 2e-6  # for each step of a collective within a node
    hop_inter_s: float = 8e-6  # and between nodes
    overlap: float = 1.0  # of what may run behind computation, what does


@dataclass(frozen=True)
class Rates:
    flops: float  # per second, in large products
    memory: float  # bytes per second
    element: int  # bytes
    intra: float  # bytes per second that a rank sends within a node
    inter: float  # ... and to other nodes
    host: float  # ... and to the host's memory
    shares: Shares
    step_s: float = 0.0  # that a step takes whatever its model
    micro_batch_s: float = 0.0  # and each of its micro-batches
    zero_3_block_s: float = 0.0  # and each block, in each of them, under ZeRO-3
    crowding: float = 1.0  # ranks to a processor

    def product(self, matmul: Matmul) -> float:
        """Seconds: the arithmetic, and the operands' way in and out (Williams et al., CACM 52, 2009)."""
        m, n, k = matmul.m, matmul.n, matmul.k
        moved = matmul.count * (m * k + k * n + m * n) * self.element
        return matmul.flops / self.flops + moved / self.memory

    def moving(self, size: float, kernels: int = 1) -> float:
        """Seconds to read and write `size` bytes of memory in some operations."""
        return size / self.memory + kernels * self.shares.kernel_s

    def scale(self, flops: float) -> float:
        """Data sheets know of none."""
        return 1.0

    def collective(self, one: Collective, group: GroupShape) -> float:
        """Seconds. Across nodes: reduced or spread within each first, then each rank over its own link."""
        if group.ranks == 1:
            return 0.0
        if one.kind == "send":
            if group.is_within_node:
                return one.size / self.intra + self.shares.hop_intra_s
            return one.size / self.inter + self.shares.hop_inter_s
        inside, nodes = group.per_node, -(-group.ranks // group.per_node)
        seconds = one.sent(inside) / self.intra
        if nodes > 1:
            seconds += Collective(one.kind, one.size // inside).sent(nodes) / self.inter
        rounds = 2 if one.kind == "all_reduce" else 1
        # Between many nodes all-reduces go over a tree (NCCL), gathers and scatters round a ring.
        hops = ceil(log2(nodes)) if one.kind == "all_reduce" else nodes - 1
        return seconds + rounds * ((inside - 1) * self.shares.hop_intra_s + hops * self.shares.hop_inter_s)


def specified(hardware: HardwareConfig, dtype: Dtype, shares: Shares | None = None) -> Rates | None:
    """None where the hardware's config does not say how fast it is."""
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


# Nobody's: they put layouts in order where the hardware does not say how fast it is.
NOMINAL = {
    "cpu": Rates(5e10, 1e10, 4, 1e9, 1e8, 1e10, Shares(kernel_s=1e-5, hop_intra_s=5e-5, overlap=0.0)),
    "cuda": Rates(2e14, 1.5e12, 2, 2e11, 2e10, 3e10, Shares()),
}

DEFAULT_EFFICIENCY = 0.8  # of the peak that large products reach, where nobody has measured it
