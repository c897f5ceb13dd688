"""internvl doctor: sound checkpoints pass, every planted contradiction is named, nothing of a checkpoint runs."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from internvl.cli import main
from internvl.convert.files import Weights
from internvl.convert.official import CHAT_FIELDS
from internvl.data.jinja import chat_template
from internvl.data.templates import TEMPLATES
from internvl.doctor.checks import CHECKS, diagnose
from internvl.doctor.folder import Finding, read_folder
from internvl.doctor.machine import examine
from internvl.doctor.prompt import foreign, own
from internvl.generate.open_chat import load_chat as load
from internvl.load import load_checkpoint, save_checkpoint
from internvl.zoo import RELEASED
from tiny import tiny_model, tiny_tokenizer

TOKENS = len(tiny_tokenizer())
STOP = tiny_tokenizer().get_vocab()["<|im_end|>"]
TILE = 56


def chatml(system: str, tail: str = "\\n") -> str:
    """A chat template as tokenizers have it, of the kind that internvl2_5 renders."""
    return (
        "{{'<|im_start|>system\\n" + system + "<|im_end|>" + tail + "'}}"
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>"
        + tail
        + "'}}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\\n'}}{% endif %}"
    )


def make(folder: Path, family: str = "llama", layout: str = "official", **changes: Any) -> Path:
    """A checkpoint whose files agree."""
    tokenizer = tiny_tokenizer()
    image = tokenizer.get_vocab()["<IMG_CONTEXT>"]
    model = tiny_model(family, vocab_size=TOKENS, image_token_id=image, max_tiles=6, **changes)
    save_checkpoint(model, tokenizer, folder, layout)
    (folder / "chat_template.jinja").write_text(chat_template(model.config.template))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": STOP}))
    pictures = {"size": {"height": TILE, "width": TILE}, "max_patches": 6, "image_mean": [0.485, 0.456, 0.406]}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    return folder


def look(folder: Path) -> list[Finding]:
    opened, unreadable = read_folder(folder)
    return [*unreadable, *diagnose(opened)]


def conflicts(folder: Path) -> list[str]:
    return [finding.about for finding in look(folder) if finding.level == "conflict"]


def edit(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None takes one away."""
    content = {**json.loads(path.read_text()), **changes} if path.is_file() else changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


# sound checkpoints


@pytest.mark.parametrize(
    ("family", "layout"),
    [(f, "official") for f in ("llama", "qwen2", "phi3", "internlm2")]
    + [(f, "native") for f in ("llama", "qwen2", "internlm2")],
)
def test_sound_checkpoints_have_no_conflict(family: str, layout: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "model", family, layout)
    found = look(folder)
    assert conflicts(folder) == []
    assert [f.says for f in found] == ["chat_template.jinja and template 'internvl2_5' make the same prompt"]
    assert main(["doctor", str(folder)]) == 0


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_of_a_template_is_that_of_the_renderer(name: str) -> None:
    """A chat template that only repeats our own string agrees with it; any other character is a difference."""
    mine = own(TEMPLATES[name], None)
    quoted = mine.replace("\n", "\\n").replace("'", "\\'")
    assert foreign("{{ '" + quoted + "' }}", {}).text == mine


# planted contradictions: what is done, what must be said, and whether the model still opens

