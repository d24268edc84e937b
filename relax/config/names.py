"""Names that people bring with them: other spellings, former names, typing errors."""

import difflib
from collections.abc import Iterable

# Other names of an option that work, in flags and in files.
ALIASES = {"warmup_ratio": "warmup_steps", "resume_from_checkpoint": "resume"}

# Names of other libraries that do not work, and what to write instead.
RENAMED = {
    "base_model": "model_name_or_path",
    "batch_size": "per_device_train_batch_size",
    "bf16": "dtype bfloat16",
    "dataset": "dataset_name",
    "dataset_path": "dataset_name",
    "epochs": "num_train_epochs",
    "evaluation_strategy": "eval_strategy",
    "fp16": "dtype bfloat16 (float16 is not offered)",
    "lr": "learning_rate",
    "max_context_length": "max_length",
    "max_seq_length": "max_length",
    "model": "model_name_or_path",
    "model_architecture": "model_name_or_path (its config.json says it)",
    "model_path": "model_name_or_path",
    "no_cuda": "dtype for the precision; JAX chooses the device, JAX_PLATFORMS=cpu forces the CPU",
    "num_epochs": "num_train_epochs",
    "overwrite": "overwrite_output_dir",
    "precision": "dtype",
    "vocab_size": "model_name_or_path (its config.json says it)",
}


def normal(name: str) -> str:
    """`learning-rate` and `learning_rate` are one name."""
    return name.replace("-", "_")


def suggestion(name: str, known: Iterable[str], prefix: str = "") -> str:
    """ " Did you mean ...?" for a misspelt name, or nothing.

    >>> suggestion("lerning_rate", ["learning_rate", "seed"], prefix="--")
    ' Did you mean --learning_rate?'
    """
    known = list(known)
    name = normal(name).lower()
    close = [k for k in known if len(name) >= 4 and k.startswith(name)][:1]
    close = close or difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f" Did you mean {prefix}{close[0]}?" if close else ""


def unknown(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The sentence that refuses a name nobody knows, or one that is called otherwise here."""
    if name in RENAMED:
        return f"{prefix}{name} is not a name here. Use {prefix}{RENAMED[name]}."
    what = "flag" if prefix else "field"
    shown = repr(name) if not name.isidentifier() else prefix + name
    return f"unknown {what} {shown}.{suggestion(name, known, prefix)}"


def ratio_problem(name: str, value: object) -> str | None:
    """An alias that says "ratio" takes a ratio: 5 would be read as five steps."""
    if name == "warmup_ratio" and isinstance(value, int | float) and not 0 <= value < 1:
        return (
            f"warmup_ratio must be at least 0 and below 1, got {value}. For steps use warmup_steps."
        )
    return None
