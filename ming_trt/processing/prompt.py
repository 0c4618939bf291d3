"""The prompt format: conversations to spans of markup, words and media, and the strings of the reference.

`<role>HUMAN</role>` opens the prompt; an assistant turn is `<role>ASSISTANT</role>`, its text and `<role>HUMAN</role>`;
generation starts after a last `<role>ASSISTANT</role>`. Media stand where the conversation mentions them.

Two ways to tokens: `request_spans` (for `prepare.py`) keeps markup and the words of users apart, so that words never
become markup. `chat_prompt` and `expand_prompt` give the reference's strings, with its rule that a literal `<image>`,
`<video>` or `<audio>` in a message suppresses as many of the message's automatic markers.

Beyond the reference: several clips in one prompt, pictures and video together, and the instructions of
`DIALECT_PROMPTS`, which are ours: the model card names the dialects but no prompt for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ming_trt.errors import InputError
from ming_trt.processing.request import AudioPart, MediaKind, Message, Part, Request, TextPart

USER_TURN = "<role>HUMAN</role>"
ASSISTANT_TURN = "<role>ASSISTANT</role>"
END_OF_TEXT = "<|endoftext|>"

MARKERS: dict[MediaKind, str] = {"image": "<IMAGE>", "video": "<VIDEO>", "audio": "<AUDIO>"}
# Start, repeated and end token, and what follows.
WRAPPERS: dict[MediaKind, tuple[str, str, str, str]] = {
    "image": ("<image>", "<imagePatch>", "</image>", "\n"),
    "video": ("<video>", "<imagePatch>", "</video>", "\n"),
    "audio": ("<audio>", "<audioPatch>", "</audio>", ""),
}

THINKING_PROMPT = (
    "SYSTEM: You are a helpful assistant. When the user asks a question, your response must include two parts: first, "
    "the reasoning process enclosed in <thinking>...</thinking> tags, then the final answer enclosed in "
    "<answer>...</answer> tags. The critical answer or key result should be placed within \\boxed{}.\n"
)
SYSTEM_PREFIX = "SYSTEM: "
# The reference's instruction; the answer is the language, a tab and the transcript.
ASR_PROMPT = "Please recognize the language of this speech and transcribe it. Format: oral."
_SPOKEN = {
    "mandarin": "Mandarin Chinese",
    "english": "English",
    "cantonese": "Cantonese",
    "sichuanese": "the Sichuanese dialect of Chinese",
    "shanghainese": "the Shanghainese dialect of Chinese",
    "minnan": "the Minnan (Hokkien) dialect of Chinese",
}
# Not from the reference: a sentence of ours before the trained instruction, which stays as it is.
DIALECT_PROMPTS = {name: f"The speaker uses {spoken}. {ASR_PROMPT}" for name, spoken in _SPOKEN.items()}


@dataclass(frozen=True, slots=True)
class Words:
    """Text of a user or of the model: never read as markup."""

    text: str


@dataclass(frozen=True, slots=True)
class Markup:
    """Text of the prompt format; special tokens in it count."""

    text: str


@dataclass(frozen=True, slots=True)
class Media:
    """The `index`-th picture, video or clip of the request."""

    kind: MediaKind
    index: int


Span = Words | Markup | Media


def request_spans(request: Request, *, end_assistant_turns: bool = False) -> list[Span]:
    """The prompt of a request. A system message becomes the first words of the first user turn; `thinking` and the
    instruction of `task` stand in the last one (see `_instruct`). `end_assistant_turns` puts `<|endoftext|>` after each
    assistant text, as a later variant of the reference does.
    """
    messages = list(request.messages)
    system: list[Part] = []
    if messages[0].role == "system":
        system = [TextPart(SYSTEM_PREFIX + messages.pop(0).text)]
    messages[-1] = Message("user", tuple(_instruct(request, messages[-1].content)))
    messages[0] = Message("user", (*system, *messages[0].content))
    counts: dict[MediaKind, int] = {"image": 0, "video": 0, "audio": 0}
    spans: list[Span] = [Markup(USER_TURN)]
    for message in messages:
        if message.role == "assistant":
            ending = END_OF_TEXT if end_assistant_turns else ""
            spans += [Markup(ASSISTANT_TURN), Words(message.text), Markup(ending + USER_TURN)]
            continue
        for part in message.content:
            if isinstance(part, TextPart):
                spans.append(Words(part.text))
            else:
                spans.append(Media(part.type, counts[part.type]))
                counts[part.type] += 1
    return [*spans, Markup(ASSISTANT_TURN)]


def _instruct(request: Request, content: tuple[Part, ...]) -> list[Part]:
    """The last user turn with its instruction: the reasoning prompt before the first words, or at the end of a turn
    without words; the transcription prompt before the first clip."""
    parts = list(content)
    if request.task == "asr":
        text = ASR_PROMPT if request.dialect is None else DIALECT_PROMPTS[request.dialect]
        parts = [part for part in parts if not isinstance(part, TextPart)]
        parts.insert(next(i for i, part in enumerate(parts) if isinstance(part, AudioPart)), TextPart(text))
    if request.thinking:
        place = next((i for i, part in enumerate(parts) if isinstance(part, TextPart)), len(parts))
        parts.insert(place, TextPart(THINKING_PROMPT))
    return parts


def chat_prompt(
    conversation: Sequence[Mapping[str, Any]],
    *,
    system_template: str | None = None,
    add_generation_prompt: bool = True,
    end_assistant_turns: bool = False,
) -> str:
    """The reference's prompt string with `<IMAGE>`, `<VIDEO>`, `<AUDIO>` markers.

    `conversation` is in the reference's own form: roles HUMAN and ASSISTANT, contents a list of objects such as
    `{"type": "image", "image": path or list of paths}`. Raises `InputError`.
    """
    text = USER_TURN if system_template is None else system_template
    for message in conversation:
        role, content = message["role"], message["content"]
        if role not in ("HUMAN", "ASSISTANT"):
            raise InputError(f"the role is '{role}': it must be HUMAN or ASSISTANT")
        words = "".join(_markers_or_text(element, str(content)) for element in content)
        if role == "ASSISTANT":
            words = ASSISTANT_TURN + words + (END_OF_TEXT if end_assistant_turns else "") + USER_TURN
        text += words
    return text + (ASSISTANT_TURN if add_generation_prompt else "")


def _markers_or_text(element: Mapping[str, Any], message: str) -> str:
    kind = element["type"]
    if kind == "text":
        return str(element["text"])
    if kind not in MARKERS:
        raise InputError(f"a part has the type '{kind}': choose one of text, {', '.join(MARKERS)}")
    items = element[kind]
    number = len(items) if isinstance(items, list | tuple) and kind != "video" else 1
    literal = message.count(WRAPPERS[kind][0])
    if kind == "video" and literal > 1:
        raise InputError(f"the message has {literal} times the word <video>: at most one can stand for a video")
    return "\n".join([MARKERS[kind]] * (number - literal))


def expand_prompt(
    prompt: str,
    image_grids: Sequence[Sequence[int]] = (),
    video_grids: Sequence[Sequence[int]] = (),
    audio_lengths: Sequence[int] = (),
) -> str:
    """The string with every marker replaced by its tokens: t·h·w / 4 patches of a grid, or the tokens of a clip.

    A single clip without a marker goes to the very end, as in the reference. Raises `InputError` where the numbers of
    markers and media differ.
    """
    sizes: dict[MediaKind, list[int]] = {
        "image": [int(t) * int(h) * int(w) // 4 for t, h, w in image_grids],
        "video": [int(t) * int(h) * int(w) // 4 for t, h, w in video_grids],
        "audio": [int(length) for length in audio_lengths],
    }
    for kind, marker in MARKERS.items():
        found = prompt.count(marker)
        if kind == "audio" and found == 0 and len(sizes[kind]) == 1:
            prompt += _expansion(kind, sizes[kind][0]) + "\n"
        elif found != len(sizes[kind]):
            raise InputError(
                f"the prompt has {found} marker(s) {marker} but {len(sizes[kind])} item(s) of type '{kind}' were given"
            )
        else:
            pieces = prompt.split(marker)
            prompt = pieces[0] + "".join(
                _expansion(kind, size) + piece for size, piece in zip(sizes[kind], pieces[1:], strict=True)
            )
    return prompt


def _expansion(kind: MediaKind, size: int) -> str:
    start, patch, end, after = WRAPPERS[kind]
    return start + patch * size + end + after
