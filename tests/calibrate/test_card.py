"""The rates of a GPU: the fits are exact, the probes run (here on a CPU), and a plan uses their result."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from launcher.calibrate.card import (
    ProbeSizes,
    ProductRate,
    bytes_beside_allocator,
    card_of,
    card_rates,
    fitted_link,
    fitted_ramp,
    half_dtype,
    large_rate,
    link_rates,
)
from launcher.config.schema import CardRates, Device, Dtype, HardwareConfig, PeakFlops
from launcher.planning.cost.operations import Collective, CollectiveKind, FusedAttention, Matmul
from launcher.planning.cost.rates import Shares, specified
from launcher.planning.cost.traffic import GroupShape
from tests.distributed import pool

SMALL = ProbeSizes(
    tokens=64, few_tokens=16, products=((64, 64), (128, 32)), skinny=((8, 64),), head_sizes=(16, 32),
    lengths=(16, 64), heads=2, parameters=2**16, copied=2**20,
)  # fmt: skip


def test_the_ramp_of_attention_is_fitted() -> None:
    points = [(length, (1 + 440 / length) / 5e14) for length in (512, 2048, 8192)]
    assert fitted_ramp(points) == (5e14, 440.0)
    noise = [(512, 2e-15), (8192, 3e-15)]
    assert fitted_ramp(noise) == (pytest.approx(4e14), 0.0)


def test_a_slow_probe_does_not_make_attention_endlessly_fast() -> None:
    """Seconds of a FLOP as an H100 had them, backward with heads of 64, but for a slow first probe."""
    points = [(512, 1.6e-14), (1024, 5.4e-15), (2048, 3.6e-15), (4096, 2.9e-15)]
    rate, ramp = fitted_ramp(points)
    assert rate == pytest.approx(1.25 / 2.9e-15, rel=1e-3)
    for length, taken in points[1:]:
        assert (1 + ramp / length) / rate == pytest.approx(taken, rel=0.3)


def test_bandwidth_and_latency_of_a_link_are_fitted() -> None:
    ranks, link, hop = 8, 250e9, 3e-6
    points = [(size, 2 * 7 / 8 * size / link + 14 * hop) for size in (2.0**16, 2.0**22, 2.0**28)]
    assert fitted_link(points, ranks, steps=14) == (250.0, 3e-6)
    gathers = [(size, 7 / 8 * size / link + 7 * hop) for size, _ in points]
    assert fitted_link(gathers, ranks, steps=7) == (250.0, 3e-6)
    noise = [(1e3, 2.0), (1e9, 1.0)]
    assert fitted_link(noise, ranks, steps=8) == (1.0, 0.25)


def rates_of_links(rank: int, world: int) -> tuple[float, float, float]:
    return link_rates(world, torch.device("cpu"), (2**12, 2**24))


def test_links_are_measured_between_ranks() -> None:
    """In real processes over gloo; on GPUs the same calls run over NCCL."""
    for link, gather, hop in pool(2).run(rates_of_links):
        assert all(1e-3 < rate < 1e3 for rate in (link, gather))
        assert 0 <= hop < 1


def test_an_all_reduce_may_be_faster_than_other_collectives() -> None:
    card = CardRates(
        products=PeakFlops(bf16=7e14), memory_gb_s=3000, link_gb_s=480, gather_gb_s=240, hop_s=0.0
    )
    node = GroupShape(8, 8)
    both, one = (
        specified(HardwareConfig(device=Device.cuda, card=replace(card, gather_gb_s=gather)), Dtype.bf16)
        for gather in (240, None)
    )
    assert both is not None
    assert one is not None
    kinds: tuple[CollectiveKind, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")
    for kind in kinds:
        call, slower = Collective(kind, 2**30), 1 if kind == "all_reduce" else 2
        assert both.collective(call, node) == pytest.approx(slower * one.collective(call, node), rel=1e-3)
    seconds = [both.collective(Collective(kind, 2**30), node) for kind in kinds[:2]]
    assert seconds == pytest.approx([2 * 7 / 8 * 2**30 / 480e9, 7 / 8 * 2**30 / 240e9])


def test_ranks_of_an_all_to_all_send_other_bytes_to_every_node() -> None:
    """16 ranks on two nodes: 8 of the 15 parts that a rank sends leave its node. Of a gather, 1/8 would."""
    card = CardRates(products=PeakFlops(bf16=7e14), memory_gb_s=3000, link_gb_s=400, hop_s=0.0)
    hardware = HardwareConfig(device=Device.cuda, card=card, bandwidth_inter_node_gb_s=50.0)
    rates = specified(hardware, Dtype.bf16, Shares(link=1.0, hop_inter_s=0.0))
    assert rates is not None
    size, node = 2**30, [rank // 8 for rank in range(16)]
    links = [rates.gather if node[rank] == node[0] else rates.inter for rank in range(1, 16)]
    expected = sum(size / 16 / link for link in links)
    assert rates.collective(Collective("all_to_all", size), GroupShape(16, 8)) == pytest.approx(expected)


def test_without_a_rate_between_nodes_the_link_to_the_host_is_assumed() -> None:
    """Calibration measures one node. A network card is on the same bus as the host's link."""
    card = CardRates(products=PeakFlops(bf16=7e14), memory_gb_s=3000, link_gb_s=400, host_gb_s=50)
    for stated, expected in ((None, 50e9), (20.0, 20e9)):
        hardware = HardwareConfig(device=Device.cuda, card=card, bandwidth_inter_node_gb_s=stated)
        rates = specified(hardware, Dtype.bf16, Shares(link=1.0))
        assert rates is not None
        assert (rates.intra, rates.inter) == (400e9, expected)


