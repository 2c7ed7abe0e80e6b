"""FAST: the paper's definition written out, exact way back, the published layout, refusals."""

import itertools
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from lara_jax.tokenizers.fast import FastTokenizer, from_vocabulary, to_vocabulary
from lara_jax.tokenizers.qwen import load_tokenizer

HORIZON, DIM = 16, 7


def make_chunks(seed: int, count: int, horizon: int = HORIZON) -> np.ndarray:
    """Smooth motions in [-1, 1] with a binary gripper: float32[count, horizon, 7]."""
    random = np.random.default_rng(seed)
    chunks = np.clip(np.cumsum(random.normal(0, 0.1, (count, horizon, DIM)), axis=1), -1, 1)
    chunks[..., 6] = chunks[..., 6] > 0
    return chunks.astype(np.float32)


@pytest.fixture(scope="module")
def fast() -> FastTokenizer:
    return FastTokenizer.fit(list(make_chunks(0, 300)), vocab_size=256)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder as the published one is: byte-level BPE, no shape in the numbers."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = byte_level(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    texts = [spell(definition(chunk, 10), -354) for chunk in make_chunks(1, 100)]
    backend.train_from_iterator(texts, trainer)
    folder = tmp_path / "fast"
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    numbers = {"action_dim": None, "min_token": -354, "scale": 10, "time_horizon": None}
    (folder / "processor_config.json").write_text(json.dumps({**numbers, "vocab_size": 2048}))
    return folder


def cosines(length: int) -> np.ndarray:
    """The orthonormal DCT-II from its definition: float64[frequency, time]."""
    rows = []
    for k in range(length):
        weight = math.sqrt((1 if k == 0 else 2) / length)
        rows.append(
            [weight * math.cos(math.pi * (t + 0.5) * k / length) for t in range(length)],
        )
    return np.array(rows)


def definition(chunk: np.ndarray, scale: float) -> np.ndarray:
    """Rounded coefficients, straight from the paper."""
    return np.rint(scale * cosines(len(chunk)) @ chunk.astype(np.float64)).astype(int)


def spell(coefficients: np.ndarray, min_token: int) -> str:
    return "".join(chr(number - min_token) for row in coefficients for number in row)


