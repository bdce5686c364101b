"""A file of the user is never overwritten by a picture or a report."""

from pathlib import Path

import pytest

from launcher.commands.verify import _writable
from launcher.config.errors import ConfigError
from launcher.config.output_files import check_overwrites_no_picture, check_overwrites_no_report
from launcher.planning.show.plan_figure import check_figure
from tests.config.composing import run_of


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
