"""`launcher generate` samples text from a run's final weights, independent of the layout that wrote them."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from launcher.config.errors import ConfigError
from launcher.config.schema import GenerateConfig
from launcher.data.tokenizer import HuggingFace, train_bpe
from launcher.runtime.sampling import prompt_tokens, sample
from tests.runtime.command import launcher, trained


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with final weights written by two pipeline stages."""
    folder = tmp_path_factory.mktemp("staged")
    trained("parallelism=pp2", "model=llama_tiny", "run.dir=r", "training.steps=2", cwd=folder)
    return folder / "r"


def sampled(run: Path, *arguments: str) -> str:
    done = launcher("generate", f"run.dir={run}", *arguments, cwd=run.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_same_seed_gives_the_same_text(staged: Path) -> None:
    text = sampled(staged, "prompt=import", "max_new_tokens=40")
    assert text.startswith("import")
    assert text == sampled(staged, "prompt=import", "max_new_tokens=40")
    assert text != sampled(staged, "prompt=import", "max_new_tokens=40", "seed=1")


def test_a_prompt_may_spell_special_tokens(staged: Path, tmp_path: Path) -> None:
    """As a chat template writes them. A token that the model does not have is refused."""
    path = tmp_path / "tokenizer.json"
    train_bpe(["import " * 50], 258, path)
    config = GenerateConfig(prompt="<|endoftext|>import")
    tokens = prompt_tokens(config, HuggingFace(path, field="tokenizer"), 258)[0].tolist()
    assert tokens[0] == 0
    assert 0 not in tokens[1:]
    assert len(tokens) < len("<import")
    with pytest.raises(ConfigError, match=r"prompt='a\\udcff': only a model of bytes"):
        prompt_tokens(GenerateConfig(prompt="a\udcff"), HuggingFace(path, field="tokenizer"), 258)
    done = launcher("generate", f"run.dir={staged}", f"tokenizer={path}", "prompt=import", cwd=tmp_path)
    assert done.returncode == 2
    assert "prompt=import: it has the token 257, " in done.stderr


def test_a_prompt_without_a_token_is_refused(tmp_path: Path) -> None:
    """A tokenizer that strips text makes none of spaces."""
    from tokenizers import Tokenizer as Tokenizers
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import Strip

    made = Tokenizers(WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    made.normalizer = Strip()
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = HuggingFace(tmp_path / "tokenizer.json", field="tokenizer")
    with pytest.raises(ConfigError, match="prompt='  ': the tokenizer makes no token of this text"):
        prompt_tokens(GenerateConfig(prompt="  "), tokenizer, 256)
    assert prompt_tokens(GenerateConfig(prompt="The"), tokenizer, 256).tolist() == [[0]]


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-5])
@pytest.mark.parametrize("top_k", [0, 2])
def test_a_temperature_near_zero_draws_the_likeliest_token(temperature: float, top_k: int) -> None:
    """Divided by it, all scores but the largest are minus infinity."""
    scores = torch.tensor([-3.0, 2.0, 2.5, 0.0, float("-inf")])
    config = GenerateConfig(temperature=temperature, top_k=top_k)
    generator = torch.Generator().manual_seed(0)
    assert {int(sample(scores, config, generator)) for _ in range(20)} == {2}


def test_top_k_leaves_out_all_other_tokens_at_any_temperature() -> None:
    scores, generator = torch.arange(8.0), torch.Generator().manual_seed(0)
    config = GenerateConfig(temperature=1e6, top_k=3)
    assert {int(sample(scores, config, generator)) for _ in range(200)} == {5, 6, 7}


def test_temperature_zero_is_independent_of_the_seed(staged: Path) -> None:
    greedy = [sampled(staged, "temperature=0", "max_new_tokens=20", f"seed={seed}") for seed in (0, 1)]
    assert greedy[0] == greedy[1]


