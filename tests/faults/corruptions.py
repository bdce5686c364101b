"""Corrupted checkpoints, final weights, and companions of a run: refused by name, or harmless."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from launcher.checkpoint.manifest import CHECKPOINTS, step_name
from tests.checkpoint.corruptions import HARMLESS, corrupt
from tests.faults.campaign import Abandoned, Ended, Family, Shared, Try
from tests.faults.processes import COMPARED, LAYOUTS, RUN, check_restarted, numbers, undisturbed
from tests.forked_commands import light
from tests.runtime.command import trained

STOPPED_AT = 4
RESUMED = 0.2  # of the corrupted checkpoints, those from which a run is resumed
COMMAND = [*RUN, *LAYOUTS["single"]]
# Damage to the first kind never ends a run; the others are refused by name.
PASSED_OVER, NAMED = ("metrics.jsonl", "holder.json"), ("run.json", "excluded.json")


def stopped(shared: Shared) -> Path:
    """Return the directory of a run that was stopped after four of six steps."""

    def train(folder: Path) -> None:
        trained(*COMMAND, f"training.stop_at={STOPPED_AT}", cwd=folder)
        shutil.rmtree(folder / "r" / "weights")

    return shared.made("stopped", train) / "r"


def attempt(this: Try) -> None:
    target = this.rng.choices([_checkpoint, _weights, _companion], [5, 3, 3])[0]
    target(this)


def _checkpoint(this: Try) -> None:
    shutil.copytree(stopped(this.shared), this.run_dir)
    newest = step_name(STOPPED_AT)
    this.case = f"checkpoint, {corrupt(this.run_dir / CHECKPOINTS / newest, this.rng)}"
    harmless = _is_harmless(this.case)
    _check_command(this, newest, harmless)
    for verb in ("ls", "show"):
        this.run("checkpoint", verb, "r", server=light)
    if this.rng.random() > RESUMED:
        return
    if not harmless:
        refused = this.run(*COMMAND)
        _expect_refusal(this, refused, newest)
    check_restarted(this, [*COMMAND, "checkpoint.fallback=true"], undisturbed(this.shared, "single"))


def _is_harmless(case: str) -> bool:
    return case.partition(", ")[2].partition(":")[0] in HARMLESS


def _check_command(this: Try, name: str, harmless: bool) -> None:
    done = this.run("checkpoint", "check", "r", server=light)
    this.expect(done.code == int(not harmless), "silent", f"checkpoint check: {done.brief}")
    this.expect(f"{name}  cannot be used: " in done.out or harmless, "silent", f"no name: {done.brief}")


def _expect_refusal(this: Try, done: Ended, name: str) -> None:
    this.expect(done.code == 2, "silent", f"refusal expected: {done.brief}")
    this.expect(name in done.error, "silent", f"{name} is not named: {done.brief}")


def _weights(this: Try) -> None:
    shutil.copytree(undisturbed(this.shared, "single"), this.run_dir)
    this.case = f"weights, {corrupt(this.run_dir / 'weights', this.rng)}"
    harmless = _is_harmless(this.case)
    _check_command(this, "weights", harmless)
    if this.rng.random() < RESUMED:
        used = this.run("generate", "run.dir=r", "max_new_tokens=1")
        if harmless:
            this.expect(used.code == 0, "lost", f"generate: {used.brief}")
        else:
            _expect_refusal(this, used, "weights")


def _companion(this: Try) -> None:
    """Corrupt a file beside the checkpoints and resume the run."""
    shutil.copytree(stopped(this.shared), this.run_dir)
    name = this.rng.choice((*PASSED_OVER, *NAMED))
    path, aside = this.run_dir / name, this.folder / "aside"
    if path.exists():
        shutil.copy(path, aside)
    else:
        path.write_text("[]\n")
    how = this.rng.choice(sorted(DAMAGE))
    DAMAGE[how](path, this.rng)
    this.case = f"{name}, {how}"
    done = this.run(*COMMAND)
    if done.code:
        is_file = path.is_file() and not path.is_symlink()
        this.expect(not (is_file and name in PASSED_OVER), "lost", f"damage ended the run: {done.brief}")
        _expect_refusal(this, done, name)
        _restore(path, aside)
    check_restarted_rows(this)


def _restore(path: Path, aside: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if aside.exists():
        shutil.copy(aside, path)


def check_restarted_rows(this: Try) -> None:
    """Check that the run is complete, with the undisturbed run's numbers after the step of the checkpoint."""
    again = this.run(*COMMAND)
    this.expect(again.code == 0, "lost", f"the same command again: {again.brief}")
    if again.code:
        raise Abandoned
    whole = [row for row in numbers(undisturbed(this.shared, "single")) if row[0] > STOPPED_AT]
    text = (this.run_dir / "metrics.jsonl").read_text().splitlines()[-len(whole) :]
    rows = [[json.loads(line)[name] for name in COMPARED] for line in text]
    this.expect(rows == whole, "lost", f"other numbers than an undisturbed run: {rows}")


def _flipped(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _cut(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def _grown(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 3000)))


def _filled(path: Path, rng: random.Random) -> None:
    """Write other content: what other programs write, or what no parser expects."""
    path.write_text(rng.choice(CONTENTS))


def _replaced(make: Callable[[Path], object]) -> Callable[[Path, random.Random], None]:
    def replace(path: Path, _rng: random.Random) -> None:
        path.unlink()
        make(path)

    return replace


CONTENTS = (
    "", "\n", "null\n", "1\n", "[]\n", "{}\n", "{" * 10**5, "[" * 10**5, "9" * 10**5, '{"step": 1}\n' * 1000,
    '{"step": -1}\n', '{"step": 1e400}\n', '{"step": NaN}\n', '{"id": "x"}\n', "name: mine\n", "\ufeff{}\n",
    '[[5, 1]]\n', '[[0, 1, 2]]\n', '[["a", "b"]]\n', '[[1e400, 2]]\n', "\0" * 5000, "x" * 3 * 10**6,
)  # fmt: skip
DAMAGE: dict[str, Callable[[Path, random.Random], None]] = {
    "flipped bit": _flipped,
    "cut": _cut,
    "grown": _grown,
    "other content": _filled,
    "directory": _replaced(Path.mkdir),
    "FIFO": _replaced(os.mkfifo),
    "link to a device": _replaced(lambda path: path.symlink_to("/dev/zero")),
    "link to itself": _replaced(lambda path: path.symlink_to(path.name)),
    "sparse giant": lambda path, rng: os.truncate(path, 2 ** rng.randrange(31, 38)),
}

FAMILY = Family("corruptions", 200, attempt)
