"""`launcher evaluate` gives the numbers of transformers and lm-evaluation-harness on the exported model."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import launcher as package
from launcher.config.errors import ConfigError
from launcher.config.schema import EvaluateConfig
from launcher.data.evaluated import scored_windows
from launcher.data.tokenizer import train_bpe
from launcher.data.windows import Stretch
from launcher.evaluation.results import Results, numbers, write_report
from launcher.evaluation.tasks import _unknown
from launcher.runtime.metrics.wandb_files import fragments, records
from tests.forked_commands import environment, heavy
from tests.runtime.command import launcher, metrics, trained

TEXT = "".join(f"The na\u00efve fox {n} jumps over {n * n} lazy dogs; why?\n" for n in range(300))
LAYOUTS = {
    "one process": [], "tp2": ["parallelism=tp2", "parallelism.sequence_parallel=true"],
    "pp2": ["parallelism=pp2"], "dp2": ["parallelism.data=2"],
    "zero3": ["parallelism=zero3", "parallelism.data=2"],
    "cp2": ["parallelism=cp2", "parallelism.data=1"],
}  # fmt: skip
CONTEXT_LAYOUTS = {
    "gather over 4": ["parallelism.context=4", "parallelism.context_method=gather", "parallelism.data=1"],
    "ulysses x pp2": ["parallelism=pp2", "parallelism.context=2", "parallelism.context_method=ulysses"],
    "ring x tp2": ["parallelism=tp2", "parallelism.context=2", "parallelism.sequence_parallel=true"],
    "ring x zero3": ["parallelism=zero3", "parallelism.context=2", "parallelism.data=2"],
}  # fmt: skip
ROLES = ["user", "assistant", "user", "assistant"]
ENDED = (
    "{% for message in messages %}{{ message.role }}: {% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|endoftext|>{% endgeneration %}"
    "{% else %}{{ message.content }} {% endif %}{% endfor %}"
)
WITHOUT_HARNESS = "import sys; sys.modules['lm_eval'] = None\nfrom launcher.__main__ import main; main()"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with text, its token files, the run `r` on them, and the export `hf` of the run."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "a.txt").write_text(TEXT)
    (folder / "short.txt").write_text(TEXT[:1500])
    succeeds("prepare", "a.txt", "a", "tokenizer.train=bpe", "vocab=300", cwd=folder)
    data = ["data=tokens", "data.train=a", "model=llama_tiny", "model.vocab_size=301"]
    trained(*data, "run.dir=r", "training.steps=3", "optimizer.lr=0.01", cwd=folder)
    succeeds("export", "r", "hf", cwd=folder)
    return folder


def succeeds(*arguments: str, cwd: Path, **extra: str) -> str:
    done = launcher(*arguments, cwd=cwd, **extra)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def report(folder: Path, *arguments: str) -> dict[str, Any]:
    """Return the report of `launcher evaluate` with these arguments."""
    succeeds("evaluate", "report=report.json", *arguments, cwd=folder, **offline(folder))
    content: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return content


def offline(folder: Path) -> dict[str, str]:
    return {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf_home")}


def loss_by_transformers(hf: Path, ids: list[int], length: int, stride: int) -> float:
    """Return the summed loss of all tokens but the first, each in the first window that holds it."""
    model, total, scored = AutoModelForCausalLM.from_pretrained(hf).eval(), 0.0, 1
    for begin in range(0, len(ids), stride):
        inputs = ids[begin : begin + length]
        with torch.no_grad():
            logs = model(torch.tensor([inputs])).logits[0].double().log_softmax(-1)
        for place in range(scored, min(begin + length, len(ids) - 1) + 1):
            total -= float(logs[place - begin - 1, ids[place]])
            scored = place + 1
    return total


@pytest.mark.parametrize(
    "layouts", [LAYOUTS, pytest.param(CONTEXT_LAYOUTS, marks=pytest.mark.slow)], ids=["layouts", "context"]
)
def test_perplexity_equals_transformers_in_each_layout(
    layouts: dict[str, list[str]], place: Path, subtests: pytest.Subtests
) -> None:
    ids = AutoTokenizer.from_pretrained(place / "hf")(TEXT[:1500])["input_ids"]
    end = json.loads((place / "a.json").read_text())["end_of_document"]
    right = loss_by_transformers(place / "hf", [*ids, end], 32, 20)
    first = len(AutoTokenizer.from_pretrained(place / "hf").decode(ids[:1]).encode())
    size = len(TEXT[:1500].encode()) - first
    for name, layout in layouts.items():
        with subtests.test(name):
            found = report(place, "run.dir=r", "text=short.txt", "stride=20", *layout)["data"]["text"]
            assert (found["tokens"], found["bytes"]) == (len(ids), size)
            assert found["loss"] * len(ids) == pytest.approx(right, rel=1e-5)
            assert found["perplexity"] == pytest.approx(math.exp(right / len(ids)), rel=1e-4)
            assert found["bits_per_byte"] == pytest.approx(right / size / math.log(2), rel=1e-5)


def test_a_checkpoint_an_export_token_files_and_validation_data_are_measured(place: Path) -> None:
    checkpoint = next((place / "r" / "checkpoints").glob("step-*"))
    losses = {
        path: report(place, f"run.dir={path}", "tokens=a", "limit=9")["data"]["tokens"]
        for path in (checkpoint, "hf")
    }
    assert len({round(found["loss"], 5) for found in losses.values()}) == 1
    assert {(found["tokens"], found["bytes"]) for found in losses.values()} == {
        (9 * 32, losses["hf"]["bytes"])
    }
    assert list(report(place, "run.dir=r", "limit=3")["data"]) == ["validation"]


@pytest.mark.slow
def test_experts_over_ranks_have_the_loss_of_one_process(tmp_path: Path) -> None:
    trained(
        "model=moe_tiny", "model.experts.ffn_hidden_size=16", "run.dir=r", "training.steps=2", cwd=tmp_path
    )
    layouts = [], ["parallelism.expert=2", "parallelism.data=2"], ["parallelism.tensor=2"]
    found = [report(tmp_path, "run.dir=r", "limit=9", *layout)["data"]["validation"] for layout in layouts]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)


@pytest.mark.slow
def test_a_run_with_adapters_is_measured_as_its_merged_export(place: Path) -> None:
    model = ["model=llama_tiny", "model.vocab_size=301", "checkpoint.init_from=hf", "data=tokens"]
    adapters = ["finetune.lora.rank=2", "finetune.lora.dropout=0.1", "optimizer.lr=0.05"]
    steps = ["training.steps=2", "scheduler=constant", "scheduler.warmup_steps=0"]
    trained(*model, *adapters, *steps, "data.train=a", "run.dir=adapted", cwd=place)
    succeeds("export", "adapted", "merged", "merged=true", cwd=place)

    def loss(path: str, *layout: str) -> float:
        found = report(place, f"run.dir={path}", "tokens=a", "limit=9", *layout)["data"]["tokens"]
        return float(found["loss"])

    merged = loss("merged")
    assert abs(merged - loss("hf")) > 0.01
    for name in ("tp2", "zero3"):
        assert loss("adapted", *LAYOUTS[name]) == pytest.approx(merged, rel=1e-5), name


@pytest.mark.parametrize("layout", ["one process", "tp2"])
def test_conversations_have_the_loss_of_the_runs_validation(layout: str, tmp_path: Path) -> None:
    """In training they are packed and do not see each other; here each is a window of its own."""
    sizes = "model.max_sequence_length=512", "training.global_batch_size=4", "training.micro_batch_size=1"
    data = "data=chat", "data.train=pkg://launcher/data/conversations.jsonl", "data.validation_fraction=0.2"
    rest = "training.steps=2", "training.validation_interval=2", "training.validation_batches=50"
    trained(*data, *sizes, *rest, "run.dir=r", cwd=tmp_path)
    found = report(tmp_path, "run.dir=r", *LAYOUTS[layout])["data"]["validation"]
    row = metrics(tmp_path / "r")[-1]
    assert row["step"] == 2
    assert found["loss"] == pytest.approx(row["val/loss"], rel=1e-5)
    shipped = (Path(package.__file__).parent / "data" / "conversations.jsonl").read_text()
    lines = shipped.splitlines(keepends=True)
    (tmp_path / "kept.jsonl").write_text("".join(lines[-round(0.2 * len(lines)) :]))
    path = "r"
    if layout == "one process":
        succeeds("export", "r", path := "hf", cwd=tmp_path)
        succeeds("prepare", "kept.jsonl", "kept", "chat=true", cwd=tmp_path)
        assert report(tmp_path, "run.dir=hf", "chats=kept")["data"]["chats"] == pytest.approx(found)
    assert report(tmp_path, f"run.dir={path}", "chats=kept.jsonl")["data"]["chats"] == pytest.approx(found)
    # Bytes are tokens here; the end of a conversation is a token without a byte.
    ends = found["tokens"] - found["bytes"]
    assert 0 < ends < 10
    assert found["bits_per_byte"] == pytest.approx(
        found["loss"] * found["tokens"] / found["bytes"] / math.log(2), rel=1e-6
    )


def test_conversations_end_with_the_token_of_the_run(tmp_path: Path) -> None:
    """The first of the usual ends of the tokenizer ends each answer, so that the run has another token."""
    lines = [{"messages": [{"role": role, "content": f"{role} {n}"} for role in ROLES]} for n in range(40)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[-4:]))
    train_bpe([TEXT], 300, tmp_path / "tokenizer.json")
    (tmp_path / "chat_template.jinja").write_text(ENDED)
    data = "data=chat", "data.train=all.jsonl", "data.tokenizer=tokenizer.json", "data.end_of_document=200"
    sizes = "model.vocab_size=300", "training.global_batch_size=2", "training.micro_batch_size=1"
    trained(*data, *sizes, "data.validation_fraction=0.1", "run.dir=r", "training.steps=1", cwd=tmp_path)
    found = report(tmp_path, "run.dir=r")["data"]["validation"]
    assert report(tmp_path, "run.dir=r", "chats=kept.jsonl")["data"]["chats"] == pytest.approx(found)


def test_token_files_of_bytes_are_measured_with_models_of_bytes(tmp_path: Path) -> None:
    """`launcher prepare` writes a tokenizer.json of bytes, and the export of the run another."""
    trained("run.dir=r", "training.steps=1", cwd=tmp_path)
    (tmp_path / "a.txt").write_text(TEXT[:1500])
    succeeds("prepare", "a.txt", "b", cwd=tmp_path)
    succeeds("export", "r", "hf", cwd=tmp_path)
    found = report(tmp_path, "run.dir=r", "text=a.txt")["data"]["text"]
    for path in ("r", "hf"):
        assert report(tmp_path, f"run.dir={path}", "tokens=b")["data"]["tokens"] == pytest.approx(found)


def test_results_are_in_the_summary_of_the_wandb_run(tmp_path: Path) -> None:
    trained("logging=wandb", "run.dir=r", "parallelism.data=1", "training.steps=1", cwd=tmp_path)
    measured = report(tmp_path, "run.dir=r", "limit=3")["data"]["validation"]
    summary = {
        item.key or "/".join(item.nested_key): json.loads(item.value_json)
        for fragment in fragments(tmp_path / "r")
        for record in records(fragment)
        if record.HasField("summary")
        for item in record.summary.update
    }
    of_evaluation = {name: value for name, value in summary.items() if name.startswith("evaluate/")}
    assert of_evaluation == {f"evaluate/validation/{name}": value for name, value in measured.items()}


def test_numbers_have_the_names_that_wandb_shows() -> None:
    of_task = {"alias": "choice", "acc,none": 0.25, "acc_stderr,none": "N/A", "exact_match,strict": 0.5}
    results = Results({"text": {"loss": 1.5, "perplexity": math.inf}}, {"results": {"choice": of_task}})
    assert numbers(results) == {
        "evaluate/text/loss": 1.5, "evaluate/choice/acc": 0.25, "evaluate/choice/exact_match,strict": 0.5,
    }  # fmt: skip


TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "generation": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: ["\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}, {metric: bleu}]
""",
}
BY_HF = """
import json, sys
from pathlib import Path
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
tasks = TaskManager(include_path="tasks", include_defaults=False)
arguments = {"pretrained": "hf", "dtype": "float32"}
found = simple_evaluate("hf", arguments, ["choice", "rolling", "generation"], device="cpu", batch_size=4,
                        task_manager=tasks, log_samples=False, bootstrap_iters=1000)
Path("hf.json").write_text(json.dumps(found["results"], default=str))
"""


