"""What a dual model makes of pictures, videos and texts, computed once and kept: tasks and settings share it.

A folder for each kind of feature and set of items; its name is a digest, so other settings never mix.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from internvl.data.clips import protocol_frames
from internvl.data.media import probe, read_frames
from internvl.evaluate.retrieve import frame_means
from internvl.generate.captions import CaptionSearch
from internvl.generate.dual import Dual, Fit, picture_bytes, pixels_of
from internvl.generate.embedded import fingerprint
from internvl.generate.kept import Advance, Kept, keep
from internvl.models.contrastive import Head
from internvl.models.heads import probe_feature

MAX_FEATURE_BYTES = 4 << 30
"""Of pictures whose patches wait for further texts while pairs are scored."""
Bar = Callable[[str, int], AbstractContextManager[Advance]]


def no_bar(what: str, total: int) -> AbstractContextManager[Advance]:
    return nullcontext(lambda count: None)


@dataclass
class Features:
    """A model and the folder of what it computed."""

    dual: Dual
    folder: Path
    batch: int = 32
    bar: Bar = no_bar
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        self.fingerprint = fingerprint(self.dual)

    def pictures(self, paths: Sequence[Path], head: Head, fit: Fit) -> Kept:
        """Unit vectors."""
        return self._pictures("pictures", paths, fit, lambda x: self.dual.encode_image(x, head), head=head)

    def pooled(self, paths: Sequence[Path], fit: Fit) -> Kept:
        """Class token beside the mean of the patches, float32: what the linear probe looks at."""
        return self._pictures("pooled", paths, fit, lambda x: probe_feature(self._tokens(x)).float())

    def tokens(self, paths: Sequence[Path], fit: Fit) -> Kept:
        """All tokens of the last block, in the number type of the model: 1.6 MB a picture of InternViT-6B."""
        return self._pictures("tokens", paths, fit, self._tokens)

    def captions(self, paths: Sequence[Path], search: CaptionSearch) -> Kept:
        """A caption a picture, as text."""
        return self._pictures(
            "captions", paths, "squash", lambda x: self.dual.caption(x, search, batch=len(x)), search=asdict(search)
        )

    def videos(self, paths: Sequence[Path], num_frames: int, head: Head, fit: Fit) -> Kept:
        """The mean of the embeddings of each video's frames, as the model gives them, not yet of length 1."""
        side = self.dual.config.side

        def prepare(place: int) -> Tensor:
            chosen = protocol_frames(probe(paths[place]).num_frames, num_frames)
            return torch.stack([picture_bytes(frame, side, fit) for frame in read_frames(paths[place], chosen)])

        def compute(videos: list[Tensor]) -> Float[Tensor, "videos dim"]:
            raw = self.dual.encode_image(pixels_of(list(torch.cat(videos))), head, batch=self.batch, raw=True)
            return frame_means(raw, [len(one) for one in videos])

        return self._keep("videos", paths, prepare, compute, head=head, fit=fit, frames=num_frames)

    def texts(self, texts: Sequence[str], prefixed: str = "texts") -> Float[Tensor, "texts dim"]:
        """Unit vectors of texts, none of them empty."""

        def compute(places: list[int]) -> Tensor:
            return self.dual.encode_text([texts[place] for place in places])

        return self._keep(prefixed, texts, lambda place: place, compute).rows

    def _tokens(self, pixels: Tensor) -> Float[Tensor, "pictures tokens dim"]:
        with torch.inference_mode():
            out: Tensor = self.dual.model.vision(pixels.to(self.dual.model.logit_scale.device))
        return out

    def _pictures(
        self, what: str, paths: Sequence[Path], fit: Fit, work: Callable[[Tensor], Tensor | list[str]], **settings: Any
    ) -> Kept:
        side = self.dual.config.side
        return self._keep(
            what,
            paths,
            lambda place: picture_bytes(paths[place], side, fit),
            lambda squares: work(pixels_of(squares)),
            fit=fit,
            **settings,
        )

    def _keep(
        self,
        what: str,
        items: Sequence[Path] | Sequence[str],
        prepare: Callable[[int], Any],
        compute: Callable[[list[Any]], Tensor | list[str]],
        **settings: Any,
    ) -> Kept:
        names = [str(item) for item in items]
        stamps = [_stamp(item) for item in items if isinstance(item, Path)]
        dtype = str(self.dual.model.text_projection.dtype).removeprefix("torch.")
        identity = {"what": what, "model": self.fingerprint, "dtype": dtype, **settings}
        digest = hashlib.sha256(json.dumps([identity, names, stamps], sort_keys=True).encode()).hexdigest()[:12]
        with self.bar(what, len(items)) as advance:
            return keep(
                self.folder / f"{what}-{digest}",
                names,
                identity,
                prepare,
                compute,
                batch=self.batch,
                threads=torch.get_num_threads(),
                advance=advance,
            )


def _stamp(path: Path) -> str:
    try:
        stat = path.stat()
    except OSError:
        return "absent"
    return f"{stat.st_size} {stat.st_mtime_ns}"


class PairMatcher:
    """Scores pairs by image-text matching; patches of pictures seen lately are not computed again."""

    def __init__(
        self, dual: Dual, paths: Sequence[Path], texts: Sequence[str], max_bytes: int = MAX_FEATURE_BYTES
    ) -> None:
        if not dual.config.generative:
            raise ValueError("this model is InternVL-C alone and has no matching; re-rank with InternVL-G")
        self.dual, self.paths, self.texts, self.max_bytes = dual, paths, texts, max_bytes
        self.seen: OrderedDict[int, Tensor] = OrderedDict()

    @torch.inference_mode()
    def __call__(self, images: Int[Tensor, " pairs"], texts: Int[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
        """Probability that they belong together."""
        wanted = list(dict.fromkeys(images.tolist()))
        features = self._features(wanted)
        ids, mask = self.dual.ids([self.texts[place] for place in texts.tolist()])
        rows = {place: row for row, place in enumerate(wanted)}
        owner = torch.tensor([rows[place] for place in images.tolist()], device=features.device)
        logits = self.dual.model.match_logits(features, ids, mask, owner)
        return logits.float().softmax(-1)[:, 1]

    def _features(self, wanted: Sequence[int]) -> Float[Tensor, "pictures tokens dim"]:
        found = {place: self.seen[place] for place in wanted if place in self.seen}
        new = [place for place in wanted if place not in found]
        if new:
            squares = [picture_bytes(self.paths[place], self.dual.config.side, "squash") for place in new]
            made = self.dual.model.vision(pixels_of(squares).to(self.dual.model.logit_scale.device))
            found |= zip(new, made, strict=True)
        for place in wanted:
            self.seen[place] = found[place]
            self.seen.move_to_end(place)
        room = max(len(wanted), self.max_bytes // max(1, found[wanted[0]].nbytes))
        while len(self.seen) > room:
            self.seen.popitem(last=False)
        return torch.stack([found[place] for place in wanted])


def poster(path: Path, video: bool) -> Image.Image:
    """What a sheet shows of an item: the picture, or the middle frame."""
    from internvl.data.images import open_image

    if not video:
        return open_image(path)
    return read_frames(path, protocol_frames(probe(path).num_frames, 1))[0]
