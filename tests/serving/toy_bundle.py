"""A bundle without engines, and a repository of stages that need none: for tests of the serving itself."""

import shutil
from pathlib import Path

from ming_trt import bundle, presets

TOY = Path(__file__).with_name("toy")
HIDDEN = 8


def write_bundle(folder: Path, verdict: str = bundle.PASSED, without: str = "") -> Path:
    """A bundle with the three engines of the understanding path, of which only the manifest exists."""
    folder.mkdir(parents=True)
    components = {
        name: bundle.ComponentEntry(
            name=name,
            target="onnxruntime",
            precision="fp32",
            model=f"{name}/model.onnx",
            outputs={"rows": {"dtype": "float32", "shape": ["N", HIDDEN]}},
            gate={"verdict": verdict},
        )
        for name in ("vision_encoder", "audio_encoder", "llm")
        if name != without
    }
    manifest = bundle.Manifest({"name": "toy"}, "onnxruntime", presets.load("mini-cpu"), {}, {}, {}, components)
    (folder / bundle.MANIFEST).write_text(manifest.to_json(), "utf-8")
    return folder


def write_stages(folder: Path) -> Path:
    """The toy stages laid out as `triton_repo`."""
    for file in TOY.glob("*.py"):
        version = folder / file.stem / "1"
        version.mkdir(parents=True)
        shutil.copyfile(file, version / "model.py")
    return folder
