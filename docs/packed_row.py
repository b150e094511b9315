"""Draws docs/packed_row.svg: a packed row of two pairs, and who attends to whom in it.

    python docs/packed_row.py

The row comes from `pack` and the squares from `may_attend`: the picture shows what is computed.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from notus.data.packing import pack
from notus.data.token_arrays import TokenizedPairs
from notus.model.attention import may_attend

LENGTHS = np.array([[5, 4, 4], [4, 4, 4]])  # prompt, chosen, rejected of two pairs
NAMES = ("prompt", "chosen", "rejected")
COLOURS = ("#7a8ca6", "#2f9e6e", "#d9704a")
CELL, LEFT, TOP = 17, 90, 64


def picture() -> str:
    """The picture as SVG text, readable on a light and on a dark page."""
    slots = int(LENGTHS.sum())
    tokens = np.zeros(slots, np.int32)
    pairs = TokenizedPairs(tokens, np.zeros(slots, bool), LENGTHS)
    layout = pack(pairs, range(len(LENGTHS)), slots, prefix_sharing=True).layout
    index = torch.arange(slots)
    sees = may_attend(layout, index[:, None], index[None, :], None)
    kinds = np.repeat(np.tile(np.arange(3), len(LENGTHS)), LENGTHS.flatten())
    bounds = [0, *np.cumsum(LENGTHS.flatten()).tolist()]

    width, height = LEFT + slots * CELL + 8, TOP + slots * CELL + 40
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="12" '
        'role="img" aria-label="A packed row of two pairs and the attention between its slots">',
        "<style>text{fill:#57606a}@media(prefers-color-scheme:dark){text{fill:#b6c2cf}}</style>",
        f'<text x="{LEFT}" y="14">keys: one packed row, every prompt once</text>',
    ]
    for part, (start, end) in enumerate(pairwise(bounds)):
        kind, middle = part % 3, CELL * (start + end) / 2
        size = CELL * (end - start)
        out += [
            f'<rect x="{LEFT + CELL * start}" y="{TOP - 22}" width="{size - 2}" height="14" '
            f'rx="3" fill="{COLOURS[kind]}"/>',
            f'<text x="{LEFT + middle}" y="{TOP - 28}" text-anchor="middle">{NAMES[kind]}</text>',
            f'<rect x="{LEFT - 22}" y="{TOP + CELL * start}" width="14" height="{size - 2}" '
            f'rx="3" fill="{COLOURS[kind]}"/>',
            f'<text x="{LEFT - 28}" y="{TOP + middle + 4}" text-anchor="end">{NAMES[kind]}</text>',
        ]
    for query in range(slots):
        for key in range(slots):
            seen = bool(sees[query, key])
            colour = COLOURS[kinds[key]] if seen else "#8c959f"
            out.append(
                f'<rect x="{LEFT + CELL * key}" y="{TOP + CELL * query}" width="{CELL - 2}" '
                f'height="{CELL - 2}" rx="2" fill="{colour}" opacity="{1 if seen else 0.15}"/>'
            )
    out.append(
        f'<text x="8" y="{TOP + slots * CELL + 24}">A response sees its prompt and itself, '
        "never the other response.</text>"
    )
    return "\n".join([*out, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(picture())
