"""Learning curves as text, for terminals: a character is 2 x 4 dots of Braille, or a star where there is none."""

import shutil
import sys
from typing import Any

import numpy as np

# The bit of each dot of a Braille character, by its row and column.
_BITS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])


def show(title: str, steps: Any, values: Any) -> None:
    """Prints a curve (see `draw`) as wide as the terminal, within reason, and in Braille if its encoding has that."""
    columns = min(max(shutil.get_terminal_size().columns - 1, 20), 100)
    try:
        "\u2800".encode(sys.stdout.encoding or "ascii")
        braille = True
    except UnicodeEncodeError:
        braille = False
    print(draw(title, steps, values, columns, braille=braille), flush=True)


def draw(title: str, steps: Any, values: Any, columns: int = 72, height: int = 8, braille: bool = True) -> str:
    """A curve of `values` [N] over environment `steps` [N] as lines of text, at most `columns` characters each.

    Values that are not finite are left out; what falls into one column of dots is averaged.
    """
    steps, values = (np.asarray(x, float) for x in (steps, values))
    steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
    if not values.size:
        return f"{title}: no values yet"
    low, high = values.min(), values.max()
    labels = [f"{high:.4g}", f"{low:.4g}"]
    margin = max(map(len, labels)) + 1
    dots, rows = 2 * max(columns - margin - 1, 10), 4 * height
    places = np.minimum((dots * (steps - steps[0]) / max(np.ptp(steps), 1e-9)).astype(int), dots - 1)
    filled = np.unique(places)
    means = np.array([values[places == place].mean() for place in filled])
    heights = np.interp(np.arange(filled[-1] + 1), filled, means)
    tops = (
        np.round((rows - 1) * (high - heights) / (high - low)).astype(int) if high > low else [rows // 2] * len(heights)
    )
    cells, before = np.zeros((height, dots // 2), int), tops[0]
    for column, row in enumerate(tops):
        for dot in range(min(before, row), max(before, row) + 1):  # Steep parts have no gaps.
            cells[dot // 4, column // 2] |= _BITS[dot % 4, column % 2]
        before = row
    drawn = lambda bits: chr(0x2800 + bits) if braille else " *"[int(bits > 0)]
    edge = {0: labels[0], height - 1: labels[1]}
    lines = [f"{edge.get(n, ''):>{margin - 1}} |{''.join(map(drawn, line))}" for n, line in enumerate(cells)]
    first, last = f"{steps[0]:,.0f}", f" {steps[-1]:,.0f} steps"
    return "\n".join([title, *lines, f"{' ' * margin}{first}{last:>{max(dots // 2 + 1 - len(first), 0)}}"])
