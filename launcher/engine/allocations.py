"""Count the bytes of tensors and collectives. The resident set size would include the allocator's reserve."""

import gc
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from time import sleep
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CollectiveName = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]

# torch's names of the collectives that the launcher and DeepSpeed call, and the index of the sized argument.
_COLLECTIVES: dict[str, tuple[CollectiveName, int]] = {
    "c10d.allreduce_.default": ("all_reduce", 0),
    "c10d.allreduce_coalesced_.default": ("all_reduce", 0),
    "c10d._allgather_base_.default": ("all_gather", 0),
    "c10d._reduce_scatter_base_.default": ("reduce_scatter", 1),
    "c10d.alltoall_base_.default": ("all_to_all", 1),
    "c10d.send.default": ("send", 0),
}

# Seconds for gloo's threads to let go of the tensors of a collective that has ended. Without this pause the
# peak of a run with experts was between 92.9 and 99.2 MB (tests/planning/measured.py); with it, 92.9 MB.
_LETTING_GO = 0.01


class CollectiveCall(NamedTuple):
    """A collective over a named process group; `size` is the bytes reduced, gathered, scattered or sent."""

    group: str
    kind: CollectiveName
    size: int


class Allocations(TorchDispatchMode):
    """While entered, counts `live` bytes of tensor storages, their `peak`, and calls of `collectives`.

    A storage counts once, however many tensors view it, from the operation that made it until the last
    reference to it is gone. Tensors made before are counted only after `count` or `count_existing`.
    `group_name` names the process group of a collective; collectives of a group without a name are ignored.

    A thread of gloo holds the tensors of a collective until it is scheduled again, some operations after the
    collective has ended. With `waits` the first new peak after a collective waits for these threads, so that
    the peak does not depend on the scheduling.
    """

    def __init__(
        self,
        group_name: Callable[[dist.ProcessGroup], str | None] = lambda group: "",
        *,
        waits: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.collectives: Counter[CollectiveCall] = Counter()
        self._group_name, self._waits = group_name, waits
        self._may_be_held = False  # whether a thread may still hold tensors of a collective
        self._storages: dict[int, tuple[int, Any]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if (name := str(function)) in _COLLECTIVES:
            self._count_collective(name, args)
            self._may_be_held = self._waits
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.count(leaf)
        return result

    def count(self, tensor: Tensor) -> None:
        """Count the tensor's storage from now on, unless it is counted already."""
        if tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not size or key in self._storages:
            return

        def release(_: Any) -> None:
            # First `pop`: another thread may run during the call, and change `live`.
            freed, _reference = self._storages.pop(key)
            self.live -= freed

        self._storages[key] = size, weakref.ref(storage, release)
        self.live += size
        if self._may_be_held and self.live > self.peak:
            self._may_be_held = False
            sleep(_LETTING_GO)
        self.peak = max(self.peak, self.live)

    def count_existing(self, excluded: Iterable[Tensor] = ()) -> None:
        """Count every tensor that this process holds now, without the storages of `excluded`."""
        left_out = {tensor.untyped_storage()._cdata for tensor in excluded}
        for tensor in _existing_tensors():
            if tensor.untyped_storage()._cdata not in left_out:
                self.count(tensor)

    def restart(self) -> None:
        """Set the peak to the bytes that are live now, and forget the collectives so far."""
        self.peak = self.live
        self.collectives.clear()

    def _count_collective(self, name: str, args: Any) -> None:
        kind, index = _COLLECTIVES[name]
        boxed = next(argument for argument in args if isinstance(argument, torch.ScriptObject))
        of = dist.ProcessGroup.unbox(boxed)
        group = self._group_name(of)
        if group is not None:
            if kind == "all_to_all" and _is_all_reduce(of, *args[3:5]):
                kind = "all_reduce"
            tensors = [leaf for leaf in tree_leaves(args[index]) if isinstance(leaf, Tensor)]
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.collectives[CollectiveCall(group, kind, size)] += 1


def _is_all_reduce(group: dist.ProcessGroup, received: list[int], sent: list[int]) -> bool:
    """Return whether two ranks swap whole tensors to all-reduce them (parallel/all_reduce.py)."""
    return len(sent) == 2 and received == sent and sent[dist.get_rank(group)] == 0


def _existing_tensors() -> Iterator[Tensor]:
    """Yield every tensor that Python knows of, and gradients, which Python may not know of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # reading attributes of deprecated objects makes them warn
        for candidate in gc.get_objects():
            # Tensors of torch.compile's own are fake: they have a size, perhaps a symbol, and no memory.
            if issubclass(type(candidate), Tensor) and not issubclass(type(candidate), FakeTensor):
                yield candidate
                if candidate.is_leaf and candidate.grad is not None:
                    yield candidate.grad
