"""What is asked about a composed scene, each answer exact by construction. Pictures are `scenes.py`'s.

One style a task: lower-case single words for yes/no, colour, count and side; "a red apple" for names; sentences for
captions; `<ref>name</ref><box>[[x1, y1, x2, y2]]</box>` on the 0..1000 grid for places (official format).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from internvl.data import colours
from internvl.data.asked import Asked, Task, lower, pick
from internvl.data.library import Library
from internvl.data.names import plural, with_article
from internvl.data.packaged.common import set_of
from internvl.data.places import beside, box, position, region
from internvl.data.scenes import Scene, Thing
from internvl.data.shapes import SHAPES

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
_SCENERY = set_of(
    "building house tower tree sky cloud person man woman people flower plant leaf grass car water windmill "
    "castle temple monument statue mountain road bridge boat flag window gate dome church palace bird sun "
    "fence rock stone wall door stairs lamp cathedral fort fountain hill river lake sea pyramid arch bush "
    "garden home roof column bug ladybug pole insect beetle ladybeetle street crane ship fan wheel panel"
)
"""What a photo in the background may show by itself: never asked for in vain there."""
_BODY = ("person", "body part")


def ask(scene: Scene, library: Library, generator: np.random.Generator, task: Task) -> Asked | None:
    """One question of a task, or None where the scene offers none."""
    return MAKERS[task](scene, library, generator) if scene.things else None


def conversation(scene: Scene, library: Library, generator: np.random.Generator) -> list[Asked]:
    """Two to twelve different questions, as one record asks them: the picture's tokens are paid for once."""
    tasks, shares = zip(*_SHARES[scene.kind].items(), strict=True)
    number = int(generator.choice([2, 4, 6, 8, 10, 12], p=[0.05, 0.1, 0.2, 0.25, 0.2, 0.2]))
    asked: dict[str, Asked] = {}
    for _ in range(3 * number):
        task = tasks[int(generator.choice(len(tasks), p=np.array(shares) / sum(shares)))]
        made = ask(scene, library, generator, task)
        if made is not None:
            one_sided = made.task in ("scenes_yesno", "scenes_position", "scenes_position_yesno")
            asked.setdefault(f"{made.task} {made.question if one_sided else made.answer}", made)
        if len(asked) == number:
            break
    return list(asked.values())


def apart(
    scene: Scene, library: Library, generator: np.random.Generator, asking: Mapping[Task, float] | None = None
) -> list[Asked]:
    """One to three questions of which none says what answers another: each is to be read from the picture.

    In a longer conversation some can be told from what was asked and answered before, and are learned so. `asking`:
    tasks with their shares, instead of those of the scene's kind.
    """
    tasks, shares = zip(*(asking or _APART[scene.kind]).items(), strict=True)
    number = 1 if scene.kind == "shapes" else int(generator.integers(1, 4))
    asked: list[Asked] = []
    spoken: set[str] = set()
    for _ in range(3 * number):
        task = tasks[int(generator.choice(len(tasks), p=shares))]
        if task == "yesno" and asked:  # of what nobody spoke of yet, less is there: more answers were no
            continue
        made = ask(scene, library, generator, task)
        nouns = {noun for noun in scene.groups() if made and (noun in made.question or plural(noun) in made.question)}
        if made is not None and spoken.isdisjoint(nouns):
            asked.append(made)
            spoken |= nouns
        if len(asked) == number:
            break
    return asked


def several(scene: Scene, library: Library, generator: np.random.Generator, task: Task, most: int = 6) -> list[Asked]:
    """Questions of one task, each about another thing: yesno, colour or count. The picture's tokens are paid for once.

    They hardly tell of each other: a red circle is a circle, and the largest crowd mostly comes first. A record of yes
    and no ends when all that is there has been named: from then on every answer would be no.
    """
    if not scene.things:
        return []
    if task == "yesno":
        return _several_yesno(scene, library, generator, most)
    if task == "colour":
        things = _single_coloured(scene)
        order = generator.permutation(len(things))[:most]
        return [_colour_of(things[int(k)], scene, generator) for k in order]
    if task == "count":
        numbers = _partition(scene, generator)
        nouns = [list(numbers)[int(k)] for k in generator.permutation(len(numbers))]
        if generator.random() < 0.75:
            nouns.sort(key=lambda noun: numbers[noun], reverse=True)  # most of the time the crowd first, as in `count`
        return [_how_many(noun, numbers[noun], generator) for noun in nouns[:most]]
    raise ValueError(f"several questions of {task}; only yesno, colour and count can be asked of several things")


