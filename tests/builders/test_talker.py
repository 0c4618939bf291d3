"""The talker's graph at other sizes than the reference checkpoint's."""

import json
from pathlib import Path

from builders.component import ExportOptions
from builders.talker import COMPONENT
from ming_trt.config import load_config

from ..conftest import GENERATION


def test_key_heads_need_not_be_shared(tmp_path: Path) -> None:
    """As many key heads as query heads: the exporter refuses the flag for grouped heads there."""
    checkpoint = GENERATION / "checkpoint"
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    (tmp_path / "talker").mkdir()
    body = json.loads((checkpoint / "talker" / "config.json").read_text())
    body |= {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 1}
    (tmp_path / "talker" / "config.json").write_text(json.dumps(body))
    graph = COMPONENT.graph(load_config(tmp_path), ExportOptions("onnxruntime")).graph
    (attention,) = [node for node in graph if node.op_type == "Attention"]
    query, key = attention.inputs[0], attention.inputs[1]
    assert query is not None and key is not None and query.shape is not None and key.shape is not None
    assert (query.shape[1], key.shape[1]) == (4, 4)
