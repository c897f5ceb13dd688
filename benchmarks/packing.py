"""Packed rows against padded ones: how full, how long ranks wait, and tokens a second of a training step.

    python benchmarks/packing.py [--data data/pocket] [--records 24] [--rounds 3] [--positions 1024] [--layers 2]

Lengths and tiles are those of real records, from text and headers (`internvl data build` makes data/pocket), and of a
drawn mixture of text, pictures, several pictures and videos at 448 px. Part one plans rows and deals them to 8 ranks.
Part two trains `pocket` with fewer language layers and random weights on the same records at equal memory, that is at
most so many positions a step, the padding counted: our padded rows, our packed rows, transformers' Trainer with its
InternVL and padded rows, and TRL's SFTTrainer (`pip install trl`) with the same. TRL packs text alone: a data set with
pictures it refuses (`sft_trainer.py`, 1.16). So part three takes the same lengths as text: our packed rows, TRL's
padded ones, TRL's packing ("bfd", boundaries by position ids). Tokens are real ones, padding is not counted.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from measure import in_turns, write
from rich.console import Console
from rich.table import Table

from internvl.batch import ChatBatch
from internvl.data.collate import collate, collate_packed
from internvl.data.encode import Encoder
from internvl.data.images import normalise
from internvl.data.mixture import Mixture, read_sets
from internvl.data.packing import Packing, Room, simulate
from internvl.data.sample import Sample
from internvl.load import load_checkpoint, read_tokenizer, save_checkpoint
from internvl.locate import locate
from internvl.models.build import build
from internvl.tokens import IGNORE_INDEX, IMAGE_TOKEN, token_id
from internvl.train import optim, trainable
from internvl.train.run import RunConfig
from internvl.train.settings import Part, Schedule
from internvl.train.stages.sft import Sft
from internvl.zoo import CHAT

Sizes = list[tuple[int, int]]


def real_sizes(folder: Path, tokenizer: Any, count: int) -> Sizes:
    """Tokens and tiles of records of an epoch, measured as a run measures them."""
    meta = folder / "meta.json"
    mixture = Mixture(read_sets(meta), seed=0)
    encoder = Encoder(tokenizer, CHAT["pocket"])
    found = []
    for number in mixture.epoch(0)[:count].tolist():
        index, position = mixture.locate(number)
        found.append(tuple(encoder.counts(mixture.sets[index].record(position))))
    return found


def mixed_sizes(count: int) -> Sizes:
    """Text lognormal; 15 % text alone, 70 % one picture of 1 to 13 tiles, 10 % several, 5 % videos."""
    rng, found = np.random.default_rng(0), []
    for kind in rng.random(count):
        text = int(np.clip(rng.lognormal(4.8, 0.8), 16, 3000))
        if kind < 0.15:
            tiles = 0
        elif kind < 0.85:
            tiles = int(rng.choice([1, 3, 5, 7, 9, 13], p=[0.2, 0.1, 0.15, 0.3, 0.1, 0.15]))
        else:
            tiles = int(rng.integers(2, 5)) * 2 if kind < 0.95 else int(rng.integers(8, 25))
        found.append((text + 256 * tiles, tiles))
    return found


def padded_waste(sizes: Sizes, batch: int, ranks: int) -> dict[str, float]:
    """Of batches in the order of the records: share of padding; idle share of ranks with one batch each."""
    tokens = np.array([size[0] for size in sizes[: len(sizes) // (batch * ranks) * batch * ranks]])
    tiles = np.array([size[1] for size in sizes[: len(tokens)]])
    longest = tokens.reshape(-1, batch).max(1)
    by_step = longest.reshape(-1, ranks)
    tiles_by_step = tiles.reshape(-1, batch).sum(1).reshape(-1, ranks)
    return {
        "fill": float(tokens.sum() / (longest.sum() * batch)),
        "idle_tokens": float(1 - by_step.sum() / (by_step.max(1).sum() * ranks)),
        "idle_tiles": float(1 - tiles_by_step.sum() / (tiles_by_step.max(1).sum() * ranks)),
    }


def plan_table(named: dict[str, tuple[Sizes, Room]]) -> tuple[Table, dict[str, Any]]:
    table = Table("lengths", "rows", "fill", "tile fill", "samples a row", "tiles a row", "idle by tokens", "by tiles")
    results: dict[str, Any] = {}
    for name, (sizes, room) in named.items():
        for batch in (1, 8):
            found = padded_waste(sizes, batch, 8)
            cells = (
                f"{found['fill']:.3f}",
                "",
                str(batch),
                "",
                f"{found['idle_tokens']:.3f}",
                f"{found['idle_tiles']:.3f}",
            )
            table.add_row(name, f"padded, {batch}", *cells)
            results[f"{name}, padded {batch}"] = found
        choices = {"packed, official search": Packing(search="official", buffer=20), "packed": Packing()}
        for words, packing in choices.items():
            began = time.perf_counter()
            found = simulate(sizes, room, packing, ranks=8)[0].read()
            found["microseconds a sample"] = 1e6 * (time.perf_counter() - began) / len(sizes)
            keys = ("fill", "fill_tiles", "samples_per_row", "tiles_per_row", "idle_tokens", "idle_tiles")
            table.add_row(name, f"{words} {room.tokens}/{room.tiles}", *(f"{found[key]:.3f}" for key in keys))
            results[f"{name}, {words}"] = found
    return table, results


def make_samples(sizes: Sizes, image_id: int, tile_size: int, tokens_per_tile: int) -> list[Sample]:
    """Random words and pixels of these sizes; the last fifth of the text is learned."""
    generator, made = torch.Generator().manual_seed(0), []
    for number, (tokens, tiles) in enumerate(sizes):
        text = tokens - tiles * tokens_per_tile
        words = torch.randint(10, 40_000, (text,), generator=generator)
        ids = torch.cat([words[:4], torch.full((tiles * tokens_per_tile,), image_id), words[4:]])
        labels = torch.full_like(ids, IGNORE_INDEX)
        learned = max(2, text // 5)
        labels[-learned:] = ids[-learned:]
        pixels = torch.randint(0, 256, (tiles, 3, tile_size, tile_size), generator=generator, dtype=torch.uint8)
        made.append(Sample(ids, labels, pixels, f"record {number}"))
    return made


def padded_batches(samples: Sequence[Sample], positions: int) -> list[list[Sample]]:
    """As many records a batch as fit with the longest record of all: a loader that knows no lengths must keep to it."""
    size = max(1, positions // max(len(sample.input_ids) for sample in samples))
    return [list(samples[first : first + size]) for first in range(0, len(samples), size)]


def packed_batches(samples: Sequence[Sample], positions: int) -> list[list[Sample]]:
    sizes = [(len(sample.input_ids), sample.num_tiles) for sample in samples]
    _, rows = simulate(sizes, Room(positions), Packing(), ranks=1)
    return [[samples[segment.place] for segment in row.segments] for row in rows]


def our_epoch(sft: Sft, run: RunConfig, batches: list[ChatBatch]) -> Callable[[], None]:
    learner = sft.begin(run, torch.device("cpu"))
    optimizer = optim.build(trainable.groups(learner), run)

    def epoch() -> None:
        learner.train_mode()
        for batch in batches:
            loss = sft.losses(sft.prepare(batch))["next_token"] / sft.weights(batch)["next_token"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(list(learner.parameters.values()), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return epoch


def peer_model(folder: Path) -> Any:
    peer = transformers.InternVLForConditionalGeneration.from_pretrained(folder / "native", dtype=torch.float32)
    peer.model.vision_tower.requires_grad_(False)
    return peer


def peer_rows(some: Sequence[Sample], normalize: Any) -> dict[str, torch.Tensor]:
    rows = collate(some, 0)
    inputs = {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask, "labels": rows.labels}
    return {**inputs, **({"pixel_values": normalise(rows.tiles, normalize)} if rows.num_tiles else {})}


def peer_settings(folder: Path, batch: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "trainer"),
        "per_device_train_batch_size": batch,
        "num_train_epochs": 1,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }


def trainer_epoch(folder: Path, samples: Sequence[Sample], batch: int, normalize: Any) -> Callable[[], object]:
    """transformers' own InternVL and Trainer: the same records, padded to the longest of a batch."""
    peer = peer_model(folder)
    settings = transformers.TrainingArguments(**peer_settings(folder, batch))

    def join(some: list[Sample]) -> dict[str, torch.Tensor]:
        return peer_rows(some, normalize)

    def epoch() -> object:
        trainer = transformers.Trainer(model=peer, args=settings, train_dataset=list(samples), data_collator=join)
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer.train()

    return epoch


