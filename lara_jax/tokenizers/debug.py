"""Builds the debug tokenizer: a tiny byte-level BPE for tests and for the tabletop tasks.

    python -m lara_jax.tokenizers.debug    # rewrites debug_tokenizer.json, byte for byte the same

It has the structure of Qwen's (same pre-tokenisation, bytes as base alphabet, special tokens after
the BPE), so that any text encodes without unknowns, and only 768 tokens::

    0 .. 255     bytes                    502 .. 507   chat tokens
    256 .. 501   merges                   508 .. 511   thought tokens
                                          512 .. 767   <robot_action_0> .. <robot_action_255>

The merges are learned here, on the sentence templates below, by the textbook algorithm with ties
broken by spelling: the result depends on this file alone.
"""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any

from tokenizers import Regex, pre_tokenizers

from lara_jax.tokenizers.prompt import BASE_PROMPT
from lara_jax.tokenizers.qwen import CHAT_TOKENS, DEBUG_TOKENIZER, THOUGHT_TOKENS, action_token

BPE_TOKENS = 502
DEBUG_ACTION_TOKENS = 256

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
OBJECTS = ("block", "plate")
DIRECTIONS = ("forward", "backward", "left", "right", "up", "down")
HOUSEHOLD = (
    *("apple", "basket", "bowl", "can", "carrot", "cloth", "cup", "drawer", "eggplant", "fork"),
    *("knife", "lid", "mug", "pan", "pot", "sink", "spoon", "stove", "table", "towel", "toy"),
)

# Qwen's pre-tokenisation: contractions, words with one leading character, single digits,
# punctuation, white space.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def corpus() -> Iterator[str]:
    """The sentences that the merges are learned on."""
    for first, second in product(COLOURS, COLOURS):
        yield f" put the {first} block on the {second} plate. @"
        yield f" stack the {first} block on the {second} block. @"
    for colour, thing in product(COLOURS, OBJECTS):
        for verb in ("move to", "lower to", "grasp", "lift", "lower onto", "release"):
            yield f" Subtask: {verb} the {colour} {thing}."
    for thing in HOUSEHOLD:
        yield f" pick up the {thing} and place it in the top left corner."
        yield f" take the {thing} from the bottom right side, open and close it."
        yield f" turn, push or pull the {thing}."
    for first, second in product(DIRECTIONS, DIRECTIONS):
        yield f" Reasoning: Move {first} and {second}, then {first}."
        yield f" Reasoning: Move {first}, then rotate {second} and close the gripper."
        yield f" Reasoning: Stay in place and open the gripper. Move {first}."
    for digit in range(10):
        yield f" BBox: [0.{digit}000 0.{digit}000 1.{digit}000 0.{digit}000] [0.{digit}000]."
        yield f" Action: {BASE_PROMPT}"
    yield "user\n"


def build() -> str:
    """The text of `debug_tokenizer.json`."""
    merges = _learn_merges(_words(), BPE_TOKENS - 256)
    pieces = [*_byte_alphabet(), *("".join(pair) for pair in merges)]
    names = [*CHAT_TOKENS, *THOUGHT_TOKENS, *map(action_token, range(DEBUG_ACTION_TOKENS))]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": BPE_TOKENS + index,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for index, name in enumerate(names)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, byte_level | {"use_regex": False}],
        },
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "merges": [list(pair) for pair in merges],
        },
    }
    lines = (
        f"{json.dumps(key)}:{json.dumps(value, separators=(',', ':'))}"
        for key, value in content.items()
    )
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _byte_alphabet() -> list[str]:
    """GPT-2's stand-in character for each byte: printable ones stand for themselves."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = (byte for byte in range(256) if byte not in printable)
    stand_in = {byte: chr(256 + rank) for rank, byte in enumerate(shifted)}
    return [stand_in.get(byte, chr(byte)) for byte in range(256)]


def _words() -> Counter[tuple[str, ...]]:
    """How often each pre-token occurs in the corpus, as a tuple of byte characters."""
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return Counter(
        tuple(word) for sentence in corpus() for word, _ in splitter.pre_tokenize_str(sentence)
    )


def _learn_merges(words: Counter[tuple[str, ...]], count: int) -> list[tuple[str, str]]:
    """The `count` most frequent pairs, one after another; ties go to the pair that sorts first."""
    merges = []
    for _ in range(count):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, frequency in words.items():
            for pair in pairwise(word):
                pairs[pair] += frequency
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = Counter({_merge(word, best): frequency for word, frequency in words.items()})
    return merges


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for piece in word:
        # A piece that was just merged cannot be the left half again: it is longer than pair[0].
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return tuple(merged)


if __name__ == "__main__":
    DEBUG_TOKENIZER.write_text(build(), encoding="utf-8")
