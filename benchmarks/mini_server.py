"""The mini checkpoint's bundle, and a server on it: what the serving benchmarks run on."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

from harness import CACHE

from builders.build import Options, build
from ming_trt import presets
from ming_trt.mini import write_mini
from ming_trt.serving.assemble import assemble
from ming_trt.serving.launch import Ports, Server

_ENGINES = ("vision_encoder", "audio_encoder", "llm")


def mini_bundle() -> Path:
    """Builds it unless it is there and up to date."""
    folder = CACHE / "mini"
    write_mini(folder / "checkpoint")
    if not build(Options(folder / "checkpoint", folder / "bundle", presets.load("mini-cpu"), _ENGINES)).ok:
        raise SystemExit("the mini checkpoint could not be built: its messages stand above")
    return folder / "bundle"


def server_on(bundle: Path) -> Server:
    """A server on free ports, not started yet."""
    repository = bundle.parent / f"{bundle.name}-repo"
    assemble(bundle, repository)
    return Server(repository, _free_ports(), progress=lambda line: print(line, file=sys.stderr))


def _free_ports() -> Ports:
    probes = [socket.socket() for _ in range(3)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return Ports(*(probe.getsockname()[1] for probe in probes))
    finally:
        for probe in probes:
            probe.close()