def _several_yesno(scene: Scene, library: Library, generator: np.random.Generator, most: int) -> list[Asked]:
    asked: list[Asked] = []
    spoken: set[str] = set()
    while len(asked) < most and not spoken.issuperset(scene.groups()):
        there = generator.random() < 0.5
        tries = (_present(scene, generator) if there else _absent(scene, library, generator) for _ in range(8))
        noun = next((noun for noun in tries if noun and noun not in spoken), None)
        if noun is None:
            break
        spoken.add(noun)
        asked.append(_whether(noun, there, generator))
    return asked


def _partition(scene: Scene, generator: np.random.Generator) -> dict[str, int]:
    """What can be counted, no thing twice: of shapes all, by shape or by colour."""
    if scene.kind != "shapes":
        return {noun: len(group) for noun, group in scene.groups().items()}
    draw = generator.random()
    if draw < 0.3:
        return {"shape": len(scene.things)}
    said = [thing.name if draw < 0.75 else f"{thing.colour} shape" for thing in scene.things]
    return {noun: said.count(noun) for noun in dict.fromkeys(said)}


def yesno(scene: Scene, library: Library, generator: np.random.Generator) -> Asked | None:
    wanted = generator.random() < 0.5
    noun = _present(scene, generator) if wanted else _absent(scene, library, generator)
    return None if noun is None else _whether(noun, wanted, generator)


def _whether(noun: str, there: bool, generator: np.random.Generator) -> Asked:
    many, one = plural(noun), with_article(noun)
    text = pick((f"Is there {one} in the picture?", f"Is there {one} in the image?", f"Is there {one}?",
                 f"Does the picture show {one}?", f"Can you see {one}?", f"Does the image contain {one}?",
                 f"Do you see {one} here?", f"Are there any {many} in the picture?", f"Is {one} visible?",
                 f"Is {one} present in this image?"), generator)  # fmt: skip
    return Asked("scenes_yesno", lower(text, generator), "yes" if there else "no")


def _present(scene: Scene, generator: np.random.Generator) -> str:
    thing = scene.things[int(generator.integers(len(scene.things)))]
    if thing.entry is None and generator.random() < 0.3:
        return thing.name
    if thing.entry and generator.random() < 0.12 and thing.entry.group_kind in ("animal", "plant"):
        return thing.entry.group_kind
    return thing.noun


def _absent(scene: Scene, library: Library, generator: np.random.Generator) -> str | None:
    if scene.kind == "shapes":
        return _absent_shape(scene, generator)
    present = scene.things[int(generator.integers(len(scene.things)))]
    kinds = {t.entry.group_kind for t in scene.things if t.entry}
    for _ in range(12):
        kind = (
            present.entry.group_kind
            if present.entry and generator.random() < 0.5
            else pick(sorted(library.heads_of_kind), generator)
        )
        head = pick(library.heads_of_kind.get(kind) or sorted(library.known_heads), generator)
        if kind in _BODY and kinds & set(_BODY):
            continue
        if scene.ground == "photo" and (head in _SCENERY or kind == "plant"):
            continue
        if not any(_covers(thing, head, library) for thing in scene.things):
            return head
    return None


def _covers(thing: Thing, head: str, library: Library) -> bool:
    if thing.entry is None:
        return head == thing.name or head in thing.noun
    words = (*thing.entry.accept, thing.entry.name, *thing.entry.keywords)
    said = thing.entry.is_also(head) or any(head in word or word in head for word in words if len(word) > 2)
    other = library.cutouts.get(head)
    return said or bool(other and other[0].is_also(thing.noun))


def _absent_shape(scene: Scene, generator: np.random.Generator) -> str:
    """A colour and a shape that stand in the scene, but not together, or a shape that does not stand there."""
    pairs = {thing.noun for thing in scene.things}
    shapes = sorted({thing.name for thing in scene.things})
    named = sorted({str(thing.colour) for thing in scene.things})
    for _ in range(10):
        draw = generator.random()
        shape = pick(shapes, generator) if draw < 0.7 else pick(SHAPES, generator)
        colour = pick(named if draw < 0.35 else colours.NAMES, generator)
        if f"{colour} {shape}" not in pairs:
            return f"{colour} {shape}"
    return next(shape for shape in SHAPES if shape not in shapes)


def colour(scene: Scene, library: Library, generator: np.random.Generator) -> Asked | None:
    single = _single_coloured(scene)
    if not single:
        return None
    return _colour_of(single[int(generator.integers(len(single)))], scene, generator)


def _single_coloured(scene: Scene) -> list[Thing]:
    """What "the apple" can mean, if its colour is clear."""
    if scene.kind == "shapes":
        names = [thing.name for thing in scene.things]
        return [thing for thing in scene.things if names.count(thing.name) == 1]
    return [group[0] for group in scene.groups().values() if len(group) == 1 and group[0].colour]


