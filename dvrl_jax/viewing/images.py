"""Images as numbers from 0 to 255."""

import numpy as np


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Images of any shape as uint8; floating point ones are taken as 0..1, and cut off there."""
    if images.dtype == np.uint8:
        return images
    return np.round(255 * np.clip(images, 0.0, 1.0)).astype(np.uint8)
