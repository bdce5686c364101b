"""Every command line of README and docs/ is accepted by its command, and runs in the slow test."""

import importlib.util
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models

from launcher.command_line import VERBS
from launcher.config.compose import compose_jobs
from launcher.config.schema import RunConfig
from launcher.data.token_file import write_index
from launcher.launch.sbatch import check_script_arguments
from tests.config.command_lines import nothing_starts
from tests.config.test_command_lines import ended
from tests.runtime.command import launcher, trained

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAM = re.compile(
    r"(?:\$ )?((?:launcher|torchrun|sbatch|srun|make|pytest|tensorboard|python -m|pip)(?: .+)?)"
)
# A placeholder in the docs, such as a path of the user -> the path or value that the tests use instead.
PLACEHOLDERS = {
    r"runs/NAME|runs/stdlib_gpt-[-\d]+|RUN\.DIR|(?<= )PATH$": "runs/name",
    r"(?<= )DIRECTORY$": "runs",
    r"hf/NAME|PATH/TO/Llama-3-8B": "hf/name",
    r" <overrides>| \.\.\.": "",
    r"--seed N": "--seed 1",
}
QUICK = {"README", "configs", "data"}  # pages of the quick test
REFUSED = ["launcher parallelism.tensor=3"]  # shown as an example of a refusal
ELSEWHERE = {
    "tensorboard --logdir runs": "a program of the package tensorboard",
    "launcher model=llama3_8b hardware=h200_141gb hardware.accelerators_per_node=1 precision=bf16_states "
    "parallelism=single training.micro_batch_size=2 training.global_batch_size=2 training.steps=16 "
    "scheduler.warmup_steps=1 optimizer.lr=1e-5": "needs a GPU of 141 GB",
    "launcher experiment=qwen3_8b_lora checkpoint.init_from=PATH/TO/Qwen3-8B data=tokens "
    "data.train=corpora/mine run.dir=runs/lora": "needs a GPU: tests/checkpoint/test_lora.py",
    "launcher export runs/lora adapter": "needs the run before it: tests/checkpoint/test_lora.py",
    "launcher export runs/lora whole merged=true": "needs that run: tests/checkpoint/test_lora.py",
    "srun launcher": "needs a Slurm cluster: tests/slurm",
    "srun launcher doctor": "needs a Slurm cluster; without it: tests/config/test_doctor.py",
    "launcher sync runs/name": "needs a W&B server: tests/runtime/test_metrics.py",
    "launcher plan 'learn=[...]'": "needs finished runs: tests/planning/test_learning.py",
    "launcher plan 'learn=[runs/a,runs/b]' hardware=h100_80gb "
    "learned=my_conf/hardware/h100_here.yaml": "needs finished runs: tests/planning/test_learning.py",
    "launcher replay run.dir=runs/a step=187 samples=4 parallelism=tp2": "a run with a bad step: "
    "tests/runtime/test_guards.py",
}
# In the slow test.
NEED_A_RUN = {"generate", "replay", "evaluate", "export", "import", "status", "checkpoint", "doctor"}
WRITING = {"prepare", "calibrate"}
TOO_LONG = {  # for the slow test; the quick test checks them
    "calibrate": "measures for minutes: tests/calibrate",
    "tasks=": "needs lm_eval and the tasks' data: tests/evaluation",
    "compare": "trains ten layouts: tests/compare",
    "model=vit_b16": "86 million parameters: tests/data trains small models on folders of images",
    "verify experiment=": "up to minutes: tests/parity/test_command.py verifies each experiment",
    "hardware.nodes=8 parallelism.tensor=8": "minutes: tests/parity/test_command.py verifies 64 nodes",
    "hardware.nodes=64": "minutes: tests/parity/test_command.py verifies such a run",
    "preflight experiment=": "a minute or two: tests/parity/test_preflight.py",
    "preflight model=": "a minute or two: tests/parity/test_preflight.py",
    "this_machine": "needs the file of `launcher calibrate`: tests/calibrate",
}