Plant = Callable[[Path], Any]
PLANTS: dict[str, tuple[Plant, str, bool]] = {
    "unknown template": (lambda f: edit(f / "config.json", template="vicuna"), "template", True),
    "other template": (lambda f: edit(f / "config.json", template="phi3-chat"), "chat template", True),
    "no newline between turns": (
        lambda f: (f / "chat_template.jinja").write_text(chatml(TEMPLATES["internvl2_5"].system_message, "")),
        "chat template",
        True,
    ),
    "other system text": (
        lambda f: (f / "chat_template.jinja").write_text(chatml("You are Qwen.")), "system text", True
    ),
    "system message of the config": (
        lambda f: edit(f / "config.json", system_message="Answer the questions."), "system text", True
    ),
    "never stops elsewhere": (lambda f: edit(f / "generation_config.json", eos_token_id=2), "stop", True),
    "end of text unknown": (lambda f: edit(f / "tokenizer_config.json", eos_token="<|end|>"), "stop", True),
    "vocab_size": (lambda f: edit_llm(f, vocab_size=TOKENS + 1), "vocabulary", False),
    "hidden_size": (lambda f: edit_llm(f, hidden_size=32), "vocabulary", False),
    "tokenizer too long": (lambda f: add_token(f, TOKENS + 5), "vocabulary", True),
    "two ids": (
        lambda f: edit(f / "tokenizer_config.json", added_tokens_decoder={"3": {"content": "<img>"}}),
        "vocabulary",
        True,
    ),
    "image token of config.json": (lambda f: edit(f / "config.json", img_context_token_id=3), "image token", True),
    "stored positions": (lambda f: edit_vision(f, image_size=TILE + 28), "tiles", False),
    "more least than most tiles": (lambda f: edit(f / "config.json", min_dynamic_patch=9), "tiles", True),
    "no room for a picture": (lambda f: edit_llm(f, max_position_embeddings=20), "tiles", True),
    "tile of the processor": (lambda f: edit(f / "preprocessor_config.json", size={"height": 448}), "pictures", True),
    "colours": (lambda f: edit(f / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5]), "pictures", True),
    "tiles of the processor": (lambda f: edit(f / "preprocessor_config.json", max_patches=12), "pictures", True),
    "no ps_version": (lambda f: edit(f / "config.json", ps_version=None), "token order", True),
    "no head": (lambda f: edit_weights(f, lambda w: w.pop("language_model.lm_head.weight")), "output head", False),
    "ranks without adapters": (lambda f: edit(f / "config.json", use_llm_lora=16), "adapters", False),
    "adapters without ranks": (
        lambda f: edit_weights(f, lambda w: w.update({"language_model.q.lora_A.weight": torch.zeros(2, 2)})),
        "adapters",
        False,
    ),
    "a foreign key": (lambda f: edit_weights(f, lambda w: w.update({"more": torch.zeros(3)})), "weights", False),
    "truncated weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
        "weights",
        False,
    ),
    "only pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "weights", False),
    "broken generation_config": (
        lambda f: (f / "generation_config.json").write_text("{"), "generation_config.json", True
    ),
    "no sizes": (lambda f: edit_llm(f, num_hidden_layers=None), "config.json", False),
}  # fmt: skip


def edit_llm(folder: Path, **changes: Any) -> None:
    settings = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", llm_config=without({**settings["llm_config"], **changes}))


def edit_vision(folder: Path, **changes: Any) -> None:
    settings = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", vision_config={**settings["vision_config"], **changes})


def without(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}


def add_token(folder: Path, index: int) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["a new word"] = index
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize("name", PLANTS)
def test_planted_contradictions_are_named(name: str, tmp_path: Path) -> None:
    plant, about, opens = PLANTS[name]
    folder = make(tmp_path / "model")
    plant(folder)
    assert about in conflicts(folder), look(folder)
    assert main(["doctor", str(folder)]) == 1
    refused = [f for f in look(folder) if f.level == "conflict" and ("open" in f.used or "opened" in f.against)]
    if opens:
        assert not refused
        load_checkpoint(folder)
    else:  # what the doctor says about opening is true
        assert refused or about == "adapters"
        with pytest.raises((ValueError, OSError, KeyError)):
            load_checkpoint(folder)


def test_each_plant_is_one_conflict(tmp_path: Path) -> None:
    """Independent contradictions do not raise others."""
    alone = ("other system text", "never stops elsewhere", "colours", "no ps_version", "image token of config.json")
    for name in alone:
        plant, about, _ = PLANTS[name]
        folder = make(tmp_path / name.replace(" ", "_"))
        plant(folder)
        assert conflicts(folder) == [about], name


