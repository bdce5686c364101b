"""ZeRO-3: draw the partition of a data rank, instead of whole weights that DeepSpeed sends and cuts."""

from typing import Any

import deepspeed
from torch import nn


class PartitionedInit(deepspeed.zero.Init):  # type: ignore[misc]  # DeepSpeed ships no types
    """The context in which ZeRO-3 partitions each module's weights as soon as the module is built.

    DeepSpeed's own draws every weight whole on every data rank, and broadcasts the weights of the first rank
    (DeepSpeed 0.19.8, partition_parameters.py, _zero_init_param). Here a weight has no values until each rank
    has cut its partition, and draws it.
    """

    def _zero_init_param(self, parameter: nn.Parameter) -> None:
        partitioned: Any = parameter
        initial = partitioned.initial
        del partitioned.initial
        self._convert_to_deepspeed_param(parameter)
        if self.zero_param_process_group is not None:
            # zero_hpz_partition_size: DeepSpeed cuts a second partition from the whole weight.
            initial.fill(partitioned.data.view(-1))
        partitioned.partition()
        size = partitioned.ds_tensor.ds_numel
        start = partitioned.ds_zero_partition_rank * size
        numel = min(size, partitioned.ds_numel - start)
        if numel > 0:  # the partitions of a small weight on the last ranks are padding
            initial.fill(partitioned.ds_tensor.narrow(0, 0, numel), start)
