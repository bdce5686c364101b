"""The tensors that several ranks hold alike, and which ranks disagree about them.

| layout | alike on the data ranks | alike on the tensor ranks, if not split | alike on the pipeline stages |
|---|---|---|---|
| ZeRO-0 | weights, optimizer states | weights, optimizer states | (DeepSpeed gets ZeRO-1) |
| ZeRO-1, 2 | model weights | model weights, fragments of master weights and states | tied weights |
| ZeRO-3 | persistent weights | persistent weights, fragments of master weights and states | (no pipeline) |

The data ranks contain the context ranks. Distributed experts are alike on the ranks that hold the same
experts. The learning rate, the loss scale and the numbers of updates are alike on all ranks.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launcher.engine.base import Engine
from launcher.engine.state import fragments, loss_scaler
from launcher.models.selection_bias import selection_biases
from launcher.parallel.digest import digest
from launcher.parallel.mesh import MeshShape
from launcher.parallel.sharding import WEIGHT, logical_of

# Whether ranks that differ in their pipeline index, their index among the holders of the same experts, their
# index among the ranks that share the experts, or their tensor index hold a tensor alike. The second and the
# third index are that of the data axis.
Axes = tuple[bool, bool, bool, bool]
ALL_AXES: Axes = (True, True, True, True)
_OF_DATA = ((False, False), (True, False), (True, True))  # no data rank, holders of the same experts, all
# Axes in the order of the digests of a rank. Numbers have a place of their own: every rank holds them, while
# tensors that are alike along all axes are on some stages only.
_ALIKE: list[Axes] = [(p, *of_data, t) for p, of_data, t in product((False, True), _OF_DATA, (False, True))]
_PLACES: list[tuple[Axes, bool]] = [*((axes, False) for axes in _ALIKE if any(axes)), (ALL_AXES, True)]

_NOTHING = 0  # in place of a hash if a rank holds no replicas of a place


@dataclass(frozen=True)
class Replica:
    """A tensor, or a number as a tensor, that other ranks hold with the same bits."""

    name: str
    axes: Axes
    tensor: Tensor
    is_number: bool = False


@dataclass(frozen=True)
class Disagreement:
    """A tensor whose hash differs between the ranks that must hold it alike."""

    name: str
    ranks: dict[int, int]  # hash by rank

    def minority(self) -> list[int]:
        """Return the ranks that differ from the majority; all ranks if there is no majority."""
        hashes = list(self.ranks.values())
        most = max(hashes, key=hashes.count)
        if 2 * hashes.count(most) <= len(hashes):
            return sorted(self.ranks)
        return sorted(rank for rank, value in self.ranks.items() if value != most)


def disagreements(engine: Engine, numbers: Mapping[str, float]) -> list[Disagreement]:
    """Return the tensors and numbers that differ between ranks; the same on every rank.

    Collective over the world: an all-gather of twelve hashes per rank. If they differ, a second all-gather
    sends the hash of each tensor.
    """
    held = list(replicas(engine, numbers))
    shape, world = engine.mesh.shape, engine.mesh.shape.world_size
    mine = torch.stack([_combined(held, place).to(engine.device) for place in _PLACES])
    hashes = torch.empty(world * len(mine), dtype=torch.int64, device=engine.device)
    dist.all_gather_into_tensor(hashes, mine)
    keys = [(axes, "numbers of the run" if is_number else "tensors") for axes, is_number in _PLACES]
    by_place = [
        {key: value for key, value in zip(keys, row, strict=True) if value != _NOTHING}
        for row in hashes.view(world, len(mine)).tolist()
    ]
    differing = compare(shape, by_place)
    if not differing:
        return []
    by_tensor: list[dict[tuple[Axes, str], int]] = [{}] * world
    dist.all_gather_object(by_tensor, {(r.axes, r.name): int(digest([r.tensor])) for r in held})
    # Ranks that hold other names, or a tensor whose bits changed meanwhile, have diverged as well.
    return compare(shape, by_tensor) or differing


def compare(shape: MeshShape, by_rank: Sequence[Mapping[tuple[Axes, str], int]]) -> list[Disagreement]:
    """Return the disagreements between ranks, given each rank's hashes by axes and name. Pure.

    A rank is compared with the ranks that differ from it along the axes only and that hold the name too.
    """
    holders: dict[tuple[object, ...], dict[int, int]] = defaultdict(dict)
    for rank, hashes in enumerate(by_rank):
        place = coordinates(shape, rank)
        for (axes, name), value in hashes.items():
            fixed = tuple(-1 if alike else index for alike, index in zip(axes, place, strict=True))
            holders[axes, name, fixed][rank] = value
    return [
        Disagreement(str(key[1]), ranks) for key, ranks in holders.items() if len(set(ranks.values())) > 1
    ]


def coordinates(shape: MeshShape, rank: int) -> tuple[int, int, int, int]:
    """Return a rank's indices along the four axes of Axes."""
    stage, data, tensor = shape.coordinates(rank)
    return (stage, *divmod(data, shape.expert), tensor)


