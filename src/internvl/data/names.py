"""A picture's title as a name to ask for: cleaned phrase, head noun, accepted answers. Text only."""

from __future__ import annotations

import re
from dataclasses import dataclass

from internvl.data.packaged.common import set_of
from internvl.data.packaged.wordnet import GROUPS, Nouns

_ARTICLE = re.compile(r"^(?:a|an|the|some|this is an?|one|my|your|another|various)\s+")
_CUT = re.compile(
    r"\s+(?:with|in|on|at|from|for|by|to|and|or|under|over|near|behind|without|that|which|facing|wearing|holding|playing|"
    r"eating|riding|seen|used|made|as|is|are|pointing|pointed|tilted|curving|showing)\b.*$"
)
_SHOWN = r"^(?:picture|drawing|image|icon|clip ?art|cartoon|silhouette|illustration|symbol|outline|sketch|photo)s? of "
_PART = set_of(
    "pair piece slice bunch pack set group kind type cut cluster sheaf head stack loaf bar bowl glass cup "
    "bottle can basket plate box"
)
"""Heads before "of" that leave the thing after it as the name."""
_AMOUNT = set_of("pair piece slice bunch pack set group kind type cut cluster loaf")
"""Those of them that nobody would give as the answer."""
_JUNK = set_of(
    "clipart clip art svg untitled openclipart cliparts template icon logo button symbol sign test remix bw b "
    "w submission version copy various new architetto collection thing stuff item object image picture drawing "
    "cartoon silhouette outline sketch simple theme part piece unit down up left right o'clock volume diagram "
    "nero modern base top bottom illustration background scene style set group home room equal one two three "
    "four five six seven eight nine zero red orange yellow green blue purple pink brown black white gray grey "
    "fashion load throw spread trip design hide portrait rice"
)
_DROP = set_of(
    "bw cc clipart clip art cartoon icon silhouette outline lineart version vector svg simple generic stylized "
    "stylised colored coloured color colour drawing image picture illustration sketch remix symbol logo "
    "grayscale greyscale contour mono monochrome freehand"
)
_GENERAL = frozenset(
    {"thing", "machine", "object", "item", "being", "soul", "someone", "animal", "beast", "creature", "fauna"}
)
"""Synonyms in WordNet that would accept an answer which says nothing."""


@dataclass(frozen=True)
class Name:
    name: str
    """Noun phrase in lower case without article: "red apple"."""
    head: str
    """Singular head noun: "apple"."""
    accept: tuple[str, ...]
    """Answers that count as right when they occur as whole words."""
    group: str
    """Kind of thing: animal, plant, food, person, body part, object."""
    wider: tuple[str, ...] = ()
    """Wider terms, of which a question "is there a ..." is true as well."""
    proper: bool = False
    """One certain thing, such as the Eiffel tower."""


def clean(title: str) -> str:
    """The title without file-name debris, articles, brackets and trailing sentences."""
    text = re.sub(r"\([^)]*\)|\[[^\]]*\]|<[^>]*>|https?:\S+", " ", title)
    text = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", text)  # BypassLopper
    text = text.replace("_", " ").replace("’", "'").replace("“", "").replace("”", "").replace('"', "").replace("`", "'")
    text = re.split(r"[.!?;:,/|]|\s[-–—]\s", text.strip())[0].lower()
    text = re.sub(r"\s*#?\b\d+\w?\b|(?<=[a-z])\d+\b", " ", text)
    words = [w for w in re.split(r"[^a-zàâçéèêëîïôûùüñæœ'\-]+", text) if w.strip("-'")]
    text = " ".join(w.strip("-'") if not w.endswith("s'") else w for w in words if w not in _DROP)
    text = re.sub(r"^of ", "", re.sub(_SHOWN, "", text))
    before = None
    while before != text:
        before, text = text, _ARTICLE.sub("", text)
    return text


