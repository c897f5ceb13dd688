"""The training sets of `pocket` from the collected folder alone: official JSONL, images, meta.json, held-out questions.

Any number of processes gives the same result. Where the command line's packages are missing:
    PYTHONPATH=src python -m internvl.data.build_pocket --collected FOLDER --out FOLDER --workers 16
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from internvl.data import heldout_pocket
from internvl.data.library import ADDED, Library, Split
from internvl.data.pocket_records import FOLDER_FILES, MAKERS, Made, Plan, Shop

CHUNK = 250
REPEATS = {
    "scenes": 1,
    "words": 0.8,
    "pictures": 0.6,
    "easy_vqa": 0.3,
    "boxes": 0.4,
    "apart": 0.5,
    "counts": 0.5,
    "colours": 0.5,
    "fresh": 1,
    "many": 0.7,
    "kinds": 0.7,
}
"""repeat_time of the meta JSON: scenes teach most, single shapes least."""


def build(plan: Plan, log: Callable[[str], None] = lambda line: None) -> dict[str, int]:
    """Everything below `plan.out`; returns the number of records by set."""
    pools: tuple[tuple[Split, int], ...] = (("fresh", plan.fresh), ("kinds", plan.kinds))
    for pool, number in pools:
        if number and not (plan.collected / ADDED[pool]).is_file():
            raise FileNotFoundError(
                f"{plan.collected / ADDED[pool]}: no such file, and {number} records of {pool} drawings are asked for; "
                f"`internvl data build` adds it, `--{pool} 0` does without"
            )
    plan.out.mkdir(parents=True, exist_ok=True)
    shop = Shop(plan, Library(plan.collected, "train"))
    shop.library.warm()  # decoded once, shared with the processes that fork below
    if plan.fresh:
        shop.fresh.warm()
    if plan.kinds:
        shop.kinds.warm()
    log(f"library: {len(shop.library.entries)} pictures, {len(shop.library.heads)} names in scenes")
    numbers = {
        "scenes": plan.scenes,
        "words": plan.words,
        "boxes": plan.boxes,
        "apart": plan.apart,
        "counts": plan.counts,
        "colours": plan.colours,
        "pictures": len(shop.pictures),
        "easy_vqa": len(shop.easy_vqa),
        "fresh": plan.fresh,
        "many": plan.many,
        "kinds": plan.kinds,
    }
    counts = {}
    for name, number in numbers.items():
        counts[name] = _write_set(shop, name, number)
        log(f"{name}: {counts[name]} records")
    heldout_pocket.unpack_easy_vqa(plan.collected, plan.out, "train")
    _write_meta(plan.out, counts)
    heldout_pocket.write(plan.collected, plan.out, plan.seed, shop.answers)
    heldout_pocket.write_known(plan.collected, plan.out / "known", plan.seed)
    log("held-out sets: done")
    return counts


def _write_meta(out: Path, counts: dict[str, int]) -> None:
    meta = {
        name: {
            "root": "", "annotation": f"{name}.jsonl", "data_augment": name != "easy_vqa", "repeat_time": REPEATS[name],
            "length": number,
        }
        for name, number in counts.items()
        if number
    }  # fmt: skip
    (out / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def _write_set(shop: Shop, name: str, number: int) -> int:
    for place in range(0, number, FOLDER_FILES):
        (shop.plan.out / "images" / name / f"{place // FOLDER_FILES:03d}").mkdir(parents=True, exist_ok=True)
    chunks = [(name, start, min(start + CHUNK, number)) for start in range(0, number, CHUNK)]
    written = 0
    with open(shop.plan.out / f"{name}.jsonl", "w", encoding="utf-8") as file:
        for line, asked in _mapped(shop, chunks):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            written += 1
            for one in asked:
                kept = shop.answers.setdefault(one.task, [])
                if len(kept) < heldout_pocket.TRAIN_ANSWERS:
                    kept.append(heldout_pocket.row(f"{line['id']}-{len(kept)}", line["image"], one))
    return written


_SHARED: list[Shop] = []
"""What worker processes inherit by fork: the decoded pictures are too many to send."""


def _mapped(shop: Shop, chunks: list[tuple[str, int, int]]) -> Iterator[Made]:
    _SHARED[:] = [shop]
    if shop.plan.workers <= 1 or "fork" not in multiprocessing.get_all_start_methods():
        for chunk in chunks:
            yield from _chunk(chunk)
        return
    with multiprocessing.get_context("fork").Pool(shop.plan.workers) as pool:
        for made in pool.imap(_chunk, chunks):
            yield from made


def _chunk(job: tuple[str, int, int]) -> list[Made]:
    name, start, stop = job
    made = (MAKERS[name](_SHARED[0], index) for index in range(start, stop))
    return [one for one in made if one is not None]


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m internvl.data.build_pocket", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--collected", type=Path, required=True, help="folder that `internvl data collect` made")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=Plan.scenes)
    parser.add_argument("--words", type=int, default=Plan.words)
    parser.add_argument("--boxes", type=int, default=Plan.boxes)
    parser.add_argument("--apart", type=int, default=Plan.apart)
    parser.add_argument("--counts", type=int, default=Plan.counts)
    parser.add_argument("--colours", type=int, default=Plan.colours)
    parser.add_argument("--fresh", type=int, default=Plan.fresh)
    parser.add_argument("--many", type=int, default=Plan.many)
    parser.add_argument("--kinds", type=int, default=Plan.kinds)
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    plan = Plan(**vars(parser.parse_args(arguments)))
    build(plan, say)
    return 0


if __name__ == "__main__":
    sys.exit(main())
