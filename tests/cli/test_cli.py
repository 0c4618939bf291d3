"""The command frame: help for every command, one-sentence errors, exit codes."""

import json
import subprocess
import sys

import pytest

from ming_trt.cli import COMMANDS


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ming_trt", *arguments], capture_output=True, text=True, timeout=120)


def test_help_lists_every_command() -> None:
    done = run("--help")
    assert done.returncode == 0
    for name in COMMANDS:
        assert name in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples(name: str) -> None:
    done = run(name, "--help")
    assert done.returncode == 0
    assert f"ming-trt {name}" in done.stdout


def test_doctor_as_json() -> None:
    done = run("doctor", "--json")
    report = json.loads(done.stdout)
    assert (done.returncode == 0) == report["ok"]
    names = {target["name"] for target in report["targets"]}
    assert names == {"onnxruntime", "tensorrt", "tensorrt-rtx", "tensorrt-llm"}
    embedded = next(t for t in report["targets"] if t["name"] == "onnxruntime")
    assert embedded["build"] and embedded["serve"], "the suite itself needs the embedded default"


@pytest.mark.parametrize(("target", "code"), [("onnxruntime", 0), ("tensorrt-rtx", 1)])
def test_doctor_of_one_target(target: str, code: int) -> None:
    assert run("doctor", "--target", target, "--json").returncode == code
    done = run("doctor", "--target", "onxruntime")
    assert done.returncode == 1 and done.stderr.startswith("error: unknown target 'onxruntime': choose from")


@pytest.mark.parametrize(
    "arguments",
    [
        ("build", "/nonexistent", "-o", "/tmp/never-written"),
        ("plan", "/nonexistent"),
        ("inspect", "/nonexistent"),
        ("repo", "/nonexistent", "-o", "/tmp/never-written"),
        ("serve", "/nonexistent"),
        ("golden", "--checkpoint", "/nonexistent", "--cases", "/nonexistent"),
    ],
)
def test_a_missing_folder_is_one_sentence(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode not in (0, 2)
    assert done.stderr.startswith("error: ")
    assert "/nonexistent" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_folder_that_cannot_be_made_is_one_sentence() -> None:
    done = run("mini", "/proc/nothing/mini")
    assert done.returncode == 1
    assert done.stderr.startswith("error: '/proc/nothing") and done.stderr.count("\n") == 1
