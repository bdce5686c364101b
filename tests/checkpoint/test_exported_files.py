"""The files of an export beside its weights: config, tokenizer, generation settings and the certificate."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from launcher.checkpoint import certificate
from launcher.checkpoint.companions import base_config, carry_companions
from launcher.checkpoint.conversion import base_of_adapter, export, import_
from launcher.checkpoint.huggingface import NotConvertible
from launcher.checkpoint.manifest import MANIFEST, checkpoints_in, read_manifest, step_name
from launcher.checkpoint.sources import weights_at
from launcher.commands.ready import check_bytes
from launcher.config.errors import ConfigError
from launcher.config.schema import ExchangeConfig
from launcher.data.chat_template import CHATML
from launcher.data.open import record_tokenizer
from launcher.data.tokenizer import train_bpe, write_byte_tokenizer
from tests.config.composing import run_of
from tests.models.families import transformers_model
from tests.runtime.command import launcher, trained

OPTIONS = ExchangeConfig()
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
TEXT = "def f(x):\n    return x  # é Ā\n"


def written(folder: Path, **changes: Any) -> Path:
    """Return the directory of a small Llama with settings and tokenizer files of a larger model."""
    transformers_model("Llama 3.1", **changes).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "eos_token_id": [2, 70_000],
        "bos_token_id": 128_000,
        "pad_token_id": 5,
        "_name_or_path": "/x/y",
    }
    (folder / "config.json").write_text(json.dumps(config))
    generation = {"eos_token_id": [2, 3, 70_000], "temperature": 0.6, "do_sample": True, "max_length": 9}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def round_trip(source: Path, folder: Path, options: ExchangeConfig = OPTIONS) -> Path:
    noted_round_trip(source, folder, options)
    return folder / "back"


def noted_round_trip(source: Path, folder: Path, options: ExchangeConfig = OPTIONS) -> list[str]:
    """Import and export; return the notes of the export."""
    import_(weights_at(source, "x"), folder / "ours", options)
    return export(weights_at(folder / "ours", "x"), folder / "back", options, write_byte_tokenizer)


def test_only_what_is_right_for_the_weights_is_kept_of_the_sources_config(tmp_path: Path) -> None:
    back = round_trip(written(tmp_path / "theirs"), tmp_path)
    config = json.loads((back / "config.json").read_text())
    assert "_name_or_path" not in config
    special = {"eos_token_id": [2, 3], "bos_token_id": None, "pad_token_id": 5}
    assert {name: config[name] for name in special} == special
    generation = json.loads((back / "generation_config.json").read_text())
    assert generation == {**special, "temperature": 0.6, "do_sample": True}
    loaded = AutoConfig.from_pretrained(back)
    assert (loaded.eos_token_id, loaded.bos_token_id) == ([2, 3], None)
    assert loaded.rope_parameters["rope_type"] == "llama3"
    assert GenerationConfig.from_pretrained(back).temperature == 0.6


def test_the_tokenizer_and_its_chat_template_are_exported(tmp_path: Path) -> None:
    source = written(tmp_path / "theirs", vocab_size=300)
    train_bpe([TEXT * 40], 270, source / "tokenizer.json")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "chat_template": CHAT,
        "name_or_path": "someone/elsewhere", "tokenizer_file": "/x/tokenizer.json",
    }  # fmt: skip
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    back = round_trip(source, tmp_path)
    kept = json.loads((back / "tokenizer_config.json").read_text())
    assert {"name_or_path", "tokenizer_file"}.isdisjoint(kept)
    tokenizer = AutoTokenizer.from_pretrained(back)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "user: hi\n"
    assert tokenizer.eos_token_id == 0


def test_tokens_of_another_tokenizer_are_not_exported(tmp_path: Path) -> None:
    """Conversations came with their own tokenizer: its end of documents replaces the tokens of the model."""
    source = written(tmp_path / "theirs", vocab_size=300)
    train_bpe([TEXT * 40], 270, source / "tokenizer.json")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (source / name).write_text(json.dumps(settings))
    import_(weights_at(source, "x"), tmp_path / "ours", OPTIONS)
    (tmp_path / "other").mkdir()
    train_bpe(["other words " * 40], 262, tmp_path / "other" / "tokenizer.json")
    settings["chat_template"] = CHATML
    (tmp_path / "other" / "tokenizer_config.json").write_text(json.dumps(settings))
    chat = "data=chat", "data.train=pkg://launcher/data/conversations.jsonl", "model.vocab_size=300"
    kept = tmp_path / "ours" / "huggingface"
    record_tokenizer(run_of(*chat, f"data.tokenizer={tmp_path}/other/tokenizer.json"), kept)
    carry_companions(source, tmp_path / "ours", "float32")  # as a start does that found no checkpoint
    assert not (kept / "special_tokens_map.json").exists()
    [checkpoint] = checkpoints_in(tmp_path / "ours")
    manifest = read_manifest(checkpoint)
    data = {"source": "chat", "end_of_document": 7}
    (checkpoint / MANIFEST).write_text(replace(manifest, config=manifest.config | {"data": data}).to_json())
    export(weights_at(tmp_path / "ours", "x"), tmp_path / "back", OPTIONS, write_byte_tokenizer)
    for name in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / "back" / name).read_text())
        special = {"eos_token_id": 7, "bos_token_id": None, "pad_token_id": None}
        assert {name: content[name] for name in special} == special
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["temperature"] == 0.6
    assert AutoTokenizer.from_pretrained(tmp_path / "back").chat_template == CHATML


def test_the_tokenizer_has_the_longest_text_of_a_run_that_changed_it(tmp_path: Path) -> None:
    source = written(tmp_path / "theirs", vocab_size=300)
    train_bpe([TEXT * 40], 270, source / "tokenizer.json")
    (source / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 9999}))
    import_(weights_at(source, "x"), tmp_path / "ours", OPTIONS)
    ours = weights_at(tmp_path / "ours", "x")
    for length, longest in ((24, 9999), (12, 12)):
        changed = replace(ours, model=replace(ours.model, max_sequence_length=length))
        export(changed, tmp_path / str(length), OPTIONS, write_byte_tokenizer)
        settings = json.loads((tmp_path / str(length) / "tokenizer_config.json").read_text())
        assert settings["model_max_length"] == longest


def test_a_tokenizer_without_settings_gets_them(tmp_path: Path) -> None:
    source = written(tmp_path / "theirs", vocab_size=300)
    train_bpe([TEXT * 40], 270, source / "tokenizer.json")
    back = round_trip(source, tmp_path)
    settings = json.loads((back / "tokenizer_config.json").read_text())
    assert (settings["tokenizer_class"], settings["model_max_length"]) == ("PreTrainedTokenizerFast", 24)
    tokenizer = AutoTokenizer.from_pretrained(back)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_an_adapter_names_a_base_that_peft_can_load(tmp_path: Path) -> None:
    source = weights_at(written(tmp_path / "theirs"), "x")
    import_(source, tmp_path / "ours", OPTIONS)
    ours = weights_at(tmp_path / "ours", "x")
    assert base_of_adapter(replace(ours, base=source.path)) == str(source.path)
    for imported in (tmp_path / "ours", ours.path):
        assert base_of_adapter(replace(ours, base=imported)) == str(source.path)
    moved = source.path.rename(tmp_path / "moved")
    for begun in (source.path, Path("theirs")):
        assert base_of_adapter(replace(ours, base=begun)) == str(source.path)
    assert base_of_adapter(replace(ours, base=moved)) == str(moved)
    assert base_of_adapter(replace(ours, base=tmp_path / "other")) is None


@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_an_adapter_of_a_run_that_trained_the_model_further_names_no_base(
    has_checkpoint: bool, tmp_path: Path
) -> None:
    """The run keeps the config.json of the model that it began with, whose weights are others by then."""
    source, begun = weights_at(written(tmp_path / "theirs"), "x"), tmp_path / "a"
    import_(source, begun, OPTIONS)
    [imported] = checkpoints_in(begun)
    manifest = replace(read_manifest(imported), step=3, layout="1 rank")
    trained_further = imported.rename(imported.with_name(step_name(3)))
    (trained_further / MANIFEST).write_text(manifest.to_json())
    adapter = replace(weights_at(begun, "x"), base=begun)
    assert base_config(adapter.path)["_name_or_path"] == str(source.path)
    if not has_checkpoint:
        trained_further.rename(tmp_path / "elsewhere")
        adapter = replace(adapter, path=begun)
    assert base_of_adapter(adapter) is None
    assert base_of_adapter(replace(adapter, base=Path("runs/a"))) is None
    certificate.write_adapter_certificate(tmp_path, tmp_path, adapter, None)
    reason = f"the adapter was trained for {begun}, which PEFT can load only once it is exported"
    assert json.loads((tmp_path / "certificate.json").read_text()) == {"ok": None, "reason": reason}


def test_a_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    source = written(tmp_path / "theirs", vocab_size=260)
    train_bpe([TEXT * 40], 270, source / "tokenizer.json")
    with pytest.raises(NotConvertible, match=r"tokenizer has the token 269, and model\.vocab_size=260"):
        round_trip(source, tmp_path)
    assert not (tmp_path / "back").exists()


def test_an_added_token_outside_the_vocabulary_is_refused_unless_it_is_special(tmp_path: Path) -> None:
    """Gemma 3's text models come with a token for images that lies behind their vocabulary."""
    source = written(tmp_path / "theirs", vocab_size=300)
    train_bpe([TEXT * 40], 270, source / "tokenizer.json")
    image = {
        "id": 300, "content": "<image>", "special": True, "single_word": False, "lstrip": False,
        "rstrip": False, "normalized": False,
    }  # fmt: skip
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(image)
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "image_token": "<image>",
        "added_tokens_decoder": {"300": {"content": "<image>", "special": True}},
        "extra_special_tokens": {"image_token": "<image>"}, "chat_template": CHAT,
    }  # fmt: skip
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "added_tokens.json").write_text('{"<image>": 300}')
    [note] = noted_round_trip(source, tmp_path)
    assert note.startswith("without the special token '<image>' of its tokenizer: model.vocab_size=300")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert max(loaded.get_vocab().values()) < 300
    assert loaded.decode(loaded.encode(TEXT)) == TEXT
    assert (loaded.eos_token_id, loaded.chat_template) == (0, CHAT)
    settings["added_tokens_decoder"] = {"300": {"content": "word", "special": False}}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(NotConvertible, match="tokenizer has the token 300"):
        round_trip(source, tmp_path / "again")


