"""What losses over the pairs of all ranks need beside vectors: who belongs together, texts and pictures of others.

One process: what it was given. Vectors are gathered where a loss is taken (contrast.py, alignment.py).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from internvl.batch import Texts
from internvl.parallel import collectives


def first_row(rows: int) -> int:
    """Place of this rank's first row among those of all ranks."""
    return collectives.rank() * rows


def groups(same: Int[Tensor, " pairs"], reading: Int[Tensor, " pairs"]) -> Int[Tensor, " pairs"]:
    """A number for each pair of this rank, equal where pictures or texts of any ranks are, if by way of a third.

    `same` is that of this rank's pairs alone, `reading` the numbers of their texts. As `image_text.alike` has it.
    """
    if collectives.num_ranks() == 1:
        return same
    numbers = collectives.gather(same)
    links = [x.unique(return_inverse=True)[1] for x in (numbers, collectives.gather(reading))]
    while True:
        before = numbers
        for link in links:
            least = numbers.new_full((int(link.max()) + 1,), torch.iinfo(numbers.dtype).max)
            numbers = least.scatter_reduce(0, link, numbers, "amin")[link]
        if torch.equal(numbers, before):
            first = first_row(len(same))
            return numbers[first : first + len(same)]


def all_texts(texts: Texts) -> Texts:
    """Texts of all ranks, in the order of ranks, each as long as the longest one."""
    if collectives.num_ranks() == 1:
        return texts
    more = (0, collectives.largest_on_host(texts.ids.shape[1]) - texts.ids.shape[1])
    ids, mask = (collectives.gather(F.pad(x.long(), more)) for x in (texts.ids, texts.mask))
    return Texts(ids, mask)


def brought(
    features: Float[Tensor, "pairs positions dim"], image_of_row: Int[Tensor, " rows"]
) -> tuple[Float[Tensor, "images positions dim"], Int[Tensor, " rows"]]:
    """This rank's pictures and those of other ranks that its rows ask about; where each row finds its own among them.

    `image_of_row` numbers the pictures of all ranks. Gradients go back to the rank that a picture came from.
    """
    if collectives.num_ranks() == 1:
        return features, image_of_row
    places = image_of_row - first_row(len(features))
    foreign = (places < 0) | (places >= len(features))
    taken = collectives.take(features, image_of_row[foreign])
    found = len(features) + torch.arange(len(taken), device=places.device)
    return torch.cat([features, taken]), places.masked_scatter(foreign, found)
