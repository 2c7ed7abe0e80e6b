"""`lara check-golden`: every golden file passes, and one changed number makes it fail.

Pads: the reference's action expert reads hidden states at pads, and PyTorch's fused attention gives
those rows a wrong gradient. Both are reproduced (see `lara_jax.interop.golden`), so that no output
is left out. The one exception is the plain M-RoPE pass, whose rows at pads nobody reads; there its
numbers mean nothing and are not compared.
"""

import dataclasses
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lara_jax.interop import golden
from lara_jax.interop.golden import Golden, compare, relative_error, run

NAMES = ("k0_one_view", "k1_one_view", "k3_no_pads", "k3_two_views", "k6_nonsquare")


@cache
def case(path: Path) -> tuple[Golden, dict[str, np.ndarray]]:
    read = Golden.read(path)
    return read, run(read)


@pytest.fixture
def small(shared_dir: Path) -> tuple[Golden, dict[str, np.ndarray]]:
    return case(shared_dir / "golden" / "latent_k1_one_view.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_output_agrees(shared_dir: Path, name: str):
    results = list(compare(*case(shared_dir / "golden" / f"latent_{name}.safetensors")))
    assert len(results) > 55
    assert [r for r in results if not r.ok] == []


@pytest.mark.slow
def test_one_changed_number_in_any_output_fails(small):
    """A typical number of each output and gradient, changed by one per cent."""
    read, ours = small
    passed = []
    for name in (n for n in read.arrays if n.startswith(("out.", "grad."))):
        if name.endswith("attn1.to_k.bias"):
            continue  # zero but for rounding: has no typical number
        value = read.arrays[name].copy()
        flat = value.reshape(-1)
        place = np.argsort(np.abs(flat))[len(flat) // 2 :][0]
        if value.dtype == np.int64:
            flat[place] += 1
        else:
            flat[place] += 0.01 * max(abs(flat[place]), np.sqrt(np.mean(flat**2)))
        valid = read.arrays["in.attention_mask"] > 0
        if name.startswith("out.plain") and not valid.reshape(-1)[place // value.shape[-1]]:
            continue  # a row at a pad, which nobody reads
        changed = dataclasses.replace(read, arrays={**read.arrays, name: value})
        if all(result.ok for result in compare(changed, ours)):
            passed.append(name)
    assert passed == []


@pytest.mark.slow
def test_one_changed_weight_fails(small):
    read, _ = small
    name = "vlm.model.language_model.layers.2.mlp.up_proj.weight"
    value = read.arrays[name].copy()
    value[5, 7] += 0.5
    changed = dataclasses.replace(read, arrays={**read.arrays, name: value})
    assert any(not result.ok for result in compare(changed, run(changed)))


@pytest.mark.slow
def test_command_fails_on_a_changed_file(small, tmp_path, capsys, monkeypatch):
    read, ours = small
    value = read.arrays["out.predicted_actions"].copy()
    value[0, 0, 0] *= 1.01
    path = tmp_path / "changed.safetensors"
    meta = {key: json.dumps(entry) for key, entry in read.meta.items()}
    save_file({**read.arrays, "out.predicted_actions": value}, path, metadata=meta)
    monkeypatch.setattr(golden, "run", lambda _: ours)
    assert golden.main([str(read.path)]) == 0
    assert golden.main([str(read.path), str(path)]) == 1
    out = capsys.readouterr().out.splitlines()
    over = [line for line in out if "OVER" in line]
    assert len(over) == 1 and "changed.safetensors  out.predicted_actions" in over[0]
    assert "FAILED" in out[-1]


def test_relative_error():
    theirs = np.array([1.0, -2.0, 0.0, 0.01])
    assert relative_error(theirs, theirs) == 0
    rms = np.sqrt(np.mean(theirs**2))
    np.testing.assert_allclose(relative_error(theirs + np.array([0, 0, 0, 0.1]), theirs), 0.1 / rms)
    np.testing.assert_allclose(relative_error(theirs + np.array([0, 0.2, 0, 0]), theirs), 0.1)
    assert relative_error(np.zeros(2), np.zeros(2)) == 0
    assert not golden.Comparison("x", relative_error(theirs * np.nan, theirs), 1.0).ok


def test_refuses_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors does not exist"):
        Golden.read(tmp_path / "nothing.safetensors")
    (tmp_path / "text").write_text("no safetensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        Golden.read(tmp_path / "text")
    save_file({"x": np.zeros(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=r"lacks action_head, grid, latents"):
        Golden.read(tmp_path / "plain.safetensors")


def test_refuses_a_file_that_lacks_something(small, tmp_path):
    """Otherwise a file without outputs would pass, with nothing compared."""
    read, _ = small
    meta = {key: json.dumps(entry) for key, entry in read.meta.items()}
    for name in ("out.hidden_states", "in.time"):
        rest = {key: value for key, value in read.arrays.items() if key != name}
        save_file(rest, tmp_path / "less.safetensors", metadata=meta)
        with pytest.raises(ValueError, match=f"it lacks {name}"):
            Golden.read(tmp_path / "less.safetensors")
    arrays = {**read.arrays, "in.image_grid_thw": read.arrays["in.image_grid_thw"] + 2}
    save_file(arrays, tmp_path / "grid.safetensors", metadata=meta)
    with pytest.raises(
        ValueError, match=r"in\.image_grid_thw is .* metadata's grid is \[1, 4, 4\]"
    ):
        Golden.read(tmp_path / "grid.safetensors")
    meta["text_config"] = json.dumps({"vocab_size": 3})
    save_file(dict(read.arrays), tmp_path / "meta.safetensors", metadata=meta)
    with pytest.raises(ValueError, match="its metadata lacks 'hidden_size'"):
        Golden.read(tmp_path / "meta.safetensors")
