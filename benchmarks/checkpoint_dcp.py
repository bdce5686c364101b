"""Compare our checkpoint files with torch.distributed.checkpoint (DCP), on the same boxes and tensors.

`python -m benchmarks.checkpoint_dcp`: two ranks each write a flat half of every tensor, as ZeRO does. They
read it back as tensor-parallel ranks, which split fused projections segment by segment. DCP gets planners
with these boxes as its chunks, without DTensor. Seconds are those of the slower rank, with files synced. Our
bytes read are the checksum pass, which reads every file once: mapped files do not show.
"""

import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from launcher.checkpoint.integrity import check_files
from launcher.checkpoint.manifest import Manifest, read_manifest
from launcher.checkpoint.read import CheckpointReader
from launcher.checkpoint.write import HostPiece, commit, write_pieces
from launcher.launch.local import run_local_ranks
from launcher.parallel.boxes import Box
from launcher.parallel.mesh import Axis
from launcher.parallel.sharding import LogicalTensor, logical_views

WORLD, HIDDEN, LAYERS = 2, 1024, 6
LOGICALS = [
    logical
    for index in range(LAYERS)
    for logical in (
        LogicalTensor(f"{index}.qkv", (3 * HIDDEN, HIDDEN), 0, (HIDDEN,) * 3),
        LogicalTensor(f"{index}.up", (4 * HIDDEN, HIDDEN), 0, (4 * HIDDEN,)),
        LogicalTensor(f"{index}.down", (HIDDEN, 4 * HIDDEN), 1, (4 * HIDDEN,)),
        # Not a multiple of the ranks: its halves begin and end within a row, and take several boxes.
        LogicalTensor(f"{index}.odd", (33, 31)),
    )
]
SHAPES = {logical.name: logical.shape for logical in LOGICALS}
Boxes = dict[tuple[str, tuple[int, ...]], tuple[Box, Tensor]]  # by name and offsets
METHODS = ["ours", "DCP, its own files", "DCP, safetensors"]


def value(logical: LogicalTensor) -> Tensor:
    generator = torch.Generator().manual_seed(LOGICALS.index(logical))
    return torch.rand(logical.shape, generator=generator)


def boxes_of(logical: LogicalTensor, tensor: Tensor, start: int, shape: tuple[int, ...], axis: Axis) -> Boxes:
    views = logical_views(tensor, start, shape, logical, axis)
    return {(logical.name, box.offsets): (box, view) for box, view in views}


def flat_half(rank: int) -> Boxes:
    found: Boxes = {}
    for logical in LOGICALS:
        full = value(logical).view(-1)
        first, last = (full.numel() * r // WORLD for r in (rank, rank + 1))
        found |= boxes_of(logical, full[first:last].clone(), first, logical.shape, Axis(0, 1, None))
    return found


def tensor_shard(rank: int) -> tuple[Boxes, list[tuple[Tensor, Tensor]]]:
    """Return empty tensors to fill, and the expected content of each shard."""
    axis, found, pairs = Axis(rank, WORLD, None), Boxes(), []
    for logical in LOGICALS:
        full, expected = value(logical), torch.zeros(logical.shard_shape(WORLD))
        for box, view in logical_views(expected.view(-1), 0, tuple(expected.shape), logical, axis):
            view.copy_(full[box.slices])
        shard = torch.zeros_like(expected)
        found |= boxes_of(logical, shard.view(-1), 0, tuple(shard.shape), axis)
        pairs.append((shard, expected))
    return found, pairs


def chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))


class BoxSavePlanner(dcp.DefaultSavePlanner):  # type: ignore[misc]
    def __init__(self, boxes: Boxes) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.boxes = boxes

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                MetadataIndex(name, torch.Size(offsets)),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk(box), TensorProperties.create_from_tensor(view), torch.Size(SHAPES[name])
                ),
            )
            for (name, offsets), (box, view) in self.boxes.items()
        ]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        index = write_item.index
        return self.boxes[index.fqn, tuple(index.offset)][1].contiguous()