def merge(text: str, backend: tokenizers.Tokenizer) -> list[int]:
    """BPE by hand: the earliest learned pair that occurs is joined, until none does."""
    model = json.loads(backend.to_str())["model"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
    pieces = list(text)
    while True:
        pairs = set(itertools.pairwise(pieces)) & set(ranks)
        if not pairs:
            return [model["vocab"][piece] for piece in pieces]
        first = min(pairs, key=ranks.__getitem__)
        joined: list[str] = []
        for piece in pieces:
            if joined and (joined[-1], piece) == first:
                joined[-1] += piece
            else:
                joined.append(piece)
        pieces = joined


def continuous(seed: int, horizon: int = HORIZON) -> np.ndarray:
    """A chunk none of whose coefficients lies between two integers exactly."""
    return np.random.default_rng(seed).uniform(-1, 1, (horizon, DIM)).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
def test_encode_is_the_definition(fast: FastTokenizer, seed: int) -> None:
    chunk = continuous(seed)
    assert fast.encode(chunk) == merge(spell(definition(chunk, 10), fast.min_token), fast.backend)


def test_the_drawing_holds() -> None:
    chunk = np.array([[0.0, 1.0], [0.5, 1.0]], np.float32)
    tokenizer = FastTokenizer.fit([chunk], vocab_size=64)
    assert tokenizer.min_token == -14
    text = tokenizer.backend.decode(tokenizer.encode(chunk))
    assert [ord(character) for character in text] == [18, 28, 10, 14]


@pytest.mark.parametrize("horizon", [1, 8, 16, 50])
@pytest.mark.parametrize("scale", [10, 37.5])
def test_decode_inverts_up_to_rounding(horizon: int, scale: float) -> None:
    chunks = make_chunks(2, 60, horizon)
    tokenizer = FastTokenizer.fit(list(chunks), scale=scale, vocab_size=1024)
    assert (tokenizer.action_horizon, tokenizer.action_dim) == (horizon, DIM)
    chunk = continuous(3, horizon)
    ids = tokenizer.encode(chunk)
    back = tokenizer.decode(ids)
    assert back.dtype == np.float32
    exact = cosines(horizon).T @ definition(chunk, scale) / scale
    np.testing.assert_allclose(back, exact, rtol=0, atol=1e-6)
    # Half a unit of each coefficient, and the transform keeps lengths.
    assert np.linalg.norm(back - chunk) <= 0.5 / scale * math.sqrt(horizon * DIM) + 1e-5


def test_ids_survive_the_way_back(fast: FastTokenizer) -> None:
    ids = fast.encode_batch(make_chunks(4, 200))
    assert fast.encode_batch(np.stack([fast.decode(found) for found in ids])) == ids


def test_a_batch_is_its_rows(fast: FastTokenizer) -> None:
    chunks = make_chunks(5, 20)
    assert fast.encode_batch(chunks) == [fast.encode(chunk) for chunk in chunks]


def test_smooth_motion_is_short(fast: FastTokenizer) -> None:
    lengths = [len(ids) for ids in fast.encode_batch(make_chunks(6, 100))]
    assert np.mean(lengths) < HORIZON * DIM / 2
    assert len(fast.encode(np.zeros((HORIZON, DIM), np.float32))) < 20


@pytest.mark.parametrize("value", [-1.0, 1.0])
def test_any_normalised_chunk_can_be_written(value: float) -> None:
    tokenizer = FastTokenizer.fit([np.zeros((HORIZON, DIM), np.float32)])
    for chunk in (np.full((HORIZON, DIM), value, np.float32), value * continuous(7)):
        np.testing.assert_allclose(tokenizer.decode(tokenizer.encode(chunk)), chunk, atol=0.25)


def test_fit_repeats(fast: FastTokenizer) -> None:
    again = FastTokenizer.fit(list(make_chunks(0, 300)), vocab_size=256)
    assert again.backend.to_str() == fast.backend.to_str()
    assert fast.backend.get_vocab_size() == 256


def test_chunks_of_different_lengths_leave_the_shape_open() -> None:
    tokenizer = FastTokenizer.fit([continuous(8, 4), continuous(9, 6)], vocab_size=256)
    ids = tokenizer.encode(continuous(10, 6))
    assert tokenizer.decode(ids, 6, DIM).shape == (6, DIM)
    with pytest.raises(ValueError, match="needs horizon and action_dim"):
        tokenizer.decode(ids)


def write(fast: FastTokenizer, folder: Path) -> None:
    for name, text in fast.to_files().items():
        (folder / name).write_text(text)


def test_save_and_load(fast: FastTokenizer, tmp_path: Path) -> None:
    write(fast, tmp_path)
    loaded = FastTokenizer.load(tmp_path)
    assert loaded.backend.to_str() == fast.backend.to_str()
    for name in ("scale", "min_token", "vocab_size", "action_horizon", "action_dim"):
        assert getattr(loaded, name) == getattr(fast, name)
    chunks = make_chunks(11, 10)
    assert loaded.encode_batch(chunks) == fast.encode_batch(chunks)
    assert pickle.loads(pickle.dumps(fast)).encode_batch(chunks) == fast.encode_batch(chunks)


def test_the_published_layout(published: Path) -> None:
    tokenizer = FastTokenizer.load(published)
    backend = tokenizers.Tokenizer.from_file(str(published / "tokenizer.json"))
    for seed in range(10):
        chunk = continuous(seed)
        ids = tokenizer.encode(chunk)
        assert ids == backend.encode(spell(definition(chunk, 10), -354)).ids
        exact = cosines(HORIZON).T @ definition(chunk, 10) / 10
        np.testing.assert_allclose(tokenizer.decode(ids, HORIZON, DIM), exact, atol=1e-6)
    (published / "bpe_tokenizer").mkdir()
    (published / "tokenizer.json").rename(published / "bpe_tokenizer" / "tokenizer.json")
    assert FastTokenizer.load(published).encode(chunk) == ids


@pytest.mark.torch
def test_transformers_reads_what_we_save(fast: FastTokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write(fast, tmp_path)
    other = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for chunk in make_chunks(12, 5):
        ids = fast.encode(chunk)
        text = spell(fast_coefficients(fast, ids), fast.min_token)
        assert other(text)["input_ids"] == ids
        assert other.decode(ids) == text


def fast_coefficients(fast: FastTokenizer, ids: list[int]) -> np.ndarray:
    return np.rint(cosines(HORIZON) @ fast.decode(ids) * fast.scale).astype(int)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: ids[:-1], "spell .* coefficients; a chunk of 16 steps x 7 dimensions has 112"),
        (lambda ids: [*ids, ids[0]], "coefficients"),
        (lambda ids: [], "spell 0 coefficients"),
        (lambda ids: [*ids[:-1], 256], r"no tokens have the ids \[256\]"),
        (lambda ids: [-1, *ids], r"no tokens have the ids \[-1\]"),
    ],
)
def test_malformed_ids_are_refused(fast: FastTokenizer, change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fast.decode(change(fast.encode(continuous(13))))


def test_half_a_character_is_refused(published: Path) -> None:
    tokenizer = FastTokenizer.load(published)
    start = tokenizer.backend.token_to_id("Å")  # the first of two bytes
    with pytest.raises(ValueError, match="break a character"):
        tokenizer.decode([start] * HORIZON * DIM, HORIZON, DIM)


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (np.full((HORIZON, DIM), -3, np.float32), "coefficients -120..0: .* starts at -40"),
        (np.full((HORIZON, DIM), 3, np.float32), "coefficients 0..120"),
        (np.full((HORIZON, DIM), 1e6, np.float32), "normalised?"),
        (np.full((HORIZON, DIM), np.nan, np.float32), "not finite"),
        (np.zeros(DIM, np.float32), r"float32\[C, A\]; got shape \(7,\)"),
        (np.zeros((0, DIM), np.float32), "got shape"),
    ],
)
def test_unwritable_chunks_are_refused(
    fast: FastTokenizer, chunk: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fast.encode(chunk)


def test_whatever_is_within_reach_can_be_written() -> None:
    fitted_to = [np.zeros((HORIZON, DIM), np.float32)]
    extreme = np.full((HORIZON, DIM), -3, np.float32)
    extreme[::2, 1] = 3
    with pytest.raises(ValueError, match="cannot write them all"):
        FastTokenizer.fit(fitted_to).encode(extreme)
    wide = FastTokenizer.fit(fitted_to, reach=3)
    np.testing.assert_allclose(wide.decode(wide.encode(extreme)), extreme, atol=0.2)
    with pytest.raises(ValueError, match=r"take 8001 characters.* \(normalised with q99"):
        FastTokenizer.fit([np.zeros((16, 7))], reach=100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunks": []}, "no chunks"),
        ({"chunks": [continuous(0)], "vocab_size": 50}, "take 81 characters; vocab_size is 50"),
        ({"chunks": [continuous(0)], "scale": 0}, "scale is 0"),
        ({"chunks": [np.full((4, 2), np.inf, np.float32)]}, "not finite"),
    ],
)
def test_fit_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FastTokenizer.fit(**arguments)


