"""The reasoning of an index's rows: checked when it comes in, and replaced without a new index.

An index of which reasoning was attached says so in its header, for whoever makes it anew: what from
(as `open_provider` takes it), and how many episodes and rows have some.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from tqdm import tqdm

from data_pipelines.annotate.readers import AnnotationProvider, EpisodeName
from data_pipelines.annotate.schema import checked_box
from data_pipelines.index.format import (
    FLAGS,
    Index,
)
from data_pipelines.index.writer import IndexWriter
from lara_jax.tokenizers.prompt import Annotation

# The other texts are written again, too, under the same numbers.
REWRITTEN = frozenset(
    {
        "rows.bin",
        "annotations.bin",
        "boxes.bin",
        *(f"{name}{end}.bin" for name in ("texts", "annotation_texts") for end in ("", ".ends")),
    }
)


def attach_annotations(index: Index, provider: AnnotationProvider) -> Index:
    """Gives an index other reasoning; nothing else of it changes, and no source file is read.

    Args:
      index: of any kind.
      provider: the reasoning, by episode and stored step.

    Returns:
      The new index, in the old one's place; its header counts what was found.

    Raises:
      ValueError: a box lies outside the image, or a step outside its episode; or no episode has
        any reasoning. The index then stays as it was.
    """
    header, names = index.header, episode_names(index)
    found = {"episodes": 0, "rows": 0}
    with IndexWriter(index.folder) as writer:
        writer.keep(index, sorted(set(header.arrays) - REWRITTEN))
        label = f"annotate {header.dataset} {header.split}"
        for name, episode in zip(
            tqdm(names, desc=label, unit="episode"), index.episodes, strict=True
        ):
            first, count = int(episode["first_row"]), int(episode["rows"])
            rows = index.rows[first : first + count].copy()
            annotations = _annotations_of(name, provider, rows["frame"].tolist())
            rows["flags"] &= ~np.uint8(FLAGS["no_annotation"])
            rows["flags"][[a is None for a in annotations]] |= FLAGS["no_annotation"]
            writer.append("rows.bin", rows)
            writer.add_annotations(annotations, count)
            annotated = count - int(np.count_nonzero(rows["flags"] & FLAGS["no_annotation"]))
            writer.counts["flag:no_annotation"] += count - annotated
            found["episodes"] += annotated > 0
            found["rows"] += annotated
        if not found["episodes"]:
            raise ValueError(
                f"{provider.description} has nothing of {header.dataset}, split {header.split!r}: "
                f"none of {len(names)} episodes matches, such as {names[0]}; is it of another "
                f"split (--split)?"
            )
        facts = {"fingerprint": provider.fingerprint, "from": provider.description, **found}
        writer.finish(replace(header, annotations=facts))
    return Index.open(index.folder, source=index.source)


def episode_names(index: Index) -> list[EpisodeName]:
    """What annotation files may know each episode by; a key that several share is none."""
    keys, uses = np.unique(index.episodes["key"], return_counts=True)
    shared = set(keys[uses > 1].tolist())
    return [
        EpisodeName(
            key="" if episode["key"] in shared else index.texts[int(episode["key"])],
            number=int(episode["number"]),
            dataset=index.header.own_name,
            split=index.header.split,
            stored_steps=int(episode["frames"]),
        )
        for episode in index.episodes
    ]


def _annotations_of(
    name: EpisodeName, provider: AnnotationProvider, steps: Sequence[int]
) -> list[Annotation | None]:
    """The checked annotations of an episode's rows, whose stored steps are given."""
    by_step = provider.episode(name) or {}
    outside = [step for step in by_step if not 0 <= step < name.stored_steps]
    if outside:
        raise ValueError(f"{name}: no step {outside[0]}; it has {name.stored_steps} steps")
    return checked_annotations([by_step.get(step) for step in steps], steps, str(name))


def checked_annotations(
    annotations: Sequence[Annotation | None], steps: Sequence[int], where: str
) -> list[Annotation | None]:
    """Annotations whose boxes lie inside the image; an empty annotation is None.

    Args:
      annotations, steps: the rows' annotations and their stored steps.
      where: names the episode in messages.

    Returns:
      The annotations; what sticks out of the image by rounding only is cut off.

    Raises:
      ValueError: a box is none, inverted or outside the image; names episode, step and box.
    """
    checked: list[Annotation | None] = []
    for annotation, step in zip(annotations, steps, strict=True):
        if annotation is not None and annotation.boxes:
            boxes = [
                checked_box(box, f"{where}, step {step}, box {number}")
                for number, box in enumerate(annotation.boxes)
            ]
            annotation = replace(annotation, boxes=tuple(boxes))
        checked.append(None if annotation == Annotation() else annotation)
    return checked