def test_an_export_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    [note] = noted_round_trip(written(tmp_path / "theirs"), tmp_path)
    assert note.startswith("without a tokenizer")


def test_a_model_that_memory_cannot_hold_in_fp32_gets_no_certificate(tmp_path: Path) -> None:
    source = weights_at(written(tmp_path / "theirs"), "x")
    export(source, tmp_path / "back", OPTIONS, write_byte_tokenizer, memory=10_000)
    found = json.loads((tmp_path / "back" / "certificate.json").read_text())
    assert found["ok"] is None
    assert found["reason"].endswith("of memory in fp32, and this machine has 10.00 kB")


def test_bytes_for_a_model_with_a_tokenizer_are_noticed(tmp_path: Path) -> None:
    train_bpe([TEXT * 40], 270, tmp_path / "tokenizer.json")
    begun = f"checkpoint.init_from={tmp_path}"
    [warning] = check_bytes(run_of("data=stdlib", begun))
    assert f"try: launcher prepare SOURCE TARGET tokenizer.path={tmp_path}/tokenizer.json" in warning
    chat = run_of("data=chat", "data.train=pkg://launcher/data/conversations.jsonl", begun)
    with pytest.raises(ConfigError) as error:
        check_bytes(chat)
    assert error.value.remedy == f"data.tokenizer={tmp_path}/tokenizer.json"
    write_byte_tokenizer(tmp_path / "tokenizer.json")
    assert check_bytes(chat) == check_bytes(run_of("data=stdlib", begun)) == []


