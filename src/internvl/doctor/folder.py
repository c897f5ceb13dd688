"""What the files of a checkpoint say: settings, vocabulary, weight headers. Whether they agree is `checks.py`'s."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from internvl.config import ChatConfig
from internvl.convert import native, official
from internvl.convert.files import Weights, open_weights, read_json
from internvl.convert.layouts import layout_of, read_config

ODD = (ValueError, OSError, KeyError, TypeError, AttributeError, ArithmeticError)
"""What reading a config.json raises that describes no model."""
SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings"),
)
# By layout and family: official, official InternLM2, native. Wrapped in adapters, official keys have a prefix more.
EMBEDDINGS = (
    "language_model.model.embed_tokens.weight",
    "language_model.model.tok_embeddings.weight",
    "language_model.base_model.model.model.embed_tokens.weight",
    "language_model.base_model.model.model.tok_embeddings.weight",
    "model.language_model.embed_tokens.weight",
)
HEADS = (
    "language_model.lm_head.weight",
    "language_model.output.weight",
    "language_model.base_model.model.lm_head.weight",
    "language_model.base_model.model.output.weight",
    "lm_head.weight",
)
POSITIONS = (
    "vision_model.embeddings.position_embedding",
    "vision_model.base_model.model.embeddings.position_embedding",
    "model.vision_tower.embeddings.position_embeddings",
)
LORA_FIELDS = ("use_llm_lora", "use_backbone_lora")


@dataclass(frozen=True)
class Finding:
    """One thing that somebody should know about a checkpoint."""

    level: Literal["note", "conflict"]
    """A conflict changes answers, here or in another tool; a note does not."""
    about: str
    says: str
    """What a file says."""
    against: str = ""
    """What contradicts it."""
    used: str = ""
    """What is used here, and why."""


@dataclass(frozen=True)
class Folder:
    """A checkpoint without its weights. Files that are missing are empty mappings."""

    path: Path
    layout: str
    settings: Mapping[str, Any]
    config: ChatConfig | None
    """None where config.json describes no model that opens."""
    weights: Weights | None
    generation: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    """tokenizer_config.json."""
    pictures: Mapping[str, Any]
    """preprocessor_config.json."""
    chat_template: str
    chat_template_file: str
    vocabulary: Mapping[str, int]
    """Token -> id, added tokens included; empty where no tokenizer is there or can be read."""
    vocabulary_file: str

    @property
    def language(self) -> Mapping[str, Any]:
        """The settings of the language model."""
        return _mapping(self.settings.get("text_config" if self.layout == "native" else "llm_config"))

    @property
    def vision(self) -> Mapping[str, Any]:
        return _mapping(self.settings.get("vision_config"))

    def shape(self, names: tuple[str, ...]) -> tuple[int, ...] | None:
        """Shape in the weight headers of the first key that is there; None where there is none."""
        if self.weights is None:
            return None
        old = self.layout == "native"
        shapes = {native.current_key(key) if old else key: shape for key, shape in self.weights.shapes.items()}
        return next((shapes[name] for name in names if name in shapes), None)

    @property
    def embedding(self) -> tuple[int, ...] | None:
        return self.shape(EMBEDDINGS)

    @property
    def head(self) -> tuple[int, ...] | None:
        return self.shape(HEADS)

    @property
    def positions(self) -> tuple[int, ...] | None:
        return self.shape(POSITIONS)


def read_folder(path: Path) -> tuple[Folder, list[Finding]]:
    """A checkpoint, and findings about what could not be read. ValueError or OSError where there is no config.json."""
    found: list[Finding] = []
    settings = read_json(path / "config.json")
    layout = layout_of(settings, path)
    config = _config(path, settings, found)
    tokenizer = _optional(path / "tokenizer_config.json", found)
    template, template_file = _chat_template(path, tokenizer, found)
    vocabulary, vocabulary_file = _vocabulary(path, tokenizer, found)
    folder = Folder(
        path=path,
        layout=layout,
        settings=settings,
        config=config,
        weights=_weights(path, found),
        generation=_optional(path / "generation_config.json", found),
        tokenizer=tokenizer,
        pictures=_optional(path / "preprocessor_config.json", found),
        chat_template=template,
        chat_template_file=template_file,
        vocabulary=vocabulary,
        vocabulary_file=vocabulary_file,
    )
    return folder, found


def _config(path: Path, settings: Mapping[str, Any], found: list[Finding]) -> ChatConfig | None:
    try:
        return _sound(read_config(path))
    except ODD as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        found.append(Finding("conflict", "config.json", said, "the model cannot be opened", "nothing"))
    if not any(settings.get(name) for name in LORA_FIELDS):
        return None
    without = {key: value for key, value in settings.items() if key not in LORA_FIELDS}
    try:  # what else is wrong is worth knowing too
        return _sound(official.from_official(without, path / "config.json"))
    except ODD:
        return None


def _sound(config: ChatConfig) -> ChatConfig:
    """ValueError for a value of another kind than the default of its field, KeyError for a missing size."""
    for part in (config, config.vision):
        for field in fields(part):
            value, usual = getattr(part, field.name), field.default
            kind = (int, float) if isinstance(usual, float) else type(usual)
            if isinstance(usual, (bool, int, float, str)) and not isinstance(value, kind):
                raise ValueError(f"{field.name} is {value!r}, must be like {usual!r}")
    for name in SIZES:
        value = config.language.settings.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"llm_config: {name} is {value!r}, must be a whole number above 0")
    assert config.num_parameters  # needs every size of the language model
    return config


def _weights(path: Path, found: list[Finding]) -> Weights | None:
    try:
        return open_weights(path)
    except (ValueError, OSError) as error:
        found.append(Finding("conflict", "weights", str(error), "the model cannot be opened", "nothing"))
        return None


def _optional(path: Path, found: list[Finding]) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        return read_json(path)
    except (ValueError, OSError) as error:
        found.append(Finding("conflict", path.name, str(error), "a broken file", "the rest of the folder"))
        return {}


def _chat_template(path: Path, tokenizer: Mapping[str, Any], found: list[Finding]) -> tuple[str, str]:
    """The template that transformers would take: its own file first, then the tokenizer's settings."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8", errors="replace"), file.name
    other = _optional(path / "chat_template.json", found).get("chat_template")
    if isinstance(other, str):
        return other, "chat_template.json"
    template = tokenizer.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next((t.get("template") for t in template if _mapping(t).get("name") == "default"), None)
    return (template, "tokenizer_config.json") if isinstance(template, str) else ("", "")


