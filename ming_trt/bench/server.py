"""The server under test, as its own interfaces show it: what it offers, how it is configured, what it has counted."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from ming_trt.errors import ServeError
from ming_trt.serving.graph import ENSEMBLE

_TIMEOUT_S = 10.0
PARTS = ("queue", "compute_input", "compute_infer", "compute_output")


@dataclass(frozen=True, slots=True)
class ModelCount:
    """What Triton has counted for one model: requests that succeeded and failed, and seconds in all by part.

    `total`: from arrival to the last response of successful requests.
    """

    succeeded: int = 0
    failed: int = 0
    total: float = 0.0
    parts: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    def since(self, before: ModelCount) -> ModelCount:
        """What came after `before`."""
        return ModelCount(
            self.succeeded - before.succeeded,
            self.failed - before.failed,
            self.total - before.total,
            {part: self.parts[part] - before.parts[part] for part in PARTS},
        )


class ServerView:
    """The control side of a server at a gRPC address. All methods raise `ServeError` if it does not answer."""

    def __init__(self, url: str) -> None:
        self.url = url.removeprefix("grpc://")
        self._channel = grpc.insecure_channel(self.url)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def __enter__(self) -> ServerView:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def counts(self) -> dict[str, ModelCount]:
        """Triton's statistics by model. Versions of one model are added up."""
        found: dict[str, ModelCount] = {}
        for model in self._call("ModelStatistics", pb.ModelStatisticsRequest()).model_stats:
            stats, old = model.inference_stats, found.get(model.name, ModelCount())
            found[model.name] = ModelCount(
                old.succeeded + stats.success.count,
                old.failed + stats.fail.count,
                old.total + stats.success.ns / 1e9,
                {part: old.parts[part] + getattr(stats, part).ns / 1e9 for part in PARTS},
            )
        return found

    def inputs(self) -> frozenset[str]:
        """Names of the ensemble's inputs: which media it takes."""
        metadata = self._call("ModelMetadata", pb.ModelMetadataRequest(name=ENSEMBLE))
        return frozenset(tensor.name for tensor in metadata.inputs)

    def describe(self) -> dict[str, Any]:
        """Version of the server, and of each model: its backend, a digest of its configuration, its parameters."""
        server = self._call("ServerMetadata", pb.ServerMetadataRequest())
        models = {}
        for name in sorted(self.counts()):
            config = self._call("ModelConfig", pb.ModelConfigRequest(name=name)).config
            text = config.SerializeToString(deterministic=True)
            models[name] = {
                "backend": config.backend or config.platform,
                "instances": sum(group.count for group in config.instance_group),
                "config_sha256": hashlib.sha256(text).hexdigest(),
                "parameters": {key: value.string_value for key, value in sorted(config.parameters.items())},
            }
        return {"name": server.name, "version": server.version, "url": self.url, "models": models}

    def trace_settings(self, **change: str) -> dict[str, str]:
        """Triton's settings of tracing, after `change` (setting -> value) if any is given."""
        request = pb.TraceSettingRequest()
        for name, value in change.items():
            request.settings[name].value.append(value)
        settings = self._call("TraceSetting", request).settings
        return {name: ",".join(setting.value) for name, setting in settings.items()}

    def _call(self, method: str, request: Any) -> Any:
        try:
            return getattr(self._stub, method)(request, timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAVAILABLE:
                raise ServeError(
                    f"no server answers at {self.url}: start one with `ming-trt serve REPO`, or give --url"
                ) from None
            raise ServeError(f"{method} of the server at {self.url} failed: {error.details()}") from None
