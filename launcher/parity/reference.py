"""The independent reference: one process, plain torch functions and optimizers. No DeepSpeed, no mesh.

It computes in fp32; for a run in bf16 with the roundings of bf16 (parity/rounding.py) and master weights.

Shares only the names of weights with launcher/models. The parts, and the rule by which initial weights are
drawn, are written again here, from the papers and in the most obvious way, so that the comparison shows any
mistake in the layers.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from launcher.config.numbers import IGNORED_LABEL
from launcher.config.schema import (
    AttentionKind,
    CorpusSource,
    Dtype,
    InputKind,
    MLPKind,
    ModelConfig,
    NormKind,
    NormPlacement,
    OptimizerConfig,
    OptimizerName,
    Pooling,
    PositionKind,
    QueryKeyNorm,
    ResidualKind,
    RopeScalingKind,
    RouterKind,
    RunConfig,
    StatesDtype,
)
from launcher.config.shape import end_of_document, position_count, sequence_length, vision_tokens
from launcher.parity.rounding import BF16, EXACT, Arithmetic
from launcher.parity.routing import Routing
from launcher.parity.step_trace import StepTrace, Weights

GlobalBatch = tuple[
    Tensor, Tensor
]  # inputs and labels of a whole step: tokens (G, T) twice, or images and classes


LONG_SEQUENCE = 256


def initial_weights(run: RunConfig) -> Weights:
    """Return the initial weights by name, rounded to the run's dtype like DeepSpeed's masters."""
    dtype = torch.bfloat16 if run.precision.dtype is Dtype.bf16 else torch.float32
    weights = {}
    for name, (shape, std) in {**_all_weights(run.model), **_adapter_weights(run)}.items():
        if std:
            value = drawn_weight(run.training.seed, name, shape, std)
        else:
            value = torch.ones(shape) if name.endswith("norm.weight") else torch.zeros(shape)
        weights[name] = value.to(dtype).float()
    return weights


def drawn_weight(seed: int, name: str, shape: tuple[int, ...], std: float) -> Tensor:
    """Return a normally distributed tensor: blocks of 64 rows and 512 columns, or 32,768 of a vector."""
    whole = torch.empty(shape)
    blocks = {str(index): block for index, block in enumerate(whole.split(64 * 512))}
    if len(shape) == 2:
        rows = enumerate(whole.split(64))
        blocks = {f"{i}/{j}": block for i, row in rows for j, block in enumerate(row.split(512, dim=1))}
    for index, block in blocks.items():
        digest = hashlib.sha256(f"{seed}/{name}/{index}".encode()).hexdigest()
        generator = torch.Generator().manual_seed(int(digest[:16], 16) // 2)
        block.copy_(torch.empty(block.shape).normal_(0.0, std, generator=generator))
    return whole


def _all_weights(model: ModelConfig) -> dict[str, tuple[tuple[int, ...], float]]:
    """Return shape and standard deviation of each weight; 0 for norms and biases, which are not drawn."""
    h, std, biases = model.hidden_size, model.init_std, model.biases
    size, kv_heads = model.head_size or h // model.num_heads, model.num_kv_heads or model.num_heads
    queries, fused = model.num_heads * size, (model.num_heads + 2 * kv_heads) * size
    is_gated, placement = model.mlp in (MLPKind.swiglu, MLPKind.geglu), model.norm_placement
    first, width = ("gate_up", 2 * model.ffn_hidden_size) if is_gated else ("up", model.ffn_hidden_size)
    residual = std / (2 * model.num_layers) ** 0.5
    weights: dict[str, tuple[tuple[int, ...], float]] = {}

    def linear(name: str, outputs: int, inputs: int, deviation: float, has_bias: bool) -> None:
        weights[f"{name}.weight"] = (outputs, inputs), deviation
        if has_bias:
            weights[f"{name}.bias"] = (outputs,), 0.0

    def norm(name: str, exists: bool = True) -> None:
        kinds = ("weight", "bias") if model.norm is NormKind.layer_norm else ("weight",)
        weights.update({f"{name}.{kind}": ((h,), 0.0) for kind in kinds if exists})

    if model.inputs is InputKind.patches:
        linear("patches", h, model.image_channels * model.patch_size**2, std, has_bias=True)
        if model.pooling is Pooling.class_token:
            weights["patches.class_token"] = (h,), std
    else:
        linear("embedding", model.vocab_size, h, std, has_bias=False)
    if model.positions is PositionKind.learned:
        linear("positions", position_count(model), h, std, has_bias=False)
    for name in (f"blocks.{index}" for index in range(model.num_layers)):
        norm(f"{name}.attention_norm", placement is not NormPlacement.post)
        linear(f"{name}.attention.qkv", fused, h, std, biases.qkv)
        weights.update(_head_norm_weights(model, f"{name}.attention", queries, kv_heads * size))
        linear(f"{name}.attention.output", h, queries, residual, biases.output)
        norm(f"{name}.attention_output_norm", placement is not NormPlacement.pre)
        norm(f"{name}.mlp_norm", placement is not NormPlacement.post)
        weights |= _expert_weights(model, f"{name}.mlp", residual)
        if f"{name}.mlp.router.weight" not in weights:
            linear(f"{name}.mlp.{first}", width, h, std, biases.up)
            linear(f"{name}.mlp.down", h, model.ffn_hidden_size, residual, biases.down)
        norm(f"{name}.mlp_output_norm", placement is not NormPlacement.pre)
    norm("final_norm")
    if not model.tie_embeddings:
        outputs = model.num_classes if model.inputs is InputKind.patches else model.vocab_size
        linear("head", outputs, h, std, biases.head)
    return weights


def _head_norm_weights(
    model: ModelConfig, name: str, queries: int, keys: int
) -> dict[str, tuple[tuple[int, ...], float]]:
    """Return shape and deviation of the weights of query and key norms: one head long, or all heads."""
    if model.query_key_norm is QueryKeyNorm.none:
        return {}
    if model.query_key_norm is QueryKeyNorm.head:
        queries = keys = model.head_size or model.hidden_size // model.num_heads
    return {f"{name}.query_norm.weight": ((queries,), 0.0), f"{name}.key_norm.weight": ((keys,), 0.0)}


def _has_experts(model: ModelConfig, layer: int) -> bool:
    """Return whether a layer has experts: after the first dense layers the n-th, the 2n-th, and so on."""
    e = model.experts
    sparse = range(e.first_dense_layers + e.every - 1, model.num_layers, e.every)
    return e.count > 0 and layer in sparse


def _expert_weights(
    model: ModelConfig, name: str, residual: float
) -> dict[str, tuple[tuple[int, ...], float]]:
    """Return shape and standard deviation of the weights of router, experts and shared experts of a layer."""
    e, h, std = model.experts, model.hidden_size, model.init_std
    if not _has_experts(model, int(name.split(".")[1])):
        return {}
    f, is_gated = e.ffn_hidden_size, model.mlp in (MLPKind.swiglu, MLPKind.geglu)
    first, width = ("gate_up", 2 * f) if is_gated else ("up", f)
    weights: dict[str, tuple[tuple[int, ...], float]] = {
        f"{name}.router.weight": ((e.count, h), std),
        f"{name}.experts.{first}.weight": ((e.count * width, h), std),
        f"{name}.experts.down.weight": ((e.count * h, f), residual),
    }
    if e.shared:
        weights[f"{name}.shared.{first}.weight"] = (e.shared * width, h), std
        weights[f"{name}.shared.down.weight"] = (h, e.shared * f), residual
    return weights


def _adapter_weights(run: RunConfig) -> dict[str, tuple[tuple[int, ...], float]]:
    """Return shape and standard deviation of the matrices A and B of all adapters (LoRA)."""
    rank = run.finetune.lora.rank or 0
    weights: dict[str, tuple[tuple[int, ...], float]] = {}
    for name, (inputs, segments) in _adapted(run).items():
        weights[f"{name}.lora_a"] = (len(segments) * rank, inputs), (3 * inputs) ** -0.5
        weights[f"{name}.lora_b"] = (sum(segments), rank), 0.0
    return weights


def _adapted(run: RunConfig) -> dict[str, tuple[int, list[int]]]:
    """Return inputs and segments of each projection with adapters: one adapter for each segment."""
    model, lora = run.model, run.finetune.lora
    h, f = model.hidden_size, model.ffn_hidden_size
    size = model.head_size or h // model.num_heads
    queries, keys = model.num_heads * size, (model.num_kv_heads or model.num_heads) * size
    is_gated = model.mlp in (MLPKind.swiglu, MLPKind.geglu)
    projections = {
        "qkv": ("attention.qkv", h, [queries, keys, keys]),
        "output": ("attention.output", queries, [h]),
        "up": ("mlp.gate_up", h, [f, f]) if is_gated else ("mlp.up", h, [f]),
        "down": ("mlp.down", f, [h]),
    }
    used = [projections[target] for target in lora.targets if lora.rank]
    return {
        f"blocks.{layer}.{name}": (inputs, segments)
        for layer in range(model.num_layers)
        for name, inputs, segments in used
    }


def with_adapters(run: RunConfig, parameters: Weights, a: Arithmetic = EXACT) -> Weights:
    """Return the weights as layers read them, and the adapters of a projection NAME.

    Exact: as NAME.delta, the product alpha / rank * B A. Rounded: as NAME.lora_a.0, NAME.lora_b.0 and so on
    for each segment, and NAME.lora_scale, because layers write A x and B A x.
    """
    lora, used = run.finetune.lora, {name: a.rounded(tensor) for name, tensor in parameters.items()}
    if not lora.rank:
        return used
    for name, (_, segments) in _adapted(run).items():
        rows = used[f"{name}.lora_b"].split(segments)
        columns = used[f"{name}.lora_a"].split(lora.rank)
        if a.is_rounded:
            used |= {f"{name}.lora_a.{i}": part for i, part in enumerate(columns)}
            used |= {f"{name}.lora_b.{i}": part for i, part in enumerate(rows)}
            used[f"{name}.lora_scale"] = torch.tensor(lora.alpha / lora.rank)
            continue
        products = [row @ column for row, column in zip(rows, columns, strict=True)]
        used[f"{name}.delta"] = torch.cat(products) * (lora.alpha / lora.rank)
    return used


def _is_trained(run: RunConfig, name: str) -> bool:
    return not run.finetune.lora.rank or name.endswith((".lora_a", ".lora_b"))


def arithmetic_of(run: RunConfig) -> Arithmetic:
    """Return the arithmetic of a run in its precision."""
    if run.precision.dtype is not Dtype.bf16:
        return EXACT
    fuses_rows = run.parallelism.tensor == 1 and not run.training.compile
    return replace(BF16, gradients_in_bf16=adds_in_bf16(run), fuses_rows=fuses_rows)


def adds_in_bf16(run: RunConfig) -> bool:
    """Return whether the gradients of micro-batches and data ranks are added in bf16."""
    return run.precision.states is StatesDtype.bf16


def sends_bf16(run: RunConfig) -> bool:
    """Return whether a data rank rounds its gradients to bf16 before they are added to those of others."""
    return bool(run.deepspeed.get("communication_data_type", "bf16") == "bf16")


def reference_trace(
    run: RunConfig,
    weights: Weights,
    batches: list[GlobalBatch],
    follow: list[StepTrace] | None = None,
    arithmetic: Arithmetic = EXACT,
    rates: list[float] | None = None,
) -> list[StepTrace]:
    """Train from `weights` and return the trace of every step.

    With `follow`, each step starts from the weights and optimizer states of that trace, and its tokens run
    through the experts that they chose there. `rates` are the learning rates by step. `batch_losses` holds
    the loss of each sample: [[loss of sample 0, ...]]. Exact arithmetic takes each global batch in one piece;
    rounded arithmetic takes micro-batches, whose gradients are rounded.
    """
    parameters = {
        name: tensor.clone().requires_grad_(_is_trained(run, name)) for name, tensor in weights.items()
    }
    trained = {name: tensor for name, tensor in parameters.items() if tensor.requires_grad}
    optimizer = _optimizer(run.optimizer, trained)
    steps = [StepTrace(weights={name: tensor.clone() for name, tensor in weights.items()})]
    routing = Routing(run.model)
    for number, batch in enumerate(batches):
        if follow is not None:
            _start_from(follow[number], parameters, optimizer, number)
        for group in optimizer.param_groups:
            group["lr"] = run.optimizer.lr if rates is None else rates[number]
        routing.begin_step({} if follow is None else follow[number + 1].choices)
        steps.append(_step(run, parameters, optimizer, batch, arithmetic, routing))
        steps[-1].scores = routing.scores()
        steps[-1].states |= routing.balance()
        steps[-1].rate = None if rates is None else rates[number]
    return steps


@torch.no_grad()
def _start_from(
    before: StepTrace, parameters: Weights, optimizer: torch.optim.Optimizer, updates: int
) -> None:
    """Copy weights and optimizer states after `updates` updates; leave out tensors of another shape."""
    for name, tensor in parameters.items():
        if name in before.weights and before.weights[name].shape == tensor.shape:
            tensor.copy_(before.weights[name])
        states = {
            key.removeprefix(f"{name}."): state.clone()
            for key, state in before.states.items()
            if key.rpartition(".")[0] == name and state.shape == tensor.shape
        }
        if states:
            optimizer.state[tensor] = {"step": torch.tensor(float(updates)), **states}


def _step(
    run: RunConfig,
    parameters: Weights,
    optimizer: torch.optim.Optimizer,
    batch: GlobalBatch,
    a: Arithmetic,
    routing: Routing,
) -> StepTrace:
    inputs, labels = batch
    counted = int((labels != IGNORED_LABEL).sum())
    # Long samples one by one: the graph of a batch would keep the scores of all their positions.
    is_long = sequence_length(run) > LONG_SEQUENCE
    size = run.training.micro_batch_size if a.is_rounded or is_long else len(inputs)
    outputs: list[Weights] = []
    losses: list[Tensor] = []
    gradients: list[Weights] = []
    for rows in zip(inputs.split(size), labels.split(size), strict=True):
        outputs.append({})
        routing.begin_micro_batch(size * len(losses))
        of_batch, of_weights = _backward(run, parameters, rows, counted, outputs[-1], a, routing)
        losses.append(of_batch)
        gradients.append(of_weights)
    # Each sample's part of the mean over all labels that count, so that the mean of the parts is the loss.
    all_losses = torch.cat(losses) * len(labels) / counted
    data = (run.parallelism.data or 1) if a.is_rounded else 1
    sums = data if sends_bf16(run) else 1
    total = {name: a.total([each[name] for each in gradients], sums) / data for name in parameters}
    for name, tensor in parameters.items():
        tensor.grad = total[name].clone() if tensor.requires_grad else None
    limit = run.optimizer.gradient_clipping or float("inf")
    trained = [tensor for tensor in parameters.values() if tensor.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(trained, limit)
    optimizer.step()
    return StepTrace(
        loss=all_losses.mean().item(),
        grad_norm=norm.item(),
        weights={name: tensor.detach().clone() for name, tensor in parameters.items()},
        states={
            f"{name}.{key}": state.clone()
            for name, tensor in parameters.items()
            for key, state in optimizer.state.get(tensor, {}).items()
            if isinstance(state, Tensor) and state.shape == tensor.shape
        },
        gradients=total,
        outputs={name: x[: run.training.micro_batch_size].detach().clone() for name, x in outputs[0].items()},
        batch_losses=[all_losses.tolist()],
    )


@torch.no_grad()
def mean_loss(run: RunConfig, weights: Weights, biases: Weights, batch: GlobalBatch, a: Arithmetic) -> float:
    """Return the mean loss over the labels of a batch that count, without dropout.

    `biases` are those for the choice of experts, by router.
    """
    (inputs, labels), used, routing = batch, with_adapters(run, weights, a), Routing(run.model, biases)
    logits = forward(used, run.model, inputs, {}, documents(run, inputs), a, routing=routing)
    return float(F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED_LABEL))


def _backward(
    run: RunConfig, parameters: Weights, batch: GlobalBatch, counted: int, outputs: Weights, a: Arithmetic,
    routing: Routing,
) -> tuple[Tensor, Weights]:  # fmt: skip
    """Return the loss of each sample, summed over its labels, and the gradients of the loss.

    Exact arithmetic: gradients of the mean over the labels of the global batch that count. Rounded: gradients
    of the mean over the micro-batches of a data rank; the caller averages them over the data ranks.
    """
    inputs, labels = batch
    used = with_adapters(run, parameters, a)
    factor = (run.parallelism.data or 1) / counted
    logits = forward(used, run.model, inputs, outputs, documents(run, inputs), a, factor, routing)
    losses = F.cross_entropy(
        logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED_LABEL
    ).sum(1)
    # Rounded arithmetic: the head rounds the gradients of the sum, and then multiplies them by `factor`.
    total = losses.sum() if a.is_rounded else losses.sum() / counted
    share = len(inputs) / run.training.global_batch_size
    share *= (run.parallelism.data or 1) if a.is_rounded else 1
    total = sum((share * loss for loss in routing.losses), total)
    trained = {name: tensor for name, tensor in parameters.items() if tensor.requires_grad}
    computed = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    gradients = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    gradients |= {n: g for n, g in zip(trained, computed, strict=True) if g is not None}
    return losses.detach(), gradients


def _optimizer(config: OptimizerConfig, parameters: Weights) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters.values() if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    if config.name is OptimizerName.sgd:
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum or 0.0)
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.epsilon)  # type: ignore[arg-type]


Spans = list[list[tuple[int, int]]]  # per sample, the (start, stop) of each document


def documents(run: RunConfig, tokens: Tensor) -> Spans:
    """Return the spans within which positions see each other: documents, or whole samples, of (B, T)."""
    if run.model.inputs is InputKind.patches:
        return [[(0, vision_tokens(run.model))]] * len(tokens)
    spans: Spans = []
    for sample in tokens.tolist():
        ends = [i + 1 for i, token in enumerate(sample) if token == end_of_document(run)]
        ends = ends if run.data.document_attention else []
        spans.append(list(pairwise(sorted({0, *ends, len(sample)}))))
    return spans


def forward(
    w: Weights,
    model: ModelConfig,
    inputs: Tensor,
    outputs: Weights,
    spans: Spans,
    a: Arithmetic = EXACT,
    factor: float = 1.0,
    routing: Routing | None = None,
) -> Tensor:
    """Return the logits (B, T, V) of tokens (B, T), or (B, 1, classes) of images.

    Each layer's output is written into `outputs`, scores and losses of each router into `routing`. `spans`
    are the documents, which run one by one. In rounded arithmetic `factor` multiplies the head's gradients.
    """
    routing = Routing(model) if routing is None else routing
    if model.inputs is InputKind.patches:
        x = outputs["patches"] = _patches(w, model, inputs, a)
    else:
        scale = float(a.value(torch.tensor(model.embedding_scale)))
        x = outputs["embedding"] = a.rounded(a.gradient(w["embedding.weight"][inputs]) * scale)
    if model.positions is PositionKind.learned:
        places = [torch.cat([torch.arange(end - start) for start, end in sample]) for sample in spans]
        x = outputs["positions"] = a.rounded(x + w["positions.weight"][torch.stack(places)])
    for index in range(model.num_layers):
        x = _block(w, index, model, x, outputs, spans, a, routing)
    x = _norm(w, "final_norm", model, x, outputs, a)
    if model.inputs is InputKind.patches:
        x = x[:, :1] if model.pooling is Pooling.class_token else a.rounded(x.mean(1, keepdim=True))
    logits = outputs["head"] = _head(w, model, x, a, factor)
    return logits


def _head(w: Weights, model: ModelConfig, x: Tensor, a: Arithmetic, factor: float) -> Tensor:
    weight = a.scaled(w["embedding.weight" if model.tie_embeddings else "head.weight"], factor)
    bias = a.scaled(w["head.bias"], factor) if model.biases.head else None
    logits = a.with_bias(a.scaled(x, factor), weight, bias, splits_inputs=False)
    if model.logit_soft_cap is not None:
        logits = _soft_capped(logits, model.logit_soft_cap, a)
    return logits


def _soft_capped(x: Tensor, cap: float, a: Arithmetic) -> Tensor:
    return a.rounded(cap * a.rounded(torch.tanh(a.rounded(x / cap))))


def _block(
    w: Weights, index: int, model: ModelConfig, x: Tensor, outputs: Weights, spans: Spans, a: Arithmetic,
    routing: Routing,
) -> Tensor:  # fmt: skip
    name, before = f"blocks.{index}", model.norm_placement in (NormPlacement.pre, NormPlacement.sandwich)
    after = model.norm_placement in (NormPlacement.post, NormPlacement.sandwich)
    every = model.full_attention_every
    is_local = model.sliding_window is not None and (every is None or index % every != every - 1)

    def attention(x: Tensor) -> Tensor:
        y = _norm(w, f"{name}.attention_norm", model, x, outputs, a) if before else x
        y = _attention(w, f"{name}.attention", model, y, outputs, spans, is_local, a)
        return _norm(w, f"{name}.attention_output_norm", model, y, outputs, a) if after else y

    def mlp(x: Tensor) -> Tensor:
        y = _norm(w, f"{name}.mlp_norm", model, x, outputs, a) if before else x
        if _has_experts(model, index):
            y = _experts(w, f"{name}.mlp", model, y, outputs, routing, a)
        else:
            y = _mlp(w, f"{name}.mlp", model, y, outputs, a)
        return _norm(w, f"{name}.mlp_output_norm", model, y, outputs, a) if after else y

    if model.residual is ResidualKind.parallel:
        return a.rounded(a.rounded(x + attention(x)) + mlp(x))
    x = a.rounded(x + attention(x))
    return a.rounded(x + mlp(x))


def _patches(w: Weights, model: ModelConfig, images: Tensor, a: Arithmetic) -> Tensor:
    """Return the convolution with the patch size as its stride, (B, T, H)."""
    size = model.patch_size
    kernel = w["patches.weight"].view(-1, model.image_channels, size, size)
    pixels = a.value(a.value(images.float() / 127.5) - 1)
    x = F.conv2d(pixels, kernel, stride=size).flatten(2).transpose(1, 2)
    x = a.rounded((x if a.fused else a.rounded(x)) + w["patches.bias"])
    if model.pooling is Pooling.mean:
        return x
    return torch.cat([w["patches.class_token"].expand(len(x), 1, -1), x], dim=1)


def _linear(w: Weights, name: str, x: Tensor, has_bias: bool, outputs: Weights, a: Arithmetic) -> Tensor:
    splits_inputs = name.endswith((".output", ".down"))  # as tensor ranks do
    bias = w[f"{name}.bias"] if has_bias else None
    outputs[name] = a.with_bias(x, w[f"{name}.weight"], bias, splits_inputs=splits_inputs)
    # The layout records the output of the projection and adds that of the adapter afterwards.
    if f"{name}.delta" in w:
        return outputs[name] + x @ w[f"{name}.delta"].T
    if f"{name}.lora_scale" in w:
        return a.rounded(outputs[name] + _adapter(w, name, x, a, splits_inputs))
    return outputs[name]


def _adapter(w: Weights, name: str, x: Tensor, a: Arithmetic, splits_inputs: bool) -> Tensor:
    """Return alpha / rank * B A x, of which each product is rounded."""
    pieces: list[Tensor] = []
    while f"{name}.lora_a.{len(pieces)}" in w:
        index = len(pieces)
        low = a.product(x, w[f"{name}.lora_a.{index}"], splits_inputs=splits_inputs)
        low = a.rounded(low * w[f"{name}.lora_scale"])
        pieces.append(a.product(low, w[f"{name}.lora_b.{index}"]))
    return torch.cat(pieces, -1)


def _norm(w: Weights, name: str, model: ModelConfig, x: Tensor, outputs: Weights, a: Arithmetic) -> Tensor:
    weight = w[f"{name}.weight"]
    if model.norm is NormKind.layer_norm:
        outputs[name] = a.layer_norm(x, weight, w[f"{name}.bias"], model.norm_epsilon)
    else:
        x = a.rounded(x)
        y = x / (x.square().mean(-1, keepdim=True) + model.norm_epsilon).sqrt() * weight
        outputs[name] = a.rounded(y)
    return outputs[name]


def _attention(
    w: Weights, name: str, model: ModelConfig, x: Tensor, outputs: Weights, spans: Spans, is_local: bool,
    a: Arithmetic,
) -> Tensor:  # fmt: skip
    fused = _linear(w, f"{name}.qkv", x, model.biases.qkv, outputs, a)
    heads, kv_heads = model.num_heads, model.num_kv_heads or model.num_heads
    size = model.head_size or model.hidden_size // heads
    parts = fused.split([heads * size, kv_heads * size, kv_heads * size], dim=-1)
    q, k, v = (part.unflatten(-1, (-1, size)).transpose(1, 2) for part in parts)
    if model.query_key_norm is not QueryKeyNorm.none:
        q = _head_norm(q, w[f"{name}.query_norm.weight"], model, a)
        k = _head_norm(k, w[f"{name}.key_norm.weight"], model, a)
    mixed = [
        torch.cat(
            [_mixed(model, q[i, :, m:n], k[i, :, m:n], v[i, :, m:n], is_local, a) for m, n in documents]
        )
        for i, documents in enumerate(spans)
    ]
    return _linear(w, f"{name}.output", torch.stack(mixed), model.biases.output, outputs, a)


def _head_norm(x: Tensor, weight: Tensor, model: ModelConfig, a: Arithmetic) -> Tensor:
    """Return x (B, heads, T, D) divided by its root mean square, over each head or over all heads."""
    dims = -1 if model.query_key_norm is QueryKeyNorm.head else (1, 3)
    x = a.rounded(x)
    y = x / (x.square().mean(dims, keepdim=True) + model.norm_epsilon).sqrt()
    if model.query_key_norm is QueryKeyNorm.projection and not a.fused:
        y = a.rounded(y)
    return a.rounded(y * weight.view(-1, 1, x.shape[-1]))


def _mixed(model: ModelConfig, q: Tensor, k: Tensor, v: Tensor, is_local: bool, a: Arithmetic) -> Tensor:
    """Return attention (T, N D) of queries (N, T, D) to keys and values (K, T, D) of a whole document."""
    heads, length, size = q.shape
    if model.positions is PositionKind.rope:
        q, k = _rotated(q, model, is_local, a), _rotated(k, model, is_local, a)
    k, v = (a.rounded(t).repeat_interleave(heads // len(k), dim=0) for t in (k, v))
    scores = a.rounded(q) @ k.transpose(1, 2)
    scale = (model.attention_scale_size or size) ** -0.5
    if model.attention_soft_cap is not None:
        scores = _soft_capped(a.rounded(a.rounded(scores) * scale), model.attention_soft_cap, a)
    else:
        scores = scores * scale
    distance = torch.arange(length)[:, None] - torch.arange(length)
    if model.attention is AttentionKind.causal:
        scores = scores.masked_fill(distance < 0, float("-inf"))
    if is_local:
        assert model.sliding_window is not None
        scores = scores.masked_fill(distance >= model.sliding_window, float("-inf"))
    if model.attention_soft_cap is not None:
        mixed = a.rounded(a.rounded(scores.softmax(-1)) @ v)
    else:
        mixed = a.mixed(scores, v)
    return mixed.transpose(0, 1).flatten(1)


def _rotated(x: Tensor, model: ModelConfig, is_local: bool, a: Arithmetic) -> Tensor:
    """Rotate each pair (x_i, x_{i + R/2}) of the first R channels like a complex number.

    The angle at position t is t theta^(-2i/R), or less if positions are scaled.
    """
    length, size = x.shape[-2:]
    rotated = int(size * model.rotary_fraction)
    real, imaginary = x[..., : rotated // 2], x[..., rotated // 2 : rotated]
    is_scaled = not (is_local and model.local_rope_theta is not None)
    theta = model.rope_theta if is_scaled or model.local_rope_theta is None else model.local_rope_theta
    angles, factor = [], 1.0
    for pair in range(rotated // 2):
        frequency = theta ** (-2 * pair / rotated)
        if is_scaled:
            frequency, factor = _scaled(frequency, pair, rotated, model)
        angles.append(torch.arange(length, dtype=torch.float32) * frequency)
    turns = torch.stack(angles, dim=-1)
    turned = torch.polar(torch.full_like(turns, factor), turns)
    cos, sin = a.value(turned.real), a.value(turned.imag)
    pairs = (real, -imaginary), (imaginary, real)
    pieces = [a.rounded(a.rounded(x * cos) + a.rounded(y * sin)) for x, y in pairs]
    return torch.cat([*pieces, x[..., rotated:]], dim=-1)


def _scaled(frequency: float, pair: int, rotated: int, model: ModelConfig) -> tuple[float, float]:
    """Return a frequency after scaling, and the factor of the rotated channels."""
    s = model.rope_scaling
    if s.kind is RopeScalingKind.none:
        return frequency, 1.0
    if s.kind is RopeScalingKind.linear:
        return frequency / s.factor, 1.0
    assert s.original_length is not None
    if s.kind is RopeScalingKind.llama3:
        wavelength = 2 * math.pi / frequency
        if wavelength < s.original_length / s.high_frequency_factor:
            return frequency, 1.0
        if wavelength > s.original_length / s.low_frequency_factor:
            return frequency / s.factor, 1.0
        smooth = s.original_length / wavelength - s.low_frequency_factor
        smooth /= s.high_frequency_factor - s.low_frequency_factor
        return (1 - smooth) * frequency / s.factor + smooth * frequency, 1.0
    # YaRN (arXiv 2309.00071): a ramp between the pairs that turn beta_fast and beta_slow times.
    low, high = (
        rotated * math.log(s.original_length / (2 * math.pi * beta)) / (2 * math.log(model.rope_theta))
        for beta in (s.beta_fast, s.beta_slow)
    )
    low, high = max(math.floor(low), 0), min(math.ceil(high), rotated - 1)
    ramp = min(max((pair - low) / ((high - low) or 0.001), 0.0), 1.0)
    factor = 0.1 * math.log(s.factor) + 1 if s.attention_factor is None else s.attention_factor
    return frequency / s.factor * ramp + frequency * (1 - ramp), factor


def _mlp(w: Weights, name: str, model: ModelConfig, x: Tensor, outputs: Weights, a: Arithmetic) -> Tensor:
    if model.mlp in (MLPKind.swiglu, MLPKind.geglu):
        gate, up = _linear(w, f"{name}.gate_up", x, model.biases.up, outputs, a).chunk(2, dim=-1)
        gate = a.rounded(gate)
        opened = gate * torch.sigmoid(gate) if model.mlp is MLPKind.swiglu else _gelu(gate)
        activated = a.rounded(a.rounded(opened) * a.rounded(up))
    else:
        y = a.rounded(_linear(w, f"{name}.up", x, model.biases.up, outputs, a))
        activated = y * (1 + torch.erf(y / 2**0.5)) / 2 if model.mlp is MLPKind.gelu_erf else _gelu(y)
        activated = a.rounded(activated)
    return _linear(w, f"{name}.down", activated, model.biases.down, outputs, a)


def _experts(
    w: Weights, name: str, model: ModelConfig, x: Tensor, outputs: Weights, routing: Routing, a: Arithmetic
) -> Tensor:
    """Run every token (B, T, H) through every expert, one expert after the other, and weight the results.

    All weights of a token are 0 except those of the k experts that it chooses. The router computes in fp32.
    """
    e = model.experts
    logits = a.gradient(x) @ w[f"{name}.router.weight"].T
    scores = logits.softmax(-1) if e.router is RouterKind.softmax else 1 / (1 + torch.exp(-logits))
    chosen = routing.choose(f"{name}.router", scores)
    routing.add_losses(logits, scores, chosen)
    weights = scores * chosen
    if e.normalize_top_k:
        weights = weights / weights.sum(-1, keepdim=True)
    weights = a.rounded(e.scaling * weights)
    first = "gate_up" if f"{name}.experts.gate_up.weight" in w else "up"
    ups = w[f"{name}.experts.{first}.weight"].chunk(e.count)
    downs = w[f"{name}.experts.down.weight"].chunk(e.count)
    total, rows = torch.zeros_like(x), a.gradient(x)
    for expert in range(e.count):
        mlp = {f"{name}.{first}.weight": ups[expert], f"{name}.down.weight": downs[expert]}
        total = total + weights[..., expert, None] * _mlp(mlp, name, model, rows, {}, a)
    total = a.rounded(total)
    return a.rounded(total + _mlp(w, f"{name}.shared", model, x, outputs, a)) if e.shared else total


def _gelu(y: Tensor) -> Tensor:
    """Return the tanh form of GELU (Hendrycks & Gimpel, arXiv 1606.08415)."""
    return 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))


def probe_batches(run: RunConfig) -> Iterator[GlobalBatch]:
    """Yield a random global batch per step of verify, as a function of the seed.

    In batches of conversations only some labels count. If attention stops at documents, about every fourth
    token ends a document.
    """
    generator = torch.Generator().manual_seed(run.training.seed)
    size, m = run.training.global_batch_size, run.model
    shape = size, sequence_length(run) + 1
    for _ in range(run.verify.steps):
        if m.inputs is InputKind.patches:
            pixels = size, m.image_channels, m.image_size, m.image_size
            images = torch.randint(256, pixels, generator=generator, dtype=torch.uint8)
            yield images, torch.randint(m.num_classes, (size, 1), generator=generator)
            continue
        tokens = torch.randint(run.model.vocab_size, shape, generator=generator)
        if run.data.document_attention:
            end = end_of_document(run)
            assert end is not None
            tokens[torch.rand(shape, generator=generator) < 0.25] = end
        labels = tokens[:, 1:].clone()
        if run.data.source is CorpusSource.chat:
            # Samples have unequal shares of labels that count, so that a mean of means differs from the mean.
            shares = torch.linspace(0.1, 0.9, size)[:, None]
            labels[torch.rand(labels.shape, generator=generator) < shares] = IGNORED_LABEL
        yield tokens[:, :-1], labels
