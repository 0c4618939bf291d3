import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ming_trt.errors import InputError
from ming_trt.processing.request import (
    MAX_REQUEST_BYTES,
    AudioPart,
    ImagePart,
    Request,
    Sampling,
    TextPart,
    VideoPart,
    check_media,
    parse_request,
)


def user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


def test_the_smallest_request_is_greedy_with_the_defaults() -> None:
    request = parse_request(b'{"messages": [{"role": "user", "content": "Hi"}]}')
    assert request.messages[0].content == (TextPart("Hi"),)
    assert request.sampling == Sampling()
    assert (request.sampling.max_tokens, request.sampling.temperature) == (512, 0.0)
    assert len(request.id) == 32


def test_every_field_is_read_and_written_back() -> None:
    data = {
        "id": "a-1",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image", "max_pixels": 78400}, {"type": "text", "text": "Was?"}]},
            {"role": "assistant", "content": "Ein Bild."},
            {"role": "user", "content": [{"type": "video", "max_frames": 8, "sample": "random"}, {"type": "audio"}]},
        ],
        "thinking": True,
        "sampling": {"max_tokens": 9, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "repetition_penalty": 1.1}
        | {"no_repeat_ngram_size": 10, "stop": ["\n\n"], "seed": 7, "ignore_eos": True},
        "lease": 2.5,
    }
    request = parse_request(data)
    assert request.messages[1].content == (ImagePart(max_pixels=78400), TextPart("Was?"))
    assert request.messages[3].content == (VideoPart("random", max_frames=8), AudioPart())
    assert request.sampling == Sampling(9, 0.5, 3, 0.9, 1.1, 10, ("\n\n",), 7, True)
    assert [request.count(kind) for kind in ("image", "video", "audio")] == [1, 1, 1]
    assert parse_request(request.to_json()) == request


def test_null_counts_as_absent() -> None:
    data = user("Hi") | {"task": None, "dialect": None, "sampling": {"seed": None}, "id": "x"}
    assert parse_request(data) == parse_request(user("Hi") | {"id": "x"})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not JSON"),
        (b"\xff{}", "not UTF-8"),
        (b"[]", "JSON array"),
        (b"{}", "no 'messages'"),
        (b"[" * 100000, "not JSON"),
        (b'{"messages": 1e999999}', "messages"),
        (b'{"lease": NaN}', "NaN"),
        (b'{"id": "a", "id": "b"}', "same key twice"),
        (b" " * (MAX_REQUEST_BYTES + 1), str(MAX_REQUEST_BYTES)),
        ({"messages": []}, "1 to 1024"),
        ({"messages": "Hi"}, "'messages'"),
        ({"messages": [{"role": "user"}]}, "lacks"),
        ({"messages": [{"role": "tool", "content": "x"}]}, '"tool"'),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "beginning"),
        ({"messages": [{"role": "system", "content": "x"}]}, "last message"),
        ({"messages": [{"role": "user", "content": "x"}] * 2}, "only 'assistant'"),
        ({"messages": [{"role": "system", "content": "x"}] * 2}, "only 'user'"),
        ({"messages": [{"role": "system", "content": [{"type": "image"}]}]}, "only 'user' may hold media"),
        (user("") | {"id": "x"}, "empty"),
        (user(" \n\t"), "empty"),
        (user([]), "empty"),
        (user(5), "a string or a list"),
        (user([{"type": "smell"}]), "text, image, video, audio"),
        (user(["Hi"]), "'type'"),
        (user([{"type": "text"}]), "no 'text'"),
        (user([{"type": "text", "text": 5}]), "not a string"),
        (user([{"type": "audio", "rate": 5}]), "unknown key 'rate'"),
        (user([{"type": "video", "sample": "adaptive"}]), "adaptive"),
        (user([{"type": "video", "max_frames": 0}]), "max_frames"),
        (user([{"type": "image", "min_pixels": 9000, "max_pixels": 8000}]), "exchange"),
        (user("\ud800"), "surrogate"),
        (user("Hi") | {"mood": 1}, "unknown key 'mood'"),
        (user("Hi") | {"thinking": 1}, "true or false"),
        (user("Hi") | {"id": ""}, "'id'"),
        (user("Hi") | {"id": "a\nb"}, "'id'"),
        (user("Hi") | {"lease": -1}, "'lease'"),
        (user("Hi") | {"task": "cook"}, "asr"),
        (user("Hi") | {"dialect": "cantonese"}, "'task' is not 'asr'"),
        (user("Hi") | {"task": "asr"}, "no text"),
        (user([{"type": "image"}]) | {"task": "asr"}, "audio"),
        (user([{"type": "audio"}]) | {"task": "asr", "thinking": True}, "thinking"),
        (user([{"type": "audio"}]) | {"task": "asr", "dialect": "klingon"}, "minnan"),
    ],
)
def test_a_bad_request_is_refused_with_a_sentence(data: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_request(data)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", True),
        ("max_tokens", 2.0),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.01),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")),
        ("no_repeat_ngram_size", -1),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("stop", [5]),
        ("seed", -1),
        ("seed", 1 << 63),
        ("ignore_eos", "yes"),
        ("top_q", 1),
    ],
)
def test_a_sampling_value_out_of_range_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=name):
        parse_request(user("Hi") | {"sampling": {name: value}})


def test_a_number_of_files_that_differs_from_the_parts_is_refused() -> None:
    request = parse_request(user([{"type": "image"}, {"type": "image"}, {"type": "audio"}]))
    check_media(request, 2, 0, 1)
    for counts in [(1, 0, 1), (2, 1, 1), (2, 0, 0)]:
        with pytest.raises(InputError, match="one file for each part"):
            check_media(request, *counts)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "id", "messages", "sampling"]), inner)
    ),
    max_leaves=20,
)


@given(json_values)
def test_any_json_gives_a_request_or_an_input_error(value: Any) -> None:
    try:
        assert isinstance(parse_request(json.dumps(value)), Request)
    except InputError as error:
        assert str(error)


@given(st.binary(max_size=200))
def test_any_bytes_give_a_request_or_an_input_error(data: bytes) -> None:
    try:
        parse_request(data)
    except InputError as error:
        assert str(error)


@given(
    st.text(min_size=1).filter(str.strip),
    st.builds(
        Sampling,
        max_tokens=st.integers(1, 1000),
        temperature=st.floats(0, 100),
        top_p=st.floats(0, 1, exclude_min=True),
        stop=st.lists(st.text(min_size=1, max_size=256), max_size=16).map(tuple),
        seed=st.none() | st.integers(0, (1 << 63) - 1),
    ),
)
def test_json_round_trip(text: str, sampling: Sampling) -> None:
    request = Request(parse_request(user(text)).messages, sampling=sampling)
    assert parse_request(request.to_json().encode()) == request
