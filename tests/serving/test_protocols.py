"""Requests in the words of openpi's clients and of the release's, and what each is answered."""

import dataclasses

import numpy as np
import pytest

from lara_jax.serving.codec import Refused, pack, unpack
from lara_jax.serving.protocols import (
    OPENPI,
    REFERENCE,
    Answer,
    error_reply,
    parse,
    protocol,
)
from lara_jax.tokenizers.qwen import load_tokenizer
from tests.serving.fakes import STATE, contract, frame, openpi_request, reference_request

ANSWER = Answer(
    chunks=np.tile(np.float32([[0.5, -2, 2, 0, 1, -1, 1]]), (2, 4, 1)),
    policy_seconds=0.01,
    seconds=0.02,
)


def release_request(**changes) -> dict:
    """As LaRA-VLA's LIBERO client writes it: no state, thought slots in the instruction."""
    payload = {
        "batch_images": [[frame(), frame(0)]],
        "instructions": ["go. @ <|start_of_thinking|><|thinking|><|end_of_thinking|> <img_next>"],
        "unnorm_key": None,
        "do_sample": False,
        "use_ddim": True,
        "num_ddim_steps": 10,
        "use_iterative_forward": True,
        "cot_mode": "implicit",
        "emit_thinking_tokens": False,
    }
    return {"payload": payload | changes, "type": "infer"}


def test_openpi_request_and_reply():
    request = parse(unpack(pack(openpi_request(state=0.5))), contract())
    (seen,) = request.observations
    assert set(seen) == {"primary", "wrist", "state", "instruction"}
    np.testing.assert_array_equal(seen["primary"], frame())
    np.testing.assert_array_equal(seen["wrist"], frame(0))
    np.testing.assert_array_equal(seen["state"], np.float32([0.5] * STATE))
    assert seen["state"].dtype == np.float32 and seen["instruction"] == "go"
    reply = request.reply(ANSWER)
    assert set(reply) == {"actions", "policy_timing", "server_timing"}
    np.testing.assert_array_equal(reply["actions"], ANSWER.chunks[0])
    assert reply["server_timing"] == {"infer_ms": 20.0}
    later = request.reply(dataclasses.replace(ANSWER, previous_seconds=0.03))
    assert later["server_timing"] == {"infer_ms": 20.0, "prev_total_ms": 30.0}


def test_views_by_their_own_names_and_absent_ones():
    message = openpi_request()
    message["observation/wrist"] = None
    del message["observation/wrist_image"]
    (seen,) = parse(message, contract()).observations
    assert seen["wrist"] is None
    several = contract(views=("primary@-2", "cam.left"))
    message = {"observation/primary@-2": frame(1), "observation/cam.left": frame(2)}
    message |= {"observation/state": np.zeros(STATE), "prompt": ""}
    (seen,) = parse(message, several).observations
    assert seen["primary@-2"][0, 0, 0] == 1 and seen["cam.left"][0, 0, 0] == 2


def test_the_release_gets_normalised_actions():
    served = contract(missing_state="mean")
    request = parse(unpack(pack(release_request())), served)
    (seen,) = request.observations
    assert seen["instruction"] == "go"  # the policy writes its slots itself
    np.testing.assert_array_equal(seen["state"], np.float32([0.25] * STATE))  # the data's mean
    np.testing.assert_array_equal(seen["wrist"], frame(0))
    reply = request.reply(ANSWER)
    assert {k: reply[k] for k in ("status", "ok", "type", "request_id")} == {
        "status": "ok",
        "ok": True,
        "type": "inference_result",
        "request_id": "default",
    }
    assert set(reply["data"]) == {"normalized_actions", "thinking_gen_time", "total_infer_time"}
    expected = np.float32([0.25, -1, 1, 0, 0.5, -0.5, 1])  # [-2, 2] -> [-1, 1]; gripper as it is
    np.testing.assert_allclose(reply["data"]["normalized_actions"][1, 3], expected, atol=1e-6)
    with pytest.raises(Refused, match="no state"):
        parse(release_request(), contract())
    with_state = release_request(states=np.full((1, STATE), 0.75))
    assert parse(with_state, contract()).observations[0]["state"][0] == 0.75


def test_starvla_gets_physical_actions_of_many_examples():
    request = parse(unpack(pack(reference_request([0.1, 0.2]))), contract())
    assert [seen["state"][0] for seen in request.observations] == [np.float32(0.1), np.float32(0.2)]
    reply = request.reply(ANSWER)
    assert reply["request_id"] == "r1"
    np.testing.assert_array_equal(reply["data"]["actions"], ANSWER.chunks)
    flat = reference_request()["payload"]
    flat["examples"][0]["state"] = [0.1, 0.2, 3]
    (seen,) = parse(flat, contract()).observations
    np.testing.assert_array_equal(seen["state"], np.float32([0.1, 0.2, 3]))
    flat["examples"][0]["state"] = np.full((1, STATE), 0.3)
    assert parse(flat, contract()).observations[0]["state"].shape == (STATE,)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ({"type": "ping"}, "ping"),
        ({"device": "cuda", "type": "ping"}, "ping"),  # the release's init_device()
        ({"instruction": "go", "reset": True}, "reset"),  # its reset()
    ],
)
def test_signs_of_life_need_no_policy(message, kind):
    request = parse(message, contract())
    assert request.observations == ()
    reply = request.reply(dataclasses.replace(ANSWER, chunks=ANSWER.chunks[:0]))
    assert reply == {"status": "ok", "ok": True, "type": kind, "request_id": "default"}


