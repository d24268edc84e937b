"""The code and commands of README, docs and the notebook, and the files that they assume.

`python tests/doc_code.py` runs the notebook and writes down what it prints.
"""

import contextlib
import io
import json
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def snippets(page: Path) -> list[str]:
    """The Python of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The words of every command in a page's shell blocks, comments off, lines joined."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [command for command in words if command]


def write_files(folder: Path) -> None:
    """The files that pages name."""
    sums = [(a, b) for a in range(1, 7) for b in range(1, 5)]
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a, b in sums]
    pairs = [
        {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 1)} for a, b in sums
    ]
    prompts = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in sums]
    for name, some in (("rows", rows), ("pairs", pairs), ("prompts", prompts)):
        text = "".join(json.dumps(row) + "\n" for row in some)
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "FILE.jsonl").write_text((folder / "rows.jsonl").read_text())
    (folder / "PAIRS.jsonl").write_text((folder / "pairs.jsonl").read_text())
    (folder / "rewards.py").write_text(
        "def politeness(completions, **columns):\n"
        "    return [float('please' in text) for text in completions]\n"
    )


def write_runs(folder: Path) -> None:
    """The directories of runs that pages look at."""
    for name in ("sft", "a", "b"):
        run = folder / "outputs" / name
        run.mkdir(parents=True)
        (run / "status.json").write_text('{"phase": "finished", "step": 2, "total_steps": 2}')
        (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')


def run_notebook(names: dict) -> list[str]:
    """Runs the cells of the notebook; what each of them printed."""
    printed = []
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile("".join(cell["source"]), "quickstart.ipynb", "exec"), names)
            printed.append(out.getvalue())
    return printed


def main() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    printed = iter(run_notebook({}))
    count = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            text = next(printed)
            cell["execution_count"] = count
            lines = text.splitlines(keepends=True)
            stream = {"name": "stdout", "output_type": "stream", "text": lines}
            cell["outputs"] = [stream] if text else []
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
