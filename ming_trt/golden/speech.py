"""Replays the speech cases: codec BPE, text front end, talker, flow, vocoder, streaming.

What an engine outputs comes from the built engine. Inner values, which no engine outputs, come from the torch
definition: the talker's embeddings, the flow encoder's last hidden state, the source from given draws.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from ming_trt.errors import ConfigError
from ming_trt.golden.llm_driver import Floats, LLMDriver
from ming_trt.golden.session import NotRun, Session
from ming_trt.processing.s3_bpe import S3Bpe
from ming_trt.processing.speech_text import LONGEST_PIECE, cut, pieces
from ming_trt.processing.spoken_text import spoken_text
from ming_trt.processing.talker_prompt import TalkerPrompt, TalkerTokens, talker_prompt
from ming_trt.processing.voice import Voice, load_voice
from ming_trt.runtime.audio_stream import OfficialStream
from ming_trt.runtime.detokenizer import Detokenizer, VocoderFrames
from ming_trt.runtime.talker import Talker
from ming_trt.speech_config import FOLDER, load_speech_config

GROUPS = ("bpe", "talker", "flow", "hift", "stream")


def covers(name: str) -> bool:
    """Whether an array belongs to the speech path."""
    return name.split(".")[0] in GROUPS or name.startswith("e2e.speech")


def replay(session: Session) -> None:
    """Adds a line for every output of every speech case."""
    _text(session)
    reason = session.absent("talker") or session.absent("vocoder")
    if reason is not None:
        session.not_run += [NotRun(f"{group}.", reason) for group in GROUPS]
        return
    voice_file = session.cases.folder / "voice.pt"
    if not voice_file.exists():
        session.not_run += [NotRun(f"{group}.", "the cases have no voice.pt") for group in GROUPS]
        return
    voice = load_voice(voice_file)
    entries = S3Bpe(session.checkpoint / FOLDER / "s3_bpe")
    _bpe(session, entries)
    thinker = _thinker_rows(session)
    for name, settings in session.cases.index["talker"]["cases"].items():
        _talker(session, entries, voice, name, settings, thinker)
    decoder = _detokenizer(session)
    _flow(session, decoder, voice)
    _vocoder(session, decoder)
    _stream(session, decoder, voice)


def _text(session: Session) -> None:
    for number, entry in enumerate(session.cases.index.get("text_front_end", [])):
        name, reply = f"text_front_end.{number}", entry["reply"]
        spoken = [{"text": piece.text, "stream": piece.stream} for piece in pieces(reply)]
        session.add_equal("text_front_end", f"{name}.pieces", spoken, entry["pieces"])
        session.add_equal(
            "text_front_end", f"{name}.normalised", spoken_text(reply.replace("\n", " ")), entry["normalised"]
        )
        session.add_equal("text_front_end", f"{name}.cut", cut(reply, LONGEST_PIECE), entry["cut_50"])


def _bpe(session: Session, entries: S3Bpe) -> None:
    cases = session.cases
    for kind in ("voice", "unknown"):
        session.add("bpe", "host", f"bpe.{kind}.ids", entries.encode(cases.array(f"bpe.{kind}.codes").tolist()))
    decoded = [entries.decode([int(entry)]) for entry in cases.array("bpe.decode.ids")]
    session.add("bpe", "host", "bpe.decode.counts", [len(codes) for codes in decoded])
    session.add("bpe", "host", "bpe.decode.codes", [code for codes in decoded for code in codes])


def _thinker_rows(session: Session) -> Floats | None:
    """K of the `e2e.speech` prompt: by the LLM where the checkpoint has one, else as stored, else None."""
    from ming_trt.golden.tokenizer import ByteTokenizer

    case = "e2e.speech"
    if f"{case}.K" not in session.cases:
        return None
    reason = session.absent("llm")
    if reason is not None:
        session.not_run.append(NotRun(case, reason))
        try:
            return session.cases.array(f"{case}.K")
        except ConfigError:  # only a sample of it is stored
            return None
    text = session.cases.index["e2e"]["speech"]["text"]
    ids = np.array(
        ByteTokenizer.from_cases(session.cases.index).encode(f"<role>HUMAN</role>{text}<role>ASSISTANT</role>")
    )
    driver = LLMDriver(session.engine("llm"), session.config.llm, capacity=len(ids))
    _, hidden, embeds = driver.step(ids, np.tile(np.arange(len(ids)), (3, 1)))
    rows = hidden + embeds
    session.add(case, "host", f"{case}.input_ids", ids)
    session.add(case, "engine", f"{case}.K", rows)
    return rows


class _Draws:
    """Stands for a random generator: gives the stored draws one after the other."""

    def __init__(self, draws: Floats) -> None:
        self._rows = iter(draws)

    def standard_exponential(self, size: int, dtype: type) -> Floats:
        row: Floats = next(self._rows)
        assert row.size == size and row.dtype == dtype
        return row


class _TalkerDriver:
    """One sequence through the `talker` engine with the logits of every position."""

    def __init__(self, session: Session, prompt: TalkerPrompt, speaker: Floats, thinker: Floats | None) -> None:
        self.engine = session.engine("talker")
        config = load_speech_config(session.checkpoint).talker
        self.prompt, self.capacity, self.length = prompt, len(prompt) + 32, 0
        none = np.zeros((1, config.thinker_hidden), np.float32)
        self.speaker, self.thinker = speaker[None], none if thinker is None else thinker
        shape = (1, config.kv_heads, self.capacity, config.head_dim)
        names = [f"{kind}_{i}" for i in range(config.layers) for kind in ("key", "value")]
        self.cache = {name: np.zeros(shape, np.float32) for name in names}

    def prefill(self, with_speaker: bool = True) -> Floats:
        """Logits [n, V] of the whole prompt."""
        prompt = self.prompt
        speaker = prompt.speaker_index if with_speaker else np.full_like(prompt.speaker_index, -1)
        return self.step(prompt.audio_ids, prompt.text_ids, speaker, prompt.thinker_index)

    def step(self, audio: Any, text: Any, speaker: Any = None, thinker: Any = None) -> Floats:
        count = len(audio)
        none = np.full(count, -1, np.int64)
        place = np.arange(self.length, self.length + count)
        feeds = {
            "audio_ids": np.asarray(audio, np.int64)[None],
            "text_ids": np.asarray(text, np.int64)[None],
            "speaker": self.speaker,
            "speaker_index": (none if speaker is None else speaker)[None],
            "thinker": self.thinker,
            "thinker_index": (none if thinker is None else thinker)[None],
            "position_ids": place[None],
            "write_index": np.array([self.length], np.int64),
            "attention_mask": (np.arange(self.capacity) <= place[:, None])[None, None],
            "logit_index": np.arange(count)[None],
            **{f"past_{name}": values for name, values in self.cache.items()},
        }
        into = {f"present_{name}": values for name, values in self.cache.items()}
        self.length += count
        logits: Floats = self.engine.run(feeds, outputs=("logits",), into=into)["logits"][0]
        return logits


def _talker(
    session: Session, entries: S3Bpe, voice: Voice, name: str, settings: dict[str, Any], rows: Floats | None
) -> None:
    cases, case = session.cases, f"talker.{name}"
    tokens = TalkerTokens.by_position(load_speech_config(session.checkpoint).talker.text_vocab)
    thinker = None
    if settings["thinker"]:
        thinker = rows if settings.get("K") else cases.array("talker.thinker")
        if thinker is None:
            session.not_run.append(NotRun(case, "its thinker rows need the LLM, which the checkpoint does not have"))
            return
    # the reference cases have no tokenizer: text is its UTF-8 bytes
    said, text = (list(settings[key].encode()) for key in ("prompt_text", "text"))
    count = 0 if thinker is None else len(thinker)
    prompt = talker_prompt(tokens, entries.encode(voice.codes.tolist()), said, text, count)
    driver = _TalkerDriver(session, prompt, voice.speaker, thinker)
    logits = driver.prefill()
    after = {part: values.copy() for part, values in driver.cache.items()}
    session.add(case, "host", f"{case}.audio_ids", prompt.audio_ids)
    session.add(case, "host", f"{case}.text_ids", prompt.text_ids)
    session.add(case, "host", f"{case}.position_ids", np.arange(len(prompt)))
    session.add(case, "engine", f"{case}.prefill_logits", logits)
    _embeddings(session, case, driver)
    ids, found = [_best(logits[-1], tokens)], []
    for _ in range(cases.arrays[f"{case}.greedy_logits"]["shape"][0]):
        found.append(driver.step(ids[-1:], [tokens.text_pad])[0])
        ids.append(_best(found[-1], tokens))
    session.add(case, "engine", f"{case}.greedy_logits", np.stack(found))
    session.add(case, "engine", f"{case}.greedy_ids", ids)
    codes = entries.decode([token - tokens.first_audio for token in ids])
    session.add(case, "host", f"{case}.greedy_codes", codes)
    if f"{case}.forced_ids" in cases:
        driver.cache, driver.length = after, len(prompt)
        forced = [driver.step([token], [tokens.text_pad])[0] for token in cases.array(f"{case}.forced_ids")]
        session.add(case, "engine", f"{case}.forced_logits", np.stack(forced))
    if f"{case}.sample_noise" in cases:
        _sampling(session, case, entries, tokens, driver)
    if name == "plain" and "talker.no_voice.prefill_logits" in cases:
        bare = _TalkerDriver(session, prompt, voice.speaker, thinker).prefill(with_speaker=False)
        session.add("talker.no_voice", "engine", "talker.no_voice.prefill_logits", bare[-1])


def _best(logits: Floats, tokens: TalkerTokens) -> int:
    allowed = logits.copy()
    allowed[tokens.audio_eos] = -np.inf
    return int(allowed.argmax())


def _embeddings(session: Session, case: str, driver: _TalkerDriver) -> None:
    import torch

    model, prompt = cast(Any, session.reference("talker")), driver.prompt
    rows = torch.from_numpy(driver.speaker), torch.from_numpy(driver.thinker)
    streams = torch.from_numpy(prompt.audio_ids)[None], torch.from_numpy(prompt.text_ids)[None]
    for what, replaced in (("embeds", True), ("embeds_sum", False)):
        index = [
            torch.from_numpy(i if replaced else np.full_like(i, -1))[None]
            for i in (prompt.speaker_index, prompt.thinker_index)
        ]
        with torch.no_grad():
            embeds = model.embed(*streams, rows[0], index[0], rows[1], index[1])
        session.add(case, "torch", f"{case}.{what}", embeds[0].numpy())


def _sampling(session: Session, case: str, entries: S3Bpe, tokens: TalkerTokens, driver: _TalkerDriver) -> None:
    """The talker as it is served, with the stored draws; the ids by a second run that repeats its codes."""
    from ming_trt.runtime.talker import choose

    draws = session.cases.array(f"{case}.sample_noise")
    talker = Talker(driver.engine, entries, tokens)
    served = talker.codes(driver.prompt, driver.speaker[0], driver.thinker, cast(np.random.Generator, _Draws(draws)))
    session.add(case, "engine", f"{case}.sample_codes", [code for codes in served for code in codes])
    driver.length = 0
    logits, ids = driver.prefill()[-1], list[int]()
    for step, row in enumerate(draws):
        ids.append(choose(logits, step, tokens, row))
        if ids[-1] == tokens.audio_eos:
            break
        logits = driver.step(ids[-1:], [tokens.text_pad])[0]
    session.add(case, "engine", f"{case}.sample_ids", ids)


def _detokenizer(session: Session) -> Detokenizer:
    from ming_trt.bundle import Bundle

    engines = {name: session.engine(name) for name in Detokenizer.ENGINES}
    bundle = Bundle.open(session.work / f"bundle-{session.config.llm.rope_kind}")
    return Detokenizer(engines, {name: bundle.component(name).facts for name in engines}, bundle.preset.flow_budget)


def _flow(session: Session, decoder: Detokenizer, voice: Voice) -> None:
    cases = session.cases
    for name in sorted({n.split(".")[1] for n in cases.arrays if n.startswith("flow.") and n.endswith(".mu")}):
        case, chunked = f"flow.{name}", name.startswith("stream")
        final = name != "stream"
        speaker, codes = voice, cases.array("flow.tokens")
        if name == "no_prompt":
            empty = np.empty((0, decoder.mel), np.float32)
            vector, codes = cases.array("talker.voice.vp_emb"), cases.array("flow.short_tokens")
            speaker = Voice(voice.text, voice.codes, voice.speaker, np.empty(0, np.int64), empty, vector)
        both = np.concatenate([speaker.flow_codes, codes])
        count = len(both) if final else len(both) - decoder.look_ahead
        state = decoder.state(count, parts=False)
        mu, spk = decoder.encode(state, speaker, both[:count], both[count:], chunked)
        session.add(case, "engine", f"{case}.mu", mu[0].T)
        session.add(case, "engine", f"{case}.mel", decoder.to_mel(speaker, codes, chunked=chunked, final=final))
        if name == "whole":
            session.add(case, "engine", "flow.spk", spk[0])
        if f"{case}.encoder" in cases:
            _hidden(session, decoder, case, both, count, chunked)
        if f"{case}.estimator.v" in cases:
            step = int(np.abs(decoder.times() - cases.array(f"{case}.estimator.t")[0]).argmin())
            z, cond = cases.array(f"{case}.estimator.x")[None], decoder.condition(speaker, 0, count)
            velocity = decoder.velocity(state, step, z, mu, spk, cond, chunked)
            session.add(case, "engine", f"{case}.estimator.v", velocity)


def _hidden(session: Session, decoder: Detokenizer, case: str, codes: Any, count: int, chunked: bool) -> None:
    import torch

    from ming_trt.models.flow import Carry, FlowEncoder, encoder_caches

    encoder = cast(FlowEncoder, session.reference("flow_encoder"))
    both = torch.from_numpy(np.concatenate([codes[:count], np.zeros(decoder.look_ahead, np.int64)]))[None]
    both[0, : len(codes)] = torch.from_numpy(codes)
    look = torch.full((1, decoder.look_ahead, 1), float(len(codes) > count))
    shapes = encoder_caches(load_speech_config(session.checkpoint).flow).values()
    start = torch.zeros(1, dtype=torch.int64)
    past = [torch.zeros(1, *(count if size < 0 else size for size in shape)) for shape in shapes]
    carry = Carry(past, encoder.CONVOLUTIONS, start)
    mask = torch.from_numpy(decoder.mask(decoder.state(count, parts=False), count, chunked))
    with torch.no_grad():
        hidden = encoder.hidden(both[:, :count], both[:, count:], look, start, mask, carry)
    session.add(case, "torch", f"{case}.encoder", hidden[0].numpy())


def _vocoder(session: Session, decoder: Detokenizer) -> None:
    import torch

    cases = session.cases
    # the reference's own mel where it is stored whole, so that the flow's error is not counted twice
    mel = cases.array("flow.whole.mel")
    frames = mel.shape[1]
    quiet = np.zeros((frames, decoder.hop, decoder.harmonics), np.float32)
    f0 = decoder.pitch(mel)
    out = decoder.vocode(mel, f0, quiet, source=cases.array("hift.source").reshape(frames, decoder.hop))
    session.add("hift", "engine", "hift.f0", f0)
    session.add("hift", "engine", "hift.wav", out.audio)
    if "hift.source12.noise" not in cases:
        return
    noise = cases.array("hift.source12.noise").reshape(1, -1, decoder.hop, decoder.harmonics)
    f0 = cases.array("hift.f0")[: noise.shape[1]]
    with torch.no_grad():
        source, _ = cast(Any, session.reference("vocoder")).m_source(
            torch.from_numpy(f0)[None], torch.zeros(1, decoder.harmonics), torch.from_numpy(noise)
        )
    session.add("hift.source12", "torch", "hift.source12.source", source[0].flatten().numpy())


class _Replayed(OfficialStream):
    """The official streaming with the stored source of each chunk."""

    session: Session
    kind: str
    number: int

    def vocode(self, mel: Floats, source: Floats) -> VocoderFrames:
        name, d = f"stream.{self.kind}.{self.number}", self._d
        given = self.session.cases.array(f"{name}.source").reshape(-1, d.hop)
        out = d.vocode(mel, d.pitch(mel), d.draw(self._random, mel.shape[1]), source=given)
        shown = self.session.cases.arrays[f"{name}.vocoder"]["shape"][0]
        self.session.add("stream", "engine", f"{name}.hift_mel", mel)
        self.session.add("stream", "engine", f"{name}.vocoder", out.audio[:shown])
        return out


def _stream(session: Session, decoder: Detokenizer, voice: Voice) -> None:
    cases = session.cases
    codes = cases.array("stream.tokens").tolist()
    for kind in ("chunks", "whole"):
        stream = _Replayed(decoder, voice, np.random.default_rng(0))
        stream.session, stream.kind, stream.number = session, kind, 0
        if kind == "chunks":
            for audio in stream.push(codes):
                _chunk(session, stream, audio)
        else:
            stream.hold(codes)
        _chunk(session, stream, stream.finish())
    session.add("stream", "host", "stream.window", stream.fade)


def _chunk(session: Session, stream: _Replayed, audio: Floats) -> None:
    name = f"stream.{stream.kind}.{stream.number}"
    session.add("stream", "engine", f"{name}.output", audio)
    if f"{name}.speech_cache" in session.cases:
        session.add("stream", "engine", f"{name}.speech_cache", stream.held_back)
    stream.number += 1
