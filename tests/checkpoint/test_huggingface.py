"""Weights of transformers models, imported into any layout and exported, have the same bits and logits."""

import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from launcher.checkpoint.conversion import export, import_
from launcher.checkpoint.huggingface import NotConvertible, converter_of
from launcher.checkpoint.manifest import checkpoints_in
from launcher.checkpoint.read import CheckpointReader, HuggingFaceReader
from launcher.checkpoint.sources import WeightsKind, WeightSource, weights_at
from launcher.config.errors import ConfigError
from launcher.config.schema import (
    Dtype,
    ExchangeConfig,
    ModelConfig,
    PositionKind,
    RunConfig,
)
from launcher.data.tokenizer import write_byte_tokenizer
from launcher.parallel.boxes import Box
from tests.checkpoint.saving import load_and_save
from tests.forked_commands import environment, light
from tests.models.families import transformers_model
from tests.models.small import batch, biases, small, small_vit
from tests.models.test_against_transformers import THEIRS, with_all_weights_random, with_weights
from tests.parity.running import small_run
from tests.runtime.command import launcher, metrics, trained

MODELS = {
    "llama": small("llama"),
    "llama tied": small("llama", tie_embeddings=True),
    "llama, larger heads": small("llama", head_size=6),
    "gpt": small("gpt", tie_embeddings=False),
    "gpt tied": small("gpt"),
}
LAYOUTS = {
    "tp1": ["parallelism=single"],
    "tp2": ["parallelism=tp2", "parallelism.data=1"],
    "tp4": ["parallelism=tp2", "parallelism.data=1", "parallelism.tensor=4"],
    "zero3_tp2": ["parallelism=zero3", "parallelism.data=2", "parallelism.tensor=2"],
    "zero1_bf16": ["parallelism=zero1", "parallelism.data=2", "precision=bf16"],
    "dualpipev": ["parallelism=pp2", "parallelism.data=1", "parallelism.pipeline_schedule=dualpipev"],
}
QUICK = [("llama", "tp2"), ("gpt tied", "tp4"), ("gpt", "zero3_tp2"), ("llama tied", "dualpipev")]
OPTIONS = ExchangeConfig()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that returns the save_pretrained directory of a model of MODELS."""
    folder = tmp_path_factory.mktemp("theirs")

    def written(name: str) -> Path:
        path = folder / name.replace(" ", "-")
        if not path.exists():
            make, _ = THEIRS[MODELS[name].positions]
            with_all_weights_random(make(MODELS[name])).save_pretrained(path)
            (path / "tokenizer.json").write_text('{"a": 1}')
        return path

    return written


def exported(weights: WeightSource, target: Path, options: ExchangeConfig) -> None:
    export(weights, target, options, write_byte_tokenizer)


def tensors_in(directory: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in directory.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def assert_same_bits(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name], tensor), name


def run_of(model: ModelConfig, layout: str) -> RunConfig:
    is_gpt = model.positions is PositionKind.learned
    named = ["model=gpt_tiny"] if is_gpt else ["model=llama_tiny", "model.num_kv_heads=4"]
    run = small_run(*named, *LAYOUTS[layout])
    return replace(run, model=replace(model, num_layers=4) if layout == "dualpipev" else model)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=[] if (name, layout) in QUICK else pytest.mark.slow)
        for name in MODELS
        for layout in LAYOUTS
    ],
)
def test_a_round_trip_is_bitwise_exact(
    name: str, layout: str, theirs: Callable[[str], Path], tmp_path: Path
) -> None:
    run, source = run_of(MODELS[name], layout), theirs(name)
    if layout == "dualpipev":  # it needs more layers
        make, _ = THEIRS[run.model.positions]
        with_all_weights_random(make(run.model)).save_pretrained(source := tmp_path / "theirs")
    saved = load_and_save(run, source, tmp_path / "run")
    exported(weights_at(saved, "x"), tmp_path / "back", OPTIONS)
    assert_same_bits(tensors_in(tmp_path / "back"), tensors_in(source))


@pytest.mark.parametrize("name", MODELS)
def test_logits_agree_after_import_and_after_export(
    name: str, theirs: Callable[[str], Path], tmp_path: Path
) -> None:
    """Compare with a separate table of names, and with the logits of transformers."""
    model = MODELS[name]
    import_(weights_at(theirs(name), "x"), tmp_path / "ours", OPTIONS)
    ours = weights_at(tmp_path / "ours", "x")
    assert (ours.kind, replace(ours.model, init_std=0.3, rope_theta=0)) == (
        WeightsKind.checkpoint,
        replace(model, num_kv_heads=ours.model.num_kv_heads, rope_theta=0),
    )
    stored = {key.split("/")[1]: tensor for key, tensor in tensors_in(ours.path).items()}
    _, mapped = THEIRS[model.positions]
    hand = tensors_in(theirs(name))
    head = {} if "lm_head.weight" in hand else {"lm_head.weight": torch.empty(0)}
    expected = {n: t for n, t in mapped(hand | head, model.num_layers).items() if t.numel()}
    if model.positions is PositionKind.learned and not model.tie_embeddings:
        expected["head.weight"] = hand["lm_head.weight"]
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[n], tensor) for n, tensor in expected.items())

    exported(ours, tmp_path / "back", OPTIONS)
    tokens, _ = batch(model.vocab_size)
    with torch.no_grad():
        right = AutoModelForCausalLM.from_pretrained(theirs(name)).eval()(tokens).logits
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()(tokens).logits
        own = with_weights(model, stored).eval().logits(tokens)
    assert torch.equal(again, right)
    scale = float(right.abs().max())
    torch.testing.assert_close(own, right, rtol=0, atol=1e-5 * max(scale, 1.0))


def test_bf16_survives_import_and_export(theirs: Callable[[str], Path], tmp_path: Path) -> None:
    """bf16 weights are exact in the fp32 checkpoint, and are exported as the same bf16 weights."""
    bf16 = {name: tensor.bfloat16() for name, tensor in tensors_in(theirs("llama")).items()}
    source = shutil.copytree(theirs("llama"), tmp_path / "bf16")
    save_file(bf16, source / "model.safetensors")
    import_(weights_at(source, "x"), tmp_path / "ours", OPTIONS)
    exported(weights_at(tmp_path / "ours", "x"), tmp_path / "back", ExchangeConfig(dtype=Dtype.bf16))
    assert_same_bits(tensors_in(tmp_path / "back"), bf16)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto").dtype == torch.bfloat16


def test_file_size_is_bounded_in_import_and_export(theirs: Callable[[str], Path], tmp_path: Path) -> None:
    limit = ExchangeConfig(max_file_gb=2e-5)
    import_(weights_at(theirs("gpt"), "x"), tmp_path / "ours", limit)
    exported(weights_at(tmp_path / "ours", "x"), tmp_path / "split", limit)
    import_(weights_at(tmp_path / "split", "x"), tmp_path / "again", OPTIONS)
    exported(weights_at(tmp_path / "again", "x"), tmp_path / "one", OPTIONS)
    assert_same_bits(tensors_in(tmp_path / "one"), tensors_in(theirs("gpt")))
    parts = sorted((tmp_path / "split").glob("*.safetensors"))
    assert len(parts) > 3
    for path in parts:
        held = load_file(path)
        assert sum(tensor.nbytes for tensor in held.values()) <= 2e4 or len(held) == 1
    index = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_in(theirs("gpt")).values())
    assert (tmp_path / "split" / "tokenizer.json").read_text() == '{"a": 1}'


def test_only_the_tensors_of_one_file_are_held_in_memory(
    theirs: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, largest = 20_000, 2 * 48 * 32 * 4  # the fused gate and up projection
    made: list[weakref.ref[Tensor]] = []
    held: list[int] = []

    def watch(reader: type[Any]) -> None:
        fill = reader.fill

        def watched(self: Any, kind: str, name: str, box: Box, view: Tensor) -> None:
            fill(self, kind, name, box, view)
            made.append(weakref.ref(view))
            held.append(sum(tensor.nbytes for reference in made if (tensor := reference()) is not None))

        monkeypatch.setattr(reader, "fill", watched)

    for reader in (HuggingFaceReader, CheckpointReader):
        watch(reader)
    options = ExchangeConfig(max_file_gb=limit / 1e9, certificate=False)
    import_(weights_at(theirs("llama"), "x"), tmp_path / "ours", options)
    imports = len(held)
    exported(weights_at(tmp_path / "ours", "x"), tmp_path / "back", options)
    total = sum(tensor.nbytes for tensor in tensors_in(theirs("llama")).values())
    assert limit + largest < total / 2
    for part in (held[:imports], held[imports:]):
        assert limit / 2 < max(part) <= limit + largest


def test_openai_names_of_gpt2_are_imported(theirs: Callable[[str], Path], tmp_path: Path) -> None:
    """OpenAI's files lack the prefix of transformers, and store the causal mask as a tensor."""
    published = {
        name.removeprefix("transformer."): tensor for name, tensor in tensors_in(theirs("gpt tied")).items()
    }
    source = shutil.copytree(theirs("gpt tied"), tmp_path / "published")
    save_file(published | {"h.0.attn.bias": torch.ones(1, 1, 24, 24)}, source / "model.safetensors")
    import_(weights_at(source, "x"), tmp_path / "ours", OPTIONS)
    exported(weights_at(tmp_path / "ours", "x"), tmp_path / "back", OPTIONS)
    assert_same_bits(tensors_in(tmp_path / "back"), tensors_in(theirs("gpt tied")))


