"""`lara serve`: a checkpoint's policy, for robots and simulators to ask over a websocket.

    lara serve --workdir runs/debug --port 8000

The port is taken at once, but connections are refused until the policy has acted once: clients that
wait for a server (openpi's do) then wait for a warm one.
"""

import argparse
import asyncio
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipelines.cli import at_least_one
from data_pipelines.statistics import normalizers
from lara_jax.serving import access
from lara_jax.serving.contract import MISSING_STATE, Contract
from lara_jax.serving.server import PolicyServer, ServerConfig

if TYPE_CHECKING:
    from lara_jax.inference.policy import Policy

PORT = 8000  # as openpi's server; the PyTorch release's is 10093


def main(argv: Sequence[str]) -> int:
    """Runs `lara serve` until SIGTERM or SIGINT."""
    arguments = _parser().parse_args(argv)
    token = access.read_token(arguments.token_file) if arguments.token_file else None
    if token is None and not access.is_loopback(arguments.host):
        raise ValueError(
            f"--host {arguments.host} can be reached from other machines: --token-file is needed"
        )
    if (arguments.tls_cert is None) != (arguments.tls_key is None):
        raise ValueError("--tls-cert and --tls-key go together")
    tls = access.tls_context(arguments.tls_cert, arguments.tls_key) if arguments.tls_cert else None
    if token and not tls and not access.is_loopback(arguments.host):
        print(
            "lara serve: without --tls-cert the token crosses the network as it is", file=sys.stderr
        )
    config = ServerConfig(
        batch_size=arguments.batch_size,
        batch_wait_seconds=arguments.batch_wait_ms / 1e3,
        max_connections=arguments.max_connections,
        max_message_bytes=arguments.max_message_mib << 20,
        idle_seconds=arguments.idle_seconds,
    )
    with listener(arguments.host, arguments.port) as bound:
        # Imported here because it takes seconds, and a wrong call should be told at once.
        from lara_jax.inference.policy import Policy

        policy = Policy.from_workdir(
            arguments.workdir,
            step=arguments.step,
            latent_slots=arguments.latent_slots,
            dataset=arguments.dataset,
        )
        image_px = tuple(arguments.image_size) if arguments.image_size else None
        contract = contract_of(policy, image_px=image_px, missing_state=arguments.missing_state)
        server = PolicyServer(policy, contract, config, token=token, tls=tls)
        server.warm()
        asyncio.run(_serve(server, bound, secure=tls is not None))
    return 0


def contract_of(
    policy: "Policy", *, image_px: tuple[int, ...] | None = None, missing_state: str = "refuse"
) -> Contract:
    """What a policy takes and gives.

    Args:
      policy: of a checkpoint.
      image_px: (height, width) or side of the frames that clients send; None takes the recipe's
        `data.frame_px`, or else `data.resize_px`.
      missing_state: see `Contract`.

    Raises:
      ValueError: the recipe does not say how large frames are, or says it otherwise.
    """
    data = policy.recipe.data
    size = image_px or data.image_px
    if not size:
        raise ValueError("the recipe leaves the size of frames to the data; give --image-size")
    if len(size) > 2:
        raise ValueError(f"--image-size is one side, or height and width, got {list(size)}")
    height, width = size[0], size[-1]
    if data.frame_px and (height, width) != tuple(data.frame_px):
        raise ValueError(
            f"--image-size is {height} x {width}, but the policy brings every frame to "
            f"{data.frame_px[0]} x {data.frame_px[1]}: leave it out"
        )
    action, state = normalizers(policy.statistics)
    return Contract(
        dataset=policy.statistics.dataset,
        views=policy.views,
        image_px=(height, width),
        any_image_size=bool(data.frame_px),
        state=state,
        action=action,
        action_horizon=policy.recipe.model.action_horizon,
        control_hz=policy.statistics.control_hz,
        latent_slots=policy.latent_slots,
        missing_state=missing_state,
    )


def listener(host: str, port: int) -> socket.socket:
    """A socket that holds the address; nobody can connect before the server listens on it.

    Raises:
      OSError: the address is not this machine's, or taken.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise OSError(
            error.errno, f"cannot listen on {host} port {port}: {error.strerror}"
        ) from error
    return bound


async def _serve(server: PolicyServer, bound: socket.socket, *, secure: bool) -> None:
    host, port = bound.getsockname()[:2]
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    url = f"{'wss' if secure else 'ws'}://{f'[{host}]' if ':' in host else host}:{port}"
    await server.run(
        bound, stop, ready=lambda: print(f"lara serve: ready on {url}", file=sys.stderr, flush=True)
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lara serve", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--workdir", required=True, type=Path, help="directory of a training run")
    add("--step", type=int, help="of the checkpoint (default: the newest)")
    add("--dataset", help="whose robot it acts for, after a mixture")
    add("--latent-slots", type=int, help="K (default: as trained)")
    add("--host", default="127.0.0.1", help="address; any but loopback needs a token")
    add("--port", type=int, default=PORT, help=f"0 takes a free one (default: {PORT})")
    add("--token-file", type=Path, help="file with the token that clients must show")
    add("--tls-cert", type=Path, help="certificate (PEM): connections are encrypted")
    add("--tls-key", type=Path, help="its private key (PEM)")
    add("--batch-size", type=at_least_one, default=1, help="observations of a call of the policy")
    add("--batch-wait-ms", type=float, default=2.0, help="how long one waits for others")
    add("--image-size", type=at_least_one, nargs="+", help="side, or height and width, in pixels")
    add(
        "--missing-state",
        choices=MISSING_STATE,
        default="refuse",
        help="an observation without state: refuse it, or take the data's mean",
    )
    add("--max-connections", type=at_least_one, default=32)
    add("--max-message-mib", type=at_least_one, default=16)
    add("--idle-seconds", type=float, default=600.0, help="a silent client is closed after these")
    return parser
