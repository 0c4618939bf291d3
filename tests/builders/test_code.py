"""Versions of code: what is behind a module, and only that."""

from __future__ import annotations

from pathlib import Path

import pytest

from builders import code, registry


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    files = {
        "a.py": "import builders.b\n",
        "b.py": "def f():\n    from builders.deep import c\n",
        "deep/__init__.py": "",
        "deep/c.py": "import json\nx = 1\n",
        "other.py": "y = 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(code, "_ROOTS", {"builders": tmp_path})
    for function in (code._imports, code._path, code._source):
        function.cache_clear()
    yield tmp_path
    for function in (code._imports, code._path, code._source):
        function.cache_clear()


@pytest.mark.parametrize(
    ("file", "changes"), [("a.py", True), ("b.py", True), ("deep/c.py", True), ("other.py", False)]
)
def test_follows_imports(project: Path, file: str, changes: bool) -> None:
    before = code.code_version("builders.a"), code.project_version()
    (project / file).write_text((project / file).read_text() + "# changed\n")
    for function in (code._imports, code._path, code._source):
        function.cache_clear()
    assert (code.code_version("builders.a") != before[0]) == changes
    assert code.project_version() != before[1]


@pytest.mark.parametrize("name", registry.COMPONENTS)
def test_engines_depend_on_their_definition_but_not_on_the_build(name: str) -> None:
    modules = code._closure(registry.module_of(name))
    assert any(module.startswith("ming_trt.models.") for module in modules)
    assert not [module for module in modules if module.split(".")[1:2] and module.split(".")[1] in code._APART]
    assert not modules & {"builders.build", "builders.steps", "builders.workspace", "ming_trt.cli.build"}


def test_absent_tool() -> None:
    versions = code.tool_versions(("numpy", "no-such-distribution"))
    assert versions["numpy"] and versions["no-such-distribution"] == ""
