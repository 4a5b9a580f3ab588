"""From a file to pixels in RGB, upright, whatever the file is; and which of what goes wrong is the file's fault."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EACCES, EINVAL, EISDIR, ELOOP, ENAMETOOLONG, ENOENT, ENOTDIR, EPERM
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .errors import InputError

# What the system says about one file (Pillow: nothing). All else is about the machine: the next image would fare alike.
OF_THE_FILE = {None, EACCES, EINVAL, EISDIR, ELOOP, ENAMETOOLONG, ENOENT, ENOTDIR, EPERM}
# Markers in a JPEG of what may come before its frame: JFIF, profile and others, tables, comment. Not 0xE1, Exif or XMP.
BEFORE_FRAME = {0xE0, *range(0xE2, 0xF0), 0xC4, 0xDB, 0xDD, 0xFE}


class BrokenImage(InputError):
    """An image that cannot be decoded, or was removed; the message says which and why."""


def read_image(path: str | Path) -> Image.Image:
    """The image file in RGB, upright. Raises BrokenImage with the path and the reason, if the file is to blame."""
    with _reading(path), Image.open(path) as image:
        return _upright(image)


def read_pixels(path: str | Path) -> Tensor:
    """The same as uint8 (3, H, W), with the channels of a pixel side by side in memory.

    Ordinary JPEG files go to torchvision's decoder, which gives the same bytes: 0.7 ms for 500 x 375 where Pillow takes
    1.2, and 0.4 to hand them over. What it cannot decode Pillow judges, and Pillow decodes all where it is missing:
    since 0.29 torchvision calls it deprecated, in favour of TorchCodec.
    """
    with _reading(path):
        data = bytearray(Path(path).read_bytes())
        if _ordinary_jpeg(data):
            with suppress(ImportError, RuntimeError, DeprecationWarning):
                from torchvision.io import decode_jpeg
                return decode_jpeg(torch.frombuffer(data, dtype=torch.uint8))
        with Image.open(io.BytesIO(data)) as image:
            return pixels(_upright(image))


def _ordinary_jpeg(data: bytearray) -> bool:
    """Whether these are the bytes of a JPEG of three colours that says nothing about how the camera was held. Pillow
    would find that out too, in 0.13 ms."""
    place = 2
    while data.startswith(b"\xff\xd8") and place + 10 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker in (0xC0, 0xC1, 0xC2):  # the frame, baseline or progressive: bits, height, width, colours
            height, width = (int.from_bytes(data[place + i:place + i + 2]) for i in (5, 7))
            return data[place + 4] == 8 and data[place + 9] == 3 and height * width < Image.MAX_IMAGE_PIXELS
        if marker not in BEFORE_FRAME:
            return False
        place += 2 + int.from_bytes(data[place + 2:place + 4])
    return False


def pixels(image: Image.Image) -> Tensor:
    """RGB as uint8 (3, H, W), with the channels of a pixel side by side in memory: so torch resizes fastest."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image in RGB: transparency on white, 16 bits scaled to 8, floats stretched from min to max."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        low, high = (values.min(), values.max()) if image.mode == "F" else (0, 65535)
        values = (values - low) / max(high - low, 1e-12) * 255
        image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return to_rgb(image)


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Errors inside are told as a BrokenImage where the file is to blame for them."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # on damaged files Pillow raises OSError, SyntaxError, ValueError and others
        number = error.errno if isinstance(error, OSError) else None
        if number not in OF_THE_FILE:
            error.filename = error.filename or str(path)  # reading, unlike opening, does not say from where
            raise
        if number and not os.path.isdir(os.path.dirname(path) or "."):
            raise InputError(f"No image can be decoded from {path}: bring back its folder, or its disk.") from error
        reason = "it is no image, or a damaged one" if isinstance(error, UnidentifiedImageError) else error
        raise BrokenImage(f"Cannot read image {path}: {reason}") from error
