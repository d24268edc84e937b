"""A model family as data: mappings of its config.json and tensor names to ours."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping

from relax.errors import ModelLoadError
from relax.models.config import TransformerConfig
from relax.models.families.fields import Field, is_number, read_values
from relax.models.families.rope import RopeFields

# Fields that would change the computation in unsupported ways, and their supported values.
REQUIRED_VALUES: dict[str, tuple] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "sliding_window": (),
    "quantization_config": (),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "pruned_heads": ({},),
    "auto_map": (),  # the model's own code, which ReLax never runs
}

# Rates of dropout, which changes training alone.
DROPOUT_FIELDS = frozenset({"attention_dropout", "residual_dropout", "embd_pdrop", "resid_pdrop"})

# Fields that do not change the computation: bookkeeping, and the generation settings that
# transformers 4 wrote to config.json.
IGNORED_FIELDS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _flash_attn_2_enabled
    _name_or_path architectures bos_token_id cache_implementation chunk_size_feed_forward
    cross_attention_hidden_size dtype eos_token_id finetuning_task id2label is_decoder
    is_llama_config keys_to_ignore_at_inference label2id max_sequence_length model_type
    output_attentions output_hidden_states output_router_logits pad_token_id prefix pretraining_tp
    problem_type return_dict sep_token_id task_specific_params tf_legacy_loss tie_encoder_decoder
    tokenizer_class torch_dtype torchscript transformers.js_config transformers_version
    unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache

    bad_words_ids begin_suppress_tokens decoder_start_token_id diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
    forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences output_scores
    remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens temperature
    top_k top_p typical_p
    """.split()
)

# Where the leaves of a layer are in a file: our module -> the file's. Modules with one name there
# share one tensor, in this order; `{}` is the number of an expert, each of which is a tensor.
LAYER = {
    "attention_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "g_proj": "self_attn.g_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "sinks": "self_attn.sinks",
    "mlp_norm": "post_attention_layernorm",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
    "act_fn": "mlp.act_fn",
    "in_proj": "conv.in_proj",
    "conv": "conv.conv",
    "out_proj": "conv.out_proj",
    "in_proj_qkv": "linear_attn.in_proj_qkv",
    "in_proj_z": "linear_attn.in_proj_z",
    "in_proj_b": "linear_attn.in_proj_b",
    "in_proj_a": "linear_attn.in_proj_a",
    "conv1d": "linear_attn.conv1d",
    "A_log": "linear_attn.A_log",
    "dt_bias": "linear_attn.dt_bias",
    "gate_norm": "linear_attn.norm",
    "per_layer_input_gate": "per_layer_input_gate",
    "per_layer_projection": "per_layer_projection",
    "post_per_layer_input_norm": "post_per_layer_input_norm",
    "layer_scalar": "layer_scalar",
    "experts/router": "mlp.gate.weight",
    "experts/gate_proj": "mlp.experts.{}.gate_proj.weight",
    "experts/up_proj": "mlp.experts.{}.up_proj.weight",
    "experts/down_proj": "mlp.experts.{}.down_proj.weight",
    "experts/router_bias": "mlp.router.bias",
    "experts/gate_proj_bias": "mlp.experts.gate_up_proj_bias",
    "experts/up_proj_bias": "mlp.experts.gate_up_proj_bias",
    "experts/down_proj_bias": "mlp.experts.down_proj_bias",
}
# The in-memory form of experts in transformers 5, which it writes on request.
STACKED_EXPERTS = {
    "experts/router": "mlp.gate.weight",
    "experts/gate_proj": "mlp.experts.gate_up_proj",
    "experts/up_proj": "mlp.experts.gate_up_proj",
    "experts/down_proj": "mlp.experts.down_proj",
}
TOP = {
    ("embed_tokens",): "model.embed_tokens.weight",
    ("lm_head",): "lm_head.weight",
    ("norm", "scale"): "model.norm.weight",
    ("embed_tokens_per_layer",): "model.embed_tokens_per_layer.weight",
    ("per_layer_model_projection", "kernel"): "model.per_layer_model_projection.weight",
    ("per_layer_projection_norm", "scale"): "model.per_layer_projection_norm.weight",
}
LEAVES = {"kernel": ".weight", "weight": ".weight", "scale": ".weight", "bias": ".bias"}
LEAVES |= {name: f".{name}" for name in ("alpha_p", "alpha_n", "beta", "eps")}

