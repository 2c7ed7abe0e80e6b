"""Boxes of an open-vocabulary detector from `transformers`: OWL-ViT, OWLv2, Grounding DINO, ...

One phrase at a time is looked for, in a batch of images, so that a box belongs to its phrase in all
of these models (Grounding DINO, given several phrases, may answer with parts of them). The best box
over the threshold is taken.

Needs the extra `torch`; the checkpoint is a local folder, nothing is downloaded.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lara_jax.tokenizers.prompt import Box


class ZeroShotDetector:
    """Finds phrases in images with a checkpoint of `AutoModelForZeroShotObjectDetection`."""

    def __init__(
        self, path: str | os.PathLike[str], *, threshold: float = 0.2, batch_size: int = 16
    ) -> None:
        """Loads the checkpoint.

        Args:
          path: folder with the model and its processor.
          threshold: least score of a box, in (0, 1).
          batch_size: images at a time.

        Raises:
          ImportError: torch or transformers is not there.
          FileNotFoundError: there is no such folder.
          ValueError: the threshold cannot be, or the checkpoint is of another kind of model.
        """
        if not 0 < threshold < 1:
            raise ValueError(f"threshold is {threshold}; allowed is 0 < threshold < 1")
        config = Path(path) / "config.json"
        if not config.is_file():
            raise FileNotFoundError(f"{path}: no detector checkpoint (no config.json)")
        try:
            import torch
            from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor
        except ImportError as error:
            raise ImportError(
                "zero-shot detection needs torch and transformers: install lara-jax[torch]"
            ) from error
        self._torch = torch
        self._threshold, self._batch_size = threshold, batch_size
        self._processor = AutoProcessor.from_pretrained(path, local_files_only=True)
        model = AutoModelForZeroShotObjectDetection.from_pretrained(path, local_files_only=True)
        self._model = model.eval()
        weights = sorted([*Path(path).glob("*.safetensors"), *Path(path).glob("*.bin")])
        digests = [_digest(file) for file in (config, *weights)]
        checkpoint = hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
        self.name = f"zero-shot {checkpoint} threshold {threshold}"

    def boxes(self, images: Sequence[np.ndarray], phrases: Sequence[str]) -> list[list[Box | None]]:
        """See `data_pipelines.annotate.writers.BoxDetector`."""
        found: list[list[Box | None]] = [[] for _ in images]
        for phrase in phrases:
            for first in range(0, len(images), self._batch_size):
                batch = images[first : first + self._batch_size]
                for number, box in enumerate(self._detect(batch, phrase), first):
                    found[number].append(box)
        return found

    def _detect(self, images: Sequence[np.ndarray], phrase: str) -> list[Box | None]:
        """The best box of one phrase in each image."""
        text = [[phrase]] * len(images)
        inputs = self._processor(images=list(images), text=text, return_tensors="pt")
        with self._torch.inference_mode():
            outputs = self._model(**inputs)
        sizes = [image.shape[:2] for image in images]
        results = self._processor.post_process_grounded_object_detection(
            outputs, threshold=self._threshold, target_sizes=self._torch.tensor(sizes)
        )
        return [_best(result, size) for result, size in zip(results, sizes, strict=True)]


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _best(result: Any, size: tuple[int, ...]) -> Box | None:
    """The box with the highest score that shows in the image, normalised; None if there is none."""
    height, width = size
    for number in result["scores"].argsort(descending=True).tolist():
        # A detector may see an object reach beyond the image: that part is cut off.
        x1, y1, x2, y2 = (
            min(max(x / side, 0.0), 1.0)
            for x, side in zip(result["boxes"][number].tolist(), (width, height) * 2, strict=True)
        )
        if x1 < x2 and y1 < y2:
            return x1, y1, x2, y2
    return None
