"""The build graph: outcomes, keys, publication, and what survives a crash."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builders.digests import DigestCache
from builders.steps import Context, Graph, Outcome, Step, digest
from builders.workspace import JOURNAL, Workspace
from ming_trt.errors import BuildError

TOY = Path(__file__).with_name("toy.py")
sys.path.insert(0, str(TOY.parent))
import toy  # noqa: E402 - a script beside this file, which other tests run as a process


def contents(folder: Path) -> dict[str, bytes]:
    """Every published file; the journal, lock and cache are the builder's own."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.relative_to(folder).parts[0].startswith(".")
    }


def outcomes(run: Any) -> dict[str, str]:
    return {name: str(result.outcome) for name, result in run.results.items()}


def spawn(folder: Path, death: int, source: str = "one") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOY), str(folder), str(death), source], capture_output=True, text=True)


def test_builds_once_then_nothing(tmp_path: Path) -> None:
    assert set(outcomes(toy.build(tmp_path / "b", "one")).values()) == {"OK"}
    before = (tmp_path / "b" / JOURNAL).read_bytes()
    assert set(outcomes(toy.build(tmp_path / "b", "one")).values()) == {"NOOP"}
    assert (tmp_path / "b" / JOURNAL).read_bytes() == before


def test_change_rebuilds_dependants_only(tmp_path: Path) -> None:
    toy.build(tmp_path / "b", "one")
    assert outcomes(toy.build(tmp_path / "b", "two")) == {"a": "OK", "b": "OK", "c": "NOOP", "check": "OK"}
    toy.build(tmp_path / "fresh", "two")
    assert contents(tmp_path / "b") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("harm", ["flip", "remove", "add"])
def test_damage_is_found_and_repaired(tmp_path: Path, harm: str) -> None:
    toy.build(tmp_path / "b", "one")
    good = contents(tmp_path / "b")
    victim = tmp_path / "b" / "b" / "deep" / "b.bin"
    if harm == "flip":
        data = bytearray(victim.read_bytes())
        data[7] ^= 1
        victim.write_bytes(data)
    elif harm == "remove":
        victim.unlink()
    else:
        victim.with_name("extra").write_text("x")
    # the repaired content is equal, so what was made from it stays
    assert outcomes(toy.build(tmp_path / "b", "one")) == {"a": "NOOP", "b": "OK", "c": "NOOP", "check": "NOOP"}
    assert contents(tmp_path / "b") == good


@pytest.mark.parametrize("before", ["", "zero"])
def test_kill_at_every_change_then_continue(tmp_path: Path, before: str) -> None:
    """Dies at each hook call in turn, of a first build and of a rebuild; the next run ends byte-identical."""
    reference = tmp_path / "reference"
    toy.build(reference, "one")
    expected = contents(reference)
    old: dict[str, bytes] = {}
    if before:
        toy.build(tmp_path / "count", before)
        old = contents(tmp_path / "count")
    points = int(spawn(tmp_path / "count", 0).stdout)
    assert points > 20
    for death in range(1, points + 1):
        folder = tmp_path / f"at{death}"
        if before:
            toy.build(folder, before)
        assert spawn(folder, death).returncode == 137
        # A manifest is there only while everything it names is: all of the old build, or all of the new one.
        if (folder / "manifest.json").exists():
            assert contents(folder) in (old, expected)
        run = toy.build(folder, "one")
        assert run.failure is None
        assert contents(folder) == expected, f"killed at point {death}"
        assert not (folder / ".work").exists() or not list((folder / ".work").iterdir())
        assert set(outcomes(toy.build(folder, "one")).values()) == {"NOOP"}


def test_kill_during_recovery(tmp_path: Path) -> None:
    """A second death while the next builder recovers is survived too."""
    toy.build(tmp_path / "reference", "one")
    expected = contents(tmp_path / "reference")
    toy.build(tmp_path / "count", "zero")
    points = int(spawn(tmp_path / "count", 0).stdout)
    for first in range(1, points + 1):
        folder = tmp_path / f"at{first}"
        toy.build(folder, "zero")
        assert spawn(folder, first).returncode == 137
        for second in (1, 2):
            spawn(folder, second)
        toy.build(folder, "one")
        assert contents(folder) == expected


def test_torn_journal_at_every_byte(tmp_path: Path) -> None:
    toy.build(tmp_path / "b", "one")
    expected = contents(tmp_path / "b")
    journal = (tmp_path / "b" / JOURNAL).read_bytes()
    for size in range(0, len(journal), 41):
        (tmp_path / "b" / JOURNAL).write_bytes(journal[:size])
        assert toy.build(tmp_path / "b", "one").failure is None
        assert contents(tmp_path / "b") == expected


def test_damaged_journal_is_one_sentence(tmp_path: Path) -> None:
    toy.build(tmp_path / "b", "one")
    journal = tmp_path / "b" / JOURNAL
    journal.write_text("not json\n" + journal.read_text())
    with pytest.raises(BuildError, match=r"line 1 of .* is damaged"):
        toy.build(tmp_path / "b", "one")


