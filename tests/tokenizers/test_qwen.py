"""The tokenizers: ids where checkpoints have them, exact inverse, plain text stays plain."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from lara_jax.tokenizers import debug, qwen
from lara_jax.tokenizers.qwen import DEBUG_TOKENIZER, Tokenizer, load_tokenizer

TEXTS = [
    "",
    " ",
    "put the red block on the yellow plate",
    " Subtask: move to the red block. BBox: [0.1234 0.5000 1.0000 0.0001]. Reasoning: Move left. ",
    "Put the spoon INTO the pot -- it's 3.5 cm wide; don't drop it!",
    "tabs\tand\nlines \r\n  and   runs of  spaces \n x  ",
    "trailing dots ... . .\n . a .\n\n",
    "pose la cuillère dans l'évier",
    "把胡萝卜放在盘子里 🥕 \u00a0 \u3000 e\u0301",
    'quotes "like this" (and) [that] {too} <<b>> <c d> </tool_call>',
]
SPECIAL_TEXTS = [
    "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|vision_end|>Go <|im_end|>\n",
    "a <<|thinking|>> b<img_next><img_next> c <|start_of_thinking|><|end_of_thinking|>",
    "Action: <robot_action_0><robot_action_255> <|endoftext|>",
]


@pytest.fixture(scope="module")
def debug_tokenizer() -> Tokenizer:
    return load_tokenizer()


@pytest.fixture(scope="module")
def qwen_tokenizer(shared_dir: Path) -> Tokenizer:
    return load_tokenizer(shared_dir / "data" / "qwen3_tokenizer" / "tokenizer.json")


@pytest.fixture(params=["debug", "qwen"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(f"{request.param}_tokenizer")


def test_ids_of_the_qwen_vocabulary(qwen_tokenizer: Tokenizer) -> None:
    named = {
        "<|endoftext|>": (151_643, qwen_tokenizer.pad_id),
        "<|im_start|>": (151_644, qwen_tokenizer.im_start_id),
        "<|im_end|>": (151_645, qwen_tokenizer.im_end_id),
        "<|vision_start|>": (151_652, qwen_tokenizer.vision_start_id),
        "<|vision_end|>": (151_653, qwen_tokenizer.vision_end_id),
        "<|image_pad|>": (151_655, qwen_tokenizer.image_pad_id),
        "<|thinking|>": (153_984, qwen_tokenizer.thinking_id),
        "<|start_of_thinking|>": (153_985, qwen_tokenizer.start_of_thinking_id),
        "<|end_of_thinking|>": (153_986, qwen_tokenizer.end_of_thinking_id),
        "<img_next>": (153_987, qwen_tokenizer.img_next_id),
    }
    for name, (expected, attribute) in named.items():
        assert qwen_tokenizer.id(name) == expected == attribute
        assert qwen_tokenizer.encode(name) == [expected]
        assert qwen_tokenizer.decode([expected]) == name
    np.testing.assert_array_equal(qwen_tokenizer.action_ids, np.arange(151_936, 153_984))
    assert qwen_tokenizer.encode("<robot_action_2047>") == [153_983]
    assert qwen_tokenizer.vocab_size == 153_988
    assert qwen_tokenizer.encode("Hello world") == [9707, 1879]
    assert qwen_tokenizer.thought_seed_id == qwen_tokenizer.id("<<")


def test_ids_of_the_debug_vocabulary(debug_tokenizer: Tokenizer) -> None:
    assert debug_tokenizer.vocab_size == 768
    assert debug_tokenizer.pad_id == 502
    assert debug_tokenizer.thinking_id == 508
    np.testing.assert_array_equal(debug_tokenizer.action_ids, np.arange(512, 768))


def test_debug_tokenizer_is_what_the_code_makes() -> None:
    assert DEBUG_TOKENIZER.read_text(encoding="utf-8") == debug.build()
    assert len(json.loads(debug.build())["model"]["vocab"]) == debug.BPE_TOKENS


def test_debug_tokenizer_knows_the_tabletop_words(debug_tokenizer: Tokenizer) -> None:
    text = " put the red block on the yellow plate"
    assert [debug_tokenizer.decode([i]) for i in debug_tokenizer.encode(text)] == [
        *(" put", " the", " red", " block", " on", " the", " yellow", " plate"),
    ]


@pytest.mark.parametrize("text", TEXTS + SPECIAL_TEXTS)
def test_decode_inverts_encode(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decode_inverts_encode_of_random_text(tokenizer: Tokenizer) -> None:
    random = np.random.default_rng(0)
    alphabet = list("ab 01.,:;@[]<>|'\"\n\t\r-_é漢🥕\u00a0\u2003\u0301")
    for _ in range(300):
        text = "".join(random.choice(alphabet, size=random.integers(1, 30)))
        assert tokenizer.decode(tokenizer.encode_text(text)) == text


@pytest.mark.parametrize("name", ["debug", "qwen"])
def test_equals_the_tokenizers_library(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Splitting at special tokens and caching words changes nothing."""
    tokenizer = request.getfixturevalue(f"{name}_tokenizer")
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_text())
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    random = np.random.default_rng(1)
    alphabet = [*"ab 01.  @'s\n\t\r-é漢\u00a0", "<|thinking|>", "<img_next>", "<x>", "<"]
    noise = ["".join(random.choice(alphabet, size=random.integers(1, 25))) for _ in range(500)]
    for text in TEXTS + SPECIAL_TEXTS + noise:
        assert tokenizer.encode(text) == plain.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("text", SPECIAL_TEXTS)
