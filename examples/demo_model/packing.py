"""Packed training batches: the questions about some images share their tokens.

Without packing, most of a sample's tokens would be its images', run again for each question. In a packed row

    [start, images] [question 1, answer 1] [question 2, answer 2] ...

every question attends to the images and to itself, and its positions restart where the images end, so that it sees
exactly what it would see alone: the logits are those of single samples up to rounding.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from demo_model.jobs.job import Asked
from torch import Tensor, nn
from transformers import ProcessorMixin

from modes_fx.data import Sample, make_batches
from modes_fx.demo.canvas import COLOURS, Canvas
from modes_fx.demo.data import IGNORED

_HIDDEN = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class PackedBatch:
    """One training step's input.

    Attributes:
        inputs: the model's forward inputs; `attention_mask` is [B, 1, S, S], bool or, for eager attention, float32 to be
            added to the scores, `position_ids` int64 [B, S], or [3, B, S] where visual tokens have rows and columns (M-RoPE).
        labels: int64 [B, S], already shifted: the label at a position is the token that follows it.
        is_real: bool [B, S], False on padding.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    is_real: Tensor


@dataclass(frozen=True)
class _Prefix:
    """What all questions about images share: token ids, int64 [P], and positions, int64 [D, P]."""

    ids: Tensor
    positions: Tensor


class Packer:
    """Packs groups of questions, each group about the same images."""

    def __init__(self, model: nn.Module, processor: ProcessorMixin) -> None:
        """Remember the encodings of up to 100,000 questions and answers."""
        self.model = model
        self.processor = processor
        self.image_id = processor.image_token_id
        self._adds = model.model.language_model.config._attn_implementation != "sdpa"
        self._encode = functools.lru_cache(maxsize=100_000)(self._encode_uncached)
        self._prefixes: dict[int, _Prefix] = {}

    def pack(self, groups: Sequence[Sequence[Asked]]) -> PackedBatch:
        """Pack B groups; all have equally many images, of one size."""
        images = self.processor.image_processor([each for group in groups for each in group[0].images], return_tensors="pt")
        rows = [self._pack_row(group) for group in groups]
        longest = max(row["ids"].numel() for row in rows)

        def stack(name: str, fill: int) -> Tensor:
            out = torch.full((len(rows), *rows[0][name].shape[:-1], longest), fill)
            for target, row in zip(out, rows, strict=True):
                target[..., : row[name].shape[-1]] = row[name]
            return out

        group_BS = stack("group", -1)  # padding is a group of its own: its rows must not be all masked
        same_BSS = group_BS.unsqueeze(2) == group_BS.unsqueeze(1)
        to_image_BSS = (group_BS == 0).unsqueeze(1) & (group_BS >= 0).unsqueeze(2)
        causal_SS = torch.ones(longest, longest, dtype=torch.bool).tril()
        seen_B1SS = ((same_BSS | to_image_BSS) & causal_SS).unsqueeze(1)
        positions_DBS = stack("positions", 0).transpose(0, 1)
        inputs = {
            "input_ids": stack("ids", self.processor.tokenizer.pad_token_id),
            "attention_mask": torch.zeros(seen_B1SS.shape).masked_fill(~seen_B1SS, _HIDDEN) if self._adds else seen_B1SS,
            "position_ids": positions_DBS if len(positions_DBS) > 1 else positions_DBS[0],
            **{name: images[name] for name in ("pixel_values", "image_grid_thw") if name in images},
        }
        return PackedBatch(inputs, stack("labels", IGNORED), group_BS >= 0)

    def _pack_row(self, group: Sequence[Asked]) -> dict[str, Tensor]:
        """The unpadded tensors of some images and the questions about them."""
        prefix = self._prefix_of(group[0])
        start = int(prefix.positions.max()) + 1
        ids, positions = [prefix.ids], [prefix.positions]
        labels, groups = [torch.full_like(prefix.ids, IGNORED)], [torch.zeros_like(prefix.ids)]
        for index, asked in enumerate(group, start=1):
            after, n_answer = self._encode(asked.question, asked.answer, len(asked.images))
            ids.append(after)
            labels.append(
                torch.cat((torch.full((len(after) - n_answer - 1,), IGNORED), after[-n_answer:], torch.tensor([IGNORED])))
            )
            groups.append(torch.full_like(after, index))
            positions.append((start + torch.arange(len(after))).expand(len(prefix.positions), -1))
        rows = {"ids": ids, "labels": labels, "group": groups, "positions": positions}
        return {name: torch.cat(parts, dim=-1) for name, parts in rows.items()}

    def _encode_uncached(self, question: str, answer: str, n_images: int) -> tuple[Tensor, int]:
        """Token ids after the images, and how many of the last are the answer."""
        template, tokenizer = self.processor.apply_chat_template, self.processor.tokenizer
        content = [*[{"type": "image"}] * n_images, {"type": "text", "text": question}]
        asked = [{"role": "user", "content": content}]
        answered = [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        prompt = template(asked, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(template(answered, tokenize=False))["input_ids"]
        place = len(ids) - ids[::-1].index(self.image_id)  # of the last image's placeholder
        return torch.tensor(ids[place:]), len(ids) - len(tokenizer(prompt)["input_ids"])

    def _prefix_of(self, asked: Asked) -> _Prefix:
        """The tokens up to the end of the images' own, and their positions, which all groups have in common."""
        if len(asked.images) not in self._prefixes:
            (batch,) = make_batches([Sample("0", asked.question, asked.answer, asked.images)], self.processor, 1)
            after, _ = self._encode(asked.question, asked.answer, len(asked.images))
            end = batch["input_ids"].shape[1] - len(after)
            positions = self._positions(batch)[:, :end]
            self._prefixes[len(asked.images)] = _Prefix(batch["input_ids"][0, :end], positions)
        return self._prefixes[len(asked.images)]

    def _positions(self, batch: dict[str, Any]) -> Tensor:
        """The positions of a batch of one sample, int64 [D, S], as the model would count them."""
        inner = self.model.model
        if not hasattr(inner, "get_rope_index"):
            return torch.arange(batch["input_ids"].shape[1]).unsqueeze(0)
        positions_3BS, _ = inner.get_rope_index(
            batch["input_ids"], batch["mm_token_type_ids"], image_grid_thw=batch["image_grid_thw"]
        )
        return positions_3BS[:, 0]


def visual_token_targets(canvases: Sequence[Canvas], places: Sequence[int], side: int = 8) -> dict[str, Tensor]:
    """What to say of each visual token, for training the vision tower alone.

    Args:
        canvases: B canvases.
        places: which of a sample's pictures each is.
        side: visual tokens along a side, G.

    Returns:
        "digit", "colour" and "cell", int64 [B * G * G], in the order of the visual tokens: about the cell under the
        token's middle, counted on from picture to picture; of digits and colours, the class after the last stands for an
        empty cell.
    """
    colours = list(COLOURS)
    place = (2 * torch.arange(side) + 1) * 3 // (2 * side)  # the cell under each token's middle
    cell = (place.unsqueeze(1) * 3 + place).flatten()
    digit = torch.tensor([[10 if d is None else d for d in canvas.digits] for canvas in canvases])
    colour = torch.tensor([[len(colours) if c is None else colours.index(c) for c in canvas.colours] for canvas in canvases])
    return {
        "digit": digit[:, cell].flatten(),
        "colour": colour[:, cell].flatten(),
        "cell": torch.cat([cell + 9 * place for place in places]),
    }