def test_the_rate_of_large_products_leaves_out_the_time_to_write_their_result() -> None:
    rate, memory = 700e12, 3e12
    measured = []
    for n, k in SMALL.products:
        flops, written = 2 * 64 * n * k, 64 * n * 2 / memory
        measured.append(ProductRate(64, n, k, flops / (flops / rate + min(written, flops / rate))))
    small = ProductRate(16, 8, 64, 1e9)  # no large product, so it does not count
    assert large_rate([*measured, small], Dtype.bf16, SMALL, memory) == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize(("native", "expected"), [(True, Dtype.bf16), (False, Dtype.fp16)])
def test_a_gpu_that_emulates_bf16_is_measured_in_fp16(
    native: bool, expected: Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert half_dtype(torch.device("cuda", 0)) is expected
    assert half_dtype(torch.device("cpu")) is Dtype.bf16


def test_memory_beside_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70e9, 85e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 14e9)
    assert bytes_beside_allocator(torch.device("cuda", 0)) == 1e9


def test_a_plan_uses_what_the_probes_measured() -> None:
    card = card_rates(torch.device("cpu"), SMALL)
    again = card_of(json.loads(json.dumps(asdict(card))))
    assert again == card
    assert [rate.head_size for rate in card.attention] == [16, 32]
    shapes = card.shapes.bf16
    # Large, of few tokens, and of a weight's gradient: 64x64x64 is two of them.
    assert len(shapes) == 3 * (len(SMALL.products) + len(SMALL.skinny)) - 1
    assert {"64x128x32", "16x8x64", "128x32x64"} <= shapes.keys()
    assert not card.shapes.fp16  # a CPU multiplies in fp32 and bf16
    hardware = HardwareConfig(device=Device.cuda, accelerators_per_node=1, card=again)
    rates = specified(hardware, Dtype.bf16)
    assert rates is not None
    assert rates.flops == card.products.bf16
    assert rates.product(Matmul(4096, 4096, 4096)) > 0
    assert rates.attention(FusedAttention(1024, 32, 8, is_causal=True), 2) > 0
