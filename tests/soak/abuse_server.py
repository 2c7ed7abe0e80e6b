"""Abuses a policy server for as long as one likes, and checks that good clients do not notice.

    python -m tests.soak.abuse_server --messages 10000 --clients 32 --minutes 10 --seed 0

Two parts, each against a server in a process of its own, whose policy is a formula. First hostile
messages, several clients at once, some of which leave in the middle of a message or never read,
while a good client asks all the time: every good answer must come and be right. Then so many good
clients for so many minutes: the server's memory, after a first tenth of the time, must not grow.
Prints one line of JSON, with the time that a request takes beyond its policy's, and exits with 1 if
anything is wrong.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import psutil
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from lara_jax.serving.client import PolicyClient
from tests.serving.fakes import FakePolicy, openpi_request, running
from tests.serving.fuzz import hostile_messages

ABUSERS = 4
ALLOWED_GROWTH_MIB = 8.0


class Forgetful(FakePolicy):
    """Keeps no list of its calls: the server's memory is what is measured."""

    def __call__(self, observations: Sequence[dict[str, Any]]) -> np.ndarray:
        chunks = super().__call__(observations)
        self.calls.clear()
        return chunks


def serve(pipe: Connection, seconds: float, connections: int) -> None:
    """The server's process: tells its address, ends on a word."""
    with running(Forgetful(seconds=seconds), max_connections=connections, batch_size=4) as run:
        pipe.send(run.url)
        pipe.recv()


@contextlib.contextmanager
def server(seconds: float, connections: int) -> Iterator[tuple[str, psutil.Process]]:
    """A server's address and process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, seconds, connections))
    process.start()
    try:
        yield ours.recv(), psutil.Process(process.pid)
    finally:
        ours.send("stop")
        process.join(60)


def abuse(url: str, messages: Sequence[bytes], told: list[str]) -> None:
    """One hostile client: sends, sometimes leaves at once, notes replies that tell too much."""
    for number, data in enumerate(messages):
        with (
            contextlib.suppress(ConnectionClosed, OSError),
            connect(url, compression=None, proxy=None, close_timeout=1) as bad,
        ):
            bad.recv(timeout=60)
            if number % 10 == 0:
                bad.socket.sendall(b"\x82\xfe\xff\xff" + data[:50])  # half a frame, and gone
                continue
            bad.send(data)
            if number % 10 == 1:
                continue
            reply = bad.recv(timeout=60)
            if b"Traceback" in (reply.encode() if isinstance(reply, str) else reply):
                told.append(repr(reply[:200]))


def ask(url: str, until: threading.Event, state: float, times: list[float]) -> None:
    """One good client; a wrong answer, or none, is a negative time."""
    with PolicyClient(url, timeout_seconds=120) as good:
        while not until.is_set():
            began = time.perf_counter()
            value = good.infer(openpi_request(state))["actions"][0, 0]
            times.append(time.perf_counter() - began if value == np.float32(state) else -1.0)


def hostile_part(count: int, seed: int) -> dict[str, Any]:
    """So many hostile messages beside one good client."""
    with server(0.0, 32) as (url, process):
        told: list[str] = []
        times: list[float] = []
        over = threading.Event()
        good = threading.Thread(target=ask, args=(url, over, 0.5, times))
        good.start()
        abusers = [
            threading.Thread(
                target=abuse,
                args=(url, list(hostile_messages(seed + n, count // ABUSERS)), told),
            )
            for n in range(ABUSERS)
        ]
        before = process.memory_info().rss
        for each in abusers:
            each.start()
        for each in abusers:
            each.join()
        over.set()
        good.join(130)
        grown = (process.memory_info().rss - before) / 2**20
        alone: list[float] = []
        over.clear()
        quiet = threading.Thread(target=ask, args=(url, over, 0.25, alone))
        quiet.start()
        time.sleep(2)
        over.set()
        quiet.join(130)
    return {
        "hostile_messages": count,
        "good_answers": sum(t >= 0 for t in times),
        "wrong_answers": sum(t < 0 for t in times + alone) + good.is_alive(),
        "good_ms_p99": float(np.percentile(times, 99)) * 1e3,
        "alone_ms_p50": float(np.median(alone)) * 1e3,
        "tracebacks": len(told),
        "hostile_grown_mib": grown,
    }


def crowd_part(clients: int, minutes: float) -> dict[str, Any]:
    """So many good clients at once."""
    with server(0.002, clients) as (url, process):
        over = threading.Event()
        times: list[list[float]] = [[] for _ in range(clients)]
        crowd = [
            threading.Thread(target=ask, args=(url, over, n / 64, times[n])) for n in range(clients)
        ]
        for each in crowd:
            each.start()
        time.sleep(6 * minutes)
        early = process.memory_info().rss
        time.sleep(54 * minutes)
        grown = (process.memory_info().rss - early) / 2**20
        over.set()
        for each in crowd:
            each.join(130)
    flat = list(itertools.chain.from_iterable(times))
    return {
        "clients": clients,
        "minutes": minutes,
        "answers": len(flat),
        "wrong": sum(t < 0 for t in flat) + sum(each.is_alive() for each in crowd),
        "slowest_share": min(map(len, times)) / max(map(len, times)),
        "grown_mib": grown,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs both parts; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--messages", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    result = hostile_part(arguments.messages, arguments.seed)
    result |= crowd_part(arguments.clients, arguments.minutes)
    wrong = result["wrong"] + result["wrong_answers"] + result["tracebacks"]
    grown = max(result["grown_mib"], result["hostile_grown_mib"])
    print(json.dumps(result))
    return int(wrong > 0 or not result["good_answers"] or grown > ALLOWED_GROWTH_MIB)


if __name__ == "__main__":
    sys.exit(main())
