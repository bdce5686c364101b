"""Print what torch and DeepSpeed find on this machine, a line of JSON per library: `launcher doctor` runs it.

In a process of its own, because a broken library can crash or wait.
"""

import json
import os
from typing import Any


def main() -> None:
    print(json.dumps({"torch": _probed(_torch)}), flush=True)
    print(json.dumps({"deepspeed": _probed(_deepspeed)}), flush=True)
    os._exit(0)  # without the clean-up of libraries, which can fail too


def _probed(probe: Any) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = probe()
        return facts
    except BaseException as error:
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())}


def _torch() -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    facts: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "gloo": dist.is_available() and dist.is_gloo_available(),
        "gpus": [],
    }
    if facts["cuda"] and dist.is_nccl_available():
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_properties(index).name
            facts["gpus"].append({"name": name, "free": free, "total": total})
    elif facts["cuda"]:
        try:
            torch.cuda.init()
        except RuntimeError as error:
            facts["cuda_error"] = " ".join(str(error).split())
    return facts


def _deepspeed() -> dict[str, Any]:
    import torch

    from launcher.engine.distributed import prepare_deepspeed

    prepare_deepspeed("cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    return {"version": deepspeed.__version__, "accelerator": get_accelerator()._name}


if __name__ == "__main__":
    main()
