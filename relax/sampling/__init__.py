"""Batched generation with a key-value cache, in one compiled loop."""

from relax.sampling.config import SamplingConfig
from relax.sampling.generate import generate
from relax.sampling.output import SampleOutput
from relax.sampling.requests import Request, RequestRow, Requests
from relax.sampling.session import Session
from relax.sampling.stops import stop_decoder

__all__ = [
    "Request",
    "RequestRow",
    "Requests",
    "SampleOutput",
    "SamplingConfig",
    "Session",
    "generate",
    "stop_decoder",
]
