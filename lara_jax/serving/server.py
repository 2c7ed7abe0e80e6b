"""The websocket server: one conversation a client, none of which can hold up the others.

    GET /healthz   200 once the policy is warm          GET /metrics   Prometheus
    GET /          websocket: metadata, then request -> reply -> request -> reply ...

What bounds a client: one request at a time, messages of limited size of which at most one waits
unread, a time for the handshake, for taking in a reply, between requests and for answering pings;
and their number. Whoever oversteps is closed, and nobody else notices. What a client is told of an
error is one sentence; a traceback goes to the log.

An error reply is that of the protocol: in the release's, an envelope, and the talk goes on; in
openpi's, a text frame, and the server closes the connection with code 1011.
"""

import asyncio
import http
import logging
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from prometheus_client import CONTENT_TYPE_LATEST
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response

from lara_jax.serving import access, protocols
from lara_jax.serving.batcher import Acted, Batcher, PolicyFailed, call
from lara_jax.serving.codec import Refused, pack, unpack
from lara_jax.serving.contract import Contract, Observation, ServedPolicy
from lara_jax.serving.metrics import Metrics

LOG = logging.getLogger(__name__)
MAX_ERROR = 2000  # characters; an instruction may be quoted
PING_SECONDS = 20
PONG_SECONDS = 60
CLOSE_SECONDS = 5
# Open at a time, those still shaking hands included; systems commonly allow a process 1024 files.
SOCKETS = 512
MAX_CONNECTIONS = SOCKETS // 2


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Bounds of a server.

    Attributes:
      batch_size: observations of a call of the policy, B.
      batch_wait_seconds: how long a request waits for others to share a call with.
      max_connections: clients at a time.
      max_message_bytes: of a request.
      handshake_seconds: from the connection to the websocket.
      idle_seconds: until a whole request has come; then the connection is closed.
      send_seconds: for a client to take in a reply.
    """

    batch_size: int = 1
    batch_wait_seconds: float = 0.002
    max_connections: int = 32
    max_message_bytes: int = 16 << 20
    handshake_seconds: float = 10.0
    idle_seconds: float = 600.0
    send_seconds: float = 10.0

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_connections", "max_message_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_connections > MAX_CONNECTIONS:
            raise ValueError(
                f"max_connections is {self.max_connections}; allowed 1..{MAX_CONNECTIONS}"
            )
        if self.batch_wait_seconds < 0:
            raise ValueError(
                f"batch_wait_seconds must be at least 0, got {self.batch_wait_seconds}"
            )
        for name in ("handshake_seconds", "idle_seconds", "send_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


class _Gone(Exception):
    """The client left while its request waited."""


class _Connection(ServerConnection):
    """Hangs up at once where there are too many, those still shaking hands included."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if len(self.server.handler_tasks) > SOCKETS:
            self.transport.abort()