def test_second_builder_is_refused(tmp_path: Path) -> None:
    with Workspace(tmp_path / "b"), pytest.raises(BuildError, match=f"is being built by process {os.getpid()}"):
        toy.build(tmp_path / "b", "one")
    toy.build(tmp_path / "b", "one")


def test_second_process_is_refused(tmp_path: Path) -> None:
    with Workspace(tmp_path / "b"):
        result = spawn(tmp_path / "b", 0)
    assert result.returncode == 1 and "is being built by process" in result.stderr


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(BuildError, match="holds no bundle"):
        toy.build(tmp_path, "one")
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_output_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(BuildError, match="is a file"):
            toy.build(target, "one")


def limited(limit: int) -> Any:
    def set_limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return set_limit


@pytest.mark.parametrize("limit", [0, 100, 1000, 3000, 8000])
def test_file_size_limit(tmp_path: Path, limit: int) -> None:
    """Writes beyond RLIMIT_FSIZE fail somewhere in the build: one sentence, and a later build succeeds."""
    command = [sys.executable, "-B", str(TOY), str(tmp_path / "b"), "0"]
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited(limit))
    assert result.returncode == 1
    assert "BuildError" in result.stderr and "size limit" in result.stderr
    assert not (tmp_path / "b" / "manifest.json").exists()
    toy.build(tmp_path / "b", "one")
    toy.build(tmp_path / "fresh", "one")
    assert contents(tmp_path / "b") == contents(tmp_path / "fresh")


def test_disk_full_keeps_the_old_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.build(tmp_path / "b", "one")
    before = contents(tmp_path / "b")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BuildError, match="the disk is full"):
        toy.build(tmp_path / "b", "two")
    monkeypatch.undo()
    assert contents(tmp_path / "b") == before
    toy.build(tmp_path / "b", "two")


def _fail(_: Context) -> Mapping[str, Any]:
    raise ValueError("bad\nnumber 7")


def _nothing(_: Context) -> Mapping[str, Any]:
    return {}


def test_failure_stops_and_names_the_step(tmp_path: Path) -> None:
    graph = Graph([Step("x", "1", _nothing), Step("y", "1", _fail, ("x",)), Step("z", "1", _nothing, ("y",))])
    with Workspace(tmp_path / "b") as space:
        run = graph.run(space)
    assert outcomes(run) == {"x": "OK", "y": "FAIL", "z": "SKIPPED"}
    assert str(run.failure).startswith("build step y failed (ValueError: bad number 7)")
    assert run.results["z"].reason == "not reached, since y failed"
    assert not list((tmp_path / "b" / ".work").iterdir())


def test_interrupt_leaves_no_work_and_is_passed_on(tmp_path: Path) -> None:
    def interrupted(context: Context) -> Mapping[str, Any]:
        (context.work / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Workspace(tmp_path / "b") as space:
        Graph([Step("x", "1", interrupted, output="x")]).run(space)
    assert not list((tmp_path / "b" / ".work").iterdir())
    toy.build(tmp_path / "b", "one")


def test_interrupt_while_the_work_begins_leaves_none(tmp_path: Path) -> None:
    def interrupt(event: str) -> None:
        if event.startswith("work:"):
            assert list((tmp_path / "b" / ".work").iterdir())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy.build(tmp_path / "b", "one", interrupt)
    assert not list((tmp_path / "b" / ".work").iterdir())


def test_skipped_needs_are_passed_on(tmp_path: Path) -> None:
    graph = Graph([Step("x", "1", _nothing, skip="no weights"), Step("y", "1", _nothing, ("x",))])
    with Workspace(tmp_path / "b") as space:
        run = graph.run(space)
    assert run.results["y"].reason == "needs x, which was skipped: no weights"


def test_only_takes_needs_along(tmp_path: Path) -> None:
    graph = toy.toy_graph("one")
    with Workspace(tmp_path / "b") as space:
        assert outcomes(graph.run(space, only=["b"])) == {"a": "OK", "b": "OK", "c": "SKIPPED", "check": "SKIPPED"}
        assert outcomes(graph.run(space)) == {"a": "NOOP", "b": "NOOP", "c": "OK", "check": "OK"}
    changed = toy.toy_graph("two")
    with Workspace(tmp_path / "b") as space:
        run = changed.run(space, only=["c"])
    assert run.results["c"].outcome is Outcome.NOOP
    assert run.results["a"].reason == "not selected, and what is there was made from other inputs"


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([Step("x", "1", _nothing), Step("x", "2", _nothing)], "two build steps are named 'x'"),
        ([Step("x", "1", _nothing, ("q",))], "needs 'q', which does not exist"),
        ([Step("x", "1", _nothing, ("y",)), Step("y", "1", _nothing, ("x",))], "in a circle"),
    ],
)
def test_bad_graphs(steps: list[Step], message: str) -> None:
    with pytest.raises(BuildError, match=message):
        Graph(steps)


