"""Rasterize the ten digits of the fonts that ship with matplotlib into `glyphs.npz`.

The arrays are `masks` (faces, 10, 36, 36) uint8 and `faces`, their names. Run by hand, from the
repository root: `python benchmarks/make_glyphs.py [OUT.npz]`.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib import get_data_path
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import PathPatch
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D

from bnnlib.data.drawn.glyphs import ATLAS

CELL = 36  # side of one mask in pixels
DIGIT_HEIGHT = 28.0  # height in pixels of the tallest digit of each face
FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-Oblique",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "DejaVuSerif-BoldItalic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "STIXGeneralBolIta",
    "cmr10",
    "cmb10",
    "cmss10",
    "cmtt10",
)


def font_path(face: str) -> Path:
    """Path of the font file of `face` inside the installed matplotlib."""
    return Path(get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"


def outlines(face: str) -> list:
    """Paths of the digits 0 to 9 of one face, in pixels, each centred in its cell of a strip."""
    font = FontProperties(fname=str(font_path(face)))
    paths = [TextPath((0, 0), digit, size=100, prop=font) for digit in "0123456789"]
    boxes = [path.get_extents() for path in paths]
    scale = DIGIT_HEIGHT / max(box.height for box in boxes)
    placed = []
    for cell, (path, box) in enumerate(zip(paths, boxes, strict=True)):
        centred = Affine2D().translate(-(box.x0 + box.x1) / 2, -(box.y0 + box.y1) / 2)
        centred.scale(scale).translate(CELL * (cell + 0.5), CELL / 2)
        placed.append(centred.transform_path(path))
    return placed


def rasterize(face: str) -> np.ndarray:
    """Masks (10, CELL, CELL) uint8 of the digits 0 to 9 of one face."""
    canvas = FigureCanvasAgg(Figure(figsize=(10, 1), dpi=CELL, facecolor="black"))
    for path in outlines(face):
        patch = PathPatch(path, transform=None, color="white", linewidth=0, snap=False)
        canvas.figure.add_artist(patch)
    canvas.draw()
    strip = np.asarray(canvas.buffer_rgba())[:, :, 0]  # (CELL, 10 * CELL)
    return strip.reshape(CELL, 10, CELL).swapaxes(0, 1).copy()


def make_atlas() -> tuple[np.ndarray, np.ndarray]:
    """Masks (faces, 10, CELL, CELL) uint8 of all faces, and the names of the faces."""
    return np.stack([rasterize(face) for face in FACES]), np.array(FACES)


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ATLAS
    if out.exists():
        sys.exit(f"{out} is there already: delete it first, or name another file")
    masks, faces = make_atlas()
    np.savez_compressed(out, masks=masks, faces=faces)
    print(f"wrote {out}: {len(faces)} faces, {out.stat().st_size / 1000:.0f} kB")
