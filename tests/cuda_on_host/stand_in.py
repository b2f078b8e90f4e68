"""The `cuda` backend with the host's launchers in the place of `asyncopd._C`, on CPU tensors.

As a plugin of pytest (`-p cuda_on_host.stand_in`) it gives the shared tests that backend.
"""

import re
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import torch

import cuda_on_host as host
from asyncopd import backends
from asyncopd.backends import cuda, native

MULTIPROCESSORS = 2


def parameters_of(launcher: str) -> list[str]:
    """Names in the order of the C declaration."""
    for header in sorted((host.CSRC / "cuda").glob("*.h")):
        if found := re.search(rf"asyncopd_{launcher}\(([^)]*)\)", header.read_text()):
            return [parameter.split()[-1].lstrip("*") for parameter in found[1].split(",")]
    raise AssertionError(f"no header declares asyncopd_{launcher}")


class Extension:
    """In the place of `asyncopd._C`: the host's launchers, by the names of the parameters in their headers."""

    cuda = True

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, object]]] = []

    def cuda_topk_parts(self, *arguments: int) -> int:
        return host.topk_size("parts", *arguments)

    def cuda_topk_scratch_bytes(self, *arguments: int) -> int:
        return host.topk_size("scratch_bytes", *arguments)

    def cuda_topk_logprobs(self, **arguments: object) -> int:
        return self._launch("cuda_topk_logprobs", arguments)

    def cuda_gather_logprobs(self, **arguments: object) -> int:
        return self._launch("cuda_gather_logprobs", arguments)

    def _launch(self, name: str, arguments: dict[str, object]) -> int:
        names = parameters_of(name)
        assert sorted(names) == sorted(arguments)
        self.calls.append((name, arguments))
        return host.kernels().call(f"asyncopd_{name}", *(arguments[name] for name in names))


def install(replace: Callable[[object, str, object], None]) -> Extension:
    """Puts the stand-in in place by `replace(object, name, value)`."""
    extension = Extension()
    replace(cuda, "_C", extension)
    replace(cuda, "_check_logits", native.check_logits)
    replace(torch.cuda, "device", lambda device: nullcontext())
    replace(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    properties = SimpleNamespace(multi_processor_count=MULTIPROCESSORS)
    replace(torch.cuda, "get_device_properties", lambda device: properties)
    return extension


def pytest_configure() -> None:
    import each_backend

    install(setattr)
    cuda.unavailable_reason = lambda: None
    backends._DEVICE["cuda"] = each_backend.DEVICES["cuda"] = "cpu"