# Suffixes of tensors in files from before transformers 4.32 that are redundant with
# config.json; they are not read.
FOLLOWING = ".self_attn.rotary_emb.inv_freq"


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family, defined by a model_type of transformers.

    Attributes:
      model_type, architecture: its names in config.json.
      fields: the supported fields of config.json.
      fixed: fields of `TransformerConfig` that are the same in all models of the family.
      derive: `values of fields -> fields of TransformerConfig`, for fields without a direct
        mapping.
      restore: the inverse of `derive`.
      rope: the fields about rotary positions.
      only: fields that must have one of these values, besides `REQUIRED_VALUES`.
      harmless: fields that are ignored, besides `IGNORED_FIELDS`.
      aliases: second name of a field -> its name.
      repeats: a field that must equal another -> the other.
      names: names of leaves in the files, besides `LAYER` and `TOP`.
      also_named: alternative names that are read but never written.
      unread: names of tensors that files may hold although no layer uses them.
      untransposed: leaves that are [in, out] in the files too, as keys of `LAYER`.
      alternating: whether the outputs of leaves that share a tensor alternate in it; else those of
        one follow those of the other.
    """

    model_type: str
    architecture: str
    fields: Mapping[str, Field]
    fixed: Mapping[str, object] = dataclasses.field(default_factory=dict)
    derive: Callable[[dict], dict] = lambda values: {}
    restore: Callable[[TransformerConfig], dict] = lambda config: {}
    rope: RopeFields = RopeFields()
    only: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    harmless: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    repeats: Mapping[str, str] = dataclasses.field(default_factory=dict)
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    also_named: tuple[Mapping[str, str], ...] = ()
    unread: Callable[[TransformerConfig], frozenset[str]] = lambda config: frozenset()
    untransposed: frozenset[str] = frozenset()
    alternating: bool = False

    @property
    def in_memory(self) -> Mapping[str, str]:
        """Names in transformers' models, which have experts stacked, where files have others."""
        return self.also_named[0] if self.also_named else {}

    def from_hugging_face(self, fields: dict, where: str = "config.json") -> TransformerConfig:
        """Reads config.json; an unknown field or an unsupported value is an error.

        A null field counts as absent, unless null is one of its values.

        Raises:
          ModelLoadError: a field is unknown or unsupported.
        """
        try:
            return self._read(fields)
        except ValueError as error:
            raise ModelLoadError(f"{where}: {error}") from None

    def to_hugging_face(self, config: TransformerConfig) -> dict:
        """Makes the contents of config.json for a model of this family.

        Raises:
          ValueError: the family cannot represent the configuration.
        """
        fields = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **{n: getattr(config, _ours(n, f)[0]) for n, f in self.fields.items() if _ours(n, f)},
            **self.restore(config),
            **self.rope.write(config),
        }
        asked, back = comparable(config), comparable(self._read(fields))
        lost = [name for name in asked if asked[name] != back[name]][:2]
        if lost:
            raise ValueError(
                f"a {self.model_type} model cannot have {_list(lost, asked)}: it would be read "
                f"back with {_list(lost, back)}. Choose another model_type."
            )
        return fields

    def tensor_name(self, path: tuple[str, ...], also: Mapping[str, str] | None = None) -> str:
        """The name in the file of a path in our params, with `{}` for the number of an expert.

        Args:
          path: the keys of a leaf.
          also: one of `also_named`.
        """
        names = {**LAYER, **self.names, **(also or {})}
        if path in TOP:
            return names.get("/".join(path), TOP[path])
        name = names[module_of(path)] + LEAVES.get(path[-1], "")
        return f"model.layers.{path[0].removeprefix('layers_')}.{name}"

    def _read(self, fields: dict) -> TransformerConfig:
        required = {**REQUIRED_VALUES, **self.only}
        only = {n: values for n, values in required.items() if n not in self._known()}
        ignored = IGNORED_FIELDS | DROPOUT_FIELDS | self.harmless
        given = {name for name, value in fields.items() if value is not None}
        unknown = sorted(given - self._known() - only.keys() - ignored)
        if unknown:
            raise ValueError(f"fields that ReLax does not support: {', '.join(unknown)}.")
        _warn_of_dropout({n: fields[n] for n in sorted(given & DROPOUT_FIELDS)})
        fields = self._plain_names(fields)
        present = {name: value for name, value in fields.items() if value is not None}
        for name in sorted(only.keys() & present.keys()):
            if present[name] not in only[name]:
                raise ValueError(
                    f"{name} is {repr(present[name])[:80]}, which is not implemented; only "
                    f"{' or '.join(map(repr, only[name])) or 'its absence'} is."
                )
        values = read_values(fields, self.fields)
        heads, width = values["num_attention_heads"], values["hidden_size"]
        if values["num_key_value_heads"] is None:
            values["num_key_value_heads"] = heads
        if values["head_dim"] is None:
            values["head_dim"] = width // heads
            if width % heads:
                raise ValueError(
                    "num_attention_heads must divide hidden_size where there is no head_dim, got "
                    f"{heads} and {width}."
                )
        for name, other in self.repeats.items():
            if name in present and present[name] != values[other]:
                raise ValueError(
                    f"{name} must be {other}, {values[other]!r}, got {repr(present[name])[:80]}."
                )
        ours = {o: values[n] for n, field in self.fields.items() for o in _ours(n, field)}
        ours.update(self.fixed)
        ours |= self.derive(values)
        width = ours.get("global_head_dim") or values["head_dim"]
        ours |= self.rope.read(present, width, values["max_position_embeddings"])
        config = TransformerConfig(model_type=self.model_type, **ours)
        if config.num_hidden_layers * config.num_experts > 2**16:
            raise ValueError(
                "num_hidden_layers times the experts of a layer must be at most 65536, got "
                f"{config.num_hidden_layers} and {config.num_experts}."
            )
        return config

    def _known(self) -> set[str]:
        return {*self.fields, *self.aliases, *self.repeats, *self.rope.names}

    def _plain_names(self, fields: dict) -> dict:
        plain = {name: value for name, value in fields.items() if name not in self.aliases}
        for alias, name in self.aliases.items():
            value = fields.get(alias)
            if value is not None and plain.get(name, value) != value:
                raise ValueError(f"{alias} and {name} disagree: {value!r} and {plain[name]!r}.")
            if value is not None:
                plain[name] = value
        return plain


