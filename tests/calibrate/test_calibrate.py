"""`launcher calibrate` measures and writes rates, and a plan uses them."""

import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from launcher.calibrate.hardware_file import rank_counts, target
from launcher.calibrate.rounds import combined
from launcher.config.compose import compose_jobs
from launcher.config.errors import ConfigError
from launcher.config.schema import (
    CalibrateConfig,
    Device,
    HardwareConfig,
    MeasuredProducts,
    MeasuredRates,
    PlannedRunConfig,
    Point,
)
from launcher.config.validate import validate
from launcher.config.world import World
from launcher.planning.choose.limits import limit
from launcher.planning.cost.measured_rates import calibrated, interpolated
from launcher.planning.cost.run_plan import Plan, make_plan
from tests.runtime.command import launcher

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a config directory with rates of this machine. They are wrong while other tests run."""
    folder = tmp_path_factory.mktemp("calibrate")
    done = launcher("calibrate", "rounds=1", "most_ranks=2", "dir=mine", "name=here", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "round 1 of 1: 2 ranks" in done.stdout
    assert "launcher plan --config-dir mine hardware=here" in done.stdout
    return folder / "mine"


def planned(folder: Path, *overrides: str) -> Plan:
    [job] = compose_jobs("plan", PlannedRunConfig, [f"--config-dir={folder}", "hardware=here", *overrides])
    return make_plan(job.config, validate(job.config, World("cpu", 2, 2)))


@pytest.mark.slow
def test_a_plan_knows_how_long_a_step_takes(folder: Path) -> None:
    one, two = (planned(folder, f"parallelism.data={ranks}").time for ranks in (1, 2))
    assert one is not None
    assert two is not None
    assert 1e-3 < one.total < 100
    assert two.data > one.data == 0


@pytest.mark.slow
def test_what_is_written_is_a_hardware_config(folder: Path) -> None:
    text = (folder / "hardware" / "here.yaml").read_text()
    assert text.startswith("# ")
    found = yaml.safe_load(text)
    assert [one["ranks"] for one in found["measured"]] == [1, 2]
    for one in found["measured"]:
        rates = [point["per_s"] for dtype in ("fp32", "bf16") for point in one["products"][dtype]]
        rates += [point["per_s"] for point in one["elementwise"]] + [one["stream"]]
        assert min(rates) > 1e6
        assert min(one["operation_s"], one["step_s"]) > 0
        assert [0.3 < scale["factor"] < 5 for scale in one["scales"]] == [True] * 3
    kinds = {(one["kind"], one["ranks"]) for one in found["measured"][1]["collectives"]}
    assert kinds == {(kind, 2) for kind in KINDS}


@pytest.mark.slow
@pytest.mark.parametrize("part", ["products", "elementwise"])
def test_a_slower_machine_takes_longer(part: str, folder: Path) -> None:
    plan = planned(folder, "parallelism.data=1")
    assert plan.time is not None
    hardware = plan.run.hardware
    slower = [_slower(one, part) for one in hardware.measured]
    run = replace(plan.run, hardware=replace(hardware, measured=slower))
    again = make_plan(run, plan.layout)
    assert again.time is not None
    assert again.time.total > 1.1 * plan.time.total


def _slower(one: MeasuredRates, part: str) -> MeasuredRates:
    def half(points: list[Point]) -> list[Point]:
        return [Point(point.size, point.per_s / 2) for point in points]

    if part == "elementwise":
        return replace(one, elementwise=half(one.elementwise))
    return replace(one, products=replace(one.products, fp32=half(one.products.fp32)))


@pytest.mark.slow
def test_training_takes_it_too(folder: Path) -> None:
    done = launcher(
        "plan", f"--config-dir={folder}", "hardware=here", "parallelism=auto", "format=json", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    assert '"time_s": null' not in done.stdout


CURVE = ((1e3, 10.0), (1e4, 100.0), (1e6, 50.0))


@given(st.floats(1, 1e9))
def test_between_points_a_rate_is_between_theirs(size: float) -> None:
    rate = interpolated(CURVE, size)
    assert 0 < rate <= 100.0 * (1 + 1e-9)
    for (low, slow), (high, fast) in pairwise(CURVE):
        if low <= size <= high:
            assert min(slow, fast) * (1 - 1e-9) <= rate <= max(slow, fast) * (1 + 1e-9)


def test_below_all_points_the_time_is_that_of_the_least() -> None:
    assert 10 / interpolated(CURVE, 10) == pytest.approx(1e3 / 10.0)
    assert interpolated(CURVE, 1e9) == 50.0


@pytest.mark.slow
def test_more_ranks_than_cores_take_turns(folder: Path) -> None:
    plan = planned(folder, "parallelism.data=2")
    hardware, dtype = plan.run.hardware, plan.run.precision.dtype
    crowding = [calibrated(hardware, dtype, world).crowding for world in (1, 2, 4)]  # type: ignore[union-attr]
    cores = hardware.cores
    assert cores is not None
    assert crowding == [max(1.0, world / cores) for world in (1, 2, 4)]


def test_rounds_are_combined_by_their_medians() -> None:
    def sample(value: float) -> dict[str, object]:
        return {
            "products": {"fp32": [[8.0, value]]},
            "elementwise": [[4.0, value]],
            "stream": value,
            "operation_s": value,
            "collectives": {"2": {"send": [[16.0, value]]}},
        }

    found = combined(2, [sample(value) for value in (1.0, 30.0, 2.0)])
    assert found.products.fp32 == [Point(8.0, 2.0)]
    assert (found.stream, found.operation_s) == (2.0, 2.0)
    assert (found.collectives[0].kind, found.collectives[0].points) == ("send", [Point(16.0, 2.0)])


def test_a_calibration_of_one_rank_says_nothing_about_several(tmp_path: Path) -> None:
    """`launcher calibrate most_ranks=1` measures no collective."""
    point = [Point(8.0, 1e9)]
    products = MeasuredProducts(fp32=point)
    rates = MeasuredRates(ranks=1, products=products, elementwise=point, stream=1e9, operation_s=1e-6)
    (tmp_path / "hardware").mkdir()
    hardware = OmegaConf.structured(HardwareConfig(device=Device.cpu, cores=2, measured=[rates]))
    (tmp_path / "hardware" / "here.yaml").write_text(OmegaConf.to_yaml(hardware))
    one, two = (planned(tmp_path, f"parallelism.data={ranks}") for ranks in (1, 2))
    assert one.time is not None
    assert two.time is None
    assert limit(two).startswith("unknown: only one rank was measured")


def test_counts_of_ranks() -> None:
    assert [rank_counts(most) for most in (1, 2, 3, 4, 9)] == [
        [1], [1, 2], [1, 2], [1, 2, 4], [1, 2, 4, 8],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("dir=file/conf", "dir=file/conf: cannot be written to: Not a directory"),
        ("name=a/b", "name=a/b: may contain only letters, digits"),
        ("rounds=0", "rounds=0: must be at least 1"),
        ("--multirun", "--multirun: not supported by `launcher calibrate`"),
    ],
)
def test_mistakes_are_refused_at_once(typed: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    started = time.monotonic()
    more = ["rounds=1,2"] if typed == "--multirun" else []
    done = launcher("calibrate", typed, *more, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"launcher: {said}")
    assert time.monotonic() - started < 60


def test_a_hardware_config_of_the_user_is_not_overwritten(tmp_path: Path) -> None:
    config = CalibrateConfig(dir=str(tmp_path), name="mine")
    path = target(config)
    path.write_text("# measured by `launcher calibrate`.")
    assert target(config) == path
    path.write_text("name: mine")
    with pytest.raises(ConfigError, match=r"holds mine\.yaml, which `launcher calibrate` did not write"):
        target(config)
