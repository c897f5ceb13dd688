"""The chat model: tiles through InternViT and the connector into their token places, then the language model.

In 1.0 frozen queries of QLLaMA may look at each tile too; their states come before its patches.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from internvl.config import ChatConfig
from internvl.models.connector import connector_of
from internvl.models.internvit import InternViT
from internvl.models.language import LanguageModel
from internvl.models.qllama import QLLaMA
from internvl.tokens import IMAGE_TOKEN


class ChatModel(nn.Module):
    """Official InternVLChatModel: `vision`, `connector`, `language`; `qllama` is None but in 1.0 with queries."""

    def __init__(self, config: ChatConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.image_token_id: int | None = None
        """Id of <IMG_CONTEXT>; the tokenizer knows it, the weights do not."""
        self.language = LanguageModel(config.language, dtype)
        self.vision = InternViT(config.vision).to(dtype)
        self.qllama = None if config.queries is None else QLLaMA(config.queries, reads=False).to(dtype)
        self.connector = connector_of(config).to(dtype)

    def encode_tiles(
        self, pixel_values: Float[Tensor, "tiles 3 height width"], vision: InternViT | None = None
    ) -> Float[Tensor, "tiles tokens llm_width"]:
        """Normalised tiles to tokens of the language model's width; `vision` computes what this model's own would."""
        out: Tensor = self.connector(self.look(pixel_values, vision))
        return out

    def look(
        self, pixel_values: Float[Tensor, "tiles 3 height width"], vision: InternViT | None = None
    ) -> Float[Tensor, "tiles queries_and_patches dim"]:
        """What the connector reads: the tapped block without the class token. QLLaMA's queries, which ask the last
        block, come first; both kinds get the width of the wider one, the rest of a vector is zero.
        """
        vision = self.vision if vision is None else vision
        if self.qllama is None:
            patches: Tensor = vision(pixel_values, self.config.feature_layer)[:, 1:]
            return patches
        tapped, last = vision.taps(pixel_values, (self.config.feature_layer, -1))
        queries, patches = self.qllama.look(last), tapped[:, 1:]
        width = max(queries.shape[-1], patches.shape[-1])
        return torch.cat([F.pad(x, (0, width - x.shape[-1])) for x in (queries, patches)], dim=1)

    @property
    def eyes(self) -> nn.Module:
        """All that `look` runs."""
        return self.vision if self.qllama is None else nn.ModuleList([self.vision, self.qllama])

    def embed(
        self,
        input_ids: Int[Tensor, "rows length"],
        pixel_values: Float[Tensor, "tiles 3 height width"] | None = None,
        *,
        image_flags: Int[Tensor, "tiles"] | Int[Tensor, "tiles 1"] | None = None,
        visual: Float[Tensor, "real_tiles tokens llm_width"] | None = None,
        num_image_tokens: int | None = None,
    ) -> Float[Tensor, "rows length llm_width"]:
        """Token embeddings with the visual tokens, in order, where <IMG_CONTEXT> stands.

        `image_flags` is 1 for a real tile and 0 for a dummy. `visual` replaces `pixel_values` where tiles were
        encoded before. `num_image_tokens`, known to whoever made the batch, spares a GPU one synchronisation.
        """
        if visual is None and pixel_values is not None:
            real = pixel_values if image_flags is None else pixel_values[image_flags.flatten().bool()]
            visual = self.encode_tiles(real) if len(real) else None
        places = self._image_places(input_ids, visual, num_image_tokens)
        # The id of <IMG_CONTEXT> may have no row (1.0): what stands in its places is taken from elsewhere anyway.
        embeds = self.language.embed(input_ids if places is None else input_ids.masked_fill(places, 0))
        if visual is None:
            return embeds
        if places is None:
            # nothing to place; the empty slice keeps the vision part in the graph, with gradients of exactly zero
            return torch.cat([embeds.flatten(0, 1), visual.flatten(0, 1).to(embeds.dtype)]).view_as(embeds)
        # A row lookup: no copy back to the host, unlike boolean indexing.
        source = (places.flatten().cumsum(0) - 1).clamp(min=0).view_as(input_ids)
        tokens = F.embedding(source, visual.flatten(0, 1).to(embeds.dtype))
        return torch.where(places[..., None], tokens, embeds)

    def hidden(
        self,
        input_ids: Int[Tensor, "rows length"],
        pixel_values: Float[Tensor, "tiles 3 height width"] | None = None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "rows length"] | None = None,
        segments: Int[Tensor, "bounds"] | None = None,
        image_flags: Tensor | None = None,
        visual: Float[Tensor, "real_tiles tokens llm_width"] | None = None,
        num_image_tokens: int | None = None,
        cache: Any = None,
    ) -> Float[Tensor, "rows length llm_width"]:
        """Hidden states after the final norm; `language.head` makes logits of the positions that need them."""
        if cache is not None and pixel_values is None and visual is None:
            embeds = self.language.embed(input_ids)  # a later step: a sampled <IMG_CONTEXT> is a plain token
        else:
            embeds = self.embed(
                input_ids,
                pixel_values,
                image_flags=image_flags,
                visual=visual,
                num_image_tokens=num_image_tokens,
            )
        out: Tensor = self.language(
            embeds, attention_mask=attention_mask, position_ids=position_ids, segments=segments, cache=cache
        )
        return out

    def forward(
        self,
        input_ids: Int[Tensor, "rows length"],
        pixel_values: Float[Tensor, "tiles 3 height width"] | None = None,
        **options: Any,
    ) -> Float[Tensor, "rows length vocab"]:
        """Logits of every position; the options are those of `hidden`."""
        return self.language.head(self.hidden(input_ids, pixel_values, **options))

    def checkpoint(self, on: bool = True) -> None:
        """Switch gradient checkpointing of the vision and the language blocks."""
        self.vision.checkpointing = on
        if self.qllama is not None:
            self.qllama.checkpointing = on
        self.language.checkpoint(on)

    def resize(self, vocab_size: int, seed: int = 0) -> None:
        """Change the vocabulary, in the weights and in the config."""
        self.language.resize(vocab_size, seed)
        settings = {**self.config.language.settings, "vocab_size": vocab_size}
        self.config = replace(self.config, language=replace(self.config.language, settings=settings))

    def resize_positions(self) -> None:
        """Store positions for the tile size, for good, and interpolate no more (official resize_pos_embeddings)."""
        self.vision.resize_positions(self.config.tile_size)
        queries, vision = self.config.queries, self.vision.config
        queries = None if queries is None else replace(queries, vision=vision)
        self.config = replace(self.config, vision=vision, queries=queries)

    def _image_places(
        self, input_ids: Tensor, visual: Tensor | None, num_image_tokens: int | None
    ) -> Bool[Tensor, "rows length"] | None:
        num_features = 0 if visual is None else visual.shape[0] * visual.shape[1]
        if self.image_token_id is None:
            if num_features:
                raise ValueError(
                    f"{num_features} visual tokens but image_token_id is not set; "
                    f"set it to the tokenizer's id of {IMAGE_TOKEN}"
                )
            return None
        places = input_ids == self.image_token_id
        num_places = int(places.sum()) if num_image_tokens is None else num_image_tokens
        if num_places != num_features:
            num_tiles = 0 if visual is None else visual.shape[0]
            raise ValueError(
                f"{num_places} {IMAGE_TOKEN} tokens but {num_features} visual tokens from {num_tiles} tiles; "
                f"each real tile needs {self.config.tokens_per_tile}"
            )
        return places if num_features else None
