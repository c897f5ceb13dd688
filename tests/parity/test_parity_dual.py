"""QLLaMA with one query and silent cross-attention is a plain LLaMA: transformers' own, and its beam search."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from internvl.convert import dual
from internvl.convert.keys import expand
from internvl.generate.captions import CaptionSearch, caption
from internvl.models.contrastive import DualModel
from internvl.models.language import transformers_config
from internvl.zoo import DUAL
from tiny import tiny_dual, tiny_pictures, tiny_texts


def both(seed: int = 0, **settings: Any) -> tuple[DualModel, Any]:
    from transformers import LlamaForCausalLM

    language = DUAL["tiny-dual"].language
    ours = tiny_dual(seed, num_queries=1, language=replace(language, settings={**language.settings, **settings}))
    theirs = LlamaForCausalLM(transformers_config(ours.config.language)).eval()
    state = {}
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith("cross.o_proj.weight"):
                parameter.zero_()
        for entry in expand(dual.OFFICIAL_RULES, ours.state_dict()):
            state[entry.disk[0].removeprefix("qllama.")] = ours.state_dict()[entry.ours[0]]
    theirs.load_state_dict({key: state[key] for key in theirs.state_dict()})
    return ours, theirs


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"rope_theta": 5e5, "num_key_value_heads": 4, "head_dim": 8}])
def test_text_states_are_those_of_transformers(settings: dict[str, Any]) -> None:
    ours, theirs = both(**settings)
    ids = tiny_texts(3, 9)
    found = ours.qllama.read(ids)
    assert_close(found, theirs.model(ids).last_hidden_state, atol=2e-5, rtol=1e-4)
    assert_close(ours.qllama.head(found), theirs(ids).logits, atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "search",
    [
        CaptionSearch(1, 2, 8),
        CaptionSearch(5, 0, 8),
        CaptionSearch(3, 3, 8, length_penalty=0.0),
        CaptionSearch(4, 1, 8, length_penalty=0.5),
        # Above 1, transformers 5 stops earlier than 4.37, whose rule is ours: it looks at unfinished captions alone.
    ],
)
def test_captions_are_those_of_transformers(search: CaptionSearch) -> None:
    lengths = set()
    for seed in range(4):
        ours, theirs = both(seed)
        prompts = tiny_texts(3, 4, seed)[:, :-1]
        pictures = tiny_pictures(3)
        said = caption(ours, pictures, prompts, 2, replace(search, beams=2))
        end = said[0][5]  # a token that is met
        found = caption(ours, pictures, prompts, end, search)
        embeds = torch.cat([ours.qllama.queries.expand(3, -1, -1), ours.qllama.embed_tokens(prompts)], dim=1)
        expected = theirs.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            num_beams=search.beams,
            min_new_tokens=search.min_new_tokens,
            max_new_tokens=search.max_new_tokens,
            length_penalty=search.length_penalty,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        ).tolist()
        expected = [row[: row.index(end)] if end in row else row for row in expected]
        assert found == expected
        lengths |= {len(row) for row in found}
    assert len(lengths) > 1
