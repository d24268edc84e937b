"""Uploads a model directory with its card to the Hugging Face hub."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from relax.config.text import format_bytes, join_some
from relax.errors import ConfigError, ModelLoadError
from relax.files import CARD, CURVES, MODEL_FILES, TEMPLATES, json_object
from relax.monitor.status import without_secrets
from relax.tools.merge.sources import MergeSource

TEXTS = (".json", ".txt", ".jinja", ".md", ".svg")
ADAPTER = "adapter_config.json"


class Upload(NamedTuple):
    """A file to upload: its name in the repository, and its path or its bytes."""

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def uploads(directory: Path, base_model: str | None = None) -> tuple[list[Upload], list[str]]:
    """The files of a model directory that are uploaded, and the names of those that are not.

    Args:
      directory: a model's or an adapter's.
      base_model: the hub name of an adapter's base, in place of the one that its file has.

    Raises:
      ConfigError: a file names a directory of this machine, or holds a password or token.
    """
    found, others = [], []
    for path in sorted(directory.iterdir()):
        templates = path.name == TEMPLATES and path.is_dir()
        if templates:
            found += [Upload(f"{TEMPLATES}/{p.name}", p) for p in sorted(path.glob("*.jinja"))]
        elif path.is_file() and (path.suffix in MODEL_FILES or path.name in (CARD, CURVES)):
            found.append(Upload(path.name, path))
        else:
            others.append(path.name)
    found = [_with_base(upload, base_model) for upload in found]
    for upload in found:
        if upload.name.endswith(TEXTS) and not upload.name.startswith("tokenizer."):
            _check_private(upload)
    return found, others


def _with_base(upload: Upload, base_model: str | None) -> Upload:
    """An adapter's file with the hub name of its base."""
    if upload.name != ADAPTER:
        return upload
    assert isinstance(upload.content, Path)
    fields = json_object(upload.content.read_bytes())
    base = str(fields.get("base_model_name_or_path"))
    if base_model is None:
        if Path(base).expanduser().is_dir() or base.startswith(("/", "~")):
            raise ConfigError(
                f"the adapter's base is the directory '{base}', which others do not have: give "
                "its hub name with --base_model, or merge the adapter with relax merge."
            )
        return upload
    fields["base_model_name_or_path"] = base_model
    return Upload(upload.name, (json.dumps(fields, indent=2) + "\n").encode())


def _check_private(upload: Upload) -> None:
    content = upload.content
    raw = content if isinstance(content, bytes) else content.read_bytes()
    for number, line in enumerate(raw.decode("utf-8", "replace").splitlines(), 1):
        wrong = None
        if without_secrets(line) != line:
            wrong = "a password or an access token"
        elif (
            re.search(re.escape(str(Path.home())) + r"(?![\w-])", line) and str(Path.home()) != "/"
        ):
            wrong = f"the directory '{Path.home()}' of this machine"
        if wrong is not None:
            raise ConfigError(
                f"{upload.name}:{number} holds {wrong}, which is not uploaded: remove it first."
            )


def plan(repo: str, files: list[Upload], others: list[str], private: bool) -> Iterator[str]:
    """Lines that say what is uploaded, and what is not."""
    kind = "private" if private else "public"
    total = format_bytes(sum(upload.size for upload in files))
    yield f"to the {kind} repository {repo} ({len(files)} files, {total}):"
    yield from (f"  {upload.name} ({format_bytes(upload.size)})" for upload in files)
    if others:
        yield f"not uploaded, since no part of a model: {join_some(others)}"
    if not any(upload.name == CARD for upload in files):
        yield f"the directory has no {CARD}: a run writes one into final/"


def push(
    model: MergeSource,
    repo: str,
    *,
    private: bool = True,
    dry_run: bool = False,
    base_model: str | None = None,
    say: Callable[[str], None] = print,
    api: Any = None,
) -> str | None:
    """Uploads the directory of a model in one commit, and says before what is in it.

    Args:
      model: the model or adapter.
      repo: OWNER/NAME; it is made if there is none.
      private: whether a new repository is private.
      dry_run: say what would be uploaded, and reach no hub.
      base_model: see `uploads`.
      say: gets the lines of the plan.
      api: a `huggingface_hub.HfApi`; None: with the token that is logged in.

    Returns:
      The address of the commit; None after a dry run.

    Raises:
      ConfigError: see `uploads`.
      ModelLoadError: numbers are NaN, or the hub refuses the upload; nothing is changed there.
    """
    files, others = uploads(model.source.files, base_model)
    for line in plan(repo, files, others, private):
        say(line)
    model.check_numbers()
    if dry_run:
        return None
    from huggingface_hub import CommitOperationAdd, HfApi

    api = api or HfApi()
    operations = [CommitOperationAdd(upload.name, upload.content) for upload in files]
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.create_commit(repo, operations, commit_message="Upload the model with ReLax")
    except Exception as error:  # the hub client raises a dozen kinds, none of ours
        reason = without_secrets(str(error).strip().partition("\n")[0]) or type(error).__name__
        raise ModelLoadError(
            f"the model was not uploaded to {repo}: {reason} Log in with `hf auth login`, or set "
            "HF_TOKEN to a token that may write."
        ) from error
    return str(done.commit_url)
