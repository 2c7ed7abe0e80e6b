"""The line before the policy: who is answered, with what, after how many calls."""

import asyncio
import time

import numpy as np
import pytest

from lara_jax.serving.batcher import Batcher, PolicyFailed
from tests.serving.fakes import FakePolicy, frame


def observation(state: float, instruction: str = "go") -> dict:
    return {
        "primary": frame(),
        "wrist": None,
        "state": np.full(3, state, np.float32),
        "instruction": instruction,
    }


def batcher(policy: FakePolicy, *, size: int = 4, wait_seconds: float = 0.0, clients: int = 1):
    return Batcher(policy, shape=(size, 4, 7), wait_seconds=wait_seconds, clients=lambda: clients)


def firsts(acted) -> list[float]:
    """The first number of each chunk."""
    return [round(float(chunk[0, 0]), 3) for chunk in acted.chunks]


def test_requests_share_calls_and_get_their_own_answers():
    policy = FakePolicy()

    async def main():
        async with batcher(policy, wait_seconds=5, clients=3) as line:
            return await asyncio.gather(
                line.act([observation(0.1, "a"), observation(0.2, "b"), observation(0.3, "c")]),
                line.act([observation(0.4, "d")]),
                line.act([observation(0.5, "e"), observation(0.6, "f")]),
            )

    answers = asyncio.run(main())
    assert [firsts(acted) for acted in answers] == [[0.1, 0.2, 0.3], [0.4], [0.5, 0.6]]
    # One observation of each request in turn; always as many as the policy was compiled for.
    assert policy.calls == [["a", "d", "e", "b"], ["f", "c", "f", "f"]]
    assert all(acted.policy_seconds > 0 for acted in answers)


def test_a_call_waits_for_others_only_as_long_as_it_may():
    async def seconds(wait_seconds: float, clients: int) -> float:
        async with batcher(FakePolicy(), wait_seconds=wait_seconds, clients=clients) as line:
            began = time.monotonic()
            await line.act([observation(0.1)])
            return time.monotonic() - began

    assert asyncio.run(seconds(5.0, clients=1)) < 2  # nobody else could come
    assert 0.3 <= asyncio.run(seconds(0.3, clients=2)) < 2
    policy = FakePolicy()

    async def full() -> None:
        async with batcher(policy, size=2, wait_seconds=5.0, clients=9) as line:
            await asyncio.gather(*(line.act([observation(0.1)]) for _ in range(2)))

    began = time.monotonic()
    asyncio.run(full())
    assert time.monotonic() - began < 2 and len(policy.calls) == 1


def test_a_long_request_does_not_hold_up_a_short_one():
    policy = FakePolicy(seconds=0.01)

    async def main() -> list[str]:
        done = []

        async def ask(name: str, rows: int) -> None:
            await line.act([observation(0.1, name)] * rows)
            done.append(name)

        async with batcher(policy, size=1, clients=2) as line:
            await asyncio.gather(ask("long", 20), ask("short", 1))
        return done

    assert asyncio.run(main()) == ["short", "long"]


def test_who_gives_up_leaves_the_line():
    policy = FakePolicy(seconds=0.2)

    async def main():
        async with batcher(policy, size=1) as line:
            first = asyncio.create_task(line.act([observation(0.1, "first")]))
            await asyncio.sleep(0.05)
            second = asyncio.create_task(line.act([observation(0.2, "second")] * 5))
            third = asyncio.create_task(line.act([observation(0.3, "third")]))
            await asyncio.sleep(0.05)
            second.cancel()
            return await asyncio.gather(first, third)

    assert [firsts(acted) for acted in asyncio.run(main())] == [[0.1], [0.3]]
    assert policy.calls == [["first"], ["third"]]


def test_a_failure_is_told_and_the_line_goes_on(caplog):
    async def main():
        async with batcher(FakePolicy(), size=2, clients=2) as line:
            with pytest.raises(PolicyFailed, match="the server's log says why"):
                await line.act([observation(0.1, "crash")])
            poisoned, good = await asyncio.gather(
                line.act([observation(0.1, "nan")]),
                line.act([observation(0.2)]),
                return_exceptions=True,
            )
            assert isinstance(poisoned, PolicyFailed) and "not finite" in str(poisoned)
            return good

    assert firsts(asyncio.run(main())) == [0.2]
    assert "secret of the policy" in caplog.text


def test_chunks_of_another_shape_are_a_failure():
    async def main():
        async with Batcher(
            FakePolicy(), shape=(1, 5, 7), wait_seconds=0, clients=lambda: 1
        ) as line:
            await line.act([observation(0.1)])

    with pytest.raises(PolicyFailed):
        asyncio.run(main())