def name(
    title: str, nouns: Nouns, kinds: frozenset[int] = frozenset(), max_words: int = 4, strict: bool = False
) -> Name | None:
    """What the title names, or None where that cannot be drawn; `strict` wants every word in WordNet."""
    text = clean(title)
    if strict and not all(nouns.is_english(word) for word in _CUT.sub("", text).split() if word != "of"):
        return None
    phrase = re.sub(r"(?<=\w) \w+ed$", "", _CUT.sub("", text).strip())
    outer, _, inner = phrase.partition(" of ")
    outer, inner = outer.strip(), _ARTICLE.sub("", inner.strip())
    if inner and outer.split(" ")[-1] in _PART | {nouns.base(outer.split(" ")[-1])} & _PART:
        whole = _single(inner, nouns, kinds)
        if whole is None:
            return None
        part = nouns.base(outer.split(" ")[-1])
        useful = part in (
            "pair",
            "piece",
            "slice",
            "bunch",
            "pack",
            "set",
            "group",
            "kind",
            "type",
            "cut",
            "cluster",
            "loaf",
        )
        accept = whole.accept if useful else (*whole.accept, part)
        full = inner if part in ("pair", "kind", "type", "group", "set", "pack") else phrase
        return (
            Name(full, whole.head, accept, whole.group, whole.wider, whole.proper)
            if len(full.split()) <= max_words
            else None
        )
    found = _single(outer, nouns, kinds)
    if found is None or len(outer.split()) > max_words:
        return None
    return found


def _single(phrase: str, nouns: Nouns, kinds: frozenset[int]) -> Name | None:
    words = phrase.split()
    if not words or len(phrase) < 3:
        return None
    words = [*words[:-1], words[-1].removesuffix("'s")]
    if len(words) > 1 and nouns.knows(words[-2] + words[-1]):  # screw driver
        words = [*words[:-2], words[-2] + words[-1]]
        phrase = " ".join(words)
    for start in range(len(words)):  # the longest ending that WordNet knows
        ending = " ".join(words[start:])
        single = " ".join([*words[start:-1], nouns.base(words[-1])])
        known = single if nouns.knows(single) else ending
        sense = nouns.depicted(known, kinds)
        if sense is None:
            continue
        last = nouns.base(words[-1])
        if last in _JUNK or known in _JUNK:
            return None
        head = last if nouns.is_a(sense, last) or known == last else known
        same = [word for word in nouns.synonyms(sense) if word not in _GENERAL]
        accept = dict.fromkeys([head, known, *same, phrase])
        if nouns.base(words[-1]) != words[-1]:
            accept |= dict.fromkeys([ending])
        return Name(phrase, head, tuple(accept), GROUPS[sense.kind], tuple(nouns.wider(sense)), sense.certain(known))
    return None


def with_article(phrase: str, plural: bool = False) -> str:
    """ "an apple"; plurals and mass words stay bare."""
    if plural or not phrase:
        return phrase
    silent = phrase.startswith(("hour", "honest", "heir"))
    long_u = phrase.startswith(("uni", "use", "uk", "eu", "ufo", "one"))
    return f"{'an' if (phrase[0] in 'aeiou' and not long_u) or silent else 'a'} {phrase}"


def plural(phrase: str) -> str:
    """Plural of a noun phrase by the last word."""
    first, _, last = phrase.rpartition(" ")
    irregular = {
        "man": "men", "woman": "women", "child": "children", "mouse": "mice", "foot": "feet", "tooth": "teeth",
        "goose": "geese", "sheep": "sheep", "fish": "fish", "deer": "deer", "leaf": "leaves", "knife": "knives",
        "wolf": "wolves", "person": "people", "ox": "oxen", "aircraft": "aircraft", "shelf": "shelves",
        "loaf": "loaves",
        "calf": "calves", "moose": "moose", "bison": "bison", "squid": "squid", "shrimp": "shrimp",
        "potato": "potatoes",
        "tomato": "tomatoes", "scarf": "scarves", "die": "dice", "cactus": "cacti", "octopus": "octopuses",
        "spacecraft": "spacecraft", "salmon": "salmon", "policeman": "policemen", "fireman": "firemen",
        "snowman": "snowmen",
    }  # fmt: skip
    if last in irregular:
        end = irregular[last]
    elif re.search(r"(?:s|x|z|ch|sh)$", last):
        end = last + "es"
    elif re.search(r"[^aeiou]y$", last):
        end = last[:-1] + "ies"
    else:
        end = last + "s"
    return f"{first} {end}".strip()
