"""The whole product on this machine, without a GPU: `make demo`.

Runs the same commands that a user would type, prints each of them, asks one question per modality, has a picture drawn
and a sentence spoken, and prints a latency table. Everything it makes lies in `.demo/`; a second run rebuilds only what
changed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ming_trt.errors import MingError
from ming_trt.mini import write_mini
from ming_trt.processing.prompt import ASR_PROMPT
from ming_trt.serving.answer import Answer
from ming_trt.serving.client import Client
from ming_trt.serving.launch import Ports

HERE = Path(__file__).resolve().parent
WORK = HERE.parent / ".demo"
READY_S = 120.0
SAMPLING = {"max_tokens": 24}

QUESTIONS: tuple[tuple[str, dict[str, object]], ...] = (
    ("text", {"text": "Name three uses of a kite."}),
    ("image", {"text": "What is in this picture?", "images": [HERE / "scene.jpg"]}),
    (
        "video",
        {
            "text": "What happens in this video?",
            "videos": [HERE / "clip.mp4"],
            "video_options": {"max_frames": 16},
        },
    ),
    ("audio", {"text": ASR_PROMPT, "audios": [HERE / "speech.wav"]}),
)

console = Console(markup=False, highlight=False, soft_wrap=True)


def run(*arguments: str) -> None:
    """Runs one `ming-trt` command and shows it; leaves with its exit code if it fails."""
    console.print(f"\n$ ming-trt {' '.join(arguments)}", style="bold")
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "ming_trt", *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)
    console.print(f"  ({time.perf_counter() - started:.1f} s)", style="dim")


def is_current(folder: Path) -> bool:
    """Whether the very checkpoint that `ming-trt mini` writes is there."""
    try:
        return not write_mini(folder)
    except MingError:
        return False


@contextmanager
def server(repository: Path) -> Iterator[str]:
    """Starts `ming-trt serve`, gives the gRPC address once it is ready, and stops it."""
    ports = Ports.free()
    arguments = [
        "serve",
        str(repository),
        "--http-port",
        str(ports.http),
        "--grpc-port",
        str(ports.grpc),
        "--metrics-port",
        str(ports.metrics),
    ]
    console.print(f"\n$ ming-trt {' '.join(arguments)} &", style="bold")
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "ming_trt", *arguments])
    url = f"localhost:{ports.grpc}"
    try:
        with Client(url) as client:
            while not client.ready(1.0):
                if process.poll() is not None:
                    sys.exit(process.returncode or 1)
                if time.perf_counter() - started > READY_S:
                    sys.exit(f"the server was not ready after {READY_S:.0f} s: its messages stand above")
                time.sleep(0.1)
        console.print(f"  ready after {time.perf_counter() - started:.1f} s", style="dim")
        yield url
    finally:
        process.terminate()
        process.wait()


def ask(client: Client, modality: str, question: dict[str, object]) -> Answer:
    """Asks one question and prints the answer as it streams."""
    files = [str(f.relative_to(HERE.parent)) for key in ("images", "videos", "audios") for f in question.get(key, ())]  # type: ignore[attr-defined]
    console.print(f"\n[{modality}] {question['text']} {' '.join(files)}", style="bold")
    answer = client.ask(**question, sampling=SAMPLING)  # type: ignore[arg-type]
    for delta in answer:
        print(delta.text, end="", flush=True)
    print()
    return answer


def main() -> None:
    if (WORK / "mini").exists() and not is_current(WORK / "mini"):
        shutil.rmtree(WORK / "mini", ignore_errors=True)  # of an earlier version of this demo
    run("mini", str(WORK / "mini"))
    run("build", str(WORK / "mini"), "-o", str(WORK / "bundle"), "--preset", "mini-cpu")
    run("repo", str(WORK / "bundle"), "-o", str(WORK / "repo"))
    console.print(
        "\nThe mini checkpoint's weights are random: the answers show that every part runs, not what the model knows."
    )
    table = Table(
        "modality", "prompt tokens", "answer tokens", "first token, ms", "whole answer, ms", "tokens/s", box=None
    )
    with server(WORK / "repo") as url, Client(url) as client:
        for modality, question in QUESTIONS:
            ask(client, modality, question)
        picture, speech = str(WORK / "kite.png"), str(WORK / "answer.wav")
        run("ask", "a red kite over the sea", "--draw", picture, "--steps", "4", "--url", url)
        run("ask", "We are going to space!", "--read", "--speak", speech, "--url", url)
        for modality, question in QUESTIONS:
            answer = client.ask(**question, sampling=SAMPLING)  # type: ignore[arg-type]
            answer.read_all()
            summary = answer.summary()
            usage, rate = summary["usage"], summary["tokens_per_s"]
            table.add_row(
                modality, str(usage["prompt_tokens"]), str(usage["completion_tokens"]),
                f"{1000 * (summary['first_token_s'] or summary['seconds']):.0f}", f"{1000 * summary['seconds']:.0f}",
                f"{rate:.0f}" if rate else "-",
            )  # fmt: skip
    console.print("\nLatency on this machine, second request of each kind, one at a time:")
    console.print(table)
    console.print("\nAsk it yourself:  .venv/bin/ming-trt serve .demo/repo   and then   .venv/bin/ming-trt ask 'Hello'")


if __name__ == "__main__":
    try:
        main()
    except MingError as error:
        sys.exit(f"error: {error}")
