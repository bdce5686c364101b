"""Common to all tests."""

import torch

# Tests fork ranks (distributed.py): OpenMP must not have started threads in this process by then.
torch.set_num_threads(1)
