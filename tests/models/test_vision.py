"""The Vision Transformer against transformers from the same weights, and over tensor ranks."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from launcher.config.schema import ModelConfig, Pooling
from launcher.models.losses import ClassificationLoss
from launcher.parallel.cross_entropy import vocab_parallel_hits
from launcher.parallel.mesh import Axis
from launcher.parallel.sharding import logical_of, merge
from tests.distributed import mesh, pool
from tests.models.small import build, by_name, gradients, images_of, relative_error, small_vit

Weights = dict[str, Tensor]


def theirs_of(model: ModelConfig) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        intermediate_size=model.ffn_hidden_size,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=model.norm_epsilon,
        image_size=model.image_size,
        patch_size=model.patch_size,
        num_channels=model.image_channels,
        num_labels=model.num_classes,
    )
    torch.manual_seed(5)
    found = ViTForImageClassification(config)
    with torch.no_grad():
        for parameter in found.parameters():  # theirs begins biases and tokens with zeros
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return found.eval()


def ours_of(theirs: Weights, layers: int) -> Weights:
    """Return the tensors of transformers as ours, by order: names of layers differ between versions."""
    kernel = theirs["vit.embeddings.patch_embeddings.projection.weight"]
    ours = {
        "patches.weight": kernel.flatten(1),
        "patches.bias": theirs["vit.embeddings.patch_embeddings.projection.bias"],
        "patches.class_token": theirs["vit.embeddings.cls_token"].flatten(),
        "positions.weight": theirs["vit.embeddings.position_embeddings"][0],
        "final_norm.weight": theirs["vit.layernorm.weight"],
        "final_norm.bias": theirs["vit.layernorm.bias"],
        "head.weight": theirs["classifier.weight"],
        "head.bias": theirs["classifier.bias"],
    }
    for index in range(layers):
        own = {n: t for n, t in theirs.items() if f".{index}." in n}
        for kind in ("weight", "bias"):

            def one(*parts: str, kind: str = kind, own: Weights = own) -> Tensor:
                names = [n for n in own if n.endswith(kind) and any(part in n for part in parts)]
                assert len(names) == 1, (parts, names)
                return own[names[0]]

            block = f"blocks.{index}"
            qkv = [one(f".{x}.", f".{x[0]}_proj.") for x in ("query", "key", "value")]
            ours |= {
                f"{block}.attention_norm.{kind}": one("layernorm_before"),
                f"{block}.attention.qkv.{kind}": torch.cat(qkv),
                f"{block}.attention.output.{kind}": one("attention.output.dense", "attention.o_proj"),
                f"{block}.mlp_norm.{kind}": one("layernorm_after"),
                f"{block}.mlp.up.{kind}": one("intermediate.dense", ".fc1."),
                f"{block}.mlp.down.{kind}": one(f"{index}.output.dense", ".fc2."),
            }
    return ours


def test_is_the_published_model() -> None:
    """Logits, loss and every gradient equal transformers' ViTForImageClassification."""
    model = small_vit()
    theirs = theirs_of(model)
    images, labels = images_of(model)
    found = theirs(pixel_values=images.float() / 127.5 - 1, labels=labels[:, 0])
    found.loss.backward()
    weights = ours_of({n: p.detach() for n, p in theirs.named_parameters()}, model.num_layers)
    expected = ours_of({n: p.grad for n, p in theirs.named_parameters()}, model.num_layers)
    ours = build(model)
    own = by_name(ours)
    assert own.keys() == weights.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
        assert relative_error(ours.logits(images)[:, 0], found.logits) < 1e-4
    loss, grads = gradients(ours, images, labels)
    assert loss == pytest.approx(found.loss.item(), rel=1e-5)
    for name, gradient in expected.items():
        assert relative_error(grads[name], gradient) < 1e-4, name


def split_gradients(
    rank: int, world: int, model: ModelConfig, sequence_parallel: bool
) -> tuple[float, Weights]:
    part = build(model, mesh(tensor=world), sequence_parallel=sequence_parallel)
    return gradients(part, *images_of(model))


@pytest.mark.parametrize(
    ("world", "sequence_parallel", "pooling"),
    [
        (2, False, Pooling.class_token),
        (4, False, Pooling.class_token),
        (2, True, Pooling.class_token),  # by four no square and one divides
        (4, False, Pooling.mean),
        (2, True, Pooling.mean),
        (4, True, Pooling.mean),
    ],
)
def test_tensor_ranks_together_are_one_process(world: int, sequence_parallel: bool, pooling: Pooling) -> None:
    size = 9 if pooling is Pooling.class_token else 12
    model = small_vit(pooling=pooling, image_size=size)
    loss, expected = gradients(build(model), *images_of(model))
    found = pool(world).run(split_gradients, model, sequence_parallel)
    logical = {name: logical_of(parameter) for name, parameter in by_name(build(model)).items()}
    for rank, (own_loss, _) in enumerate(found):
        assert own_loss == pytest.approx(loss, rel=1e-5), rank
    for name, gradient in expected.items():
        # Of padded tensors one process has no padding to tell how long theirs is: merge cuts it off.
        of_ranks = [own[name] for _, own in found]
        whole = (
            of_ranks[0] if logical[name].split_dim is None else merge(of_ranks, _padded(logical[name], world))
        )
        assert relative_error(whole, gradient) < 1e-4, name


def _padded(logical: Any, world: int) -> Any:
    if logical.padded is None:
        return logical
    return replace(logical, padded=-(-logical.shape[0] // world) * world)


def hits_of(rank: int, world: int, logits: Tensor, labels: Tensor) -> list[bool]:
    axis = mesh(tensor=world).tensor
    padding = torch.zeros(*logits.shape[:-1], -logits.shape[-1] % world)
    own = torch.cat([logits, padding + 100.0], -1).chunk(world, -1)[axis.rank]
    return vocab_parallel_hits(own, labels, logits.shape[-1], axis).flatten().tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("world", [2, 4])
def test_right_answers_are_those_of_the_highest_score(world: int) -> None:
    """Padding, here the highest score of all, is no answer."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 1, 7, generator=generator)
    labels = torch.randint(7, (50, 1), generator=generator)
    expected = (logits.argmax(-1) == labels).flatten().tolist()
    assert 0 < sum(expected) < 50
    assert vocab_parallel_hits(logits, labels, 7, Axis()).flatten().tolist() == expected
    assert pool(world).run(hits_of, logits, labels) == [expected] * world


def test_right_answers_are_counted_without_gradients_only() -> None:
    model = build(small_vit())
    assert isinstance(model.loss, ClassificationLoss)
    images, _ = images_of(small_vit())
    with torch.no_grad():
        best = model.logits(images).argmax(-1)
    model(images, best)
    assert (model.loss.right, model.loss.seen) == (0, 0)
    with torch.no_grad():
        model(images, best)
        model(images, (best + 1) % 7)
    assert (model.loss.right, model.loss.seen) == (5, 10)


def test_every_patch_sees_every_other() -> None:
    """Without a causal mask, the last pixel changes the first patch's output."""
    model = build(small_vit(pooling=Pooling.mean))
    images, _ = images_of(small_vit())
    changed = images.clone()
    changed[:, :, -1, -1] = 255 - changed[:, :, -1, -1]
    with torch.no_grad():
        first, other = (torch.nn.Sequential(*list(model.layers)[:3])(x)[:, 0] for x in (images, changed))
    assert (first != other).any()
