"""The routers of all layers, read over all ranks."""

import torch
import torch.distributed as dist

from launcher.config.schema import ModelConfig
from launcher.engine.base import Engine
from launcher.models.experts import Experts


def routing_row(engine: Engine, model: ModelConfig) -> dict[str, float]:
    """Return metrics of the routers over all tokens since the last call; none before a step was taken.

    Collective over the world: one all-reduce of (layers, experts + 6) numbers.
    """
    experts = model.experts.count
    sums = torch.zeros(model.num_layers, experts + 6, dtype=torch.float64, device=engine.device)
    for module in (each for each in engine.module.modules() if isinstance(each, Experts)):
        taken = module.record.take(engine.device)
        if engine.mesh.tensor.rank == 0:  # the other tensor ranks have recorded the same tokens
            sums[module.layer] += taken
    dist.all_reduce(sums)
    used = sums[sums[:, -2] > 0].cpu()  # layers with calls
    if not len(used):
        return {}
    uses, (entropy, tokens, balance, z, calls, rows) = used[:, :experts], used[:, experts:].T
    return {
        "experts/load_max_over_mean": float((uses.amax(1) / uses.mean(1)).max()),
        "experts/router_entropy": float((entropy / tokens).mean()),
        "experts/balance_loss": float((balance / calls).mean()),
        "experts/z_loss": float((z / calls).mean()),
        "experts/dropped_tokens": float((tokens * model.experts.top_k - rows).sum()),
    }
