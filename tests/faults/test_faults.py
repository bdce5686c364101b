"""The campaign's rules notice a violation; a small campaign of each family breaks none."""

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.checkpoint.manifest import checkpoints_in
from tests.checkpoint.test_corruptions import write
from tests.faults import __main__ as command
from tests.faults.campaign import Family, Shared, Try, attempted, report
from tests.faults.families import FAMILIES
from tests.faults.injection import FIRED, Fault
from tests.faults.processes import NOTE, TRAINING, Case, check_checkpoints
from tests.faults.secrets import check_not_shown
from tests.forked_commands import light

SLEEPING = "import time\ntime.sleep({seconds})\n"
ORPHANED = "import subprocess\nsubprocess.Popen(['sleep', '60'], start_new_session=True)\n"


def printing(text: str) -> str:
    return f"print({text!r})\n"


def loses_its_checkpoint(this: Try) -> None:
    write(this.run_dir, 10)
    (this.folder / FIRED).write_text('["step-00000020"]')
    check_checkpoints(this)


def damages_its_checkpoint(this: Try) -> None:
    write(this.run_dir, 10)
    (this.folder / FIRED).write_text('["step-00000010"]')
    file = next(checkpoints_in(this.run_dir)[0].glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    check_checkpoints(this)


def leaves_a_file(this: Try) -> None:
    (this.temporary / "launcher-x").mkdir()


def writes_a_secret(this: Try) -> None:
    (this.folder / "config.yaml").write_text("a: hunter2")
    check_not_shown(this, this.run(program="print('hunter')\n", server=light), "hunter2")


def prints_a_secret(this: Try) -> None:
    check_not_shown(this, this.run(program=printing("hunter2"), server=light), "hunter2")


def crashes(this: Try) -> None:
    this.run(program="raise RuntimeError('x')\n", server=light)


VIOLATIONS: dict[str, tuple[str, Callable[[Try], object]]] = {
    "a lost checkpoint": ("lost", loses_its_checkpoint),
    "a damaged checkpoint": ("lost", damages_its_checkpoint),
    "an unreadable run": ("lost", lambda this: (this.run_dir / "metrics.jsonl").read_text()),
    "a traceback": ("traceback", crashes),
    "a hang": ("hang", lambda this: this.run(program=SLEEPING.format(seconds=60), server=light, limit=0.2)),
    "an orphan": ("orphan", lambda this: this.run(program=ORPHANED, server=light)),
    "a temporary file": ("orphan", leaves_a_file),
    "a secret in a file": ("exposed", writes_a_secret),
    "a secret in the output": ("exposed", prints_a_secret),
}


def test_the_rules_notice_each_violation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    monkeypatch.setattr("tests.faults.campaign._ENDING", 2.0)
    for name, (kind, violation) in VIOLATIONS.items():
        with subtests.test(name):
            outcome = attempted(Family("fake", 1, violation), 7, 3, Shared(tmp_path))
            assert {kind for kind, _ in outcome.broken} == {kind}, outcome.broken
            [line, *_] = outcome.lines(7)
            assert line.startswith(f"{kind:<9} --seed 7 --only fake:3  []")
            [row] = report([outcome]).splitlines()[2:]
            assert row.startswith("| fake | 1 | 0 |")
    well = attempted(
        Family("fake", 1, lambda this: this.run(program="", server=light)), 7, 3, Shared(tmp_path)
    )
    assert well.broken == []


def test_a_try_is_the_same_alone_and_in_a_campaign(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def attempt(this: Try) -> None:
        this.case = str(this.rng.random())
        this.expect(False, "silent", "nothing")

    monkeypatch.setattr(command, "FAMILIES", {"fake": Family("fake", 3, attempt)})
    assert command.main(["--seed=5"]) == 1
    *_, third = [line for line in capsys.readouterr().out.splitlines() if line.startswith("silent")]
    assert command.main(["--seed=5", "--only=fake:2"]) == 1
    assert capsys.readouterr().out.splitlines()[0] == third
    assert third == f"silent    --seed 5 --only fake:2  [{random.Random('5/fake/2').random()}]"


@pytest.mark.parametrize(
    ("action", "restarts", "code", "output", "is_allowed"),
    [
        ("raise", True, 0, f"{NOTE}, those before it are intact: RuntimeError: the disk is on fire", True),
        ("raise", True, 0, "launcher: restart 1 of 2 at step 3", True),
        ("raise", True, 0, "the disk is on fire", False),
        ("raise", False, 0, "launcher: restart 1 of 2 at step 3", False),
        ("exit", True, 0, "launcher: restart 1 of 2 at step 3", True),
        ("exit", True, 0, "", False),
        ("SIGSTOP", False, 1, "rank 0 of 1 was stopped by SIGSTOP or SIGTSTP for 6 seconds", True),
        ("SIGSTOP", False, 1, "rank 0 of 1 failed", False),
    ],
)
def test_the_message_after_a_fault_is_checked(
    action: str, restarts: bool, code: int, output: str, is_allowed: bool
) -> None:
    case = Case("single", Fault(action, TRAINING.function, actor=0), restarts)
    assert (re.search(case.allowed()[code], output) is not None) == is_allowed


COUNTS = {"processes": 4, "corruptions": 15, "command_lines": 60, "wandb": 2, "secrets": 6}


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_a_small_campaign_breaks_no_rule(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = command.main(["--seed=0", f"--family={name}", f"--count={COUNTS[name]}"])
    assert code == 0, capsys.readouterr().out
    assert FAMILIES.keys() == COUNTS.keys()
