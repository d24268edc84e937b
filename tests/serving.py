"""A server for tests, and clients of it that are nothing but HTTP."""

import contextlib
import http.client
import json
import threading
from types import SimpleNamespace
from urllib.parse import urlsplit

from relax.sampling import RequestRow
from relax.serving import Endpoint
from relax.serving.app import make_app
from relax.serving.server import listen, running

TOOLS_TEMPLATE = """\
{%- for tool in tools or [] -%}<system>{{ tool | tojson }}{%- endfor -%}
{%- for message in messages -%}
{{ '<' + message['role'] + '>' }}{{ message['content'] or '' }}
{%- for call in message.get('tool_calls') or [] -%}
<tool_call>{{ call['function'] | tojson }}</tool_call>{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<assistant>' }}{%- endif -%}"""


class Scripted:
    """In place of a sampler: writes a text, so many tokens at a time as it is allowed to.

    Each call of `advance` waits for a permission, of which there are any number by default.
    """

    def __init__(self, tokenizer, text, slots=2, eos=1, room=1000, step=3):
        self.model = SimpleNamespace(config=SimpleNamespace(vocab_size=261))
        self.ids = [*tokenizer(text)["input_ids"], eos]
        self.slots, self.eos, self.room, self.why = [None] * slots, (eos,), room, "of the script"
        self.step, self.rows, self.permits = step, [], None
        self.cancelled = 0

    def submit(self, request):
        self.rows.append(RequestRow(request, request.prompt))
        return self.rows[-1]

    def cancel(self, row):
        row.reason = "cancelled"
        self.cancelled += 1

    def reset(self):
        self.rows.clear()

    def advance(self):
        if self.permits is not None:
            self.permits.acquire(timeout=5)
        self.rows = [row for row in self.rows if row.reason is None]
        taken = []
        for row in self.rows[: len(self.slots)]:
            first = len(row.tokens)
            new = self.ids[first : min(first + self.step, row.request.max_new_tokens)]
            row.tokens += new
            row.logprobs += [-0.5] * len(new)
            row.sampled_logprobs += [-0.25] * len(new)
            if row.tokens[-1] in self.eos:
                row.reason = "eos"
            elif len(row.tokens) >= row.request.max_new_tokens:
                row.reason = "length"
            taken.append((row, len(new)))
        return taken


@contextlib.contextmanager
def serving(sampler, tokenizer, name="tiny", *, max_queue_size=64, sessions=None, **options):
    """The URL of a running server, and its endpoint."""
    endpoint = Endpoint(sampler, tokenizer, name, max_queue_size=max_queue_size)
    app = make_app(endpoint, sessions=sessions, **options)
    try:
        with listen("127.0.0.1", 0) as sock, running(app, sock) as url:
            yield url, endpoint
            endpoint.worker.close()  # answers under way end before the server waits for them
    finally:
        endpoint.close()


def connect(url):
    return http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)


def call(url, path, body=None, headers=(), method=None):
    """Status and object of an answer; a body that is bytes is sent as it is."""
    connection = connect(url)
    raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    head = {"content-type": "application/json"} | dict(headers)
    connection.request(method or ("GET" if raw is None else "POST"), path, raw, head)
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


def chat(url, **fields):
    body = {"messages": [{"role": "user", "content": "2+2="}]} | fields
    return call(url, "/v1/chat/completions", body)


def events(url, path, body):
    """The objects of a stream."""
    connection = connect(url)
    connection.request(
        "POST", path, json.dumps(body | {"stream": True}), {"content-type": "application/json"}
    )
    answer = connection.getresponse()
    assert answer.getheader("content-type").startswith("text/event-stream"), answer.read()
    lines = [line for line in answer.read().decode().split("\n\n") if line]
    connection.close()
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def together(function, count):
    """Results of a function of 0, 1, ... called by that many threads at once."""
    results = [None] * count
    barrier = threading.Barrier(count)

    def one(i):
        barrier.wait()
        results[i] = function(i)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
