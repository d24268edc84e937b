"""The command `relax`, and `python -m relax`: every algorithm and every program by its name."""

import os
import sys
from collections.abc import Sequence
from typing import Any

from relax import __version__
from relax.config import (
    DistillConfig,
    DPOConfig,
    GRPOConfig,
    OnlineDPOConfig,
    PPOConfig,
    RewardModelConfig,
    SFTConfig,
)
from relax.config.cli import run, say
from relax.config.names import suggestion
from relax.tools.evaluate.config import EvalConfig
from relax.tools.export.config import ExportConfig
from relax.tools.merge.config import MergeConfig
from relax.tools.plan.config import PlanConfig, count_of
from relax.tools.sample.config import SampleConfig
from relax.tools.serve.config import ServeConfig

USAGE = "usage: relax COMMAND [--flag VALUE ...]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the first argument names.

    Args:
      arguments: the name of a command and its own arguments; None: those of the process.

    Returns:
      The exit code; 2 if there is no such command.

    Raises:
      SystemExit: see `relax.config.cli.run`.
    """
    name, *rest = [*(sys.argv[1:] if arguments is None else arguments)] or ["--help"]
    if name in ("--help", "-h", "help"):
        say(overview())
    elif name == "--version":
        print(f"relax {__version__}")
    elif name == "distill" and rest[:1] == ["prepare"]:
        words = ("relax", "distill", "prepare")
        run(DistillConfig, _prepare_logprobs, rest[1:], words, ends_process=arguments is None)
    elif name in CONFIGURED:
        run(*CONFIGURED[name], rest, ("relax", name), ends_process=arguments is None)
    elif name in PROGRAMS:
        try:
            return PROGRAMS[name][1](rest)
        except KeyboardInterrupt:
            return 130
    else:
        known = [*CONFIGURED, *PROGRAMS]
        hint = suggestion(name, known, prefix="relax ", cutoff=0.5)
        print(f"error: there is no command {name!r}.{hint}", file=sys.stderr)
        print(f"The commands are {', '.join(known)}; see relax --help.", file=sys.stderr)
        return 2
    return 0


def overview() -> str:
    """The list of all commands, which `relax --help` prints."""
    lines = [USAGE, "", "Post-train language models in JAX.", "", "commands:"]
    about = {name: config.__doc__ or "" for name, (config, _) in CONFIGURED.items()}
    about |= {name: text for name, (text, _) in PROGRAMS.items()}
    lines += [f"  {name + ' ':9}{text}" for name, text in about.items()]
    lines += ["", "relax COMMAND --help lists the flags of a command; relax --version the version."]
    return "\n".join(lines)


def _train(config: Any) -> None:
    from relax.engine import TrainerEngine, prepare_process

    prepare_process()
    TrainerEngine().run_job(config)


def _prepare_logprobs(config: DistillConfig) -> None:
    from relax.engine import prepare_process
    from relax.engine.recipes.distill_prepare import prepare_logprobs

    prepare_process()
    prepare_logprobs(config)


def _sample(config: SampleConfig) -> None:
    _prepare()
    from relax.tools.sample.sample import sample

    sample(config)


def _plan(config: PlanConfig) -> None:
    # Without a device; the compiler's library would otherwise wait for a TPU.
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # a run on this host's TPUs may have loaded it
    topology = config.devices.topology
    if topology.startswith("cpu:"):
        flag = f"--xla_force_host_platform_device_count={count_of(topology)}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from relax.tools.plan.plan import plan

    print("\n".join(plan(config)))


def _merge(config: MergeConfig) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # the arithmetic is numpy's
    _prepare()
    from relax.tools.merge.merge import merge

    print(f"the merged model is in '{merge(config)}'")


def _export(config: ExportConfig) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    _prepare()
    from relax.tools.export.export import export, upload

    if config.export.to == "hub":
        address = upload(config)
        print("dry run: nothing was uploaded" if address is None else f"uploaded: {address}")
        return
    path, notes = export(config)
    print(*(f"note: {note}" for note in notes), f"the model is in '{path}'", sep="\n")


def _eval(config: EvalConfig) -> None:
    _prepare()
    from relax.tools.evaluate.evaluate import evaluate

    evaluate(config)


def _serve(config: ServeConfig) -> None:
    _prepare()
    from relax.tools.serve.serve import serve

    serve(config)


def _prepare() -> None:
    """Sets up the process before jax starts its threads."""
    # transformers would warn that PyTorch is missing, which is not needed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from relax.parallel.cpu import prepare_cpu

    prepare_cpu()


def _gguf(arguments: Sequence[str]) -> int:
    from relax.tools.gguf.program import main

    return main(arguments)


def _lm_eval(arguments: Sequence[str]) -> int:
    _prepare()
    from relax.engine.tasks.harness_tasks import run_lm_eval

    return run_lm_eval(arguments)


def _data(arguments: Sequence[str]) -> int:
    from relax.tools.convert import main

    return main(arguments)


def _report(arguments: Sequence[str]) -> int:
    from relax.tools.report import main

    return main(arguments)


def _monitor(arguments: Sequence[str]) -> int:
    from relax.monitor.__main__ import main

    return main(list(arguments))


# Commands with the fields of a configuration as flags: its class, and a function of it.
CONFIGURED = {
    "sft": (SFTConfig, _train),
    "dpo": (DPOConfig, _train),
    "reward": (RewardModelConfig, _train),
    "grpo": (GRPOConfig, _train),
    "ppo": (PPOConfig, _train),
    "distill": (DistillConfig, _train),
    "online_dpo": (OnlineDPOConfig, _train),
    "sample": (SampleConfig, _sample),
    "serve": (ServeConfig, _serve),
    "plan": (PlanConfig, _plan),
    "eval": (EvalConfig, _eval),
    "merge": (MergeConfig, _merge),
    "export": (ExportConfig, _export),
}
# Commands with their own arguments: a description, and a function of the arguments.
PROGRAMS = {
    "data": ("Convert rows of other forms to conversations: relax data convert.", _data),
    "gguf": ("Convert a GGUF file to a Hugging Face model directory.", _gguf),
    "report": ("Write the report page of a run, or a page that compares several.", _report),
    "monitor": ("Watch a run from another terminal.", _monitor),
    "lm_eval": ("Run EleutherAI's lm_eval, which then knows `--model relax`.", _lm_eval),
}

if __name__ == "__main__":
    sys.exit(main())
