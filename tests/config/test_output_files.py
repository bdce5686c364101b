"""A file of the user is never overwritten by a picture or a report."""

from pathlib import Path

import pytest

from launcher.commands.report_files import check_figure_is_writable, check_files_differ
from launcher.commands.verify import _writable
from launcher.config.errors import ConfigError
from launcher.config.output_files import check_overwrites_no_picture, check_overwrites_no_report
from launcher.config.schema import EvaluateConfig
from launcher.planning.show.plan_figure import check_figure
from tests.config.composing import run_of
from tests.config.test_cli import launcher


@pytest.mark.parametrize("text", ["mine", "{}", "[1]", '{"a": 1}', "[" * 10**5])
def test_a_report_does_not_overwrite_a_file_of_the_user(text: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="already exists, and the launcher did not write it") as refused:
        _writable(run_of(f"verify.report={path}"))
    assert refused.value.remedy == f"verify.report={tmp_path}/report-2.json"
    assert path.read_text() == text


def test_a_report_overwrites_an_earlier_report(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    for text in ("", '{"passes": []}', '[{"passes": 1}, {"passes": 2}]'):
        path.write_text(text)
        check_overwrites_no_report(path, "verify.report", "passes")
    check_overwrites_no_report(tmp_path / "new.json", "verify.report", "passes")
    check_overwrites_no_report(Path("/dev/stdout"), "verify.report", "passes")


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_a_picture_overwrites_only_pictures_of_the_launcher(ending: str, tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    path = tmp_path / f"a{ending}"
    figure.savefig(path)
    with pytest.raises(ConfigError, match="already exists"):
        check_figure(str(path))
    figure.savefig(path, metadata={"Title": "written by launcher"})
    check_overwrites_no_picture(path, "plan.figure")


@pytest.mark.parametrize("path", ["/", ".", "..", "a.txt"])
def test_a_picture_without_a_name_or_an_ending_gets_one(path: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_figure(path, "compare.figure")
    assert str(refused.value.remedy).startswith("compare.figure=")
    assert ".png or compare.figure=" in str(refused.value.remedy)


def test_a_picture_that_may_not_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old.png").touch()
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    for path in (None, str(tmp_path / "old.png")):
        check_figure_is_writable(path, "compare.figure")
    with pytest.raises(ConfigError, match=r"you may not write to this file\n  try: compare\.figure=null"):
        check_figure_is_writable(str(tmp_path / "new.png"), "compare.figure")
    assert [entry.name for entry in tmp_path.iterdir()] == ["old.png"]


@pytest.mark.parametrize(
    ("command", "field", "file"),
    [
        ("verify", "verify.report", "r.json"), ("evaluate run.dir=r", "report", "r.json"),
        ("plan", "plan.figure", "p.png"),
    ],
)  # fmt: skip
def test_jobs_of_a_sweep_do_not_overwrite_a_file(command: str, field: str, file: str, tmp_path: Path) -> None:
    swept = "limit=1,2" if command.startswith("evaluate") else "training.seed=1,2"
    same = [*command.split(), "--multirun", swept, f"{field}={file}"]
    [ended] = launcher(tmp_path, same)
    why = "2 jobs of the sweep would write this file, and only the last would remain"
    assert ended.err == f"launcher: {field}={file}: {why}\n  try: {field}=null, or one command per job\n"
    assert ended.code == 2
    assert list(tmp_path.iterdir()) == []


def test_jobs_of_a_sweep_may_share_a_device_or_write_a_file_each(tmp_path: Path) -> None:
    for paths in (["a.json", "b.json"], ["/dev/stdout"] * 2, ["a.json", None]):
        configs = [EvaluateConfig(report=path) for path in paths]
        check_files_differ(configs, "report")
    with pytest.raises(ConfigError):
        check_files_differ([EvaluateConfig(report=path) for path in ("a.json", "./a.json")], "report")