@pytest.fixture(scope="module")
def tasks(place: Path) -> Path:
    """Write three tasks over a local file, and their results by lm_eval's own `hf` model."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate", reason="lm_eval's `hf` model needs it")
    (place / "tasks").mkdir()
    documents = [
        {
            "question": f"The na\u00efve fox {n} jumps", "choices": [" over", " lazy dogs; why?", f" {n}"],
            "answer": n % 3, "text": TEXT[50 * n : 50 * n + 30 * (n + 1)], "target": " over",
        }
        for n in range(12)
    ]  # fmt: skip
    lines = "".join(json.dumps(document) + "\n" for document in documents)
    (place / "tasks" / "docs.jsonl").write_text(lines)
    for name, text in TASKS.items():
        files = f"{{data_files: {{test: {place}/tasks/docs.jsonl}}}}"
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {files}\ntest_split: test"
        (place / "tasks" / f"{name}.yaml").write_text(head + text)
    done = heavy().run([], cwd=place, environment=environment(**offline(place)), program=BY_HF, timeout=300)
    assert done.returncode == 0, done.stderr
    return place


NAMED = ["tasks=[choice,rolling,generation]", "task_dir=tasks"]


def assert_same(found: dict[str, Any], by_harness: Path) -> None:
    for task, values in json.loads(by_harness.read_text()).items():
        for metric, value in values.items():
            if "," in metric and "stderr" not in metric:
                assert found[task][metric] == pytest.approx(value, rel=1e-5), (task, metric)


def test_tasks_give_the_numbers_of_the_harness_on_the_export(tasks: Path, subtests: pytest.Subtests) -> None:
    for name in ("tp2", "pp2", "zero3", "cp2"):  # over context ranks each window is filled up to whole chunks
        with subtests.test(name):
            found = report(tasks, *NAMED, "run.dir=r", *LAYOUTS[name])["tasks"]["results"]
            assert_same(found, tasks / "hf.json")


@pytest.mark.slow
def test_tasks_of_a_run_on_bytes_give_the_numbers_of_the_harness(tasks: Path) -> None:
    """The end of documents, a zero byte, is the token before each text."""
    trained("run.dir=b", "training.steps=2", cwd=tasks)
    succeeds("export", "b", "hf-bytes", cwd=tasks)
    program = BY_HF.replace('"pretrained": "hf"', '"pretrained": "hf-bytes"').replace("hf.json", "bytes.json")
    done = heavy().run([], cwd=tasks, environment=environment(**offline(tasks)), program=program, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_same(report(tasks, *NAMED, "run.dir=b")["tasks"]["results"], tasks / "bytes.json")


def test_each_token_but_the_first_is_scored_once_with_context() -> None:
    for total in (2, 5, 31, 32, 33, 100):
        for length, stride in ((8, 8), (8, 3), (1, 1), (200, 50)):
            tokens, scored = np.arange(total), []
            for window in scored_windows(Stretch(tokens), length, stride, total):
                labels = window.tokens[window.first + 1 :].tolist()
                context = window.first + 1
                assert not scored or context >= length - stride + 1
                assert len(window.tokens) <= length + 1
                scored += labels
            assert scored == list(range(1, total))


REFUSED = {
    "": "run.dir=null: `launcher evaluate` needs the directory of a run or a checkpoint",
    "run.dir=nowhere": "run.dir=nowhere: is not a directory",
    "run.dir=empty": "run.dir=empty: contains no weights",
    "run.dir=hf": "belong to no run, so they have no validation data",
    "run.dir=r stride=33": "stride=33: tokens between windows of 32 tokens would not be scored",
    "run.dir=r sequence_length=33": "sequence_length=33: the model takes at most 32 tokens",
    "run.dir=r tokens=other": "tokens=other: they were made with other.tokenizer.json",
    "run.dir=r text=none.txt": "text=none.txt: the glob matches no file",
    "run.dir=r few_shot=1": "few_shot=1: this setting needs tasks",
    "run.dir=r tasks=[choice]": "tasks=['choice']: the package lm_eval (lm-evaluation-harness) is not",
    "run.dir=r parallelism=auto": "parallelism.auto=true: `launcher evaluate` cannot choose a layout",
    "run.dir=r report=a.txt": "report=a.txt: already exists, and the launcher did not write it",
}


def test_wrong_settings_are_refused(place: Path, subtests: pytest.Subtests) -> None:
    (place / "empty").mkdir()
    (place / "b.txt").write_text(TEXT.replace("fox", "owl"))
    succeeds("prepare", "b.txt", "other", "tokenizer.train=bpe", "vocab=290", cwd=place)
    for typed, message in REFUSED.items():
        with subtests.test(typed):
            arguments = ["evaluate", *typed.split()]
            done = heavy().run(arguments, cwd=place, environment=environment(), program=WITHOUT_HARNESS)
            assert done.returncode == 2, done.stdout + done.stderr
            assert message in done.stderr
            assert "\n  try: " in done.stderr


def test_a_report_is_written_to_what_is_no_file(tmp_path: Path) -> None:
    """Such as /dev/stdout, a link, which a file must not replace."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDWR | os.O_NONBLOCK)
    for name in ("pipe", "link"):
        write_report(tmp_path / name, {"weights": "w"}, Results({}, {}))
        assert json.loads(os.read(reader, 10_000))["evaluation"] == {"weights": "w"}
    os.close(reader)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe"]


def test_an_unknown_task_is_answered_with_names_like_it() -> None:
    error = _unknown(EvaluateConfig(), "helaswag", ["hellaswag", "arc_easy", "mmlu"])
    assert isinstance(error, ConfigError)
    assert (error.field, error.value, error.remedy) == ("tasks", "helaswag", "tasks=[hellaswag]")
