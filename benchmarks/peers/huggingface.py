"""Hugging Face's Trainer with transformers' GPT-2, in one process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from benchmarks.contest.job import AfterStep, Job, Sizes
from benchmarks.peers.batches import initial_weights, micro_batches
from benchmarks.peers.optimizer import adamw

_ENDLESS = 1_000_000_000
_MODULES = {  # of transformers, by the launcher's logical name
    "embedding": "transformer.wte", "positions": "transformer.wpe", "final_norm": "transformer.ln_f",
    "head": "lm_head", "attention_norm": "ln_1", "attention.qkv": "attn.c_attn",
    "attention.output": "attn.c_proj", "mlp_norm": "ln_2", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
}  # fmt: skip


def train(job: Job, rank: int, after_step: AfterStep) -> None:
    model, losses = built(job.sizes, initial_weights(job)), []

    class Turns(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            after_step(losses.pop())

    def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        loss = F.cross_entropy(outputs.logits.float().flatten(0, 1), labels.flatten())
        losses.append(loss.detach())
        return loss

    optimizer = adamw(job, model.parameters())
    Trainer(
        model=model,
        args=arguments(job),
        train_dataset=Dataset(job),
        compute_loss_func=loss_of,
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
        callbacks=[Turns()],
    ).train()


def arguments(job: Job) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(Path(job.folder) / "trainer"),
        use_cpu=True,
        per_device_train_batch_size=job.micro_batch,
        gradient_accumulation_steps=job.accumulation,
        max_grad_norm=job.adamw.clipping,
        max_steps=_ENDLESS,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


class Dataset(IterableDataset):  # type: ignore[type-arg]
    def __init__(self, job: Job) -> None:
        self.job = job

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batches in micro_batches(self.job, data_rank=0):
            for tokens, labels in batches:
                for sample in zip(tokens, labels, strict=True):
                    yield dict(zip(("input_ids", "labels"), sample, strict=True))


def built(sizes: Sizes, weights: dict[str, Tensor]) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=sizes.vocabulary, n_positions=sizes.length, n_embd=sizes.hidden, n_layer=sizes.layers,
        n_head=sizes.heads, n_inner=sizes.ffn, activation_function="gelu_new",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, layer_norm_epsilon=sizes.norm_epsilon,
        tie_word_embeddings=sizes.is_tied, use_cache=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    renamed = dict(converted(name, weight) for name, weight in weights.items())
    missing = model.load_state_dict(renamed, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}, missing
    return model


def converted(name: str, weight: Tensor) -> tuple[str, Tensor]:
    """Return transformers' name and tensor: its Conv1D holds the transposed matrix."""
    module, _, kind = name.rpartition(".")
    prefix = ""
    if module.startswith("blocks."):
        _, layer, module = module.split(".", 2)
        prefix = f"transformer.h.{layer}."
    is_transposed = bool(prefix) and weight.dim() == 2
    return f"{prefix}{_MODULES[module]}.{kind}", weight.t().contiguous() if is_transposed else weight
