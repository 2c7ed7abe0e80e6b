"""Text to token ids and back: Qwen's byte-level BPE, plus the tokens this project adds.

A Qwen `tokenizer.json` ends at id 151,668, while the published embedding table has 151,936 rows.
The added tokens stand where the published action models have them::

    0 ....... 151,642   byte-level BPE
    151,643 . 151,668   Qwen's own special tokens: <|endoftext|> (the pad), <|im_start|>, ...
    151,669 . 151,935   <|reserved_i|>: the embedding's unused rows, so that the next ids come right
    151,936 . 153,983   <robot_action_0> .. <robot_action_2047>
    153,984 . 153,987   <|thinking|>, <|start_of_thinking|>, <|end_of_thinking|>, <img_next>

A file that already holds some of these tokens keeps its own ids for them: so a tokenizer saved with
a checkpoint, the debug tokenizer of this package (768 tokens) and one saved by another code base
all load the same way.

Text from outside (instructions, annotations) goes through `encode_text`, which never yields a
special token: an instruction that contains "<|image_pad|>" is thirteen characters, not an image.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
import tokenizers

PAD = "<|endoftext|>"
CHAT_TOKENS = (
    PAD,
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
)
THINKING = "<|thinking|>"
START_OF_THINKING = "<|start_of_thinking|>"
END_OF_THINKING = "<|end_of_thinking|>"
IMG_NEXT = "<img_next>"
THOUGHT_TOKENS = (THINKING, START_OF_THINKING, END_OF_THINKING, IMG_NEXT)

QWEN_PAD_ID = 151_643
QWEN_EMBEDDING_ROWS = 151_936
ACTION_TOKENS = 2048
DEBUG_TOKENIZER = Path(__file__).with_name("debug_tokenizer.json")

_CANDIDATE = re.compile(r"<[^<>\s]+>")
# Qwen's pre-tokenisation always cuts between a printable ASCII character and a space, so what
# stands between such cuts can be encoded and cached by itself.
_WORD_START = re.compile(r"(?<=[!-~])(?= )")
_CACHED_WORDS = 65_536
_CACHED_CHARACTERS = 32  # a stranger's text may be of endless long words: those are not kept


def action_token(index: int) -> str:
    """Name of discrete action token `index`."""
    return f"<robot_action_{index}>"


class Tokenizer:
    """A byte-level BPE with the ids of the special tokens by name. Immutable and picklable.

    Attributes:
      pad_id, im_start_id, im_end_id, vision_start_id, vision_end_id, image_pad_id: the chat's ids.
      thinking_id, start_of_thinking_id, end_of_thinking_id, img_next_id: the thought tokens' ids.
      action_ids: int32[n], ids of `<robot_action_0>` .. `<robot_action_{n-1}>`.
      vocab_size: number of embedding rows that the ids need (largest id + 1).
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Wraps a tokenizer that already has every token of the project.

        Raises:
          ValueError: a token of the project is missing.
        """
        vocabulary = backend.get_vocab(with_added_tokens=True)
        missing = [name for name in (*CHAT_TOKENS, *THOUGHT_TOKENS) if name not in vocabulary]
        if missing:
            raise ValueError(f"tokenizer lacks the tokens {missing}")
        # With this set, the backend reads the names of special tokens as ordinary characters.
        backend.encode_special_tokens = True
        self._backend = backend
        self._encode_word = lru_cache(_CACHED_WORDS)(
            lambda word: backend.encode(word, add_special_tokens=False).ids
        )
        self._special = {
            token.content: index
            for index, token in backend.get_added_tokens_decoder().items()
            if token.special
        }
        self.pad_id = vocabulary[PAD]
        self.im_start_id = vocabulary["<|im_start|>"]
        self.im_end_id = vocabulary["<|im_end|>"]
        self.vision_start_id = vocabulary["<|vision_start|>"]
        self.vision_end_id = vocabulary["<|vision_end|>"]
        self.image_pad_id = vocabulary["<|image_pad|>"]
        self.thinking_id = vocabulary[THINKING]
        self.start_of_thinking_id = vocabulary[START_OF_THINKING]
        self.end_of_thinking_id = vocabulary[END_OF_THINKING]
        self.img_next_id = vocabulary[IMG_NEXT]
        actions: list[int] = []
        while action_token(len(actions)) in vocabulary:
            actions.append(vocabulary[action_token(len(actions))])
        self.action_ids = np.array(actions, np.int32)
        self.action_ids.setflags(write=False)
        if actions and actions != list(range(actions[0], actions[-1] + 1)):
            raise ValueError(f"the {len(actions)} action tokens' ids are not consecutive")
        self.vocab_size = max(vocabulary.values()) + 1

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[tokenizers.Tokenizer]]:
        return Tokenizer, (self._backend,)

    @property
    def action_range(self) -> tuple[int, int]:
        """The first action token's id, and one past the last; (0, 0) without action tokens."""
        ids = self.action_ids
        return (int(ids[0]), int(ids[-1]) + 1) if len(ids) else (0, 0)

    @property
    def thought_seed_id(self) -> int:
        """Token whose embedding the new tokens start from: "<<", as in the reference."""
        return self.encode_text("<<")[0]

    def id(self, name: str) -> int:
        """Id of one token by its name.

        Raises:
          ValueError: no token has that name.
        """
        index = self._backend.token_to_id(name)
        if index is None:
            raise ValueError(f"tokenizer has no token {name!r}")
        return index

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text; names of special tokens in it are ordinary characters."""
        ids: list[int] = []
        for word in _WORD_START.split(text):
            cached = self._encode_word
            ids += cached(word) if len(word) <= _CACHED_CHARACTERS else cached.__wrapped__(word)
        return ids

    def encode(self, text: str) -> list[int]:
        """Ids of trusted text, in which the names of special tokens stand for those tokens."""
        ids: list[int] = []
        start = 0
        for match in _CANDIDATE.finditer(text):
            special = self._special.get(match.group())
            if special is not None:
                ids += self.encode_text(text[start : match.start()])
                ids.append(special)
                start = match.end()
        return ids + self.encode_text(text[start:])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, special tokens by their names: the inverse of `encode`."""
        return self._backend.decode([int(index) for index in ids], skip_special_tokens=False)

    def to_text(self) -> str:
        """A complete `tokenizer.json`; `load_tokenizer` of it gives the same ids."""
        return self._backend.to_str(pretty=False)


