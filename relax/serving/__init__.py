"""An endpoint in the form of OpenAI's API over the slots of one sampler.

`relax.serving.app` and `relax.serving.server` need the extra `serve`: starlette and uvicorn.
"""

from relax.serving.endpoint import Endpoint
from relax.serving.errors import ApiError

__all__ = ["ApiError", "Endpoint"]
