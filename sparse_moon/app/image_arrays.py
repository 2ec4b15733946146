"""Images and labels in NumPy arrays and ``.npz`` archives."""

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def read_npz(path: Path, *alternatives: tuple[str, ...]) -> list[np.ndarray]:
    """The arrays of the first alternative whose keys are all there.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or has other arrays.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: damaged, or not an .npz archive")
    try:
        with np.load(path, allow_pickle=False) as file:
            for keys in alternatives:
                if set(keys) <= set(file.files):
                    # Of a member that is no array, NumPy gives the bytes.
                    return [np.asarray(file[key]) for key in keys]
            found = file.files
    except Exception as error:  # a damaged archive raises nearly anything, up to MemoryError for absurd shapes
        raise ValueError(f"{path}: damaged, or not an .npz archive of plain arrays: {error}") from error
    expected = " or ".join(", ".join(keys) for keys in alternatives)
    raise ValueError(f"{path}: expected the arrays {expected}, got {', '.join(found) or 'none'}")


def pixels(array: np.ndarray, where: str) -> Tensor:
    """Images as uint8 (N, C, H, W).

    Args:
        array: (N, H, W), (N, H, W, C) or (N, C, H, W), C 1 or 3, uint8 or floating point in [0, 1].
        where: what errors begin with.

    Raises:
        ValueError: another shape or type, no images, or values outside [0, 1].
    """
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    elif array.ndim != 4 or array.shape[1] not in (1, 3):
        raise ValueError(f"{where}: expected (N, H, W), (N, H, W, 1 or 3) or (N, 1 or 3, H, W), got {array.shape}")
    if array.size == 0:
        raise ValueError(f"{where}: no images, shape {array.shape}")
    if np.issubdtype(array.dtype, np.floating):
        if not ((array >= 0) & (array <= 1)).all():
            raise ValueError(f"{where}: expected floating point in [0, 1], got {array.min()} to {array.max()}")
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"{where}: expected uint8 or floating point in [0, 1], got {array.dtype}")
    return torch.from_numpy(np.ascontiguousarray(array))


def labels(array: np.ndarray, count: int, where: str) -> Tensor:
    """Labels as int64 (count,), from integers (count,) or (count, 1).

    Raises:
        ValueError: another shape or type.
    """
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{where}: expected integer labels, got {array.dtype}")
    if array.shape not in ((count,), (count, 1)):
        raise ValueError(f"{where}: expected shape ({count},) or ({count}, 1) as there are images, got {array.shape}")
    return torch.from_numpy(array.reshape(count).astype(np.int64))