def test_incomplete_folders_are_refused(published: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no processor_config\.json"):
        FastTokenizer.load(tmp_path)
    config = published / "processor_config.json"
    config.write_text(json.dumps({"scale": 10, "vocab_size": 300, "min_token": -354}))
    with pytest.raises(ValueError, match="more than vocab_size 300"):
        FastTokenizer.load(published)
    config.write_text(json.dumps({"scale": 10}))
    with pytest.raises(ValueError, match=r"lacks \['vocab_size', 'min_token'\]"):
        FastTokenizer.load(published)
    (published / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        FastTokenizer.load(published)


def test_vocabulary_ids_as_in_the_reference(shared_dir: Path) -> None:
    path = shared_dir / "data" / "qwen3_tokenizer" / "tokenizer.json"
    action_ids = load_tokenizer(path).action_ids
    ids = [0, 7, 2047]
    found = to_vocabulary(ids, action_ids)
    assert found.dtype == np.int32
    assert found.tolist() == [151_936, 151_943, 153_983]
    assert from_vocabulary(found, action_ids) == ids


def test_vocabulary_ids_both_ways() -> None:
    tokenizer = load_tokenizer()
    ids = list(range(len(tokenizer.action_ids)))
    found = to_vocabulary(ids, tokenizer.action_ids)
    assert tokenizer.decode(found[7:8]) == "<robot_action_7>"
    assert from_vocabulary(found, tokenizer.action_ids) == ids
    assert to_vocabulary([], tokenizer.action_ids).shape == (0,)
    with pytest.raises(ValueError, match=r"FAST ids 3..256; .* action tokens 0..255"):
        to_vocabulary([3, 256], tokenizer.action_ids)
    with pytest.raises(ValueError, match=r"\[0\] are no action tokens"):
        from_vocabulary([512, 0], tokenizer.action_ids)
