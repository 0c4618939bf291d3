"""The data files of evidence and versions: complete, and told the same way everywhere."""

from __future__ import annotations

import pytest

from builders import registry, trtllm
from ming_trt import compatibility, evidence, presets
from ming_trt.bundle import RUNGS
from ming_trt.resources import engines_dir


def test_every_component_of_every_target_has_a_rung() -> None:
    known = evidence.evidence()
    assert set(known) == set(presets.TARGETS)
    for target, found in known.items():
        expected = [trtllm.NAME] if target == trtllm.TARGET else list(registry.COMPONENTS)
        assert list(found.components) == expected
        assert set(found.components.values()) <= set(RUNGS) and found.by


def test_readme_tells_the_same() -> None:
    text = (engines_dir().parent / "README.md").read_text("utf-8")
    assert evidence.markdown() in text


def test_compatibility_document_tells_the_same() -> None:
    text = (engines_dir().parent / "docs" / "compatibility.md").read_text("utf-8")
    for part in compatibility.parts():
        if "tensorrt-llm" in part.targets and part.name != "torch":
            assert (part.exactly or part.at_least) in text


@pytest.mark.parametrize(
    ("name", "version", "problem"),
    [
        ("numpy", "1.26.4", ""),
        ("numpy", "2.0", "numpy 2.0, needs one below 2"),
        ("numpy", "1.9.9", "numpy 1.9.9, needs 1.26 or newer"),
        ("torch", "2.13.0+cpu", ""),
        ("torch", "2.10.0a0", ""),
        ("tensorrt", "10.14.1.48", ""),
        ("tensorrt", "11.0.0", "tensorrt 11.0.0, needs one below 10.14.2"),
        ("tensorrt-llm", "1.2.1", ""),
        ("tensorrt-llm", "1.3.0rc20", "tensorrt-llm 1.3.0rc20, needs 1.2.1"),
        ("driver", "580.95.05", "driver 580.95.05, needs 590.44.01 or newer"),
    ],
)
def test_versions(name: str, version: str, problem: str) -> None:
    part = next(part for part in compatibility.parts() if part.name == name)
    found = part.problem(version)
    assert found.startswith(problem) if problem else not found


def test_bounds_are_those_of_the_installation() -> None:
    """pyproject.toml and the table do not contradict each other."""
    import tomllib

    project = tomllib.loads((engines_dir().parent / "pyproject.toml").read_text("utf-8"))["project"]
    named = [
        *project["dependencies"],
        *project["optional-dependencies"]["cpu"],
        *project["optional-dependencies"]["build"],
    ]
    for part in compatibility.parts():
        stated = [entry for entry in named if entry.startswith(f"{part.name}>=")]
        assert all(f">={part.at_least}" in entry for entry in stated)
