"""Static figures. Each is a function from data to a matplotlib Figure, with a line of text that says what it shows.

Nothing here needs a display. The interactive twins are in widgets.py.
"""

from .base import COLORS, MARKERS, STYLES, grid, lines, picture, views_grid
from .features import codes, confusion, dictionary, embedding, embeddings, matches, neighbours, similarities
from .holes import MASKED, amplitude, film, latents, masked, painting, psnr, reconstructions, side_by_side, spectra
from .protocols import (
    against,
    ap_bars,
    class_gain,
    class_lines,
    depths,
    frames,
    margins,
    pairs,
    precision_recall,
    spread,
    things,
)
from .runs import PANEL, accuracy_bars, collapse_panel, curves
