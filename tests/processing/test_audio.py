import io

import av
import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from ming_trt.errors import InputError
from ming_trt.golden.cases import Cases
from ming_trt.processing.audio import (
    MIN_SAMPLES,
    _width,
    audio_tokens,
    decode_audio,
    first_channel,
    log_mel,
    mel_filters,
    process_audio,
    process_waveform,
    resample,
)
from tests.conftest import UNDERSTANDING

CASES = Cases(UNDERSTANDING)
CLIPS = [case["id"] for case in CASES.index["cases"] if case["group"] == "audio_processor"]
RNG = np.random.default_rng(2)
NOISE = (RNG.standard_normal(4000) * 0.1).astype(np.float32)


def wav(samples: np.ndarray, rate: int = 16000, form: str = "WAV", subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=form, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize("name", CLIPS)
def test_reference_clips(name: str) -> None:
    waveform = CASES.array(f"{name}.waveform")
    got = process_waveform(waveform)
    # 1e-4, as the cases state it; the reference's transform is in float32
    CASES.check(f"{name}.mel", got.mel)
    assert got.tokens == int(CASES.array(f"{name}.encoder_length"))
    # The same through a file: floats as they are, integers by their full scale, the first channel of two.
    subtype = "FLOAT" if waveform.dtype == np.float32 else "PCM_16"
    CASES.check(f"{name}.mel", process_audio(wav(waveform.T, subtype=subtype)).mel)


def test_clips_were_compared() -> None:
    assert len(CLIPS) >= 2


@given(st.integers(1, 100000))
def test_tokens_are_two_halvings_rounded_up(frames: int) -> None:
    assert audio_tokens(frames) == ((frames - 1) // 2 + 1 - 1) // 2 + 1


@given(st.integers(MIN_SAMPLES, 5000))
def test_every_160_samples_make_a_frame(samples: int) -> None:
    got = process_waveform(np.resize(NOISE, samples))
    assert got.mel.shape == (samples // 160, 128)
    assert got.mel.dtype == np.float32
    assert np.isfinite(got.mel).all()


def test_a_tone_lights_the_band_of_its_frequency() -> None:
    bins = np.arange(201) * 40.0
    centres = (mel_filters(128) * bins[:, None]).sum(axis=0) / mel_filters(128).sum(axis=0)
    for hertz in (500, 1500, 4000):
        mel = log_mel(np.sin(2 * np.pi * hertz * np.arange(8000) / 16000).astype(np.float32))
        assert abs(centres[mel.mean(axis=0).argmax()] - hertz) < 60
    # at most 8 decades below the maximum, which the last step divides by 4
    assert mel.max() - mel.min() <= 2 + 1e-6


def test_silence_gives_the_floor() -> None:
    np.testing.assert_allclose(log_mel(np.zeros(1600, np.float32)), (-10 + 4) / 4, rtol=1e-6)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 32000, 44100, 48000, 44099])
def test_resampled_sines_stay_sines(rate: int) -> None:
    # 44099 has no common divisor with 16000 and takes the other route
    seconds = np.arange(rate // 2) / rate
    got = resample(np.sin(2 * np.pi * 440 * seconds).astype(np.float32), rate)
    assert got.dtype == np.float32
    assert len(got) == -(-16000 * (rate // 2) // rate)
    want = np.sin(2 * np.pi * 440 * np.arange(len(got)) / 16000)
    # away from the ends the pass band ripple of 6 zero crossings is below 1e-3
    np.testing.assert_allclose(got[400:-400], want[400:-400], atol=1e-3)


@pytest.mark.parametrize("rate", [8000, 22050, 48000])
def test_resampling_is_the_documented_sum(rate: int) -> None:
    """Each output is the sum of x[m] · c · sinc(c t) · cos²(π c t / 12) over |c t| < 6, with t in input periods."""
    before, after = rate // np.gcd(rate, 16000), 16000 // np.gcd(rate, 16000)
    cutoff = min(before, after) * 0.99 / before
    samples = NOISE[:300]
    got = resample(samples, rate)
    for k in (0, 1, len(got) // 2, len(got) - 1):
        t = cutoff * (np.arange(-_width(before, after), 300 + 2 * before) - k * before / after)
        inside = np.abs(t) < 6
        index = np.arange(-_width(before, after), 300 + 2 * before)
        values = np.where((index >= 0) & (index < 300), samples[index.clip(0, 299)], 0)
        want = (values * cutoff * np.sinc(t) * np.cos(np.pi * t / 12) ** 2)[inside].sum()
        assert abs(got[k] - want) < 1e-5


@given(st.lists(st.integers(-32768, 32767), min_size=1, max_size=50))
def test_integers_are_divided_by_their_full_scale(values: list[int]) -> None:
    got = first_channel(np.array([values, [0] * len(values)], np.int16))
    np.testing.assert_array_equal(got, np.array(values, np.float32) / 32768)
    same, rate = decode_audio(wav(np.array(values, np.int16)))
    np.testing.assert_array_equal(same, got)
    assert rate == 16000


@pytest.mark.parametrize(("form", "subtype"), [("FLAC", None), ("OGG", "VORBIS"), ("MP3", None), ("WAV", "PCM_24")])
def test_formats(form: str, subtype: str | None) -> None:
    tone = (0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)).astype(np.float32)
    samples, rate = decode_audio(wav(tone, 16000, form, subtype))
    assert rate == 16000
    middle = samples[4000:12000]
    # lossy formats change the samples, not the loudness
    assert abs(middle.std() - 0.5 / np.sqrt(2)) < 0.02


def test_what_only_ffmpeg_reads() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mov") as container:
        stream = container.add_stream("aac", rate=16000, layout="stereo")
        tone = (0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(np.stack([tone, np.zeros_like(tone)]), format="fltp", layout="stereo")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    samples, rate = decode_audio(buffer.getvalue())
    assert rate == 16000
    assert abs(samples[4000:12000].std() - 0.5 / np.sqrt(2)) < 0.03
    with pytest.raises(InputError, match=r"longer than the 0\.50 s"):
        decode_audio(buffer.getvalue(), max_seconds=0.5)


def test_unusable_audio_is_refused_with_a_sentence() -> None:
    nan = NOISE.copy()
    nan[7] = np.nan
    for data, words in [
        (b"", "0 bytes"),
        # no address of an object in it: equal files have equal sentences, which are counted
        (b"not a recording", r"cannot be decoded \(Format not recogni[sz]ed\)"),
        (wav(NOISE)[:30], "cannot be decoded"),
        (wav(np.zeros(0, np.float32)), "no samples"),
        (wav(NOISE[:160]), r"0\.0100 s \(160 samples at 16 kHz\): send at least 0\.0126 s"),
        (wav(nan, subtype="FLOAT"), "not finite"),
        (wav(NOISE, 500), "500 samples a second"),
    ]:
        with pytest.raises(InputError, match=words):
            process_audio(data)


def test_a_clip_beyond_the_table_is_refused_and_one_that_fills_it_is_not() -> None:
    assert len(process_audio(wav(NOISE[:1600]), max_frames=10).mel) == 10
    assert len(process_waveform(NOISE[:1759], max_frames=10).mel) == 10
    with pytest.raises(InputError, match=r"0\.11 s, longer than the 0\.10 s"):
        process_audio(wav(NOISE[:1760]), max_frames=10)
    with pytest.raises(InputError, match="longer than"):
        process_waveform(NOISE[:1760], max_frames=10)


@given(st.integers(0, 400), st.integers(0, 255), st.sampled_from(["WAV", "FLAC", "OGG"]))
def test_a_damaged_file_gives_features_or_an_input_error(place: int, value: int, form: str) -> None:
    data = bytearray(wav(NOISE[:800], form=form))
    data[place % len(data)] = value
    try:
        assert np.isfinite(process_audio(bytes(data)).mel).all()
    except InputError as error:
        assert str(error)
