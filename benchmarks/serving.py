"""Requests side by side: `python benchmarks/serving.py MODEL_DIR`.

The endpoint of `relax serve` with 8 slots, in this process, and clients that are nothing but HTTP.
Rounds in turns: 8 requests one after another by one client, and 8 requests by 8 clients at once;
each prompt has about 20 tokens and each answer `new` ones. Requests are greedy, and their answers
must be equal. Prints tokens per second of both, and their ratio, which is what to compare: times on
shared machines vary.

It needs the extra `serve`.
"""

import http.client
import json
import statistics
import threading
import time
from urllib.parse import urlsplit

import fire

CLIENTS = 8


def main(model_dir: str, new: int = 32, rounds: int = 3, dtype: str = "float32") -> None:
    """Prints the speeds and the ratio."""
    import jax.numpy as jnp

    from relax.engine.model_source import ModelSource
    from relax.sampling import Requests, stop_decoder
    from relax.serving import Endpoint
    from relax.serving.app import make_app
    from relax.serving.server import listen, running

    source = ModelSource.find(model_dir)
    tokenizer = source.tokenizer()
    model, params = source.load(jnp.dtype(dtype))
    # Without end tokens every answer has `new` tokens.
    sampler = Requests(model, params, (), stop_decoder(tokenizer), slots=CLIENTS)
    endpoint = Endpoint(sampler, tokenizer, None)
    with listen("127.0.0.1", 0) as sock, running(make_app(endpoint), sock) as url:
        ask = [
            _client(url, f"{i}: The history of the number {i} begins with", new) for i in range(8)
        ]
        expected = [one() for one in ask]  # compiles
        alone, beside = [], []
        for _ in range(rounds):
            start_s = time.monotonic()
            found = [one() for one in ask]
            alone.append(time.monotonic() - start_s)
            start_s = time.monotonic()
            together = _at_once(ask)
            beside.append(time.monotonic() - start_s)
            assert found == together == expected, "an answer depends on those beside it"
        endpoint.worker.close()
    endpoint.close()
    tokens = CLIENTS * new
    ratios = [a / b for a, b in zip(alone, beside, strict=True)]
    print(f"1 client: {tokens / statistics.median(alone):.1f} tokens/s")
    print(f"{CLIENTS} clients: {tokens / statistics.median(beside):.1f} tokens/s")
    print(f"ratio: {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")


def _client(url: str, prompt: str, new: int):
    body = json.dumps({"prompt": prompt, "max_tokens": new, "temperature": 0})

    def ask() -> str:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=600)
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        connection.close()
        assert answer["usage"]["completion_tokens"] == new
        return answer["choices"][0]["text"]

    return ask


def _at_once(ask) -> list[str]:
    found = [""] * len(ask)

    def one(i: int) -> None:
        found[i] = ask[i]()

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(ask))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


if __name__ == "__main__":
    fire.Fire(main)
