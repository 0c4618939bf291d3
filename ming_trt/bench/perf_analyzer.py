"""The questions of a scenario as an input file of NVIDIA's `perf_analyzer`, which can drive the ensemble as well.

It sees every message of a stream, and so the time to the first one and between them; it knows neither tokens nor sound,
reads no errors in a stream's text and not the language model's clock, for which there is `run.py`.
"""

from __future__ import annotations

import base64
import json
import shlex
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ming_trt.bench.media import Medium
from ming_trt.bench.scenarios import Scenario
from ming_trt.errors import InputError
from ming_trt.serving.graph import ENSEMBLE
from ming_trt.serving.wire import pack_bytes

_MEDIA = {"images": "image", "videos": "video", "audios": "audio"}


def write_inputs(
    scenario: Scenario,
    folder: Path,
    requests: int,
    seed: int,
    media: Mapping[str, Medium],
    max_tokens: int,
    steps: int,
) -> Path:
    """Writes `<scenario>.json`: the tensors of so many requests, equal ones for equal seeds. Raises `InputError`."""
    names = [uuid.uuid5(uuid.NAMESPACE_OID, f"{scenario.name} {seed} {i}").hex for i in range(requests)]
    data = [tensors(scenario.request(i, seed, media, max_tokens, steps), name) for i, name in enumerate(names)]
    file = folder / f"{scenario.name}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"data": data}), "utf-8")
    except OSError as error:
        raise InputError(f"'{folder}' cannot be written ({error.strerror}): give another folder by -o") from None
    return file


def tensors(arguments: Mapping[str, Any], request_id: str) -> dict[str, Any]:
    """Arguments of `Client.ask` as tensors in the tool's notation. No lease: nobody would renew it."""
    files = {name: list(arguments.get(name, ())) for name in _MEDIA}
    content = [{"type": _MEDIA[name]} for name, items in files.items() for _ in items]
    body = {
        "id": request_id,
        "messages": [{"role": "user", "content": [*content, {"type": "text", "text": arguments["text"]}]}],
        **{key: arguments[key] for key in ("sampling", "draw", "speak") if key in arguments},
    }
    packed = {name: _packed(items) for name, items in files.items() if items}
    return {"request": {"content": [json.dumps(body)], "shape": [1]}, **packed}


def command(file: Path, url: str, concurrency: int, requests: int) -> str:
    """How to run the tool on that file."""
    words: Sequence[str] = (
        "perf_analyzer", "-m", ENSEMBLE, "-u", url, "-i", "grpc", "--async", "--streaming", "--input-data", str(file),
        "--concurrency-range", str(concurrency), "--request-count", str(requests), "--stability-percentage", "999",
        "--profile-export-file", str(file.with_name(f"{file.stem}-profile.json")),
    )  # fmt: skip
    return shlex.join(words)


def _packed(items: Sequence[bytes]) -> dict[str, Any]:
    """Files do not fit into JSON's strings: the raw tensor, in base64."""
    return {"b64": base64.b64encode(pack_bytes(items)).decode(), "shape": [len(items)]}
