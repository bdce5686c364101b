"""Conversations as tokens and masks: as transformers makes them, whole in windows, and refused if broken."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import launcher
from launcher.commands.prepare import main
from launcher.config.errors import ConfigError
from launcher.config.numbers import IGNORED_LABEL
from launcher.config.schema import RunConfig
from launcher.data.chat import open_chats
from launcher.data.chat_template import CHATML, ChatTemplate, template_of
from launcher.data.chat_tokens import ChatEncoder
from launcher.data.conversation import BadConversation, Conversation, parsed
from launcher.data.open import check_data, open_data, record_tokenizer
from launcher.data.packing import ChatTokens, PackedChats
from launcher.data.sampler import Samples
from launcher.data.tokenizer import Bytes, HuggingFace
from tests.config.composing import run_of

SHIPPED = Path(launcher.__file__).parent / "data" / "conversations.jsonl"
CHATS = [
    [("user", "What is 2 + 2?"), ("assistant", "4, as ever.")],
    [
        ("system", "Be brief."), ("user", "Grüße? 🙂"), ("assistant", "Grüße! 🙂"),
        ("user", "ok"), ("assistant", "ñ"),
    ],
    [("user", "a\n\nb  "), ("assistant", "  spaces around  \n"), ("user", "c"), ("assistant", "d\n")],
]  # fmt: skip
MESSAGES = [[{"role": role, "content": text} for role, text in chat] for chat in CHATS]

LLAMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim }}<|eot_id|>{% endgeneration %}"
    "{% else %}{{ message['content'] | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
# Written over several lines, with a loop control and a block that strips.
ZEPHYR = """
{%- for message in messages %}
    {%- if message['role'] == 'tool' %}{% continue %}{% endif %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|assistant|>\n' }}
        {%- generation %}
        {{- message['content'] + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- else %}
        {{- '<|' + message['role'] + '|>\n' + message['content'] + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}
"""
TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "zephyr": ZEPHYR}
CONTROL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|begin|>",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small byte-level BPE tokenizer with control tokens, and its configuration beside it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([SHIPPED.read_text()], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    begin = {"__type": "AddedToken", "content": "<|begin|>"}
    config = {"bos_token": begin, "eos_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


def encoder(tokenizer: Path, template: str) -> ChatEncoder:
    return ChatEncoder(
        ChatTemplate(template, {"bos_token": "<|begin|>", "eos_token": "<|im_end|>"}),
        HuggingFace(tokenizer, field="data.tokenizer"),
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_and_masks_are_those_of_transformers(name: str, tokenizer: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer), chat_template=TEMPLATES[name],
        bos_token="<|begin|>", eos_token="<|im_end|>", clean_up_tokenization_spaces=False,
    )  # fmt: skip
    shipped = [parsed(json.loads(line)) for line in SHIPPED.read_text().splitlines()]
    chats = MESSAGES + [chat.messages for chat in shipped if isinstance(chat, Conversation)]
    assert len(chats) > 20
    for messages in chats:
        expected = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        ids, mask, _ = encoder(tokenizer, TEMPLATES[name]).encode({"messages": messages})
        assert sum(expected["assistant_masks"]) > 0
        assert ids[:-1].tolist() == expected["input_ids"]
        assert mask[:-1].tolist() == expected["assistant_masks"]
        assert ids[-1] == 0  # the document's end, which transformers does not add
        assert mask[-1] == mask[-2]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_without_generation_blocks_has_the_same_masks(name: str, tokenizer: Path) -> None:
    template = TEMPLATES[name]
    plain = template
    for block in ("{% generation %}", "{% endgeneration %}", "{%- generation %}", "{%- endgeneration %}"):
        plain = plain.replace(block, "")
    assert "generation %}" not in plain
    for messages in MESSAGES:
        marked = encoder(tokenizer, template).encode({"messages": messages})
        unmarked = encoder(tokenizer, plain).encode({"messages": messages})
        assert marked[0].tolist() == unmarked[0].tolist()
        assert marked[1].tolist() == unmarked[1].tolist()


def test_bytes_are_learned_where_the_assistant_speaks() -> None:
    ids, mask, characters = ChatEncoder(ChatTemplate(CHATML), Bytes()).encode({"messages": MESSAGES[1]})
    text = Bytes().decode(ids.tolist())
    assert characters == len(text) - 1
    learned = ids[mask.astype(bool)].tobytes().decode()
    assert learned == "Grüße! 🙂<|im_end|>ñ<|im_end|>"
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nGrüße? 🙂<|im_end|>\n")


def test_a_pair_is_learned_from_its_completion_on() -> None:
    encode = ChatEncoder(ChatTemplate(CHATML), Bytes()).encode
    ids, mask, _ = encode({"prompt": "2 + 2 is ", "completion": "4."})
    assert Bytes().decode(ids.tolist()) == "2 + 2 is 4.\0"
    assert mask.tolist() == [0] * 9 + [1, 1, 1]
    assert encode({"prompt": "", "completion": "ab"})[1].tolist() == [0, 1, 1]  # nothing predicts the first


def test_the_shapes_of_openai_and_sharegpt_are_the_same_conversation() -> None:
    openai = {"messages": MESSAGES[1]}
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    sharegpt = {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in MESSAGES[1]]}
    beside = {"system": "Be brief.", "conversations": sharegpt["conversations"][1:]}
    mixed = {"conversations": MESSAGES[1]}
    parts = {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES[1]]}
    assert parsed(openai) == parsed(sharegpt) == parsed(beside) == parsed(mixed) == parsed(parts)


BAD: dict[str, tuple[Any, str]] = {
    "no conversation": ({"text": "a"}, "has no conversation; `messages` (OpenAI)"),
    "no messages": ({"messages": []}, "has no list of messages in 'messages'"),
    "a message that is text": ({"messages": ["a"]}, "has no object as message 1"),
    "no role": ({"messages": [{"content": "a"}]}, "has no role in message 1"),
    "no content": ({"messages": [{"role": "assistant"}]}, "has no text in message 1"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "has a part in message 1 that is not text",
    ),
    "nobody answers": ({"messages": [{"role": "user", "content": "a"}]}, "has no message of the assistant"),
    "an unknown speaker": (
        {"conversations": [{"from": "dog", "value": "a"}]},
        "has the unknown speaker 'dog'",
    ),
    "an empty completion": ({"prompt": "a", "completion": ""}, "has an empty completion"),
    "a number as prompt": ({"prompt": 1, "completion": "a"}, "has no text in 'prompt'"),
    "a control token": (
        {"messages": [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "a"}]},
        "spells the control token '<|im_end|>'",
    ),
    "a zero byte": ({"prompt": "\0", "completion": "a"}, "spells the control token '\\x00'"),
    "half a character": ({"prompt": "\ud800", "completion": "a"}, "contains half a character"),
    "a list": ([1], "is JSON but not an object"),
    **{
        name: ({"messages": MESSAGES[0], "tools": tools}, "has no list of objects in 'tools'")
        for name, tools in (("tools that are text", "add"), ("tools without objects", '["add"]'))
    },
}  # fmt: skip


def chat_run(train: Path | str, *overrides: str) -> RunConfig:
    sizes = "data.sequence_length=64", "data.validation_fraction=0.2"
    return run_of("model=gpt_tiny", "data=chat", f"data.train={train}", *sizes, *overrides)


def written(folder: Path, *records: Any) -> Path:
    good = {"prompt": "a", "completion": "b"}
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in (good, good, *records)))
    return path


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_refused_with_file_line_and_remedy(name: str, tmp_path: Path) -> None:
    record, why = BAD[name]
    path = written(tmp_path, record)
    with pytest.raises(ConfigError) as error:
        check_data(chat_run(path))
    assert error.value.field == "data.train"
    assert error.value.why.startswith(f"{path}:3 {why}")
    assert "bad_lines=skip" in error.value.remedy


@pytest.mark.parametrize("tools", [[{"name": "add"}], None])
def test_tools_may_be_json_text(tools: list[Any] | None) -> None:
    """Data sets of Hugging Face write them so, because a column has one type."""
    record = {"messages": MESSAGES[0], "tools": tools}
    assert parsed({**record, "tools": json.dumps(tools)}) == parsed(record)
    sharegpt = {"conversations": [{"from": m["role"], "value": m["content"]} for m in MESSAGES[0]]}
    assert parsed({**sharegpt, "tools": json.dumps(tools)}) == parsed(record)


def test_files_of_other_parts_are_not_trained_on(tmp_path: Path) -> None:
    """As of text and of token files, also by another name. None left is refused."""
    for name in ("a", "b", "validation", "test"):
        line = json.dumps({"prompt": name, "completion": name}) + "\n"
        (tmp_path / f"{name}.jsonl").write_text(line * 2)
    (tmp_path / "other.jsonl").symlink_to(tmp_path / "test.jsonl")
    held_out = f"data.validation={tmp_path}/validation.jsonl", f"data.test={tmp_path}/other.jsonl"
    run = chat_run(f"'{tmp_path}/[abtv]*.jsonl'", *held_out)
    left_out = check_data(run)
    assert left_out["files of data.validation or data.test"] == 2
    split = open_chats(run)
    parts = {"train": split.train, "validation": split.validation, "test": split.test}
    texts = {
        name: {Bytes().decode(tokens.tolist()) for tokens, _ in part.conversations()}
        for name, part in parts.items()
        if part is not None
    }
    ended = {name: f"{name}{name}\0" for name in ("a", "b", "validation", "test")}
    train = {ended["a"], ended["b"]}
    assert texts == {"train": train, "validation": {ended["validation"]}, "test": {ended["test"]}}
    with pytest.raises(ConfigError, match="never trained on") as error:
        check_data(chat_run(f"'{tmp_path}/[tv]*.jsonl'", *held_out))
    assert error.value.field == "data.train"


def test_damage_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_text(path.read_text() + '{"messages": \n')
    with pytest.raises(ConfigError, match=r"chats.jsonl:3 is not JSON"):
        check_data(chat_run(path))
    with pytest.raises(ConfigError, match="no file has this name"):
        check_data(chat_run(tmp_path / "none.jsonl"))
    (tmp_path / "chats.txt").write_text("a")
    with pytest.raises(ConfigError, match=r"chats.txt is not a .jsonl"):
        check_data(chat_run(tmp_path / "chats.txt"))


def test_templates_are_found_and_refused(tokenizer: Path, tmp_path: Path) -> None:
    fields = {"tokenizer_field": "data.tokenizer", "template_field": "data.chat_template"}
    found = template_of(tokenizer, None, **fields)
    assert found.source == CHATML
    assert found.tokens == {"bos_token": "<|begin|>", "eos_token": "<|im_end|>"}
    copy = tmp_path / "tokenizer.json"
    copy.write_bytes(tokenizer.read_bytes())
    with pytest.raises(ConfigError) as error:
        template_of(copy, None, **fields)
    assert error.value.field == "data.chat_template"
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": LLAMA}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert template_of(copy, None, **fields).source == LLAMA
    (tmp_path / "chat_template.jinja").write_text(ZEPHYR)
    assert template_of(copy, None, **fields).source == ZEPHYR
    (tmp_path / "broken.jinja").write_text("{% for %}")
    with pytest.raises(ConfigError, match="line 1 of the chat template is wrong"):
        template_of(copy, tmp_path / "broken.jinja", **fields)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('roles must alternate') }}", "is refused by the chat template: roles must"),
        ("{{ messages[0].__class__.__mro__ }}", "is refused by the chat template: access to attribute"),
        ("{{ strftime_now('%d') }}", "is refused by the chat template: 'strftime_now' is undefined"),
        ("{% for m in messages %}{{ loop.last }}{{ m.content }}{% endfor %}", "cannot be divided into turns"),
    ],
)
def test_a_template_that_fails_or_reaches_out_is_a_bad_record(template: str, why: str) -> None:
    with pytest.raises(BadConversation) as error:
        ChatEncoder(ChatTemplate(template), Bytes()).encode({"messages": MESSAGES[1]})
    assert str(error.value).startswith(why)


def test_an_end_of_document_inside_a_conversation_is_refused(tokenizer: Path) -> None:
    """Attention would stop there. So </s> after each answer needs another token at the end of documents."""
    with pytest.raises(BadConversation, match=r"'<\|endoftext\|>', before its end"):
        encoder(tokenizer, CHATML.replace("<|im_end|>", "<|endoftext|>")).encode({"messages": MESSAGES[1]})


def test_another_token_can_end_documents(tokenizer: Path, tmp_path: Path) -> None:
    """Mistral's template writes </s> after each answer, which ends documents by default."""
    template = tmp_path / "mistral.jinja"
    template.write_text(CHATML.replace("<|im_end|>", "<|endoftext|>"))
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps({'messages': MESSAGES[1]})}\n" * 10)
    names = "model.vocab_size=400", f"data.tokenizer={tokenizer}", f"data.chat_template={template}"
    with pytest.raises(ConfigError, match="has the token that ends documents") as error:
        check_data(chat_run(tmp_path / "chats.jsonl", *names, "data.sequence_length=99"))
    other = CONTROL.index("<|im_end|>")
    assert error.value.remedy.startswith(f"data.end_of_document={other} ")
    end = "data.end_of_document={}"
    run = chat_run(tmp_path / "chats.jsonl", *names, "data.sequence_length=99", end.format(other))
    check_data(run)
    tokens, _ = next(open_chats(run).train.conversations())
    assert tokens[-1] == other
    assert CONTROL.index("<|endoftext|>") in tokens[:-1]
    with pytest.raises(ConfigError, match="has no token with this id") as error:
        check_data(chat_run(SHIPPED, "model.vocab_size=500", f"data.tokenizer={tokenizer}", end.format(450)))
    assert (error.value.field, error.value.remedy) == ("data.end_of_document", "data.end_of_document=0")
    with pytest.raises(ConfigError) as error:
        check_data(chat_run(SHIPPED, f"data.tokenizer={template}", f"data.chat_template={template}"))
    assert error.value.field == "data.tokenizer"
    with pytest.raises(ConfigError, match=r"data\.tokenizer=\S+: is not a file") as error:
        check_data(chat_run(SHIPPED, f"data.tokenizer={tokenizer.parent}"))
    assert error.value.remedy == f"data.tokenizer={tokenizer}"


END = 9


@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 2**30)), min_size=1, max_size=40),
    length=st.integers(2, 20),
)
def test_each_conversation_is_in_one_window(lengths: list[tuple[int, int]], length: int) -> None:
    chats = []
    for number, (size, bits) in enumerate(lengths):
        mask = [bits >> place & 1 for place in range(size)]
        chats.append(([100 + number] * (size - 1) + [END], mask))
    tokens = np.concatenate([np.array(ids) for ids, _ in chats])
    masks = np.concatenate([np.array(mask, np.uint8) for _, mask in chats])
    starts = np.cumsum([0, *(len(ids) for ids, _ in chats)])
    packed = PackedChats(ChatTokens("chats", starts, None, (tokens, masks)), 0, len(chats), length, END, 1000)
    # By hand: the next conversation begins a new window if it does not fit.
    rows: list[tuple[list[int], list[int]]] = []
    for ids, mask in chats:
        ids, learned = ids[: length + 1], [0, *mask[1 : length + 1]]
        if len(mask) > length + 1 and not any(learned):
            continue
        if not rows or len(rows[-1][0]) + len(ids) > length + 1:
            rows.append(([], []))
        rows[-1][0].extend(ids)
        rows[-1][1].extend(learned)
    assert len(packed) == len(rows)
    if not rows:
        return
    inputs, labels = packed.read(np.arange(len(rows)))
    for row, (ids, learned) in enumerate(rows):
        rest = length + 1 - len(ids)
        ids, learned = ids + [END] * rest, learned + [0] * rest
        assert inputs[row].tolist() == ids[:-1]
        expected = [i if m else IGNORED_LABEL for i, m in zip(ids[1:], learned[1:], strict=True)]
        assert labels[row].tolist() == expected
    part = (range(length // 3, length // 2), range(length - 1, length))  # as a context rank reads it
    held = [position for each in part for position in each]
    for whole, read in zip((inputs, labels), packed.read(np.arange(len(rows)), part), strict=True):
        assert (read == whole[:, held]).all()
    counted = int((labels != IGNORED_LABEL).sum())
    assert packed.count_labels(np.arange(len(rows))) == counted
    assert Samples(packed, "seed").count_labels(np.arange(2 * len(rows))) == 2 * counted


def everything(part: PackedChats) -> tuple[list[Any], list[Any]]:
    inputs, labels = part.read(np.arange(len(part)))
    return inputs.tolist(), labels.tolist()


@pytest.fixture
def prepared(tmp_path: Path, tokenizer: Path) -> Path:
    target = tmp_path / "corpora" / "chat"
    assert main([str(SHIPPED), str(target), "chat=true", f"tokenizer.path={tokenizer}", "workers=2"]) == 0
    return target


def test_prepared_conversations_are_the_same_samples(prepared: Path, tokenizer: Path) -> None:
    overrides = "model.vocab_size=400", f"data.tokenizer={tokenizer}"
    direct, from_files = (open_chats(chat_run(train, *overrides)) for train in (SHIPPED, prepared))
    assert everything(direct.train) == everything(from_files.train)
    assert everything(direct.validation) == everything(from_files.validation)
    assert set(open_data(chat_run(prepared, "model.vocab_size=400")).digests) == {""}


def test_a_changed_mask_is_other_data(prepared: Path) -> None:
    run = chat_run(prepared, "model.vocab_size=400")
    before = open_chats(run).digests
    mask = prepared.with_suffix(".mask")
    content = bytearray(mask.read_bytes())
    content[5] ^= 1
    mask.write_bytes(content)
    assert open_chats(run).digests != before


def test_prepared_conversations_are_checked(prepared: Path) -> None:
    run, mask = chat_run(prepared, "model.vocab_size=400"), prepared.with_suffix(".mask")
    check_data(run)
    with pytest.raises(ConfigError, match="data=tokens learns all"):
        check_data(run_of("data=tokens", f"data.train={prepared}", "model.vocab_size=400"))
    with pytest.raises(ConfigError, match="the tokenizer of these data has 400 tokens"):
        check_data(chat_run(prepared))
    with pytest.raises(ConfigError, match="never trained on"):
        check_data(chat_run(prepared, "model.vocab_size=400", f"data.validation={prepared}"))
    with pytest.raises(ConfigError) as error:
        check_data(chat_run(prepared, "model.vocab_size=400", "data.end_of_document=3"))
    assert error.value.remedy == "data.end_of_document=0"
    content = mask.read_bytes()
    mask.write_bytes(b"\2" * len(content))
    with pytest.raises(ConfigError, match="has the byte 2 at 1, and a mask has only 0 and 1"):
        check_data(run)
    mask.write_bytes(content[:-1])
    with pytest.raises(ConfigError, match=r"chat.mask has \d+ bytes for \d+ tokens"):
        check_data(run)
    mask.unlink()
    with pytest.raises(ConfigError, match=r"chat.mask does not exist") as error:
        check_data(run)
    assert error.value.remedy == f"data=tokens data.train={prepared} (learns all tokens)"


def test_a_special_token_behind_the_vocabulary_is_accepted(tokenizer: Path, tmp_path: Path) -> None:
    """Gemma 3's text models have one token less than their tokenizer, which no text becomes."""
    content = json.loads(tokenizer.read_text())
    image = {**content["added_tokens"][0], "id": 400, "content": "<image>"}
    content["added_tokens"].append(image)
    copy = tmp_path / "tokenizer.json"
    copy.write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_bytes(
        (tokenizer.parent / "tokenizer_config.json").read_bytes()
    )
    check_data(chat_run(SHIPPED, "model.vocab_size=400", f"data.tokenizer={copy}"))
    with pytest.raises(ConfigError, match="the tokenizer of these data has 401 tokens"):
        check_data(chat_run(SHIPPED, "model.vocab_size=399", f"data.tokenizer={copy}"))
    assert main([str(SHIPPED), str(tmp_path / "chat"), "chat=true", f"tokenizer.path={copy}"]) == 0
    check_data(chat_run(tmp_path / "chat", "model.vocab_size=400"))


def test_another_template_is_the_remedy_if_the_template_is_at_fault(tokenizer: Path, tmp_path: Path) -> None:
    template = tmp_path / "last.jinja"
    template.write_text("{% for m in messages %}{{ loop.last }}{{ m.content }}{% endfor %}")
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": MESSAGES[1]}) + "\n")
    names = "model.vocab_size=400", f"data.tokenizer={tokenizer}", f"data.chat_template={template}"
    with pytest.raises(ConfigError, match=r"put \{% generation %\}") as error:
        check_data(chat_run(tmp_path / "chats.jsonl", *names))
    assert error.value.remedy.startswith("data.chat_template=PATH")


def test_files_of_another_tokenizer_are_not_kept(tokenizer: Path, tmp_path: Path) -> None:
    """They came with the model that the run started from."""
    (tmp_path / "tokenizer.json").write_text("{}")
    for name in ("tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json"):
        (tmp_path / name).write_text('{"bos_token": "<other>"}')
    model = {"eos_token_id": 2, "pad_token_id": 5, "hidden_size": 32}
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text(json.dumps(model))
    record_tokenizer(chat_run(SHIPPED, "model.vocab_size=400", f"data.tokenizer={tokenizer}"), tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / name).read_text()) == {"hidden_size": 32}
    beside = tokenizer.parent / "tokenizer_config.json"
    assert (tmp_path / "tokenizer_config.json").read_bytes() == beside.read_bytes()


def test_long_conversations_are_counted(tmp_path: Path) -> None:
    late = {"prompt": "a" * 100, "completion": "b"}
    early = {"prompt": "a", "completion": "b" * 100}
    path = written(tmp_path, late, early, *[{"prompt": "a", "completion": "b"}] * 3)
    left_out = check_data(chat_run(path))
    assert left_out["conversations without a label in 65 tokens"] == 1
    assert left_out["ends of conversations, after 65 tokens"] == 1
    only = tmp_path / "late.jsonl"
    only.write_text(json.dumps(late) + "\n" + json.dumps(late) + "\n")
    with pytest.raises(ConfigError) as error:
        check_data(chat_run(only))
    assert error.value.field == "data.sequence_length"


def test_special_tokens_are_recorded_with_prepared_conversations(tokenizer: Path, tmp_path: Path) -> None:
    """The template reads them. The card of an earlier version has none."""
    from transformers import AutoTokenizer

    template, target = tmp_path / "llama.jinja", tmp_path / "chat"
    template.write_text(LLAMA)
    settings = "chat=true", f"tokenizer.path={tokenizer}", f"chat_template={template}"
    assert main([str(SHIPPED), str(target), *settings]) == 0
    run = chat_run(target, "model.vocab_size=400")
    record_tokenizer(run, tmp_path / "recorded")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "recorded")
    text = loaded.apply_chat_template(MESSAGES[0], tokenize=False)
    assert str(text).startswith("<|begin|><|start_header_id|>user")
    assert (loaded.eos_token, loaded.model_max_length) == ("<|im_end|>", run.model.max_sequence_length)
    card = json.loads((tmp_path / "chat.json").read_text())
    del card["chat_template_tokens"]
    (tmp_path / "chat.json").write_text(json.dumps(card))
    record_tokenizer(run, tmp_path / "earlier")
    assert (tmp_path / "earlier" / "chat_template.jinja").read_text() == LLAMA


def test_a_run_records_tokenizer_and_template(tokenizer: Path, prepared: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    names = "model.vocab_size=400", f"data.tokenizer={tokenizer}"
    for number, run in enumerate((chat_run(SHIPPED, *names), chat_run(prepared, "model.vocab_size=400"))):
        folder = tmp_path / str(number)
        record_tokenizer(run, folder)
        assert (folder / "chat_template.jinja").read_text() == CHATML
        assert (folder / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    text = AutoTokenizer.from_pretrained(tmp_path / "0").apply_chat_template(MESSAGES[0], tokenize=False)
    assert text.startswith("<|im_start|>user\nWhat is 2 + 2?<|im_end|>")
