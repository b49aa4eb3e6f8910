"""One file as one picture: upright, in 8-bit RGB, or refused with its name. Every reader opens its images here."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from ..extras import require

PURPOSE = "a data set of image files"

# From a Pillow image in RGB to bytes (3, H, W).
Transform = Callable[[Any], Tensor]

_ORIENTATION = 0x0112  # the tag of EXIF that says how the camera was held
# Formats whose grey values of 16 bits, or 32 that hold 16, use the whole range from black to white.
_SIXTEEN_BITS = {"I;16": ("JPEG2000", "PNG", "PPM", "TIFF"), "I": ("PNG", "PPM")}
_PHOTOMETRIC, _BITS, _SAMPLES = 262, 258, 339  # tags of TIFF; the last is 2 for integers with sign


def read_picture(path: str, transform: Transform) -> Tensor:
    """What a transform makes of the picture in a file; of several pictures in one file, of the first.

    The picture is as a viewer shows it: turned and mirrored as its EXIF data say, and on white where it is transparent.
    Grey of 16 bits is scaled from [0, 65535], grey of floating-point numbers from [0, 1]. Where nothing says which
    number is white (integers of 32 bits or with sign, numbers outside [0, 1]) the file is refused.

    Raises:
        ValueError: there is no such picture in the file; the message names it.
        ImportError: Pillow is not installed.
    """
    pillow = require("PIL.Image", PURPOSE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF data, say: they do not name the file
            with pillow.open(path) as image:
                image.filename = ""  # with a name Pillow maps the file, and scrambles a TIFF that it turns
                _scale_transparency(image)
                image.load()  # before the EXIF data: PNG may have them at its end, and TIFF is turned by the loading
                return transform(_upright(_in_colour(image, pillow), _orientation(image), pillow))
    except ImportError:
        raise
    except Exception as error:  # each format has its own, such as OSError, SyntaxError, struct.error and MemoryError
        too_large = isinstance(error, (pillow.DecompressionBombError, MemoryError))
        remedy = "scale it down" if too_large else "replace"
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path} cannot be read as an image ({reason}); {remedy} or remove it") from error


def _in_colour(image: Any, pillow: Any) -> Any:
    """The picture in RGB, on white where it is transparent."""
    transparent = image.has_transparency_data
    if image.mode[0] in "IF" or 2 in getattr(image, "tag_v2", {}).get(_SAMPLES, ()):
        image = _eight_bits(image, pillow)
    if not transparent:
        return image.convert("RGB")
    background = pillow.new("RGBA", image.size, "white")
    return pillow.alpha_composite(background, image.convert("RGBA")).convert("RGB")


def _eight_bits(image: Any, pillow: Any) -> Any:
    """Grey values of more bits as bytes, with an opacity where one of them is declared transparent."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode == "F":
        if not (values.min() >= 0 and values.max() <= 1):  # NaN is neither
            raise ValueError(
                f"its values are floating-point numbers from {values.min()} to {values.max()}; expected [0, 1]"
            )
        white = 1.0
    elif image.format in _SIXTEEN_BITS.get(image.mode[:4], ()):
        white = 2.0 ** tags.get(_BITS, (16,))[0] - 1
    else:
        raise ValueError(
            f"its values are integers (Pillow's mode {image.mode}), and nothing says which of them is white; save it "
            "as a PNG or TIFF of 8 or 16 bits without sign, or as a TIFF of floating-point numbers from 0 to 1"
        )
    scaled = np.rint(values * np.float32(255 / white)).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:  # TIFF may count from white to black
        scaled = 255 - scaled
    grey = pillow.fromarray(scaled)
    if "transparency" in image.info:
        opacity = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
        grey.putalpha(pillow.fromarray(opacity))
    return grey


def _scale_transparency(image: Any) -> None:
    """Bring the grey that a PNG of 2 or 4 bits declares transparent to 8 bits, as Pillow does its pixels."""
    if image.format == "PNG" and image.tile and "transparency" in image.info:
        image.info["transparency"] *= {"L;2": 255 // 3, "L;4": 255 // 15}.get(image.tile[0][3], 1)


def _orientation(image: Any) -> Any:
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # damaged EXIF data, in a file whose picture is whole
        return None


def _upright(image: Any, orientation: Any, pillow: Any) -> Any:
    """The picture as the camera saw it; 1 and what EXIF does not define leave it as it is."""
    turns = pillow.Transpose
    turned = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_270,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_90,
    }.get(orientation)
    return image if turned is None else image.transpose(turned)
