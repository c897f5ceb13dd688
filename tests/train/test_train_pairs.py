"""Laws of the losses on pairs: pieces = whole, masked patches are not seen, two ranks = one."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from tiny_pairs import assert_alike, contrastive, generative, held_out, loss_and_gradients, write_inputs
from torch import Tensor
from torch.testing import assert_close

from internvl.train.pieces import by_length, groups_of, in_pieces
from internvl.train.run import from_json, to_json
from internvl.train.settings import Pairs, Part
from internvl.train.stages import open_stage
from tiny import tiny_dual


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("dual"))


# pieces


@pytest.mark.parametrize("frozen", [False, True])
def test_pieces_equal_the_whole_batch(inputs: Path, tmp_path: Path, frozen: bool) -> None:
    """Loss and every gradient; patches are masked, so both passes must leave out the same ones."""
    pairs, vision = Pairs(mask_share=0.5), Part() if frozen else Part("full")
    whole = loss_and_gradients(contrastive(inputs, tmp_path, pairs=pairs, vision=vision))
    assert any(name.startswith("vision.") for name in whole[1]) != frozen
    for size in (1, 3, 8):
        cut = contrastive(inputs, tmp_path, pairs=replace(pairs, micro_batch=size), vision=vision)
        parts = loss_and_gradients(cut)
        assert_alike(parts[0], whole[0])
        assert_alike(parts[1], whole[1])


@pytest.mark.parametrize("negatives", ["random", "hard"])
def test_pieces_of_stage_2_equal_the_whole_batch(inputs: Path, tmp_path: Path, negatives: Any) -> None:
    """Contrast, matching and captions; also where the vision encoder learns through all three."""
    pairs = Pairs(area=(1.0, 1.0), negatives=negatives)
    for vision in (Part(), Part("full")):
        whole = loss_and_gradients(generative(inputs, tmp_path, pairs=pairs, vision=vision))
        parts = loss_and_gradients(generative(inputs, tmp_path, pairs=replace(pairs, micro_batch=3), vision=vision))
        assert_alike(parts[0], whole[0])
        assert_alike(parts[1], whole[1])
        assert any(name.startswith("vision.") for name in whole[1]) == (vision.learn == "full")


def test_drop_path_falls_alike_in_both_passes(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same pieces with their graphs kept; without the generator's state the second pass drops others."""
    run = contrastive(inputs, tmp_path, pairs=Pairs(micro_batch=3, drop_path=0.5))
    cached = loss_and_gradients(run)

    def kept(encode: Any, tensors: Any, size: int) -> Tensor:
        return torch.cat([encode(*piece) for piece in zip(*(x.split(size) for x in tensors), strict=True)])

    monkeypatch.setattr("internvl.train.stages.contrastive.in_pieces", kept)
    plain = loss_and_gradients(run)
    assert torch.equal(cached[0]["contrast"], plain[0]["contrast"])
    assert_alike(cached[1], plain[1])
    other = loss_and_gradients(run, seed=1)
    assert not torch.equal(other[0]["contrast"], plain[0]["contrast"])


def test_pieces_hold_no_graph() -> None:
    """What autograd keeps does not grow with the network, only inputs and outputs stay."""
    network = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.GELU()) for _ in range(8)))
    x, saved = torch.randn(64, 16), [0]

    def count(tensor: Tensor) -> Tensor:
        saved[0] += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        whole = in_pieces(network, [x], None)
        kept_whole, saved[0] = saved[0], 0
        pieces = in_pieces(network, [x], 16)
    assert torch.allclose(whole, pieces)
    assert saved[0] * 4 <= kept_whole
    pieces.square().sum().backward()
    gradient = network[0][0].weight.grad.clone()
    network.zero_grad()
    whole.square().sum().backward()
    assert_close(gradient, network[0][0].weight.grad)


