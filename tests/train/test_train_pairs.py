"""Laws of the stages on pairs: pieces = whole, ranks = one, resumed = uninterrupted, frozen stays, learning happens."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

import internvl
from internvl.commands.train import main
from internvl.load_dual import extend_llama, load_dual, save_dual
from internvl.models.build import build_dual
from internvl.train.loop import Trainer, train
from internvl.train.pieces import in_pieces
from internvl.train.recipes import RECIPES, find_recipe, v1_0
from internvl.train.run import Optimiser, Pairs, Part, RunConfig, Schedule, from_json, to_json
from internvl.train.stages import open_stage
from internvl.zoo import VISION, VIT_TINY_6B


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dual")
    v1_0.write_tiny_model(folder / "model")
    v1_0.write_tiny_pairs(folder / "pairs.jsonl")
    v1_0.write_tiny_pairs(folder / "held_out.jsonl", 9)
    return folder


def contrastive(inputs: Path, out: Path, **changes: Any) -> RunConfig:
    run = v1_0.tiny_contrastive()
    data = replace(run.data, meta=str(inputs / "pairs.jsonl"), held_out="", batch_samples=8)
    settings: dict[str, Any] = {"schedule": Schedule(steps=6), "save_every": 2, "eval_every": 0, "log_every": 1}
    base = {"out": str(out), "model": str(inputs / "model"), "data": data, "device": "cpu"}
    return replace(run, **{**base, **settings, **changes})


def generative(inputs: Path, out: Path, **changes: Any) -> RunConfig:
    run, pairs = contrastive(inputs, out), v1_0.tiny_generative().pairs
    return replace(run, **{"stage": "generative", "vision": Part(), "language": Part(), "pairs": pairs, **changes})


def learned(run: RunConfig, step: int = 6) -> dict[str, Tensor]:
    return load_file(Path(run.out) / "checkpoints" / f"step-{step:08d}" / "learned.safetensors")


def loss_and_gradients(run: RunConfig, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of the first batch, from a given state of the generator."""
    stage: Any = open_stage(run)
    learner = stage.begin(run, torch.device("cpu"))
    learner.train_mode()
    batches = stage.batches()
    batch = stage.prepare(next(batches))
    torch.manual_seed(seed)
    losses = {name: value / stage.weights(batch)[name] for name, value in stage.losses(batch).items()}
    sum(losses.values()).backward()  # type: ignore[union-attr]
    grads = {name: p.grad for name, p in learner.parameters.items() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, grads


def assert_alike(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, expected in b.items():
        assert_close(a[name], expected, rtol=1e-4, atol=1e-6 + 1e-5 * float(expected.abs().max()), msg=name)


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
        torch.save(loss_and_gradients(from_json(run)), f"{folder}/{number}-{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one(inputs: Path, tmp_path: Path) -> None:
    """Half of the joint batch each, in pieces; the mean over ranks of losses and gradients. Stage 2 with one foreign
    text a pair: its first and second half depend on the rank, so only contrast and captions are those of one batch."""
    one = [contrastive(inputs, tmp_path, pairs=Pairs(micro_batch=3, mask_share=0.5))]
    one.append(generative(inputs, tmp_path, pairs=Pairs(area=(1.0, 1.0))))
    half = [to_json(replace(run, data=replace(run.data, batch_samples=4))) for run in one]
    mp.start_processes(_on_rank, (2, half, str(tmp_path)), nprocs=2, start_method="spawn")
    for number, run in enumerate(one):
        ranks = [torch.load(tmp_path / f"{number}-{rank}.pt") for rank in range(2)]
        losses, grads = loss_and_gradients(run)
        joint = {name: (ranks[0][0][name] + ranks[1][0][name]) / 2 for name in losses}
        same = losses.keys() - {"itm"}
        assert_alike({name: joint[name] for name in same}, {name: losses[name] for name in same})
        if number == 0:
            assert_alike({name: (ranks[0][1][name] + ranks[1][1][name]) / 2 for name in grads}, grads)


# the loop


@pytest.mark.parametrize("make", [contrastive, generative])
def test_resumed_equals_uninterrupted_to_the_bit(inputs: Path, tmp_path: Path, make: Any) -> None:
    changes: dict[str, Any] = {"export": "none"}
    if make is generative:
        changes["data"] = replace(make(inputs, tmp_path).data, features="memory")
    whole = make(inputs, tmp_path / "whole", **changes)
    train(whole, open_stage(whole))
    broken = replace(whole, out=str(tmp_path / "broken"))
    stage: Any = open_stage(broken)
    inner, count = stage.losses, [0]

    def losses(prepared: Any) -> Any:
        count[0] += 1
        if count[0] > 5:
            raise RuntimeError("killed")
        return inner(prepared)

    stage.losses = losses
    with pytest.raises(RuntimeError, match="killed"):
        train(broken, stage)
    torch.manual_seed(123)
    assert train(broken, open_stage(broken)).finished
    expected, found = learned(whole), learned(broken)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


@pytest.mark.parametrize("make", [contrastive, generative])
def test_twenty_steps_lower_the_loss_on_few_pairs(inputs: Path, tmp_path: Path, make: Any) -> None:
    lines = (inputs / "pairs.jsonl").read_text().splitlines(keepends=True)[:8]
    few = inputs / f"few_{make.__name__}.jsonl"
    few.write_text("".join(lines).replace("pairs_pictures/", f"{inputs}/pairs_pictures/"))
    run = make(inputs, tmp_path, schedule=Schedule(steps=20), save_every=0, export="none")
    run = replace(run, data=replace(run.data, meta=str(few)), pairs=replace(run.pairs, mask_share=0.0, drop_path=0.0))
    train(run, open_stage(run))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 1.0


def test_what_learns_moves_and_what_is_frozen_stays(inputs: Path, tmp_path: Path) -> None:
    """Stage 2 as in the paper: the ViT, all of the LLaMA, its head, text_projection and the patches' pooling stay."""
    before = load_file(inputs / "model" / "model.safetensors")
    run = generative(inputs, tmp_path / "g")
    train(run, open_stage(run))
    after = load_file(tmp_path / "g" / "model" / "model.safetensors")
    moved = {name for name, value in after.items() if not torch.equal(before[name], value)}
    starts = ("query_tokens", "clip_projector2.", "itm_head.", "logit_scale")
    expected = {name for name in before if ".cross_attn.q_proj" in name or name.startswith(starts)}
    assert moved >= expected - {"clip_projector2.cross_attn.k_bias"}  # shifts all scores alike: no gradient
    assert all(name.startswith(starts) or ".cross_attn." in name for name in moved)
    parts = load_file(tmp_path / "g" / "parts" / "learned.safetensors")
    assert {"qllama.queries", "match_head.weight"} <= parts.keys()
    run = contrastive(inputs, tmp_path / "c", language=Part("full", layers_from=-1), vision=Part())
    train(run, open_stage(run))
    parts = load_file(tmp_path / "c" / "parts" / "learned.safetensors")
    assert {name.split(".")[0] for name in parts} == {"image_pool", "text_projection", "logit_scale", "qllama"}
    assert all(name.startswith("qllama.layers.3.") for name in parts if name.startswith("qllama"))
    assert not any(".cross." in name for name in parts)


def test_the_exported_model_opens_and_says_what_was_trained(inputs: Path, tmp_path: Path) -> None:
    run = contrastive(inputs, tmp_path)
    stage: Any = open_stage(run)
    train(run, stage)
    opened: Any = internvl.load(tmp_path / "model")
    texts = ["red beside blue", "green beside black"]
    picture = inputs / "pairs_pictures" / "red-blue.png"
    trained = internvl.Dual(replace(load_dual(inputs / "model"), model=stage.model))
    assert_close(opened.encode_text(texts), trained.encode_text(texts))
    assert_close(opened.encode_image([picture]), trained.encode_image([picture]))
    assert opened.model.vision.layers[0].drop_path.rate == 0.0


def test_adapters_learn_and_are_merged(inputs: Path, tmp_path: Path) -> None:
    """LoRA on both towers: what is exported is the trained model, cross-attention is not touched, resume is exact."""
    lora = Part("lora", rank=2, dropout=0.3)
    run = contrastive(inputs, tmp_path / "a", vision=lora, language=lora, export="none")
    stage: Any = open_stage(run)
    train(run, stage)
    names = learned(run).keys()
    assert {name.split(".")[0] for name in names} == {
        "image_pool",
        "text_projection",
        "logit_scale",
        "vision",
        "qllama",
    }
    assert all(".lora_" in name for name in names if name.startswith(("vision", "qllama")))
    assert not any(".cross." in name for name in names)
    stage.model.eval()
    texts = torch.tensor([[1, 40, 41, 2], [1, 50, 2, 0]])
    with torch.no_grad():
        trained = stage.model.encode_text(texts)
    again: Any = open_stage(replace(run, export="last"))
    train(replace(run, export="last"), again)  # nothing left to do but to export
    opened = load_dual(tmp_path / "a" / "model").model
    with torch.no_grad():
        assert_close(opened.encode_text(texts), trained, rtol=1e-4, atol=1e-5)
    before, after = (load_file(folder / "model" / "model.safetensors") for folder in (inputs, tmp_path / "a"))
    change = (
        after["qllama.model.layers.1.self_attn.q_proj.weight"] - before["qllama.model.layers.1.self_attn.q_proj.weight"]
    )
    assert int(torch.linalg.matrix_rank(change, atol=1e-5)) == 2


def test_kept_features_change_nothing(inputs: Path, tmp_path: Path) -> None:
    results = []
    for kind in ("none", "memory"):
        run = generative(inputs, tmp_path / kind, export="none")
        run = replace(run, data=replace(run.data, features=kind, held_out=str(inputs / "held_out.jsonl")))
        stage: Any = open_stage(run)
        result = train(run, stage, evaluators=[stage.evaluate])
        results.append((learned(run), result.metrics))
    assert stage.store is not None
    assert len(stage.store) == 60
    assert_alike(results[1][0], results[0][0])
    for name in ("held_out_loss", "held_out_itc", "held_out_itm", "held_out_itg"):
        assert results[1][1][name] == pytest.approx(results[0][1][name], abs=1e-3)


def test_generative_begins_with_what_c_learned(inputs: Path, tmp_path: Path) -> None:
    """From a folder of InternVL-C alone: its weights, the output head of the LLaMA, the rest random."""
    whole = load_dual(inputs / "model")
    alone = build_dual(replace(whole.config, generative=False))
    alone.load_state_dict(whole.model.state_dict(), strict=False)
    save_dual(alone, whole.tokenizer, tmp_path / "c")
    run = generative(inputs, tmp_path / "g", model=str(tmp_path / "c"))
    with pytest.raises(
        ValueError, match=r"is InternVL-C, which has no output head for captions; set pairs\.output_head"
    ):
        open_stage(run)
    (tmp_path / "llama").mkdir()
    save_file({"lm_head.weight": whole.model.qllama.head.weight.detach().clone()}, tmp_path / "llama/model.safetensors")
    run = replace(run, pairs=replace(run.pairs, output_head=str(tmp_path / "llama")))
    stage: Any = open_stage(run)
    for name, value in alone.state_dict().items():
        assert torch.equal(stage.model.state_dict()[name], value), name
    assert torch.equal(stage.model.qllama.head.weight, whole.model.qllama.head.weight)
    assert bool((stage.model.qllama.queries != 0).any())
    assert train(run, stage).finished


def test_the_temperature_learns_and_is_bounded(inputs: Path, tmp_path: Path) -> None:
    run = contrastive(inputs, tmp_path, pairs=Pairs(max_scale=14.0), optimiser=Optimiser(peak_lr=0.1), export="none")
    trainer = Trainer(run, open_stage(run), (), None)
    scale = trainer.learner.parameters["logit_scale"]
    first = float(scale.detach().exp())
    trainer.fit()
    assert float(scale.detach().exp()) != pytest.approx(first, abs=1e-3)
    trainer.stage.bound_scale()  # type: ignore[attr-defined]
    assert float(scale.detach().exp()) <= 14.0 + 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 2}, "accumulate is 2; pairs of another micro-batch would be no negatives"),
        ({"pairs": Pairs(micro_batch=0)}, "pairs.micro_batch is 0"),
        ({"vision": Part(), "connector": Part(), "language": Part()}, "nothing learns"),
        ({"vision": Part("full", layers_from=9)}, "layers_from is 9 but the part has 3 blocks"),
    ],
)
def test_runs_without_meaning_are_refused(inputs: Path, tmp_path: Path, changes: Any, message: str) -> None:
    run = contrastive(inputs, tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        open_stage(run).begin(run, torch.device("cpu"))


def test_features_of_changing_pictures_are_refused(inputs: Path, tmp_path: Path) -> None:
    run = contrastive(inputs, tmp_path)
    with pytest.raises(ValueError, match="features are kept of a frozen encoder and of pictures that never change"):
        open_stage(replace(run, data=replace(run.data, features="memory")))
    with pytest.raises(ValueError, match="stages on pairs keep features in memory, or none"):
        open_stage(replace(run, data=replace(run.data, features="disk")))
    with pytest.raises(ValueError, match=r"data\.meta is not given"):
        open_stage(replace(run, data=replace(run.data, meta="")))


# recipes


def test_stage_1_begins_with_a_llama(tmp_path: Path) -> None:
    model = build_dual(load_config())
    state = {k.removeprefix("qllama."): v for k, v in official(model).items() if k.startswith("qllama.")}
    state = {k: v.clone() for k, v in state.items() if ".cross_attn." not in k}
    (tmp_path / "config.json").write_text(json.dumps(dict(model.config.language.settings)))
    save_file(state, tmp_path / "model.safetensors")
    sizes = {"num_queries": 5, "embed_width": 24, "pool_heads": 4}
    found = extend_llama(tmp_path, VIT_TINY_6B, seed=3, **sizes).model
    assert torch.equal(found.qllama.layers[1].mlp.up_proj.weight, model.qllama.layers[1].mlp.up_proj.weight)
    assert torch.equal(found.qllama.head.weight, model.qllama.head.weight)
    save_file({**state, "model.extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.extra"):
        extend_llama(tmp_path, VIT_TINY_6B, **sizes)


def load_config() -> Any:
    from internvl.zoo import DUAL

    return DUAL["tiny-dual"]


def official(model: Any) -> dict[str, Tensor]:
    from internvl.convert import dual
    from internvl.convert.keys import expand

    state = model.state_dict()
    return {entry.disk[0]: state[entry.ours[0]] for entry in expand(dual.OFFICIAL_RULES, state)}


def test_recipes_state_the_paper() -> None:
    """Table 20: 28.7 billion pairs at 164K, then 1.6 billion at 20K; half a billion of the first unmasked."""
    first, second, third = v1_0.v1_0_contrastive(), v1_0.v1_0_contrastive_224(), v1_0.v1_0_generative()
    assert first.schedule.steps + second.schedule.steps == 175_000
    assert 640 * first.data.batch_samples * 175_000 == pytest.approx(28.7e9, rel=0.01)
    assert 640 * second.data.batch_samples * second.schedule.steps == pytest.approx(0.5e9, rel=0.01)
    assert 160 * third.data.batch_samples * third.schedule.steps == pytest.approx(1.6e9, rel=0.03)
    assert first.optimiser.peak_lr * first.language.lr_scale == pytest.approx(1e-4)
    assert second.optimiser.peak_lr == pytest.approx(7.95e-7, rel=0.01)
    assert (first.pairs.side, second.pairs.side) == (196, 224)
    assert VISION["InternViT-6B-224px"].image_size == 224
    for run in (first, second, third):
        assert from_json(json.loads(json.dumps(to_json(run)))) == run


@pytest.mark.parametrize(
    "name", [name for name in RECIPES if name.startswith(("v1_0_", "pocket_dual_", "tiny_contr", "tiny_gen"))]
)
def test_every_recipe_runs_two_steps_in_small(tmp_path: Path, name: str) -> None:
    run = v1_0.shrunk(find_recipe(name).make(), tmp_path)
    result = train(run, open_stage(run))
    assert result.finished
    assert result.step == 2
    assert result.metrics["loss"] > 0
    internvl.load(tmp_path / "run" / "model")


def test_the_commands_of_the_tiny_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    short = ["--schedule.steps", "3", "--device", "cpu"]
    with pytest.raises(ValueError, match="internvl train tiny_contrastive"):
        main(["tiny_generative"])
    assert main(["tiny_contrastive", *short]) == 0
    assert main(["tiny_generative", *short, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["finished"]
    assert "held_out_itm" in result["metrics"]
    dual: Any = internvl.load("runs/tiny_generative/model")
    assert dual.match([tmp_path / "runs/tiny-dual-inputs/pairs_pictures/red-blue.png"], ["red beside blue"]).shape == (
        1,
    )
    with pytest.raises(ValueError, match=r"models/chinese_alpaca_lora_7b is not there"):
        find_recipe("v1_0_contrastive").prepare(v1_0.v1_0_contrastive())
    recipe = find_recipe("pocket_dual_contrastive")
    with pytest.raises(ValueError, match=r"runs/pocket-dual-base is not there"):
        recipe.prepare(recipe.make())
