"""Hostile messages end in a refusal, and in nothing else; good clients do not notice."""

import numpy as np
from websockets.sync.client import connect

from lara_jax.serving.client import PolicyClient
from lara_jax.serving.codec import Refused, unpack
from lara_jax.serving.protocols import parse
from tests.serving.fakes import contract, openpi_request, running
from tests.serving.fuzz import hostile_messages


def test_every_message_is_a_request_or_refused():
    served, outcomes = contract(), {"request": 0, "refused": 0}
    for data in hostile_messages(seed=0, count=3000):
        try:
            request = parse(unpack(data), served)
        except Refused as error:
            outcomes["refused"] += 1
            assert str(error)
        else:
            outcomes["request"] += 1
            for seen in request.observations:
                assert np.isfinite(seen["state"]).all() and seen["state"].dtype == np.float32
                assert seen["state"].shape == (3,) and isinstance(seen["instruction"], str)
    # Both must occur, or the fuzzer is too tame or too wild to find anything.
    assert outcomes["refused"] > 750 and outcomes["request"] > 75, outcomes


def test_a_server_stands_them(caplog):
    with running() as run, PolicyClient(run.url, timeout_seconds=20) as good:
        for number, data in enumerate(hostile_messages(seed=1, count=120)):
            with connect(run.url, compression=None, proxy=None) as bad:
                bad.recv()
                bad.send(data)
                reply = bad.recv(timeout=20)
                told = reply if isinstance(reply, str) else repr(unpack(reply))
                assert "Traceback" not in told and ".py" not in told
            if number % 20 == 0:
                assert good.infer(openpi_request(0.5))["actions"][0, 0] == 0.5
        with connect(run.url, compression=None, proxy=None) as text:
            text.recv()
            text.send("no msgpack at all")
            assert text.recv(timeout=20) == "requests are binary messages of msgpack"
        assert good.infer(openpi_request(0.5))["actions"][0, 0] == 0.5
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
