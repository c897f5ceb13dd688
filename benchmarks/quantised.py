"""`pocket` in smaller number types: bytes, speed, distance from float32, answers changed on the held-out sets.

    python benchmarks/quantised.py [--data data/pocket] [--limit 12] [--max-tiles 4] [--rounds 5]

int8 and int4 twice: by this project, and by torchao where it is installed (`pip install 'internvl[quantise]'`),
whatever the probe text says; whether `internvl.load` would refuse them stands beside.

Distance is the KL divergence from float32 of every next-token distribution along the float32 answer, each step fed with
the same tokens; bfloat16, float32's own rounding, is the yardstick. Answers are the greedy ones to `--limit` questions
of each held-out set: how many differ in text from float32's.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from measure import write
from torch import Tensor

from internvl.evaluate.heldout import available, read_heldout
from internvl.generate.engine import Engine, Request
from internvl.generate.open_chat import load_chat as load
from internvl.generate.rounding import KL_LIMITS, check_steps, plain_logits, probe_ids
from internvl.generate.sampling import Sampling
from internvl.generate.session import Chat
from internvl.models.chat import ChatModel
from internvl.models.int8 import divergence, stored

FORMS = (
    ("float32", "own"),
    ("bfloat16", "own"),
    *((form, by) for form in ("int8", "int4") for by in ("own", "torchao")),
)
NEW_TOKENS = 24
SPEED_TOKENS = 96

Asked = tuple[str, Path]


def questions(data: Path, limit: int) -> list[Asked]:
    """The first ones of each set, as the evaluation draws them."""
    return [
        (row.question, found.path(row.image))
        for found in (read_heldout(data, task) for task in available(data))
        for row in found.sample(limit)
    ]


def job(chat: Chat, asked: Asked) -> tuple[Any, Tensor]:
    text, picture = asked
    prompt = chat.encoder.prompt([{"role": "user", "content": text}], [picture], max_tiles=chat.max_tiles)
    return prompt, chat.engine.encode(prompt.tiles)


def answer(chat: Chat, asked: Asked) -> list[int]:
    prompt, visual = job(chat, asked)
    sampling = Sampling(max_new_tokens=NEW_TOKENS)
    request = Request(prompt.input_ids, visual=visual, sampling=sampling, stop_ids=chat.stop_ids)
    return chat.engine.run([request])[0].tokens


@torch.inference_mode()
def distributions(chat: Chat, asked: Asked, tokens: list[int]) -> Tensor:
    """Log-probabilities of every step along `tokens`, by the decoder that serves answers."""
    prompt, visual = job(chat, asked)
    decoder, length = chat.engine.decoder, len(prompt.input_ids)
    decoder.reserve(1, length + len(tokens))
    embedded = chat.model.embed(prompt.input_ids[None], visual=visual)[0]
    steps = [decoder.read([embedded], [0])]
    steps += [decoder.step(torch.tensor([token]), [length + at]) for at, token in enumerate(tokens[:-1])]
    return torch.cat(steps).float().log_softmax(-1)


def speed(chat: Chat, asked: Asked, rounds: int) -> dict[str, float]:
    """Steps after the first token, one answer at a time, medians; CPU time is of use where the machine is not quiet."""
    prompt, visual = job(chat, asked)
    found, own = [], []
    for _ in range(rounds + 1):
        request = Request(prompt.input_ids, visual=visual, sampling=Sampling(max_new_tokens=SPEED_TOKENS))
        start = time.process_time()
        Engine.run(chat.engine, [request])
        own.append(1e3 * (time.process_time() - start) / len(request.tokens))
        found.append((len(request.tokens) - 1) / (request.finished_at - request.first_token_at))
    return {
        "tokens/s": round(statistics.median(found[1:]), 1),
        "CPU ms a token, prompt included": round(statistics.median(own[1:]), 1),
    }


def language_bytes(chat: Chat) -> int:
    """What a step reads: layers as they are stepped with, and the head."""
    language = chat.model.language.model
    layers, head = language.model.layers, language.lm_head.weight.nbytes
    if chat.int4:  # 4 bits, scale and minimum of 32 weights
        return sum(p.numel() for p in layers.parameters()) * 5 // 8 + head
    return sum(part.nbytes for tensor in layers.state_dict().values() for part in stored(tensor)) + head


def probed(chat: Chat, plain: ChatModel) -> float:
    """Nats of the probe text at which `internvl.load` decides, to the bfloat16 model."""
    ids = probe_ids(chat.tokenizer)
    if chat.int4:
        return check_steps(chat.engine, ids, math.inf)
    return divergence(plain_logits(plain, ids), plain_logits(chat.model, ids))[0]


def judged(form: str, nats: float) -> dict[str, Any]:
    return {"probe nats": round(nats, 4), "refused": nats > KL_LIMITS[form]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/pocket"))
    parser.add_argument("--limit", type=int, default=12)
    parser.add_argument("--max-tiles", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    asked = questions(options.data, options.limit)
    expected: list[list[int]] = []
    truth: list[Tensor] = []
    rows, plain = [], load("pocket", dtype="bfloat16").model
    for form, by in FORMS:
        if by == "torchao" and find_spec("torchao") is None:
            print(f"{form} by torchao left out: pip install 'internvl[quantise]'")
            continue
        start, rounded = time.perf_counter(), form in KL_LIMITS
        chat = load(
            "pocket", dtype=form, max_tiles=options.max_tiles, max_kl=math.inf, quantiser=by if rounded else "auto"
        )
        opened = time.perf_counter() - start
        answers = [answer(chat, one) for one in asked]
        if form == "float32":
            expected = answers
            truth = [distributions(chat, one, tokens) for one, tokens in zip(asked, expected, strict=True) if tokens]
        told = [(one, tokens) for one, tokens in zip(asked, expected, strict=True) if tokens]
        found = [distributions(chat, one, tokens) for one, tokens in told]
        pairs = list(zip(truth, found, strict=True))
        kl = torch.cat([(right.exp() * (right - mine)).sum(-1) for right, mine in pairs])
        same = torch.cat([right.argmax(-1) == mine.argmax(-1) for right, mine in pairs]).float()
        rows.append(
            {
                "form": f"{form}, {by}" if rounded else form,
                "language model MB": round(language_bytes(chat) / 1e6),
                **speed(chat, asked[0], options.rounds),
                "KL to float32, nats": round(float(kl.mean()), 5),
                "likeliest token equal": round(float(same.mean()), 4),
                "answers changed": sum(mine != right for mine, right in zip(answers, expected, strict=True)),
                "of": len(asked),
                "steps": len(kl),
                "s to open": round(opened, 1),
                "seconds": round(time.perf_counter() - start),
                **(judged(form, probed(chat, plain)) if rounded else {}),
            }
        )
        print("  ".join(f"{key}: {value}" for key, value in rows[-1].items()), flush=True)
    versions = {
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "torchao": version("torchao") if find_spec("torchao") else "none",
    }
    print(f"written to {write('quantised', {'rows': rows}, versions, options.out)}")


if __name__ == "__main__":
    main()
