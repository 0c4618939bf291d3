"""What README, docs and `--help` tell people to type, or to open, exists: commands parse, files are there."""

import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer

from ming_trt import cli

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "engines/official/README.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("plugins/**/README.md")),
]
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
# `log.md` also tells of what is no more, `bench.md` of the options of other programs.
HISTORY, BENCHMARKS = "log.md", "bench.md"
# What building leaves there: not in a fresh clone.
MADE = "engines/build/"


@pytest.fixture(scope="module")
def commands() -> dict[str, Any]:
    if not cli.app.registered_commands:
        cli._register()
    return typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


def blocks(text: str) -> list[str]:
    """The `ming-trt` commands in a text's blocks of code."""
    found = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    lines = [line for block in found for line in re.sub(r"\\\n *", "", block).splitlines()]
    parts = [part.strip().removesuffix("&") for line in lines for part in line.split(" && ")]
    return [part for part in parts if part.startswith("ming-trt ")]


def mentions(text: str) -> list[str]:
    """The `ming-trt` commands in a text's sentences."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    return [span for span in spans if re.match(r"ming-trt \w+ .", span)]


def helped() -> list[str]:
    """The commands of the examples in `--help`."""
    texts = [import_module(f"ming_trt.cli.{name}").EXAMPLES for name in cli.COMMANDS]
    parts = [part for text in texts for part in re.split(r"\s+\|?\s*(?=ming-trt )", text)[1:]]
    return [re.sub(r"\s{2,}\(.*", "", part, flags=re.DOTALL) for part in parts]


def test_commands_parse(commands: dict[str, Any]) -> None:
    """Names of commands and options, and types of their values; nothing is run."""
    texts = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in DOCUMENTS}
    found = [(place, line, True) for place, text in texts.items() for line in blocks(text)]
    found += [("--help", line, True) for line in helped()]
    # a sentence may name a command with one of its options and no folder
    found += [(place, line, False) for place, text in texts.items() for line in mentions(text)]
    problems = []
    for place, line, whole in found:
        _, name, *words = shlex.split(line.replace(" N", " 1"), comments=True)
        try:
            commands[name].make_context(name, words)
        except Exception as error:  # noqa: BLE001  (whatever the parser raises)
            if whole or type(error).__name__ != "MissingParameter":
                problems.append(f"{place}: {line}: {error!r}")
    assert len(found) > 60 and not problems, "\n".join(problems)


def test_options_in_prose_exist(commands: dict[str, Any]) -> None:
    known = {option for command in commands.values() for each in command.params for option in each.opts}
    known |= {"--version", "--debug", "--help", "--no-deps"}  # the last one is pip's
    for path in DOCUMENTS:
        if path.name not in (HISTORY, BENCHMARKS):
            spans = re.findall(r"`(--[a-z][a-z-]*)[^`]*`", path.read_text("utf-8"))
            assert set(spans) <= known, path.name


def test_files_exist() -> None:
    missing = []
    for path in DOCUMENTS:
        text = path.read_text("utf-8")
        names = {span for span in re.findall(r"`([\w./-]+/[\w./-]*)`", text) if span.split("/")[0] in FOLDERS}
        names |= set(re.findall(r"\]\(([\w./-]+)\)", text))
        for name in sorted(names):
            if name.startswith(MADE):
                continue
            if path.name != HISTORY and not any((base / name).exists() for base in (ROOT, path.parent)):
                missing.append(f"{path.name}: {name}")
    assert not missing


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for path in DOCUMENTS:
        asked = set(re.findall(r"(?:`|^)make (\w+)", path.read_text("utf-8"), re.MULTILINE))
        assert asked <= targets, path.name
