"""Are latent thoughts alive? Numbers on hidden states that should neither collapse nor stand still.

    effective rank   along how many directions they vary: 1 where all lie on a line, n where n
                     directions carry equally much
    cosine           how alike the slots of one row are: 1 where they all say the same
    drift            how far a row's slots have turned since the evaluation before
    nearest          which frame's features an imagined frame comes closest to

Letters: N rows, K slots, D width.
"""

import numpy as np


def effective_rank(vectors: np.ndarray) -> float:
    """exp of the entropy of the normalised singular values, of vectors less their mean.

    Args:
      vectors: float[M, D], M at least 2.

    Returns:
      1 to min(M - 1, D); 1, too, where all vectors are the same.

    Source: Roy and Vetterli, The effective rank: a measure of effective dimensionality (EUSIPCO
    2007), definition 1. The mean is taken off: hidden states share a large one, which says nothing.
    """
    if vectors.ndim != 2 or len(vectors) < 2:
        raise ValueError(f"vectors must be [M, D] with M at least 2, got {list(vectors.shape)}")
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    values = np.linalg.svd(centred, compute_uv=False)
    # What rounding alone leaves of equal vectors is nothing.
    values = values[values > 1e-7 * max(np.abs(vectors).max(), 1e-30)]
    share = values / values.sum() if len(values) else np.ones(1)
    return float(np.exp(-(share * np.log(share)).sum()))


def slot_cosine(slots: np.ndarray) -> float:
    """Mean cosine of the angle between two slots of a row, over all pairs and rows.

    Args:
      slots: float[N, K, D], K at least 2.
    """
    if slots.ndim != 3 or slots.shape[1] < 2:
        raise ValueError(f"slots must be [N, K, D] with K at least 2, got {list(slots.shape)}")
    unit = _unit(slots)
    cosines = unit @ unit.swapaxes(1, 2)
    return float(cosines[:, *np.triu_indices(slots.shape[1], k=1)].mean())


def drift(now: np.ndarray, before: np.ndarray) -> float:
    """1 - cosine of the angle between a slot and its earlier self, mean over slots and rows.

    Args:
      now, before: float[N, K, D], of the same rows.
    """
    if now.shape != before.shape:
        raise ValueError(f"slots now are {list(now.shape)}, before {list(before.shape)}")
    return float(1 - (_unit(now) * _unit(before)).sum(axis=-1).mean())


def nearest(imagined: np.ndarray, features: np.ndarray) -> np.ndarray:
    """The row whose features are nearest to each imagined frame, by mean absolute difference.

    Args:
      imagined: float[N, ...], what row n expects to see next.
      features: float[N, ...], what the teacher sees in row n's next frame.

    Returns:
      int64[N]; n at place n where the imagined frame is closer to its own than to any other.
    """
    if imagined.shape != features.shape:
        raise ValueError(f"imagined is {list(imagined.shape)}, features {list(features.shape)}")
    return nearest_of(imagined, features)


def nearest_of(imagined: np.ndarray, features: np.ndarray) -> np.ndarray:
    """The frame whose features are nearest to each imagined one, by mean absolute difference.

    Args:
      imagined: float[N, ...].
      features: float[M, ...] of M frames, of the same shape each.

    Returns:
      int64[N], numbers of frames.
    """
    if imagined.shape[1:] != features.shape[1:]:
        raise ValueError(f"imagined is {list(imagined.shape)}, features {list(features.shape)}")
    flat = features.reshape(len(features), -1).astype(np.float32)
    rows = imagined.reshape(len(imagined), -1).astype(np.float32)
    return np.array([np.abs(flat - row).mean(axis=1).argmin() for row in rows], np.int64)


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-30)
