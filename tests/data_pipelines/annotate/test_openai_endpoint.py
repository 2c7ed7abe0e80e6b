"""The endpoint's adapter against a stub server on loopback."""

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import simplejpeg

from data_pipelines.annotate import openai_endpoint
from data_pipelines.annotate.anchors import segment_episode
from data_pipelines.annotate.openai_endpoint import (
    Endpoint,
    EndpointDetector,
    EndpointError,
    EndpointWriter,
)
from data_pipelines.annotate.view import EpisodeView
from tests.data_pipelines.annotate.small_index import HEIGHT, WIDTH, write_small_index


@dataclass
class Stub:
    """Answers requests with what is listed, in order; the last answer again and again."""

    answers: list[tuple[int, bytes, dict[str, str]]] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Any] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    url: str = ""

    def says(self, content: Any, status: int = 200, **headers: str) -> None:
        """Adds a chat completion with this content (not a text: as JSON)."""
        text = content if isinstance(content, str) else json.dumps(content)
        body = {"choices": [{"message": {"role": "assistant", "content": text}}]}
        self.answers.append((status, json.dumps(body).encode(), headers))


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    state = Stub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            state.paths.append(self.path)
            state.headers.append(self.headers)
            body = self.rfile.read(int(self.headers["Content-Length"]))
            state.requests.append(json.loads(body))
            status, body, headers = state.answers[min(len(state.requests), len(state.answers)) - 1]
            if not status:
                return  # hangs up
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was waited, s; nobody does, and asks three times."""
    waited: list[float] = []
    monkeypatch.setattr(openai_endpoint, "time", SimpleNamespace(sleep=waited.append))
    monkeypatch.setattr(openai_endpoint, "ATTEMPTS", 3)
    return waited


def endpoint(stub: Stub) -> Endpoint:
    return Endpoint(url=stub.url, model="qwen")


TEXTS = ["move to it", "grasp it.", " carry  it ", "release it", "retreat"]


def ask_subtasks(tmp_path: Path, endpoint: Endpoint) -> list[str]:
    view = EpisodeView.from_index(write_small_index(tmp_path / "data"), 0)
    assert view.gripper is not None
    segments = segment_episode(view.gripper, view.positions, view.control_hz)
    return EndpointWriter(endpoint=endpoint).subtasks(view, segments)


def test_subtasks(tmp_path: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    stub.says("```json\n" + json.dumps({"subtasks": TEXTS}) + "\n```")
    texts = ask_subtasks(tmp_path, endpoint(stub))
    assert texts == ["move to it", "grasp it", "carry it", "release it", "retreat"]
    assert stub.paths == ["/v1/chat/completions"]
    assert stub.headers[0]["Authorization"] == "Bearer secret"
    (request,) = stub.requests
    text, *images = request["messages"][0]["content"]
    assert request["model"] == "qwen" and request["temperature"] == 0
    assert "put the spoon on the towel" in text["text"] and "2. grasp, 0.4 s" in text["text"]
    assert len(images) == 5
    head, data = images[0]["image_url"]["url"].split(",")
    assert head == "data:image/jpeg;base64"
    assert simplejpeg.decode_jpeg(base64.b64decode(data)).shape == (HEIGHT, WIDTH, 3)


def test_boxes(stub: Stub) -> None:
    stub.says({"boxes": [[0.1, 0.2, 0.3, 0.4], None]})
    detector = EndpointDetector(endpoint=endpoint(stub))
    images = [np.zeros((8, 8, 3), np.uint8)] * 2
    assert detector.boxes(images, ["spoon", "towel"]) == [[(0.1, 0.2, 0.3, 0.4), None]] * 2
    assert len(stub.requests) == 2 and "1. spoon" in json.dumps(stub.requests[0])
    assert "Authorization" not in stub.headers[0]


@pytest.mark.parametrize("status", [429, 500, 503, 0])
def test_passing_trouble_is_asked_again(
    tmp_path: Path, stub: Stub, waits: list[float], status: int
) -> None:
    stub.says("", status, **({"Retry_After": "7"} if status == 429 else {}))
    stub.says("", status)
    stub.says({"subtasks": TEXTS})
    assert len(ask_subtasks(tmp_path, endpoint(stub))) == 5
    assert waits == ([7.0, 14.0] if status == 429 else [1.0, 2.0])


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (400, {}, "HTTP 400.*no such model"),
        (401, {}, "HTTP 401"),
        # A redirect would carry the key away.
        (307, {"Location": "http://127.0.0.1:1/"}, "HTTP 307"),
    ],
)
def test_refusal_is_an_error_at_once(
    tmp_path: Path, stub: Stub, status: int, headers: dict[str, str], message: str
) -> None:
    stub.says("no such model", status, **headers)
    with pytest.raises(EndpointError, match=f"model qwen: {message}"):
        ask_subtasks(tmp_path, endpoint(stub))
    assert len(stub.requests) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("The robot moves.", "JSONDecodeError"),
        ([1], "expected a JSON object"),
        ({"subtasks": TEXTS[:4]}, "with 5 texts"),
        ({"subtasks": [*TEXTS[:4], ""]}, "1 to 200 characters"),
        ({"subtasks": [*TEXTS[:4], "x" * 300]}, "1 to 200 characters"),
        ({"answer": 42}, "with 5 texts"),
    ],
)
def test_wrong_answer_is_asked_for_again_then_an_error(
    tmp_path: Path, stub: Stub, content: Any, message: str
) -> None:
    stub.says(content)
    with pytest.raises(EndpointError, match=f"{message}.*asked 3 times"):
        ask_subtasks(tmp_path, endpoint(stub))
    assert len(stub.requests) == 3


@pytest.mark.parametrize(
    ("boxes", "message"),
    [([[10, 20, 30, 40]], "outside the image"), ([[1, 0, 0, 1]], "inverted"), ([], "1 entries")],
)
def test_wrong_box(stub: Stub, boxes: Any, message: str) -> None:
    stub.says({"boxes": boxes})
    with pytest.raises(EndpointError, match=message):
        EndpointDetector(endpoint=endpoint(stub)).boxes([np.zeros((8, 8, 3), np.uint8)], ["spoon"])


def test_no_server(tmp_path: Path, stub: Stub) -> None:
    nowhere = Endpoint(url="http://127.0.0.1:1/v1", model="m")
    with pytest.raises(EndpointError, match=r"no answer .*refused.*asked 3 times"):
        ask_subtasks(tmp_path, nowhere)


@pytest.mark.parametrize(
    ("url", "model", "message"),
    [
        ("127.0.0.1:8000", "m", "expected a URL"),
        ("ftp://x/", "m", "URL"),
        ("http://x", "", "model"),
    ],
)
def test_bad_endpoint(url: str, model: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Endpoint(url=url, model=model)


def test_name_holds_no_password() -> None:
    assert "secret" not in Endpoint(url="http://me:secret@host/v1", model="m").name
