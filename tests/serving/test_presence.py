"""What a process notes of its requests: whose process died is found, the living and the ended are not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ming_trt.serving.stages.presence import Presence


def test_only_the_dead_are_lost(tmp_path: Path) -> None:
    presence = Presence(tmp_path / "board")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    presence.enter("mine", "llm")
    assert presence.lost("mine") == "" and presence.lost("unheard of") == ""
    presence._path("mine", "speech").symlink_to(f"{dead.pid} speech")
    assert presence.lost("mine") == "speech"
    presence.enter("mine", "speech")  # over the note of the dead process
    assert presence.lost("mine") == ""
    presence.leave("mine", "llm")
    presence.leave("mine", "speech")
    presence.leave("mine", "speech")
    assert not list((tmp_path / "board.present").iterdir())
