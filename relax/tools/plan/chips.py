"""Peak rates of TPUs as published by their maker, for estimates."""

from typing import NamedTuple


class Chip(NamedTuple):
    """The peak rates of one device.

    Attributes:
      flops: dense bfloat16 FLOPs per second.
      memory: bytes.
      bandwidth: memory bandwidth, bytes per second.
      link: bytes per second to the neighbours along one axis of the mesh, both directions.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float


# Google Cloud TPU documentation; links as in Austin et al., How to Scale Your Model, 2025.
CHIPS = {
    "v4": Chip(275e12, 32e9, 1.2e12, 9e10),
    "v5e": Chip(197e12, 16e9, 8.1e11, 9e10),
    "v5p": Chip(459e12, 96e9, 2.8e12, 1.8e11),
    "v6e": Chip(918e12, 32e9, 1.6e12, 1.8e11),
}
