"""Where blocks and plates are put: uniformly, with room between them for the gripper."""

import numpy as np

# Objects lie in this rectangle about the middle of the table; those of the split of held-out
# positions in the wider one, the block to move outside the narrower.
WITHIN_M, WIDER_M = (0.13, 0.18), (0.17, 0.21)

# Free space between two objects; a block needs room for the fingers.
GAP_AT_BLOCK_M, GAP_BETWEEN_PLATES_M = 0.012, 0.01
FINGER_ROOM_M = 0.03
TRIES, AT_ONCE = 200_000, 500


def sample_positions(
    random: np.random.Generator,
    *,
    plates: int,
    blocks: int,
    plate_radius_m: float,
    block_half_m: float,
    within_m: tuple[float, float] = WITHIN_M,
) -> np.ndarray:
    """Positions that leave room, by rejection of whole layouts.

    Args:
      random: two numbers an object are taken from it, once for each layout tried.
      plates, blocks: how many.
      plate_radius_m, block_half_m: their sizes.
      within_m: half the sides of the rectangle, along x and y.

    Returns:
      float64[plates + blocks, 2] in m.

    Raises:
      ValueError: nothing was found.
    """
    block_radius = np.sqrt(2) * block_half_m
    radius = np.array([plate_radius_m] * plates + [block_radius] * blocks)
    is_block = np.arange(plates + blocks) >= plates
    gap = np.select(
        [is_block[:, None] & is_block, is_block[:, None] | is_block],
        [FINGER_ROOM_M, GAP_AT_BLOCK_M],
        GAP_BETWEEN_PLATES_M,
    )
    one, other = np.triu_indices(plates + blocks, 1)
    needed = (radius[:, None] + radius + gap)[one, other]
    for _ in range(TRIES // AT_ONCE):
        before = random.bit_generator.state
        layouts = random.uniform(-1, 1, (AT_ONCE, plates + blocks, 2)) * within_m
        apart = np.linalg.norm(layouts[:, one] - layouts[:, other], axis=-1)
        good = (apart > needed).all(axis=1)
        if good.any():
            first = int(good.argmax())
            # What comes after does not depend on how many layouts were drawn at once.
            random.bit_generator.state = before
            random.uniform(size=(first + 1, plates + blocks, 2))
            return layouts[first]
    raise ValueError(
        f"found no room for {blocks} blocks and {plates} plates of radius {plate_radius_m} m "
        f"in {TRIES} tries"
    )
