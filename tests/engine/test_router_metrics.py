"""Metrics of routers are computed from the records of the layers."""

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from launcher.engine import router_metrics
from launcher.engine.base import Engine
from launcher.models.experts import Experts
from launcher.models.grouped import Order
from launcher.parallel.mesh import ProcessMesh
from tests.models.small import BATCH, LENGTH
from tests.models.test_experts import COUNT, inputs_of, layer_of, model_with


def test_rows_that_no_expert_computes_are_counted_as_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with(top_k=1)
    layer, x = layer_of(model), inputs_of(model).detach().abs()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[3] = 1.0
    monkeypatch.setattr(router_metrics.dist, "all_reduce", lambda sums: None)
    parts = SimpleNamespace(module=layer, device=torch.device("cpu"), mesh=ProcessMesh.single())
    engine = cast(Engine, parts)
    assert router_metrics.routing_row(engine, model) == {}
    layer(x)
    with torch.no_grad():
        layer(x)  # an evaluation is not recorded
    row = router_metrics.routing_row(engine, model)
    assert row["experts/load_max_over_mean"] == COUNT
    assert row["experts/dropped_tokens"] == 0
    run, capacity = Experts._run, BATCH * LENGTH - 3

    def capped(self: Experts, rows: Tensor, order: Order) -> Tensor:
        sizes = [min(size, capacity) for size in order.sizes]
        return F.pad(run(self, rows[:capacity], replace(order, sizes=sizes)), (0, 0, 0, 3))

    monkeypatch.setattr(Experts, "_run", capped)
    layer(x)
    row = router_metrics.routing_row(engine, model)
    assert row["experts/dropped_tokens"] == 3
    assert row["experts/load_max_over_mean"] == COUNT
