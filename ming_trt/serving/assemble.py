"""Makes a Triton model repository from a bundle.

    REPO/ming-trt.json                what it was made from: the bundle (relative path), the gate's verdict
    REPO/<model>/config.pbtxt         made from `graph.py` and the bundle
    REPO/<model>/1/model.py           copied from the shipped `triton_repo`
    REPO/ming/1/                      empty: an ensemble has no file, but the server wants a version folder

The repository holds no engines: it names the bundle by a path relative to itself, so both can be moved together.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import mkdtemp

from ming_trt import bundle as bundles
from ming_trt.bundle import Bundle
from ming_trt.errors import BundleError, ServeError
from ming_trt.resources import triton_repo_dir
from ming_trt.serving.configs import ensemble_config, stage_config, to_text
from ming_trt.serving.graph import ENSEMBLE, REQUIRED_COMPONENTS, Stage, stages_for
from ming_trt.serving.preflight import CONFIG, check_repository

MARK = "ming-trt.json"
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class RepositoryMark:
    """The content of `ming-trt.json`. `bundle` is relative to the repository; `ungated`: made with `--allow-ungated`
    from a bundle whose gate has not passed."""

    bundle: str
    models: tuple[str, ...]
    target: str
    gate: str
    ungated: bool
    schema: int = SCHEMA


def assemble(
    bundle_path: Path, repository: Path, allow_ungated: bool = False, source: Path | None = None
) -> RepositoryMark:
    """Writes the repository, or replaces one that this function made before; nothing is left behind on failure.

    `source`: where the stages' `model.py` files come from, if not from the shipped `triton_repo`.

    Raises `BundleError` (unusable or ungated bundle) or `ServeError` (the place cannot be used).
    """
    bundle = Bundle.open(bundle_path)
    ungated = check_gate(bundle, allow_ungated, running=False)
    missing = [name for name in REQUIRED_COMPONENTS if not bundle.has(name)]
    if missing:
        bundle.component(missing[0])  # raises, and says why the bundle lacks it
    _check_place(repository)
    repository.parent.mkdir(parents=True, exist_ok=True)
    final = repository.parent.resolve() / repository.name
    relative = os.path.relpath(bundle.path.resolve(), final)
    source = source or triton_repo_dir()
    stages = stages_for(bundle.manifest.components)
    mark = RepositoryMark(
        relative,
        (*(stage.name for stage in stages), ENSEMBLE),
        bundle.manifest.target,
        bundle.manifest.gate,
        ungated,
    )
    work = Path(mkdtemp(prefix=f".{repository.name}.", dir=final.parent))
    try:
        work.chmod(0o755)
        for stage in stages:
            _write_stage(work / stage.name, stage, _hidden_size(bundle), {"bundle": relative}, source)
        (work / ENSEMBLE / "1").mkdir(parents=True)
        (work / ENSEMBLE / CONFIG).write_text(to_text(ensemble_config(stages, _hidden_size(bundle))), "utf-8")
        check_repository(work)
        (work / MARK).write_text(json.dumps(asdict(mark), indent=1) + "\n", "utf-8")
        _publish(work, final)
    except OSError as error:
        raise ServeError(
            f"the repository '{repository}' cannot be written ({error.strerror}): choose another place"
        ) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return mark


def read_mark(repository: Path) -> RepositoryMark:
    """Reads `ming-trt.json`. Raises `ServeError` if the folder is no repository of ours."""
    file = repository / MARK
    try:
        data = json.loads(file.read_text("utf-8"))
        if data.get("schema") != SCHEMA:
            raise ServeError(f"'{file}' has schema {data.get('schema')}, not {SCHEMA}: run `ming-trt repo` again")
        return RepositoryMark(**{**data, "models": tuple(data["models"])})
    except FileNotFoundError:
        if (repository / bundles.MANIFEST).exists():
            raise ServeError(
                f"'{repository}' is a bundle, not a model repository: run `ming-trt repo {repository} -o REPO` first"
            ) from None
        raise ServeError(
            f"no model repository at '{repository}': make one with `ming-trt repo BUNDLE -o {repository}`"
        ) from None
    except (json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
        raise ServeError(f"'{file}' is damaged ({error}): run `ming-trt repo` again") from None


def open_bundle(repository: Path, mark: RepositoryMark) -> Bundle:
    """The bundle the repository refers to. Raises `BundleError`, also if it was moved away without its repository."""
    path = Path(os.path.normpath(repository.resolve() / mark.bundle))
    if not path.is_dir():
        raise BundleError(
            f"the repository '{repository}' refers to the bundle '{path}', which is not there: "
            "move both together, or run `ming-trt repo` again"
        )
    return Bundle.open(path)


def check_gate(bundle: Bundle, allow_ungated: bool, running: bool) -> bool:
    """Whether the bundle's numerics gate is open only because it was asked so. Raises `BundleError` if it is shut.

    A bundle that was compiled for another machine passes unless it is about to run (`running`).
    """
    verdict = bundle.manifest.gate
    if verdict == bundles.PASSED or (verdict == bundles.NOT_RUN and not running):
        return False
    if allow_ungated:
        return True
    reasons: Mapping[str, str] = {
        bundles.FAILED: "did not pass its numerics gate",
        bundles.NOT_RUN: "was compiled, not run, so its numbers are unknown",
        bundles.MISSING: "has no verdict of the numerics gate",
    }
    raise BundleError(
        f"bundle '{bundle.path}' {reasons.get(verdict, verdict)}: see `ming-trt verify`, or give --allow-ungated"
    )


def _hidden_size(bundle: Bundle) -> int:
    """Width of the rows that the encoders hand to the LLM."""
    return int(bundle.component("vision_encoder").outputs["rows"]["shape"][-1])


def _write_stage(folder: Path, stage: Stage, hidden: int, parameters: Mapping[str, str], source: Path) -> None:
    version = folder / "1"
    version.mkdir(parents=True)
    shutil.copyfile(source / stage.name / "1" / "model.py", version / "model.py")
    (folder / CONFIG).write_text(to_text(stage_config(stage, hidden, parameters)), "utf-8")


def _check_place(repository: Path) -> None:
    """Only an empty folder, or a repository of ours, is replaced."""
    if not repository.exists() and not repository.is_symlink():
        return
    if not repository.is_dir():
        raise ServeError(f"'{repository}' is a file: give a folder for the repository")
    if any(repository.iterdir()) and not (repository / MARK).is_file():
        raise ServeError(f"'{repository}' holds other files: give an empty or new folder for the repository")


def _publish(work: Path, final: Path) -> None:
    """Puts `work` at `final` by renaming, so that no half repository is ever seen."""
    old = work.with_name(work.name + ".old")
    if final.exists():
        final.rename(old)
    try:
        work.rename(final)
    except OSError:
        if old.exists():
            old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)
