"""GPT-OSS's language model behind InternVL's tower, as in InternVL3.5-GPT-OSS.

The four largest logits of 32, then a softmax over those alone; router and experts have biases, the experts' gates are clamped;
attention has sinks, and every other layer a sliding window.
"""

from demo_model.architectures import internvl
from demo_model.architectures.architecture import Architecture, start_as_lookup
from demo_model.hub_form import internvl_to_hub_form
from demo_model.jobs.job import Job
from demo_model.sinks import SINKS
from transformers import InternVLForConditionalGeneration

from modes_fx.models.images_processor import InternVLImagesProcessor

_TEXT = {
    "model_type": "gpt_oss",
    "num_hidden_layers": 8,
    "intermediate_size": 48,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "sliding_window": 256,  # wider than any sample, so that packed rows, whose mask is their own, see what samples see
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
}


def _build_model(processor: InternVLImagesProcessor, job: Job) -> InternVLForConditionalGeneration:
    model = internvl.build_model(processor, job, _TEXT)
    for layer in model.model.language_model.layers:
        start_as_lookup(layer.self_attn)
    return model


ARCHITECTURE = Architecture(
    name="gpt_oss",
    build_processor=internvl.build_processor,
    build_model=_build_model,
    tower=internvl.tower,
    visual_tokens=internvl.visual_tokens,
    vision_steps=1000,
    experts_implementation="grouped_mm",
    attention_implementation=SINKS,
    to_hub_form=internvl_to_hub_form,
)
