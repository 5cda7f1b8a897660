"""The forms in which checkpoints lie on the hub, which transformers and vLLM both read."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

VIDEO = {
    "do_sample_frames": True, "fps": 2, "max_frames": 768, "min_frames": 4, "video_processor_type": "Qwen3VLVideoProcessor",
}  # fmt: skip
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def qwen_to_hub_form(folder: Path) -> None:
    """Bring what `save_pretrained` wrote into that form.

    Experts are stored as inputs by outputs, gate_up_proj [E, H, 2I] and down_proj [E, I, H]; the config says that routing
    weights are normalised, which is built into transformers' class; the processor is the family's own, which reads videos too.
    """
    weights = load_file(folder / "model.safetensors")
    turned = {
        name: weight.transpose(1, 2).contiguous() if name.endswith(EXPERTS) else weight for name, weight in weights.items()
    }
    save_file(turned, folder / "model.safetensors", metadata={"format": "pt"})
    config = _read(folder / "config.json")
    config["text_config"]["norm_topk_prob"] = True
    _write(folder / "config.json", config)
    tokenizer = _read(folder / "tokenizer_config.json")
    _write(folder / "tokenizer_config.json", {**tokenizer, "processor_class": "Qwen3VLProcessor"})
    processor = _read(folder / "processor_config.json")
    images = {key: value for key, value in processor["image_processor"].items() if key != "image_processor_type"}
    video = {**images, **VIDEO, "size": {**images["size"], "longest_edge": 4 * images["size"]["longest_edge"]}}
    processor |= {"processor_class": "Qwen3VLProcessor", "video_processor": video}
    _write(folder / "processor_config.json", processor)


def internvl_to_hub_form(folder: Path) -> None:
    """Name the family's own processor, which reads videos too, in the place of the one that reads images alone."""
    tokenizer = _read(folder / "tokenizer_config.json")
    _write(folder / "tokenizer_config.json", {**tokenizer, "processor_class": "InternVLProcessor"})
    processor = _read(folder / "processor_config.json")
    images = {key: value for key, value in processor["image_processor"].items() if key != "image_processor_type"}
    video = {**images, "video_processor_type": "InternVLVideoProcessor"}
    _write(folder / "processor_config.json", {**processor, "processor_class": "InternVLProcessor", "video_processor": video})


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    """As `save_pretrained` writes: sorted, two levels of indentation."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
