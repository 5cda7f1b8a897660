"""What transformers' model tests ask for, made from a tiny model of a family."""

import copy
import unittest
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto import modeling_auto

from tests import tiny
from tests.upstream.sources import make_importable

make_importable()

from transformers_tests.test_modeling_common import ModelTesterMixin  # noqa: E402

FAMILIES = ("qwen3_moe", "qwen3_vl_moe", "mixtral", "deepseek_v3", "gpt_oss", "glm4v_moe")
_HEADS = ("", "_FOR_CAUSAL_LM", "_FOR_IMAGE_TEXT_TO_TEXT")


class Tester:
    """transformers' tests call it the model tester; sizes that they compare with are the configuration's.

    Args:
        family: One of ``tiny.FAMILIES``.
    """

    is_training = True

    def __init__(self, family: str) -> None:
        config = tiny.FAMILIES[family]().config
        self._config = type(config).from_dict(config.to_dict())  # no model has chosen its attention yet
        self._config.get_text_config().vocab_size += 32  # some tests make the vocabulary smaller, below the images' token ids
        if self.sees_images:
            self._config.vision_config.depth = self._config.get_text_config().num_hidden_layers  # some tests suppose that
        self._inputs = one_image_each() if self.sees_images else tiny.text_batch(3)
        self.batch_size, self.seq_length = self._inputs["input_ids"].shape

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config.get_text_config(), name)

    @property
    def sees_images(self) -> bool:
        return "vision_config" in self._config.sub_configs

    def get_config(self) -> Any:
        return copy.deepcopy(self._config)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Tensor]]:
        return copy.deepcopy((self._config, self._inputs))


def one_image_each() -> dict[str, Tensor]:
    """Return three sequences of the same length with an image each, which transformers' tests take apart and cut."""
    generator = torch.Generator().manual_seed(0)
    return tiny.batch([tiny.image_row(2, 1, 4, generator) for _ in range(3)])


def case_of(family: str) -> type[unittest.TestCase]:
    """Return transformers' model tests of a family: of its base model and of the one that generates."""
    tester = Tester(family)
    heads = (getattr(modeling_auto, f"MODEL{head}_MAPPING").get(type(tester.get_config()), None) for head in _HEADS)
    return type(
        family,
        (ModelTesterMixin, unittest.TestCase),
        {
            "model_tester": tester,
            "all_model_classes": tuple(model for model in heads if model is not None),
            "_is_composite": tester.sees_images,
            "skip_test_image_features_output_shape": True,  # these families' towers give patches of all images in one dimension
            "skip_test_video_features_output_shape": True,
            "test_all_params_have_gradient": False,  # no token may reach an expert
        },
    )
