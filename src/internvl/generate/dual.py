"""InternVL-C and -G as people use them: pictures and texts to unit vectors, matches, captions.

Prompts and picture sizes are part of what the released models learned (official clip_benchmark, internvl_g/eval); a
text without `summarize:` or a wrong padding id silently gives other vectors, so they are made here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from internvl.data.captions import MAX_TOKENS
from internvl.data.crop import middle
from internvl.data.dual_texts import CAPTION_PROMPT, TEXT_PREFIX, DualTokeniser, pad
from internvl.data.images import Source, normalise, open_image
from internvl.data.resize import BICUBIC
from internvl.generate.captions import CaptionSearch, caption
from internvl.generate.dual_inputs import check_batch, check_ids, check_pixels, listed_pictures, listed_texts
from internvl.generate.open_chat import device_of, dtype_of
from internvl.load_dual import LoadedDual, load_dual, save_dual
from internvl.models.contrastive import Head, unit

MAX_TEXT_TOKENS = MAX_TOKENS
"""Prefix, begin and end of text included; longer texts are cut (official tokenizer call)."""

Fit = Literal["squash", "crop"]
Images = Tensor | Source | Sequence[Source]
Texts = Tensor | str | Sequence[str]


class Dual:
    """A model and its tokenizer. Pictures are paths, PIL images, arrays, or normalised pixels (n, 3, side, side)."""

    def __init__(self, loaded: LoadedDual) -> None:
        self.model, self.tokenizer, self.config = loaded.model, loaded.tokenizer, loaded.config

    @classmethod
    def open(cls, name: str | Path, *, device: str = "cpu", dtype: str | torch.dtype = "float32") -> Dual:
        """A folder in the official layout, a hub id, or `tiny-dual`. device and dtype "auto" as for chat models."""
        if dtype in ("int4", "int8"):
            raise ValueError(f"dtype {dtype!r} is for chat models; give float32, bfloat16 or auto")
        device = device_of(device)
        return cls(load_dual(name, device=device, dtype=dtype_of(dtype, device)))

    @torch.inference_mode()
    def encode_image(
        self, images: Images, head: Head = "c", fit: Fit = "squash", batch: int = 32, raw: bool = False
    ) -> Float[Tensor, "images embed"]:
        """Unit vectors in float32, whatever the model computes in. `fit` "squash" resizes to a square (retrieval,
        captions), "crop" cuts the middle one (zero-shot classification), as the published scores were measured. `raw`
        leaves out the division by the length: frames of a video are averaged so."""
        parts = [self.model.encode_image(pixels, head, raw).float() for pixels in self._pixels(images, fit, batch)]
        return torch.cat(parts) if raw else unit(torch.cat(parts))

    @torch.inference_mode()
    def encode_text(
        self, texts: Texts, attention_mask: Tensor | None = None, batch: int = 128
    ) -> Float[Tensor, "texts embed"]:
        """Unit vectors, in float32, of strings, or of ids with their mask (without one, id 0 is padding). An empty text
        has the vector of the prefix alone."""
        check_batch(batch)
        if isinstance(texts, Tensor):
            ids = check_ids(texts, self.config.language.vocab_size)
            mask = None if attention_mask is None else attention_mask.to(self._device)
            return unit(self.model.encode_text(ids.to(self._device), mask).float())
        rows = listed_texts(texts)
        parts = (self.ids([TEXT_PREFIX + text for text in rows[n : n + batch]]) for n in range(0, len(rows), batch))
        return unit(torch.cat([self.model.encode_text(*part).float() for part in parts]))

    @torch.inference_mode()
    def match(self, images: Images, texts: Texts, batch: int = 32) -> Float[Tensor, " pairs"]:
        """Probability that each text fits the picture of the same place."""
        pixels = torch.cat(list(self._pixels(images, "squash", batch)))
        if isinstance(texts, Tensor):
            ids = check_ids(texts, self.config.language.vocab_size).to(self._device)
            mask = ids > 0
        else:
            ids, mask = self.ids(listed_texts(texts))
        if len(ids) != len(pixels):
            raise ValueError(f"{len(pixels)} pictures and {len(ids)} texts; give one text for each picture")
        pieces = zip(pixels.split(batch), ids.split(batch), mask.split(batch), strict=True)
        return torch.cat([self.model.match(*piece).float() for piece in pieces])

    def caption(self, images: Images, search: CaptionSearch | None = None, batch: int = 8) -> list[str]:
        """A caption for each picture, by beam search as published unless `search` says otherwise."""
        prompt, _ = self.ids([CAPTION_PROMPT], end=False)
        end = int(self.config.language.settings["eos_token_id"])
        written: list[list[int]] = []
        for pixels in self._pixels(images, "squash", batch):
            written += caption(self.model, pixels, prompt[0], end, search)
        return [str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in written]

    def ids(self, texts: Sequence[str], end: bool = True) -> tuple[Int[Tensor, "texts length"], Tensor]:
        """Begin of text, text, end of text; padded on the right with 0, and where they are real."""
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer; give ids, or put tokenizer.model into its folder")
        if not texts:
            raise ValueError("no text was given; give at least one")
        words = DualTokeniser(self.tokenizer, self.config.language)
        rows = pad([words.row(text, end).ids for text in texts])
        return rows.ids.to(self._device), rows.mask.to(self._device)

    def num_cut(self, texts: Sequence[str]) -> int:
        """Texts of more than 80 tokens, whose end `encode_text` does not see; 0 where there is no tokenizer."""
        if self.tokenizer is None:
            return 0
        words = DualTokeniser(self.tokenizer, self.config.language)
        return sum(words.row(TEXT_PREFIX + text).is_cut for text in texts)

    def save(self, out: str | Path) -> None:
        """Write the official layout."""
        save_dual(self.model, self.tokenizer, out)

    @property
    def _device(self) -> torch.device:
        return self.model.logit_scale.device

    def _pixels(self, images: Images, fit: Fit, batch: int) -> Any:
        """Normalised pixels, some pictures at a time."""
        check_batch(batch)
        if isinstance(images, Tensor):
            yield from check_pixels(images).to(self._device).split(batch)
            return
        sources = listed_pictures(images)
        for start in range(0, len(sources), batch):
            squares = [picture_bytes(source, self.config.side, fit) for source in sources[start : start + batch]]
            yield pixels_of(squares).to(self._device)


def picture_bytes(source: Source, side: int, fit: Fit) -> UInt8[Tensor, "3 side side"]:
    """One picture, opened and made square: what can fail about it fails here."""
    return torch.from_numpy(np.array(square(open_image(source), side, fit))).permute(2, 0, 1)


def pixels_of(squares: Sequence[UInt8[Tensor, "3 side side"]]) -> Float[Tensor, "pictures 3 side side"]:
    """Normalised as these models were trained."""
    return normalise(torch.stack(list(squares)).contiguous(), "imagenet")


def square(image: Image.Image, side: int, fit: Fit) -> Image.Image:
    """A picture as a square of `side` pixels, bicubic (official build_transform of clip_benchmark)."""
    if fit == "squash":
        return image.resize((side, side), BICUBIC)
    if fit != "crop":
        raise ValueError(f"fit {fit!r}; it is 'squash' (whole picture) or 'crop' (middle square)")
    return middle(image, side, lambda room: round(room / 2))  # as torchvision does
