"""The reasoning of an index's rows: checked when it comes in, and replaced without a new index."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from tqdm import tqdm

from data_pipelines.annotate.readers import AnnotationProvider
from data_pipelines.annotate.schema import TOLERANCE
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
      The new index, in the old one's place.

    Raises:
      ValueError: a box lies outside the image, or a step outside its episode.
    """
    episodes = index.episodes
    with IndexWriter(index.folder) as writer:
        writer.keep(index, sorted(set(index.header.arrays) - REWRITTEN))
        label = f"annotate {index.header.dataset} {index.header.split}"
        for number in tqdm(range(len(episodes)), desc=label, unit="episode"):
            first, count = int(episodes[number]["first_row"]), int(episodes[number]["rows"])
            stored, key = int(episodes[number]["frames"]), index.key(number)
            where = f"{index.header.dataset}, episode {number} ({key})"
            by_step = provider.episode(key, number) or {}
            outside = [step for step in by_step if not 0 <= step < stored]
            if outside:
                raise ValueError(f"{where}: no step {outside[0]}; it has {stored} steps")
            rows = index.rows[first : first + count].copy()
            steps = rows["frame"].tolist()
            annotations = checked_annotations([by_step.get(s) for s in steps], steps, where)
            rows["flags"] &= ~np.uint8(FLAGS["no_annotation"])
            rows["flags"][[a is None for a in annotations]] |= FLAGS["no_annotation"]
            writer.append("rows.bin", rows)
            writer.add_annotations(annotations, count)
            missing = np.count_nonzero(rows["flags"] & FLAGS["no_annotation"])
            writer.counts["flag:no_annotation"] += int(missing)
        facts = {"fingerprint": provider.fingerprint}
        writer.finish(replace(index.header, annotations=facts))
    return Index.open(index.folder, source=index.source)


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
      ValueError: a box lies outside the image; names episode, step and box.
    """
    checked: list[Annotation | None] = []
    for annotation, step in zip(annotations, steps, strict=True):
        if annotation is not None and annotation.boxes:
            for number, box in enumerate(annotation.boxes):
                if min(box) < -TOLERANCE or max(box) > 1 + TOLERANCE:
                    raise ValueError(
                        f"{where}, step {step}, box {number}: {list(box)} lies outside the image, "
                        f"[0, 1] x [0, 1]"
                    )
            inside = np.clip(annotation.boxes, 0, 1).tolist()
            annotation = replace(annotation, boxes=tuple(map(tuple, inside)))
        checked.append(None if annotation == Annotation() else annotation)
    return checked
