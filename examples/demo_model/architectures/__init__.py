"""Small models of real classes, each with another router: one file each, `ARCHITECTURES` by name."""

from demo_model.architectures import deepseek_v3, gpt_oss, qwen3_vl_moe
from demo_model.architectures.architecture import Architecture

ARCHITECTURES: dict[str, Architecture] = {
    each.name: each for each in (qwen3_vl_moe.ARCHITECTURE, deepseek_v3.ARCHITECTURE, gpt_oss.ARCHITECTURE)
}
__all__ = ["ARCHITECTURES", "Architecture"]
