"""Measure data: preparing tokens beside two other tools, and reading samples of any size of corpus.

`python -m benchmarks.data [FOLDER]`: files go to FOLDER (default: a temporary folder), about 300 MB.

- `launcher prepare` with BPE of 8,000 tokens, against a plain loop over Hugging Face's `tokenizers` in one
  process, and against `datasets.map` on the same text and cores (`pip install datasets`; left out without
  it). Rounds are interleaved; each starts with JSON lines on disk and ends with token ids on disk.
- Opening token files of 1e3, 1e6 and 1e9 tokens (a sparse file), checked as before a run, up to the first
  batch: at the first sample and after a billion, and samples per second after that.
"""

import json
import os
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from launcher.config.compose import compose_jobs
from launcher.config.schema import PrepareConfig, RunConfig, TokenizerTraining
from launcher.data.dataset_card import tokenizer_path
from launcher.data.open import blend_of, check_data, open_data
from launcher.data.preparation import Preparation, find_inputs
from launcher.data.token_file import bin_path, index_path, open_token_file, write_index

CORES = len(os.sched_getaffinity(0))
ROUNDS, COPIES, VOCABULARY = 3, 4, 8000
LENGTH, BATCH = 1024, 8  # tokens of a sample, samples of a batch


def main(folder: Path) -> None:
    text = write_text(folder / "text.jsonl")
    print(f"text     {text / 1e6:.0f} MB of JSON lines, {CORES} cores")
    prepare(folder, "bpe", 1, train=True)
    tokens = len(open_token_file(folder / "bpe").tokens)
    ways = {
        "plain loop, 1 process": plain_loop,
        "launcher prepare, 1 process": lambda folder: prepare(folder, "one", 1),
        f"launcher prepare, {CORES} processes": lambda folder: prepare(folder, "all", CORES),
        f"datasets.map, {CORES} processes": datasets_map,
    }
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            if cost := way(folder):
                rates[name].append((tokens / cost[0], tokens / cost[1]))
    for name, found in rates.items():
        wall, processor = (median(one) for one in zip(*found, strict=True)) if found else (0.0, 0.0)
        shown = f"{wall:9,.0f} tokens/s, {processor:9,.0f} per CPU second" if found else "not installed"
        print(f"{name:30} {shown}", flush=True)
    for size in (10**3, 10**6, 10**9):
        for consumed in (0, 10**9):
            start, rate = start_up(folder, size, consumed)
            where = f"{size:13,} tokens, {consumed:13,} samples consumed"
            print(f"{where}: start {start * 1e3:6.1f} ms, {rate:9,.0f} samples/s")


def write_text(path: Path) -> int:
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [source.read_text(errors="ignore") for source in sources]
    with path.open("w") as file:
        for number in range(COPIES):
            for text in texts:
                file.write(json.dumps({"text": f"# {number}\n{text}"}) + "\n")
    return path.stat().st_size


Cost = tuple[float, float]  # seconds by the clock, and of processors, of this process and of those it started


def clocks() -> Cost:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(one.ru_utime + one.ru_stime for one in used)


def since(started: Cost) -> Cost:
    now = clocks()
    return now[0] - started[0], now[1] - started[1]


def prepare(folder: Path, name: str, workers: int, *, train: bool = False) -> Cost:
    config = PrepareConfig(workers=workers, vocab=VOCABULARY)
    if train:
        config.tokenizer.train = TokenizerTraining.bpe
    else:
        config.tokenizer.path = str(tokenizer_path(folder / "bpe"))
    for path in folder.glob(f"{name}.*"):
        path.unlink()
    inputs, _ = find_inputs([folder / "text.jsonl"])
    started = clocks()
    Preparation(inputs, folder / name, config, workers).run(lambda progress, done: None)
    return since(started)


def plain_loop(folder: Path) -> Cost:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_path(folder / "bpe")))
    started = clocks()
    with (folder / "text.jsonl").open() as lines, (folder / "plain.bin").open("wb") as file:
        for line in lines:
            file.write(np.array(tokenizer.encode(json.loads(line)["text"]).ids, np.uint16).tobytes())
    return since(started)


MAP = """
import sys
from benchmarks.data import clocks, since
from datasets import load_dataset
from tokenizers import Tokenizer
text, path, cores, cache = sys.argv[1:]
tokenizer = Tokenizer.from_file(path)
started = clocks()
found = load_dataset("json", data_files=text, split="train", cache_dir=cache)
found.map(
    lambda batch: {"ids": [one.ids for one in tokenizer.encode_batch(batch["text"])]},
    batched=True, batch_size=64, num_proc=int(cores), remove_columns=["text"],
)
print(*since(started))
"""


def datasets_map(folder: Path) -> Cost | None:
    """Run in a process with an empty cache, so that earlier work does not count."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        command = [sys.executable, "-c", MAP, str(folder / "text.jsonl")]
        command += [str(tokenizer_path(folder / "bpe")), str(CORES), cache]
        environment = {
            **os.environ,
            "HF_DATASETS_OFFLINE": "1",
            "HF_HOME": cache,
            "TOKENIZERS_PARALLELISM": "false",
        }
        done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    if "No module named 'datasets'" in done.stderr:
        return None
    assert done.returncode == 0, done.stderr
    wall, processor = done.stdout.splitlines()[-1].split()
    return float(wall), float(processor)


def start_up(folder: Path, size: int, consumed: int) -> tuple[float, float]:
    """Return the median seconds from config to first batch of five, and the samples per second after it."""
    prefix, document = folder / f"tokens{size}", 1000
    if not index_path(prefix).exists():
        with bin_path(prefix).open("wb") as file:
            file.truncate(2 * size)
        write_index(index_path(prefix), np.full(size // document, document, np.int32), np.dtype("<u2"))
    length = min(LENGTH, size // 100)
    [job] = compose_jobs("config", RunConfig, [
        "data=tokens", f"data.train={prefix}", f"data.sequence_length={length}", "model=llama3_8b",
        "data.validation_fraction=0.1",
    ])  # fmt: skip
    starts = []
    for _ in range(5):
        started = time.perf_counter()
        check_data(job.config)
        source = open_data(job.config).blend([blend_of(job.config)])
        source.take(np.arange(consumed, consumed + BATCH))
        starts.append(time.perf_counter() - started)
    started, read = time.perf_counter(), 0
    while time.perf_counter() - started < 1.0:
        first = consumed + BATCH + read
        source.take(np.arange(first, first + BATCH))
        read += BATCH
    return median(starts), read / (time.perf_counter() - started)


if __name__ == "__main__":
    if sys.argv[1:]:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as name:
            main(Path(name))
