"""W&B that dies, hangs, refuses or cannot start: the run ends in time, and no row is lost."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler

from tests.faults.campaign import Family, Try
from tests.faults.processes import LAYOUTS, RUN, check_complete, numbers, undisturbed
from tests.forked_commands import LAUNCHER
from tests.runtime.wandb_server import Server, close, hang, refuse, wandb_server

COMMAND = [*RUN, "logging=wandb", "launch.timeout_minutes=0.4"]
LIMIT = 75.0  # seconds; W&B gets a quarter of launch.timeout_minutes for its start and its end
# Lets the run wait for the campaign before a step, so that a fault comes in the middle.
WAITING = """
import time
from pathlib import Path
import launcher.runtime.training as training
step = training.optimizer_step
def waiting(run, engine, loader, progress):
    while progress.step == {step} and not Path("fault").exists():
        time.sleep(0.01)
    return step(run, engine, loader, progress)
training.optimizer_step = waiting
"""
SERVICE_KILLED = """
import os, signal
from launcher.runtime.metrics import wandb_thread
log = wandb_thread.WandbSession.log
def killing(self, row):
    log(self, row)
    if row["step"] == {step}:
        import wandb
        wandb.sdk.wandb_setup._singleton._connection._proc._process.kill()
wandb_thread.WandbSession.log = killing
"""


def dribble(handler: BaseHTTPRequestHandler) -> None:
    """Answer a byte per second, for as long as the client reads."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    with suppress(OSError):  # the client reads no longer
        for _ in range(1000):
            handler.wfile.write(b" ")
            time.sleep(1)


def answer_nonsense(handler: BaseHTTPRequestHandler) -> None:
    handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
    handler.send_response(200)
    handler.send_header("Content-Length", "9")
    handler.end_headers()
    handler.wfile.write(b"<html>{}\n")


SERVER_FAULTS: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {
    "hangs": hang,
    "closes": close,
    "dribbles": dribble,
    "answers nonsense": answer_nonsense,
    **{f"answers {code}": refuse(code) for code in (400, 401, 403, 404, 413, 429, 500, 503)},
}


# Variables of a start at which W&B fails, or is to be offline or disabled; {folder} is the try's directory.
SURROUNDINGS: dict[str, dict[str, str]] = {
    "no key": {},
    "nobody listens": {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40},
    "unknown host": {"WANDB_BASE_URL": "http://nowhere.invalid", "WANDB_API_KEY": "0" * 40},
    "no URL": {"WANDB_BASE_URL": "nonsense", "WANDB_API_KEY": "0" * 40},
    "short key": {"WANDB_API_KEY": "short", "WANDB_BASE_URL": "http://127.0.0.1:9"},
    "unknown mode": {"WANDB_MODE": "perhaps"},
    "disabled": {"WANDB_MODE": "disabled"},
    "no HOME": {"HOME": "", "LOGNAME": "", "USER": ""},
    "HOME is a file": {"HOME": "{folder}/file"},
    "cache is a file": {"WANDB_CACHE_DIR": "{folder}/file", "WANDB_CONFIG_DIR": "{folder}/file"},
    "data is a file": {"WANDB_DATA_DIR": "{folder}/file", "WANDB_DIR": "{folder}/file"},
    "odd project": {"WANDB_PROJECT": "a/b", "WANDB_ENTITY": "x y", "WANDB_TAGS": "a" * 200},
    "damaged settings": {"WANDB_CONFIG_DIR": "{folder}/settings"},
}


def attempt(this: Try) -> None:
    rng = this.rng
    layout = rng.choice(("single", "dp2"))
    kind = rng.choices((_server, _surroundings, _service), (6, 3, 1))[0]
    with wandb_server() as server:
        code, said = kind(this, layout, server)
        server.fault = None
        this.expect(code == 0, "lost", said)
        check_complete(this, "after W&B failed")
        whole = numbers(undisturbed(this.shared, layout))
        this.expect(numbers(this.run_dir) == whole, "lost", "other numbers than an undisturbed run")
        _check_synced(this, server)


