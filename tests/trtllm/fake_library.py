"""A package `tensorrt_llm` of release 1.2.1 that builds nothing: what the mechanics around its builder are tested with.

Symbols are the recorder's, which know shapes; its engines are files that state what they were asked for. It shows that
processes are started, resumed and stamped, and nothing of TensorRT-LLM.
"""

from __future__ import annotations

from pathlib import Path

_FILES = {
    "__init__.py": "",
    "functional.py": """
from ming_trt.trtllm.recorder import recorder
globals().update(vars(recorder()))
""",
    "module.py": "from ming_trt.trtllm.recorder import Module\n",
    "layers/__init__.py": """
from ming_trt.trtllm.recorder import recorder
globals().update(vars(recorder()))
""",
    "layers/moe.py": "from ming_trt.trtllm.recorder import MoeConfig, SharedMoE\n",
    "models/__init__.py": "MODEL_MAP = {}\n",
    "models/modeling_utils.py": """
import json
from ming_trt.trtllm import recorder
from ming_trt.trtllm.recorder import DecoderLayerList

class PretrainedConfig(recorder.PretrainedConfig):
    @classmethod
    def from_json_file(cls, config_file):
        return cls(**json.load(open(config_file)))

class DecoderModelForCausalLM(recorder.DecoderModelForCausalLM):
    @classmethod
    def from_checkpoint(cls, ckpt_dir, rank=None, config=None):
        config.set_rank(rank)
        model = cls(config)
        model(**model.prepare_inputs())
        return model
""",
    "_utils.py": "def pad_vocab_size(vocab_size, tp_size): return -(-vocab_size // tp_size) * tp_size\n",
    "_common.py": """
from ming_trt.trtllm.recorder import recorder
default_net = recorder().default_net
""",
    "plugin/__init__.py": """
class PluginConfig:
    def __init__(self, *, gpt_attention_plugin, moe_plugin, gemm_plugin, remove_input_padding, paged_kv_cache,
                 use_paged_context_fmha):
        self.values = {k: v for k, v in vars().items() if k != "self"}
""",
    "builder.py": """
import json, os, pathlib, signal

class BuildConfig:
    def __init__(self, *, max_input_len, max_seq_len, max_batch_size, max_num_tokens, max_prompt_embedding_table_size,
                 strongly_typed, plugin_config, use_mrope, output_timing_cache, input_timing_cache=None):
        self.values = {k: v for k, v in vars().items() if k not in ("self", "plugin_config")}
        self.plugin_config = plugin_config

class Engine:
    def __init__(self, model, config):
        self.rank, self.config, self.model = model.config.mapping.rank, config, model.config

    def save(self, engine_dir):
        folder = pathlib.Path(engine_dir)
        if self.rank == 0:
            pretrained = {k: getattr(self.model, k) for k in ("max_position_embeddings", "dtype", "num_hidden_layers",
                          "num_key_value_heads", "head_size", "architecture")}
            pretrained["quantization"] = vars(self.model.quantization)
            pretrained["mapping"] = {k: v for k, v in vars(self.model.mapping).items() if k != "rank"}
            text = json.dumps({"pretrained_config": pretrained, "build_config": self.config.values})
            (folder / "config.json").write_text(text)
        (folder / f"rank{self.rank}.engine").write_text(f"engine of rank {self.rank}")

def build(model, build_config):
    print("building rank", model.config.mapping.rank, flush=True)
    with open(os.environ["FAKE_LIBRARY_LOG"], "a") as log:
        log.write(f"{model.config.mapping.rank}\\n")
    fault = os.environ.get("FAKE_LIBRARY_FAULT", "")
    if fault == f"die {model.config.mapping.rank}":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == f"raise {model.config.mapping.rank}":
        raise RuntimeError("no tactic\\nfound")
    pathlib.Path(build_config.values["output_timing_cache"]).write_text("timings")
    return Engine(model, build_config)
""",
    "bindings/__init__.py": "",
}


def _executor() -> str:
    """Classes of the bindings, with the parameters in their docstrings as the compiled ones have them."""
    from ming_trt.trtllm.signatures import EXECUTOR

    text = ""
    for name, symbol in EXECUTOR.items():
        text += f'\nclass {name}:\n    """{name}({", ".join(symbol.parameters)})"""\n'
        text += "".join(f"    {member} = None\n" for member in symbol.members)
    return text


def write(folder: Path) -> Path:
    """Writes the package, and TensorRT's metadata, into `folder`, which belongs on the module path.

    Returns the file that lists the ranks that were built.
    """
    for name, text in {**_FILES, "bindings/executor.py": _executor()}.items():
        path = folder / "tensorrt_llm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name, version in (("tensorrt_llm", "1.2.1"), ("tensorrt", "10.14.1.48")):
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder / "built.txt"
