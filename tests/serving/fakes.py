"""A policy without a network, and a server around it in a thread."""

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lara_jax.serving.cli import listener
from lara_jax.serving.contract import Contract
from lara_jax.serving.server import PolicyServer, ServerConfig
from lara_jax.transforms import Normalizer, Statistics

STATE = 3
HORIZON = 4


def normalizer(modes: Sequence[str], low: float, high: float) -> Normalizer:
    """Of statistics that are the same in every dimension."""
    values = {"min": low, "max": high, "mean": 0.25, "std": 1.0, "q01": low, "q99": high}
    return Normalizer(
        modes=tuple(modes),
        statistics=Statistics(**{name: (x,) * len(modes) for name, x in values.items()}),
    )


def contract(**changes: Any) -> Contract:
    """Two views of 4 x 6 px, 3 states, chunks of 4 actions of 7 numbers, the last a gripper."""
    values: dict[str, Any] = {
        "dataset": "toy",
        "views": ("primary", "wrist"),
        "image_px": (4, 6),
        "any_image_size": False,
        "state": normalizer(["q99"] * STATE, -1.0, 1.0),
        "action": normalizer(["q99"] * 6 + ["binary"], -2.0, 2.0),
        "action_horizon": HORIZON,
        "control_hz": 5.0,
        "latent_slots": 3,
    }
    return Contract(**values | changes)


@dataclass
class FakePolicy:
    """Answers with the state's first number (the gripper 1), times the brightness of the first view
    as a share of white; remembers its calls. May be slow, fail at an instruction, or say NaN."""

    seconds: float = 0.0
    horizon: int = HORIZON
    calls: list[list[str]] = field(default_factory=list)

    def __call__(self, observations: Sequence[dict[str, Any]]) -> np.ndarray:
        self.calls.append([each["instruction"] for each in observations])
        time.sleep(self.seconds)
        if any(each["instruction"] == "crash" for each in observations):
            raise RuntimeError("secret of the policy")
        return np.stack([self.chunk(each) for each in observations])

    def chunk(self, observation: dict[str, Any]) -> np.ndarray:
        frame = observation["primary"]
        share = 1.0 if frame is None else np.mean(frame) / 255
        chunk = np.full((self.horizon, 7), observation["state"][0] * share, np.float32)
        chunk[:, 6] = 1
        if observation["instruction"] == "nan":
            chunk[0, 0] = np.nan
        return chunk

    def check_instruction(self, instruction: str, image_px: tuple[int, int]) -> None:
        if instruction == "too long":
            raise ValueError("prefix has 99 tokens; prefix_tokens allows 9")


def frame(level: int = 255) -> np.ndarray:
    """uint8[4, 6, 3] of one grey."""
    return np.full((4, 6, 3), level, np.uint8)


def openpi_request(state: float = 0.5, prompt: str = "go") -> dict[str, Any]:
    """As openpi's LIBERO client writes it."""
    return {
        "observation/image": frame(),
        "observation/wrist_image": frame(0),
        "observation/state": np.full(STATE, state),
        "prompt": prompt,
    }


def reference_request(states: Sequence[float] = (0.5,), prompt: str = "go") -> dict[str, Any]:
    """As starVLA's LIBERO client writes it, with one example a state."""
    return {
        "type": "infer",
        "request_id": "r1",
        "payload": {
            "examples": [
                {"image": [frame(), frame(0)], "lang": prompt, "state": np.full(STATE, state)}
                for state in states
            ],
            "unnorm_key": "toy",
            "do_sample": False,
            "use_ddim": True,
            "num_ddim_steps": 10,
        },
    }


@dataclass
class Running:
    """A server that runs: its address, itself, and its policy."""

    port: int
    server: PolicyServer
    policy: FakePolicy

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"


@contextmanager
def running(
    policy: FakePolicy | None = None, *, port: int = 0, token: str | None = None, **config: Any
) -> Iterator[Running]:
    """A server in a thread of its own, until the context ends."""
    policy = policy or FakePolicy()
    served, tls = config.pop("contract", contract()), config.pop("tls", None)
    server = PolicyServer(policy, served, ServerConfig(**config), token=token, tls=tls)
    ready, loop, stop = threading.Event(), asyncio.new_event_loop(), asyncio.Event()
    with listener("127.0.0.1", port) as bound:
        serving = loop.create_task(server.run(bound, stop, ready=ready.set))
        serving.add_done_callback(lambda _: ready.set())
        thread = threading.Thread(
            target=loop.run_until_complete, args=(asyncio.wait({serving}),), daemon=True
        )
        thread.start()
        assert ready.wait(10)
        try:
            yield Running(bound.getsockname()[1], server, policy)
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join(20)
            assert not thread.is_alive()
            serving.result()  # raises what has ended the server
            loop.close()