@st.composite
def edited_graphs(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], set[int]]:
    """Needs of each step (on earlier ones only) and the set of steps whose own inputs change."""
    count = draw(st.integers(1, 7))
    needs = [tuple(sorted(draw(st.sets(st.integers(0, i - 1), max_size=3)))) if i else () for i in range(count)]
    return needs, draw(st.sets(st.integers(0, count - 1)))


@given(edited_graphs())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_edits_rebuild_exactly_what_depends_on_them(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[list[tuple[int, ...]], set[int]]
) -> None:
    needs, edited = case
    folder = tmp_path_factory.mktemp("dag") / "b"

    def graph(version: Mapping[int, int]) -> Graph:
        def make(i: int) -> Step:
            def run(context: Context) -> Mapping[str, Any]:
                parts = [(context.inputs[f"s{n}"] / "out").read_text() for n in needs[i]]
                (context.work / "out").write_text(digest([i, version[i], parts]))
                return {}

            return Step(f"s{i}", str(version[i]), run, tuple(f"s{n}" for n in needs[i]), output=f"s{i}")

        return Graph(make(i) for i in range(len(needs)))

    affected = set(edited)
    for i, above in enumerate(needs):
        if affected & set(above):
            affected.add(i)
    old = dict.fromkeys(range(len(needs)), 0)
    new = {i: int(i in edited) for i in range(len(needs))}
    with Workspace(folder) as space:
        graph(old).run(space)
    with Workspace(folder) as space:
        run = graph(new).run(space)
    assert {int(name[1:]) for name, r in run.results.items() if r.outcome is Outcome.OK} == affected
    with Workspace(folder.with_name("fresh")) as space:
        graph(new).run(space)
    assert contents(folder) == contents(folder.with_name("fresh"))


@pytest.mark.parametrize("years", [-30, 30])
def test_clock_that_jumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, years: int) -> None:
    """Keys are of contents: neither a clock set back nor one set ahead makes work, or hides a change."""
    toy.build(tmp_path / "b", "one")
    before, before_ns, jump = time.time, time.time_ns, years * 31_557_600
    monkeypatch.setattr(time, "time", lambda: before() + jump)
    monkeypatch.setattr(time, "time_ns", lambda: before_ns() + jump * 10**9)
    assert set(outcomes(toy.build(tmp_path / "b", "one")).values()) == {"NOOP"}
    assert outcomes(toy.build(tmp_path / "b", "two")) == {"a": "OK", "b": "OK", "c": "NOOP", "check": "OK"}
    for path in (tmp_path / "b").rglob("*"):
        os.utime(path, (before() + jump, before() + jump))
    monkeypatch.undo()
    assert set(outcomes(toy.build(tmp_path / "b", "two")).values()) == {"NOOP"}
    toy.build(tmp_path / "fresh", "two")
    assert contents(tmp_path / "b") == contents(tmp_path / "fresh")


def test_output_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # read-only for everybody, also for root
    with pytest.raises(BuildError, match="cannot write '/proc/ming-trt'") as caught:
        toy.build(Path("/proc/ming-trt"), "one")
    assert "\n" not in str(caught.value)

    # a bundle whose file system was mounted read-only meanwhile
    toy.build(tmp_path / "b", "one")
    before = contents(tmp_path / "b")

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("rename", "mkdir", "unlink"):
        monkeypatch.setattr(Path, name, read_only)
    with pytest.raises(BuildError, match=r"[Rr]ead-only") as caught:
        toy.build(tmp_path / "b", "two")
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert contents(tmp_path / "b") == before


def test_digest_cache_reads_once_and_sees_changes(tmp_path: Path) -> None:
    folder = tmp_path / "before"
    folder.mkdir()
    (folder / "f").write_bytes(b"abcdef")
    os.utime(folder / "f", ns=(1, 1))
    time.sleep(0.1)  # a file that changed just now is not remembered
    cache = DigestCache(tmp_path / "cache")
    first = cache.of_file(folder / "f")
    cache.save()
    file = folder.rename(tmp_path / "after") / "f"
    again = DigestCache(tmp_path / "cache")
    assert again.of_file(file) == first and again.bytes_read == 0
    file.write_bytes(b"abcxef")
    os.utime(file, ns=(1, 1))  # same size, same modification time
    assert again.of_file(file) != first


def test_digest_cache_distrusts_the_future(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"abc")
    os.utime(file, ns=(2**62, 2**62))
    cache = DigestCache(tmp_path / "cache")
    for _ in range(2):
        cache.of_file(file)
    assert cache.bytes_read == 6


def test_damaged_digest_cache_costs_time_only(tmp_path: Path) -> None:
    toy.build(tmp_path / "b", "one")
    for text in ("", "[]", "{1"):
        (tmp_path / "b" / ".cache").mkdir(exist_ok=True)
        (tmp_path / "b" / ".cache" / "files.json").write_text(text)
        assert set(outcomes(toy.build(tmp_path / "b", "one")).values()) == {"NOOP"}
