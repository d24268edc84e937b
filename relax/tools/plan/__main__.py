"""What a model takes on devices that need not be there: `python -m relax.parallel plan --help`."""

import os
import sys

from relax.config.cli import run
from relax.tools.plan.config import PlanConfig, count_of


def main(config: PlanConfig) -> None:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # No device is asked for: the compiler's library would look for a TPU, and wait for it.
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # a run on this host's TPUs has it loaded, too
    topology = config.devices.topology
    if topology.startswith("cpu:"):
        flag = f"--xla_force_host_platform_device_count={count_of(topology)}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    from relax.tools.plan.plan import plan

    print("\n".join(plan(config)))


if __name__ == "__main__":
    if sys.argv[1:2] != ["plan"]:
        print("usage: python -m relax.parallel plan --help", file=sys.stderr)
        raise SystemExit(2)
    run(PlanConfig, main, sys.argv[2:])
