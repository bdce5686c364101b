"""Secrets are recognised, and values of the environment are neither written nor printed."""

import copy
import pickle
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launcher.config.compose import Job, compose_jobs, load_typed
from launcher.config.errors import ConfigError, as_typed
from launcher.config.schema import RunConfig
from launcher.config.secrets import (
    Referenced,
    as_written,
    as_yaml,
    is_secret_name,
    is_secret_value,
    masked,
    without_values,
)
from launcher.config.slurm_rules import check_slurm
from launcher.launch.submission import batch_script_of
from launcher.planning.choose.changes import changed
from tests.config.composing import run_of
from tests.config.test_cli import launcher

SECRET_NAMES = (
    "MY_PASS DB_PWD GITHUB_PAT DATABASE_URL SLACK_WEBHOOK_URL HF_TOKEN WANDB_API_KEY AWS_SECRET_ACCESS_KEY "
    "githubToken DBPASSWORD REDIS_URL SENTRY_DSN SESSION_COOKIE OAUTH_CLIENT CREDENTIALS_FILE my_passphrase "
    "NPM_AUTH MYAPIKEY"
).split()
INNOCENT_NAMES = (
    "PATH PYTHONPATH LD_LIBRARY_PATH KEYBOARD PASSENGER COMPASS NCCL_SOCKET_IFNAME NCCL_PLUGIN_KEY "
    "OMP_PLACES TOKENIZERS_PARALLELISM MAX_TOKENS CUDA_VISIBLE_DEVICES WANDB_BASE_URL HTTPS_PROXY HOME "
    "PATTERN AUTHOR MONKEY TURKEY TORCH_HOME"
).split()
SECRET_VALUES = (
    "https://me:hunter2@proxy:3128", "postgres://u:p@db/x", "ghp_0123456789abcdef", "hf_abcdefghijklmnop",
    "sk-proj-abcdefgh123", "AKIAIOSFODNN7EXAMPLE", "xoxb-1234-abcd", "eyJhbGciOiJIUzI1NiJ9.e30.x",
    "0123456789abcdef0123456789abcdef01234567", "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY9",
    "glpat-abc", "-----BEGIN RSA PRIVATE KEY-----",
)  # fmt: skip
INNOCENT_VALUES = (
    "1", "eth0", "/scratch/user/runs/llama3_70b_3d-2026-11-26T18-00-00", "https://proxy:3128", "sk",
    "expandable_segments:True,garbage_collection_threshold:0.8", "INFO", "max_split_size_mb:512", "0-3,8-11",
    "hf_home", "http://user@host/x", "123456789012345678901234567890", "a" * 50,
)  # fmt: skip


def test_names_of_secrets() -> None:
    assert [name for name in SECRET_NAMES if not is_secret_name(name)] == []
    assert [name for name in INNOCENT_NAMES if is_secret_name(name)] == []


def test_values_of_secrets() -> None:
    assert [value for value in SECRET_VALUES if not is_secret_value(value)] == []
    assert [value for value in INNOCENT_VALUES if is_secret_value(value)] == []
    assert not is_secret_value("0123456789abcdef0123456789abcdef01234567", "GIT_COMMIT")


def test_a_variable_with_a_secret_is_refused_without_its_value(subtests: pytest.Subtests) -> None:
    run = run_of()
    for name, value in [
        *((name, "x1y2") for name in SECRET_NAMES),
        *(("NAME", value) for value in SECRET_VALUES),
    ]:
        with subtests.test(f"{name}={value}"):
            run.slurm.environment = {name: value}
            with pytest.raises(ConfigError) as raised:
                check_slurm(run)
            assert value not in str(raised.value)


@pytest.mark.parametrize(
    ("field", "option", "named"),
    [
        ("sbatch", "--export=ALL,GITHUB_PAT=x1y2", "slurm.sbatch: --export: "),
        ("sbatch", "--comment=https://a:x1y2@host", "slurm.sbatch: --comment: "),
        ("srun", "--container-env=DB_PWD=x1y2", "slurm.srun: --container-env: "),
        ("container", "MY_PASS=x1y2", "slurm.container: item 2: "),
    ],
)
def test_an_option_with_a_secret_is_refused_by_name(field: str, option: str, named: str) -> None:
    run = run_of()
    setattr(run.slurm, field, ["--mail-type=END", option])
    with pytest.raises(ConfigError) as raised:
        check_slurm(run)
    assert "x1y2" not in str(raised.value)
    assert str(raised.value).startswith(named)


def test_a_password_in_a_url_is_masked() -> None:
    assert (
        masked("see https://me:hunter2@host/x and http://host") == "see https://me:***@host/x and http://host"
    )
    assert "hunter2" not in str(ConfigError("data.train", "s3://me:hunter2@host", "is missing", "another"))
    [job] = compose_jobs("config", RunConfig, ["run.dir='https://me:hunter2@host'"])
    assert job.config.run.dir == "https://me:hunter2@host"
    assert "hunter2" not in as_yaml(job.config)


