"""Asks a policy server; needs NumPy, msgpack and websockets, and neither JAX nor a GPU.

    with PolicyClient("ws://127.0.0.1:8000") as policy:
        reply = policy.infer({"observation/image": frame, "observation/state": state,
                              "prompt": "stack the blocks"})
        reply["actions"]                 # float32[C, A]: metres, radians, gripper
        chunks = policy(observations)    # float32[E, C, A], called as the policy itself would be

A server that cannot be reached, or is lost in the middle of a question, is tried again, with longer
and longer pauses, and asked the same question: a policy keeps nothing in mind between two. After
`timeout_seconds` it is given up.
"""

import contextlib
import ssl
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.frames import CloseCode
from websockets.sync.client import ClientConnection, connect

from lara_jax.serving.codec import Refused, pack, unpack

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.05, 2.0
MAX_REPLY_BYTES = 64 << 20
# The server is there, but does not want this client, whatever it asks.
UNWELCOME = (400, 401, 403, 404, 426)
LOST = (OSError, ConnectionClosed, InvalidHandshake)


class PolicyClient:
    """A connection to a policy server, made anew whenever it is lost.

    Args:
      url: "ws://HOST:PORT", or "wss://..." where the server has TLS.
      token: the server's, if it wants one.
      ca_file: certificate that the server's is checked by; None takes the system's.
      timeout_seconds: what connecting, and any single call, may take in all.

    Raises:
      ConnectionError: there is no server within that time.
      ValueError: the server does not let this client in.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        ca_file: Path | None = None,
        timeout_seconds: float = 60.0,
    ) -> None:
        if not url.startswith(("ws://", "wss://")):
            raise ValueError(f"a policy server's address starts with ws:// or wss://, got {url!r}")
        if timeout_seconds <= 0:
            raise ValueError(f"timeout_seconds must be above 0, got {timeout_seconds}")
        self._url = url
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._tls = None
        if url.startswith("wss://"):
            self._tls = ssl.create_default_context(cafile=ca_file)
        self._timeout_seconds = timeout_seconds
        self._connection: ClientConnection | None = None
        self._ending = contextlib.ExitStack()  # closes the connection
        self.metadata: dict[str, Any] = {}
        self._ask(None)

    def __enter__(self) -> "PolicyClient":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the frames that the policy reads."""
        return tuple(self.metadata["views"])

    @property
    def latent_slots(self) -> int:
        """K in use."""
        return int(self.metadata["latent_slots"])

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """Asks about one observation, in openpi's words.

        Args:
          observation: "observation/image" (the first view), "observation/wrist_image" or any
            "observation/<view>": uint8[H, W, 3] or None; "observation/state": float[J]; "prompt".

        Returns:
          "actions": float32[C, A], un-normalised; "server_timing" and "policy_timing" in ms.

        Raises:
          Refused: the server does not take the observation, or its policy failed.
          ConnectionError: the server is lost.
        """
        return self._ask(dict(observation))

    def __call__(self, observations: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Asks about several observations at once, as `lara_jax.inference.policy.Policy` is asked.

        Args:
          observations: each with a uint8[H, W, 3] frame, or None, under every name of `views`;
            `state` float[J] in the data's units; `instruction`.

        Returns:
          float32[E, C, A], un-normalised.

        Raises:
          Refused, ConnectionError: as `infer`.
        """
        examples = [
            {
                "image": [each[view] for view in self.views],
                "lang": str(each["instruction"]),
                "state": np.asarray(each["state"], np.float32),
            }
            for each in observations
        ]
        reply = self._ask({"type": "infer", "payload": {"examples": examples}})
        if not reply.get("ok"):
            raise Refused(f"the policy server says: {reply['error']['message']}")
        return np.array(reply["data"]["actions"], np.float32)

    def close(self) -> None:
        """Ends the connection; the next question would make a new one."""
        self._connection = None
        self._ending.close()

    def _ask(self, question: dict[str, Any] | None) -> dict[str, Any]:
        """The reply to a question, or only a connection; tries until the time is over."""
        deadline = time.monotonic() + self._timeout_seconds
        pause, tries = FIRST_PAUSE_SECONDS, 0
        message = None if question is None else pack(question)
        while True:
            tries += 1
            try:
                return self._try(message, deadline)
            except LOST as error:
                self.close()
                _raise_if_final(error, self._url)
                if time.monotonic() + pause >= deadline:
                    raise ConnectionError(
                        f"no answer from the policy server at {self._url} in "
                        f"{self._timeout_seconds:g} s and {tries} tries: "
                        f"{error or type(error).__name__}"
                    ) from error
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _try(self, message: bytes | None, deadline: float) -> dict[str, Any]:
        if self._connection is None:
            connecting = connect(
                self._url,
                additional_headers=self._headers,
                ssl=self._tls,
                compression=None,
                proxy=None,
                open_timeout=max(deadline - time.monotonic(), 0.01),
                max_size=MAX_REPLY_BYTES,
            )
            self._connection = self._ending.enter_context(connecting)
            self.metadata = self._receive(deadline)
        if message is None:
            return self.metadata
        limit = self.metadata.get("max_message_bytes", len(message))
        if len(message) > limit:
            raise Refused(f"the request has {len(message)} bytes; the server takes {limit}")
        self._connection.send(message)
        return self._receive(deadline)

    def _receive(self, deadline: float) -> dict[str, Any]:
        assert self._connection is not None
        reply = self._connection.recv(timeout=max(deadline - time.monotonic(), 0.01))
        if isinstance(reply, str):
            self.close()
            raise Refused(f"the policy server says: {reply}")
        content = unpack(reply)
        if not isinstance(content, dict):
            raise Refused(f"{self._url} answers as no policy server does")
        return content


def _raise_if_final(error: Exception, url: str) -> None:
    """Raises where another try could not help."""
    if isinstance(error, InvalidStatus) and error.response.status_code in UNWELCOME:
        status, body = error.response.status_code, error.response.body or b""
        text = bytes(body).decode(errors="replace").strip()
        raise ValueError(f"{url} does not let this client in: {status} {text}") from error
    closed = error.rcvd if isinstance(error, ConnectionClosed) else None
    if closed is not None and closed.code == CloseCode.MESSAGE_TOO_BIG:
        raise Refused(f"the request is too large for {url}") from error
    if isinstance(error, ssl.SSLCertVerificationError):
        raise ValueError(f"the certificate of {url} is not to be trusted: {error}") from error
