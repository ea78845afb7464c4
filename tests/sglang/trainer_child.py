"""A trainer in a process of its own, with torch: `python trainer_child.py MODEL OTHER`.

Writes OTHER, the model folder MODEL with other weights, and says what these are: `{names, dtypes, shapes}`. Then does what
each line asks for, and answers it with a line of JSON: `tensors` (all, as one string), `join PORT` (as the first of a
group of two), `send` (all, to that group). Run by the environment that has SGLang.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sglang.srt.utils import MultiprocessingSerializer, init_custom_process_group

GROUP = "trainer"


def other_weights(model: Path, other: Path) -> dict[str, torch.Tensor]:
    shutil.copytree(model, other)
    chance = torch.Generator().manual_seed(1)
    weights = load_file(other / "model.safetensors")
    for name, tensor in weights.items():
        if tensor.dim() == 2:
            weights[name] = tensor + 0.2 * torch.randn(tensor.shape, generator=chance).to(tensor.dtype)
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    return weights


def answer(line: str, weights: dict[str, torch.Tensor], groups: list[Any]) -> Any:
    match line.split():
        case ["tensors"]:
            return MultiprocessingSerializer.serialize(list(weights.items()), output_str=True)
        case ["join", port]:
            address = f"tcp://127.0.0.1:{port}"
            groups.append(init_custom_process_group(backend="gloo", init_method=address, world_size=2, rank=0, group_name=GROUP))
            return "joined"
        case ["send"]:
            for tensor in weights.values():
                torch.distributed.broadcast(tensor, src=0, group=groups[-1])
            return "sent"
        case _:
            raise SystemExit(f"{line!r} is not known: {__doc__}")


def main(model: str, other: str) -> None:
    torch.multiprocessing.set_sharing_strategy("file_system")  # what is handed over outlives no other process' socket
    weights = other_weights(Path(model), Path(other))
    groups: list[Any] = []
    says: Any = {
        "names": list(weights), "dtypes": [str(t.dtype).removeprefix("torch.") for t in weights.values()],
        "shapes": [list(t.shape) for t in weights.values()],
    }  # fmt: skip
    print(json.dumps(says), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(line, weights, groups)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
