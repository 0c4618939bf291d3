"""Whether the installed CUDA and TensorRT bindings are as the GPU runtime is written against, for `doctor` and tests.

Needs the bindings, no GPU. `cuda.py` and `tensorrt.py` list what they use; compiled functions state their parameters in
their signature or their docstring.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import re
from typing import Any

from ming_trt.runtime import cuda, tensorrt


def cuda_version() -> str:
    """The installed version of the CUDA bindings, or ""."""
    try:
        return importlib.metadata.version("cuda-bindings")
    except importlib.metadata.PackageNotFoundError:
        return ""


def check_cuda(runtime: Any = None) -> list[str]:
    """What of `cuda.CALLS`, `CONSTANTS` and `FIELDS` the bindings do not have as relied on, one sentence each."""
    module = importlib.import_module(cuda.MODULE) if runtime is None else runtime
    problems = []
    for name, wanted in cuda.CALLS.items():
        function = getattr(module, name, None)
        if function is None:
            problems.append(f"{cuda.MODULE} has no {name}")
            continue
        # called by position: names are compared to notice parameters that were added or changed places
        got = tuple(inspect.signature(function).parameters)
        if got != wanted:
            problems.append(f"{name} takes ({', '.join(got)}), not ({', '.join(wanted)})")
    for path in cuda.CONSTANTS:
        if _find(module, path) is None:
            problems.append(f"{cuda.MODULE} has no {path}")
    for name, fields in cuda.FIELDS.items():
        kind = getattr(module, name, None)
        problems += [f"{name} has no field {field}" for field in fields if not hasattr(kind, field)]
    if not hasattr(importlib.import_module(cuda.NUMBERS), "cuuint64_t"):
        problems.append(f"{cuda.NUMBERS} has no cuuint64_t")
    return problems


def check_tensorrt(trt: Any) -> list[str]:
    """What of `tensorrt.CALLS` a TensorRT module does not have as relied on, one sentence each."""
    problems = []
    for owner, members in tensorrt.CALLS.items():
        for member, wanted in members.items():
            path = f"{owner}.{member}" if owner else member
            found = _find(trt, path)
            if found is None:
                if path not in tensorrt.OPTIONAL:
                    problems.append(f"{trt.__name__} has no {path}")
            elif wanted and not any(_starts(each, wanted) for each in overloads(found)):
                problems.append(f"{path} takes no ({', '.join(wanted)}), but {' or '.join(map(str, overloads(found)))}")
    return problems


def overloads(function: Any) -> list[tuple[str, ...]]:
    """The parameters (without `self`) of each form of a compiled function, from its docstring."""
    forms = []
    name = re.escape(getattr(function, "__name__", ""))
    for line in (getattr(function, "__doc__", "") or "").splitlines():
        match = re.match(rf"(?:\d+\. )?{name}\((.*)\) -> ", line)
        if match:
            names = re.findall(r"(?:^|, )(\w+): ", match[1])
            forms.append(tuple(each for each in names if each != "self"))
    return forms


def _starts(got: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    return got[: len(wanted)] == wanted


def _find(module: Any, path: str) -> Any:
    value = module
    for part in path.split("."):
        value = getattr(value, part, None)
    return value
