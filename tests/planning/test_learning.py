"""`launcher plan learn=[...]`: plans of finished runs, and the hardware config that they refine."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from launcher.commands.plan import main
from launcher.config.errors import ConfigError
from launcher.config.run_format import FORMAT
from launcher.config.secrets import as_yaml
from tests.planning.planned import plan_of

GPT = [
    "model=llama3_8b",
    "model.num_layers=4",
    "training.micro_batch_size=1",
    "hardware=a100_80gb",
    "precision=bf16",
    "training.global_batch_size=64",
]
SLOWER = 1.3  # seconds of computation on this machine, over those of its data sheet


def finished(path: Path, *overrides: str, steps: int = 9) -> Path:
    """Write the files of a run whose computation was slower than its plan."""
    plan = plan_of(*GPT, *overrides, f"hardware.compute_scale={SLOWER}")
    assert plan.time is not None
    path.mkdir()
    (path / "config.yaml").write_text(as_yaml(plan_of(*GPT, *overrides).run))
    (path / "run.json").write_text(json.dumps({"id": "a", "format": FORMAT, "layout": asdict(plan.layout)}))
    rows = [{"step": step, "perf/step_time_s": plan.time.total} for step in range(1, steps + 1)]
    rows[0]["perf/step_time_s"] *= 9  # the first step also warms up
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_runs_refine_the_hardware_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        finished(tmp_path / "a", "parallelism.zero_stage=1"),
        finished(tmp_path / "b", "parallelism.tensor=2", "parallelism.zero_stage=1"),
        finished(tmp_path / "c", "parallelism.pipeline=2", "parallelism.zero_stage=1"),
    ]
    file = tmp_path / "refined.yaml"
    named = ",".join(map(str, runs))
    assert main([f"learn=[{named}]", "hardware=a100_80gb", f"learned={file}", "format=json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["compute_scale"] == pytest.approx(SLOWER, rel=0.01)
    assert report["error_before"] > 0.15
    assert report["error_after"] < 0.01
    assert [row["run"] for row in report["runs"]] == ["a", "b", "c"]
    refined = yaml.safe_load(file.read_text())
    assert refined["compute_scale"] == report["compute_scale"]
    assert main([f"learn=[{runs[0]}]", "hardware=a100_80gb"]) == 0
    assert "setting  hardware.compute_scale=1." in capsys.readouterr().out


def test_a_refined_file_is_new_or_ours(tmp_path: Path) -> None:
    run = finished(tmp_path / "a", "parallelism.zero_stage=1")
    command = [f"learn=[{run}]", "hardware=a100_80gb"]
    file = tmp_path / "my_conf" / "hardware" / "here.yaml"
    for _ in range(2):  # a file that the launcher wrote is replaced
        assert main([*command, f"learned={file}"]) == 0
    file.write_text("name: mine")
    with pytest.raises(ConfigError, match="the launcher did not write this file") as raised:
        main([*command, f"learned={file}"])
    assert raised.value.remedy == f"learned={file.with_name('here-2.yaml')}"
    assert file.read_text() == "name: mine"
    with pytest.raises(ConfigError, match=r"learned=.*/a\.yaml: cannot be written: .*/here\.yaml is a file"):
        main([*command, f"learned={file / 'a.yaml'}"])


def test_values_are_checked_before_runs_are_planned(tmp_path: Path) -> None:
    run = finished(tmp_path / "a", "parallelism.zero_stage=1")
    with pytest.raises(ConfigError, match=r"hardware\.compute_scale=0"):
        main([f"learn=[{run}]", "hardware=a100_80gb", "hardware.compute_scale=0"])


def test_a_run_without_steps_or_a_machine_without_rates_is_refused(tmp_path: Path) -> None:
    short = finished(tmp_path / "short", "parallelism.zero_stage=1", steps=3)
    with pytest.raises(ConfigError, match="has 2 measured rows after its first, and 3 are needed"):
        main([f"learn=[{short}]", "hardware=a100_80gb"])
    with pytest.raises(ConfigError, match="is not a run directory"):
        main([f"learn=[{tmp_path}]", "hardware=a100_80gb"])
    long = finished(tmp_path / "long", "parallelism.zero_stage=1")
    with pytest.raises(ConfigError, match="states no speed to refine"):
        main([f"learn=[{long}]", "hardware=local"])
    (long / "run.json").write_text(json.dumps({"id": "a", "format": FORMAT, "layout": {"data": 1}}))
    with pytest.raises(ConfigError, match=r"its run\.json is damaged, so that its layout is unknown"):
        main([f"learn=[{long}]", "hardware=a100_80gb"])
