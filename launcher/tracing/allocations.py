"""Every tensor's storage and every collective of this process, counted as they come and go.

Not the resident set: that holds the interpreter and its libraries, and what the allocator keeps for later.
"""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launcher.planning.cost.operations import Collective, CollectiveKind

GroupName = Callable[[dist.ProcessGroup], str | None]

# torch's names of those that the launcher and DeepSpeed call, and which argument tells the size.
_COLLECTIVES: dict[str, tuple[CollectiveKind, int]] = {
    "c10d.allreduce_.default": ("all_reduce", 0),
    "c10d._allgather_base_.default": ("all_gather", 0),
    "c10d._reduce_scatter_base_.default": ("reduce_scatter", 1),
    "c10d.send.default": ("send", 0),
}


class Allocations(TorchDispatchMode):
    """While entered: `live` bytes of the storages made since, their `peak`, and the `collectives`.

    A storage counts once, however many tensors view it, from the operation that made it until nothing
    refers to it. `count` takes in what was there before. Collectives are keyed by the name `group_name`
    gives their process group; without a name they are left out.
    """

    def __init__(self, group_name: GroupName = lambda group: "") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.collectives: Counter[tuple[str, Collective]] = Counter()
        self._group_name = group_name
        self._storages: dict[int, tuple[int, Any]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if (name := str(function)) in _COLLECTIVES:
            self._note_collective(name, args)
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                self.count(made)
        return result

    def count(self, tensor: Tensor) -> None:
        """Its storage, from now on, if it is not counted yet."""
        if tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not size or key in self._storages:
            return

        def gone(_: Any) -> None:
            self.live -= self._storages.pop(key)[0]

        self._storages[key] = size, weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)

    def restart(self) -> None:
        """Forget the peak and the collectives so far."""
        self.peak = self.live
        self.collectives.clear()

    def _note_collective(self, name: str, args: Any) -> None:
        kind, index = _COLLECTIVES[name]
        boxed = next(one for one in args if isinstance(one, torch.ScriptObject))
        group = self._group_name(dist.ProcessGroup.unbox(boxed))
        if group is not None:
            tensors = [one for one in tree_leaves(args[index]) if isinstance(one, Tensor)]
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.collectives[group, Collective(kind, size)] += 1
