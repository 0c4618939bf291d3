"""`ming-trt serve`: the real Triton server on a model repository."""

from __future__ import annotations

import json as json_module
from pathlib import Path

import typer

EXAMPLES = (
    "Examples:  ming-trt serve repo   |   ming-trt serve repo --grpc-port 9001 --http-port 9000 --metrics-port 9002"
)


def command(
    repository: Path = typer.Argument(help="The repository that `ming-trt repo` made."),
    http_port: int = typer.Option(8000, help="Port of HTTP (health, metadata, generate)."),
    grpc_port: int = typer.Option(8001, help="Port of gRPC, which `ming-trt ask` uses."),
    metrics_port: int = typer.Option(8002, help="Port of the Prometheus metrics."),
    openai_port: int = typer.Option(0, help="Port of an OpenAI-compatible front; 0 = none."),
    host: str = typer.Option("127.0.0.1", help="Address to listen on; 0.0.0.0 = every network of this machine."),
    trace: bool = typer.Option(False, "--trace", help="Write Triton's trace of every request."),
    allow_ungated: bool = typer.Option(False, "--allow-ungated", help="Also if the numerics gate has not passed."),
    timeout: float = typer.Option(600.0, help="Seconds to wait for the models to load."),
    json: bool = typer.Option(False, "--json", help="Print the addresses as one JSON line when ready."),
) -> None:
    """Start the server, say when it is ready, and run until SIGTERM or Ctrl-C, which stop it cleanly.

    Exit code 0 after such a stop; 1 if it cannot start, or ends by itself.
    """
    from ming_trt.serving.foreground import serve
    from ming_trt.serving.launch import Ports, Server

    def progress(line: str) -> None:
        typer.echo(line, err=True)

    def ready(server: Server) -> None:
        addresses = {
            "grpc": server.grpc_url,
            "http": server.http_url,
            "metrics": server.metrics_url,
            "log": str(server.log_file),
            "pid": server.pid,
            "ready_s": round(server.ready_seconds, 3),
        }
        if json:
            typer.echo(json_module.dumps(addresses))
        else:
            typer.echo(f"ready after {server.ready_seconds:.1f} s")
            typer.echo(f'  gRPC     {server.grpc_url}    ming-trt ask --url {server.grpc_url} "Hello"')
            typer.echo(f"  HTTP     {server.http_url}")
            typer.echo(f"  metrics  {server.metrics_url}")
            if openai_port:
                typer.echo(f"  OpenAI   http://{host}:{openai_port}/v1")

    server = Server(
        repository, Ports(http_port, grpc_port, metrics_port), host, allow_ungated, trace, timeout, progress
    )
    serve(server, ready, openai_port)
