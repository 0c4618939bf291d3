"""The command that decides whether the engines are right, on the trimmed reference cases."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from tests.conftest import UNDERSTANDING


def golden(*arguments: str) -> tuple[int, dict]:
    command = [sys.executable, "-m", "ming_trt", "golden", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint in two shards with an index and a tensor of a prefix that nobody knows."""
    folder = tmp_path_factory.mktemp("sharded")
    shutil.copytree(UNDERSTANDING / "checkpoint", folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    weight_map = {}
    for file, held in parts.items():
        values = {name: tensors[name] for name in held}
        if file.startswith("model-00002"):
            values["unknown.prefix"] = tensors[names[0]]
        save_file(values, folder / file)
        weight_map |= dict.fromkeys(values, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.slow
def test_understanding_cases_pass_strictly_through_built_engines(sharded: Path) -> None:
    code, report = golden("--checkpoint", str(sharded), "--cases", str(UNDERSTANDING), "--strict")
    assert code == 0, report["reasons"]
    by_engine = {row["array"] for row in report["rows"] if row["via"] == "engine"}
    assert {"vision.ragged.embeds", "audio.clip0.embeds", "llm.text.prefill_logits", "e2e.generated_ids"} <= by_engine
    assert all(row["passed"] and row["compared"] > 0 for row in report["rows"])


def test_a_wrong_reference_fails(tmp_path: Path) -> None:
    index = json.loads((UNDERSTANDING / "cases.json").read_text())
    index["cases"] = [case for case in index["cases"] if case["id"] == "pos.text_one"]
    index["arrays"] = {k: v for k, v in index["arrays"].items() if k.startswith("pos.text_one")}
    index["image_sizes"][0]["first_pass"] = [28, 28]
    (tmp_path / "cases.json").write_text(json.dumps(index))
    shutil.copy(UNDERSTANDING / "cases.npz", tmp_path)
    code, report = golden("--checkpoint", str(UNDERSTANDING / "checkpoint"), "--cases", str(tmp_path))
    assert code == 1 and not report["passed"]
    assert [row["array"] for row in report["rows"] if not row["passed"]] == ["image_sizes.480x640"]


def test_an_unknown_kind_fails_only_when_strict(tmp_path: Path) -> None:
    index = json.loads((UNDERSTANDING / "cases.json").read_text())
    index["cases"] = [{"id": "new", "group": "taste", "inputs": [], "outputs": []}]
    index["arrays"] = {}
    (tmp_path / "cases.json").write_text(json.dumps(index))
    shutil.copy(UNDERSTANDING / "cases.npz", tmp_path)
    arguments = ("--checkpoint", str(UNDERSTANDING / "checkpoint"), "--cases", str(tmp_path))
    assert golden(*arguments)[0] == 0
    code, report = golden(*arguments, "--strict")
    assert code == 1 and "taste" in report["not_run"][0]["reason"]