def test_a_run_that_has_not_finished_generates_from_its_newest_checkpoint(staged: Path) -> None:
    """And refuses it if a byte of its weights is damaged."""
    folder = staged.parent
    trained("run.dir=stopped", "training.steps=9", "training.stop_at=2", cwd=folder)
    shutil.rmtree(folder / "stopped" / "weights")  # a preempted run has written none
    done = launcher("generate", "run.dir=stopped", "max_new_tokens=4", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "note     the run has not finished: weights of step 2\n")
    checkpoint = folder / "stopped" / "checkpoints" / "step-00000002"
    for path in checkpoint.glob("*.safetensors"):
        _flip(path)
    done = launcher("generate", "run.dir=stopped", "max_new_tokens=4", cwd=folder)
    assert done.returncode == 2
    assert "is damaged: its SHA-256 differs" in done.stderr


def test_a_damaged_newest_checkpoint_is_refused_with_the_one_before_it(staged: Path) -> None:
    """A manifest that cannot be read, and a file of weights; once it is removed, the older one is used."""
    folder = staged.parent
    steps = [
        "training.steps=9",
        "training.stop_at=2",
        "checkpoint.interval_steps=1",
        "checkpoint.keep_last=9",
    ]
    trained("run.dir=two", *steps, cwd=folder)
    shutil.rmtree(folder / "two" / "weights")
    newest = folder / "two" / "checkpoints" / "step-00000002"
    manifest = (newest / "manifest.json").read_bytes()
    for path in newest.glob("*.safetensors"):
        _flip(path)
    for content in (manifest, b"{}"):
        (newest / "manifest.json").write_bytes(content)
        done = launcher("generate", "run.dir=two", cwd=folder)
        assert done.returncode == 2
        assert re.search(r"try: remove \S*step-00000002: step-00000001 is the newest before it", done.stderr)
    shutil.rmtree(newest)
    done = launcher("generate", "run.dir=two", "max_new_tokens=4", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "note     the run has not finished: weights of step 1\n")


@pytest.mark.slow
def test_a_finished_run_that_was_continued_generates_from_its_newest_checkpoint(staged: Path) -> None:
    folder = staged.parent
    trained("run.dir=longer", "training.steps=2", cwd=folder)
    weights = shutil.copytree(folder / "longer" / "weights", folder / "kept")
    trained("run.dir=longer", "training.steps=9", "training.stop_at=3", cwd=folder)
    shutil.rmtree(folder / "longer" / "weights")
    weights.rename(folder / "longer" / "weights")  # as a stop by a signal leaves them
    done = launcher("generate", "run.dir=longer", "max_new_tokens=4", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "note     the run has not finished: weights of step 3\n")


def test_missing_weights_of_a_stage_are_refused(staged: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(staged, copy)
    (copy / "weights" / "model-00002-of-00002.safetensors").unlink()
    done = launcher("generate", f"run.dir={copy}", cwd=tmp_path)
    assert done.returncode == 2
    assert "model-00002-of-00002.safetensors is missing" in done.stderr
    assert f"try: remove {copy}/weights and repeat the run's command" in done.stderr


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda run: next((run / "weights").glob("*.saf*")).write_bytes(b"junk"),
            "is 4 bytes long instead of",
        ),
        (lambda run: _flip(next((run / "weights").glob("*.saf*"))), "is damaged: its SHA-256 differs"),
        (lambda run: (run / "weights" / "manifest.json").unlink(), "weights/manifest.json is missing"),
        (lambda run: (run / "weights" / "manifest.json").write_text("{}"), "written by another program"),
        (
            lambda run: _edit(run / "config.yaml", "hidden_size: 32", "hidden_size: 64"),
            "the model in config.yaml has shape (",
        ),
        (
            lambda run: _edit(run / "config.yaml", "num_layers: 2", "num_layers: 3"),
            "the weights lack blocks.2.",
        ),
    ],
)
def test_a_damaged_run_is_refused(
    spoil: Callable[[Path], None], said: str, staged: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(staged, copy)
    spoil(copy)
    done = launcher("generate", f"run.dir={copy}", cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "run.dir=null: "),
        (["run.dir=nowhere"], "run.dir=nowhere: this is not a run directory, because it has no config.yaml"),
        (["run.dir=.", "max_new_tokens=0"], "max_new_tokens=0: "),
        (["run.dir=.", "temperature=-1"], "temperature=-1.0: "),
        (["run.dir=.", "prompt="], "prompt="),
        (["run.dir=.", "promt=x"], "promt"),
    ],
)
def test_impossible_settings_are_refused(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = launcher("generate", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
