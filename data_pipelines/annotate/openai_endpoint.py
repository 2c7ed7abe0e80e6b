"""A vision-language model behind an OpenAI-compatible endpoint writes subtasks or finds boxes.

    POST URL/chat/completions  {"model": ..., "messages": [text, image, image, ...]}
    answer: a JSON object in words, as {"subtasks": ["move to the red block", ...]}

Images travel as data URIs. Answers are checked; one that is not what was asked for is asked for
again, as is whatever may pass: no connection, time over, "too many requests", the server's own
errors. What stays an error is raised and ends the run: nothing is made up, and a run goes on where
it stopped.

The API key comes from the environment (`OPENAI_API_KEY`) and goes to that URL alone: redirects are
not followed.
"""

import base64
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
import simplejpeg

from data_pipelines.annotate.anchors import Segment
from data_pipelines.annotate.schema import checked_box
from data_pipelines.annotate.view import EpisodeView
from lara_jax.tokenizers.prompt import Box

API_KEY = "OPENAI_API_KEY"
PROMPT_VERSION = 1
LONGEST_SUBTASK = 200
TIMEOUT_SECONDS = 120.0  # for one answer
ATTEMPTS = 5
FIRST_WAIT_SECONDS = 1.0  # before the second attempt; doubled before each further one
_LONGEST_WAIT_SECONDS = 60.0

Answer = TypeVar("Answer")


class EndpointError(RuntimeError):
    """The endpoint gave no usable answer."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where the model is.

    Attributes:
      url: as "http://127.0.0.1:8000/v1".
      model: the name under which the server knows it.
    """

    url: str
    model: str

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"endpoint {self.url!r}; expected a URL as http://127.0.0.1:8000/v1")
        if not self.model:
            raise ValueError(f"endpoint {self.url}: no model named; expected openai:URL,MODEL")

    @property
    def name(self) -> str:
        """Says which model answers; without user name and password."""
        parts = urlsplit(self.url)
        return f"openai {parts.hostname}:{parts.port or ''}{parts.path} {self.model}"

    def ask(
        self,
        text: str,
        images: Sequence[np.ndarray],
        check: Callable[[dict[str, Any]], Answer],
    ) -> Answer:
        """Asks until the answer is what was asked for.

        Args:
          text: the question; it should ask for a JSON object.
          images: uint8[H, W, 3], RGB.
          check: takes the JSON object, returns what is wanted of it, raises ValueError if it is not
            there.

        Raises:
          EndpointError: refused, or no good answer in all attempts.
        """
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        content += [{"type": "image_url", "image_url": {"url": _data_uri(i)}} for i in images]
        body = {
            "model": self.model,
            "temperature": 0,
            "messages": [{"role": "user", "content": content}],
        }
        request = self._request(json.dumps(body).encode())
        wait = FIRST_WAIT_SECONDS
        for attempt in range(ATTEMPTS):
            try:
                with _OPENER.open(request, timeout=TIMEOUT_SECONDS) as response:
                    return check(_content(response.read()))
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code} {error.reason}: {error.read(300)!r}"
                if error.code not in (408, 429) and error.code < 500:
                    raise EndpointError(f"{self.url}, model {self.model}: {problem}") from error
                wait = max(wait, _retry_after(error.headers.get("Retry-After")))
            except (OSError, http.client.HTTPException) as error:
                problem = f"no answer ({error})"
            except ValueError as error:
                problem = f"not the answer that was asked for: {error}"
            if attempt + 1 < ATTEMPTS:
                time.sleep(min(wait, _LONGEST_WAIT_SECONDS))
                wait *= 2
        raise EndpointError(f"{self.url}, model {self.model}: {problem}; asked {ATTEMPTS} times")

    def _request(self, body: bytes) -> urllib.request.Request:
        url = self.url.rstrip("/")
        if not url.endswith("/chat/completions"):
            url += "/chat/completions"
        headers = {"Content-Type": "application/json"}
        if os.environ.get(API_KEY):
            headers["Authorization"] = f"Bearer {os.environ[API_KEY]}"
        return urllib.request.Request(url, data=body, headers=headers, method="POST")