def test_which_protocol_a_message_speaks():
    assert protocol(openpi_request()) == OPENPI and protocol([]) == protocol(None) == OPENPI
    for message in (reference_request(), release_request()["payload"], {"type": "ping"}):
        assert protocol(message) == REFERENCE
    assert error_reply({"type": "infer", "request_id": 7}, "no") == {
        "status": "error",
        "ok": False,
        "type": "inference_result",
        "request_id": 7,
        "error": {"message": "no"},
    }
    assert error_reply({"type": np.zeros(2), "request_id": []}, "")["type"] == "unknown"


def without(key: str) -> dict:
    message = openpi_request()
    del message[key]
    return message


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (None, "must be a map, got a NoneType"),
        ([openpi_request()], "must be a map, got a list"),
        (without("observation/image"), r"lacks the views \['primary'\]"),
        (without("observation/state"), "no state; this policy reads 3 numbers"),
        (without("prompt"), "instruction must be text"),
        (openpi_request() | {"prompt": b"go"}, "instruction must be text"),
        (openpi_request() | {"prompt": "x" * 1001}, "at most 1000 characters"),
        (openpi_request() | {"observation/image": "x"}, r"must be an array uint8\[H, W, 3\]"),
        (openpi_request() | {"observation/image": np.zeros((4, 6, 3))}, "got float64"),
        (openpi_request() | {"observation/image": frame()[..., :2]}, r"got uint8\[4, 6, 2\]"),
        (openpi_request() | {"observation/image": frame()[:3]}, r"is \(3, 6\) px.* reads \(4, 6\)"),
        (
            openpi_request() | {"observation/image": None, "observation/wrist_image": None},
            "no frame in any",
        ),
        (openpi_request() | {"observation/state": np.zeros(4)}, "array of 3 numbers"),
        (openpi_request() | {"observation/state": np.zeros((1, 3))}, "array of 3 numbers"),
        (openpi_request() | {"observation/state": [0, 0, True]}, "array of 3 numbers"),
        (openpi_request() | {"observation/state": np.array([0, 0, np.nan])}, "not finite"),
        (openpi_request() | {"observation/state": np.array([0, -np.inf, 0])}, "not finite"),
        (openpi_request() | {"observation/state": np.array([0, 0, 1e300])}, "beyond"),
        (openpi_request() | {"observation/state": np.array([0, 0, 2**62])}, "beyond"),
        ({"type": "init"}, "unsupported message type 'init'"),
        ({"type": np.zeros(2)}, "type must be text, got a ndarray"),
        ({"payload": 3}, "payload must be a map"),
        ({"payload": {}}, "batch_images must be a list of 1 to 64"),
        (release_request(batch_images=[]), "list of 1 to 64"),
        (release_request(batch_images=[[frame()]]), "list of 2 images"),
        (release_request(batch_images=[frame()]), "list of 2 images"),
        (release_request(instructions=["a", "b"]), "of the same length"),
        (release_request(instructions="go"), "instructions must be a list"),
        (release_request(states=3), "of the same length"),
        (release_request(states=np.float32(3)), "of the same length"),
        (release_request(cot_mode="explicit"), "cot_mode is 'explicit'"),
        (release_request(cot_mode=np.zeros(2)), "cot_mode must be text"),
        (reference_request([0.0] * 65), "list of 1 to 64"),
        ({"examples": [3]}, "each of examples must be a map"),
        ({"examples": [{}], "unnorm_key": "franka"}, "unnorm_key is 'franka'.* knows 'toy'"),
        ({"examples": [{}], "unnorm_key": np.zeros(2)}, "unnorm_key must be text"),
    ],
)
def test_refuses(message, told):
    with pytest.raises(Refused, match=told):
        parse(message, contract())


def test_other_sizes_where_the_policy_resizes():
    served = contract(any_image_size=True)
    message = openpi_request() | {"observation/image": np.zeros((480, 640, 3), np.uint8)}
    assert parse(message, served).observations[0]["primary"].shape == (480, 640, 3)
    for shape in ((0, 6, 3), (4097, 1, 3)):
        with pytest.raises(Refused, match=r"allowed 1\.\.4096"):
            parse(message | {"observation/image": np.zeros(shape, np.uint8)}, served)


def test_metadata_says_what_clients_check():
    told = contract().metadata()
    assert unpack(pack(told)) == told
    wanted = {
        "action_chunk_size": 4,
        "action_dim": 7,
        "state_dim": 3,
        "views": ["primary", "wrist"],
    }
    wanted |= {"available_unnorm_keys": ["toy"], "default_unnorm_key": "toy", "image_px": [4, 6]}
    assert {key: told[key] for key in wanted} == wanted
    with pytest.raises(ValueError, match="missing_state is 'zero'; allowed: refuse, mean"):
        contract(missing_state="zero")
    with pytest.raises(ValueError, match="image_px"):
        contract(image_px=(0, 4))


def test_long_words_of_strangers_are_not_kept_in_memory():
    tokenizer = load_tokenizer()
    words = [f"{number}" * 40 for number in range(100, 200)]
    for word in words:
        assert tokenizer.decode(tokenizer.encode_text(f"put {word} there")) == f"put {word} there"
    assert tokenizer._encode_word.cache_info().currsize == 2  # "put" and " there"
