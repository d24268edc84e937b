"""lm_eval's scores of a model by our class `relax` and by lm_eval's own class `hf`, side by side.

    python benchmarks/harness.py MODEL_DIR [--rows 12] [--chat true] [--batch_size 8]

Needs `lm_eval` and torch. The tasks are made here: sums with four choices each, completions after
three examples, and the pages of docs/ as texts, some longer than the context of 256 tokens. Both
classes compute in float32 on the CPU. Printed are all scores, how far apart the log-likelihoods of
samples are at most, and how many completions differ.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

CONTEXT = 256
DOCS = Path(__file__).resolve().parents[1] / "docs"
COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
"""
TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "completions": """
output_type: generate_until
doc_to_text: "1 + 1 = 2\\n7 + 5 = 12\\n20 + 9 = 29\\n{{question}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
}


def write_tasks(directory: Path, count: int) -> None:
    """Writes the YAML files of all tasks and their rows."""
    pages = [path.read_text()[:1500] for path in sorted(DOCS.glob("*.md"))]
    rows = []
    for i in range(count):
        a, b = 3 + 7 * i % 50, 2 + 11 * i % 40
        sums = [a + b + off for off in (0, 1, 10, -2)]
        place = i % 4
        choices = [str(n) for n in sums[-place:] + sums[:-place]]
        rows.append({"question": f"{a} + {b} =", "choices": choices, "answer": place,
                     "target": str(a + b), "text": pages[i % len(pages)]})  # fmt: skip
    file = directory / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (directory / f"{name}.yaml").write_text(
            f"task: made_{name}" + text + COMMON.replace("FILE", str(file))
        )


def main(model: str, count: int, chat: bool, batch_size: int) -> None:
    import lm_eval
    import numpy as np
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from relax.engine.tasks.harness_tasks import model_class

    options = {"batch_size": batch_size, "max_length": CONTEXT}
    makers = {
        "relax": lambda: model_class()(model, **options),
        "hf": lambda: HFLM(model, dtype="float32", device="cpu", **options),
    }
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
        write_tasks(Path(folder), count)
        manager = TaskManager(include_defaults=False, include_path=folder)
        for name, make in makers.items():
            begin = time.perf_counter()
            found[name] = lm_eval.evaluate(
                lm=make(), task_dict=manager.load([f"made_{task}" for task in TASKS]),
                bootstrap_iters=0, apply_chat_template=chat, fewshot_as_multiturn=chat,
            )  # fmt: skip
            print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
    for task, scores in found["hf"]["results"].items():
        ours = found["relax"]["results"][task]
        for metric in [m for m in scores if m.endswith(",none") and "stderr" not in m]:
            print(f"{task} {metric.partition(',')[0]}: relax {ours[metric]:.6f}, "
                  f"hf {scores[metric]:.6f}")  # fmt: skip
        pairs = [
            [np.ravel(sample["filtered_resps"]) for sample in found[name]["samples"][task]]
            for name in ("relax", "hf")
        ]
        if task == "made_completions":
            apart = sum(a.tolist() != b.tolist() for a, b in zip(*pairs, strict=True))
            print(f"{task}: {apart} of {count} completions differ")
            continue
        a, b = (np.concatenate(samples).astype(np.float64) for samples in pairs)
        print(f"{task}: {len(a)} numbers, at most {np.abs(a - b).max():.1e} apart, "
              f"the largest {np.abs(b).max():.1f}")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model_dir")
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--chat", choices=("true", "false"), default="false")
    parser.add_argument("--batch_size", type=int, default=8)
    given = parser.parse_args()
    main(given.model_dir, given.rows, given.chat == "true", given.batch_size)
