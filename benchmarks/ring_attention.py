"""Compare the ring's attention with torch's fused attention on one device: time and error.

`python -m benchmarks.ring_attention` needs one GPU; `--device cpu --length 512 --dtype fp32` needs none. One
process computes the attention of all context ranks, rank after rank, with the functions of a run and
without the sends. Both sides compute the same scores, so the ratio of the times is the cost of computing in
pairs of chunks. The errors are relative to attention in fp32, in the norm over all elements.

Shapes: B samples, T sequence, C context ranks, N query and K key/value heads, D head size.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.arguments import at_least_one
from launcher.calibrate.probes import finish
from launcher.config.schema import ContextMethod, Dtype
from launcher.models.attention_kernel import Kernel, attend
from launcher.models.context_attention import ContextSettings, Queries, QueryGradients, Rules
from launcher.parallel.context import ContextParallel
from launcher.parallel.dtypes import TORCH_DTYPES
from launcher.parallel.mesh import Axis

HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 128  # as Llama 3 8B
RANKS = (2, 4, 8)
NAMES = ("result", "queries", "keys", "values")


class Inputs(NamedTuple):
    """Queries (B, T, N, D), keys and values (B, T, K, D), the gradient of the result (B, T, N, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    gradient: Tensor


class Results(NamedTuple):
    """The result (B, T, N, D), and the gradients of queries, keys and values."""

    mixed: Tensor
    of_q: Tensor
    of_k: Tensor
    of_v: Tensor


class Part(NamedTuple):
    """A context rank with its part of each tensor."""

    context: ContextParallel
    rules: Rules
    q: Tensor
    keys_values: Tensor  # (2, B, T/C, K, D)
    gradient: Tensor


def draw(length: int, dtype: torch.dtype, device: str, heads: int, kv_heads: int, size: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    return Inputs(
        *(
            torch.randn(1, length, count, size, generator=generator, device=device).to(dtype)
            for count in (heads, kv_heads, kv_heads, heads)
        )
    )


def parts_of(inputs: Inputs, ranks: int, first: Tensor | None = None) -> list[Part]:
    """Return the parts of all ranks; `first` (1, T) is the first position that each query sees."""
    device, parts = inputs.q.device, []
    for rank in range(ranks):
        context = ContextParallel(Axis(rank, ranks), ContextMethod.ring)
        places = context.positions(inputs.q.shape[1], device)
        settings = ContextSettings(ContextMethod.ring.name, rank, ranks, "", None, None, device.type, 0.0)
        rules = Rules(settings, None if first is None else first[:, places], None)
        keys_values = torch.stack([inputs.k[:, places], inputs.v[:, places]])
        parts.append(Part(context, rules, inputs.q[:, places], keys_values, inputs.gradient[:, places]))
    return parts


@torch.no_grad()
def ring(parts: list[Part]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return for each rank its result, and the gradients of its queries and of its keys and values (fp32)."""
    totals = [torch.zeros_like(part.keys_values, dtype=torch.float32) for part in parts]
    ranks, results = len(parts), []
    for rank, part in enumerate(parts):
        chunks = part.context.chunks_of(rank)
        visited = [(rank - step) % ranks for step in range(ranks)]
        queries = Queries(part.q, chunks, part.rules)
        for other in visited:
            queries.attend(part.context.chunks_of(other), parts[other].keys_values)
        mixed, sums = queries.result()
        of_queries = QueryGradients(part.gradient, part.q, mixed, sums, chunks, part.rules)
        for other in visited:
            of_queries.add(part.context.chunks_of(other), parts[other].keys_values, totals[other])
        results.append((mixed, of_queries.result()))
    return [(*result, total) for result, total in zip(results, totals, strict=True)]


def joined(parts: list[Part], results: list[tuple[Tensor, Tensor, Tensor]]) -> Results:
    """Return the results of all ranks as whole sequences."""
    context = parts[0].context
    mixed, of_q = (context.in_order(torch.stack([each[i] for each in results]), 1) for i in (0, 1))
    of_k, of_v = context.in_order(torch.stack([each[2] for each in results]), 2)
    return Results(mixed, of_q, of_k, of_v)


def fused(inputs: Inputs) -> Results:
    """Return torch's causal attention of whole sequences, forward and backward, as a run without context."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    kernel = Kernel(True, None, None, inputs.q.device.type)
    mixed = attend(leaves[0], leaves[1], leaves[2], None, 0.0, kernel)
    return Results(mixed.detach(), *torch.autograd.grad(mixed, leaves, inputs.gradient))


def exact(inputs: Inputs) -> Results:
    """Return causal attention in fp32 of the same numbers; keys and values are copied for each query head."""
    groups = inputs.q.shape[2] // inputs.k.shape[2]
    leaves = [x.detach().float().requires_grad_() for x in inputs[:3]]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    return Results(mixed.detach(), *torch.autograd.grad(mixed, leaves, inputs.gradient.float()))


def errors(results: Results, right: Results) -> dict[str, float]:
    """Return the relative error of each tensor."""
    return {
        name: float((got.float() - expected).norm() / expected.norm())
        for name, got, expected in zip(NAMES, results, right, strict=True)
    }


def seconds(contestants: list[Callable[[], object]], rounds: int, device: torch.device) -> list[float]:
    """Return the median time of each contestant; they take turns, and the first round does not count."""
    times: list[list[float]] = [[] for _ in contestants]
    for _ in range(rounds + 1):
        for taken, contestant in zip(times, contestants, strict=True):
            finish(device)
            started = time.perf_counter()
            contestant()
            finish(device)
            taken.append(time.perf_counter() - started)
    return [median(taken[1:]) for taken in times]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ring_attention", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=[dtype.name for dtype in Dtype], default="bf16")
    parser.add_argument("--length", type=at_least_one, default=32768, help="tokens of the sequence")
    parser.add_argument("--rounds", type=at_least_one, default=20)
    options = parser.parse_args(arguments)
    device, dtype = options.device, TORCH_DTYPES[Dtype[options.dtype]]
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; try: --device cpu --length 512 --dtype fp32")
    inputs = draw(options.length, dtype, device, HEADS, KV_HEADS, HEAD_SIZE)
    right = exact(inputs)
    of_torch = errors(fused(inputs), right)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    heads = f"{HEADS} query and {KV_HEADS} key/value heads of {HEAD_SIZE}"
    print(f"{options.length:,} tokens, {heads}, {options.dtype}, {name}, torch {torch.__version__}\n")
    print("| context ranks | ring, ms | torch, ms | ratio | " + " | ".join(NAMES) + " |")
    print("|---|---|---|---|" + "---|" * len(NAMES))
    for ranks in RANKS:
        parts = parts_of(inputs, ranks)
        of_ring = errors(joined(parts, ring(parts)), right)
        contestants: list[Callable[[], object]] = [partial(ring, parts), partial(fused, inputs)]
        ours, theirs = seconds(contestants, options.rounds, inputs.q.device)
        cells = [f"{of_ring[name]:.1e} (torch {of_torch[name]:.1e})" for name in NAMES]
        row = [str(ranks), f"{ours * 1e3:.2f}", f"{theirs * 1e3:.2f}", f"{ours / theirs:.3f}", *cells]
        print(f"| {' | '.join(row)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
