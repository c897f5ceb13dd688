"""Checks of what a model reads and writes: templates, stop ids, vocabulary, special tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from internvl.data.templates import TEMPLATES
from internvl.doctor.folder import Finding, Folder
from internvl.doctor.prompt import foreign, from_difference, own, without_system
from internvl.tokens import IMAGE_END, IMAGE_START, IMAGE_TOKEN, SPECIAL_TOKENS

OUR_TEMPLATE = "the template of config.json, which official chat code reads too and training used"


def template(folder: Folder) -> Iterator[Finding]:
    if folder.config is None:
        return
    name = folder.config.template
    if name not in TEMPLATES:
        known = ", ".join(TEMPLATES)
        yield Finding(
            "conflict", "template", f"config.json: {name!r}", f"known are {known}", "nothing: chatting refuses"
        )
    elif folder.layout == "native" and "official_config" not in folder.settings:
        said = "config.json has no field for it (native layout)"
        yield Finding("note", "template", said, "", f"{name}, that of the releases which have a native form")


def chat_template(folder: Folder) -> Iterator[Finding]:
    """Both templates render the same conversation."""
    if folder.config is None or folder.config.template not in TEMPLATES:
        return
    ours, file = TEMPLATES[folder.config.template], folder.chat_template_file
    if not folder.chat_template:
        yield Finding("note", "chat template", "the tokenizer has none", "", OUR_TEMPLATE)
        return
    special = {name: _text(folder.tokenizer.get(name)) for name in ("bos_token", "eos_token")}
    theirs = foreign(folder.chat_template, special)
    if theirs.error:
        yield Finding("note", "chat template", f"{file}: cannot be rendered: {theirs.error}", "", OUR_TEMPLATE)
        return
    mine, other = own(ours, folder.config.system_message), theirs.text
    if special["bos_token"] and not mine.startswith(special["bos_token"]):
        other = other.removeprefix(special["bos_token"])
    if mine == other:
        yield Finding("note", "chat template", f"{file} and template {ours.name!r} make the same prompt")
        return
    turns_agree = without_system(mine, ours) == without_system(other, ours)
    about = "system text" if turns_agree else "chat template"
    left, right = from_difference(other, mine)
    yield Finding("conflict", about, f"{file}: {left!r}", f"template {ours.name!r}: {right!r}", OUR_TEMPLATE)


def stops(folder: Folder) -> Iterator[Finding]:
    if folder.config is None or folder.config.template not in TEMPLATES:
        return
    stop = TEMPLATES[folder.config.template].stops[0]
    if not folder.vocabulary:
        return
    wanted = folder.vocabulary.get(stop)
    if wanted is None:
        says, against = (
            f"template {folder.config.template!r} ends an answer with {stop!r}",
            "the tokenizer has no such token",
        )
        yield Finding("conflict", "stop", says, against, "the end-of-text ids of generation_config.json")
        return
    used = f"all of them: {stop!r} ({wanted}), and what generation_config.json and the tokenizer end with"
    ends = _ids(folder.generation.get("eos_token_id"))
    if not folder.generation:
        yield Finding("note", "stop", "no generation_config.json", "", used)
    elif wanted not in ends:
        says = f"generation_config.json: eos_token_id {_list(ends)}"
        against = f"template {folder.config.template!r} ends an answer with {stop!r}, id {wanted}: other tools run on"
        yield Finding("conflict", "stop", says, against, used)
    end = _text(folder.tokenizer.get("eos_token"))
    if end and end not in folder.vocabulary:
        says = f"tokenizer_config.json: eos_token {end!r}"
        yield Finding("conflict", "stop", says, f"not in {folder.vocabulary_file}", used)
    if folder.generation.get("do_sample"):
        keys = ("temperature", "top_p", "top_k")
        drawn = ", ".join(f"{key} {folder.generation[key]}" for key in keys if key in folder.generation)
        says = f"generation_config.json: do_sample {drawn}".rstrip()
        yield Finding("note", "sampling", says, "", "the likeliest token, unless the caller gives a temperature")


def vocabulary(folder: Folder) -> Iterator[Finding]:
    """vocab_size, rows of the embedding and of the head, ids of the tokenizer."""
    if folder.config is None:
        return
    size, width = folder.config.language.vocab_size, folder.config.language.width
    says = f"config.json: vocab_size {size}, hidden_size {width}"
    for name, shape in (("input embedding", folder.embedding), ("output head", folder.head)):
        if shape is not None and shape != (size, width):
            against = f"the {name} is {'x'.join(map(str, shape))}"
            yield Finding("conflict", "vocabulary", says, against, "nothing: opening it is refused")
    if not folder.vocabulary:
        yield Finding("note", "vocabulary", "no tokenizer in the folder", "", "ids that the caller makes")
        return
    rows = size if folder.embedding is None else folder.embedding[0]
    # Without marks (1.0) the token of a picture is a name without a row, or with one.
    nameless = {IMAGE_TOKEN} if not folder.config.image_marks else set()
    length = max(index for token, index in folder.vocabulary.items() if token not in nameless) + 1
    says = f"{folder.vocabulary_file}: ids to {length - 1}"
    if length > rows:
        yield Finding("conflict", "vocabulary", says, f"{rows} embedding rows", "nothing: such an id has no row")
    elif length < rows:
        used = f"the {rows} rows; the last {rows - length} stand for no text"
        yield Finding("note", "vocabulary", says, f"{rows} embedding rows", used)
    later = folder.tokenizer.get("added_tokens_decoder")
    for index, entry in later.items() if isinstance(later, dict) else ():
        token = _text(entry)
        known = folder.vocabulary.get(token)
        if token and known is not None and str(known) != str(index):
            says = f"tokenizer_config.json: {token!r} is id {index}"
            yield Finding(
                "conflict", "vocabulary", says, f"{folder.vocabulary_file}: id {known}", folder.vocabulary_file
            )


def special_tokens(folder: Folder) -> Iterator[Finding]:
    if not folder.vocabulary:
        return
    marks = folder.config is None or folder.config.image_marks
    around = (IMAGE_START, IMAGE_TOKEN, IMAGE_END) if marks else (IMAGE_TOKEN,)
    needed = [token for token in around if token not in folder.vocabulary]
    if needed:
        says = f"{folder.vocabulary_file} lacks {', '.join(needed)}"
        yield Finding(
            "conflict", "special tokens", says, "a picture stands between them", "nothing: pictures are refused"
        )
    known = SPECIAL_TOKENS if marks else ()
    rest = [token for token in known if token not in folder.vocabulary and token not in needed]
    if rest:
        says = f"{folder.vocabulary_file} lacks {', '.join(rest)}"
        yield Finding("note", "special tokens", says, "", "their spelling as plain text: boxes cost more tokens")
    ours = folder.vocabulary.get(IMAGE_TOKEN)
    for field in ("image_token_id", "img_context_token_id"):
        theirs = folder.settings.get(field)
        if isinstance(theirs, int) and ours is not None and theirs != ours:
            used = "config.json, as transformers does" if folder.layout == "native" else "the tokenizer"
            against = f"{folder.vocabulary_file}: {IMAGE_TOKEN} is {ours}"
            yield Finding("conflict", "image token", f"config.json: {field} {theirs}", against, used)


def _text(token: Any) -> str:
    """A token as tokenizer_config.json spells it: a string, or an object with content."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""


def _ids(value: Any) -> list[int]:
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)]


def _list(values: Iterable[int]) -> str:
    return ", ".join(map(str, values)) or "absent"
