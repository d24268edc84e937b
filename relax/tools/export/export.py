"""Writes the model of a directory as a GGUF file, or uploads it to the hub."""

from pathlib import Path

import numpy as np

from relax.errors import ConfigError, ModelLoadError
from relax.models.huggingface.tensors import shape_of
from relax.tools.export.config import ExportConfig
from relax.tools.export.hub import push
from relax.tools.gguf.write import GGUFSource, write_gguf
from relax.tools.merge.sources import MergeSource, find_source


def export(config: ExportConfig) -> tuple[Path, list[str]]:
    """Writes the file.

    Returns:
      Its path, and notes about it.

    Raises:
      ConfigError: the file's directory does not exist.
      ModelLoadError, RelaxError: see `find_source` and `write_gguf`; also, numbers are NaN.
    """
    e = config.export
    assert e.model_name_or_path is not None  # guaranteed by the rules of the configuration
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ModelLoadError(
            "writing a GGUF file needs the gguf package: pip install 'relax-trainers[gguf]'."
        ) from error
    model = find_source(e.model_name_or_path)
    path = _path(e.output_file, model, e.type)
    if not path.parent.is_dir():
        raise ConfigError(f"output_file must be in a directory that exists, got '{path}'.")
    model.check_numbers()
    return path, write_gguf(_source(model), path, e.type)


def upload(config: ExportConfig) -> str | None:
    """Uploads the model directory, or only says what would be uploaded; see `push`."""
    e = config.export
    assert e.model_name_or_path is not None and e.repo is not None  # guaranteed by the rules
    model = find_source(e.model_name_or_path)
    return push(model, e.repo, private=e.private, dry_run=e.dry_run, base_model=e.base_model)


def _path(name: str | None, model: MergeSource, kind: str) -> Path:
    if name is not None:
        return Path(name).expanduser()
    directory = Path(str(model.source.path)).expanduser()
    where = directory.resolve() if directory.is_dir() else Path(directory.name)
    return where.with_name(f"{where.name}-{kind}.gguf")


def _source(model: MergeSource) -> GGUFSource:
    from transformers import AutoConfig

    def read(name: str) -> np.ndarray:
        with model.rows(name) as rows:
            return rows(0, shape_of(model.tensors[name])[0])

    own = (model.source.files / "tokenizer_config.json").exists()
    return GGUFSource(
        directory=model.base,
        tokenizer_directory=model.source.files if own else model.base,
        tokenizer=model.tokenizer,
        config=model.config,
        fields=AutoConfig.from_pretrained(model.base, trust_remote_code=False).to_dict(),
        shapes={name: shape_of(parts) for name, parts in model.tensors.items()},
        read=read,
    )
