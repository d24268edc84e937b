"""The configuration of `relax serve`."""

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from relax.config.options import option, section
from relax.config.rules import Rule, Values
from relax.config.schema import Dtype
from relax.config.settings import Settings


@dataclass(slots=True, kw_only=True)
class ServeModelConfig:
    """Model and precision."""

    model_name_or_path: str | None = option(
        None, "Hugging Face model directory or name, or an adapter directory."
    )
    served_model_name: str | None = option(
        None, "The model's name in requests; none = that of its directory."
    )
    dtype: Dtype = option("float32", "Precision of the computation.")
    param_dtype: Dtype = option("float32", "Precision of the parameters.")
    chat_template_path: str | None = option(
        None, "Another chat template: a .jinja file or a tokenizer directory."
    )


@dataclass(slots=True, kw_only=True)
class ServerConfig:
    """Address, key and limits."""

    host: str = option("127.0.0.1", "Address to listen at; others than this machine need a key.")
    port: int = option(8000, "Port to listen at; 0 = a free one.", at_least=0, at_most=65535)
    api_key: str | None = option(
        None, "Key that requests must bring; none = RELAX_API_KEY of the environment, or none."
    )
    max_slots: int = option(8, "Completions decoded at a time.", at_least=1)
    max_queue_size: int = option(
        64, "Completions that may wait for a slot; beyond, requests get 429.", at_least=0
    )
    max_model_len: int | None = option(
        None, "Maximum tokens of a prompt and its completion; none = the model's.", at_least=2
    )
    enable_prefix_caching: bool = option(
        True, "Continue what earlier requests left in free slots, such as the turns of a chat."
    )
    max_body_bytes: int = option(8 * 2**20, "Maximum bytes of a request.", at_least=1)


def _problems(v: Values) -> Iterator[str]:
    if v["model_name_or_path"] is None:
        yield "model_name_or_path must name a model, got none"
    host = v["host"]
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if host != "localhost":
            yield f"host must be localhost or an IP address, such as 0.0.0.0, got {host!r}"
    if v["api_key"] is not None and not (v["api_key"].isascii() and v["api_key"].isprintable()):
        yield "api_key must be printable ASCII characters"


@dataclass(slots=True, kw_only=True)
class ServeConfig(Settings):
    """Serve a model to clients of OpenAI's API."""

    algorithm: ClassVar[str] = "serve"
    positional: ClassVar[str] = "model_name_or_path"
    examples: ClassVar[tuple[str, ...]] = (
        "DIR",
        "DIR --host 0.0.0.0 --port 8000 --api_key KEY",
    )
    shared_rules: ClassVar[tuple[Rule, ...]] = (_problems,)

    model: ServeModelConfig = section(ServeModelConfig)
    server: ServerConfig = section(ServerConfig)