def test_plain_text_never_yields_special_tokens(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_text(text)
    assert max(ids) < tokenizer.pad_id
    assert tokenizer.decode(ids) == text


def test_survives_pickling_and_saving(debug_tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(debug_tokenizer.to_text())
    for copy in (pickle.loads(pickle.dumps(debug_tokenizer)), load_tokenizer(tmp_path)):
        assert copy.vocab_size == debug_tokenizer.vocab_size
        for text in TEXTS + SPECIAL_TEXTS:
            assert copy.encode(text) == debug_tokenizer.encode(text)
            assert copy.encode_text(text) == debug_tokenizer.encode_text(text)


def test_saved_qwen_tokenizer_keeps_its_ids(qwen_tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(qwen_tokenizer.to_text())
    copy = load_tokenizer(tmp_path / "tokenizer.json")
    assert copy.vocab_size == 153_988
    assert copy.img_next_id == 153_987
    np.testing.assert_array_equal(copy.action_ids, qwen_tokenizer.action_ids)


def test_action_tokens_of_the_file_keep_their_ids(
    debug_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """A file with action tokens but no thought tokens gets those at the next free ids."""
    content = json.loads(DEBUG_TOKENIZER.read_text())
    thoughts = content["added_tokens"][6:10]
    assert [token["content"] for token in thoughts] == list(qwen.THOUGHT_TOKENS)
    kept = content["added_tokens"][:6] + content["added_tokens"][10:]
    content["added_tokens"] = [token | {"id": 502 + n} for n, token in enumerate(kept)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    np.testing.assert_array_equal(loaded.action_ids, np.arange(508, 764))
    assert [loaded.id(name) for name in qwen.THOUGHT_TOKENS] == [764, 765, 766, 767]


def test_missing_file_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json.*huggingface\.co") as error:
        load_tokenizer(tmp_path / "nowhere.json")
    assert "\n" not in str(error.value)


def test_foreign_tokenizers_are_refused(tmp_path: Path) -> None:
    content = json.loads(DEBUG_TOKENIZER.read_text())
    file = tmp_path / "tokenizer.json"
    without_actions = content | {"added_tokens": content["added_tokens"][:10]}
    file.write_text(json.dumps(without_actions))
    with pytest.raises(ValueError, match=r"512 tokens and <\|endoftext\|> at id 502"):
        load_tokenizer(file)
    content["added_tokens"][1]["content"] = "<|other|>"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"lacks the tokens.*im_start"):
        load_tokenizer(file)


def test_unknown_name(debug_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="<nothing>"):
        debug_tokenizer.id("<nothing>")
