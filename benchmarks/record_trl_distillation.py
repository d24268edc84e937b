"""Records TRL's distillation losses and gradients, for `tests/test_distillation_loss.py`.

Needs what `record_trl.py` needs.

    python benchmarks/record_trl_distillation.py        # -> tests/golden/trl_distillation.json

`full`: `GKDTrainer.generalized_jsd_loss`. `top_1` and `top_3`: the server trainer's losses over the
teacher's most likely tokens with the rest as one cell (k > 1 for the forward KL only).
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from record_trl import PACKAGES  # noqa: E402

FILE = ROOT / "tests" / "golden" / "trl_distillation.json"
M, D, D_TEACHER, V = 6, 4, 3, 9
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
TEMPERATURES = (1.0, 0.7, 2.0)


def main() -> int:
    import torch
    from trl.experimental.gkd import GKDTrainer
    from trl.experimental.server_distillation import ServerDistillationTrainer

    random = torch.Generator().manual_seed(0)
    given = {
        name: torch.randn(shape, generator=random) * 2
        for name, shape in {
            "hidden": (M, D),
            "matrix": (V, D),
            "teacher_hidden": (M, D_TEACHER),
            "teacher_matrix": (V, D_TEACHER),
        }.items()
    }
    mask = torch.tensor([True, True, False, True, False, True])
    labels = torch.where(mask, 1, -100)[None]

    def record(loss_of) -> dict:
        leaves = [given[name].clone().requires_grad_() for name in ("hidden", "matrix")]
        loss = loss_of((leaves[0] @ leaves[1].T)[None])
        loss.backward()
        return {
            "loss": loss.item(),
            "d_hidden": leaves[0].grad.tolist(),
            "d_matrix": leaves[1].grad.tolist(),
        }

    teacher = (given["teacher_hidden"] @ given["teacher_matrix"].T)[None]
    cases = []
    for beta in BETAS:
        for temperature in TEMPERATURES:
            found = record(
                lambda z, b=beta, t=temperature: GKDTrainer.generalized_jsd_loss(
                    z, teacher, labels=labels, beta=b, temperature=t
                )
            )
            cases.append({"top_k": 0, "beta": beta, "temperature": temperature} | found)
    log_p, ids = teacher.log_softmax(-1).topk(3)
    trainer = SimpleNamespace(beta=0.0, loss_top_k=3, loss_add_tail=True)
    trainer._reduce_divergence_loss = ServerDistillationTrainer._reduce_divergence_loss
    found = record(
        lambda z: ServerDistillationTrainer._compute_server_forward_kl_loss(
            trainer,
            {"topk_logprobs": log_p, "topk_token_ids": ids},
            z.log_softmax(-1),
            labels,
        )
    )
    cases.append({"top_k": 3, "beta": 0.0, "temperature": 1.0} | found)
    recorded = {
        "versions": {package: version(package) for package in PACKAGES},
        "given": {name: value.tolist() for name, value in given.items()},
        "mask": mask.tolist(),
        "cases": cases,
    }
    FILE.write_text(json.dumps(recorded) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
