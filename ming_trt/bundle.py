"""A bundle: a folder of engines with a manifest that says what they are, and what was proved of them.

    bundle/manifest.json         this file's schema
    bundle/<component>/          model.onnx + model.onnx.data, or model.plan, or trtllm/
    bundle/assets/               the checkpoint's configuration and tokenizer files

Reading needs neither torch nor onnx. The build graph (`builders/steps.py`) writes it; the manifest comes last.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ming_trt import presets
from ming_trt.errors import BundleError, ConfigError

SCHEMA = 1
MANIFEST = "manifest.json"
ASSETS = "assets"
# How well a component is known to work on its target, from weakest to strongest.
RUNGS = ("read", "typed", "compiled", "ran", "matches", "measured")
# Verdicts of the gate. "compiled, not run": the target cannot run where it was built.
PASSED, FAILED, NOT_RUN, MISSING = "passed", "failed", "compiled, not run", "missing"
# Engines that are of use only together: those of drawing, and those of speaking (the talker before its decoder's).
DRAWING_ENGINES = ("connector", "condition", "dit", "vae_encoder", "vae_decoder")
SPEAKING_ENGINES = ("talker", "flow_encoder", "flow_estimator", "f0_predictor", "vocoder")
_CHUNK = 1 << 20
# The end of `manifest.json`: the digest of all that stands before it.
_SEAL = re.compile(rb',\n "sha256": "([0-9a-f]{64})"\n\}\n\Z')


@dataclass(frozen=True, slots=True)
class FileEntry:
    """SHA-256 (hex) and size in bytes of one file."""

    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class StepEntry:
    """A step of the build: `outcome` is OK or SKIPPED (with `reason`), `key` its content key, `files` what it wrote."""

    outcome: str
    key: str = ""
    reason: str = ""
    files: Mapping[str, FileEntry] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ComponentEntry:
    """An engine. `model` is the file to load, relative to the bundle; `inputs` and `outputs` map names to
    `{"dtype", "shape"}` (a symbol stands for a dynamic size); `facts` is what the builder says the runtime must know;
    `gate` is the report of its numerics audit (`verdict` and `outputs`); `weights` the digest of its source tensors."""

    name: str
    target: str
    precision: str
    model: str
    inputs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    outputs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    gate: Mapping[str, Any] = field(default_factory=dict)
    rung: str = "compiled"
    weights: str = ""

    @property
    def verdict(self) -> str:
        """`PASSED`, `FAILED`, `NOT_RUN` or `MISSING`."""
        return str(self.gate.get("verdict", MISSING))


@dataclass(frozen=True, slots=True)
class Manifest:
    """What `manifest.json` holds. `checkpoint` maps weight files to their digest and size; `model` names the model and
    its architecture; `versions` the tools that made the bundle; `preset` is the preset with all overrides applied."""

    model: Mapping[str, Any]
    target: str
    preset: presets.Preset
    checkpoint: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, str]
    steps: Mapping[str, StepEntry]
    components: Mapping[str, ComponentEntry]

    @property
    def precision(self) -> dict[str, str]:
        """Component -> precision, as built."""
        return {name: entry.precision for name, entry in self.components.items()}

    @property
    def files(self) -> dict[str, FileEntry]:
        """Every file of the bundle, relative to it."""
        return {path: entry for step in self.steps.values() for path, entry in step.files.items()}

    @property
    def gate(self) -> str:
        """The verdict over all engines: failed if one failed, else missing or not run if one is, else passed."""
        verdicts = {entry.verdict for entry in self.components.values()}
        for worst in (FAILED, MISSING, NOT_RUN):
            if worst in verdicts:
                return worst
        return PASSED if verdicts else MISSING

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` reads it back."""
        return {
            "schema": SCHEMA,
            "model": dict(self.model),
            "target": self.target,
            "preset": self.preset.as_dict(),
            "precision": self.precision,
            "gate": self.gate,
            "versions": dict(self.versions),
            "checkpoint": {name: dict(entry) for name, entry in self.checkpoint.items()},
            "components": {
                name: {
                    "target": entry.target,
                    "precision": entry.precision,
                    "model": entry.model,
                    "rung": entry.rung,
                    "weights": entry.weights,
                    "inputs": entry.inputs,
                    "outputs": entry.outputs,
                    "facts": entry.facts,
                    "gate": entry.gate,
                }
                for name, entry in self.components.items()
            },
            "steps": {
                name: {
                    "outcome": step.outcome,
                    "key": step.key,
                    "reason": step.reason,
                    "files": {path: {"sha256": f.sha256, "size": f.size} for path, f in sorted(step.files.items())},
                }
                for name, step in self.steps.items()
            },
        }

    def to_json(self) -> str:
        """The text of `manifest.json`, which ends with its own digest; equal manifests give equal text."""
        body = json.dumps(self.as_dict(), indent=1, ensure_ascii=False).removesuffix("\n}")
        return f'{body},\n "sha256": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Manifest:
        """Raises KeyError, TypeError, ValueError or ConfigError where `data` is not a manifest of this schema."""
        steps = {
            name: StepEntry(
                str(step["outcome"]),
                str(step["key"]),
                str(step["reason"]),
                {path: FileEntry(str(f["sha256"]), int(f["size"])) for path, f in step["files"].items()},
            )
            for name, step in data["steps"].items()
        }
        components = {name: ComponentEntry(name=name, **entry) for name, entry in data["components"].items()}
        preset = presets.from_dict(data["preset"], str(data["preset"]["name"]))
        return cls(data["model"], data["target"], preset, data["checkpoint"], data["versions"], steps, components)


