"""InternVL-Chat 1.0 (arXiv 2312.14238, section 4.4): LLaVA-1.5's two stages, and QLLaMA's queries before the patches.

The vision tower is frozen throughout. With queries neither scripts nor checkpoints were released: parts and batch are
the paper's, the rest is that of the stages without them. `tiny_chat_qllama` and `pocket_dual_chat` run here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from internvl.train.recipes import pocket, tiny
from internvl.train.recipes.official import Family, batch, learning, rates, shared
from internvl.train.run import RunConfig
from internvl.train.settings import Optimiser, Part, Schedule

SIZES = {
    "7b": "InternVL-Chat-ViT-6B-Vicuna-7B",
    "13b": "InternVL-Chat-ViT-6B-Vicuna-13B",
    "7b_448": "InternVL-Chat-ViT-6B-Vicuna-7B-448px",
    "13b_448": "InternVL-Chat-ViT-6B-Vicuna-13B-448px",
}
QLLAMA_SIZES = {
    f"{size}b_{side}": f"InternVL-Chat-QLLaMA-Vicuna-{size}B-{side}px" for size in (7, 13) for side in (224, 336)
}
LARGE_SIZES = {size: release for size, release in QLLAMA_SIZES.items() if size.endswith("336")}

TINY = "runs/tiny-chat-qllama-inputs"
POCKET = "runs/pocket-dual-chat-base"


def connector(size: str) -> RunConfig:
    """The MLP alone on image-caption pairs (558K), 256 a step; template plain, the middle square of a picture.

    Source: official scripts_internvl/pretrain_internvit6b_*: rate 1e-3, no decay, 1 epoch, cosine, 3 % of warm-up,
    2,048 positions, bf16. No padding to a square: that is stage B's.
    """
    name = f"v1_0_chat_connector_{size}"
    run = shared(name, f"runs/v1_0_chat_base_{size}")
    data = replace(run.data, max_length=2048, max_tiles=1, grouped=False, template="plain", pad_to_square=False)
    return batch(rates(learning(replace(run, data=data), "connector"), 1e-3, 0.0), 256)


def chat(size: str) -> RunConfig:
    """MLP and language model on Mix-665K, 128 a step, from v1_0_chat_connector; template v1, padded squares.

    Source: official scripts_internvl/finetune_internvit6b_*: rate 2e-5, no decay, 1 epoch, cosine, 3 % of warm-up,
    2,048 positions, image_aspect_ratio pad, bf16.
    """
    run = connector(size)
    data = replace(run.data, grouped=True, template=None, pad_to_square=None)
    run = replace(run, out=f"runs/v1_0_chat_{size}", model=f"runs/v1_0_chat_connector_{size}/model", data=data)
    return batch(rates(learning(run, "connector language"), 2e-5, 0.0), 128)


def qllama_connector(size: str) -> RunConfig:
    """Both MLPs, of queries and of patches, on the 4M set, 512 a step.

    Source: paper 1.0, section 4.4 and table 9: the 224 px models learn nothing else (64M and 90M numbers); batch 512.
    Not published: rate, decay, warm-up and length are those of v1_0_chat_connector, template and padding those of
    v1_0_chat.
    """
    run = connector(size)
    data = replace(run.data, template=None, pad_to_square=None)
    return batch(replace(run, out=f"runs/v1_0_chat_qllama_connector_{size}", data=data), 512)


def qllama(size: str) -> RunConfig:
    """Then the language model with both MLPs, on the same set, 512 a step, from v1_0_chat_qllama_connector.

    Source: paper 1.0, section 4.4 and table 9 (13B learned numbers at 336 px); batch 512. Not published: rate, decay
    and warm-up are those of v1_0_chat.
    """
    run = qllama_connector(size)
    out, before = f"runs/v1_0_chat_qllama_{size}", f"runs/v1_0_chat_qllama_connector_{size}/model"
    return batch(rates(learning(replace(run, out=out, model=before), "connector language"), 2e-5, 0.0), 512)


FAMILIES = (
    Family("v1_0_chat_connector", connector, SIZES),
    Family("v1_0_chat", chat, SIZES),
    Family("v1_0_chat_qllama_connector", qllama_connector, QLLAMA_SIZES),
    Family("v1_0_chat_qllama", qllama, LARGE_SIZES),
)


def tiny_chat_qllama() -> RunConfig:
    """Six colours by a random chat model of 1.0 with queries: both MLPs and the language model learn, in seconds.

    Encoder and QLLaMA stay as they were drawn. Rates found by trying. Command: internvl train tiny_chat_qllama
    """
    run = tiny.tiny_sft()
    return replace(
        run,
        out="runs/tiny_chat_qllama",
        model=f"{TINY}/model",
        vision=Part(),
        data=replace(
            run.data,
            meta=f"{TINY}/records.jsonl",
            held_out=f"{TINY}/held_out.jsonl",
            max_length=512,
            augment="off",
            features="memory",
        ),
    )


def pocket_dual_chat() -> RunConfig:
    """The queries of `pocket-dual` and its patches, before the language side of `pocket`: both MLPs learn; two cores.

    As v1_0_chat_qllama_connector: the 224 px models of paper 1.0, table 9, learn nothing else. 288 tokens a picture;
    features (330 kB each, bf16) are kept on disk, so each picture is seen once. Rate and batch as pocket_connector_cpu.
    Command: internvl train pocket_dual_chat
    """
    run = pocket.pocket_connector_cpu()
    return replace(
        run,
        out="runs/pocket_dual_chat",
        model=POCKET,
        tokens=replace(run.tokens, learn=False),
        data=replace(run.data, max_length=1280, max_tiles=None, features_folder="runs/pocket-dual-chat-features"),
        optimiser=Optimiser(peak_lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0),
        schedule=Schedule(steps=3000, warmup_share=0.03),
    )


def prepare_tiny(run: RunConfig) -> None:
    """The random model and the records of the tiny run, where they are missing."""
    if run.model == f"{TINY}/model" and not Path(run.model).is_dir():
        tiny.write_model(Path(run.model), "tiny-1.0-qllama", run.seed)
    tiny.prepare(run, tiny_chat_qllama())


def prepare_pocket(run: RunConfig) -> None:
    """Put the base together from `pocket-dual` and `pocket`, where it is missing."""
    if run.model == POCKET and not (Path(POCKET) / "config.json").is_file():
        write_base(Path(POCKET), run.seed)
    pocket.prepare(run)


def write_base(folder: Path, seed: int = 0) -> None:
    """Encoder and queries of `pocket-dual`, fresh MLPs, and what `pocket` answers with; in float32."""
    import torch

    from internvl.compose import Parts, compose
    from internvl.locate import locate

    dtype = torch.float32
    compose(Parts(locate("pocket-dual"), locate("pocket"), form="1.0", dtype=dtype, seed=seed), folder)
