"""Batched generation with a key-value cache, in one compiled loop."""

from relax.sampling.config import SamplingConfig
from relax.sampling.generate import generate
from relax.sampling.output import SampleOutput
from relax.sampling.stops import stop_decoder

__all__ = ["SampleOutput", "SamplingConfig", "generate", "stop_decoder"]
