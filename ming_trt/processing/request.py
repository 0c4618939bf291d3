"""The request that a client sends: JSON in, checked and frozen dataclasses out.

Every fault is an `InputError` of one sentence that names the value, the limit and the remedy. Media files travel beside
the JSON (see docs/DESIGN.md, 4.2); the parts of type image, video and audio stand for them, in order.
"""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from ming_trt.errors import InputError
from ming_trt.processing.draw import DrawOptions, draw_options
from ming_trt.processing.fields import Check, boolean, choice, fields, integer, load_object, number, show, string
from ming_trt.processing.speak import SpeakOptions, speak_options

Role = Literal["system", "user", "assistant"]
MediaKind = Literal["image", "video", "audio"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
MEDIA: tuple[MediaKind, ...] = ("image", "video", "audio")
SAMPLE_RULES = ("sequence", "uniform", "random")
TASKS = ("asr",)
# Spoken varieties for which `prompt.ASR_PROMPTS` has an instruction.
DIALECTS = ("mandarin", "english", "cantonese", "sichuanese", "shanghainese", "minnan")

MAX_REQUEST_BYTES = 4 << 20
MAX_MESSAGES = 1024
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_ID_CHARACTERS = 128
MAX_LEASE_SECONDS = 86400
# More pixels than this per item cannot be asked for; the processors apply their own limits afterwards.
MAX_PIXELS_OPTION = 16384 * 28 * 28


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. The defaults are greedy decoding, as the reference does.

    temperature 0 means greedy (top_k, top_p and seed are then without effect); top_k 0 and top_p 1 mean no cut;
    repetition_penalty 1 and no_repeat_ngram_size 0 mean none, otherwise both count prompt and output.
    `stop` ends the answer before any of its strings; `ignore_eos` goes on past the end token up to `max_tokens`.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class TextPart:
    text: str
    type: Literal["text"] = "text"


@dataclass(frozen=True, slots=True)
class ImagePart:
    """One picture. The pixel limits, where given, bound the first resize pass (see `image.py`)."""

    min_pixels: int | None = None
    max_pixels: int | None = None
    type: Literal["image"] = "image"


@dataclass(frozen=True, slots=True)
class VideoPart:
    """One video; the meaning of every option stands in `video.py`."""

    sample: str = "uniform"
    nframes: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    type: Literal["video"] = "video"


@dataclass(frozen=True, slots=True)
class AudioPart:
    type: Literal["audio"] = "audio"


Part = TextPart | ImagePart | VideoPart | AudioPart


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return "".join(part.text for part in self.content if isinstance(part, TextPart))


@dataclass(frozen=True, slots=True)
class Request:
    """A checked request. `draw`: the answer is a picture, drawn so (then there is no text); `speak`: the answer is also
    spoken; `lease`: seconds without a renewal after which the request is cancelled; 0 = never."""

    messages: tuple[Message, ...]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    thinking: bool = False
    task: str | None = None
    dialect: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    draw: DrawOptions | None = None
    speak: SpeakOptions | None = None
    lease: float = 0.0

    def count(self, kind: MediaKind) -> int:
        """Number of parts of that kind in all messages."""
        return sum(part.type == kind for message in self.messages for part in message.content)

    def to_json(self) -> str:
        """JSON that `parse_request` reads back into an equal request."""
        return json.dumps(_drop_none(dataclasses.asdict(self)), ensure_ascii=False, separators=(",", ":"))


def parse_request(data: bytes | str | Mapping[str, Any]) -> Request:
    """Checks a request, given as JSON (UTF-8) or as a mapping. Raises `InputError`."""
    known = {
        "id": _identifier,
        "messages": _messages,
        "thinking": boolean,
        "task": choice(TASKS),
        "dialect": choice(DIALECTS),
        "sampling": _sampling,
        "draw": draw_options,
        "speak": speak_options,
        "lease": number(0.0, MAX_LEASE_SECONDS),
    }
    values = fields("the request", load_object(data, MAX_REQUEST_BYTES), known)
    if "messages" not in values:
        raise InputError("the request has no 'messages': send at least one message of role 'user'")
    request = Request(**values)
    _check_task(request)
    _check_speak(request)
    return request


def check_media(request: Request, images: int, videos: int, audios: int) -> None:
    """Compares the numbers of supplied files with the parts that the messages mention. Raises `InputError`."""
    for kind, given in zip(MEDIA, (images, videos, audios), strict=True):
        wanted = request.count(kind)
        if given != wanted:
            raise InputError(
                f"the messages mention {wanted} part(s) of type '{kind}' but {given} file(s) came in '{kind}s': "
                "send one file for each part, in the order of the parts"
            )


def _identifier(name: str, value: Any) -> str:
    text = string(name, value)
    if not 0 < len(text) <= MAX_ID_CHARACTERS or not text.isprintable():
        raise InputError(f"'{name}' is {show(value)}: give 1 to {MAX_ID_CHARACTERS} printable characters")
    return text


def _stop(name: str, value: Any) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or len(items) > MAX_STOP_STRINGS:
        raise InputError(f"'{name}' is {show(value)}: give a list of at most {MAX_STOP_STRINGS} strings")
    for item in items:
        if not 0 < len(string(name, item)) <= MAX_STOP_CHARACTERS:
            raise InputError(f"'{name}' holds {show(item)}: each string has 1 to {MAX_STOP_CHARACTERS} characters")
    return tuple(items)


_SAMPLING: dict[str, Check] = {
    "max_tokens": integer(1, 1 << 20),
    "temperature": number(0.0, 100.0),
    "top_k": integer(0, 1 << 20),
    "top_p": number(0.0, 1.0, above=True),
    "repetition_penalty": number(0.0, 100.0, above=True),
    "no_repeat_ngram_size": integer(0, 1 << 20),
    "stop": _stop,
    "seed": integer(0, (1 << 63) - 1),
    "ignore_eos": boolean,
}


def _sampling(name: str, value: Any) -> Sampling:
    return Sampling(**fields(f"'{name}'", value, _SAMPLING))


_pixels = integer(28 * 28, MAX_PIXELS_OPTION)
_frames = integer(2, 1 << 20)
_PARTS: dict[str, tuple[type[Any], dict[str, Check]]] = {
    "text": (TextPart, {"text": string}),
    "image": (ImagePart, {"min_pixels": _pixels, "max_pixels": _pixels}),
    "video": (
        VideoPart,
        {
            "sample": choice(SAMPLE_RULES),
            "nframes": _frames,
            "min_frames": _frames,
            "max_frames": _frames,
            "min_pixels": _pixels,
            "max_pixels": _pixels,
        },
    ),
    "audio": (AudioPart, {}),
}


def _part(name: str, value: Any) -> Part:
    if not isinstance(value, Mapping) or not isinstance(kind := value.get("type"), str) or kind not in _PARTS:
        raise InputError(f"{name} is {show(value)}: give an object whose 'type' is one of {', '.join(_PARTS)}")
    made, known = _PARTS[kind]
    options = fields(name, {key: item for key, item in value.items() if key != "type"}, known)
    if made is TextPart and "text" not in options:
        raise InputError(f"{name} has the type 'text' but no 'text': add it, or leave the part out")
    low, high = options.get("min_pixels"), options.get("max_pixels")
    if low is not None and high is not None and low > high:
        raise InputError(f"{name} asks for min_pixels {low} above max_pixels {high}: exchange them")
    part: Part = made(**options)
    return part


def _content(name: str, value: Any) -> tuple[Part, ...]:
    if isinstance(value, str):
        return (TextPart(string(name, value)),)
    if not isinstance(value, list | tuple):
        raise InputError(f"{name} is {show(value)}: give a string or a list of parts")
    return tuple(_part(f"part {i} of {name}", item) for i, item in enumerate(value, 1))


def _messages(name: str, value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list | tuple) or not 0 < len(value) <= MAX_MESSAGES:
        raise InputError(f"'{name}' is {show(value)}: give a list of 1 to {MAX_MESSAGES} messages")
    result: list[Message] = []
    for i, item in enumerate(value, 1):
        where = f"message {i}"
        checked = fields(where, item, {"role": choice(cast("tuple[str, ...]", ROLES)), "content": lambda _, v: v})
        if "role" not in checked or "content" not in checked:
            raise InputError(f"{where} lacks 'role' or 'content': give both")
        message = Message(checked["role"], _content(f"the content of {where}", checked["content"]))
        _check_turn(where, message, result[-1].role if result else None)
        result.append(message)
    if result[-1].role != "user":
        raise InputError(f"the last message has the role '{result[-1].role}': end with a message of role 'user'")
    return tuple(result)


def _check_turn(where: str, message: Message, previous: Role | None) -> None:
    """An optional system message first, then user and assistant in turn; nobody says nothing."""
    allowed: tuple[Role, ...] = {
        None: ("system", "user"),
        "system": ("user",),
        "user": ("assistant",),
        "assistant": ("user",),
    }[previous]
    if message.role not in allowed:
        before = f"after one of role '{previous}'" if previous else "at the beginning"
        raise InputError(
            f"{where} has the role '{message.role}' {before}: only '{' or '.join(allowed)}' can stand there"
        )
    media = [part.type for part in message.content if not isinstance(part, TextPart)]
    if media and message.role != "user":
        raise InputError(
            f"{where} of role '{message.role}' holds a part of type '{media[0]}': only 'user' may hold media"
        )
    if not media and not message.text.strip():
        raise InputError(f"{where} of role '{message.role}' is empty: give it text or media")


def _check_task(request: Request) -> None:
    if request.draw is not None and (request.thinking or request.task is not None):
        other = "thinking" if request.thinking else "task"
        raise InputError(f"'draw' comes together with '{other}': a picture has no text, leave '{other}' out")
    if request.dialect is not None and request.task != "asr":
        raise InputError(f"'dialect' is '{request.dialect}' but 'task' is not 'asr': set the task or drop the dialect")
    if request.task != "asr":
        return
    if request.thinking:
        raise InputError("'task' is 'asr' together with 'thinking': a transcript has no reasoning, set it to false")
    last = request.messages[-1]
    if last.text.strip() or not any(isinstance(part, AudioPart) for part in last.content):
        raise InputError(
            "'task' is 'asr', which brings its own instruction: send audio and no text in the last message, "
            "or drop 'task' to use words of your own"
        )


def _check_speak(request: Request) -> None:
    if request.speak is None:
        return
    if request.draw is not None:
        raise InputError("'speak' comes together with 'draw': a picture has no text to speak, leave one of them out")
    if request.speak.voice and request.speak.voice_text:
        raise InputError("'voice' names a preset and 'voice_text' belongs to a reference clip: leave one of them out")
    if request.speak.ahead and not request.lease:
        raise InputError(
            "'ahead' lets the sound wait for its client, so a client that is gone must be noticed: set 'lease'"
        )
    if request.speak.read and (request.task is not None or request.thinking):
        other = "thinking" if request.thinking else "task"
        raise InputError(f"'speak' says to read the text itself, so '{other}' has no meaning: leave '{other}' out")
    if request.speak.read and any(request.count(kind) for kind in MEDIA):
        raise InputError("'speak' says to read the text itself, and there are media: leave out the media, or 'read'")


def _drop_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _drop_none(item) for key, item in value.items() if item is not None}
    return [_drop_none(item) for item in value] if isinstance(value, list | tuple) else value
