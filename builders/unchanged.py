"""Whether a build has anything to do: the shortcut that opens no weight file and imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from builders import trtllm
from builders.code import project_version, tool_versions
from builders.steps import Outcome, Result, digest
from builders.workspace import Workspace
from ming_trt.bundle import MANIFEST, NOT_RUN, Bundle
from ming_trt.errors import BuildError, BundleError

if TYPE_CHECKING:
    from builders.build import Options

# What graphs are made with, and what runs them: their versions are part of the keys of steps.
EXPORT_TOOLS = ("torch", "onnx", "onnxscript", "onnx-ir", "numpy")
RUN_TOOLS = ("onnxruntime",)
# Prefix of the step that checks an engine.
GATE = "gate:"
TENSORRT = ("tensorrt", "tensorrt-rtx")
# What these targets compile is not run by the build.
COMPILED = (*TENSORRT, trtllm.TARGET)


def checkpoint_files(folder: Path) -> list[Path]:
    """Every file below the checkpoint, links followed. Raises `BuildError` if it is no folder."""
    if not folder.is_dir():
        raise BuildError(f"there is no checkpoint folder '{folder}': give the folder of the download")
    # Folders that overlay others are made of links.
    return sorted(Path(root) / name for root, _, names in os.walk(folder, followlinks=True) for name in names)


def fingerprint_of(options: Options, files: list[Path]) -> str:
    """Stands for everything a build depends on, without opening a weight file: equal means that nothing changed."""
    samples = sorted(p for p in options.calibration.rglob("*") if p.is_file()) if options.calibration else []
    identities = []
    for path in [*files, *samples]:
        state = path.stat()
        times = [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
        identities.append([str(path.absolute()), *times])
    return digest(
        {
            "files": identities,
            "preset": options.preset.as_dict(),
            "only": options.only,
            "memory": options.max_host_memory,
            "calibration": str(options.calibration or ""),
            "parallel": [options.tensor_parallel, options.expert_parallel],
            "code": project_version(),
            "tools": tool_versions((*EXPORT_TOOLS, *RUN_TOOLS, "tensorrt", "tensorrt_llm")),
        }
    )


def unchanged_since(space: Workspace, fingerprint: str) -> tuple[dict[str, Result], str] | None:
    """Results and verdict of the last build, if its inputs were these and its files are all intact, else None."""
    last = space.last_finished
    try:
        text = (space.folder / MANIFEST).read_text("utf-8")
        manifest = Bundle.open(space.folder).manifest
    except (OSError, UnicodeDecodeError, BundleError):
        return None
    if manifest.gate == NOT_RUN and manifest.target not in COMPILED:
        # What did not fit then may fit now; a plan does not run here, then or now.
        return None
    if last is None or last.get("fingerprint") != fingerprint or last.get("manifest") != digest(text):
        return None
    if not all(space.intact(record) for record in space.records.values()):
        return None
    results = {}
    for name, step in manifest.steps.items():
        if step.outcome == Outcome.SKIPPED:
            results[name] = Result(Outcome.SKIPPED, "", step.reason)
        else:
            results[name] = Result(Outcome.NOOP, step.key, record=space.records.get(name))
    return results, manifest.gate
