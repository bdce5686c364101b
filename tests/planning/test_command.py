"""`launcher plan` as it is typed: its output, its imports and its refusals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.config.test_cli import ENVIRONMENT, Ended, launcher
from tests.forked_commands import LAUNCHER, light

RUN = ["model=llama3_8b", "hardware=h100_80gb", "precision=bf16", "training.global_batch_size=64"]
MICRO = "training.micro_batch_size=1"


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    folder = tmp_path_factory.mktemp("plan")
    commands = {
        "table": ["plan", *RUN, MICRO],
        "json": ["plan", *RUN, MICRO, "format=json"],
        "sweep": ["plan", "-m", *RUN, MICRO, "parallelism.tensor=4,8", "format=json"],
        "nodes": ["plan", *RUN, MICRO, "hardware.nodes=4", "parallelism=tp2_pp2", "plan.tokens=1e12"],
        "here": ["plan"],
        "help": ["plan", "--help"],
        "cfg": ["plan", "--cfg", "job", "format=json"],
        "figure": ["plan", *RUN, MICRO, "plan.figure=picture.png"],
    }
    return dict(zip(commands, launcher(folder, *commands.values()), strict=True))


def test_plans_without_importing_torch(ended: dict[str, Ended]) -> None:
    for name, one in ended.items():
        assert (one.err, one.heavy) == ("", []), name
    # These do not fit: exit code 1. Of the sweep, some do.
    assert {name for name, one in ended.items() if one.code} == {"table", "json", "figure"}


def test_a_plan_imports_no_library_that_reads_data(tmp_path: Path) -> None:
    """numpy would add a tenth of a second to the second that a plan may take."""
    command = [sys.executable, "-X", "importtime", "-m", "launcher", "plan"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {"launcher.planning.cost.run_plan", "hydra"} <= imported
    assert not {"numpy", "torch", "launcher.data.open"} & imported


def test_the_table_has_every_part(ended: dict[str, Ended]) -> None:
    for words in (
        "8.03 B parameters",
        "8 cuda ranks = 1 pipeline x 8 data x 1 tensor",
        "ZeRO-0 has defects in bf16 and fp16",  # the layout's note
        "Memory of one rank, GB",
        "too much",
        "Sent by one rank in a step",
        "Time of a step",
        "tokens/s, MFU ",
        "limit    memory: ",
        "advice   parallelism.",
    ):
        assert words in ended["table"].out, words
    assert "days for 1 T tokens" in ended["nodes"].out
    assert "0.00 GB" not in ended["here"].out.split("Sent by")[1]


def test_standard_output_has_json_only(ended: dict[str, Ended]) -> None:
    found = json.loads(ended["json"].out)
    assert found["model"]["parameters"] == 8_030_261_248
    assert found["fits"] is False
    swept = json.loads(ended["sweep"].out)
    assert [one["layout"]["tensor"] for one in swept] == [4, 8]


def test_help_and_cfg(ended: dict[str, Ended]) -> None:
    assert "launcher plan [OVERRIDES]" in ended["help"].out
    assert "hardware: a100_40gb" in ended["help"].out
    assert "format: json" in ended["cfg"].out


def test_the_figure_is_written_to_its_path(ended: dict[str, Ended]) -> None:
    assert ended["figure"].out.endswith("figure   picture.png\n")


WRONG = {
    "plan parallelism.tensor=3": "parallelism.tensor=3: 4 attention heads cannot be split 3 ways",
    "plan format=xml": "format=xml: must be one of table | json",
    "format=json": "format=json: no such field",
    "plan plan.tokens=0": "plan.tokens=0.0: must be a finite number above 0",
    "plan plan.figure=picture.gif": "plan.figure=picture.gif: a picture is .png, .svg or .pdf",
    "plan plan.figure=none/plan.png": "plan.figure=none/plan.png: there is no directory none",
    "plna model=gpt_tiny": "plna: no such command",
    "plan hardware=h100_80gb": "training.global_batch_size=16: not a multiple of 32",
    "plan hardware.gemm_efficiency=2": "hardware.gemm_efficiency=2.0: must be above 0 and at most 1",
}


def test_settings_that_are_refused(tmp_path: Path) -> None:
    for command, ended in zip(WRONG, launcher(tmp_path, *map(str.split, WRONG)), strict=True):
        assert ended.err.startswith(f"launcher: {WRONG[command]}"), ended.err
        assert "try: " in ended.err
        assert (ended.code, ended.out, ended.heavy) == (2, "", [])


def test_without_matplotlib_the_message_names_the_command_that_installs_it(tmp_path: Path) -> None:
    program = f"import sys\nsys.modules['matplotlib'] = None\n{LAUNCHER}"
    arguments = ["plan", "plan.figure=picture.png"]
    done = light().run(arguments, cwd=tmp_path, environment=ENVIRONMENT, program=program)
    assert done.returncode == 2
    assert "pip install 'launcher[figures]'" in done.stderr


@pytest.mark.slow
def test_the_trace_is_printed_beside_the_formulas(tmp_path: Path) -> None:
    [ended] = launcher(
        tmp_path, ["plan", "parallelism=tp2_pp2", "hardware=cpu", "plan.trace=true", "format=json"]
    )
    found = json.loads(ended.out)["trace"]
    assert {one["stage"] for one in found} == {0, 1}
    assert max(abs(one["error"]) for one in found) < 0.03
