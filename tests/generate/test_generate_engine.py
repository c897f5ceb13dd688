"""Laws of the engine: alone equals in company, streaming equals waiting, rows come and go."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl.generate.engine import Engine, Request
from internvl.generate.sampling import Sampling
from tiny import IMAGE_TOKEN_ID, tiny_model

MODEL = tiny_model("llama")
ENGINE = Engine(MODEL, max_rows=3)


def _request(length: int, tiles: int, seed: int, stops: frozenset[int] = frozenset(), **sampling: float) -> Request:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(10, 160, (length,), generator=generator)
    pixels = torch.randint(0, 256, (tiles, 3, 56, 56), generator=generator, dtype=torch.uint8)
    ids = torch.cat([text[:1], torch.full((4 * tiles,), IMAGE_TOKEN_ID), text[1:]])
    return Request(ids, pixels if tiles else None, Sampling(**sampling), stops)


requests = st.builds(
    lambda *args, **options: (args, options),
    st.integers(1, 40),
    st.integers(0, 3),
    st.integers(0, 99),
    stops=st.sampled_from([frozenset(), frozenset(range(10, 40))]),
    max_new_tokens=st.integers(1, 14),
    temperature=st.sampled_from([0.0, 0.8]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 5),
)


def _made(spec: tuple) -> Request:
    (length, tiles, content), options = spec[0], dict(spec[1])
    stops, draw = options.pop("stops"), options.pop("seed")
    request = _request(length, tiles, content, stops)
    request.sampling = Sampling(seed=draw, **options)
    return request


@settings(max_examples=12)
@given(specs=st.lists(requests, min_size=2, max_size=8))
def test_alone_equals_in_company(specs: list[tuple]) -> None:
    together = ENGINE.run(_made(spec) for spec in specs)
    assert ENGINE.idle
    for spec, done in zip(specs, together, strict=True):
        alone = ENGINE.run([_made(spec)])[0]
        assert (alone.tokens, alone.finish_reason) == (done.tokens, done.finish_reason)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_answers_are_those_of_passes_over_everything(family: str) -> None:
    model = tiny_model(family)
    request = Engine(model).run([_request(9, 2, 3, max_new_tokens=10)])[0]
    ids = request.input_ids
    visual = Engine(model).encode(request.tiles)
    for token in request.tokens:
        with torch.inference_mode():
            assert int(model(ids[None], visual=visual)[0, -1].argmax()) == token
        ids = torch.cat([ids, torch.tensor([token])])


def test_answers_across_the_length_where_longrope_changes_its_angles() -> None:
    """Phi-3, 128 here: kept keys of shorter texts would be wrong from there on; neighbours do not notice."""
    model = tiny_model("phi3")
    assert model.language.switches_at == 128
    specs = [(n, tiles, seed) for seed, (n, tiles) in enumerate([(120, 0), (104, 4), (5, 0), (140, 1)], 10)]
    done = Engine(model).run([_request(*spec, max_new_tokens=14) for spec in specs])
    for request in done:
        ids, visual = request.input_ids, None if request.tiles is None else Engine(model).encode(request.tiles)
        for token in request.tokens:
            with torch.inference_mode():
                assert int(model(ids[None], visual=visual)[0, -1].argmax()) == token
            ids = torch.cat([ids, torch.tensor([token])])


@pytest.mark.parametrize("int4", [False, True])
def test_alone_equals_in_company_in_bfloat16(int4: bool) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    specs = [(5 + 7 * n, n % 3, n) for n in range(9)]

    def run(chosen: list[tuple[int, int, int]]) -> list[list[int]]:
        made = [_request(*spec, max_new_tokens=12) for spec in chosen]
        return [done.tokens for done in Engine(model, max_rows=9, int4=int4).run(made)]

    assert run(specs) == [run([spec])[0] for spec in specs]


def test_stream_is_run_and_closing_it_cancels() -> None:
    whole = ENGINE.run([_request(8, 1, 2, max_new_tokens=9)])[0]
    assert list(ENGINE.stream(_request(8, 1, 2, max_new_tokens=9))) == whole.tokens
    request = _request(8, 1, 2, max_new_tokens=9)
    stream = ENGINE.stream(request)
    assert [next(stream), next(stream)] == whole.tokens[:2]
    stream.close()
    ENGINE.step()
    assert request.finish_reason == "cancelled"
    assert ENGINE.idle


def test_two_streams_share_the_steps() -> None:
    wanted = [ENGINE.run([_request(6, 1, seed, max_new_tokens=8)])[0].tokens for seed in (1, 2)]
    streams = [ENGINE.stream(_request(6, 1, seed, max_new_tokens=8)) for seed in (1, 2)]
    got: list[list[int]] = [[], []]
    for _ in range(8):
        for tokens, stream in zip(got, streams, strict=True):
            tokens.append(next(stream))
    assert got == wanted


def test_a_waiting_request_can_be_cancelled_and_others_go_on() -> None:
    made = [_request(5, 0, seed, max_new_tokens=6) for seed in range(6)]
    for request in made:
        ENGINE.submit(request)
    made[5].cancel()
    ENGINE.step()
    made[0].cancel()
    while not ENGINE.idle:
        ENGINE.step()
    assert [request.finish_reason for request in made] == ["cancelled", *["length"] * 4, "cancelled"]
    assert made[5].tokens == []
    assert len(made[0].tokens) == 2  # one of the prompt, one of the step


def test_stop_token_is_not_in_the_answer() -> None:
    free = ENGINE.run([_request(8, 0, 4, max_new_tokens=12)])[0].tokens
    stop = free[5]
    done = ENGINE.run([_request(8, 0, 4, frozenset({stop}), max_new_tokens=12)])[0]
    assert done.tokens == free[: free.index(stop)]
    assert done.finish_reason == "stop"


def test_answers_end_where_the_positions_do() -> None:
    engine = Engine(MODEL, max_length=20)
    done = engine.run([_request(15, 0, 1, max_new_tokens=500)])[0]
    assert (len(done.tokens), done.finish_reason) == (5, "length")
    with pytest.raises(ValueError, match=r"20 tokens.*1 to 19.*lower max_tiles"):
        engine.submit(_request(20, 0, 1))
    with pytest.raises(ValueError, match="0 tokens"):
        engine.submit(_request(0, 0, 1))


def test_unequal_pictures_and_places_are_refused_before_anything_runs() -> None:
    request = _request(5, 2, 1)
    request.tiles = request.tiles[:1]
    with pytest.raises(ValueError, match="8 image tokens but 1 tiles of 4, which need 4"):
        ENGINE.submit(request)
    assert ENGINE.idle


def test_an_error_in_the_source_leaves_the_engine_usable() -> None:
    def broken() -> Iterator[Request]:
        yield _request(5, 0, 1, max_new_tokens=50)
        raise ValueError("picture 2 is missing")

    with pytest.raises(ValueError, match="picture 2"):
        ENGINE.run(broken())
    ENGINE.step()
    assert ENGINE.idle


def test_logprobs_are_those_of_the_model() -> None:
    done = ENGINE.run([_request(6, 0, 1, max_new_tokens=4, logprobs=True)])[0]
    ids = torch.cat([done.input_ids, torch.tensor(done.tokens)])
    with torch.inference_mode():
        table = MODEL(ids[None])[0].log_softmax(-1)
    want = [float(table[5 + n, token]) for n, token in enumerate(done.tokens)]
    assert done.logprobs == pytest.approx(want, abs=1e-4)