class Line(NamedTuple):
    """A command as the shell reads it, without comments and redirections."""

    page: str
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return shlex.join(self.words)

    @property
    def verb(self) -> str:
        return self.words[1] if len(self.words) > 1 and self.words[1] in VERBS else "train"


def lines_of(page: Path) -> Iterator[Line]:
    """Yield the commands in blocks, in first cells of tables and, with an argument, in the text of a page."""
    text = page.read_text().replace("\\\n", " ")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    in_blocks = [line for language, block in blocks if not language for line in block.splitlines()]
    cells = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    # `launcher VERB` in the text is the name of a command.
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^\| `[^`]+` \|", "", text, flags=re.MULTILINE))
    spans = [span for span in spans if " " in span and not re.fullmatch(r"launcher [a-z]+( check)?", span)]
    for written in (*in_blocks, *cells, *spans):
        if match := PROGRAM.fullmatch(written):
            command = match[1]
            for pattern, replacement in PLACEHOLDERS.items():
                command = re.sub(pattern, replacement, command)
            words = shlex.split(command, comments=True)
            yield Line(page.stem, tuple(words[: words.index(">")] if ">" in words else words))


LINES = [line for page in PAGES for line in lines_of(page)]
OURS = [line for line in LINES if line.words[0] == "launcher" and line.text not in ELSEWHERE]
OTHERS = [line for line in LINES if line.words[0] != "launcher" and line.text not in ELSEWHERE]


def make_place(folder: Path) -> None:
    """Write the files that the commands name."""
    for name in ("corpus", "corpora", "llama3", "sweep"):
        (folder / name).mkdir(parents=True)
    text = "".join(f"a text of some words, line {number}\n" for number in range(9000))
    (folder / "corpus" / "a.txt").write_text(text)
    for name in ("web", "code_1"):
        np.full(200_000, 65, "<u1").tofile(folder / "corpora" / f"{name}.bin")
        write_index(folder / "corpora" / f"{name}.idx", np.array([200_000], "<i4"), np.dtype("<u1"))
    shutil.copyfile(ROOT / "launcher" / "data" / "conversations.jsonl", folder / "chats.jsonl")
    (folder / "corpora" / "chat.bin").write_bytes(b"ab c\0" * 100)
    (folder / "corpora" / "chat.mask").write_bytes(b"\0\0\1\1\1" * 100)
    write_index(folder / "corpora" / "chat.idx", np.full(100, 5, "<i4"), np.dtype("<u1"))
    words = {"<|endoftext|>": 0, "<unk>": 1}
    Tokenizer(models.WordLevel(words, unk_token="<unk>")).save(str(folder / "llama3" / "tokenizer.json"))
    for part in ("train", "val"):
        for label in range(100):
            (folder / "images" / part / f"{label:02}").mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / "images" / part / f"{label:02}" / "0.png")
    (folder / "my_conf" / "hardware").mkdir(parents=True)
    (folder / "my_conf" / "hardware" / "this_machine.yaml").write_text("defaults: [cpu]\n")
    for page in PAGES:
        for name, text in re.findall(r"```yaml\n# (my_conf/\S+)\n(.*?)```", page.read_text(), re.DOTALL):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)


def remove_written(folder: Path, line: Line) -> None:
    """Remove what `prepare` and `calibrate` write: they do not overwrite files of the user."""
    (folder / "my_conf" / "hardware" / "this_machine.yaml").unlink(missing_ok=True)
    for target in (word for word in line.words if word.startswith("corpora/")):
        for path in folder.glob(f"{target}.*"):
            path.unlink()


def test_the_pages_have_commands_and_no_entry_of_the_lists_is_stale() -> None:
    assert len(OURS) > 50
    assert {*ELSEWHERE, *REFUSED} <= {line.text for line in LINES}
    assert {line.verb for line in OURS} >= {*VERBS} - {"job", "sync"}


