"""Two ways to ask a policy, on one socket: openpi's, and the one of LaRA-VLA's PyTorch release.

openpi: a flat map with one observation; the reply is a flat map with one chunk.

    {"observation/image": uint8[H, W, 3], "observation/wrist_image": ..., "observation/state":
     float[J], "prompt": str}                          -> {"actions": float32[C, A], timings}

The release (and starVLA, which it is built on): an envelope with any number of observations, each
with a list of images in the order of the policy's views.

    {"type": "infer", "request_id": ..., "payload": PAYLOAD}
                  -> {"status": "ok", "ok": True, "type": "inference_result", "request_id", "data"}
    {"type": "ping"}                      -> {"status": "ok", "ok": True, "type": "ping", ...}

    PAYLOAD                                                                    data
    {"batch_images": [[uint8[H, W, 3]]], "instructions": [str]}                normalized_actions
    {"examples": [{"image": [uint8[H, W, 3]], "lang": str, "state": float[J]}]}           actions

float32[E, C, A] either way; normalised ones are un-normalised by the release's clients themselves.
A map with the payload's keys and no envelope is taken as the payload.

A view is also known by its own name ("observation/<view>"); None stands for an absent camera. Keys
that are not listed here (sampling options of other servers) are not read.

Sources: openpi at 15a9616, LaRA-VLA at 93b5c03, starVLA at 0ed0aad.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lara_jax.serving.codec import Refused
from lara_jax.serving.contract import Contract, Observation
from lara_jax.transforms import Normalizer

OPENPI, REFERENCE = "openpi", "reference"
MAX_OBSERVATIONS = 64
_ENVELOPE = {"type", "payload", "request_id", "batch_images", "examples", "reset"}
_INFER = ("infer", "predict_action")
# LaRA-VLA's clients write the latent slots into the instruction; here the policy does.
_SLOTS = ". @ <|start_of_thinking|>"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the policy made of a request.

    Attributes:
      chunks: float32[E, C, A], physical units.
      policy_seconds: in the policy.
      seconds: in all, since the request came.
      previous_seconds: of the connection's request before, sending included; 0 for the first.
    """

    chunks: np.ndarray
    policy_seconds: float
    seconds: float
    previous_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class OpenpiRequest:
    """One observation, asked for as openpi's clients do."""

    observations: tuple[Observation]

    def reply(self, answer: Answer) -> dict[str, Any]:
        """The message that answers it."""
        timing = {"infer_ms": answer.seconds * 1e3}
        if answer.previous_seconds:
            timing["prev_total_ms"] = answer.previous_seconds * 1e3
        return {
            "actions": answer.chunks[0],
            "policy_timing": {"infer_ms": answer.policy_seconds * 1e3},
            "server_timing": timing,
        }


@dataclass(frozen=True, kw_only=True)
class ReferenceRequest:
    """Observations in the release's envelope; none where it only wants a sign of life.

    Attributes:
      kind: "inference_result", "ping" or "reset".
      request_id: goes back with the reply.
      action: scales the reply's actions; None leaves them in physical units.
    """

    observations: tuple[Observation, ...] = ()
    kind: str = "inference_result"
    request_id: str | int = "default"
    action: Normalizer | None = None

    def reply(self, answer: Answer) -> dict[str, Any]:
        """The message that answers it."""
        head = {"status": "ok", "ok": True, "type": self.kind, "request_id": self.request_id}
        if not self.observations:
            return head
        data: dict[str, Any] = {"thinking_gen_time": 0.0, "total_infer_time": answer.seconds}
        if self.action is None:
            data["actions"] = answer.chunks
        else:
            data["normalized_actions"] = self.action.normalize(answer.chunks)
        return {**head, "data": data}


Request = OpenpiRequest | ReferenceRequest


def protocol(message: Any) -> str:
    """Which of the two a message speaks."""
    known = isinstance(message, dict) and not _ENVELOPE.isdisjoint(message)
    return REFERENCE if known else OPENPI


def request_id(message: Any) -> str | int:
    """The identity that a reply in the release's protocol carries, also of a refused message."""
    given = message.get("request_id", "default")
    return given if isinstance(given, (str, int)) else "default"


