"""Packed training batches: the questions of an image share its tokens.

Without packing, 64 of a sample's 80 tokens would be the image, run again for each question. In a packed row

    [start, image] [question 1, answer 1] [question 2, answer 2] ...

every question attends to the image and to itself, and its positions restart where the image ends, so that it sees
exactly what it would see alone: the logits are those of single samples up to rounding.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import ProcessorMixin

from modes_fx.demo.canvas import COLOURS, Canvas
from modes_fx.demo.data import IGNORED, Sample, conversation


@dataclass(frozen=True)
class PackedBatch:
    """One training step's input.

    Attributes:
        inputs: the model's forward inputs; `attention_mask` is bool [B, 1, S, S], `position_ids` int64 [3, B, S].
        labels: int64 [B, S], already shifted: the label at a position is the token that follows it.
        is_real: bool [B, S], False on padding.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    is_real: Tensor


class Packer:
    """Packs the samples of several canvases."""

    def __init__(self, processor: ProcessorMixin) -> None:
        """Remember the encodings of up to 100,000 questions and answers."""
        self.processor = processor
        self.image_id = processor.image_token_id
        self._encode = functools.lru_cache(maxsize=100_000)(self._encode_uncached)

    def _encode_uncached(self, question: str, answer: str) -> tuple[list[int], list[int], int]:
        """Token ids before the image, after it, and how many of the last are the answer."""
        sample = Sample(None, question, answer, "")
        template, tokenizer = self.processor.apply_chat_template, self.processor.tokenizer
        prompt = template(conversation(sample, answer=False), tokenize=False, add_generation_prompt=True)
        ids = tokenizer(template(conversation(sample), tokenize=False))["input_ids"]
        place = ids.index(self.image_id)
        return ids[:place], ids[place + 1 :], len(ids) - len(tokenizer(prompt)["input_ids"])

    def pack(self, groups: Sequence[Sequence[Sample]]) -> PackedBatch:
        """Pack B groups of samples, each group about one image."""
        images = self.processor.image_processor([group[0].image for group in groups], return_tensors="pt")
        grid = images["image_grid_thw"][0] // torch.tensor([1, *[self.processor.image_processor.merge_size] * 2])
        rows = [self._pack_row(group, grid) for group in groups]
        longest = max(row["ids"].numel() for row in rows)

        def stack(name: str, fill: int) -> Tensor:
            out = torch.full((len(rows), longest), fill)
            for target, row in zip(out, rows, strict=True):
                target[: row[name].numel()] = row[name]
            return out

        group_BS = stack("group", -1)  # padding is a group of its own: its rows must not be all masked
        same_BSS = group_BS.unsqueeze(2) == group_BS.unsqueeze(1)
        to_image_BSS = (group_BS == 0).unsqueeze(1) & (group_BS >= 0).unsqueeze(2)
        causal_SS = torch.ones(longest, longest, dtype=torch.bool).tril()
        inputs = {
            "input_ids": stack("ids", self.processor.tokenizer.pad_token_id),
            "attention_mask": ((same_BSS | to_image_BSS) & causal_SS).unsqueeze(1),
            "position_ids": torch.stack([stack(name, 0) for name in ("t", "h", "w")]),
            "pixel_values": images["pixel_values"],
            "image_grid_thw": images["image_grid_thw"],
        }
        return PackedBatch(inputs, stack("labels", IGNORED), group_BS >= 0)

    def _pack_row(self, group: Sequence[Sample], grid: Tensor) -> dict[str, Tensor]:
        """The unpadded tensors of one image and its questions; grid: its visual tokens, int64 [3]."""
        height, width = int(grid[1]), int(grid[2])
        n_visual = height * width
        ids, labels, groups, positions = [], [], [], []
        for index, sample in enumerate(group, start=1):
            before, after, n_answer = self._encode(sample.question, sample.answer)
            if index == 1:
                ids += before + [self.image_id] * n_visual
                labels += [IGNORED] * len(ids)
                groups += [0] * len(ids)
                start = len(before)
                positions += [(place, place, place) for place in range(start)]
                # M-RoPE: an image has one time step, and spans as many positions as its longer side.
                positions += [(start, start + row, start + column) for row in range(height) for column in range(width)]
                text_start = start + max(height, width)
            ids += after
            labels += [IGNORED] * (len(after) - n_answer - 1) + after[-n_answer:] + [IGNORED]
            groups += [index] * len(after)
            positions += [(text_start + place,) * 3 for place in range(len(after))]
        t, h, w = torch.tensor(positions).T
        return {
            "ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "group": torch.tensor(groups),
            "t": t,
            "h": h,
            "w": w,
        }


def visual_token_targets(canvases: Sequence[Canvas], side: int = 8) -> dict[str, Tensor]:
    """What to say of each visual token, for training the vision tower alone.

    Args:
        canvases: B canvases.
        side: visual tokens along a side, G.

    Returns:
        "digit", "colour" and "cell", int64 [B * G * G], in the order of the visual tokens: about the cell under the
        token's middle; of digits and colours, the class after the last stands for an empty cell.
    """
    colours = list(COLOURS)
    place = (2 * torch.arange(side) + 1) * 3 // (2 * side)  # the cell under each token's middle
    cell = (place.unsqueeze(1) * 3 + place).flatten()
    digit = torch.tensor([[10 if d is None else d for d in canvas.digits] for canvas in canvases])
    colour = torch.tensor([[len(colours) if c is None else colours.index(c) for c in canvas.colours] for canvas in canvases])
    return {
        "digit": digit[:, cell].flatten(),
        "colour": colour[:, cell].flatten(),
        "cell": cell.repeat(len(canvases)),
    }
