"""Looks through a model repository before a server is started on it.

The server hangs on a missing `model.py`, accepts several mistakes silently and reports others only in its log; each of
them is one sentence here.
"""

from __future__ import annotations

import ast
import re
import shutil
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from google.protobuf import text_format

from ming_trt.errors import ServeError
from ming_trt.serving.configs import from_text

CONFIG = "config.pbtxt"


def check_repository(repository: Path) -> dict[str, Any]:
    """Reads and checks every model of the repository; returns name -> `ModelConfig`.

    Raises `ServeError` with the first problem.
    """
    if not repository.is_dir():
        raise ServeError(f"no model repository at '{repository}': make one with `ming-trt repo BUNDLE -o {repository}`")
    configs = {}
    for folder in sorted(path for path in repository.iterdir() if path.is_dir() and not path.name.startswith(".")):
        configs[folder.name] = _read(folder)
    if not configs:
        raise ServeError(f"'{repository}' holds no models: make a repository with `ming-trt repo BUNDLE -o DIR`")
    # Ensembles last: a fault of a member is better told as its own.
    for name, config in sorted(configs.items(), key=lambda item: item[1].platform == "ensemble"):
        for problem in _problems(repository / name, config, configs):
            raise ServeError(f"model '{name}' of '{repository}': {problem}")
    return configs


def check_ports(host: str, ports: Mapping[str, int]) -> None:
    """Raises `ServeError` if a port is out of range, named twice, or taken."""
    for name, port in ports.items():
        if not 1 <= port <= 65535:
            raise ServeError(f"--{name}-port is {port}: give a port from 1 to 65535")
    for port, count in Counter(ports.values()).items():
        if count > 1:
            raise ServeError(f"port {port} is given for {count} services: give each its own")
    for name, port in ports.items():
        with socket.socket() as probe:
            # As the server does, so that connections that linger from a stopped one do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise ServeError(
                    f"port {port} on {host} cannot be used ({error.strerror}): "
                    f"stop what uses it, or choose another by --{name}-port"
                ) from None


def check_shared_memory(models: int) -> None:
    """Each python process takes a region that starts with 1 MB and grows with its tensors. Raises `ServeError`."""
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        raise ServeError("/dev/shm is not there: the server's processes need it; mount a tmpfs on it") from None
    needed = max(64, 16 * models) << 20
    if free < needed:
        raise ServeError(
            f"/dev/shm has {free >> 20} MB free and {models} processes want {needed >> 20}: "
            "enlarge it (docker: --shm-size=1g)"
        )


def _read(folder: Path) -> Any:
    file = folder / CONFIG
    if not file.is_file():
        raise ServeError(f"'{folder}' has no {CONFIG}: assemble the repository again with `ming-trt repo`")
    try:
        config = from_text(file.read_text("utf-8"))
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise ServeError(f"'{file}' cannot be read ({error}): assemble the repository again") from None
    if config.name != folder.name:
        raise ServeError(f"'{file}' names the model '{config.name}', which must equal its folder's name")
    return config


def _problems(folder: Path, config: Any, configs: Mapping[str, Any]) -> Iterator[str]:
    versions = [path for path in folder.iterdir() if path.is_dir() and path.name.isdigit()]
    if not versions:
        yield "it has no version folder '1', which even an ensemble needs"
    for kind, tensors in (("input", config.input), ("output", config.output)):
        if not tensors:
            yield f"it has no {kind}s"
        for name, count in Counter(tensor.name for tensor in tensors).items():
            if count > 1:
                yield f"the {kind} '{name}' is given twice"
        for tensor in tensors:
            if not tensor.dims:
                yield f"the {kind} '{tensor.name}' has no dims"
    if config.HasField("dynamic_batching") and config.max_batch_size == 0:
        yield "it has dynamic batching but max_batch_size 0"
    if config.backend == "python":
        for version in versions:
            yield from _python_problems(version / "model.py")
    if config.platform == "ensemble":
        if config.max_batch_size:
            yield "an ensemble over models without a batch dimension has max_batch_size above 0"
        yield from _ensemble_problems(config, configs)


def _python_problems(file: Path) -> Iterator[str]:
    if not file.is_file():
        yield f"'{file}' is missing, which would make the server wait for ever"
        return
    try:
        tree = ast.parse(file.read_text("utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        yield f"'{file}' is not Python ({error})"
        return
    names = {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    names |= {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    if "TritonPythonModel" not in names:
        yield f"'{file}' has no class TritonPythonModel"


def _ensemble_problems(config: Any, configs: Mapping[str, Any]) -> Iterator[str]:
    """Members, names, types and shapes of the steps, and the server's rule on decoupled members."""
    made = {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in config.input}
    # Tensor -> the decoupled step it comes from, directly or through other steps ("" = none).
    track = dict.fromkeys(made, "")
    for step in config.ensemble_scheduling.step:
        member = configs.get(step.model_name)
        if member is None:
            yield f"its step '{step.model_name}' is not in the repository"
            return
        for tensor in member.input:
            source = step.input_map.get(tensor.name, "")
            if not source:
                yield f"step '{step.model_name}' is given no '{tensor.name}'"
            elif source not in made:
                yield f"step '{step.model_name}' takes '{source}', which no earlier step makes"
            elif made[source] != (tensor.data_type, tuple(tensor.dims)):
                yield f"step '{step.model_name}' takes '{source}' in another type or shape than it is made"
        for name in step.input_map:
            if name not in {tensor.name for tensor in member.input}:
                yield f"step '{step.model_name}' has no input '{name}'"
        tracks = {track.get(source, "") for source in step.input_map.values()}
        if len(tracks) > 1:
            yield f"step '{step.model_name}' takes tensors of different decoupled steps, which the server refuses"
        follows = step.model_name if member.model_transaction_policy.decoupled else next(iter(tracks), "")
        outputs = {tensor.name: tensor for tensor in member.output}
        for name, target in step.output_map.items():
            if name not in outputs:
                yield f"step '{step.model_name}' has no output '{name}'"
                continue
            if target in made:
                yield f"the tensor '{target}' is made twice"
            made[target] = (outputs[name].data_type, tuple(outputs[name].dims))
            track[target] = follows
    for tensor in config.output:
        if made.get(tensor.name) != (tensor.data_type, tuple(tensor.dims)):
            yield f"its output '{tensor.name}' is made by no step in that type and shape"
    if len({track.get(tensor.name, "") for tensor in config.output}) > 1:
        yield "its outputs come from different decoupled steps, which the server refuses"


def model_of_instance(instance: str) -> str:
    """`llm_0_0`, the name of a stub's instance, belongs to the model `llm`."""
    match = re.fullmatch(r"(.+)_\d+_\d+", instance)
    return match.group(1) if match else instance