def _server(this: Try, layout: str, server: Server) -> tuple[int, str]:
    """The server has a fault from a step on, or from the start."""
    name = this.rng.choice(sorted(SERVER_FAULTS))
    step = this.rng.choice((None, 1, 3, 5))
    this.case = f"{layout}: the server {name} {'at once' if step is None else f'after step {step}'}"
    with _fault_after(step, this, server, SERVER_FAULTS[name]):
        program = LAUNCHER if step is None else WAITING.format(step=step) + LAUNCHER
        done = this.run(*COMMAND, *LAYOUTS[layout], program=program, limit=LIMIT, **server.environment)
    return done.code, done.brief


@contextmanager
def _fault_after(
    step: int | None, this: Try, server: Server, fault: Callable[[BaseHTTPRequestHandler], None]
) -> Iterator[None]:
    """Let the server have the fault once the run has logged `step`; at once without a step."""
    rows, stop = this.run_dir / "metrics.jsonl", threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            if step is None or (rows.exists() and len(rows.read_bytes().splitlines()) >= step):
                server.fault = fault
                (this.folder / "fault").touch()
                return

    if step is None:
        server.fault = fault
    watcher = threading.Thread(target=watch)
    watcher.start()
    yield
    stop.set()
    watcher.join()


def _surroundings(this: Try, layout: str, server: Server) -> tuple[int, str]:
    name = this.rng.choice([*SURROUNDINGS, "wandb is a file"])
    this.case = f"{layout}: {name}"
    (this.folder / "file").write_text("")
    (this.folder / "settings").mkdir()
    (this.folder / "settings" / "settings").write_bytes(b"\xff[default\nmode=\x00")
    extra = {key: value.format(folder=this.folder) for key, value in SURROUNDINGS.get(name, {}).items()}
    # W&B's directory of the run is a file as soon as the run has a directory.
    program = (
        "import launcher.runtime.training as training\nbuild = training.build_engine\n"
        "def building(*arguments, **options):\n    open('r/wandb', 'a')\n"
        "    return build(*arguments, **options)\n"
        f"training.build_engine = building\n{LAUNCHER}"
        if name == "wandb is a file"
        else LAUNCHER
    )
    done = this.run(*COMMAND, *LAYOUTS[layout], program=program, limit=LIMIT, **extra)
    if name == "wandb is a file":
        this.expect("W&B" in done.out and "wandb" in done.said, "silent", f"no note: {done.brief}")
        (this.run_dir / "wandb").unlink(missing_ok=True)
    return done.code, done.brief


def _service(this: Try, layout: str, server: Server) -> tuple[int, str]:
    """W&B's own process is killed in the middle."""
    step = this.rng.randint(1, 6)
    online = this.rng.random() < 0.5
    this.case = f"{layout}: W&B's process is killed after step {step}, {'online' if online else 'offline'}"
    program = SERVICE_KILLED.format(step=step) + LAUNCHER
    extra = server.environment if online else {}
    done = this.run(*COMMAND, *LAYOUTS[layout], program=program, limit=LIMIT, **extra)
    return done.code, done.brief


def _check_synced(this: Try, server: Server) -> None:
    """Check that `launcher sync` uploads whatever a healthy server lacks."""
    done = this.run("sync", "r", limit=LIMIT, **server.environment)
    this.expect(done.code == 0, "lost", f"sync: {done.brief}")
    run_id = json.loads((this.run_dir / "run.json").read_text())["id"]
    steps = server.steps(run_id) if run_id in server.history else []
    expected = [row[0] for row in numbers(this.run_dir)]
    this.expect(steps == expected, "lost", f"the server has steps {steps} after launcher sync: {done.brief}")


FAMILY = Family("wandb", 60, attempt)
