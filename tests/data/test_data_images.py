"""Every kind of picture file: a defined result, or an error that says which file, what, and what to do."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from internvl.data.images import (
    STATISTICS,
    Limits,
    compress,
    header_size,
    jpeg_augment,
    normalise,
    open_image,
    pad_to_square,
)
from internvl.data.tiling import cut


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# what cannot be read


def test_missing_file(tmp_path: Path) -> None:
    for read in (open_image, header_size):
        with pytest.raises(FileNotFoundError, match=r"gone\.png: no such picture file; check the path"):
            read(tmp_path / "gone.png")


def test_folder_instead_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such picture file"):
        open_image(tmp_path)


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "empty.jpg"
    path.touch()
    with pytest.raises(ValueError, match=r"empty\.jpg: an empty file \(0 bytes\)"):
        open_image(path)


def test_a_file_that_is_no_picture(tmp_path: Path) -> None:
    path = tmp_path / "page.jpg"
    path.write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=r"page\.jpg: not a picture that Pillow can read \(22 bytes\)"):
        open_image(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_truncated_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"cut.{kind.lower()}"
    content = encoded(noise(64, 48), kind)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cut\.\w+: .*(cut short|not a picture)"):
        open_image(path)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises this size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(10_000, 9_000), (30_000, 30_000)])
def test_decompression_bomb(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"the limit is 89478485.*; scale the picture down"):
        open_image(bomb(*size))


def test_own_limit_names_value_limit_and_remedy() -> None:
    with pytest.raises(ValueError, match=r"20 x 10 = 200 px; the limit is 199; .* raise Limits.pixels"):
        open_image(encoded(noise(20, 10)), Limits(pixels=199))
    with pytest.raises(ValueError, match="the limit is 199"):
        open_image(noise(20, 10), Limits(pixels=199))
    assert open_image(encoded(noise(20, 10)), Limits(pixels=200)).size == (20, 10)


def test_formats_that_start_other_programs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "page.eps"
    noise(20, 10).save(path)
    with pytest.raises(ValueError, match=r"page\.eps: not a picture that Pillow can read"):
        open_image(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000"])
def test_usual_formats_are_read(kind: str) -> None:
    assert open_image(encoded(noise(32, 32), kind)).size == (32, 32)


def test_addresses_are_not_fetched() -> None:
    with pytest.raises(ValueError, match="addresses are not fetched here"):
        open_image("https://example.org/cat.png")


@given(st.binary(max_size=200))
def test_random_bytes_give_a_typed_error(content: bytes) -> None:
    with pytest.raises(ValueError, match="picture"):
        open_image(content)


@given(st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"]), st.integers(0, 10_000), st.integers(1, 255))
def test_damaged_bytes_give_a_picture_or_a_typed_error(kind: str, at: int, change: int) -> None:
    content = bytearray(encoded(noise(16, 12), kind))
    content[at % len(content)] ^= change
    try:
        assert open_image(bytes(content)).mode == "RGB"
    except ValueError as error:
        assert "picture" in str(error)  # noqa: PT017 - both outcomes are right


# what has a defined result


def test_animation_gives_its_first_frame() -> None:
    frames = [noise(12, 9, seed=seed) for seed in range(3)]
    content = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert np.array_equal(np.asarray(open_image(content)), np.asarray(frames[0]))
    assert header_size(content) == (12, 9)
    gif = [frame.convert("P") for frame in frames]
    content = encoded(gif[0], "GIF", save_all=True, append_images=gif[1:])
    assert np.array_equal(np.asarray(open_image(content)), np.asarray(gif[0].convert("RGB")))


def test_cmyk_jpeg() -> None:
    content = encoded(noise(16, 8, "CMYK"), "JPEG")
    assert np.array_equal(np.asarray(open_image(content)), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


def test_sixteen_bits_keep_their_high_byte() -> None:
    values = (np.arange(48, dtype=np.uint16) * 1365).reshape(6, 8)
    image = open_image(encoded(Image.fromarray(values)))
    assert np.array_equal(np.asarray(image)[..., 0], values >> 8)
    assert np.array_equal(np.asarray(image)[..., 0], np.asarray(image)[..., 2])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I", "F", "HSV"])
def test_other_modes_are_converted_as_officially(mode: str) -> None:
    image = noise(9, 7, mode)
    assert np.array_equal(np.asarray(open_image(image)), np.asarray(image.convert("RGB")))


def test_alpha_is_dropped_not_blended() -> None:
    image = Image.new("RGBA", (4, 4), (200, 100, 50, 0))
    assert open_image(encoded(image)).getpixel((0, 0)) == (200, 100, 50)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_turns_are_undone(orientation: int, kind: str) -> None:
    upright = Image.new("RGB", (48, 32), (255, 0, 0))
    upright.paste((0, 0, 255), (0, 0, 24, 16))  # blue in the upper left
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(stored, kind, exif=exif)
    image = open_image(content)
    assert image.size == header_size(content) == (48, 32)
    assert image.getpixel((4, 4))[2] > 200
    assert image.getpixel((40, 28))[0] > 200


def test_damaged_exif_is_ignored() -> None:
    content = encoded(noise(8, 8), "JPEG", exif=b"Exif\x00\x00garbage that is no TIFF")
    assert open_image(content).size == header_size(content) == (8, 8)


def test_one_pixel() -> None:
    image = open_image(encoded(Image.new("RGB", (1, 1), (1, 2, 3))))
    tiles = cut(image, tile_size=56)
    assert tiles.shape == (1, 3, 56, 56)
    assert tiles[0, :, 5, 5].tolist() == [1, 2, 3]


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1)])
def test_threads_of_pixels(size: tuple[int, int]) -> None:
    tiles = cut(Image.new("RGB", size, (9, 8, 7)), tile_size=56)
    assert tiles.shape[0] == 13
    assert tiles[3, :, 5, 5].tolist() == [9, 8, 7]


def test_every_source_gives_the_same_picture(tmp_path: Path) -> None:
    image = noise(20, 10)
    content = encoded(image)
    path = tmp_path / "a.png"
    path.write_bytes(content)
    address = "data:image/png;base64," + base64.b64encode(content).decode()
    for source in (path, str(path), content, image, np.asarray(image), address):
        assert np.array_equal(np.asarray(open_image(source)), np.asarray(image))
        assert header_size(source) == (20, 10)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
    ],
)
def test_arrays_of_another_kind_are_refused(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="give uint8 of"):
        open_image(array)


@pytest.mark.parametrize("address", ["data:image/png,abc", "data:image/png;base64,!!"])
def test_bad_data_addresses_are_refused(address: str) -> None:
    with pytest.raises(ValueError, match="a data: address"):
        open_image(address)


def test_the_callers_picture_is_left_as_it_is() -> None:
    image = noise(6, 4)
    before = image.tobytes()
    turned = open_image(image)
    turned.putpixel((0, 0), (1, 2, 3)) if turned is not image else None
    assert image.tobytes() == before


def test_header_size_decodes_nothing(tmp_path: Path) -> None:
    for kind in ("PNG", "JPEG"):
        content = encoded(noise(300, 200), kind)
        path = tmp_path / f"cut.{kind.lower()}"
        path.write_bytes(content[: max(700, len(content) // 10)])
        assert header_size(path) == (300, 200)


# floats


@pytest.mark.parametrize("scheme", list(STATISTICS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalise_follows_its_definition(scheme: Any, dtype: torch.dtype) -> None:
    tiles = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in STATISTICS[scheme])
    expected = (tiles.float() / 255 - mean) / deviation
    found = normalise(tiles, scheme, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, expected.to(dtype))


def test_unknown_scheme_is_named() -> None:
    with pytest.raises(ValueError, match="unknown normalisation 'none'; it is one of imagenet, clip, siglip"):
        normalise(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), "none")


def test_no_tiles_stay_no_tiles() -> None:
    assert normalise(torch.zeros(0, 3, 8, 8, dtype=torch.uint8)).shape == (0, 3, 8, 8)


def test_padding_centres_on_the_mean_colour() -> None:
    padded = pad_to_square(Image.new("RGB", (10, 4), (255, 255, 255)))
    assert padded.size == (10, 10)
    assert padded.getpixel((0, 0)) == (123, 116, 103)
    assert padded.getpixel((0, 3)) == padded.getpixel((9, 6)) == (255, 255, 255)


def test_compression_draws_from_the_generator_alone() -> None:
    tiles = cut(noise(112, 56).reduce(8).resize((112, 56)), tile_size=56)
    first, second = (jpeg_augment(tiles, np.random.default_rng(1)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, jpeg_augment(tiles, np.random.default_rng(2)))
    assert (first.int() - tiles.int()).abs().float().mean() < 40
    single = compress(noise(56, 56), np.random.default_rng(1))
    assert single.mode == "RGB"
    assert single.size == (56, 56)


def test_every_quality_from_75_to_100_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    save = Image.Image.save

    def record(self: Image.Image, *arguments: Any, quality: int, **options: Any) -> None:
        seen.add(quality)
        save(self, *arguments, quality=quality, **options)

    monkeypatch.setattr(Image.Image, "save", record)
    rng = np.random.default_rng(0)
    for _ in range(400):
        compress(Image.new("RGB", (8, 8)), rng)
    assert seen == set(range(75, 101))
