"""The loss at answer positions alone equals the plain one over full logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from internvl.batch import ChatBatch
from internvl.evaluate import caption_loss
from internvl.evaluate.caption_loss import answer_losses
from internvl.tokens import IGNORE_INDEX


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 11)
        self.seen = 0

    def head(self, hidden: Tensor) -> Tensor:
        self.seen += hidden.shape[:-1].numel()
        return self.out(hidden)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.language, self.table = Language(), nn.Embedding(11, 8)

    def hidden(self, input_ids: Tensor, pixel_values: Tensor | None = None, **_: Tensor | None) -> Tensor:
        return self.table(input_ids).cumsum(1)


def batch() -> ChatBatch:
    torch.manual_seed(0)
    ids = torch.randint(0, 11, (3, 9))
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[0, 4:] = ids[0, 4:]
    labels[1, 0] = ids[1, 0]  # nothing predicts the first token
    labels[2, 7] = ids[2, 7]
    return ChatBatch(
        input_ids=ids,
        labels=labels,
        loss_weights=(labels != IGNORE_INDEX).float(),
        position_ids=torch.arange(9).expand(3, 9),
        tiles=torch.zeros(0, 3, 4, 4, dtype=torch.uint8),
    )


@pytest.mark.parametrize("at_once", [1, 4, 2048])
def test_losses_equal_full_logits(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(caption_loss, "LOGITS_AT_ONCE", at_once)
    model, rows = Model(), batch()
    losses, tokens = answer_losses(model, rows, None)
    assert tokens.tolist() == [5, 0, 1]
    assert model.language.seen == 6
    logits = model.language.out(model.hidden(rows.input_ids))
    for row, loss in enumerate(losses):
        plain = cross_entropy(logits[row, :-1], rows.labels[row, 1:], ignore_index=IGNORE_INDEX, reduction="sum")
        assert loss.item() == pytest.approx(plain.item(), abs=1e-5)
