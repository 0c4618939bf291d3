"""What a benchmark asks: one scenario per modality, with questions that follow from the seed alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ming_trt.bench.media import Medium
from ming_trt.errors import InputError

_SUBJECTS = ("a kite", "the tide", "a lighthouse", "copper", "the number seven", "a bicycle", "rain", "an old map")
_QUESTIONS = (
    "Name three uses of {}.",
    "Explain {} to a child in one paragraph.",
    "What would surprise a visitor from 1800 about {}?",
    "Write a short story that begins with {}.",
    "Which questions would you ask an expert on {}?",
)
_LONG = 400  # words of the long prompt


@dataclass(frozen=True, slots=True)
class Scenario:
    """`kind`: the medium that goes with the question ("" = none); `needs`: the server's input that carries it; `gives`:
    its output that carries the answer, if that is not text alone."""

    name: str
    title: str
    kind: str = ""
    needs: str = ""
    question: str = ""
    words: int = 0
    gives: str = ""

    def request(
        self, number: int, seed: int, media: Mapping[str, Medium], max_tokens: int, steps: int = 0
    ) -> dict[str, Any]:
        """Arguments of `Client.ask` for request `number`: equal ones for equal seeds.

        The answer has `max_tokens` tokens exactly, whatever the model says, so that runs can be compared; a picture
        takes `steps` denoising steps (0: as many as the server likes).
        """
        rng = np.random.default_rng([seed, number])
        question = self.question or str(rng.choice(_QUESTIONS)).format(rng.choice(_SUBJECTS))
        if self.words:
            question = f"{_passage(rng, self.words)}\n\n{question}"
        elif self.question:
            # pictures stay, questions differ a little: nothing can be answered from a cache of prompts
            question = f"{question} ({rng.choice(_SUBJECTS)}?)"
        sampling = {"max_tokens": max_tokens, "temperature": 0, "seed": int(rng.integers(1 << 31)), "ignore_eos": True}
        arguments: dict[str, Any] = {"text": question, "sampling": sampling}
        if self.gives == "audio":
            arguments["speak"] = {}
        if self.gives == "image":
            arguments["draw"] = {"seed": int(rng.integers(1 << 31)), **({"steps": steps} if steps else {})}
        if self.kind:
            arguments[self.needs] = [media[self.kind].content]
        return arguments


SCENARIOS = (
    Scenario("text", "text question"),
    Scenario("long-text", f"question on {_LONG} words", words=_LONG),
    Scenario("image", "picture", "image", "images", "What is in this picture?"),
    Scenario("document", "page of text", "document", "images", "What is written on this page?"),
    Scenario("video", "video", "video", "videos", "What happens in this video?"),
    Scenario("audio", "recording", "audio", "audios", "What is said in this recording?"),
    Scenario("speech", "spoken answer", gives="audio"),
    Scenario("drawing", "picture from text", gives="image", question="Draw a red kite over a lake in the evening."),
    Scenario("edit", "edited picture", "image", "images", "Turn the evening into a morning.", gives="image"),
)


def chosen(names: Collection[str]) -> list[Scenario]:
    """The scenarios of those names, or all. Raises `InputError` for a name that is no scenario."""
    known = {scenario.name for scenario in SCENARIOS}
    unknown = sorted(set(names) - known)
    if unknown:
        raise InputError(f"there is no scenario '{unknown[0]}': choose among {', '.join(sorted(known))}")
    return [scenario for scenario in SCENARIOS if not names or scenario.name in names]


def choose(
    names: Collection[str], media: Mapping[str, Medium], inputs: Collection[str], outputs: Collection[str]
) -> tuple[list[Scenario], dict[str, str]]:
    """The scenarios that can run (`names`, or all), and why the others cannot.

    `inputs` and `outputs`: tensors of the server's ensemble. Raises `InputError` for a name that is no scenario.
    """
    can, skipped = list[Scenario](), dict[str, str]()
    for scenario in chosen(names):
        if scenario.gives and scenario.gives not in outputs:
            skipped[scenario.name] = f"the server has no output '{scenario.gives}'"
        elif scenario.needs and scenario.needs not in inputs:
            skipped[scenario.name] = f"the server takes no '{scenario.needs}'"
        elif scenario.kind and scenario.kind not in media:
            skipped[scenario.name] = f"no {scenario.kind} file is at hand: give --media with one"
        else:
            can.append(scenario)
    return can, skipped


def _passage(rng: np.random.Generator, words: int) -> str:
    """Prose of so many words, different for each request from its first word on."""
    sentences: list[str] = []
    count = 0
    while count < words:
        first, second = rng.choice(_SUBJECTS, 2, replace=False)
        sentence = f"On day {rng.integers(1, 1000)} we spoke of {first} and then of {second}, and took notes."
        sentences.append(sentence)
        count += len(sentence.split())
    return " ".join(sentences)