@dataclass(frozen=True, kw_only=True)
class EndpointWriter:
    """Subtask texts of a vision-language model, which sees the first image of each segment."""

    endpoint: Endpoint

    @property
    def name(self) -> str:
        """See `data_pipelines.annotate.writers.SubtaskWriter`; likewise the next one."""
        return f"{self.endpoint.name} subtasks {PROMPT_VERSION}"

    def subtasks(self, view: EpisodeView, segments: Sequence[Segment]) -> list[str]:
        """One question for an episode."""
        parts = [
            f"{number}. {segment.phase}, {(segment.stop - segment.start) / view.control_hz:.1f} s"
            for number, segment in enumerate(segments, 1)
        ]
        text = (
            f"A robot arm was told: {view.instructions[0]!r}. The state of its gripper cuts what "
            f"it did into {len(segments)} segments:\n" + "\n".join(parts) + "\nThe images show the "
            "start of each segment, in this order. Say for each segment what the robot does in it: "
            "a short imperative phrase that names the object, such as 'move to the red block' or "
            "'carry the red block to the plate'. Answer with a JSON object only: "
            f'{{"subtasks": ["...", ...]}}, with exactly {len(segments)} texts.'
        )

        def check(answer: dict[str, Any]) -> list[str]:
            texts = answer.get("subtasks")
            if not isinstance(texts, list) or len(texts) != len(segments):
                raise ValueError(
                    f'expected "subtasks" with {len(segments)} texts; got {texts!r:.200}'
                )
            for one in texts:
                if not isinstance(one, str) or not 0 < len(one.strip()) <= LONGEST_SUBTASK:
                    raise ValueError(
                        f"a subtask has 1 to {LONGEST_SUBTASK} characters; got {one!r:.250}"
                    )
            return [" ".join(one.split()).rstrip(".") for one in texts]

        images = [view.image(segment.start) for segment in segments]
        return self.endpoint.ask(text, images, check)


@dataclass(frozen=True, kw_only=True)
class EndpointDetector:
    """Boxes of a vision-language model that can ground phrases, one question for an image."""

    endpoint: Endpoint

    @property
    def name(self) -> str:
        """See `data_pipelines.annotate.writers.BoxDetector`; likewise the next one."""
        return f"{self.endpoint.name} boxes {PROMPT_VERSION}"

    def boxes(self, images: Sequence[np.ndarray], phrases: Sequence[str]) -> list[list[Box | None]]:
        """Asks about one image after the other."""
        listed = "\n".join(f"{number}. {phrase}" for number, phrase in enumerate(phrases, 1))
        text = (
            f"Where in this image are these objects?\n{listed}\nGive for each the box [x1, y1, x2, "
            "y2] from its top left to its bottom right corner, as fractions of the image's width "
            "and height between 0 and 1, or null if it cannot be seen. Answer with a JSON object "
            f'only: {{"boxes": [...]}}, with exactly {len(phrases)} entries.'
        )

        def check(answer: dict[str, Any]) -> list[Box | None]:
            found = answer.get("boxes")
            if not isinstance(found, list) or len(found) != len(phrases):
                raise ValueError(
                    f'expected "boxes" with {len(phrases)} entries; got {found!r:.200}'
                )
            return [None if box is None else checked_box(box, "answer") for box in found]

        return [self.endpoint.ask(text, [image], check) for image in images]


def _data_uri(image: np.ndarray) -> str:
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=95)
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def _content(data: bytes) -> dict[str, Any]:
    """The JSON object that a chat completion says, with or without a code fence around it."""
    try:
        text = json.loads(data)["choices"][0]["message"]["content"]
        fenced = re.search(r"```(?:json)?\s*(.*?)```", text, re.DOTALL)
        answer = json.loads(fenced.group(1) if fenced else text)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{data[:300]!r} ({type(error).__name__}: {error})") from error
    if not isinstance(answer, dict):
        raise ValueError(f"expected a JSON object; got {answer!r:.200}")
    return answer


def _retry_after(value: str | None) -> float:
    """Seconds to wait, as the server says; 0 where it says nothing, or a date."""
    return float(value) if value and value.isdecimal() else 0.0
