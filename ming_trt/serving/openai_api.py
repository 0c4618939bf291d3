"""Translates between OpenAI's chat-completions format and our own requests. No network here.

Covered: text, pictures and videos as data URLs, audio as base64, sampling, stop strings, streaming, usage. Not covered,
and refused rather than ignored: tools, several choices, log probabilities, response formats, and URLs that would make
the server fetch something.
"""

from __future__ import annotations

import base64
import binascii
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ming_trt.errors import InputError
from ming_trt.serving.graph import ENSEMBLE

_SAMPLING = {
    "max_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "stop": "stop",
    "seed": "seed",
    # Not OpenAI's, but what other servers call them.
    "top_k": "top_k",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
    "ignore_eos": "ignore_eos",
}
_OURS = ("thinking", "task", "dialect")
# Without effect on the answer.
_IGNORED = ("model", "user", "metadata", "store", "service_tier", "stream", "stream_options")
# Accepted where they say what we do anyway.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
_URL_PARTS = {"image_url": ("image", "images"), "video_url": ("video", "videos")}


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """What a client asked: `ask` are the arguments of `Client.ask`."""

    ask: dict[str, Any]
    model: str = ENSEMBLE
    stream: bool = False
    include_usage: bool = False


@dataclass(slots=True)
class _Media:
    images: list[bytes] = field(default_factory=list)
    videos: list[bytes] = field(default_factory=list)
    audios: list[bytes] = field(default_factory=list)


def parse_chat(data: bytes) -> ChatRequest:
    """Reads the body of `POST /v1/chat/completions`. Raises `InputError`; what the stages check is left to them."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise InputError("the body is not JSON: send a chat-completions request") from None
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
        raise InputError("the body has no list 'messages': send a chat-completions request")
    given = {key: value for key, value in body.items() if value is not None and key != "messages"}
    media = _Media()
    messages = [_message(message, media) for message in body["messages"]]
    ask: dict[str, Any] = {"messages": messages, "sampling": {}}
    ask |= {"images": media.images, "videos": media.videos, "audios": media.audios}
    for key, value in given.items():
        if key in _SAMPLING:
            ask["sampling"][_SAMPLING[key]] = [value] if key == "stop" and isinstance(value, str) else value
        elif key in _OURS:
            ask[key] = value
        elif key in _NEUTRAL:
            if value not in _NEUTRAL[key]:
                raise InputError(f"'{key}' is {json.dumps(value)[:80]}, which this server cannot do: leave it out")
        elif key not in _IGNORED:
            raise InputError(f"'{key}' is not known to this server: leave it out")
    options = given.get("stream_options") or {}
    include_usage = isinstance(options, dict) and bool(options.get("include_usage"))
    return ChatRequest(ask, str(given.get("model", ENSEMBLE)), given.get("stream") is True, include_usage)


def completion(request: ChatRequest, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The whole answer at once; `summary` is `Answer.summary()`."""
    message = {"role": "assistant", "content": summary["text"]}
    choice = {"index": 0, "message": message, "finish_reason": summary["finish_reason"], "logprobs": None}
    return _envelope(request, summary["id"], "chat.completion", [choice]) | {"usage": _usage(summary["usage"])}


def chunks(request: ChatRequest, answer: Any) -> Iterator[dict[str, Any]]:
    """The answer in pieces; `answer` is an `Answer`, whose errors come through."""
    yield _chunk(request, answer.id, {"role": "assistant", "content": ""})
    for delta in answer:
        if delta.text:
            yield _chunk(request, answer.id, {"content": delta.text})
    yield _chunk(request, answer.id, {}, answer.finish_reason)
    if request.include_usage:
        yield _envelope(request, answer.id, "chat.completion.chunk", []) | {"usage": _usage(answer.usage)}


def models() -> dict[str, Any]:
    """The body of `GET /v1/models`."""
    return {"object": "list", "data": [{"id": ENSEMBLE, "object": "model", "created": 0, "owned_by": "ming-trt"}]}


def _chunk(request: ChatRequest, name: str, delta: Mapping[str, str], finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": dict(delta), "finish_reason": finish, "logprobs": None}
    return _envelope(request, name, "chat.completion.chunk", [choice])


def _envelope(request: ChatRequest, name: str, kind: str, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{name}",
        "object": kind,
        "created": int(time.time()),
        "model": request.model,
        "choices": list(choices),
    }


def _usage(usage: Mapping[str, Any]) -> dict[str, int]:
    prompt, answer = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _message(message: Any, media: _Media) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InputError("a message is not an object: give it 'role' and 'content'")
    role = "system" if message.get("role") == "developer" else message.get("role")
    content = message.get("content")
    if isinstance(content, list):
        content = [_part(part, media) for part in content]
    return {"role": role, "content": content}


def _part(part: Any, media: _Media) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return {"type": "text", "text": part.get("text")}
    if kind == "input_audio":
        audio = part.get(kind)
        media.audios.append(_decode(kind, audio.get("data") if isinstance(audio, dict) else None))
        return {"type": "audio"}
    if isinstance(kind, str) and kind in _URL_PARTS:
        ours, name = _URL_PARTS[kind]
        target = part.get(kind)
        url = target.get("url") if isinstance(target, dict) else target
        if not isinstance(url, str) or not url.startswith("data:") or ";base64," not in url[:200]:
            raise InputError(
                f"the url of '{kind}' is no base64 data URL: send the file itself, nothing is fetched here"
            )
        getattr(media, name).append(_decode(kind, url.partition(";base64,")[2]))
        return {"type": ours}
    known = ", ".join(("text", "input_audio", *_URL_PARTS))
    raise InputError(f"a part has the type {json.dumps(kind)[:80]}: choose one of {known}")


def _decode(kind: str, data: Any) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise InputError(f"the data of '{kind}' is not base64: encode the file's bytes") from None
