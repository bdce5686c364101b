"""W&B: one rank, one run, the composed config; offline files read back, and a server that does not answer."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.config.schema import WandbMode
from launcher.runtime.metrics import resolved_mode
from tests.runtime.command import metrics, trained

BLOCK, HEADER = 32768, 7


def records(run: Path) -> Iterator[Any]:
    """The protobuf records of the one offline run in a run directory: a LevelDB log after a 7-byte header."""
    from wandb.proto import wandb_internal_pb2

    (path,) = (run / "wandb").glob("offline-run-*/*.wandb")
    data, position, partial = path.read_bytes(), HEADER, b""
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        partial += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(partial)
            partial = b""
            yield record


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wandb")
    out = trained(
        "logging=wandb", "run.dir=r", "parallelism.data=2", "training.steps=3", "logging.wandb.project=tests",
        cwd=folder,
    )  # fmt: skip
    assert "W&B      " in out
    assert "offline" in out
    return folder / "r"


def test_the_history_is_that_of_metrics_jsonl(logged: Path) -> None:
    history = []
    for record in records(logged):
        if record.HasField("history"):
            items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            history.append({k: v for k, v in items.items() if not k.startswith("_")})
    assert history == metrics(logged)


def test_the_run_has_the_composed_config_and_the_directorys_identity(logged: Path) -> None:
    run = next(record.run for record in records(logged) if record.HasField("run"))
    assert run.run_id == json.loads((logged / "run.json").read_text())["id"]
    assert run.project == "tests"
    config = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert config["model"]["family"] == "gpt"
    assert config["training"]["global_batch_size"] == 8
    assert config["layout"]["data"] == 2


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_given_up_and_said(tmp_path: Path) -> None:
    out = trained(
        "logging=wandb", "run.dir=r", "parallelism.data=1", "training.steps=1", cwd=tmp_path,
        WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9",
    )  # fmt: skip
    assert "W&B is not reachable, logging offline" in out
    assert len(metrics(tmp_path / "r")) == 1


@pytest.mark.parametrize(
    ("mode", "environment", "expected"),
    [
        (WandbMode.auto, {}, "offline"),
        (WandbMode.auto, {"WANDB_API_KEY": "k"}, "online"),
        (WandbMode.auto, {"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, "disabled"),
        (WandbMode.offline, {"WANDB_API_KEY": "k"}, "offline"),
        (WandbMode.disabled, {"WANDB_MODE": "online"}, "disabled"),
    ],
)
def test_the_mode(
    mode: WandbMode,
    environment: dict[str, str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert resolved_mode(mode) == expected


def test_a_netrc_entry_is_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai login user password key\n")
    netrc.chmod(0o600)
    assert resolved_mode(WandbMode.auto) == "online"
