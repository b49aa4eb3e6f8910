"""Pictures in files: every mode and format of Pillow arrives upright and right, or its file is refused by name."""

from __future__ import annotations

import importlib.util
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if importlib.util.find_spec("torchvision") is None:
    pytest.skip("needs torchvision", allow_module_level=True)

from PIL import Image, ImageCms, TiffImagePlugin

from rds_fast.evaluation.other_data import load_like
from rds_fast.training import Images, data
from rds_fast.training.data.decoding import read_picture

RAMP = np.linspace(0, 1, 64).reshape(8, 8)
BYTES = np.rint(255 * RAMP).astype(np.uint8)
WORDS = np.rint(65535 * RAMP).astype(np.uint16)
COLOURS = np.stack([BYTES, BYTES[::-1], BYTES.T], -1)


def read(path: Path) -> np.ndarray:
    """(H, W, 3), bytes."""

    def pixels(image: Any) -> torch.Tensor:
        assert image.mode == "RGB"
        return torch.from_numpy(np.array(image))

    return read_picture(str(path), pixels).numpy()


def save(image: Any, name: str, **options: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        image.save(folder / name, **options)
        return folder / name

    write.__name__ = f"{image.mode} {name}"  # the test's, the same in every process
    return write


def content(name: str, held: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(held)
        return folder / name

    return write


def tags(number: int, value: int) -> Any:
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    directory[number] = value
    return directory


def tiff_of_twelve_bits() -> bytes:
    """A row of black and white, which Pillow reads and does not write."""
    entries = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 122, 277: 1, 278: 1, 279: 3}
    directory = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in entries.items())
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + struct.pack("<I", 0) + b"\x00\x0f\xff"


def png_of_two_bits(transparent: int) -> bytes:
    """A row of the four greys from black to white, of which one is declared transparent; Pillow writes none such."""

    def chunk(kind: bytes, held: bytes) -> bytes:
        return struct.pack(">I", len(held)) + kind + held + struct.pack(">I", zlib.crc32(kind + held))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 1, 2, 0, 0, 0, 0)) + chunk(b"tRNS", struct.pack(">H", transparent))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0\x1b")) + chunk(b"IEND", b"")


GREY = Image.fromarray(BYTES)
WORD = Image.fromarray(WORDS)
BIG_ENDIAN = Image.frombytes("I;16B", (8, 8), WORDS.astype(">u2").tobytes())
LAB = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
WRITES_YCBCR = pytest.mark.skipif(int(Image.__version__.partition(".")[0]) < 13, reason="writes it, and not whole")


@pytest.mark.parametrize(
    "write",
    [
        *(save(GREY, f"0.{ending}") for ending in ("png", "tif", "gif", "bmp", "jfif", "jpe", "pgm")),
        save(GREY.convert("LA"), "0.png"),
        save(GREY.convert("RGBA"), "0.webp", lossless=True),
        save(GREY.convert("CMYK"), "0.tif"),
        save(GREY.quantize(64), "0.png"),
        save(GREY.quantize(64).convert("PA"), "0.tif"),
        *(save(WORD, f"0.{ending}") for ending in ("png", "tif", "pgm", "jp2")),
        save(WORD, "0.tif", compression="tiff_lzw"),
        save(BIG_ENDIAN, "0.tif"),
        save(BIG_ENDIAN, "0.tif", compression="tiff_lzw"),
        save(BIG_ENDIAN, "0.png"),
        save(Image.fromarray(65535 - WORDS), "0.tif", tiffinfo=tags(262, 0)),  # counted from white to black
        content("0.pgm", b"P5\n8 8\n4095\n" + np.rint(4095 * RAMP).astype(">u2").tobytes()),
        save(Image.fromarray(RAMP.astype(np.float32)), "0.tif"),
        save(Image.fromarray(RAMP.astype(np.float32)), "0.pfm"),
    ],
)
def test_a_ramp_of_grey_arrives_in_every_mode(write: Callable[[Path], Path], tmp_path: Path) -> None:
    pixels = read(write(tmp_path))
    assert np.abs(pixels.astype(int) - BYTES[..., None]).max() <= 3  # JPEG's and the palette's rounding


