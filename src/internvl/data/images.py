"""One picture: opened safely as RGB, padded, compressed, normalised. Cutting into tiles is tiling.py's."""

from __future__ import annotations

import base64
import binascii
import io
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from internvl.data.threads import spread, threads_for

Scheme = Literal["imagenet", "clip", "siglip"]
Source = str | Path | bytes | Image.Image | np.ndarray

MAX_PIXELS = 89_478_485
"""Pillow's own bound against decompression bombs: a quarter of a gigabyte of RGB."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000")
"""Pillow reads more: of some it starts another program (PostScript), others are read by rarely tried code."""
JPEG_QUALITIES = (75, 100)
"""Lowest and highest quality of the training augmentation (official dataset.py; paper 2.5, section 4.1)."""

# Official internvl/train/constants.py: mean, standard deviation.
STATISTICS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.4814546, 0.4578275, 0.40821073), (0.2686295, 0.2613025, 0.2757711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's decoders raise on broken bytes.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class Limits:
    """What a picture may cost."""

    pixels: int = MAX_PIXELS
    """Width times height, checked in the header before anything is decoded."""


DEFAULT_LIMITS = Limits()


def open_image(source: Source, limits: Limits = DEFAULT_LIMITS) -> Image.Image:
    """A picture as RGB: turned upright by its EXIF, the first frame of an animation, alpha dropped as officially."""
    if isinstance(source, np.ndarray):
        return _from_array(source, limits)
    if isinstance(source, Image.Image):
        _check_pixels(source, "picture", limits)
        return _to_rgb(source, "picture")
    name = _name(source)
    with _open(source, name) as image:
        _check_pixels(image, name, limits)
        return _to_rgb(image, name)


def header_size(source: Source, limits: Limits | None = None) -> tuple[int, int]:
    """Width and height after the EXIF turn, from the header alone; with `limits`, refused where opening would be."""
    if isinstance(source, np.ndarray):
        return source.shape[1], source.shape[0]
    if isinstance(source, Image.Image):
        return _upright_size(source)
    name = _name(source)
    with _open(source, name) as image:
        if limits is not None:
            _check_pixels(image, name, limits)
        return _upright_size(image)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if _orientation(image) >= 5 else (width, height)


def _name(source: str | Path | bytes) -> str:
    if isinstance(source, bytes):
        return f"picture of {len(source)} bytes"
    return "picture in a data: address" if str(source).startswith("data:") else str(source)


def _open(source: str | Path | bytes, name: str) -> Image.Image:
    if isinstance(source, str) and source.startswith("data:"):
        source = _decode_address(source)
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise ValueError(f"{name}: addresses are not fetched here; download the picture and give its path")
    if isinstance(source, bytes):
        file: io.BytesIO | Path = io.BytesIO(source)
        size = len(source)
    else:
        file = Path(source)
        if not file.is_file():
            raise FileNotFoundError(f"{name}: no such picture file; check the path and the root of its data set")
        size = file.stat().st_size
    if not size:
        raise ValueError(f"{name}: an empty file (0 bytes); fetch the picture again or remove its record")
    try:
        return Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: {error}; the limit is {MAX_PIXELS} px; scale the picture down") from error
    except _BROKEN as error:
        raise ValueError(f"{name}: not a picture that Pillow can read ({size} bytes): {error}") from error


def _decode_address(address: str) -> bytes:
    head, _, body = address.partition(",")
    if not head.endswith(";base64"):
        raise ValueError(f"a data: address that begins {head[:40]!r}; it must be base64")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise ValueError(f"a data: address of {len(body)} characters that is not base64: {error}") from error


def _check_pixels(image: Image.Image, name: str, limits: Limits) -> None:
    width, height = image.size
    if width * height > limits.pixels:
        raise ValueError(
            f"{name}: {width} x {height} = {width * height} px; the limit is {limits.pixels}; "
            "scale the picture down or raise Limits.pixels"
        )


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # Pillow turns these itself
        return 1
    # The base method: that of PNG files decodes all pixels to look for a chunk behind them.
    try:
        value = Image.Image.getexif(image).get(_ORIENTATION, 1)
    except _BROKEN:  # damaged EXIF says nothing about the pixels
        return 1
    return value if value in _TURNS else 1


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    orientation = _orientation(image)
    try:
        image.load()
        if image.mode.startswith("I;16"):
            # The high byte; Pillow's own conversion clips every value above 255 to white.
            image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
        image = image if image.mode == "RGB" else image.convert("RGB")
    except _BROKEN as error:
        raise ValueError(f"{name}: the picture is damaged or cut short: {error}; fetch it again") from error
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _from_array(array: np.ndarray, limits: Limits) -> Image.Image:
    shape = array.shape
    channels = shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in shape:
        raise ValueError(
            f"an array of {array.dtype} {shape}; give uint8 of (height, width) or (height, width, 1, 3 or 4)"
        )
    image = Image.fromarray(np.ascontiguousarray(array[..., 0] if array.ndim == 3 and channels == 1 else array))
    _check_pixels(image, "array", limits)
    return image.convert("RGB")


def pad_to_square(image: Image.Image, scheme: Scheme = "imagenet") -> Image.Image:
    """Centred on a square of the mean colour (official expand2square)."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    red, green, blue = (int(value * 255) for value in STATISTICS[scheme][0])
    square = Image.new("RGB", (side, side), (red, green, blue))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def compress(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The picture after JPEG at a quality drawn uniformly from 75 to 100."""
    quality = int(rng.integers(JPEG_QUALITIES[0], JPEG_QUALITIES[1] + 1))
    with io.BytesIO() as buffer:
        image.save(buffer, format="JPEG", quality=quality)
        buffer.seek(0)
        with Image.open(buffer) as compressed:
            return compressed.convert("RGB")


def jpeg_augment(
    tiles: UInt8[Tensor, "tiles 3 side side"], rng: np.random.Generator
) -> UInt8[Tensor, "tiles 3 side side"]:
    """Every tile after JPEG, each at a quality of its own."""
    out = np.empty(tuple(tiles.shape), np.uint8)
    for number, part in enumerate(tiles.numpy()):
        picture = Image.fromarray(np.ascontiguousarray(part.transpose(1, 2, 0)))
        out[number] = np.asarray(compress(picture, rng)).transpose(2, 0, 1)
    return torch.from_numpy(out)


@lru_cache(maxsize=16)
def _constants(scheme: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Kept on the device: copying them there for every batch would wait for it."""
    mean, deviation = (torch.tensor(values, device=device).view(3, 1, 1) for values in STATISTICS[scheme])
    return mean, deviation


def normalise(
    tiles: UInt8[Tensor, "tiles 3 height width"],
    scheme: str = "imagenet",
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "tiles 3 height width"]:
    """uint8 pixels as floats: a 255th, less the mean, over the standard deviation; float32 unless `dtype` says."""
    if scheme not in STATISTICS:
        raise ValueError(f"unknown normalisation {scheme!r}; it is one of {', '.join(STATISTICS)}")
    mean, deviation = STATISTICS[scheme]
    if tiles.device.type != "cpu":
        shift, scale = _constants(scheme, tiles.device)
        return ((tiles.float() / 255 - shift) / scale).to(dtype or torch.float32)
    out = torch.empty(tiles.shape)
    pixels, floats = tiles.numpy(), out.numpy()

    def write(place: tuple[int, ...]) -> None:  # one plane of one tile stays in the cache
        plane = floats[place]
        np.copyto(plane, pixels[place])
        np.divide(plane, np.float32(255), out=plane)
        np.subtract(plane, np.float32(mean[place[1]]), out=plane)
        np.divide(plane, np.float32(deviation[place[1]]), out=plane)

    spread(write, np.ndindex(*tiles.shape[:2]), threads_for(tiles.numel()))
    return out if dtype is None else out.to(dtype)
