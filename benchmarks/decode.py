"""Time to the first token, and tokens a second: ours beside transformers' generate, on the same weights, in turns.

    python benchmarks/decode.py [--rounds 7] [--threads 2] [--tokens 32]

The model has the sizes of `pocket` and random weights; the peer is transformers' InternVLForConditionalGeneration, read
from the native folder that we write. A prompt is 1 or 7 tiles of 224 px (64 tokens each) and 48 text tokens, pictures
included in the time. Decoding is (time of 1 + N tokens - time of 1) / N. The 4-bit row stands beside the peer in
bfloat16. The limit is how fast the weights of one token can be read, from the rate of a large sum in the same run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import in_turns, write
from rich.console import Console
from rich.table import Table
from transformers import InternVLForConditionalGeneration

from internvl.data.images import normalise
from internvl.generate.engine import Engine, Request
from internvl.generate.sampling import Sampling
from internvl.load import save_checkpoint
from internvl.models.build import build
from internvl.models.chat import ChatModel
from internvl.zoo import CHAT

IMAGE_TOKEN_ID = 49154
TEXT_TOKENS = 48
ROWS = (("float32", torch.float32, False), ("bfloat16", torch.bfloat16, False), ("int4", torch.bfloat16, True))


def prompt(num_tiles: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tiles)
    text = torch.randint(100, 49000, (TEXT_TOKENS,), generator=generator)
    image = torch.full((num_tiles * 64,), IMAGE_TOKEN_ID)
    tiles = torch.randint(0, 256, (num_tiles, 3, 224, 224), generator=generator, dtype=torch.uint8)
    return torch.cat([text[:16], image, text[16:]]), tiles


class Ours:
    def __init__(self, model: ChatModel, int4: bool) -> None:
        self.engine = Engine(model, int4=int4)

    def __call__(self, num_tiles: int, batch: int, num_tokens: int) -> list[list[int]]:
        ids, tiles = prompt(num_tiles)
        sampling = Sampling(max_new_tokens=num_tokens)
        return [done.tokens for done in self.engine.run([Request(ids, tiles, sampling) for _ in range(batch)])]


class Theirs:
    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.model = InternVLForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
        self.dtype = dtype

    @torch.inference_mode()
    def __call__(self, num_tiles: int, batch: int, num_tokens: int) -> list[list[int]]:
        ids, tiles = prompt(num_tiles)
        out = self.model.generate(
            input_ids=ids.repeat(batch, 1),
            attention_mask=torch.ones(batch, len(ids), dtype=torch.long),
            pixel_values=normalise(tiles, dtype=self.dtype).repeat(batch, 1, 1, 1),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=2,
        )
        return [row[-num_tokens:].tolist() for row in out]


def bandwidth() -> float:
    """Bytes a second of summing 512 MB, best of nine."""
    block = torch.ones(128 << 20)
    best = 1e9
    for _ in range(9):
        start = time.perf_counter()
        block.sum()
        best = min(best, time.perf_counter() - start)
    return block.nbytes / best


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def weight_bytes(model: ChatModel, int4: bool) -> int:
    """What a token must read: the layers and the output head, 4-bit blocks with scale and minimum as they are."""
    language = model.language.model
    layers = sum(parameter.numel() for parameter in language.model.layers.parameters())
    size = language.lm_head.weight.element_size()
    return int(layers * (0.5 + 4 / 32 if int4 else size)) + language.lm_head.weight.nbytes


def measure(name: str, ours: Ours, theirs: Theirs, options: argparse.Namespace, limit: float) -> dict[str, Any]:
    calls = {"ours": ours, "transformers": theirs}
    row: dict[str, Any] = {"dtype": name}
    for num_tiles in (1, 7):
        found = in_turns({who: partial(call, num_tiles, 1, 1) for who, call in calls.items()}, options.rounds)
        row[f"first token, {num_tiles} tiles"] = {
            "seconds": found,
            "times transformers": round(found["transformers"]["median"] / found["ours"]["median"], 2),
        }
    for batch in (1, 4):
        steps: dict[str, list[float]] = {who: [] for who in calls}
        for _ in range(options.rounds):
            for who, call in calls.items():
                short, long = (timed(partial(call, 1, batch, num)) for num in (1, 1 + options.tokens))
                steps[who].append((long - short) / options.tokens)
        seconds = {who: statistics.median(values) for who, values in steps.items()}
        row[f"decoding, batch {batch}"] = {
            "tokens a second": {who: round(batch / value, 1) for who, value in seconds.items()},
            "spread": {who: [round(batch / max(v), 1), round(batch / min(v), 1)] for who, v in steps.items()},
            "times transformers": round(seconds["transformers"] / seconds["ours"], 2),
            "share of the memory limit": round(limit / seconds["ours"], 2),
        }
    if name == "float32":
        same = [a == b for a, b in zip(ours(1, 2, 16), theirs(1, 2, 16), strict=True)]
        row["same tokens as transformers"] = all(same)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", choices=[name for name, _, _ in ROWS])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    rate = bandwidth()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = build(CHAT["pocket"])
        model.image_token_id = IMAGE_TOKEN_ID
        save_checkpoint(model, None, folder, "native")
        for name, dtype, int4 in ROWS:
            if options.only in (None, name):
                ours = build(CHAT["pocket"], dtype)
                ours.image_token_id = IMAGE_TOKEN_ID
                limit = weight_bytes(ours, int4) / rate
                rows.append(measure(name, Ours(ours, int4), Theirs(Path(folder), dtype), options, limit))
    table = Table(title=f"pocket sizes, {options.threads} threads; reading memory: {rate / 1e9:.0f} GB/s")
    for heading in ("", "first token, 1 tile", "7 tiles", "tok/s, batch 1", "of the limit", "tok/s, batch 4"):
        table.add_column(heading, justify="right")
    for row in rows:
        first, seven = (row[f"first token, {n} tiles"] for n in (1, 7))
        one, four = (row[f"decoding, batch {n}"] for n in (1, 4))

        def times(found: dict[str, Any]) -> str:
            ms = [f"{1000 * found['seconds'][who]['median']:.0f}" for who in ("ours", "transformers")]
            return f"{ms[0]} : {ms[1]} ms = {found['times transformers']} x"

        def speeds(found: dict[str, Any]) -> str:
            rates = found["tokens a second"]
            return f"{rates['ours']:.0f} : {rates['transformers']:.0f} = {found['times transformers']} x"

        share = f"{100 * one['share of the memory limit']:.0f} %"
        table.add_row(row["dtype"], times(first), times(seven), speeds(one), share, speeds(four))
    Console().print(table)
    result = {
        "threads": options.threads,
        "rounds": options.rounds,
        "tokens": options.tokens,
        "text tokens": TEXT_TOKENS,
        "memory bytes a second": round(rate),
        "rows": rows,
    }
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    Console().print(f"written to {write('decode', result, versions, options.out)}")


if __name__ == "__main__":
    main()