@pytest.fixture
def referring(monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setenv("LAUNCHER_TEST_VALUE", "hunter2")
    monkeypatch.setenv("LAUNCHER_TEST_NUMBER", "64")
    [job] = compose_jobs(
        "config",
        RunConfig,
        [
            "run.dir=runs/${oc.env:LAUNCHER_TEST_VALUE}", "logging.wandb.name=${run.dir}",
            "logging.wandb.tags=[a,'${oc.env:LAUNCHER_TEST_VALUE}']", "data.train=${slurm.job_name}",
            "slurm.environment.A=${oc.env:LAUNCHER_TEST_VALUE}",
            "model.hidden_size=${oc.env:LAUNCHER_TEST_NUMBER}",
        ],
    )  # fmt: skip
    return job.config


class TestReferences:
    def test_are_used_and_not_written(self, referring: RunConfig) -> None:
        assert referring.run.dir == "runs/hunter2"
        assert referring.logging.wandb.tags == ["a", "hunter2"]
        assert referring.model.hidden_size == 64
        written = as_written(referring)
        assert written["run"] == {"dir": "runs/${oc.env:LAUNCHER_TEST_VALUE}"}
        assert written["logging"]["wandb"]["name"] == "${run.dir}"
        assert written["data"]["train"] == "launcher"
        assert written["model"]["hidden_size"] == 64
        assert "hunter2" not in str(written) + as_yaml(referring)

    def test_stay_through_copies(self, referring: RunConfig) -> None:
        copies = (
            copy.deepcopy(referring),
            pickle.loads(pickle.dumps(referring)),
            changed(referring, {"training.steps": 1}),
        )
        for run in copies:
            assert run.run.dir == "runs/hunter2"
            assert as_typed(run.run.dir) == "runs/${oc.env:LAUNCHER_TEST_VALUE}"

    def test_are_read_again(
        self, referring: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "config.yaml"
        path.write_text(as_yaml(referring))
        assert load_typed(path, RunConfig) == referring
        monkeypatch.delenv("LAUNCHER_TEST_VALUE")
        assert load_typed(path, RunConfig).run.dir == "runs/${oc.env:LAUNCHER_TEST_VALUE}"

    def test_text_that_only_looks_like_one_is_read_as_it_was(self, tmp_path: Path) -> None:
        run = run_of()
        run.run.dir = "a/${oc.env:HOME}\\${x}"
        (tmp_path / "config.yaml").write_text(as_yaml(run))
        assert load_typed(tmp_path / "config.yaml", RunConfig) == run

    def test_are_not_written_into_a_script(self, referring: RunConfig) -> None:
        run = changed(
            referring,
            {"hardware.accelerators_per_node": 2, "hardware.device": run_of("hardware=cpu").hardware.device},
        )
        with pytest.raises(
            ConfigError, match=r"slurm.environment.A=\$\{oc.env:LAUNCHER_TEST_VALUE\}: values of"
        ):
            batch_script_of([Job(run, None, [])], [])
        run.slurm.environment, run.slurm.container = {}, [Referenced("hunter2", "${oc.env:X}")]
        assert batch_script_of([Job(run, None, [])], [])

    def test_are_not_part_of_messages(self, referring: RunConfig) -> None:
        assert without_values("runs/hunter2 is missing") == "runs/${oc.env:LAUNCHER_TEST_VALUE} is missing"

    def test_a_section_from_the_environment_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LAUNCHER_TEST_VALUE", "{A: hunter2}")
        reference = "${oc.decode:${oc.env:LAUNCHER_TEST_VALUE}}"
        with pytest.raises(ConfigError, match="sections and lists cannot"):
            compose_jobs("config", RunConfig, [f'slurm.environment="{reference}"'])

    def test_no_command_prints_them(self, tmp_path: Path) -> None:
        reference = "${oc.env:LAUNCHER_TEST_VALUE}"
        commands = [
            ["--cfg", "job", f"run.dir={reference}"],
            ["--help", f"run.dir={reference}"],
            ["data=text", f"data.train=/none/{reference}"],
            [f"model.hidden_size={reference}"],
            [f"hardware.device={reference}"],
            ["generate", f"run.dir=/none/{reference}"],
            ["submit", "submit.dry_run=true", "experiment=gpt2_small", f"run.dir={reference}"],
            ["submit", "submit.dry_run=true", "experiment=gpt2_small", f"slurm.job_name={reference}"],
        ]
        for ended in launcher(tmp_path, *commands, LAUNCHER_TEST_VALUE="hunter2"):
            assert "hunter2" not in ended.out + ended.err
            assert "LAUNCHER_TEST_VALUE" in ended.out + ended.err


def test_an_argument_with_a_secret_is_not_written_into_a_script() -> None:
    [job] = compose_jobs("config", RunConfig, ["hardware=cpu", "hardware.accelerators_per_node=2"])
    with pytest.raises(ConfigError) as raised:
        batch_script_of([job], ["data.train=https://me:hunter2@host"])
    assert "hunter2" not in str(raised.value)


def test_written_configs_have_plain_values() -> None:
    assert OmegaConf.create(as_written(run_of("precision=bf16"))).precision.dtype == "bf16"
