"""The mistakes that make Triton hang, or that it accepts silently, are found before it starts."""

import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from ming_trt.errors import ServeError
from ming_trt.serving.assemble import assemble
from ming_trt.serving.configs import from_text, to_text
from ming_trt.serving.preflight import check_ports, check_repository, model_of_instance

from .toy_bundle import write_bundle


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "bundle")
    assemble(tmp_path / "bundle", tmp_path / "repo")
    return tmp_path / "repo"


def edit(repository: Path, model: str, change: Callable[[object], None]) -> None:
    file = repository / model / "config.pbtxt"
    config = from_text(file.read_text())
    change(config)
    file.write_text(to_text(config))


def test_missing_model_file(repository: Path) -> None:
    (repository / "llm" / "1" / "model.py").unlink()
    with pytest.raises(ServeError, match=r"llm.*model\.py' is missing"):
        check_repository(repository)


def test_broken_model_file(repository: Path) -> None:
    (repository / "llm" / "1" / "model.py").write_text("def broken(:")
    with pytest.raises(ServeError, match="is not Python"):
        check_repository(repository)
    (repository / "llm" / "1" / "model.py").write_text("x = 1\n")
    with pytest.raises(ServeError, match="no class TritonPythonModel"):
        check_repository(repository)


def test_malformed_config(repository: Path) -> None:
    file = repository / "llm" / "config.pbtxt"
    file.write_text(file.read_text() + "max_batch: 3\n")
    with pytest.raises(ServeError, match="max_batch"):
        check_repository(repository)


def test_wrong_name_and_missing_version(repository: Path) -> None:
    shutil.rmtree(repository / "ming" / "1")
    with pytest.raises(ServeError, match="no version folder"):
        check_repository(repository)
    (repository / "ming").rename(repository / "other")
    with pytest.raises(ServeError, match="must equal its folder's name"):
        check_repository(repository)


MISTAKES = {
    "given twice": ("llm", lambda c: c.input.add().CopyFrom(c.input[0])),
    "has no outputs": ("postprocess", lambda c: c.ClearField("output")),
    "has no dims": ("postprocess", lambda c: c.output[0].ClearField("dims")),
    "dynamic batching but max_batch_size 0": ("postprocess", lambda c: c.dynamic_batching.SetInParent()),
    "max_batch_size above 0": ("ming", lambda c: setattr(c, "max_batch_size", 4)),
    "is not in the repository": ("ming", lambda c: setattr(c.ensemble_scheduling.step[0], "model_name", "nobody")),
    "is given no 'images'": ("ming", lambda c: c.ensemble_scheduling.step[0].input_map.pop("images")),
    "which no earlier step makes": ("ming", lambda c: c.ensemble_scheduling.step[0].input_map.update({"images": "x"})),
    "another type or shape": ("llm", lambda c: c.input[2].dims.append(7)),
    "is made twice": ("ming", lambda c: c.ensemble_scheduling.step[1].output_map.update({"vision_rows": "images"})),
    "has no input 'extra'": ("ming", lambda c: c.ensemble_scheduling.step[0].input_map.update({"extra": "images"})),
    "has no output 'extra'": ("ming", lambda c: c.ensemble_scheduling.step[0].output_map.update({"extra": "extra"})),
    "is made by no step": ("ming", lambda c: c.output.add(name="audio", data_type=c.output[0].data_type, dims=[1])),
}


@pytest.mark.parametrize("sentence", MISTAKES)
def test_mistakes_that_triton_accepts_or_hides(repository: Path, sentence: str) -> None:
    model, change = MISTAKES[sentence]
    edit(repository, model, change)
    with pytest.raises(ServeError, match=re.escape(sentence)):
        check_repository(repository)


def test_two_decoupled_tracks(repository: Path) -> None:
    """Triton 2.51: "receives inputs originated from different decoupled models"."""
    edit(repository, "vision_encoder", lambda c: setattr(c.model_transaction_policy, "decoupled", True))
    with pytest.raises(ServeError, match="different decoupled steps"):
        check_repository(repository)


def test_ports() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=f"port {port} .*--grpc-port"):
            check_ports("127.0.0.1", {"grpc": port})
    check_ports("127.0.0.1", {"grpc": port})
    with pytest.raises(ServeError, match="from 1 to 65535"):
        check_ports("127.0.0.1", {"http": 70000})
    with pytest.raises(ServeError, match="given for 2 services"):
        check_ports("127.0.0.1", {"http": 9000, "grpc": 9000})


@pytest.mark.parametrize(
    ("instance", "model"), [("llm_0_0", "llm"), ("audio_encoder_1_12", "audio_encoder"), ("x", "x")]
)
def test_instance_names(instance: str, model: str) -> None:
    assert model_of_instance(instance) == model