@pytest.mark.parametrize(
    ("write", "tolerance"),
    [
        (save(Image.fromarray(COLOURS), "0.png"), 0),
        (save(Image.fromarray(COLOURS).convert("CMYK"), "0.jpg", quality=100, subsampling=0), 2),
        pytest.param(save(Image.fromarray(COLOURS).convert("YCbCr"), "0.tif"), 3, marks=WRITES_YCBCR),
        (save(ImageCms.applyTransform(Image.fromarray(COLOURS), LAB), "0.tif"), 20),  # 256 levels of each of its axes
    ],
    ids=["RGB", "CMYK", "YCbCr", "LAB"],
)
def test_colours_arrive(write: Callable[[Path], Path], tolerance: int, tmp_path: Path) -> None:
    assert np.abs(read(write(tmp_path)).astype(int) - COLOURS).max() <= tolerance


def test_twelve_bits_arrive(tmp_path: Path) -> None:
    assert read(content("0.tif", tiff_of_twelve_bits())(tmp_path))[0, :, 1].tolist() == [0, 255]


def test_black_and_white(tmp_path: Path) -> None:
    pixels = read(save(Image.fromarray(BYTES > 127), "0.png")(tmp_path))
    assert np.array_equal(pixels[..., 1], np.where(BYTES > 127, 255, 0))


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (Image.fromarray(np.array([[[9, 9, 9, 255], [9, 9, 9, 0], [0, 0, 255, 51]]], np.uint8)), {}, [9, 255, 204]),
        (Image.fromarray(np.array([[0, 100, 200]], np.uint8)), {"transparency": 100}, [0, 255, 200]),
        (Image.fromarray(np.array([[0, 257, 51400]], np.uint16)), {"transparency": 257}, [0, 255, 200]),
        (Image.fromarray(np.array([[[1, 1, 1], [9, 8, 7]]], np.uint8)), {"transparency": (9, 8, 7)}, [1, 255]),
        (Image.fromarray(np.array([[0, 255]], np.uint8)).quantize(2), {"transparency": b"\x80\x80"}, [127, 255]),
    ],
    ids=["RGBA", "L", "I;16", "RGB", "P"],
)
def test_what_is_transparent_is_on_white(
    image: Any, options: dict[str, Any], expected: list[int], tmp_path: Path
) -> None:
    assert read(save(image, "0.png", **options)(tmp_path))[0, :, 0].tolist() == expected


def test_a_grey_of_two_bits_may_be_transparent(tmp_path: Path) -> None:
    assert read(content("0.png", png_of_two_bits(1))(tmp_path))[0, :, 0].tolist() == [0, 255, 170, 255]


# How a picture lies in its file, for each orientation that EXIF gives it.
LYING = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
UPRIGHT = np.zeros((32, 24, 3), np.uint8)
UPRIGHT[:16, :12], UPRIGHT[:16, 12:], UPRIGHT[16:, :12] = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.mark.parametrize("orientation", LYING)
@pytest.mark.parametrize(
    ("ending", "options"),
    [
        ("jpg", {"subsampling": 0}),
        ("png", {}),
        ("webp", {"lossless": True}),
        ("tif", {}),
        ("tif", {"compression": "tiff_lzw"}),
    ],
    ids=["JPEG", "PNG", "WebP", "TIFF", "compressed TIFF"],
)
def test_pictures_are_upright(ending: str, options: dict[str, Any], orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    lying = Image.fromarray(UPRIGHT).transpose(LYING[orientation])
    pixels = read(save(lying, f"0.{ending}", exif=exif, **options)(tmp_path))
    assert pixels.shape == UPRIGHT.shape
    assert np.abs(pixels.astype(int) - UPRIGHT).max() < 60  # as JPEG leaves it at the edges


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "F"])
def test_a_tiff_of_every_mode_is_upright(mode: str, compression: str | None, tmp_path: Path) -> None:
    """Pillow 13 maps the uncompressed ones of most modes into memory, in rows of the turned picture's width."""
    exif = Image.Exif()
    exif[0x0112] = 6
    images = {"I;16": WORD, "F": Image.fromarray(RAMP.astype(np.float32))}
    upright = images.get(mode, GREY.convert(mode if mode in ("L", "RGBA", "CMYK") else "L")).crop((0, 0, 6, 8))
    if mode == "P":
        upright = upright.quantize(64)
    path = save(upright.transpose(LYING[6]), "0.tif", exif=exif, compression=compression)(tmp_path)
    assert np.abs(read(path).astype(int) - BYTES[:, :6, None]).max() <= 1