@pytest.mark.parametrize("stated", ["bfloat16", "float32", None])
def test_bf16_stays_bf16_unless_another_precision_is_asked(stated: str | None, tmp_path: Path) -> None:
    """The precision is that of the tensors: config.json may state another, or none."""
    source = written(tmp_path / "theirs")
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    dtype = {} if stated is None else {"torch_dtype": stated}
    (source / "config.json").write_text(json.dumps({**config, **dtype}))
    bf16 = {name: t.bfloat16() for name, t in load_file(source / "model.safetensors").items()}
    save_file(bf16, source / "model.safetensors")
    back = load_file(round_trip(source, tmp_path) / "model.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in bf16.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_export_that_transformers_computes_otherwise_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = written(tmp_path / "theirs")
    right = certificate.our_logits
    monkeypatch.setattr(certificate, "our_logits", lambda *arguments: right(*arguments) + 0.01)
    with pytest.raises(ConfigError, match="computes other logits from this export: they differ by"):
        round_trip(source, tmp_path)
    assert not (tmp_path / "back").exists()
    export(
        weights_at(tmp_path / "ours", "x"),
        tmp_path / "back",
        ExchangeConfig(certificate=False),
        write_byte_tokenizer,
    )
    assert not (tmp_path / "back" / "certificate.json").exists()


def test_an_export_that_transformers_cannot_load_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no such\n  size")

    monkeypatch.setattr(certificate, "their_logits", refuse)
    with pytest.raises(ConfigError, match=r"transformers .* cannot load this export: OSError: no such size"):
        round_trip(written(tmp_path / "theirs"), tmp_path)
    assert not (tmp_path / "back").exists()


@pytest.mark.slow
def test_a_run_on_text_exports_the_tokenizer_of_its_bytes(tmp_path: Path) -> None:
    trained("run.dir=a", "training.steps=1", "checkpoint.enabled=false", cwd=tmp_path)
    done = launcher("export", "a", "back", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "as GPT2LMHeadModel, logits differ from transformers" in done.stdout
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert tokenizer.encode(TEXT) == list(TEXT.encode())
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == 0
    assert tokenizer.eos_token_id == 0
    assert tokenizer.encode(f"{TEXT}\0{TEXT}") == list(f"{TEXT}\0{TEXT}".encode())


def test_a_run_on_conversations_exports_tokenizer_and_template(tmp_path: Path) -> None:
    chats = "data=chat", "data.train=pkg://launcher/data/conversations.jsonl", "model.max_sequence_length=256"
    trained("run.dir=a", "training.steps=1", "checkpoint.enabled=false", *chats, cwd=tmp_path)
    done = launcher("export", "a", "back", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    messages = [{"role": "user", "content": TEXT}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == f"<|im_start|>user\n{TEXT}<|im_end|>\n<|im_start|>assistant\n"
    # tokenizers spells the end of documents, a zero byte, like a letter, which is still text.
    assert tokenizer.encode(f"{text}\u0100") == list(f"{text}\u0100".encode())
    assert (tokenizer.eos_token_id, tokenizer.encode("a\0")) == (0, [97, 0])
    assert tokenizer.decode([97, 0, 98], skip_special_tokens=True) == "ab"
