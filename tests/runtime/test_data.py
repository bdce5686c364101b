"""Token files, blends and tokenizers in runs started from the command line."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from launcher.config.compose import load_typed
from launcher.config.schema import RunConfig
from launcher.data.tokenizer import HuggingFace
from launcher.runtime.sampling import load_model
from tests.data.token_files import write_documents
from tests.runtime.command import SMALL, launcher, metrics, trained

BLEND = [
    "data=tokens", "data.sources.web=web", "data.sources.code=code",
    "data.weights.web=3", "data.validation_fraction=0.2", "data.test_fraction=0.1",
    "run.dir=r", "parallelism.data=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def blended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run on two data sources: 4 steps of 8 samples, stopped after step 2."""
    folder = tmp_path_factory.mktemp("blend")
    generator = np.random.default_rng(0)
    for name, low, high in (("web", 0, 64), ("code", 128, 200)):
        write_documents(folder / name, [generator.integers(low, high, 4000)])
    trained(*BLEND, "data.weights.code=1", "training.steps=4", "training.stop_at=2", cwd=folder)
    return folder


def test_a_blend_counts_epochs_and_validates_each_source(blended: Path) -> None:
    rows = metrics(blended / "r")
    windows = (2800 - 1) // 32
    assert rows[-1]["data/epochs/web"] == pytest.approx(12 / windows)
    assert rows[-1]["data/epochs/code"] == pytest.approx(4 / windows)
    web, code = rows[-1]["val/loss/web"], rows[-1]["val/loss/code"]
    assert web != code
    assert rows[-1]["val/loss"] == pytest.approx((3 * web + code) / 4)
    assert not any(name.startswith("test/") for name in rows[-1])


def test_a_changed_blend_is_refused_unless_new_blend_is_set(blended: Path) -> None:
    changed = [*BLEND, "data.weights.code=3", "training.steps=4"]
    refused = launcher(*SMALL, *changed, cwd=blended)
    assert refused.returncode == 2
    assert "data.weights={code: 3.0, web: 3.0}" in refused.stderr
    assert "'data.weights={code: 1.0, web: 3.0}'" in refused.stderr
    assert "checkpoint.new_blend=true (to use the new blend from sample 16 on)" in refused.stderr
    said = trained(*changed, "checkpoint.new_blend=true", "training.stop_at=3", cwd=blended)
    assert "a new blend from sample 16 on: {code: 3.0, web: 3.0} (until then {code: 1.0, web: 3.0})" in said
    windows = (2800 - 1) // 32
    assert metrics(blended / "r")[-1]["data/epochs/web"] == pytest.approx((12 + 4) / windows)
    # It goes on with it by itself, and the test part is read once, at the end.
    said = trained(*changed, cwd=blended)
    assert "a new blend" not in said
    rows = metrics(blended / "r")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["data/epochs/web"] == pytest.approx((12 + 8) / windows)
    assert rows[-1]["data/epochs/code"] == pytest.approx((4 + 8) / windows)
    assert {name for name in rows[-1] if name.startswith("test/")} == {
        "test/loss", "test/loss/web", "test/loss/code",
    }  # fmt: skip


def test_changed_tokens_of_a_source_are_refused(blended: Path) -> None:
    write_documents(blended / "other", [np.zeros(4000, np.uint8)])
    changed = [*BLEND, "data.sources.code=other", "data.weights.code=1", "checkpoint.new_blend=true"]
    refused = launcher(*SMALL, *changed, "training.steps=9", cwd=blended)
    assert refused.returncode == 2
    assert "the data source code has changed since the checkpoint: its digest was" in refused.stderr