def trl_epoch(
    folder: Path, samples: Sequence[Sample], batch: int, normalize: Any, tokenizer: Any, positions: int | None = None
) -> Callable[[], object]:
    """TRL's SFTTrainer on the same model: rows padded as above, or, with `positions`, packed by itself (text alone)."""
    import datasets
    import trl

    peer, packed = peer_model(folder), positions is not None
    more = {"packing": True, "max_length": positions} if packed else {"dataset_kwargs": {"skip_prepare_dataset": True}}
    # TRL's own defaults are bfloat16 and recomputed activations: other work than that of the rows beside it.
    settings = trl.SFTConfig(
        **{**peer_settings(folder, 1 if packed else batch), "gradient_checkpointing": False, "bf16": False, **more}
    )
    if packed:
        rows = [{"input_ids": sample.input_ids.tolist(), "labels": sample.labels.tolist()} for sample in samples]
    else:
        rows = [{"place": place} for place in range(len(samples))]
    data = datasets.Dataset.from_list(rows)

    def join(some: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        return peer_rows([samples[one["place"]] for one in some], normalize)

    def epoch() -> object:
        trainer = trl.SFTTrainer(
            model=peer,
            args=settings,
            train_dataset=data,
            data_collator=None if packed else join,
            processing_class=tokenizer,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer.train()

    return epoch


def text_rates(options: argparse.Namespace, samples: Sequence[Sample], run: RunConfig, folder: Path) -> dict[str, Any]:
    """The same lengths without pictures: our packed rows, TRL's padded and packed ones."""
    tokenizer = read_tokenizer(locate("pocket"), CHAT["pocket"].language)
    loaded = load_checkpoint(folder / "native")
    stage = Sft(run, loaded.model, tokenizer, None, None)  # type: ignore[arg-type]
    packed, batch = packed_batches(samples, options.positions), len(padded_batches(samples, options.positions)[0])
    normalize, positions = loaded.config.normalize, options.positions
    seconds = in_turns(
        {
            "ours, packed text": our_epoch(stage, run, [collate_packed(some, 0) for some in packed]),
            "TRL, padded text": trl_epoch(folder, samples, batch, normalize, tokenizer),
            "TRL, packed text": trl_epoch(folder, samples, batch, normalize, tokenizer, positions),
        },
        options.rounds,
        warm_up=0,
    )
    tokens = sum(len(sample.input_ids) for sample in samples)
    return {name: {**found, "tokens/s": round(tokens / found["median"], 1)} for name, found in seconds.items()}


def rates(options: argparse.Namespace, sizes: Sizes, tokenizer: Any) -> tuple[Table, dict[str, Any]]:
    config = CHAT["pocket"]
    settings = {**config.language.settings, "num_hidden_layers": options.layers}
    config = replace(config, language=replace(config.language, settings=settings))
    image_id = token_id(tokenizer, IMAGE_TOKEN)
    samples = make_samples(sizes, image_id, config.tile_size, config.tokens_per_tile)
    run = RunConfig(schedule=Schedule(steps=1), connector=Part("full"), language=Part("full"), device="cpu")
    padded, packed = padded_batches(samples, options.positions), packed_batches(samples, options.positions)
    tokens = sum(len(sample.input_ids) for sample in samples)
    with tempfile.TemporaryDirectory() as folder:
        models = [build(config, seed=0) for _ in range(2)]
        for model in models:
            model.image_token_id = image_id
        save_checkpoint(models[0], None, Path(folder) / "native", "native")
        stages = [Sft(run, model, tokenizer, None, None) for model in models]  # type: ignore[arg-type]
        calls: dict[str, Callable[[], object]] = {
            "ours, padded": our_epoch(stages[0], run, [collate(some, 0) for some in padded]),
            "ours, packed": our_epoch(stages[1], run, [collate_packed(some, 0) for some in packed]),
            "transformers Trainer, padded": trainer_epoch(Path(folder), samples, len(padded[0]), config.normalize),
        }
        steps = {"ours, padded": padded, "ours, packed": packed, "transformers Trainer, padded": padded}
        texts: dict[str, Any] = {}
        if find_spec("trl") is not None:
            steps["TRL SFTTrainer, padded"] = padded
            calls["TRL SFTTrainer, padded"] = trl_epoch(
                Path(folder), samples, len(padded[0]), config.normalize, tokenizer
            )
            words = make_samples([(size, 0) for size, _ in sizes], image_id, config.tile_size, config.tokens_per_tile)
            texts = text_rates(options, words, run, Path(folder))
        seconds = in_turns(calls, options.rounds, warm_up=0)
    table = Table("training", "batches", "positions with padding", "s", "tokens/s", "x padded", "x Trainer")
    rate = {name: tokens / found["median"] for name, found in seconds.items()}
    for name, groups in steps.items():
        lengths = [[len(sample.input_ids) for sample in some] for some in groups]
        positions = sum(sum(some) if "packed" in name else max(some) * len(some) for some in lengths)
        over = (rate[name] / rate["ours, padded"], rate[name] / rate["transformers Trainer, padded"])
        cells = (
            str(positions),
            f"{seconds[name]['median']:.2f}",
            f"{rate[name]:.0f}",
            f"{over[0]:.2f}",
            f"{over[1]:.2f}",
        )
        table.add_row(name, str(len(groups)), *cells)
    for name, found in texts.items():
        table.add_row(name, "", "", f"{found['median']:.2f}", f"{found['tokens/s']:.0f}", "", "")
    timed = {name: {**found, "tokens/s": round(rate[name], 1)} for name, found in seconds.items()}
    return table, {**timed, **texts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/pocket"))
    parser.add_argument("--records", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    tokenizer = read_tokenizer(locate("pocket"), CHAT["pocket"].language)
    real = real_sizes(options.data, tokenizer, 4000)
    plans, planned = plan_table(
        {
            "data/pocket": (real, Room(1024)),
            "mixture": (mixed_sizes(8000), Room(8192, 48)),
            "mixture, wide": (mixed_sizes(8000), Room(16384, 96)),
        }
    )
    Console(width=140).print(plans)
    trained, timed = rates(options, real[: options.records], tokenizer)
    Console(width=140).print(trained)
    if options.out:
        settings = {name: str(value) for name, value in vars(options).items() if name != "out"}
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        versions["trl"] = version("trl") if find_spec("trl") else "none"
        write("packing", {"settings": settings, "plans": planned, "training": timed}, versions, options.out)


if __name__ == "__main__":
    began = time.perf_counter()
    main()
    print(f"{time.perf_counter() - began:.0f} s")