class BoxLoadPlanner(dcp.DefaultLoadPlanner):  # type: ignore[misc]
    def __init__(self, boxes: Boxes) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.boxes = boxes

    def create_local_plan(self) -> LoadPlan:
        stored = self.metadata.state_dict_metadata
        return LoadPlan(
            [
                item
                for (name, _), (box, _) in self.boxes.items()
                for item in create_read_items_for_chunk_list(name, stored[name], [chunk(box)])
            ]
        )

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        index = read_item.dest_index
        view = self.boxes[index.fqn, tuple(index.offset)][1]
        for dim, (start, size) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(dim, start, size)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


def save_ours(folder: Path, boxes: Boxes, rank: int) -> None:
    pieces = [
        HostPiece("weight", name, SHAPES[name], box, view.contiguous())
        for (name, _), (box, view) in boxes.items()
    ]
    write_pieces(folder, rank, pieces, 2 * 10**9)
    dist.barrier()
    if rank == 0:
        empty = Manifest(1, 0, 0, {}, "", "", "", {}, None, {}, {})
        commit(folder, empty, WORLD)


def load_ours(folder: Path, boxes: Boxes, rank: int) -> None:
    path = folder.with_name(folder.name.removesuffix(".partial"))
    manifest = read_manifest(path)
    check_files(manifest.stored(path), sorted(manifest.files)[rank::WORLD])
    reader = CheckpointReader(path, manifest)
    for (name, _), (box, view) in boxes.items():
        reader.fill("weight", name, box, view)


def save_dcp(writer: Callable[[Path], Any], folder: Path, boxes: Boxes, rank: int) -> None:
    dcp.save({}, storage_writer=writer(folder), planner=BoxSavePlanner(boxes))


def load_dcp(reader: Callable[[Path], Any], folder: Path, boxes: Boxes, rank: int) -> None:
    dcp.load({}, storage_reader=reader(folder), planner=BoxLoadPlanner(boxes))


WAYS: dict[str, tuple[Callable[..., None], Callable[..., None]]] = {
    METHODS[0]: (save_ours, load_ours),
    METHODS[1]: (
        partial(save_dcp, lambda folder: dcp.FileSystemWriter(folder)),
        partial(load_dcp, lambda folder: dcp.FileSystemReader(folder)),
    ),
    METHODS[2]: (
        partial(save_dcp, lambda folder: HuggingFaceStorageWriter(str(folder), save_distributed=True)),
        partial(load_dcp, lambda folder: HuggingFaceStorageReader(str(folder))),
    ),
}


def rank_main(rank: int, *, method: str, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=WORLD)
    save, load = WAYS[method]
    target = folder / "step-00000001.partial"
    target.mkdir(exist_ok=True)
    own = flat_half(rank)
    wanted, pairs = tensor_shard(rank)
    times = []
    for act in (partial(save, target, own, rank), partial(load, target, wanted, rank)):
        dist.barrier()
        started, read = time.perf_counter(), bytes_read()
        act()
        took = torch.tensor([time.perf_counter() - started, float(bytes_read() - read)])
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
        times.append(took)
    right = torch.tensor(all(torch.equal(shard, expected) for shard, expected in pairs))
    dist.all_reduce(right, op=dist.ReduceOp.MIN)
    if rank == 0:
        ideal = sum(expected.nbytes for _, expected in pairs)
        print(
            f"{method:<20} save {times[0][0]:5.2f} s   load {times[1][0]:5.2f} s   "
            f"read {times[1][1] / ideal:4.2f} of the bytes a rank holds   {'right' if right else 'WRONG'}"
        )
    dist.destroy_process_group()


def bytes_read() -> int:
    """Return the bytes that read calls read; mapped files do not show."""
    return int(Path("/proc/self/io").read_text().split()[1])


def main() -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    total = sum(value(logical).nbytes for logical in LOGICALS)
    print(f"{total / 1e6:.0f} MB, {WORLD} ranks, written as flat halves and read as tensor-parallel shards")
    for method in METHODS:
        with tempfile.TemporaryDirectory() as folder:
            target = partial(rank_main, method=method, folder=Path(folder))
            try:
                run_local_ranks(target, WORLD, log_dir=Path(folder) / "logs", start_method="fork")
            except Exception as error:
                print(f"{method:<20} fails: {str(error).strip().splitlines()[-1]}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