def test_masked_patches_never_enter_the_encoder(inputs: Path, tmp_path: Path) -> None:
    stage: Any = open_stage(contrastive(inputs, tmp_path, pairs=Pairs(mask_share=0.5, side=28)))
    seen = []
    stage.model.vision.layers[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    batch = next(stage.batches())
    stage.losses(batch)
    assert seen == [(8, 1 + 2, 64)]  # 28 px: four patches, two of them kept
    vision, pixels = stage.model.vision, torch.randn(1, 3, 56, 56)
    everything = torch.arange(16)[None]
    with torch.no_grad():
        assert_close(vision(pixels, kept=everything), vision(pixels), rtol=1e-4, atol=1e-5)
        black = pixels.clone()
        black[..., 14:28, :14] = 0  # patch 4
        kept = torch.tensor([[0, 1, 2, 3, 5, 9]])
        assert torch.equal(vision(black, kept=kept), vision(pixels, kept=kept))


# ranks


def _on_rank(rank: int, ranks: int, runs: list[dict[str, Any]], folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    for number, run in enumerate(runs):
        torch.save((*loss_and_gradients(from_json(run)), held_out(from_json(run))), f"{folder}/{number}-{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one(inputs: Path, tmp_path: Path) -> None:
    """Half of the batch each, in pieces: the mean over ranks of losses and gradients, also where a picture of the other
    rank learns; the held-out numbers. Two pairs share their text, two their picture, across the ranks."""
    lines = (inputs / "pairs.jsonl").read_text().splitlines(keepends=True)
    picture, caption = json.loads(lines[2])["image"], json.loads(lines[1])["caption"]
    lines[5] = json.dumps({**json.loads(lines[5]), "caption": caption}) + "\n"
    lines[6] = json.dumps({**json.loads(lines[6]), "image": picture}) + "\n"
    shared = inputs / "shared.jsonl"
    shared.write_text("".join(lines[:8]))
    scored = {"held_out": str(inputs / "held_out.jsonl"), "held_out_samples": 8, "meta": str(shared)}
    hard = Pairs(area=(1.0, 1.0), negatives="hard", micro_batch=3)
    made = [
        contrastive(inputs, tmp_path, pairs=Pairs(micro_batch=3, mask_share=0.5)),
        generative(inputs, tmp_path, pairs=Pairs(area=(1.0, 1.0))),
        generative(inputs, tmp_path, pairs=hard, vision=Part("full")),
    ]
    runs = [replace(run, data=replace(run.data, **scored)) for run in made]
    arguments = (2, [to_json(run) for run in runs], str(tmp_path))
    mp.start_processes(_on_rank, arguments, nprocs=2, start_method="spawn")
    for number, run in enumerate(runs):
        ranks = [torch.load(tmp_path / f"{number}-{rank}.pt") for rank in range(2)]
        losses, grads = loss_and_gradients(run)
        alone = held_out(run)
        for rank in ranks:
            assert rank[2] == pytest.approx(alone, abs=1e-5)
        assert_alike({name: (ranks[0][0][name] + ranks[1][0][name]) / 2 for name in losses}, losses)
        assert_alike({name: (ranks[0][1][name] + ranks[1][1][name]) / 2 for name in grads}, grads)


def test_padding_at_the_begin_of_rows_is_kept() -> None:
    """Only what no row of a group needs is cut."""
    model, generator = tiny_dual(), torch.Generator().manual_seed(4)
    mask = torch.arange(20) >= torch.tensor([17, 2, 16, 0])[:, None]
    ids = torch.randint(3, 90, mask.shape, generator=generator) * mask
    assert_close(by_length(model.encode_text, ids, mask, call=1), model.encode_text(ids, mask), rtol=1e-4, atol=1e-6)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=7).map(sorted), st.integers(0, 20))
def test_groups_of_like_length_need_fewest_positions(lengths: list[int], call: int) -> None:
    def cost(sizes: list[int]) -> int:
        ends = list(itertools.accumulate(sizes))
        return sum(size * lengths[end - 1] + call for size, end in zip(sizes, ends, strict=True))

    between = range(1, len(lengths))
    cuts = itertools.chain.from_iterable(itertools.combinations(between, n) for n in range(len(lengths)))
    ways = [[b - a for a, b in itertools.pairwise((0, *cut, len(lengths)))] for cut in cuts]
    found = groups_of(lengths, call)
    assert sum(found) == len(lengths)
    assert min(found) > 0
    assert cost(found) == min(map(cost, ways))


def test_rows_of_like_length_are_encoded_together() -> None:
    """The same vectors and gradients as all at once, at fewer positions."""
    model, generator = tiny_dual(), torch.Generator().manual_seed(3)
    lengths = torch.tensor([3, 40, 5, 9, 33, 4, 2, 12, 6])
    mask = torch.arange(40) < lengths[:, None]
    ids = torch.randint(3, 90, mask.shape, generator=generator) * mask
    positions = []

    def encode(ids: Tensor, mask: Tensor) -> Tensor:
        positions.append(ids.numel())
        return model.encode_text(ids, mask)

    found, wanted = by_length(encode, ids, mask, call=1), model.encode_text(ids, mask)
    assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert sum(positions) < ids.numel() / 2
    weights = torch.randn(found.shape, generator=generator)
    gradients = [torch.autograd.grad((x * weights).sum(), model.text_projection)[0] for x in (found, wanted)]
    assert_close(*gradients, rtol=1e-4, atol=1e-5)
