"""How well captions fit their pictures, asked from an InternVL-C."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from internvl.curate.pair_sets import Similarities
from internvl.data.image_text import Pair
from internvl.data.images import open_image
from internvl.generate.dual import Dual


def model_vectors(name: str) -> Similarities:
    """Cosines of the C head; a picture that cannot be opened fits nothing."""
    dual = Dual.open(name, device="auto")

    def similarities(pairs: Sequence[Pair]) -> list[list[float]]:
        pictures: dict[int, Image.Image] = {}
        for number, pair in enumerate(pairs):
            try:
                pictures[number] = open_image(pair.path)
            except (ValueError, OSError):  # its own turn tells it
                continue
        found = [[-1.0] * len(pair.captions) for pair in pairs]
        if not pictures:
            return found
        images = dual.encode_image(list(pictures.values()))
        texts = dual.encode_text([caption for number in pictures for caption in pairs[number].captions])
        for image, number in zip(images, pictures, strict=True):
            some, texts = texts[: len(pairs[number].captions)], texts[len(pairs[number].captions) :]
            found[number] = (some @ image).tolist()
        return found

    return similarities
