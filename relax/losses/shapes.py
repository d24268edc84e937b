"""Shape checks of the public functions, made when a function is traced: compiled code has none."""

import jax
import numpy as np

Array = jax.Array | np.ndarray  # functions of jax.numpy take either


def require_same_shape(ndim: int | None = None, **arrays) -> None:
    """Refuses arrays whose shapes differ, or whose number of axes is not `ndim`.

    Broadcasting would turn a wrong axis into a wrong number. None is skipped.

    Raises:
      ValueError: with the name and shape of every array.

    Example:
      >>> require_same_shape(2, values=np.zeros((3, 5)), mask=np.zeros((5, 3)))
      Traceback (most recent call last):
        ...
      ValueError: values, mask must have one shape of 2 axes, got values (3, 5), mask (5, 3).
    """
    shapes = {name: np.shape(array) for name, array in arrays.items() if array is not None}
    first = next(iter(shapes.values()))
    if any(shape != first for shape in shapes.values()) or ndim not in (None, len(first)):
        axes = "" if ndim is None else f" of {ndim} {'axis' if ndim == 1 else 'axes'}"
        got = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"{', '.join(shapes)} must have one shape{axes}, got {got}.")