@pytest.mark.parametrize(
    "page", [pytest.param(page.stem, marks=[pytest.mark.slow] * (page.stem not in QUICK)) for page in PAGES]
)
def test_every_command_is_accepted(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    make_place(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with nothing_starts():
        # The commands that write last: the others read what stands where they write.
        ours = dict.fromkeys(line for line in OURS if line.page == page)
        for line in sorted(ours, key=lambda line: line.verb in WRITING):
            if line.verb in NEED_A_RUN or "imported" in line.text:
                continue
            with subtests.test(line.text):
                if line.verb in WRITING:
                    remove_written(tmp_path, line)
                code, error = ended(list(line.words[1:]))
                assert code == (2 if line.text in REFUSED else 0), error


def test_commands_of_other_programs(monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests) -> None:
    for line in dict.fromkeys(OTHERS):
        program, *rest = line.words
        with subtests.test(f"{line.page}: {line.text}"):
            if program == "make":
                done = subprocess.run(["make", "-n", *rest], cwd=ROOT, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
            elif program == "pytest":
                assert all((ROOT / path).exists() for path in rest)
            elif program == "python":
                assert importlib.util.find_spec(rest[1])
            elif program == "pip":  # downloads packages
                assert rest[0] == "install"
            elif program == "sbatch":
                [recipe] = [word for word in rest if word.endswith(".sbatch")]
                overrides = rest[rest.index(recipe) + 1 :]
                check_script_arguments(overrides)
                submitted = (ROOT / recipe).read_text().splitlines()[1].removeprefix("# launcher submit ")
                assert compose_jobs("config", RunConfig, [*shlex.split(submitted), *overrides])
            else:
                assert program == "torchrun"
                ranks = rest[rest.index("--nproc-per-node") + 1]
                for name, value in {
                    "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
                }.items():  # fmt: skip
                    monkeypatch.setenv(name, value)
                monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
                with nothing_starts():
                    code, error = ended(rest[rest.index("launcher") + 1 :])
                assert code == 0, error


@pytest.mark.slow
@pytest.mark.parametrize("page", [page.stem for page in PAGES])
def test_every_command_runs(page: str, tmp_path: Path, subtests: pytest.Subtests) -> None:
    """In order, each in a few steps, after a run at runs/name and its export at hf/name.

    A command that several pages name runs with the first of these pages; files are written for each page.
    """
    make_place(tmp_path)
    trained("training.steps=60", "model=gpt_tiny", "run.dir=runs/name", cwd=tmp_path)
    launcher("export", "runs/name", "hf/name", cwd=tmp_path)
    steps = 0
    first = {line.text: line.page for line in reversed(OURS)}
    for line in dict.fromkeys(line for line in OURS if line.page == page):
        runs_before = first[line.text] != page and line.verb not in WRITING
        if runs_before or any(name in line.text for name in TOO_LONG):
            continue
        arguments = list(line.words[1:])
        if line.verb == "prepare":
            remove_written(tmp_path, line)
            # The text here is too short for the vocabulary of a web corpus.
            arguments = ["vocab=512" if argument == "vocab=32000" else argument for argument in arguments]
        elif line.verb == "export":
            shutil.rmtree(tmp_path / "hf" / "name", ignore_errors=True)
        elif line.verb == "train" and "--cfg" not in arguments and "--help" not in arguments:
            steps += 1
            arguments += [f"training.stop_at={steps}", "training.validation_batches=1", "logging=local"]
            arguments += ["profile.steps=1"] if "profile=true" in arguments else []
        elif line.verb == "submit":
            arguments.append("submit.dry_run=true")
        with subtests.test(line.text):
            cache = str(tmp_path / "cache")
            done = launcher(*arguments, cwd=tmp_path, timeout=600, XDG_CACHE_HOME=cache)
            assert done.returncode == (2 if line.text in REFUSED else 0), done.stdout + done.stderr
