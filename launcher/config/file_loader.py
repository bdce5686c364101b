"""Load the files of a config: check what YAML read from them, and let slurm files of the user win."""

import copy
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.default_element import ResultDefault
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf, flag_override

from launcher.config.as_written import check_file

OWN_FILES = "command-line"  # Hydra's name for the provider of --config-dir
WITH_ORIGIN = ("slurm.", "scheduler.", "submit.", "verify.")  # the beginnings of fields whose origin is noted


class _SharedRepository(ConfigRepository):
    """The files and the schema of all configs, which Hydra would copy for each group and each composition.

    Hydra copies them because a config may change the search path. Here none may.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> "_SharedRepository":
        return self


class FileLoader(ConfigLoaderImpl):
    """Loads the files of one config after the other.

    A shipped experiment does not replace what a slurm file of the user sets, such as the cluster's time
    limit. An experiment of the user does.
    """

    def __init__(self, search_path: ConfigSearchPath, root: type[Any]) -> None:
        super().__init__(search_path)
        self.repository = _SharedRepository(config_search_path=search_path)
        self.origins: dict[str, str] = {}  # the file that sets each field of WITH_ORIGIN
        self.replaced: set[str] = set()  # fields that the command line sets
        self._root = root
        self._of_cluster: set[str] = set()  # fields that a slurm file of the user sets

    def _compose_config_from_defaults_list(self, *arguments: Any, **named: Any) -> DictConfig:
        self.origins, self._of_cluster = {}, set()
        return super()._compose_config_from_defaults_list(*arguments, **named)

    def _load_single_config(self, default: ResultDefault, repo: Any) -> ConfigResult:
        loaded = super()._load_single_config(default, repo)
        if not loaded.path.startswith("file://") or not isinstance(loaded.config, DictConfig):
            return loaded
        # Hydra keeps the loaded file for the next defaults list.
        config: DictConfig = copy.deepcopy(loaded.config)
        loaded = copy.copy(loaded)
        loaded.config = config
        name = f"{str(default.config_path).removesuffix('.yaml')}.yaml"
        path, is_own = Path(loaded.path.removeprefix("file://"), name), loaded.provider == OWN_FILES
        if is_own:
            package = loaded.header["package"] if default.package is None else default.package
            for field, text in check_file(path, package or "", self._root, self.replaced).items():
                OmegaConf.update(config, field, text)
        fields = _fields_with_origin(config)
        if not is_own and name.startswith("experiment/"):
            for field in self._of_cluster & fields:
                _delete(config, field)
            fields -= self._of_cluster
        if is_own and name.startswith("slurm/"):
            self._of_cluster |= fields
        self.origins |= {field: str(path) if is_own else f"the shipped {name}" for field in fields}
        return loaded


def _fields_with_origin(config: DictConfig) -> set[str]:
    sections = [(prefix, config.get(prefix[:-1])) for prefix in WITH_ORIGIN]
    return {
        f"{prefix}{name!s}"
        for prefix, section in sections
        if isinstance(section, DictConfig)
        for name in section
    }


def _delete(config: DictConfig, field: str) -> None:
    section, _, name = field.rpartition(".")
    with flag_override(config, ["struct", "readonly"], [False, False]):
        del OmegaConf.select(config, section)[name]