def load_tokenizer(path: str | Path | None = None) -> Tokenizer:
    """Reads a `tokenizer.json` and adds the project's tokens where they are missing.

    Args:
      path: a `tokenizer.json`, or the directory that holds it; None is the debug tokenizer.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is neither Qwen's nor one that already holds the project's tokens.
    """
    file = DEBUG_TOKENIZER if path is None else Path(path)
    if file.is_dir():
        file /= "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"no tokenizer at {file}: get tokenizer.json from the model's Hugging Face repository, "
            "such as huggingface.co/Qwen/Qwen3-VL-4B-Instruct (None is the debug tokenizer)"
        )
    backend = tokenizers.Tokenizer.from_file(str(file))
    if backend.token_to_id(action_token(0)) is None:
        _add_action_tokens(backend, file)
    _add(backend, THOUGHT_TOKENS)
    return Tokenizer(backend)


def _add_action_tokens(backend: tokenizers.Tokenizer, file: Path) -> None:
    size = backend.get_vocab_size(with_added_tokens=True)
    pad_id = backend.token_to_id(PAD)
    if pad_id != QWEN_PAD_ID or size > QWEN_EMBEDDING_ROWS:
        raise ValueError(
            f"{file} has {size} tokens and {PAD} at id {pad_id}; expected Qwen's file ({PAD} at "
            f"{QWEN_PAD_ID}, at most {QWEN_EMBEDDING_ROWS} tokens) or one with action tokens"
        )
    _add(backend, [f"<|reserved_{index}|>" for index in range(size, QWEN_EMBEDDING_ROWS)])
    _add(backend, [action_token(index) for index in range(ACTION_TOKENS)])


def _add(backend: tokenizers.Tokenizer, names: Iterable[str]) -> None:
    """Appends the tokens that are missing, each at the next free id."""
    backend.add_special_tokens(
        [tokenizers.AddedToken(name, special=True, normalized=False) for name in names]
    )
