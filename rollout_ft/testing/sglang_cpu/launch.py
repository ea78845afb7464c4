"""Runs the real `sglang.launch_server` on a CPU: `python launch.py <arguments of launch_server>`.

Owns the stand-ins for two packages that SGLang imports and that have no CPU build: `sgl_kernel` (compiled kernels) and
`torchvision` (images). The text path never calls into them, and whatever does gets an error. Nothing that is installed
is edited. The stand-ins must be there before sglang is imported. Children are forked from the parent, which has
imported everything, so that a start takes half the time and less memory.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import multiprocessing
import os
import sys
import types
from collections.abc import Sequence
from typing import Any


def _absent(name: str) -> type[Any]:
    """A class that stands for something of a package that is not there."""

    def refuse(self: object, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"{name} is not there on a CPU")

    return type(name.rpartition(".")[2], (), {"__init__": refuse})


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a package that is not installed; `submodules` too, or else importing one fails, which SGLang is ready for."""

    def __init__(self, package: str, submodules: bool):
        self._package, self._submodules = package, submodules

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None) -> Any:
        if fullname == self._package or (self._submodules and fullname.startswith(self._package + ".")):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        def attribute(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return _absent(f"{module.__name__}.{name}")

        module.__dict__["__getattr__"] = attribute


def _prepare() -> None:
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # a first request with a penalty would wait for a C++ compiler
    sys.path.pop(0)  # the folder of this file
    torch = importlib.import_module("torch")
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
    # transformers decides that there is no torchvision before the stand-in is there.
    importlib.import_module("transformers.utils.import_utils").is_torchvision_available()
    sys.meta_path += [_StandIn("torchvision", submodules=True), _StandIn("sgl_kernel", submodules=False)]


def _keep_fork(*args: Any, **kwargs: Any) -> None:
    """SGLang asks for spawn."""


def _fork_children() -> None:
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.__dict__["set_start_method"] = _keep_fork
    for name in ("detokenizer_manager", "scheduler"):
        importlib.import_module(f"sglang.srt.managers.{name}")


def main(arguments: list[str]) -> None:
    _prepare()
    _fork_children()
    run_server = importlib.import_module("sglang.launch_server").run_server
    server_args = importlib.import_module("sglang.srt.server_args").prepare_server_args(arguments)
    try:
        run_server(server_args)
    finally:
        for child in multiprocessing.active_children():
            child.kill()


if __name__ == "__main__":
    main(sys.argv[1:])
