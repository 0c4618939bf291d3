"""The gate's verdict from the build to the server: what each makes of it, and what --allow-ungated overrides."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from builders import verify
from builders.build import Options, build
from ming_trt import bundle as bundles
from ming_trt import presets
from ming_trt.errors import BundleError
from ming_trt.serving.assemble import MARK, assemble
from ming_trt.serving.client import Client
from ming_trt.serving.launch import Server

from .conftest import free_ports
from .toy_bundle import write_bundle, write_stages

SENTENCES = {
    bundles.FAILED: "did not pass its numerics gate",
    bundles.NOT_RUN: "was compiled, not run",
    bundles.MISSING: "has no verdict of the numerics gate",
}


def test_a_bundle_that_cannot_run_here_is_built_and_assembled_but_not_served(
    understanding_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engines stay as they are; their gates are made again, on a machine that cannot hold the definitions."""
    folder, engines = tmp_path / "bundle", ("vision_encoder", "audio_encoder", "llm")
    shutil.copytree(understanding_bundle, folder)
    preset = presets.load("mini-cpu")
    stricter = {name: replace(each, min_sqnr_db=81.0) for name, each in preset.gate.items()}
    monkeypatch.setattr(verify, "available_memory", lambda: 10)
    report = build(Options(understanding_bundle.parent / "checkpoint", folder, replace(preset, gate=stricter), engines))
    assert report.ok and report.verdict == bundles.NOT_RUN
    assert {entry.verdict for entry in bundles.Bundle.open(folder).manifest.components.values()} == {bundles.NOT_RUN}

    assert not assemble(folder, tmp_path / "repo").ungated
    server = Server(tmp_path / "repo")
    with pytest.raises(BundleError, match=SENTENCES[bundles.NOT_RUN]):
        server.start()
    assert server.run_dir == Path()


@pytest.mark.parametrize("verdict", SENTENCES)
def test_commands_refuse_with_one_sentence(tmp_path: Path, verdict: str) -> None:
    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ming_trt", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    bundle, repository = write_bundle(tmp_path / "bundle", verdict), tmp_path / "repo"
    done = run("repo", bundle, "-o", repository)
    assert done.returncode == (0 if verdict == bundles.NOT_RUN else 1), done.stderr
    if done.returncode:
        assert SENTENCES[verdict] in done.stderr and done.stderr.count("\n") == 1
        assert not repository.exists()
        done = run("repo", bundle, "-o", repository, "--allow-ungated")
        assert done.returncode == 0 and "`ming-trt serve` asks for --allow-ungated too" in done.stderr
    stamped = json.loads((repository / MARK).read_text())
    assert stamped["ungated"] is (verdict != bundles.NOT_RUN) and stamped["gate"] == verdict
    done = run("serve", repository)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and SENTENCES[verdict] in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.triton
def test_allow_ungated_is_asked_for_by_the_server_too(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle", bundles.FAILED)
    assemble(tmp_path / "bundle", tmp_path / "repo", allow_ungated=True, source=write_stages(tmp_path / "source"))
    with pytest.raises(BundleError, match=SENTENCES[bundles.FAILED]):
        Server(tmp_path / "repo", free_ports()).start()
    with (
        Server(tmp_path / "repo", free_ports(), allow_ungated=True, ready_timeout_s=60) as server,
        Client(server.grpc_url) as client,
    ):
        assert client.ask("Hello", sampling={"max_tokens": 2}).read_all()
