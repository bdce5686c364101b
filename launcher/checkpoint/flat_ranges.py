"""The boxes of logical tensors that a fragment of a rank's training state covers. Pure."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from launcher.parallel.boxes import Box
from launcher.parallel.mesh import Axis
from launcher.parallel.sharding import logical_views

if TYPE_CHECKING:  # imports deepspeed
    from launcher.engine.state import Fragment


def fragment_views(fragment: "Fragment", axis: Axis) -> Iterator[tuple[str, Box, Tensor]]:
    """Yield the kind of tensor, the box and the view of each box of a fragment's tensors."""
    for kind, tensor in fragment.tensors.items():
        for box, view in logical_views(tensor, fragment.start, fragment.shard_shape, fragment.logical, axis):
            yield kind, box, view
