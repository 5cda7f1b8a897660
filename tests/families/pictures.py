"""Batches of text with pictures, in the form that each family takes: real placeholder tokens, padding, noise as pixels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.families.shrink import VOCABULARY

AUDIO, IMAGE, VIDEO, START, END = range(VOCABULARY - 5, VOCABULARY)
PICTURES = 2

Inputs = Callable[[], dict[str, Tensor]]


def captioned(tokens: int) -> dict[str, Tensor]:
    """Return two sequences of different length, each with a picture of ``tokens`` placeholders, padded on the left."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for before, after in ((2, 4), (1, 1)):
        text = torch.randint(2, AUDIO, (before + after,), generator=generator).tolist()
        rows.append([*text[:before], START, *[IMAGE] * tokens, END, *text[before:]])
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    }


def noise(*shape: int) -> Tensor:
    """Return pixels."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def whole(size: int, tokens: int, **more: Any) -> Inputs:
    """Each picture is one square of ``size`` pixels, and takes ``tokens`` placeholders."""
    return lambda: {**captioned(tokens), "pixel_values": noise(PICTURES, 3, size, size), **more}


def sized() -> dict[str, Tensor]:
    """Whole pictures with their sizes, for Pixtral's tower."""
    return {**whole(16, 4)(), "image_sizes": torch.tensor([[16, 16]] * PICTURES)}


def patches(*shape: int, grid: tuple[int, ...] = (1, 4, 4), named: str = "image_grid_thw", types: bool = False) -> Inputs:
    """The patches of all pictures in one tensor, each of ``shape``; a picture of ``grid`` takes 4 placeholders.

    Args:
        shape: Of one patch.
        grid: Frames, rows and columns of patches in a picture.
        named: The argument that the grid goes by.
        types: Whether the forward takes ``mm_token_type_ids`` too.
    """

    def inputs() -> dict[str, Tensor]:
        batch = captioned(4)
        count = PICTURES * int(torch.tensor(grid).prod())
        batch |= {"pixel_values": noise(count, *shape), named: torch.tensor([grid] * PICTURES)}
        return batch | ({"mm_token_type_ids": (batch["input_ids"] == IMAGE).long()} if types else {})

    return inputs


def folded() -> dict[str, Tensor]:
    """One block of two frames of 4 x 4 pixels a placeholder, for Inkling."""
    return {**captioned(4), "pixel_values": noise(4 * PICTURES, 2, 4, 4, 3)}


def shaped() -> dict[str, Tensor]:
    """Patches of each picture apart, with its shape and a mask, for SigLIP 2's tower."""
    return {
        **captioned(4),
        "pixel_values": noise(PICTURES, 16, 48),
        "spatial_shapes": torch.tensor([[4, 4]] * PICTURES),
        "pixel_attention_mask": torch.ones(PICTURES, 16, dtype=torch.int64),
    }


def placed() -> dict[str, Tensor]:
    """Patches of each picture apart, with the position of each, for Gemma 4's tower."""
    batch = captioned(4)
    positions = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(1)
    return {
        **batch,
        "pixel_values": noise(PICTURES, 16, 48).sigmoid(),
        "image_position_ids": positions.repeat(PICTURES, 1, 1),
        "mm_token_type_ids": (batch["input_ids"] == IMAGE).long(),
    }


def with_canvas() -> dict[str, Tensor]:
    """A prompt like Gemma 4's and six tokens to be refined, for a block diffusion decoder."""
    canvas = torch.randint(2, AUDIO, (PICTURES, 6), generator=torch.Generator().manual_seed(2))
    batch = placed()
    seen = torch.cat([batch["attention_mask"], torch.ones_like(canvas)], dim=1)
    return {**batch, "decoder_input_ids": canvas, "decoder_attention_mask": seen}


def grouped() -> dict[str, Tensor]:
    """Each token goes to the experts of its modality; a picture's start and end belong to the picture, for ERNIE 4.5 VL."""
    batch = patches(48, types=True)()
    ids = batch["input_ids"]
    return {**batch, "moe_mm_token_type_ids": ((ids == IMAGE) | (ids == START) | (ids == END)).int()}