def _combined(held: list[Replica], place: tuple[Axes, bool]) -> Tensor:
    """Return the hash of the replicas of one place."""
    tensors = [replica.tensor for replica in held if (replica.axes, replica.is_number) == place]
    return digest(tensors) if tensors else torch.tensor(_NOTHING)


@torch.no_grad()
def replicas(engine: Engine, numbers: Mapping[str, float]) -> Iterator[Replica]:
    """Yield this rank's replicas: weights, optimizer states, then `numbers` and the engine's own numbers."""
    yield from _weights_and_whole_states(engine)
    across: Axes = (False, *_data_axes(engine, is_part=False), engine.mesh.tensor.size > 1)
    for bias in selection_biases(engine.module) if any(across) else ():
        yield Replica(bias.logical.name, across, bias.value)
    if engine.zero_stage > 0 and engine.mesh.tensor.size > 1:
        yield from _fragments_of_whole_tensors(engine)
    rates = [float(group["lr"]) for group in engine.optimizer.param_groups]
    extremes = {"lowest learning rate": min(rates), "highest learning rate": max(rates)}
    scaler = {f"loss scaler: {name}": value for name, value in loss_scaler(engine).items()}
    for name, value in {**numbers, **extremes, **scaler}.items():
        yield Replica(name, ALL_AXES, torch.tensor(value, dtype=torch.float64), is_number=True)
    steps = [state["step"] for state in engine.optimizer.state.values() if "step" in state]
    if steps:
        # Ranks hold different numbers of parameters or partitions, all with the same number of updates.
        lowest_and_highest = torch.stack(torch.aminmax(torch.stack(steps)))
        yield Replica("number of optimizer updates", ALL_AXES, lowest_and_highest, is_number=True)


def _weights_and_whole_states(engine: Engine) -> Iterator[Replica]:
    tied = _tied_weights(engine)
    has_tensor = engine.mesh.tensor.size > 1
    for parameter in _whole_parameters(engine):
        logical = logical_of(parameter)
        of_data = _data_axes(engine, is_part=logical.is_part)
        axes: Axes = (id(parameter) in tied, *of_data, has_tensor and not logical.is_split)
        if any(axes):
            yield Replica(logical.name, axes, parameter.detach())
            states = engine.optimizer.state.get(parameter, {}) if engine.zero_stage == 0 else {}
            for key, state in states.items():
                if isinstance(state, Tensor) and state.numel() == parameter.numel():
                    yield Replica(f"{logical.name} ({key})", axes, state)


def _data_axes(engine: Engine, *, is_part: bool) -> tuple[bool, bool]:
    """Return whether a tensor is alike on holders of the same experts, and within an expert group."""
    mesh = engine.mesh
    if is_part:  # experts that data ranks share differ between them
        return mesh.holders_of_experts.size > 1, False
    return mesh.data.size > 1, mesh.data.size > 1


def _whole_parameters(engine: Engine) -> list[nn.Parameter]:
    """Return the parameters whose whole shard every data rank holds between two steps."""
    zero: Any = engine.deepspeed.optimizer
    return list(zero.persistent_parameters if engine.zero_stage == 3 else engine.module.parameters())


def _fragments_of_whole_tensors(engine: Engine) -> Iterator[Replica]:
    """Yield the fragments of tensors that are not split over tensor ranks, which therefore hold copies."""
    states = engine.optimizer.state.values()
    keys = {key for state in states for key, value in state.items() if isinstance(value, Tensor)} - {"step"}
    for fragment in fragments(engine, sorted(keys)):
        if not fragment.logical.is_split:
            for key, tensor in fragment.tensors.items():
                kind = "master weight" if key == WEIGHT else key
                yield Replica(f"{fragment.logical.name} ({kind})", (False, False, False, True), tensor)


def _tied_weights(engine: Engine) -> set[int]:
    """Return the ids of this rank's weights of which another pipeline stage holds a copy."""
    groups = getattr(engine.module, "tied_comms", {}).values()
    shared = [group for group in groups if len(group["ranks"]) > 1]  # under DualPipeV one rank has both ends
    return {id(attrgetter(name)(group["module"])) for group in shared for name in group["weight_attr"]}