def _vocabulary(path: Path, tokenizer: Mapping[str, Any], found: list[Finding]) -> tuple[dict[str, int], str]:
    fast, slow, words = path / "tokenizer.json", path / "tokenizer.model", path / "vocab.json"
    added = {str(k): v for k, v in _optional(path / "added_tokens.json", found).items() if isinstance(v, int)}
    for index, entry in _mapping(tokenizer.get("added_tokens_decoder")).items():
        if str(index).isdigit() and isinstance(_mapping(entry).get("content"), str):
            added.setdefault(entry["content"], int(index))
    if fast.is_file():
        content = _optional(fast, found)
        table = _words(_mapping(content.get("model")).get("vocab"))
        later = content.get("added_tokens")
        entries = [_mapping(entry) for entry in later] if isinstance(later, list) else []
        return table | {str(e.get("content")): e["id"] for e in entries if isinstance(e.get("id"), int)}, fast.name
    if words.is_file():
        return _words(_optional(words, found)) | added, words.name
    if slow.is_file():
        return _pieces(slow, found) | added, slow.name
    return {}, ""


def _words(vocabulary: Any) -> dict[str, int]:
    if isinstance(vocabulary, Mapping):
        return {str(word): index for word, index in vocabulary.items() if isinstance(index, int)}
    if isinstance(vocabulary, list):  # Unigram: [piece, score] in the order of the ids
        return {str(entry[0]): index for index, entry in enumerate(vocabulary) if isinstance(entry, list) and entry}
    return {}


def _pieces(path: Path, found: list[Finding]) -> dict[str, int]:
    if find_spec("sentencepiece") is None:
        remedy = "reading it needs: pip install 'internvl[slow-tokenizers]'"
        found.append(
            Finding("note", "tokenizer", f"{path.name} was not looked into", remedy, "what the other files say")
        )
        return {}
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        found.append(Finding("conflict", "tokenizer", f"{path.name}: {error}", "a broken file", "nothing"))
        return {}
    return {model.id_to_piece(index): index for index in range(model.get_piece_size())}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
