"""`launcher generate`: sample text from a run."""

from pathlib import Path

from launcher.config.arguments import check_no_bare_directory
from launcher.config.compose import compose_jobs, load_typed
from launcher.config.errors import ConfigError
from launcher.config.schema import GenerateConfig, InputKind, RunConfig
from launcher.config.validate import validate_generate
from launcher.launch.this_machine import share_cores, this_machine
from launcher.runtime.run_dir import CONFIG


def main(arguments: list[str]) -> int:
    check_no_bare_directory(arguments)
    for job in compose_jobs("generate", GenerateConfig, arguments):
        run_dir = Path(validate_generate(job.config)).expanduser()
        # Read here only to refuse it: what comes next imports torch.
        if load_typed(run_dir / CONFIG, RunConfig).model.inputs is InputKind.patches:
            why = "holds an image classifier, which writes no text"
            raise ConfigError("run.dir", run_dir, why, "the directory of a language model's run")
        share_cores(1, this_machine().cores)
        from launcher.runtime.sampling import generate

        print(generate(job.config, run_dir))
    return 0
