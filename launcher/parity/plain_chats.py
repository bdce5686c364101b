"""Conversations for the whole run, and the windows into which they are packed, in the plainest way.

The training part is a file of JSON lines, in all three shapes that are read. The validation part is a token
file with a mask. Template, mask and packing are written again here, with loops over single tokens.
"""

import json
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from launcher.config.numbers import IGNORED_LABEL
from launcher.config.schema import RunConfig
from launcher.config.shape import sequence_length
from launcher.data.token_file import write_index
from launcher.parity.plain_source import PlainSource, Sample
from launcher.parity.plain_tokens import tokens_at

WINDOWS = 19  # samples of an epoch: a few steps go through several epochs
END = 0  # the token that ends a conversation, where tokens are bytes
# A letter for the role, then the text. Samples of the small run are too short for ChatML.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)
_LETTERS = "abcdefghijklmnopqrstuvwxyzé"  # the last has two bytes
_KINDS = 6  # of conversations: see _record
_SHAREGPT = {"user": "human", "assistant": "gpt", "system": "system"}

Tokens = list[int]
MaskedTokens = tuple[Tokens, list[bool]]  # the tokens, and for each whether it is learned


@dataclass(frozen=True)
class _Place:
    """Where a conversation begins in a token file, and how many of its tokens a window has."""

    start: int
    count: int


def use_chats(run: RunConfig, folder: Path) -> None:
    """Let the run read the files of write_chats. Modifies `run`."""
    d = run.data
    d.train, d.validation = str(folder / "chats.jsonl"), str(folder / "held-out-chats")
    d.chat_template = str(folder / "template.jinja")


def write_chats(run: RunConfig, folder: Path) -> dict[str, PlainSource]:
    """Write template, JSON lines, and a token file with a mask; return the only source."""
    rng, length = random.Random(run.training.seed), sequence_length(run)
    (folder / "template.jinja").write_text(TEMPLATE)
    records = _records(rng, length, WINDOWS)
    lines = "".join(json.dumps(record, ensure_ascii=rng.random() < 0.5) + "\n" for record in records)
    (folder / "chats.jsonl").write_text(lines)
    read = [json.loads(line) for line in lines.splitlines()]
    conversations = [tokens_of(record) for record in read]
    windows = packed(conversations, length)
    held_out = run.training.global_batch_size + 1  # no whole number of global batches
    prefix = folder / "held-out-chats"
    places = _write_tokens(prefix, [tokens_of(r) for r in _records(rng, length, held_out)], length)
    return {
        "": PlainSource(
            partial(_in_memory, conversations, windows, length), len(windows),
            partial(_in_file, prefix, places, length), len(places),
        )
    }  # fmt: skip


def _records(rng: random.Random, length: int, windows: int) -> list[dict[str, Any]]:
    """Return random conversations that fill `windows` windows of `length` + 1 tokens."""
    records: list[dict[str, Any]] = []
    while len(packed([tokens_of(record) for record in records], length)) < windows:
        records.append(_record(rng, length, len(records) % _KINDS))
    return records


def _record(rng: random.Random, length: int, kind: int) -> dict[str, Any]:
    """Return a conversation: short, or (kinds 0, 1) with a question or an answer longer than a window."""

    def text(least: int = 1) -> str:
        return "".join(rng.choices(_LETTERS, k=rng.randint(least, max(1, least, length // 4))))

    asked, answered = text(), text()
    if kind == 0:
        asked = asked + text(length + 1)  # nothing is learned: the conversation is left out
    elif kind == 1:
        answered = answered + text(length + 1)  # cut
    if rng.random() < 1 / 3:
        return {"prompt": asked * (kind != 2), "completion": answered}
    messages = [("user", asked), ("assistant", answered)]
    if rng.random() < 0.3:
        messages.insert(0, ("system", text()))
    if rng.random() < 0.3:
        messages += [("user", text())] + [("assistant", text())] * (rng.random() < 0.5)
    if rng.random() < 0.5:
        return {"conversations": [{"from": _SHAREGPT[role], "value": words} for role, words in messages]}
    return {"messages": [{"role": role, "content": words} for role, words in messages]}


def tokens_of(record: dict[str, Any]) -> MaskedTokens:
    """Return the bytes of a conversation with the token that ends it, and which of them are learned.

    The assistant's text is learned, and the end if it comes after such text. Nothing predicts the first
    token.
    """
    if "prompt" in record:
        pieces = [(record["prompt"], False), (record["completion"], True)]
    else:
        pieces = []
        for message in record.get("messages") or record["conversations"]:
            role = message.get("role") or {name: ours for ours, name in _SHAREGPT.items()}[message["from"]]
            text = message["content"] if "content" in message else message["value"]
            pieces += [(role[0], False), (text, role == "assistant")]
    tokens: Tokens = []
    learned: list[bool] = []
    for text, is_learned in pieces:
        for token in text.encode():
            tokens.append(token)
            learned.append(is_learned)
    tokens.append(END)
    learned.append(learned[-1])
    learned[0] = False
    return tokens, learned


def packed(conversations: list[MaskedTokens], length: int) -> list[list[int]]:
    """Return the numbers of the conversations in each window of `length` + 1 tokens.

    A conversation goes into the next window if it does not fit. It is left out if none of its first
    `length` + 1 tokens is learned.
    """
    windows: list[list[int]] = []
    free = 0
    for number, (tokens, learned) in enumerate(conversations):
        if True not in learned[: length + 1]:
            continue
        count = min(len(tokens), length + 1)
        if count > free:
            windows.append([])
            free = length + 1
        windows[-1].append(number)
        free -= count
    return windows


def _write_tokens(prefix: Path, conversations: list[MaskedTokens], length: int) -> list[list[_Place]]:
    """Write .bin, .idx and .mask; return the conversations of each window by their place in the file."""
    starts, tokens, mask = [], list[int](), list[bool]()
    for ids, learned in conversations:
        starts.append(len(tokens))
        tokens += ids
        mask += learned
    np.array(tokens, "<i4").tofile(f"{prefix}.bin")
    Path(f"{prefix}.mask").write_bytes(bytes(mask))
    lengths = np.array([len(ids) for ids, _ in conversations], np.int32)
    write_index(Path(f"{prefix}.idx"), lengths, np.dtype("<i4"))
    return [
        [_Place(starts[number], min(len(conversations[number][0]), length + 1)) for number in window]
        for window in packed(conversations, length)
    ]


def _in_memory(
    conversations: list[MaskedTokens], windows: list[list[int]], length: int, place: int
) -> Sample:
    return _window([conversations[number] for number in windows[place]], length)


def _in_file(prefix: Path, windows: list[list[_Place]], length: int, place: int) -> Sample:
    conversations = []
    for each in windows[place]:
        with Path(f"{prefix}.mask").open("rb") as file:
            file.seek(each.start)
            learned = [byte == 1 for byte in file.read(each.count)]
        conversations.append((tokens_at(Path(f"{prefix}.bin"), each.start, each.count), learned))
    return _window(conversations, length)


def _window(conversations: list[MaskedTokens], length: int) -> Sample:
    """Return inputs and labels (T,) of a window, which ends with end tokens that are no labels."""
    inputs: Tokens = []
    is_label: list[bool] = []
    for tokens, learned in conversations:
        inputs += tokens[: length + 1]
        is_label += learned[: length + 1]
    while len(inputs) < length + 1:
        inputs.append(END)
        is_label.append(False)
    labels = [token if counts else IGNORED_LABEL for token, counts in zip(inputs, is_label, strict=True)]
    return torch.tensor(inputs[:-1]), torch.tensor(labels[1:])