def test_native_layout_has_its_own_contradictions(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", layout="native")
    edit(folder / "config.json", image_token_id=5)
    assert conflicts(folder) == ["image token"]
    finding = next(f for f in look(folder) if f.level == "conflict")
    assert finding.used == "config.json, as transformers does"
    assert load_checkpoint(folder).model.image_token_id == 5
    edit(folder / "config.json", official_config=None, image_token_id=tiny_tokenizer().get_vocab()["<IMG_CONTEXT>"])
    assert "template" in [f.about for f in look(folder) if f.level == "note"]


@pytest.mark.parametrize("ends", [STOP, [2, STOP], [STOP]])
def test_stop_ids_are_those_that_end_answers(ends: Any, tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    edit(folder / "generation_config.json", eos_token_id=ends)
    assert conflicts(folder) == []
    assert STOP in load(folder, dtype="float32").stop_ids


def test_notes_do_not_fail(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    (folder / "generation_config.json").unlink()
    (folder / "chat_template.jinja").unlink()
    (folder / "modeling_internvl_chat.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"")
    edit(
        folder / "config.json",
        auto_map={"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        torch_dtype="float16",
    )
    edit(folder / "config.json", tie_word_embeddings=True, max_dynamic_patch=None)
    edit(folder / "preprocessor_config.json", max_patches=None)
    notes = {finding.about: finding for finding in look(folder)}
    assert conflicts(folder) == []
    assert notes.keys() == {"stop", "chat template", "code", "pickle", "number type", "output head", "tiles"}
    assert "6, the default of the official class" in notes["tiles"].used
    assert "theirs never runs" in notes["code"].used
    assert main(["doctor", str(folder)]) == 0


def test_release_is_compared_with_the_table(tmp_path: Path) -> None:
    folder = make(tmp_path / "InternVL2_5-8B")
    said = {f.says.split()[0]: f.against for f in look(folder) if f.about == "release"}
    assert "InternVL2_5-8B was released with 448" in said["tile_size"]
    assert "language.hidden_size" in said
    assert "language.intermediate_size" not in said
    whole = make(tmp_path / "InternVL2-1B")
    config = RELEASED["InternVL2-1B"].config
    assert "template" in {f.says.split()[0] for f in look(whole) if f.about == "release"}
    assert config.template != "internvl2_5"


# nothing runs, nothing large is read


def test_weights_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "model", "internlm2")

    def refuse(*_: Any) -> torch.Tensor:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Weights, "get", refuse)
    assert main(["doctor", str(folder)]) == 0


HOSTILE = {
    "endless": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "large": "{{ ('a' * 99999999) * 999 }}",
    "long": "{{ 'a' * 9999999 }}",
    "escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "import": "{{ cycler.__init__.__globals__.os.system('touch ' ~ 'TRAP') }}",
    "broken": "{% for",
    "raises": "{{ raise_exception('no') }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_chat_templates_end(name: str, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    started = time.perf_counter()
    rendered = foreign(HOSTILE[name].replace("TRAP", str(trap)), {}, seconds=4.0)
    assert rendered.error
    assert rendered.text == ""
    assert time.perf_counter() - started < 60  # ended, however slow the machine
    assert not trap.exists()


def test_code_of_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    folder, trap = make(tmp_path / "model"), tmp_path / "trap"
    code = f"open({str(trap)!r}, 'w').close()"
    for name in ("configuration_internvl_chat.py", "modeling_internvl_chat.py", "tokenization_internlm2.py", "json.py"):
        (folder / name).write_text(code)
    maps = {"AutoConfig": "configuration_internvl_chat.C", "AutoModel": "modeling_internvl_chat.M"}
    edit(folder / "config.json", auto_map=maps)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_internlm2.T", None]})
    assert main(["doctor", str(folder)]) == 0
    assert not trap.exists()


@pytest.mark.parametrize("content", ["[]", "{", "3", '{"model_type": "llava"}', '{"model_type": "internvl_chat"}'])
def test_damaged_config(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path / "model")
    (folder / "config.json").write_text(content)
    assert main(["doctor", str(folder)]) == 1
    said = capsys.readouterr()
    assert "config.json" in said.out + said.err
    assert "Traceback" not in said.err


def test_odd_values_are_no_crash(tmp_path: Path) -> None:
    """The files are somebody else's: any JSON may stand in them."""
    odd: tuple[Any, ...] = (0, -7, 1.5, "x", [None, "a"], {"a": {"b": []}}, True)
    fields = {
        "generation_config.json": ("eos_token_id", "do_sample", "temperature"),
        "tokenizer_config.json": ("chat_template", "added_tokens_decoder", "bos_token", "eos_token"),
        "preprocessor_config.json": ("size", "image_mean", "max_patches", "image_std"),
        "config.json": ("torch_dtype", "auto_map", "_name_or_path", "img_context_token_id", "tie_word_embeddings"),
    }
    fields["config.json"] += (*CHAT_FIELDS.values(), "vision_config", "llm_config", "use_llm_lora")
    folder = make(tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "chat_template.jinja").unlink()
    for file, names in fields.items():
        before = (folder / file).read_text()
        for name in names:
            for value in odd:
                edit(folder / file, **{name: value})
                look(folder)
                (folder / file).write_text(before)
    for part in ("vision_config", "llm_config"):
        for name in settings[part]:
            for value in odd:
                edit(folder / "config.json", **{part: {**settings[part], name: value}})
                look(folder)
        edit(folder / "config.json", **{part: settings[part]})


# the command


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path / "model")
    edit(folder / "generation_config.json", eos_token_id=2)
    assert main(["doctor", str(folder), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["layout"], said["template"], said["conflicts"]) == ("official", "internvl2_5", 1)
    finding = said["findings"][0]
    assert finding["says"] == "generation_config.json: eos_token_id 2"
    assert f"id {STOP}" in finding["against"]
    assert set(finding) == {"level", "about", "says", "against", "used"}


def test_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path / "model")
    edit(folder / "generation_config.json", eos_token_id=2)
    assert main(["doctor", str(folder)]) == 1
    shown = capsys.readouterr().out
    assert "CONFLICT  stop" in shown
    assert "file says: generation_config.json: eos_token_id 2\n" in shown
    assert "contradictions that change answers: 1; notes: 1" in shown
    assert len([check for check in CHECKS if check.__name__.replace("_", " ") in shown]) == len(CHECKS)


def test_zoo_shows_every_release(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--zoo"]) == 0
    shown = capsys.readouterr().out
    assert all(f" {name} " in shown for name in RELEASED)
    assert " 78.408 " in shown
    assert main(["doctor", "--zoo", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == RELEASED.keys()
    assert rows["InternVL2_5-78B"]["parameters"] == RELEASED["InternVL2_5-78B"].config.num_parameters
    assert main(["doctor", "pocket", "--zoo"]) == 1


def test_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERNVL_CACHE", "somewhere")
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["processor"]["threads"] == torch.get_num_threads()
    assert facts["folders"] == {**facts["folders"], "cache": "somewhere", "pocket": []}
    assert facts["extras"]["peft"]["version"]
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert str(torch.__version__) in shown
    assert "pip install 'internvl[video]'" in shown


def test_gpus_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, total_memory = "A GPU", 80 * 1024**3

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    assert examine()["gpu"]["devices"] == ["A GPU, 80 GiB"] * 2


@pytest.mark.pocket
def test_pocket_does_not_contradict_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "pocket", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    assert "chat_template.jinja and template 'internvl2_5' make the same prompt" in [f["says"] for f in found]


def test_random_models_have_no_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "tiny-llama"]) == 1
    assert "random weights" in capsys.readouterr().err


def test_snippet_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).parents[1] / "docs" / "doctor.md"
    (snippet,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    exec(compile(snippet, page.name, "exec"), {})
    assert capsys.readouterr().out == chat_template("internvl2_5", "Answer briefly.") + "\n"
    rows = re.findall(r"^\| (?!looked at|---)([\w ]+) \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [check.__name__.replace("_", " ") for check in CHECKS]