def config_with(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))

    return change


def config_of(text: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / "config.json").write_text(text)

    return change


def tensors_with(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def changed(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors")

    return changed


def pickled(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def elsewhere(path: Path) -> None:
    (path / "model.safetensors").rename(path.parent / "stray.safetensors")
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../stray.safetensors"}}')


def truncated(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def gguf(path: Path) -> None:
    (path / "model.safetensors").rename(path / "model-q4.gguf")


def pointer(path: Path) -> None:
    (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def a_part_missing(path: Path) -> None:
    (path / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


NORM = "model.norm.weight"
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "another family": (config_with(model_type="falcon"), "model_type is 'falcon'"),
    "positions scaled by the batch": (
        config_with(rope_parameters={"rope_type": "dynamic", "rope_theta": 5e5, "factor": 2.0}),
        "scaled by 'dynamic', which the launcher does not have: its frequencies depend on the length",
    ),
    "positions scaled by a table": (
        config_with(rope_scaling={"type": "longrope", "factor": 2.0}, rope_parameters=None),
        "scaled by 'longrope'",
    ),
    "a part of each head rotated": (config_with(partial_rotary_factor=0.5), "rotates a part of each head"),
    "quantised": (config_with(quantization_config={"quant_method": "awq"}), r"quantised \(awq\)"),
    "quantised weights": (
        tensors_with(lambda t: t.update({NORM: t[NORM].to(torch.int8)})),
        f"has {NORM} in I8: quantised weights",
    ),
    "an activation": (config_with(hidden_act="gelu"), "hidden_act is 'gelu'"),
    "biases": (config_with(attention_bias=True), "attention_bias is True"),
    "heads": (
        config_with(
            model_type="gemma2",
            hidden_activation="gelu_pytorch_tanh",
            num_attention_heads=5,
            num_key_value_heads=5,
            head_dim=6,
        ),
        "this model has model.num_heads=5, which does not divide hidden_size=32",
    ),
    "a head size": (config_with(head_dim=16), r"k_proj.weight of shape \(16, 32\), but its config.json"),
    "no size": (config_of('{"model_type": "llama"}'), "hidden_size is missing"),
    "no JSON": (config_of("["), "config.json cannot be read"),
    "another shape": (config_with(intermediate_size=64), r"mlp.down_proj.weight of shape \(32, 48\)"),
    "a missing tensor": (tensors_with(lambda t: t.pop(NORM)), f"has no {NORM}"),
    "a tensor too many": (
        tensors_with(lambda t: t.update({"model.x": t[NORM].clone()})),
        "contains model.x, but its config.json describes no such tensor",
    ),
    "a pickle": (pickled, "a pickle, which can run any code"),
    "a file elsewhere": (elsewhere, "names files outside the directory"),
    "half a file": (truncated, "model.safetensors cannot be read"),
    "a missing part": (a_part_missing, r"model-00001-of-00002\.safetensors is missing"),
    "a pointer": (pointer, "model.safetensors is a pointer of Git LFS"),
    "a GGUF file": (gguf, "has model-q4.gguf, which is a GGUF file"),
    "no number of experts": (config_with(model_type="mixtral"), "num_local_experts is missing"),
    "a missing file": (lambda path: (path / "model.safetensors").unlink(), "no safetensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_unsupported_or_broken_directory_is_refused(
    case: str, theirs: Callable[[str], Path], tmp_path: Path
) -> None:
    spoil, message = REFUSED[case]
    source = shutil.copytree(theirs("llama"), tmp_path / "theirs")
    spoil(source)
    with pytest.raises(ConfigError, match=message):
        weights_at(source, "checkpoint.init_from")


# A path that is no directory of a model; what is wrong with it, and what to name instead.
NO_MODELS = {
    "m.gguf": ("is a GGUF file", "the model as published"),
    "m.safetensors": ("is a file, and the config.json beside it", "{parent}"),
    "pytorch_model.bin": ("is a pickle, which can run any code", "the model as published"),
    "original/consolidated.00.pth": ("has consolidated.00.pth, which is a pickle", "the model as published"),
    "quantised/m.gguf": ("has m.gguf, which is a GGUF file", "the model as published"),
    "alone/model.safetensors": ("has safetensors and no config.json", "config.json of the model"),
    "adapter/adapter_config.json": ("holds an adapter alone", "merge_and_unload"),
    "hub/snapshots/abc/config.json": ("is a folder of the Hugging Face cache", "hub/snapshots/abc"),
    "corpus/a.bin": ("contains no weights", "a Hugging Face directory"),
}


def test_a_path_that_is_no_model_is_answered_with_what_it_is(
    tmp_path: Path, subtests: pytest.Subtests
) -> None:
    for name, (why, remedy) in NO_MODELS.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        with subtests.test(name):
            with pytest.raises(ConfigError, match=why) as error:
                weights_at(tmp_path / Path(name).parts[0], "import")
            assert remedy.format(parent=tmp_path) in error.value.remedy


@pytest.mark.slow
def test_import_train_and_export_from_the_command_line(tmp_path: Path) -> None:
    """Train imported bf16 weights in two layouts and from init_from, and export the result in bf16."""
    model = small(
        "llama", hidden_size=64, vocab_size=256, max_sequence_length=32, init_std=0.02, rope_theta=1e4
    )
    make, _ = THEIRS[PositionKind.rope]
    torch.manual_seed(1)
    make(model).bfloat16().save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    done = launcher("import", "theirs", "ours", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    command = done.stdout.splitlines()[-1].split()[1:]
    rest = ["training.steps=2", "training.global_batch_size=8", "training.micro_batch_size=2", "hardware=cpu"]
    for name, layout in {"a": ["parallelism=tp2", "parallelism.data=1"], "b": ["parallelism=single"]}.items():
        done = launcher(*command, *rest, *layout, "logging=local", f"run.dir={name}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"begun    {tmp_path / 'ours' / 'checkpoints' / 'step-00000000'}" in done.stdout
    sharded, single = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    assert sharded[0]["train/loss"] == pytest.approx(single[0]["train/loss"], rel=1e-5)
    direct = ["model=llama_tiny", *settings_of(model), "checkpoint.init_from=theirs", *rest]
    done = launcher(
        *direct, "parallelism=zero2", "parallelism.data=2", "logging=local", "run.dir=c", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "c")[0]["train/loss"] == pytest.approx(single[0]["train/loss"], rel=1e-5)
    done = launcher("export", "c", "back", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "back" / "tokenizer.json").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto").dtype == torch.bfloat16
    again = launcher("export", "c", "back", cwd=tmp_path)
    assert again.returncode == 2
    assert "already exists" in again.stderr
    wrong = launcher(*direct, "model.num_layers=3", "model.vocab_size=300", cwd=tmp_path)
    assert wrong.returncode == 2
    assert (
        "try: model.num_layers=2 model.vocab_size=256, or model=imported as `launcher import" in wrong.stderr
    )


@pytest.mark.parametrize(
    ("model", "difference"),
    [
        (small_vit(), "model.inputs=patches, model.attention=full, model.biases.head=true"),
        (small("gpt", num_kv_heads=4), "model.num_kv_heads=4"),
        (small("gpt", head_size=6), "model.head_size=6"),
        (small("llama", biases=biases("output")), "model.biases.output=true"),
        (small("llama", attention_soft_cap=2.0), "model.attention_soft_cap=2.0"),
        (small("gpt", num_heads=5, head_size=6), "model.num_heads=5, which does not divide hidden_size=32"),
    ],
)
def test_a_model_that_no_converter_expresses_is_named(model: ModelConfig, difference: str) -> None:
    with pytest.raises(NotConvertible, match=r"only GPT-2, .* and GPT-NeoX models can be") as refused:
        converter_of(model)
    assert str(refused.value).endswith(f"this model has {difference}")


def test_heads_that_llama_refuses_are_exported_as_mistral(tmp_path: Path) -> None:
    """transformers has a check in LlamaConfig that num_heads divides hidden_size, also with a head size."""
    heads = {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 6}
    source = tmp_path / "theirs"
    transformers_model("Mistral without a window", **heads).save_pretrained(source)
    config_with(model_type="llama")(source)
    weights = weights_at(source, "x")
    assert weights.model_type == "llama"
    exported(weights, tmp_path / "back", OPTIONS)
    assert json.loads((tmp_path / "back" / "certificate.json").read_text())["ok"] is True
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert loaded.config.architectures == ["MistralForCausalLM"]
    assert_same_bits(tensors_in(tmp_path / "back"), tensors_in(source))


def settings_of(model: ModelConfig) -> list[str]:
    sizes = "hidden_size num_layers num_heads num_kv_heads ffn_hidden_size vocab_size max_sequence_length"
    return [f"model.{name}={getattr(model, name)}" for name in [*sizes.split(), "norm_epsilon"]]


@pytest.mark.slow
def test_final_weights_start_another_run_and_are_exported(tmp_path: Path) -> None:
    """A run without checkpoints still has its final weights."""
    trained("run.dir=a", "training.steps=1", "checkpoint.enabled=false", cwd=tmp_path)
    out = trained("run.dir=b", "training.steps=1", "checkpoint.init_from=a", cwd=tmp_path)
    assert f"begun    {tmp_path / 'a'}" in out
    assert metrics(tmp_path / "b")[0]["train/loss"] < metrics(tmp_path / "a")[0]["train/loss"]
    assert launcher("export", "a", "back", cwd=tmp_path).returncode == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back").config.model_type == "gpt2"


@pytest.mark.slow
def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    trained("run.dir=a", "training.steps=2", "checkpoint.interval_steps=1", cwd=tmp_path)
    newest, older = checkpoints_in(tmp_path / "a")
    file = next(newest.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    done = launcher("export", "a", "back", cwd=tmp_path)
    assert done.returncode == 2
    assert f"{file.name} is damaged" in done.stderr
    assert f"try: {older} instead" in done.stderr
    assert not (tmp_path / "back").exists()
    assert launcher("export", str(older), "back", cwd=tmp_path).returncode == 0


@pytest.mark.slow
def test_export_needs_neither_deepspeed_nor_a_process_group(
    theirs: Callable[[str], Path], tmp_path: Path
) -> None:
    program = (
        "import sys; from launcher.command_line import run_command as run\n"
        f"assert run(['import', {str(theirs('gpt'))!r}, 'ours']) == 0\n"
        "assert run(['export', 'ours', 'back']) == 0\n"
        "import torch\n"
        "assert 'deepspeed' not in sys.modules and not torch.distributed.is_initialized()\n"
    )
    done = light().run([], cwd=tmp_path, environment=environment(), program=program)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "run"], "export run: the command needs a SOURCE and a TARGET directory"),
        (["export", "nowhere", "to"], "export=nowhere: is not a directory"),
        (["export", "runs/lr=0.1", "to"], "export=runs/lr=0.1: is not a directory"),
        (["export", "run.dir=lr=0.1", "to"], "export=lr=0.1: is not a directory"),
        (["import", "lr=0.1", "to"], "lr=0.1: no such field"),
        (["import", "theirs", "to", "dtype=bf16"], "dtype=bf16: only `launcher export` reads it"),
        (["import", "theirs", "to", "merged=true"], "merged=true: only `launcher export` reads it"),
        (["import", "theirs", "to", "certificate=false"], "\n  try: certificate=true\n"),
        (["export", ".", "to"], "export=.: contains no weights"),
        (
            ["import", "theirs", "theirs"],
            "TARGET=theirs: already exists, and `launcher import` does not overwrite files",
        ),
        (["export", "theirs", "to", "dtype=int8"], "dtype=int8: "),
        (["export", "theirs", "to", "max_file_gb=0"], "max_file_gb=0.0: must be a finite number above 0"),
        (["export", "theirs", "to", "max_flie_gb=1"], "try: max_file_gb"),
        (["exprot", "theirs", "to"], "try: launcher export"),
    ],
)
def test_a_wrong_command_is_refused_without_torch(
    arguments: list[str], message: str, theirs: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(theirs("gpt"), tmp_path / "theirs")
    command = light().start(arguments, cwd=tmp_path, environment=environment())
    _, error = command.communicate()
    assert (command.returncode, command.heavy) == (2, []), error
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "to").exists()
