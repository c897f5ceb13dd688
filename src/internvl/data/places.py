"""Questions about where things of a composed scene are: sides, boxes, regions."""

from __future__ import annotations

import numpy as np

from internvl.data.asked import Asked, lower, pick
from internvl.data.library import Library
from internvl.data.names import plural, with_article
from internvl.data.scenes import Scene, Thing

OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
MARGIN, STEEPNESS = 0.15, 1.5
"""Centres lie clearly beside each other: this share of the side apart, and that much more than across."""
COARSE = 20
"""Of 1000: a token of a tile of 224 px covers 125, and digits that nobody can know are noise to learn from."""


def position(scene: Scene, library: Library, generator: np.random.Generator) -> Asked | None:
    pair = _pair(scene, generator)
    if pair is None:
        return None
    one, other, side = pair
    a, b = f"the {one.noun}", f"the {other.noun}"
    if generator.random() < 0.12:
        beside = f"to the {side} of" if side in ("left", "right") else side
        truth = generator.random() < 0.5
        asked = beside if truth else (f"to the {OPPOSITE[side]} of" if side in ("left", "right") else OPPOSITE[side])
        return Asked("scenes_position_yesno", lower(f"Is {a} {asked} {b}?", generator), "yes" if truth else "no")
    forms: tuple[str, ...]
    if side in ("left", "right"):
        forms = (f"Is {a} to the left or to the right of {b}?", f"Is {a} left or right of {b}?",
                 f"On which side of {b} is {a}, left or right?")  # fmt: skip
    else:
        forms = (f"Is {a} above or below {b}?", f"Is {a} higher or lower than {b}: above or below?")
    every = (f"Where is {a} relative to {b}: left, right, above or below?",
             f"Where is {a} compared to {b}, left, right, above or below?",
             f"Is {a} left of, right of, above or below {b}?")  # fmt: skip
    return Asked("scenes_position", lower(pick((*forms, *every), generator), generator), side)


def _pair(scene: Scene, generator: np.random.Generator) -> tuple[Thing, Thing, str] | None:
    single = [group[0] for group in scene.groups().values() if len(group) == 1]
    pairs = []
    for one in single:
        for other in single:
            side = None if one is other else relation(scene, one, other)
            if side:
                pairs.append((one, other, side))
    return pairs[int(generator.integers(len(pairs)))] if pairs else None


def relation(scene: Scene, one: Thing, other: Thing) -> str | None:
    """Where `one` is, seen from `other`; None without a clear margin."""
    width, height = scene.image.size
    across = (one.centre[0] - other.centre[0]) / width
    down = (one.centre[1] - other.centre[1]) / height
    if abs(across) > MARGIN and abs(across) > STEEPNESS * abs(down):
        return "left" if across < 0 else "right"
    if abs(down) > MARGIN and abs(down) > STEEPNESS * abs(across):
        return "above" if down < 0 else "below"
    return None


def box(scene: Scene, library: Library, generator: np.random.Generator, single: bool = False) -> Asked | None:
    groups = {noun: group for noun, group in scene.groups().items() if len(group) <= (1 if single else 4)}
    if not groups:
        return None
    return _box_of(scene, pick(sorted(groups), generator), generator)


def boxes(scene: Scene, generator: np.random.Generator, most: int = 4) -> list[Asked]:
    """Where each thing is of which there is one, in any order, to the nearest `COARSE`: nothing else is asked."""
    single = sorted(noun for noun, group in scene.groups().items() if len(group) == 1)
    return [_box_of(scene, str(noun), generator, COARSE) for noun in generator.permutation(single)[:most]]


def _box_of(scene: Scene, noun: str, generator: np.random.Generator, step: int = 1) -> Asked:
    boxes = sorted(tuple(_rounded(edge, step) for edge in scene.box_1000(thing)) for thing in scene.groups()[noun])
    listed = ", ".join(f"[{a}, {b}, {c}, {d}]" for a, b, c, d in boxes)
    referred = noun if len(boxes) == 1 else plural(noun)
    # the wording of InternVL's own grounding evaluation for half of the questions
    official = (
        f"Please provide the bounding box coordinate of the region this sentence describes: <ref>the {referred}</ref>"
    )
    text = official if generator.random() < 0.5 else lower(pick((
        f"Where is the {noun}?" if len(boxes) == 1 else f"Where are the {referred}?", f"Locate the {referred}.",
        f"Find the {referred} in the picture.", f"Give the bounding box of the {referred}.",
        f"Detect the {referred}.", f"Show me where the {referred} {'is' if len(boxes) == 1 else 'are'}.",
        f"Box the {referred}."), generator), generator)  # fmt: skip
    answer = f"<ref>the {referred}</ref><box>[{listed}]</box>"
    left, top, right, bottom = boxes[0]
    return Asked("scenes_box", text, answer, box=(left, top, right, bottom) if len(boxes) == 1 else None)


def _rounded(edge: int, step: int) -> int:
    return edge if step == 1 else min(1000 - step, step * round(edge / step))


def region(scene: Scene, library: Library, generator: np.random.Generator) -> Asked | None:
    thing = scene.things[int(generator.integers(len(scene.things)))]
    a, b, c, d = scene.box_1000(thing)
    place = f"<box>[[{a}, {b}, {c}, {d}]]</box>"
    text = pick((f"Please provide a short description for this region: {place}", f"What is in the region {place}?",
                 f"What is shown at {place}?", f"Name the object in {place}."), generator)  # fmt: skip
    return Asked("scenes_region", text, with_article(thing.noun))


def beside(scene: Scene, library: Library, generator: np.random.Generator) -> Asked | None:
    """What stands left of, right of, above or below one thing, where only two stand in the scene."""
    pair = _pair(scene, generator) if len(scene.things) == 2 else None
    if pair is None:
        return None
    one, other, side = pair
    where = f"to the {side} of" if side in ("left", "right") else side
    return Asked("scenes_beside", lower(f"What is {where} the {other.noun}?", generator), with_article(one.noun))
