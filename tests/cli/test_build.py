"""build, inspect, plan and verify as a user calls them, on the reference checkpoint's audio encoder."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

CHECKPOINT = Path(__file__).parents[1] / "data" / "golden" / "understanding" / "checkpoint"

pytestmark = pytest.mark.slow


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ming_trt", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "bundle"
    done = run("build", CHECKPOINT, "-o", folder, "--only", "audio_encoder", "--preset", "mini-cpu")
    assert done.returncode == 0, done.stderr
    assert "gate passed" in done.stdout
    assert "audio_encoder OK in" in done.stderr
    return folder


def test_build_again_as_json_does_nothing_and_loads_no_torch(bundle: Path) -> None:
    code = (
        "import sys; from ming_trt import cli; sys.argv[0] = 'ming-trt'\n"
        "try: cli.main()\n"
        "except SystemExit as done: assert not done.code\n"
        "assert not {'torch', 'onnx', 'onnxruntime'} & set(sys.modules)"
    )
    arguments = ["build", CHECKPOINT, "-o", bundle, "--only", "audio_encoder", "--preset", "mini-cpu", "--json"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] and report["gate"] == "passed"
    assert {step["outcome"] for step in report["steps"].values()} == {"NOOP", "SKIPPED"}
    assert report["steps"]["llm"]["reason"] == "not selected"


def test_interrupted_build_says_so_and_leaves_no_half_work(tmp_path: Path) -> None:
    arguments = ["build", CHECKPOINT, "-o", tmp_path / "bundle", "--only", "audio_encoder", "--preset", "mini-cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ming_trt", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that starts something in the background makes it deaf to Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "audio_encoder ..." in line:
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors.splitlines()[-2:] == ["what is finished stays; the same command goes on from there", "interrupted"]
    assert not list((tmp_path / "bundle" / ".work").iterdir())
    assert (tmp_path / "bundle" / "assets" / "config.json").is_file()


def test_inspect(bundle: Path) -> None:
    done = run("inspect", bundle, "--check")
    assert done.returncode == 0
    for text in ("gate: passed", "audio_encoder", "matches", "mel", "[frames, 128]", "match their digests"):
        assert text in done.stdout
    document = json.loads(run("inspect", bundle, "--json", "--check").stdout)
    assert document["schema"] == 1 and document["problems"] == []


def test_inspect_finds_one_flipped_bit(bundle: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(bundle, tmp_path / "copy")
    data = tmp_path / "copy" / "audio_encoder" / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[1000] ^= 1
    data.write_bytes(content)
    done = run("inspect", tmp_path / "copy", "--check")
    assert done.returncode == 1
    assert "problem: 'audio_encoder/model.onnx.data' does not have the digest that the manifest states" in done.stdout


def test_difference_of_two(bundle: Path, tmp_path: Path) -> None:
    import shutil

    assert run("inspect", bundle, bundle).returncode == 0
    shutil.copytree(bundle, tmp_path / "copy")
    manifest = tmp_path / "copy" / "manifest.json"
    document = json.loads(manifest.read_text())
    document["versions"]["torch"] = "1.0"
    manifest.write_text(json.dumps(document))
    done = run("inspect", bundle, tmp_path / "copy", "--json")
    assert done.returncode == 1
    assert [row["what"] for row in json.loads(done.stdout)] == ["versions › torch"]


def test_verify(bundle: Path, tmp_path: Path) -> None:
    report = tmp_path / "report"
    done = run("verify", bundle, "--checkpoint", CHECKPOINT, "--layers", "--determinism", "-o", report)
    assert done.returncode == 0, done.stderr
    assert "modules match" in done.stdout and "a new session" in done.stdout
    document = json.loads((report / "report.json").read_text())
    assert document["verdict"] == "passed"
    assert (report / "report.html").stat().st_size > 1000


def test_verify_without_the_engine(bundle: Path) -> None:
    done = run("verify", bundle, "--checkpoint", CHECKPOINT, "--component", "llm")
    assert done.returncode == 1
    assert done.stderr.startswith("error: bundle") and "has no llm (skipped: not selected)" in done.stderr


def test_peaks_of_a_build_are_planned_within_ten_percent(bundle: Path) -> None:
    """Each step of the build notes the peak of its process's resident memory, as the kernel counts it."""
    events = [json.loads(line) for line in (bundle / ".journal").read_text().splitlines()]
    peaks = {event["step"]: event["peak_bytes"] for event in events if event["event"] == "built"}
    planned = json.loads(run("plan", CHECKPOINT, "--only", "audio_encoder", "--preset", "mini-cpu", "--json").stdout)
    assert planned["build_peak_bytes"] == pytest.approx(peaks["audio_encoder"], rel=0.1)
    assert planned["gate_peak_bytes"] == pytest.approx(peaks["gate:audio_encoder"], rel=0.1)


def test_plan_as_json() -> None:
    done = run("plan", CHECKPOINT, "--json")
    assert done.returncode == 0
    document = json.loads(done.stdout)
    assert document["problem"] == "" and document["weight_bytes"] > 10**7


def test_plan_refuses_what_does_not_fit() -> None:
    done = run("plan", CHECKPOINT, "--max-host-memory", "1MiB")
    assert done.returncode == 1
    assert "error: serving needs" in done.stderr and "the largest item is" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preset", "cpu-fp23"), "unknown preset 'cpu-fp23': did you mean 'cpu-fp32'?"),
        (("--target", "tensorr"), "unknown target 'tensorr': did you mean 'tensorrt'?"),
        (("--target", "tensorrt", "--preset", "cpu-fp32"), "target tensorrt needs TensorRT, which is not installed"),
        (("--precision", "fp9"), "unknown precision of default 'fp9'"),
        (("--only", "vision"), "there is no component 'vision': did you mean 'vision_encoder'?"),
        (("--max-host-memory", "lots"), "--max-host-memory is 'lots'"),
        (("--tp", "2"), "need target tensorrt-llm"),
    ],
)
def test_wrong_options_are_one_sentence(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = run("build", CHECKPOINT, "-o", tmp_path / "bundle", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "bundle").exists()


def test_two_builds_at_once(bundle: Path) -> None:
    from builders.workspace import Workspace

    with Workspace(bundle):
        done = run("build", CHECKPOINT, "-o", bundle)
    assert done.returncode == 1 and "is being built by process" in done.stderr


def test_output_that_cannot_be_written() -> None:
    done = run("build", CHECKPOINT, "-o", "/proc/bundle", "--only", "audio_encoder")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