def test_an_orientation_may_stand_in_xmp(tmp_path: Path) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    lying = Image.fromarray(UPRIGHT).transpose(LYING[6])
    assert read(save(lying, "0.jpg", xmp=xmp)(tmp_path)).shape == UPRIGHT.shape


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0"])
def test_damaged_exif_data_leave_the_picture_as_it_lies(exif: bytes, tmp_path: Path) -> None:
    """And nothing is said: many a photograph of ImageNet has such."""
    assert read(save(Image.fromarray(UPRIGHT), "0.jpg", exif=exif)(tmp_path)).shape == UPRIGHT.shape


# A header alone, which promises 100,000×100,000 pixels.
HUGE = content("scan.bmp", struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 54, 0, 0, 54, 40, *[100_000] * 2, 1, 24, *[0] * 6))
FLOATS = Image.fromarray((255 * RAMP).astype(np.float32))
NAN = Image.fromarray(np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32))
WHOLE = Image.fromarray(WORDS.astype(np.int32))
CUT = ("jpg", "png", "gif", "tif", "webp", "bmp", "jp2", "ppm")


def cut(name: str, kept: float) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
        path = save(Image.fromarray(noise), name)(folder)
        path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
        return path

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (save(FLOATS, "0.tif"), r"its values are floating-point numbers from 0\.0 to 255\.0; expected \[0, 1\]\)"),
        (save(NAN, "0.tif"), "floating-point numbers from nan to nan; expected"),
        (save(WHOLE, "0.tif"), r"its values are integers \(Pillow's mode I\), and nothing says which of them is white"),
        (save(GREY, "0.tif", tiffinfo=tags(339, 2)), r"its values are integers \(Pillow's mode L\), and nothing"),
        (HUGE, r"Image size \(10000000000 pixels\) exceeds.*\); scale it down"),
        *((cut(f"0.{ending}", 0.6), "; replace") for ending in CUT),
        (cut("0.jpg", 0), "cannot identify image file"),
    ],
    ids=["floats", "NaN", "whole numbers", "with sign", "too large", *CUT, "empty"],
)
def test_what_is_refused_is_named(write: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        read(path)
    assert str(raised.value).startswith(f"{path} cannot be read as an image (")
    assert str(raised.value).endswith(" or remove it")


@pytest.mark.parametrize("error", [MemoryError(), IndexError("index"), RuntimeError("decoder")], ids=repr)
def test_whatever_a_decoder_raises_is_named(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(GREY, "0.png")(tmp_path)

    def fail(image: Any) -> None:
        raise error

    monkeypatch.setattr(Image.Image, "convert", lambda *_: fail(None))
    with pytest.raises(ValueError, match=rf"0\.png cannot be read as an image \({str(error) or 'MemoryError'}\)"):
        read(path)


def folder_of(root: Path, write: Callable[[Path], Path]) -> Path:
    """Two classes of one picture each, in two splits."""
    for split in ("train", "val"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            write(root / split / name)
    return root


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("augment", ["none", "resized-crop-flip"])
@pytest.mark.parametrize("workers", [0, 1])
def test_workers_name_what_is_too_large(workers: int, augment: str, tmp_path: Path) -> None:
    root = folder_of(tmp_path, HUGE)
    training = data.load("imagefolder", root, image_size=8, workers=workers).train
    with pytest.raises(ValueError, match=r"train/a/scan\.bmp cannot be read as an image \(.*\); scale it") as raised:
        next(training.batches([data.Batch(torch.arange(2))], data.named_augmentation(augment, 0)))
    assert "Traceback" not in str(raised.value)


def test_readers_and_other_data_read_sixteen_bits(tmp_path: Path) -> None:
    root = folder_of(tmp_path, save(WORD, "0.png"))
    taken = data.load("imagefolder", root, image_size=8, workers=0).validation.take(torch.arange(2))
    expected = taken.images.float().mean()
    assert 0.4 < expected / 255 < 0.6
    reference = Images(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64))
    assert float(load_like(f"imagefolder={root}", reference, 2, 0).images.mean()) == pytest.approx(expected / 255)