class PolicyServer:
    """Serves one policy.

    Args:
      policy: acts.
      contract: what it takes and gives.
      config: bounds.
      token: that clients must show; None for whoever can reach the address.
      tls: where connections are to be encrypted.
    """

    def __init__(
        self,
        policy: ServedPolicy,
        contract: Contract,
        config: ServerConfig,
        *,
        token: str | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._policy, self._contract, self._config = policy, contract, config
        self._token, self._tls = token, tls
        self._shape = (config.batch_size, contract.action_horizon, len(contract.action.modes))
        limits = {"max_message_bytes": config.max_message_bytes, "batch_size": config.batch_size}
        self._metadata = pack(contract.metadata() | limits)
        self._clients = 0
        self.metrics = Metrics()

    def warm(self) -> None:
        """Acts once on made-up observations, so that everything is compiled before clients come.

        Raises:
          ValueError: the policy does not keep to its contract.
        """
        call(self._policy, [self._contract.example()] * self._config.batch_size, self._shape)

    async def run(
        self,
        listener: socket.socket,
        stop: asyncio.Event,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        """Serves until `stop` is set; then closes all connections.

        Args:
          listener: bound, but not yet listening.
          stop: ends it.
          ready: is called when clients may come.
        """
        config = self._config
        self._batcher = Batcher(
            self._policy,
            shape=self._shape,
            wait_seconds=config.batch_wait_seconds,
            clients=lambda: self._clients,
            on_call=self.metrics.called,
        )
        async with (
            self._batcher as batcher,
            serve(
                self._talk,
                sock=listener,
                ssl=self._tls,
                origins=[None],
                compression=None,
                process_request=self._http,
                server_header=None,
                open_timeout=config.handshake_seconds,
                ping_interval=PING_SECONDS,
                ping_timeout=PONG_SECONDS,
                close_timeout=CLOSE_SECONDS,
                max_size=config.max_message_bytes,
                max_queue=1,
                logger=LOG,
                create_connection=_Connection,
            ),
        ):
            ready()
            stopped = asyncio.create_task(stop.wait())
            await asyncio.wait({stopped, batcher.task}, return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()

    def _http(self, connection: ServerConnection, request: HttpRequest) -> Response | None:
        """Answers what is no websocket; None lets the handshake go on."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if not access.allowed(self._token, request.headers.get_all("Authorization")):
            response = connection.respond(http.HTTPStatus.UNAUTHORIZED, "a token is needed\n")
            response.headers["WWW-Authenticate"] = "Bearer"
            return self._turned_away("token", response)
        if path == "/metrics":
            response = connection.respond(http.HTTPStatus.OK, self.metrics.text())
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = CONTENT_TYPE_LATEST
            return response
        if path != "/":
            return connection.respond(http.HTTPStatus.NOT_FOUND, "there is /, /healthz, /metrics\n")
        if self._clients >= self._config.max_connections:
            response = connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "too many clients\n")
            return self._turned_away("full", response)
        return None

    def _turned_away(self, reason: str, response: Response) -> Response:
        self.metrics.turned_away.labels(reason).inc()
        return response

    async def _talk(self, connection: ServerConnection) -> None:
        """One client, from its metadata to its end."""
        self._clients += 1
        gone = asyncio.create_task(connection.wait_closed())
        previous_seconds = 0.0
        try:
            with self.metrics.connections.track_inprogress():
                await self._send(connection, self._metadata)
                while (message := await self._receive(connection)) is not None:
                    began = time.monotonic()
                    reply = await self._answer(message, began, previous_seconds, gone)
                    await self._send(connection, reply)
                    previous_seconds = time.monotonic() - began
                    if isinstance(reply, str):
                        await connection.close(CloseCode.INTERNAL_ERROR, "see the frame before")
        except (ConnectionClosed, _Gone):
            return
        finally:
            self._clients -= 1
            gone.cancel()

    async def _receive(self, connection: ServerConnection) -> str | bytes | None:
        """The next message, or None after a silence that was too long."""
        try:
            async with asyncio.timeout(self._config.idle_seconds):
                return await connection.recv()
        except TimeoutError:
            self.metrics.turned_away.labels("idle").inc()
            await connection.close(CloseCode.POLICY_VIOLATION, "idle for too long")
            return None

    async def _send(self, connection: ServerConnection, message: str | bytes) -> None:
        try:
            async with asyncio.timeout(self._config.send_seconds):
                await connection.send(message)
        except TimeoutError:  # the next use of the connection says that it is closed
            self.metrics.turned_away.labels("stalled").inc()
            connection.transport.abort()

    async def _answer(
        self, data: str | bytes, began: float, previous_seconds: float, gone: asyncio.Task[None]
    ) -> str | bytes:
        """The reply to a message: bytes, or text if it is an error that ends the talk."""
        content, outcome = None, "ok"
        try:
            if isinstance(data, str):
                raise Refused("requests are binary messages of msgpack")
            content = unpack(data)
            request = self._request(content)
            acted = await self._act(request.observations, gone)
            answer = protocols.Answer(
                chunks=acted.chunks,
                policy_seconds=acted.policy_seconds,
                seconds=time.monotonic() - began,
                previous_seconds=previous_seconds,
            )
            reply: str | bytes = pack(request.reply(answer))
        except (Refused, PolicyFailed) as error:
            outcome = "refused" if isinstance(error, Refused) else "failed"
            reply = str(error)[:MAX_ERROR]
        name = protocols.protocol(content)
        if outcome != "ok" and name == protocols.REFERENCE:
            reply = pack(protocols.error_reply(content, str(reply)))
        self.metrics.requests.labels(name, outcome).inc()
        self.metrics.request_seconds.observe(time.monotonic() - began)
        return reply

    def _request(self, content: Any) -> protocols.Request:
        request = protocols.parse(content, self._contract)
        for observation in request.observations:
            try:
                self._policy.check_instruction(observation["instruction"], self._contract.image_px)
            except ValueError as error:
                raise Refused(str(error)) from error
        return request

    async def _act(self, observations: Sequence[Observation], gone: asyncio.Task[None]) -> Acted:
        """The policy's answer, unless the client leaves before it is there."""
        if not observations:
            return Acted(chunks=np.zeros((0, *self._shape[1:]), np.float32), policy_seconds=0.0)
        acting = asyncio.create_task(self._batcher.act(observations))
        try:
            await asyncio.wait({acting, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            acting.cancel()
        if not acting.done():
            raise _Gone
        return acting.result()
