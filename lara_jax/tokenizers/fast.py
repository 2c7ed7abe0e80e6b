"""FAST: a chunk of actions as a short string of discrete tokens, and back.

A cosine transform over time packs a smooth motion into a few low frequencies; rounding turns most
of the rest into zeros; byte-pair encoding turns runs of common values into one token::

    chunk      float32[C, A], normalised        [[0.0, 1.0], [0.5, 1.0]]
    DCT-II     orthonormal, over time           [[0.354, 1.414], [-0.354, 0.0]]
    round      times scale                      [[4, 14], [-4, 0]]
    flatten    frequency by frequency           4 14 -4 0
    characters number - min_token               18 28 10 14         (min_token = -14)
    BPE        over the characters              [310, 7]

    coefficients = round(scale * D @ chunk),   chunk = D.T @ coefficients / scale

Only the rounding loses anything: `decode` of `encode` is exactly the rounded transform's inverse,
and `encode` of that gives the same ids. What cannot be written, or ids that do not spell exactly
C * A coefficients, raise; the published code writes the nearest it can and acts with zeros.

The folder on disk is the published tokenizer's (physical-intelligence/fast on Hugging Face):
`processor_config.json` with the numbers, `tokenizer.json` with the BPE. In a prompt, FAST token i
is the vocabulary's `<robot_action_i>` (`to_vocabulary`, `from_vocabulary`).

Letters: B batch, C action chunk, A action dim.

Source: FAST (arXiv 2501.09747), algorithm 1, and the published tokenizer for order and rounding.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.fft  # type: ignore[import-untyped]
import tokenizers

CONFIG_FILE = "processor_config.json"
TOKENIZER_FILE = "tokenizer.json"
# Where the published layout has the BPE: beside the numbers, or where newer savers put it.
TOKENIZER_FOLDERS = (".", "bpe_tokenizer")
FIRST_SURROGATE = 0xD800  # no character from here on
PUBLISHED_CLASS = "processing_action_tokenizer.UniversalActionProcessor"


@dataclass(frozen=True, kw_only=True, eq=False)
class FastTokenizer:
    """Actions to FAST ids and back. `fit` or `load` makes one. Immutable and picklable.

    Attributes:
      backend: the BPE over characters.
      scale: coefficients are multiplied by this before rounding; more is finer and longer.
      min_token: the coefficient that is character 0.
      vocab_size: ids are below this.
      action_horizon, action_dim: C and A where the tokenizer is made for one shape; else None.
    """

    backend: tokenizers.Tokenizer
    scale: float
    min_token: int
    vocab_size: int
    action_horizon: int | None = None
    action_dim: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale is {self.scale}; it must be above 0")
        size = self.backend.get_vocab_size()
        if size > self.vocab_size:
            raise ValueError(f"the BPE has {size} tokens, more than vocab_size {self.vocab_size}")

    @classmethod
    def fit(
        cls,
        chunks: Sequence[np.ndarray],
        scale: float = 10,
        vocab_size: int = 1024,
        reach: float = 1.0,
    ) -> "FastTokenizer":
        """Learns the BPE from example chunks; the same chunks give the same tokenizer.

        Every coefficient that occurs has a character, and so has every one that a chunk of this
        length in [-reach, reach] can have, so that new chunks can be written too.

        Args:
          chunks: float32[C, A] each, normalised; lengths may differ.
          scale: as above.
          vocab_size: number of tokens, characters included; fewer if the chunks give no more.
          reach: the largest absolute value of any chunk that may come.

        Raises:
          ValueError: no chunks, values that are not finite, or more characters than tokens.
        """
        if not len(chunks):
            raise ValueError("FAST: no chunks to fit to")
        quantised = [_quantise(np.asarray(chunk)[None], scale)[0] for chunk in chunks]
        # The constant component of a chunk of ones is sqrt(C); no other component is larger.
        bound = round(scale * reach * math.sqrt(max(len(chunk) for chunk in chunks)))
        lowest = min(-bound, *(int(values.min()) for values in quantised))
        highest = max(bound, *(int(values.max()) for values in quantised))
        characters = highest - lowest + 1
        if characters > vocab_size:
            raise ValueError(
                f"FAST: coefficients {lowest}..{highest} at scale {scale} take {characters} "
                f"characters; vocab_size is {vocab_size}. Actions within [-1, 1] (normalised with "
                f"q99 or min_max) take fewest"
            )
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.decoder = tokenizers.decoders.Fuse()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            initial_alphabet=[chr(character) for character in range(characters)],
            show_progress=False,
        )
        backend.train_from_iterator((_spell(values - lowest) for values in quantised), trainer)
        shapes = {np.shape(chunk) for chunk in chunks}
        horizon, width = shapes.pop() if len(shapes) == 1 else (None, None)
        return cls(
            backend=backend,
            scale=scale,
            min_token=lowest,
            vocab_size=vocab_size,
            action_horizon=horizon,
            action_dim=width,
        )

    def encode(self, chunk: np.ndarray) -> list[int]:
        """FAST ids of one chunk float32[C, A]; raises as `encode_batch` does."""
        return self.encode_batch(np.asarray(chunk)[None])[0]

    def encode_batch(self, chunks: np.ndarray) -> list[list[int]]:
        """FAST ids of many chunks.

        Args:
          chunks: float32[B, C, A], normalised.

        Returns:
          B lists of ids, of different lengths.

        Raises:
          ValueError: a value is not finite, or a coefficient has no character; nothing is clipped.
        """
        coefficients = _quantise(chunks, self.scale)
        codes = coefficients - self.min_token
        if codes.min() < 0 or codes.max() >= FIRST_SURROGATE:
            raise self._unwritable(coefficients)
        texts = [_spell(code) for code in codes]
        ids = [found.ids for found in self.backend.encode_batch(texts, add_special_tokens=False)]
        # BPE leaves out a character that it does not know; only the way back shows it.
        if self.backend.decode_batch(ids, skip_special_tokens=False) != texts:
            raise self._unwritable(coefficients)
        return ids

    def decode(
        self, ids: Sequence[int], horizon: int | None = None, action_dim: int | None = None
    ) -> np.ndarray:
        """The chunk that the ids spell.

        Args:
          ids: FAST ids.
          horizon, action_dim: C and A; None for the tokenizer's own.

        Returns:
          float32[C, A], normalised.

        Raises:
          ValueError: an id is unknown, the ids do not spell characters, or not C * A of them. A
            policy must ask again or stop: there is no chunk to act on.
        """
        horizon, action_dim = horizon or self.action_horizon, action_dim or self.action_dim
        if horizon is None or action_dim is None:
            raise ValueError("FAST: decoding needs horizon and action_dim; this tokenizer has none")
        ids = [int(i) for i in ids]
        unknown = [i for i in ids if i < 0 or self.backend.id_to_token(i) is None]
        if unknown:
            raise ValueError(
                f"FAST: no tokens have the ids {unknown}; allowed: 0..{self.vocab_size - 1}"
            )
        text = self.backend.decode(ids, skip_special_tokens=False)
        if "\ufffd" in text:
            raise ValueError(f"FAST: the ids {ids} break a character in two")
        if len(text) != horizon * action_dim:
            raise ValueError(
                f"FAST: the ids spell {len(text)} coefficients; a chunk of {horizon} steps x "
                f"{action_dim} dimensions has {horizon * action_dim}"
            )
        codes = np.frombuffer(text.encode("utf-32-le"), "<u4").reshape(horizon, action_dim)
        coefficients = (codes.astype(np.int64) + self.min_token) / self.scale
        return scipy.fft.idct(coefficients, axis=0, norm="ortho").astype(np.float32)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "FastTokenizer":
        """Reads a folder in the published layout.

        Raises:
          FileNotFoundError: a file is missing.
          ValueError: the numbers are missing or do not fit the BPE.
        """
        folder = Path(path)
        if not (folder / CONFIG_FILE).is_file():
            raise FileNotFoundError(f"{folder} is no FAST tokenizer: it has no {CONFIG_FILE}")
        places = [folder / place / TOKENIZER_FILE for place in TOKENIZER_FOLDERS]
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            raise FileNotFoundError(f"{folder} is no FAST tokenizer: it has no {TOKENIZER_FILE}")
        found = {CONFIG_FILE: folder / CONFIG_FILE, TOKENIZER_FILE: file}
        try:
            return cls.from_files({n: f.read_text(encoding="utf-8") for n, f in found.items()})
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error

    @classmethod
    def from_files(cls, files: Mapping[str, str]) -> "FastTokenizer":
        """The inverse of `to_files`.

        Raises:
          ValueError: the numbers are missing or do not fit the BPE.
        """
        values = json.loads(files[CONFIG_FILE])
        missing = [name for name in ("scale", "vocab_size", "min_token") if name not in values]
        if missing:
            raise ValueError(f"{CONFIG_FILE} lacks {missing}")
        return cls(
            backend=tokenizers.Tokenizer.from_str(files[TOKENIZER_FILE]),
            scale=values["scale"],
            min_token=values["min_token"],
            vocab_size=values["vocab_size"],
            action_horizon=values.get("time_horizon"),
            action_dim=values.get("action_dim"),
        )

    def to_files(self) -> dict[str, str]:
        """The text of each file of the published layout; `load` of them gives the same
        tokenizer."""
        config = {
            "action_dim": self.action_dim,
            "auto_map": {"AutoProcessor": f"physical-intelligence/fast--{PUBLISHED_CLASS}"},
            "min_token": self.min_token,
            "processor_class": PUBLISHED_CLASS.rpartition(".")[2],
            "scale": self.scale,
            "time_horizon": self.action_horizon,
            "vocab_size": self.vocab_size,
        }
        # Clean-up would delete characters before some others: these are numbers, not prose.
        names = {
            "clean_up_tokenization_spaces": False,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        return {
            CONFIG_FILE: json.dumps(config, indent=2) + "\n",
            "tokenizer_config.json": json.dumps(names, indent=2) + "\n",
            TOKENIZER_FILE: self.backend.to_str(pretty=False),
        }

    def _unwritable(self, coefficients: np.ndarray) -> ValueError:
        return ValueError(
            f"FAST: coefficients {coefficients.min()}..{coefficients.max()}: the tokenizer, which "
            f"starts at {self.min_token}, cannot write them all; are the actions normalised?"
        )


def to_vocabulary(ids: Iterable[int], action_ids: np.ndarray) -> np.ndarray:
    """FAST ids -> ids of `<robot_action_i>`; int32[n].

    >>> to_vocabulary([0, 7], np.arange(151_936, 153_984)).tolist()
    [151936, 151943]

    Args:
      ids: FAST ids.
      action_ids: int32[n], `Tokenizer.action_ids` of the text tokenizer.

    Raises:
      ValueError: an id has no action token.
    """
    found = np.asarray(list(ids), np.int64)
    if found.size and not 0 <= found.min() <= found.max() < len(action_ids):
        raise ValueError(
            f"FAST ids {found.min()}..{found.max()}; the vocabulary has action tokens "
            f"0..{len(action_ids) - 1}"
        )
    return action_ids[found].astype(np.int32)


def from_vocabulary(ids: Iterable[int], action_ids: np.ndarray) -> list[int]:
    """Ids of `<robot_action_i>` -> FAST ids: the inverse of `to_vocabulary`.

    Raises:
      ValueError: an id is no action token.
    """
    index = {int(token): number for number, token in enumerate(action_ids)}
    wanted = [int(i) for i in ids]
    foreign = [i for i in wanted if i not in index]
    if foreign:
        raise ValueError(f"the ids {foreign} are no action tokens")
    return [index[i] for i in wanted]


def _quantise(chunks: np.ndarray, scale: float) -> np.ndarray:
    """Rounded coefficients of float32[B, C, A]: int64[B, C, A], frequency by dimension.

    In float32, as published: a binary gripper puts coefficients exactly between two integers.
    """
    values = np.asarray(chunks, np.float32)
    if values.ndim != 3 or not values.size:
        raise ValueError(f"FAST: an action chunk is float32[C, A]; got shape {values.shape[1:]}")
    if not np.isfinite(values).all():
        raise ValueError("FAST: an action chunk has values that are not finite")
    return np.around(scipy.fft.dct(values, axis=1, norm="ortho") * scale).astype(np.int64)


def _spell(codes: np.ndarray) -> str:
    """Non-negative integers as characters, frequency by frequency."""
    return codes.astype("<u4").tobytes().decode("utf-32-le")