def test_a_token_id_beyond_the_vocabulary_ends_the_run(tmp_path: Path) -> None:
    ids = np.zeros(3_000_000, np.uint16)
    looked_at = np.linspace(0, 2_850_000 - 4096, 64).astype(int)  # by the check before ranks start
    for start, after in pairwise(looked_at):
        ids[start + 4096 : after] = 300
    write_documents(tmp_path / "web", [ids])
    done = launcher(
        *SMALL, "data=tokens", "data.train=web", "parallelism.data=2", "training.steps=4", cwd=tmp_path
    )
    assert done.returncode == 2, done.stdout
    assert "model.vocab_size=256: web.bin has token id 300 at token" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with text, token files prepared from it in two ways, and a run on the second."""
    folder = tmp_path_factory.mktemp("prepared")
    lines = [json.dumps({"text": f"the cat {n} sat on the mat {n * n} times"}) + "\n" for n in range(400)]
    (folder / "text.jsonl").write_text("".join(lines))
    for arguments in (["bytes"], ["bpe", "tokenizer.train=bpe", "vocab=300"]):
        done = launcher("prepare", "text.jsonl", *arguments, cwd=folder)
        assert done.returncode == 0, done.stderr
    trained(
        "data=tokens", "data.train=bpe", "model.vocab_size=300", "data.document_attention=true",
        "data.end_of_document=0", "run.dir=r", "parallelism=pp2", "parallelism.data=1", "training.steps=2",
        cwd=folder,
    )  # fmt: skip
    return folder


def test_generate_uses_the_tokenizer_that_the_run_recorded(prepared: Path) -> None:
    (prepared / "bpe.tokenizer.json").rename(prepared / "elsewhere.json")
    try:
        done = launcher(
            "generate", "run.dir=r", "prompt=the cat", "max_new_tokens=5", "temperature=0", cwd=prepared
        )
    finally:
        (prepared / "elsewhere.json").rename(prepared / "bpe.tokenizer.json")
    assert done.returncode == 0, done.stderr
    recorded = HuggingFace(prepared / "r" / "huggingface" / "tokenizer.json", field="x")
    model = load_model(load_typed(prepared / "r" / "config.yaml", RunConfig), prepared / "r")
    tokens = recorded.encode(["the cat"])[0].tolist()
    assert tokens[0] > 255
    for _ in range(5):
        tokens.append(int(model.logits(torch.tensor([tokens]))[0, -1, :300].argmax()))
    assert done.stdout == recorded.decode(tokens) + "\n"
    exported = launcher("export", "r", "hf", cwd=prepared)
    assert exported.returncode == 0, exported.stderr
    assert (prepared / "hf" / "tokenizer.json").read_bytes() == (prepared / "bpe.tokenizer.json").read_bytes()


@pytest.mark.slow
def test_an_export_names_the_token_that_ends_the_documents_of_the_data(prepared: Path) -> None:
    """The exports of the run and of its checkpoint name it, also when the token files are gone."""
    end = json.loads((prepared / "bpe.json").read_text())["end_of_document"]
    shutil.copytree(prepared, prepared / "moved", ignore=shutil.ignore_patterns("r", "hf", "moved"))
    trained(
        "data=tokens", "data.train=moved/bpe", "model.vocab_size=300", "run.dir=s", "training.steps=1",
        cwd=prepared,
    )  # fmt: skip
    shutil.rmtree(prepared / "moved")
    for source in ("s", "s/checkpoints/step-00000001"):
        target = f"hf-{source.replace('/', '-')}"
        done = launcher("export", source, target, "certificate=false", cwd=prepared)
        assert done.returncode == 0, done.stderr
        for name in ("config.json", "generation_config.json"):
            content = json.loads((prepared / target / name).read_text())
            assert content["eos_token_id"] == end


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["data.train=bpe"], "model.vocab_size=256: the tokenizer of these data has 300 tokens (bpe.json)"),
        (
            ["data.sources.a=bpe", "data.sources.b=bytes", "data.weights.a=1", "data.weights.b=1",
             "model.vocab_size=300"],
            "data.tokenizer: bpe.tokenizer.json and bytes.tokenizer.json are different tokenizers",
        ),
        (
            ["data.train=bytes", "data.tokenizer=text.jsonl"],
            "data.tokenizer=text.jsonl: this file cannot be read as a tokenizer",
        ),
    ],
)  # fmt: skip
def test_wrong_tokenizers_are_refused(arguments: list[str], said: str, prepared: Path) -> None:
    done = launcher(*SMALL, "data=tokens", *arguments, cwd=prepared)
    assert done.returncode == 2
    assert said in done.stderr


def test_generate_without_a_tokenizer_is_refused_with_a_remedy(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared / "r", tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "huggingface")
    done = launcher("generate", "run.dir=r", "prompt=the", cwd=tmp_path)
    assert done.returncode == 2
    assert "the run recorded none" in done.stderr
    path = prepared / "bpe.tokenizer.json"
    done = launcher("generate", "run.dir=r", "prompt=the", f"tokenizer={path}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_plan_reads_the_vocabulary_of_token_files_that_are_there(prepared: Path) -> None:
    typed = ["plan", *SMALL[:4], "data=tokens", "hardware=cpu", "hardware.accelerators_per_node=1"]
    refused = launcher(*typed, "data.train=bpe", cwd=prepared)
    assert refused.returncode == 2
    assert "model.vocab_size=256: the tokenizer of these data has 300 tokens (bpe.json)" in refused.stderr
    for arguments in (["data.train=bpe", "model.vocab_size=300"], ["data.train=on/the/cluster"]):
        planned = launcher(*typed, *arguments, cwd=prepared)
        assert planned.returncode == 0, planned.stderr


def write_corpus(folder: Path, kind: str, last: int) -> None:
    """Write training and validation data of a kind; `last` changes one token of the validation data."""
    for name, seed, end in (("train", 1, 0), ("held", 2, last)):
        ids = np.append(np.random.default_rng(seed).integers(32, 127, 700), end + 40)
        folder.mkdir(exist_ok=True)
        if kind == "text":
            (folder / f"{name}.txt").write_bytes(ids.astype(np.uint8).tobytes())
        else:
            write_documents(folder / name, [ids])


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("text", {"data.train": "train.txt", "data.validation": "held.txt"}),
        ("tokens", {"data.train": "train", "data.validation": "held"}),
        ("tokens", {"data.sources.a": "train", "data.validation_sources.a": "held"}),
    ],
)
def test_a_moved_corpus_is_the_same_and_a_changed_one_is_refused(
    kind: str, fields: dict[str, str], tmp_path: Path
) -> None:
    run = [f"data={kind}", "run.dir=r", "training.steps=2", "parallelism=single"]
    run += ["data.weights.a=1"] if "data.sources.a" in fields else []

    def data_in(folder: str) -> list[str]:
        return [f"{field}={folder}/{name}" for field, name in fields.items()]

    write_corpus(tmp_path / "here", kind, last=0)
    trained(*run, *data_in("here"), "training.stop_at=1", cwd=tmp_path)
    write_corpus(tmp_path / "changed", kind, last=1)
    refused = launcher(*SMALL, *run, *data_in("changed"), cwd=tmp_path)
    assert refused.returncode == 2
    assert "the validation data has changed since the checkpoint" in refused.stderr
    (tmp_path / "here").rename(tmp_path / "there")
    assert "at step 1" in trained(*run, *data_in("there"), cwd=tmp_path)
