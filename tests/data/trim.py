"""Makes `tests/data/golden` from a full set of reference cases: `python tests/data/trim.py SOURCE`.

Large outputs are reduced to a fixed random sample of their elements, a few large arrays are left out, and the
transformer's position tables, which follow from its configuration, are dropped. Everything else is kept as it is.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np

SAMPLE = 1500
DROPPED = ("proc.image.large.", "cond.t2i.", "ref.big.", "rope.video_rope.", "hift.source12.")


def trim_cases(source: Path, target: Path) -> None:
    index = json.loads((source / "cases.json").read_text())
    stored = np.load(source / "cases.npz")
    rng = np.random.default_rng(0)
    out: dict[str, np.ndarray] = {}
    for name in list(index["arrays"]):
        if name.startswith(DROPPED):
            del index["arrays"][name]
            continue
        values = stored[name]
        used_as_input = index["arrays"][name]["role"] == "input" or name.endswith((".mel", ".noise", ".source"))
        if values.size > 2 * SAMPLE and not used_as_input and values.dtype.kind in "fu":
            picked = np.sort(rng.choice(values.size, SAMPLE, replace=False)).astype(np.int32)
            out[f"{name}@index"], out[f"{name}@value"] = picked, values.reshape(-1)[picked]
        else:
            out[name] = values
    for case in list(index.get("cases", [])):
        if any(n.startswith(DROPPED) for n in (*case["inputs"], *case["outputs"])):
            index["cases"].remove(case)
    (target / "cases.json").write_text(json.dumps(index, ensure_ascii=False, separators=(",", ":")))
    np.savez_compressed(target / "cases.npz", **out)


def drop_position_tables(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    index_file = folder / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    dropped = {"pos_embed.pos_embed", "ref_pos_embed.pos_embed"}
    for shard in sorted(set(index["weight_map"].values())):
        save_file({k: v for k, v in load_file(folder / shard).items() if k not in dropped}, folder / shard)
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if k not in dropped}
    index_file.write_text(json.dumps(index))


def main(source: Path) -> None:
    root = Path(__file__).parent / "golden"
    shutil.rmtree(root, ignore_errors=True)
    for kind in ("understanding", "generation"):
        target = root / kind
        target.mkdir(parents=True)
        shutil.copytree(source / kind / "checkpoint", target / "checkpoint", copy_function=shutil.copyfile)
        for file in (*target.rglob("*"), target):
            file.chmod(0o755 if file.is_dir() else 0o644)
        trim_cases(source / kind, target)
        if (source / kind / "voice.pt").exists():
            shutil.copyfile(source / kind / "voice.pt", target / "voice.pt")
    drop_position_tables(root / "generation" / "checkpoint" / "transformer")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
