"""openpi's own client against this server.

The package `openpi-client` asks for NumPy below 2, which contradicts the rest of requirements.txt,
but runs with newer ones: `pip install --no-deps openpi-client` adds it for this test.
"""

import numpy as np
import pytest

from tests.serving.fakes import FakePolicy, openpi_request, running

pytest.importorskip("openpi_client", reason="openpi-client is not installed (--no-deps)")

from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy

TOKEN = "0123456789abcdef"


def test_infer_metadata_and_errors():
    with running(token=TOKEN) as run:
        client = WebsocketClientPolicy("127.0.0.1", run.port, api_key=TOKEN)
        assert client.get_server_metadata()["action_chunk_size"] == 4
        client.reset()
        for state in (0.5, 0.25):
            reply = client.infer(openpi_request(state))
            assert reply["actions"].shape == (4, 7) and reply["actions"].dtype == np.float32
            assert (reply["actions"][:, :6] == state).all()
            assert reply["server_timing"]["infer_ms"] > 0
        with pytest.raises(RuntimeError, match="Error in inference server:\nthe request has no"):
            client.infer({**openpi_request(), "observation/state": None})


def test_chunks_are_executed_step_by_step():
    policy = FakePolicy()
    with running(policy) as run:
        broker = ActionChunkBroker(WebsocketClientPolicy(run.url), action_horizon=4)
        for _ in range(5):
            assert broker.infer(openpi_request(0.5))["actions"].shape == (7,)
        assert len(policy.calls) == 2