def error_reply(message: Any, text: str) -> dict[str, Any]:
    """The release's answer to a message that was refused."""
    kind = message.get("type", "infer")
    known = isinstance(kind, str) and kind in _INFER
    return {
        "status": "error",
        "ok": False,
        "type": "inference_result" if known else "unknown",
        "request_id": request_id(message),
        "error": {"message": text},
    }


def parse(message: Any, contract: Contract) -> Request:
    """The request that a message makes.

    Args:
      message: as `codec.unpack` gives it.
      contract: what the policy takes.

    Raises:
      Refused: it makes none.
    """
    if not isinstance(message, dict):
        raise Refused(f"a request must be a map, got a {type(message).__name__}")
    parser = _reference if protocol(message) == REFERENCE else _openpi
    return parser(message, contract)


def _openpi(message: Mapping[Any, Any], contract: Contract) -> OpenpiRequest:
    usual = {"observation/image": contract.views[0], "observation/wrist_image": "wrist"}
    frames = {view: message[key] for key, view in usual.items() if key in message}
    for view in contract.views:
        if f"observation/{view}" in message:
            frames[view] = message[f"observation/{view}"]
    state, prompt = message.get("observation/state"), message.get("prompt")
    return OpenpiRequest(observations=(contract.checked(frames, state, prompt),))


def _reference(message: Mapping[Any, Any], contract: Contract) -> ReferenceRequest:
    identity, kind = request_id(message), _text(message, "type", "infer")
    payload = message.get("payload", message)
    if kind == "ping":
        return ReferenceRequest(kind="ping", request_id=identity)
    if kind not in _INFER:
        raise Refused(f"unsupported message type {kind[:40]!r}; allowed: infer, ping")
    if not isinstance(payload, dict):
        raise Refused("the payload must be a map")
    if "reset" in payload:  # there is nothing to forget: every request stands for itself
        return ReferenceRequest(kind="reset", request_id=identity)
    if (mode := _text(payload, "cot_mode", "implicit")) != "implicit":
        raise Refused(f"cot_mode is {mode[:40]!r}; this policy knows 'implicit'")
    if "examples" in payload:
        if (key := _text(payload, "unnorm_key", contract.dataset)) != contract.dataset:
            raise Refused(f"unnorm_key is {key[:40]!r}; this policy knows {contract.dataset!r}")
        rows = [_example(example) for example in _rows(payload["examples"], "examples")]
    else:
        rows = _batch(payload)
    observations = tuple(
        contract.checked(_views(images, contract), state, _words(text))
        for images, state, text in rows
    )
    return ReferenceRequest(
        observations=observations,
        request_id=identity,
        action=None if "examples" in payload else contract.action,
    )


Row = tuple[Any, Any, Any]  # images, state, words


def _example(example: Any) -> Row:
    if not isinstance(example, dict):
        raise Refused("each of examples must be a map")
    state = example.get("state")
    if isinstance(state, np.ndarray) and state.ndim == 2 and len(state) == 1:
        state = state[0]
    return example.get("image"), state, example.get("lang")


def _batch(payload: Mapping[Any, Any]) -> list[Row]:
    images = _rows(payload.get("batch_images"), "batch_images")
    texts = _rows(payload.get("instructions"), "instructions")
    states = payload.get("states", [None] * len(images))
    if isinstance(states, np.ndarray) and states.ndim == 2:
        states = list(states)
    if not isinstance(states, list) or not len(images) == len(texts) == len(states):
        raise Refused("batch_images, instructions and states must be lists of the same length")
    return list(zip(images, states, texts, strict=True))


def _rows(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_OBSERVATIONS:
        raise Refused(f"{name} must be a list of 1 to {MAX_OBSERVATIONS} entries")
    return value


def _views(images: Any, contract: Contract) -> dict[str, Any]:
    """Frames by view, of a list in the policy's order."""
    if not isinstance(images, list) or len(images) != len(contract.views):
        raise Refused(
            f"an observation needs a list of {len(contract.views)} images, in the order "
            f"{list(contract.views)}"
        )
    return dict(zip(contract.views, images, strict=True))


def _words(text: Any) -> Any:
    return text.partition(_SLOTS)[0] if isinstance(text, str) else text


def _text(values: Mapping[Any, Any], key: str, default: str) -> str:
    """A word of a client's; `default` where it is None or not there."""
    value = values.get(key)
    if value is not None and not isinstance(value, str):
        raise Refused(f"{key} must be text, got a {type(value).__name__}")
    return default if value is None else value
