"""Serves a model to clients of OpenAI's API."""

import os
import sys

import jax
import jax.numpy as jnp

from relax.data import Limits
from relax.engine.model_source import ModelSource
from relax.errors import ConfigError
from relax.sampling import Request, Requests, stop_decoder
from relax.serving import Endpoint
from relax.tools.serve.config import ServeConfig


def serve(config: ServeConfig) -> None:
    """Loads a model and serves it until Ctrl-C or SIGTERM.

    Raises:
      ConfigError: the packages of the extra `serve` are missing, the address is not free, or a key
        is missing.
    """
    s = config.server
    try:
        from relax.serving import server
        from relax.serving.app import make_app
    except ImportError as error:
        raise ConfigError(
            f"serving needs the packages starlette and uvicorn, and {error.name} is not "
            "installed: pip install 'relax-trainers[serve]'."
        ) from error
    api_key = s.api_key or os.environ.get("RELAX_API_KEY") or None
    local = server.is_loopback(s.host)
    if not local and api_key is None:
        raise ConfigError(
            f"host {s.host} can be reached from other machines, which needs a key: give --api_key, "
            "or RELAX_API_KEY in the environment, or leave host out."
        )
    sock = server.listen(s.host, s.port)
    with sock:
        endpoint = _endpoint(config)
        app = make_app(
            endpoint,
            api_key=api_key,
            max_body_bytes=s.max_body_bytes,
            local_only=local and api_key is None,
        )
        where = f"{server.address(sock)}/v1"
        try:
            server.run(
                app,
                endpoint,
                sock,
                lambda: print(f"{endpoint.name!r} is served at {where}", flush=True),
            )
        finally:
            endpoint.close()
    print("stopped", file=sys.stderr)


def _endpoint(config: ServeConfig) -> Endpoint:
    m, s = config.model, config.server
    assert m.model_name_or_path is not None  # guaranteed by the rules of the configuration
    source = ModelSource.find(m.model_name_or_path)
    tokenizer = source.tokenizer(m.chat_template_path)
    source.check_tokens(tokenizer)
    model, params = source.load(jnp.dtype(m.dtype), param_dtype=jnp.dtype(m.param_dtype))
    sampler = Requests(
        model,
        params,
        source.end_tokens(tokenizer),
        stop_decoder(tokenizer),
        slots=s.max_slots,
        max_length=s.max_model_len,
        prefix_caching=s.enable_prefix_caching,
    )
    # The first compilation takes a while: the server is ready when it can answer.
    row = sampler.submit(Request([0], jax.random.key(0), 1))
    while row.reason is None:
        sampler.advance()
    return Endpoint(
        sampler,
        tokenizer,
        m.served_model_name or source.files.resolve().name,
        max_queue_size=s.max_queue_size,
        limits=Limits(max_row_bytes=s.max_body_bytes),
    )