class Bundle:
    """A bundle that was opened for reading."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path | str) -> Bundle:
        """Reads the manifest and looks that every file of it is there with its size (contents: `check`).

        Raises `BundleError`: no such folder, an unfinished build, a damaged or newer manifest, a missing or cut file.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise BundleError(f"no bundle at '{folder}': build one with `ming-trt build CHECKPOINT -o {folder}`")
        file = folder / MANIFEST
        try:
            data = json.loads(file.read_text("utf-8"))
        except FileNotFoundError:
            raise BundleError(
                f"'{folder}' has no {MANIFEST}: its build did not finish; run `ming-trt build` again the same way"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise BundleError(f"'{file}' is damaged ({error}): run `ming-trt build` again") from None
        except OSError as error:
            raise BundleError(f"'{file}' cannot be read ({error.strerror}): check its permissions") from None
        schema = data.get("schema") if isinstance(data, dict) else None
        if isinstance(schema, int) and schema > SCHEMA:
            raise BundleError(f"'{file}' has schema {schema}, and this ming-trt reads up to {SCHEMA}: update ming-trt")
        if schema != SCHEMA:
            raise BundleError(f"'{file}' has schema {schema!r}, and this ming-trt reads {SCHEMA}: build it again")
        try:
            manifest = Manifest.from_dict(data)
        except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
            raise BundleError(f"'{file}' is damaged ({type(error).__name__}: {error}): build it again") from None
        bundle = cls(folder, manifest)
        for problem in bundle._problems_by_size():
            raise BundleError(f"bundle '{folder}' is damaged: {problem}; build it again")
        return bundle

    @property
    def preset(self) -> presets.Preset:
        """The preset the bundle was built with, overrides applied."""
        return self.manifest.preset

    @property
    def assets(self) -> Path:
        """The folder with config.json, tokenizer and processor files of the checkpoint."""
        return self.path / ASSETS

    def component(self, name: str) -> ComponentEntry:
        """The entry of that engine. Raises `BundleError` saying why the bundle lacks it."""
        entry = self.manifest.components.get(name)
        if entry is not None:
            return entry
        step = self.manifest.steps.get(name)
        why = f"skipped: {step.reason}" if step and step.reason else f"it has {', '.join(self.manifest.components)}"
        raise BundleError(f"bundle '{self.path}' has no {name} ({why}): build it from a checkpoint that holds it")

    def has(self, name: str) -> bool:
        """Whether the bundle holds that engine."""
        return name in self.manifest.components

    def model_path(self, name: str) -> Path:
        """The file (or folder) that the engine `name` loads."""
        return self.path / self.component(name).model

    def damage(self, read: Callable[[int], None] = lambda _: None) -> list[str]:
        """Compares every file of the bundle, the manifest too, with its size and digest. One sentence per damaged file.

        `read` is told how many bytes were read, every MiB; what it raises ends the check.
        """
        problems = list(self._problems_by_size())
        if not _is_sealed((self.path / MANIFEST).read_bytes()):
            problems.append(f"'{MANIFEST}' does not have the digest that it states")
        bad = {problem.split("'")[1] for problem in problems}
        for name, entry in sorted(self.manifest.files.items()):
            if name not in bad and sha256(self.path / name, read) != entry.sha256:
                problems.append(f"'{name}' does not have the digest that the manifest states")
        return problems

    def require_intact(self, read: Callable[[int], None] = lambda _: None) -> None:
        """Raises `BundleError` if a file is damaged; `read` as for `damage`."""
        problems = self.damage(read)
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise BundleError(
                f"bundle '{self.path}' is damaged: {problems[0]}{more}; copy it again, or remove it and build it again"
            )

    def check(self) -> list[str]:
        """`damage`, and files that the manifest lacks. One sentence per problem."""
        problems = self.damage()
        known = self.manifest.files
        # What a build left alone, because it was not selected, is not part of the bundle.
        aside = {name for name, step in self.manifest.steps.items() if step.outcome == "SKIPPED"}
        for name in files_below(self.path):
            if name not in known and name != MANIFEST and not name.startswith(".") and name.split("/")[0] not in aside:
                problems.append(f"'{name}' is not in the manifest")
        return problems

    def _problems_by_size(self) -> Iterator[str]:
        for name, entry in sorted(self.manifest.files.items()):
            try:
                size = (self.path / name).stat().st_size
            except OSError:
                yield f"'{name}' is missing"
                continue
            if size != entry.size:
                yield f"'{name}' has {size} bytes instead of {entry.size}"


def differences(first: Manifest, second: Manifest) -> list[tuple[str, str, str]]:
    """Where two manifests differ: (what, in the first, in the second), "" where one lacks it."""
    flat = [dict(_leaves(manifest.as_dict())) for manifest in (first, second)]
    names = [*flat[0], *(name for name in flat[1] if name not in flat[0])]
    return [
        (name, flat[0].get(name, ""), flat[1].get(name, "")) for name in names if flat[0].get(name) != flat[1].get(name)
    ]


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path} › {key}" if path else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        for index, inner in enumerate(value):
            key = inner.get("name", index) if isinstance(inner, Mapping) else index
            yield from _leaves(inner, f"{path} › {key}")
    else:
        yield path, value if isinstance(value, str) else json.dumps(value)


def _is_sealed(text: bytes) -> bool:
    """Whether the text of a manifest is, byte by byte, what was written."""
    seal = _SEAL.search(text)
    return seal is not None and hashlib.sha256(text[: seal.start()]).hexdigest().encode() == seal[1]


def sha256(path: Path, read: Callable[[int], None] = lambda _: None) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces of 1 MiB; `read` is told the size of each."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(_CHUNK):
            digest.update(block)
            read(len(block))
    return digest.hexdigest()


def files_below(folder: Path) -> list[str]:
    """Regular files below `folder`, as sorted posix paths relative to it."""
    found = []
    for root, _, names in os.walk(folder):
        found += [(Path(root) / name).relative_to(folder).as_posix() for name in names]
    return sorted(found)


def write_atomically(path: Path, text: str) -> None:
    """Replaces `path` by `text` so that a reader, or a crash, sees the old or the new content and nothing between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