def _warn_of_dropout(rates: Mapping) -> None:
    for name, rate in rates.items():
        if not (is_number(rate) and 0 <= rate < 1):
            raise ValueError(f"{name} must be a number from 0 to below 1, got {repr(rate)[:80]}.")
    asked = [f"{name} {rate}" for name, rate in rates.items() if rate]
    if asked:
        warnings.warn(
            f"{' and '.join(asked)} of config.json will not be applied: ReLax trains without "
            "dropout, except that of adapters.",
            stacklevel=6,
        )


def module_of(path: tuple[str, ...]) -> str:
    """The key in `LAYER` for a leaf of a layer."""
    return "/".join(path[1:]) if path[1] == "experts" else path[1]


def _ours(name: str, field: Field) -> tuple[str, ...]:
    return (name,) if field.ours is None else field.ours


def comparable(config: TransformerConfig) -> dict:
    """A normal form of a configuration, equal for equal models."""
    values = dataclasses.asdict(config)
    for name in ("sliding_window", "layer_types", "local_rope_theta", "no_rope_layers"):
        values.pop(name)
    for name in ("dense_layers", "rope_theta", "rope_scaling"):
        values.pop(name)
    values["rotary_dim"] = config.rotary_dim or config.head_dim
    values["attention_multiplier"] = config.attention_multiplier or config.head_dim**-0.5
    return values | {f"layer {i}": layer for i, layer in enumerate(config.layers)}


def _list(names: list[str], values: dict) -> str:
    return ", ".join(f"{name} {values[name]!r}" for name in names)