def _colour_of(thing: Thing, scene: Scene, generator: np.random.Generator) -> Asked:
    noun = thing.name if thing.entry is None else thing.noun
    same = [t for t in scene.things if t.colour == thing.colour]
    if thing.entry is None and len(same) == 1 and generator.random() < 0.25:
        text = pick((f"What shape is {thing.colour}?", f"What is the {thing.colour} shape?",
                     f"What is the shape of the {thing.colour} object?"), generator)  # fmt: skip
        return Asked("scenes_shape", lower(text, generator), noun)
    hue = pick(("color", "colour"), generator)
    text = pick((f"What {hue} is the {noun}?", f"What is the {hue} of the {noun}?",
                 f"Which {hue} does the {noun} have?",
                 f"What {hue} is the {noun} in the picture?", f"Name the {hue} of the {noun}.",
                 f"Tell me the {hue} of the {noun}.",
                 f"The {noun} is what {hue}?", f"Which {hue} is the {noun}?"), generator)  # fmt: skip
    return Asked("scenes_colour", lower(text, generator), str(thing.colour))


def count(scene: Scene, library: Library, generator: np.random.Generator) -> Asked | None:
    noun, number = _counted(scene, library, generator)
    return None if noun is None else _how_many(noun, number, generator)


def _how_many(noun: str, number: int, generator: np.random.Generator) -> Asked:
    many = plural(noun)
    text = pick((f"How many {many} are there?", f"How many {many} are in the picture?",
                 f"How many {many} can you see?",
                 f"Count the {many}.", f"What is the number of {many}?", f"How many {many} does the image show?",
                 f"Tell me how many {many} there are.", f"How many {many} are shown here?"), generator)  # fmt: skip
    return Asked("scenes_count", lower(text, generator), str(number))


def _counted(scene: Scene, library: Library, generator: np.random.Generator) -> tuple[str | None, int]:
    if scene.kind == "shapes":
        thing = scene.things[int(generator.integers(len(scene.things)))]
        draw = generator.random()
        if draw < 0.45:
            return thing.name, sum(t.name == thing.name for t in scene.things)
        if draw < 0.7:
            return f"{thing.colour} shape", sum(t.colour == thing.colour for t in scene.things)
        return "shape", len(scene.things)
    if scene.kind != "count" and generator.random() < 0.1:
        return _absent(scene, library, generator), 0
    groups = scene.groups()
    largest = max(groups, key=lambda noun: len(groups[noun]))
    noun = largest if generator.random() < 0.75 else pick(sorted(groups), generator)
    return noun, len(groups[noun])


def caption(scene: Scene, library: Library, generator: np.random.Generator) -> Asked:
    parts = [
        with_article(noun) if len(group) == 1 else f"{NUMBERS[len(group)]} {plural(noun)}"
        for noun, group in scene.groups().items()
    ]
    text = pick(("Describe the picture.", "Describe the image.", "What does the picture show?", "What do you see?",
                 "What is in the picture?", "Please describe this image shortly.", "Write a caption for the picture.",
                 "List what you see in the image.", "What can be seen here?"), generator)  # fmt: skip
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    ground = f" on a {scene.ground} background" if scene.ground in colours.NAMES else ""
    return Asked("scenes_caption", lower(text, generator), f"The picture shows {listed}{ground}.")


MAKERS: dict[Task, Callable[[Scene, Library, np.random.Generator], Asked | None]] = {
    "yesno": yesno, "colour": colour, "count": count, "position": position, "box": box, "region": region,
    "caption": caption, "beside": beside,
}  # fmt: skip
_SHARES = {
    "mixed": {"yesno": 0.2, "colour": 0.04, "count": 0.08, "position": 0.28, "box": 0.2, "region": 0.05,
    "caption": 0.1, "beside": 0.05},
    "count": {"yesno": 0.14, "count": 0.5, "box": 0.14, "region": 0.04, "caption": 0.18},
    "shapes": {"yesno": 0.17, "colour": 0.21, "count": 0.2, "position": 0.2, "box": 0.13, "caption": 0.09},
    "colour": {"yesno": 0.1, "colour": 0.55, "position": 0.1, "box": 0.15, "caption": 0.1},
}  # fmt: skip
_APART = {
    "mixed": {"yesno": 0.6, "position": 0.3, "colour": 0.1},
    "count": {"count": 0.75, "yesno": 0.25},
    "shapes": {"count": 0.35, "yesno": 0.25, "colour": 0.25, "position": 0.15},
    "colour": {"colour": 0.7, "yesno": 0.3},
}
