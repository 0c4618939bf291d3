"""Input files for another tool: the very requests that we would send."""

from __future__ import annotations

import base64
import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ming_trt import cli
from ming_trt.bench.media import made_media
from ming_trt.bench.perf_analyzer import command, tensors, write_inputs
from ming_trt.bench.scenarios import SCENARIOS, Scenario
from ming_trt.errors import InputError
from ming_trt.processing.request import check_media, parse_request
from ming_trt.serving.wire import pack_bytes


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_requests_are_what_the_server_takes(scenario: Scenario) -> None:
    media = made_media()
    media.setdefault("video", media["image"])
    asked = scenario.request(0, 0, media, 8, 4)
    sent = tensors(asked, "a")
    assert sent["request"]["shape"] == [1]
    request = parse_request(sent["request"]["content"][0].encode())
    check_media(request, *(len(asked.get(name, ())) for name in ("images", "videos", "audios")))
    assert asked["text"] in request.messages[0].text and request.lease == 0
    assert (request.draw is not None, request.speak is not None) == (
        scenario.gives == "image",
        scenario.gives == "audio",
    )
    for name in {"images", "videos", "audios"} & asked.keys():
        # the tool sends these bytes as they are: Triton's own layout of strings
        assert base64.b64decode(sent[name]["b64"]) == pack_bytes(asked[name]) and sent[name]["shape"] == [1]


def test_files_follow_the_seed_and_the_command_names_them(tmp_path: Path) -> None:
    text = SCENARIOS[0]
    one, two = (write_inputs(text, tmp_path / name, 5, 3, {}, 8, 4) for name in "ab")
    assert one.read_text() == two.read_text()
    entries = json.loads(one.read_text())["data"]
    assert len({json.loads(entry["request"]["content"][0])["id"] for entry in entries}) == 5
    words = shlex.split(command(one, "host:8001", 4, 20))
    assert words[0] == "perf_analyzer" and words[words.index("--input-data") + 1] == str(one)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_inputs(text, tmp_path / "file", 1, 0, {}, 8, 4)


def test_the_option_of_the_command(tmp_path: Path) -> None:
    cli._register() if not cli.app.registered_commands else None
    arguments = ["bench", "--perf-analyzer", "--scenario", "text", "--requests", "3", "-o", str(tmp_path)]
    done = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert done.exit_code == 0 and list(json.loads(done.stdout.splitlines()[-1])) == ["text"]
    assert len(json.loads((tmp_path / "text.json").read_text())["data"]) == 3
