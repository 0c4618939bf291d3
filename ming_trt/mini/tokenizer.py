"""The small checkpoint's tokenizer: byte-level BPE of the official form with a vocabulary learned from `text.py`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ming_trt.mini.text import TEXT

BASE_TOKENS = 1024

# How the official tokenizer cuts text before merging: contractions, words, digits, punctuation, line ends, spaces.
SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)  # fmt: skip

# The official added tokens in the order of their ids, which follow the base vocabulary.
ADDED_TOKENS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "[CLS]",
    "[gMASK]",
    *(f"<|reserved_token_{number}|>" for number in range(256)),
    "<role>",
    "</role>",
    "<|arithmetic_start|>",
    "<|arithmetic_end|>",
    "<|number_start|>",
    "<|number_end|>",
    "<imagePatch>",
    "<image>",
    "</image>",
    "<video>",
    "</video>",
    "<gen_imagePatch>",
    "<gen_image>",
    "</gen_image>",
    "<imageHere>",
    "<end_of_chunk>",
    "<end_of_audio>",
    "<audioPatch>",
    "<audio>",
    "</audio>",
    "<gen_audioPatch>",
    "<gen_audio>",
    "</gen_audio>",
    "<audioHere>",
    "<framePatch>",
    "<text>",
    "<asr>",
    "<tts>",
)


def write_tokenizer(folder: Path) -> Any:
    """Writes `tokenizer.json` and `tokenizer_config.json`. Returns the `tokenizers.Tokenizer`."""
    # Learning in several threads could order equally frequent pairs differently.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_TOKENS,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    added = [AddedToken(text, special=True, normalized=False) for text in ADDED_TOKENS]
    tokenizer.add_special_tokens(added)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "add_bos_token": False,
                "add_eos_token": False,
                "added_tokens_decoder": {
                    str(tokenizer.token_to_id(text)): {
                        "content": text,
                        "lstrip": False,
                        "normalized": False,
                        "rstrip": False,
                        "single_word": False,
                        "special": True,
                    }
                    for text in ADDED_TOKENS
                },
                "bos_token": "<|startoftext|>",
                "clean_up_tokenization_spaces": False,
                "cls_token": "[CLS]",
                "eos_token": "<|endoftext|>",
                "gmask_token": "[gMASK]",
                "pad_token": "<|endoftext|>",
                "tokenizer_class": "PreTrainedTokenizerFast",
            },
            indent=2,
        )
        + "\n",
        "utf-8",
    )
    return tokenizer
