"""Zero-shot detection with tiny random checkpoints of two model families."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.annotate.zero_shot_detection import ZeroShotDetector

pytestmark = pytest.mark.torch

IMAGES = [np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8) for seed in range(3)]
PHRASES = ["red block", "plate", "a spoon"]


@pytest.fixture(scope="module", params=["owlvit", "owlv2"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    import transformers

    path = tmp_path_factory.mktemp(request.param)
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    (path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(
        vocab=str(path / "vocab.json"), merges=str(path / "merges.txt"), model_max_length=16
    )
    name = {"owlvit": "OwlViT", "owlv2": "Owlv2"}[request.param]
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    config = getattr(transformers, f"{name}Config")(
        text_config={**small, "vocab_size": len(vocabulary), "max_position_embeddings": 16,
                     "bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForObjectDetection")(config)
    with torch.no_grad():  # so that neither scores nor boxes are all 0 or 1
        for parameter in (
            *model.class_head.logit_scale.parameters(),
            *model.class_head.logit_shift.parameters(),
            *model.box_head.dense2.parameters(),
        ):
            parameter.mul_(0.01)
    model.save_pretrained(path)
    size = {"height": 32, "width": 32}
    images = getattr(transformers, f"{name}ImageProcessor")(size=size, crop_size=size)
    getattr(transformers, f"{name}Processor")(images, tokenizer).save_pretrained(path)
    return path


def test_best_box_of_each_phrase(checkpoint: Path) -> None:
    found = ZeroShotDetector(str(checkpoint), threshold=1e-6).boxes(IMAGES, PHRASES)
    assert [len(boxes) for boxes in found] == [3] * 3
    for boxes in found:
        for box in boxes:
            assert box is not None
            x1, y1, x2, y2 = box
            assert 0 <= x1 <= x2 <= 1 and 0 <= y1 <= y2 <= 1
    # A pair's answer does not depend on what else is asked.
    alone = ZeroShotDetector(str(checkpoint), threshold=1e-6, batch_size=1)
    np.testing.assert_allclose(alone.boxes(IMAGES[1:2], PHRASES[1:]), [found[1][1:]], atol=1e-5)


def test_box_is_the_models_best(checkpoint: Path) -> None:
    """Against the model's own numbers: the box of the highest logit, in fractions of the image."""
    import torch
    import transformers

    (found,) = ZeroShotDetector(str(checkpoint), threshold=1e-6).boxes(IMAGES[:1], PHRASES[:1])
    processor = transformers.AutoProcessor.from_pretrained(checkpoint)
    model = transformers.AutoModelForZeroShotObjectDetection.from_pretrained(checkpoint).eval()
    inputs = processor(images=IMAGES[0], text=[PHRASES[:1]], return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    x, y, width, height = outputs.pred_boxes[0, outputs.logits[0, :, 0].argmax()].tolist()
    box = np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    if "owlv2" in str(checkpoint):  # it sees the image padded to a square, 32 x 32 of 24 x 32
        box *= np.array([1, 32 / 24, 1, 32 / 24])
    np.testing.assert_allclose(found[0], box.clip(0, 1), atol=1e-5)


def test_nothing_over_the_threshold(checkpoint: Path) -> None:
    found = ZeroShotDetector(str(checkpoint), threshold=0.99).boxes(IMAGES[:1], PHRASES)
    assert found == [[None, None, None]]


def test_name_follows_checkpoint_and_threshold(checkpoint: Path) -> None:
    names = {ZeroShotDetector(str(checkpoint), threshold=t).name for t in (0.1, 0.1, 0.2)}
    assert len(names) == 2


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no detector checkpoint"):
        ZeroShotDetector(str(tmp_path))
    with pytest.raises(ValueError, match=r"threshold is 1\.5"):
        ZeroShotDetector(str(tmp_path), threshold=1.5)
