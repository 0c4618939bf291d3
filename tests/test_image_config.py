"""The configuration of the picture path: what the files say, and what is refused in one sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ming_trt.config import MingConfig, load_config
from ming_trt.errors import ConfigError
from ming_trt.image_config import connector_config, dit_config, schedule_config, vae_config

from .conftest import GENERATION

FILES = ("connector/config.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")
Read = Callable[[MingConfig], Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The configuration files alone."""
    for name in ("config.json", *FILES):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(GENERATION / "checkpoint" / name, tmp_path / name)
    return tmp_path


def denoiser(config: MingConfig) -> Any:
    return dit_config(config, stored_tables=True)


def edit(folder: Path, file: str, **values: Any) -> MingConfig:
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **values}))
    return load_config(folder)


@pytest.mark.parametrize(
    ("file", "values", "read", "message"),
    [
        (FILES[0], {"num_key_value_heads": 3}, connector_config, "cannot share 3 key/value heads evenly"),
        (FILES[0], {"head_dim": 5}, connector_config, "'connector.head_dim' in .* is 5, expected an even number"),
        (FILES[0], {"rope_scaling": {"type": "yarn"}}, connector_config, "only plain rotary embedding"),
        (FILES[1], {"patch_size": 4}, denoiser, "only 2 is implemented"),
        (FILES[1], {"dual_attention_layers": [9]}, denoiser, "expected layer numbers"),
        (FILES[1], {"qk_norm": "layer_norm"}, denoiser, "expected 'rms_norm' or null"),
        (FILES[2], {"norm_num_groups": 5}, vae_config, "does not divide into 5 norm groups"),
        (FILES[2], {"shift_factor": "0.1"}, vae_config, "'vae.shift_factor' in .* is '0.1', expected a number"),
        (FILES[2], {"latents_mean": [0.0]}, vae_config, "only a scale and a shift"),
        (FILES[3], {"use_karras_sigmas": True}, schedule_config, "only False is implemented"),
        (FILES[3], {"shift": -1.0}, schedule_config, "expected more than 0"),
    ],
)
def test_refused(folder: Path, file: str, values: dict[str, Any], read: Read, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        read(edit(folder, file, **values))
    assert file.rpartition("/")[2] in str(raised.value) and "\n" not in str(raised.value)


def test_other_spellings(folder: Path) -> None:
    """What may be left out, or null, or below zero."""
    assert vae_config(edit(folder, FILES[2], shift_factor=None)).shift == 0.0
    assert vae_config(edit(folder, FILES[2], shift_factor=-0.25)).shift == -0.25
    assert denoiser(edit(folder, FILES[1], dual_attention_layers=None, qk_norm=None)).dual_layers == ()
    assert connector_config(edit(folder, FILES[0], num_key_value_heads=None)).kv_heads == 2
    assert schedule_config(edit(folder, FILES[3], shift=1)).shift == 1.0
