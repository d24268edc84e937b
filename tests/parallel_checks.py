"""What `test_parallel.py` claims, on eight forced CPU devices: prints one JSON line per check.

`XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/parallel_checks.py`; with `--all`
every algorithm on every mesh.
"""

import contextlib
import dataclasses
import io
import json
import sys
import tempfile
import traceback

import jax
import numpy as np
import optax
from rich.console import Console
from safetensors.numpy import load_file, save_file

jax.config.update("jax_numpy_rank_promotion", "raise")

from relax import parallel
from relax.checkpoint.checkpointer import Checkpointer
from relax.config import SFTConfig
from relax.config.mesh import parse_mesh
from relax.data import PreferenceLoader, Preferences
from relax.data.preference import Preference
from relax.engine import TrainerEngine
from relax.losses import (
    LOSS_TYPES,
    PREFERENCE_LOSSES,
    LossOptions,
    Pairs,
    PolicyOptions,
    policy_loss,
)
from relax.models import Transformer, TransformerConfig, load_pretrained, save_pretrained
from relax.models.config import LoRA
from relax.models.huggingface.quantized import BaseQuantizer
from relax.optimizers import adamw_8bit
from relax.sampling import SamplingConfig, generate
from relax.trainers import (
    DistillationTrainer,
    DPOTrainer,
    GRPOTrainer,
    OnlineDPOTrainer,
    PPOTrainer,
    SFTTrainer,
    Teacher,
)

MESHES = ("data=8", "data=2,fsdp=4", "data=2,fsdp=2,tensor=2", "fsdp=2,tensor=2", "data=1")
V, T = 24, 12
ALL = "--all" in sys.argv
SHAPE = TransformerConfig(
    vocab_size=V,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2 if ALL else 1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    tie_word_embeddings=False,
    attention_bias=True,
    initializer_range=0.2,
)


def some_of(*meshes):
    return MESHES if ALL else [MESHES[i] for i in meshes]


# By its usual epsilon Adam's first steps are the sign of the smallest gradients, rounding included.
ADAMW = optax.adamw(1e-2, eps=1e-4)


def shape(**changes):
    return dataclasses.replace(SHAPE, **changes)


def use(mesh, config=SHAPE):
    """A mesh over the first of the devices."""
    count = np.prod(list(parse_mesh(mesh).values()))
    mesh = parallel.make_mesh(mesh, jax.devices()[: int(count)])
    return parallel.use(mesh, heads=config.tensor_heads)


def sft_batches(count, rows=16, seed=0):
    """Rows of two documents and padding, of which some tokens are trained."""
    rng = np.random.default_rng(seed)
    batches = []
    for _ in range(count):
        ids = rng.integers(0, V, (rows, T)).astype(np.int32)
        cut = rng.integers(2, T - 3, (rows, 1))
        places = np.arange(T)[None, :]
        segments = np.where(places < cut, 1, np.where(places < T - 2, 2, 0)).astype(np.int32)
        positions = np.where(places < cut, places, places - cut).astype(np.int32)
        labels = np.where((rng.random((rows, T)) < 0.6) & (segments > 0), ids, -100)
        batches.append(
            {
                "input_ids": ids,
                "labels": labels.astype(np.int32),
                "positions": positions,
                "segment_ids": segments,
            }
        )
    return batches


def run_sft(config=SHAPE, lora=None, optimizer=ADAMW, **options):
    """Losses of three updates and an evaluation, and the parameters after them."""
    model = Transformer(config, gradient_checkpointing=True, lora=lora)
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 1.0} | options
    trainer = SFTTrainer(model, optimizer, loss_chunk_size=8, **options)
    losses = []

    class Log:
        def __getattr__(self, name):
            return lambda *_: {} if name in ("state_dict", "evaluate") else None

        def on_batch_end(self, event):
            losses.append(float(event.metrics["loss"]))

        def on_validation_end(self, event):
            losses.append(float(event.metrics["loss"]))

    trainer.callbacks = (Log(),)
    batches = sft_batches(4)
    state = trainer.train(batches[:3], key=jax.random.key(0), eval_loader=batches[3:])
    return losses, jax.tree.map(np.asarray, state.params), state


def bits(tree):
    """The bytes of every leaf."""
    leaves = jax.tree.leaves(tree)
    keys = [jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves]
    data = [jax.random.key_data(x) if k else x for x, k in zip(leaves, keys, strict=True)]
    return [np.asarray(x).tobytes() for x in data]


def print_to_stderr(line):
    print(line, file=sys.stderr)


def same(found, wanted, tolerance=1e-5):
    worst = max(
        float(np.abs(a - b).max())
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    )
    assert worst < tolerance, worst
    return worst


def check_sft():
    told = {}
    for name, config in {
        "grouped": SHAPE,
        "three heads": shape(num_attention_heads=3, num_key_value_heads=3, qk_norm="head"),
    }.items():
        losses, params, _ = run_sft(config)
        for mesh in some_of(0, 1, 2, 3) if name == "grouped" else MESHES[2:3]:
            with use(mesh, config):
                found = run_sft(config)
            told[f"{name} {mesh}"] = [same(found[0], losses), same(found[1], params)]
    return told


def shared():
    """Two layers attend to the keys and values of the first two; full ones have fewer heads."""
    return shape(
        model_type="gemma4_text",
        num_hidden_layers=4,
        layer_types=("sliding_attention", "full_attention") * 2,
        sliding_window=5,
        global_head_dim=6,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=V,
        layer_scalar=True,
        value_norm=True,
    )


def recurrent():
    """A convolution, delta rules with grouped heads, attention with gates of heads."""
    return shape(
        num_hidden_layers=3,
        layer_types=("conv", "linear_attention", "full_attention"),
        attention_gate="head",
        conv_width=3,
        conv_bias=True,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=4,
        linear_value_head_dim=6,
    )


def check_mixers():
    told = same_on_a_mesh(recurrent(), 0.02)  # norms of short keys magnify rounding
    with use("data=2,fsdp=2,tensor=2", recurrent()):
        params = run_sft(recurrent())[2].params
    for layer, name, wanted in (
        ("layers_0", "in_proj", (8, 24)),
        ("layers_0", "out_proj", (8, 8)),
        ("layers_1", "in_proj_qkv", (8, 20)),
        ("layers_1", "out_proj", (12, 8)),
    ):
        kernel = params[layer][name]["kernel"]
        assert kernel.sharding.shard_shape(kernel.shape) == wanted, (name, kernel.sharding)
    return told


def check_shared_keys():
    return same_on_a_mesh(shared())


def same_on_a_mesh(shape, rate=0.1):
    """Losses, parameters, and sampled tokens with their log-probabilities."""
    sgd = optax.sgd(rate, momentum=0.9)  # as in `run_rl`
    losses, params, _ = run_sft(shape, optimizer=sgd)
    told = []
    with use("data=2,fsdp=2,tensor=2", shape):
        found = run_sft(shape, optimizer=sgd)
        told += [same(found[0], losses), same(found[1], params)]
    model = Transformer(shape)
    config = SamplingConfig(max_new_tokens=8, slots=8)

    def tokens():
        out = generate(model, parallel.shard(params), PROMPTS, jax.random.key(5), config)
        return [list(map(int, c)) for c in out.completions], out.logprobs

    wanted = tokens()
    with use("data=2,fsdp=2,tensor=2", shape):
        found = tokens()
    assert found[0] == wanted[0]
    return [*told, same(found[1], wanted[1])]


def check_weights_are_cut():
    with use("data=2,fsdp=2,tensor=2"):
        state = run_sft()[2]
    cut = state.params["layers_0"]["q_proj"]["kernel"]
    assert cut.sharding.shard_shape(cut.shape) == (8, 8), cut.sharding
    leaves = jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
    moments = [
        leaf
        for path, leaf in leaves
        if jax.tree_util.keystr(path, simple=True, separator="/").endswith("layers_0/q_proj/kernel")
    ]
    assert len(moments) == 2
    assert all(x.sharding.is_equivalent_to(cut.sharding, 2) for x in moments)
    return parallel.bytes_per_device(state)


def experts():
    return shape(
        model_type="mixtral",
        attention_bias=False,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        router_aux_loss_coef=0.02,
    )


def check_experts():
    """Plain ones, and those of gpt-oss beside attention with sinks."""
    told = []
    biased = {"attention_sinks": True, "expert_bias": True, "swiglu_limit": 0.05}
    for config in (experts(), dataclasses.replace(experts(), **biased)):
        losses, params, _ = run_sft(config)
        with use("data=2,fsdp=2,tensor=2", config):
            found = run_sft(config)
        told += [same(found[0], losses), same(found[1], params)]
    return told


def check_adapters():
    plain, told = LoRA(r=2, alpha=4, dropout=0.0, target_modules=("all-linear",)), []
    for config, lora in (
        (SHAPE, dataclasses.replace(plain, use_dora=True)),
        (experts(), plain),
    ):
        losses, params, _ = run_sft(config, lora)
        with use("data=2,fsdp=2,tensor=2", config):
            found = run_sft(config, lora)
        told += [same(found[0], losses), same(found[1], params)]
    return told


def check_quantised_weights():
    """Read in parts as in one piece, trained and sampled alike, with whole blocks and parts."""
    dense = shape(intermediate_size=192, model_type="qwen2", output_bias=False)
    mixed = shape(
        model_type="mixtral", attention_bias=False, hidden_size=64, intermediate_size=128,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128,
    )  # fmt: skip
    lora = LoRA(r=2, alpha=4, dropout=0.0, target_modules=("all-linear",))
    told = []
    padded = dataclasses.replace(  # and with biases
        mixed, model_type="gpt_oss", attention_bias=True, output_bias=True, attention_sinks=True,
        expert_bias=True, swiglu_limit=0.05, moe_intermediate_size=80, intermediate_size=80,
    )  # fmt: skip
    for config, kind in ((dense, "nf4"), (mixed, "int8"), (padded, "nf4")):
        model = Transformer(config)
        params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
        with tempfile.TemporaryDirectory() as directory:
            path = save_pretrained(f"{directory}/model", model, params)

            def run(path=path, kind=kind):
                model, params = load_pretrained(path, quantize=BaseQuantizer(kind))
                where = params["layers_0"]["o_proj"]["kernel"].codes.sharding
                read, losses = bits(params), []
                model = model.clone(lora=lora, gradient_checkpointing=True)
                trainer = SFTTrainer(model, ADAMW, params=params)
                state = trainer.create_train_state(jax.random.key(1))
                rng = np.random.default_rng(0)
                ids = rng.integers(0, V, (8, T)).astype(np.int32)
                for _ in range(2):
                    batch = parallel.shard_batch({"input_ids": ids, "labels": ids})
                    state, metrics = trainer.train_step(state, batch)
                    losses.append({"loss": float(metrics["loss"])})
                weights = trainer.model_params(state.params, state.frozen)
                sampling = SamplingConfig(max_new_tokens=4)
                drawn = generate(model, weights, [[1, 2]] * 4, jax.random.key(2), sampling)
                return read, losses, np.asarray(drawn.tokens), str(where)

            alone = run()
            with use("data=2,fsdp=2,tensor=2", config):
                together = run()
            assert together[0] == alone[0], kind
            told += [same(together[1], alone[1]), together[3]]
            assert np.array_equal(together[2], alone[2])
    return told


def check_moments_in_8_bits():
    """Cut moments are those of the whole array."""
    rng = np.random.default_rng(0)
    params = {"layers_0": {"q_proj": {"kernel": rng.normal(size=(64, 256)).astype(np.float32)}}}
    optimizer = adamw_8bit(1e-2)

    def run():
        ours = parallel.shard(params)
        state, update = parallel.init_sharded(optimizer.init, ours), jax.jit(optimizer.update)
        for _ in range(3):
            _, state = update(ours, state, ours)
        codes = state.inner_state[0].nu["layers_0"]["q_proj"]["kernel"].codes
        return [np.asarray(leaf) for leaf in jax.tree.leaves(state)], str(codes.sharding)

    alone = run()
    with use("data=2,fsdp=2,tensor=2"):
        together = run()
    for mine, theirs in zip(together[0], alone[0], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)
    return together[1]


def preferences():
    rng = np.random.default_rng(3)
    items = []
    for _ in range(16):
        parts = [rng.integers(0, V, rng.integers(1, 6)).astype(np.int32) for _ in range(3)]
        items.append(Preference(*parts))
    return Preferences(items, is_paired=True)


def run_dpo(packed):
    trainer = DPOTrainer(Transformer(SHAPE), ADAMW, gradient_accumulation_steps=2)
    length = 24 if packed else None
    loader = PreferenceLoader(preferences(), 16, packed_length=length)
    losses = []
    state = trainer.create_train_state(jax.random.key(1))
    for _ in range(2):
        for batch in loader:
            state, metrics = trainer.train_step(state, parallel.shard_batch(trainer.pack(batch)))
            metrics.pop("rewards/accuracies")  # of ties, before the first update
            losses.append({name: float(value) for name, value in metrics.items()})
    logprobs = trainer.answer_logprobs(state.params, next(iter(loader)))
    return losses, jax.tree.map(np.asarray, state.params), logprobs


def check_dpo():
    told = {}
    for packed in (False, True):
        wanted = run_dpo(packed)
        for mesh in some_of(1 if packed else 2):
            with use(mesh):
                found = run_dpo(packed)
            told[f"{packed} {mesh}"] = [same(a, b) for a, b in zip(found, wanted, strict=True)]
    return told


class Letters:
    eos_token_id = V - 1

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(97 + i) for i in ids if i != V - 1)


PROMPTS = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10, 11], [2], [3, 3], [9, 1, 2], [5]]


def run_rl(make, **options):
    """Two items: rollouts, rewards, updates."""
    trainer = make(
        Transformer(SHAPE),
        optax.sgd(0.1, momentum=0.9),  # Adam's first steps have the sign of the smallest gradient
        reward_funcs=[lambda completions: [float(len(set(c))) for c in completions]],
        tokenizer=Letters(),
        num_generations=4,
        prompts_per_item=8,
        completions_per_update=16,
        gradient_accumulation_steps=1,
        sampling=SamplingConfig(max_new_tokens=6),
        **options,
    )
    state, texts, losses = trainer.create_train_state(jax.random.key(2)), [], []
    item = {"prompt_ids": PROMPTS, "rows": [{"prompt": str(i)} for i in range(8)]}
    for _ in range(2):
        for note in trainer.make_batches(state, item):
            texts += [record["completion"] for record in note.records]
            state, metrics = trainer.train_step(state, parallel.shard_batch(note.batch))
            losses.append({n: float(metrics[n]) for n in metrics if "skipped" not in n})
    return texts, losses, jax.tree.map(np.asarray, state.params)


def rl_check(make, *meshes, **options):
    told, wanted = {}, run_rl(make, **options)
    for mesh in some_of(*meshes):
        with use(mesh):
            found = run_rl(make, **options)
        first = [
            i for i, pair in enumerate(zip(found[0], wanted[0], strict=True)) if pair[0] != pair[1]
        ]
        assert not first, f"{mesh}: other texts: {first}"
        told[mesh] = [same(a, b) for a, b in zip(found[1:], wanted[1:], strict=True)]
    return told


def check_grpo():
    return rl_check(GRPOTrainer, 0, 2, beta=0.1)


def check_ppo():
    return rl_check(PPOTrainer, 1, value_model="policy", num_ppo_epochs=2)


def teacher():
    model = Transformer(SHAPE)
    init = jax.jit(model.init)
    return Teacher(model, init(jax.random.key(9), np.zeros((1, 8), np.int32))["params"])


def check_distillation():
    """The student's own completions, on the distributions of a teacher that is cut like it."""

    def make(*args, completions_per_update, **options):  # all of an item are one update
        teachers = [teacher()]
        return DistillationTrainer(*args, teachers=teachers, lmbda=1.0, beta=0.5, **options)

    return rl_check(make, 2)


def check_online_dpo():
    return rl_check(OnlineDPOTrainer, 2)


def check_losses():
    """Value and gradient of every loss, of rows that eight devices share."""
    rng, mesh = np.random.default_rng(4), parallel.make_mesh("data=8", jax.devices())
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    tokens = [rng.normal(-1.0, 0.5, (16, 6)).astype(np.float32) for _ in range(2)]
    advantages, mask = rng.normal(size=16).astype(np.float32), rng.random((16, 6)) < 0.7
    pairs = [rng.normal(-9.0, 2.0, 16).astype(np.float32) for _ in range(4)]
    lengths = [rng.integers(1, 9, 16).astype(np.float32) for _ in range(2)]
    options = PolicyOptions(clip_cov_ratio=0.2, kl_cov_ratio=0.2, clip_cov_lb=-9.0, clip_cov_ub=9.0)
    told = {}

    def compare(name, loss, first, *others):
        function = jax.jit(jax.value_and_grad(loss))
        alone = function(first, *others)
        with parallel.use(mesh):
            arrays = [jax.device_put(x, rows) for x in (first, *others)]
            told[name] = same(function(*arrays), alone, 1e-6 * max(1.0, abs(alone[0])))

    for name in LOSS_TYPES:

        def policy(logprobs, old, advantages, mask, name=name):
            key = jax.random.key(0)
            given = {"loss_type": name, "options": options, "key": key}
            return policy_loss(logprobs, old, advantages, mask, **given).loss

        compare(name, policy, *tokens, advantages, mask)
    smoothed = LossOptions(label_smoothing=0.1)
    for name in PREFERENCE_LOSSES:

        def preference(*arrays, name=name):
            columns = (*arrays, jax.numpy.full(16, arrays[4].mean()), None)
            return PREFERENCE_LOSSES[name](Pairs(*columns), smoothed).mean()

        compare(name, preference, *pairs, *lengths)
    return told


def check_sampler():
    """Greedy and drawn, with more rows than slots, stop strings and a penalty."""
    model = Transformer(SHAPE)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
    config = SamplingConfig(
        max_new_tokens=20, n=3, slots=16, stop=("ab",), repetition_penalty=1.1, top_p=0.9
    )

    def tokens():
        key = jax.random.key(5)
        out = generate(model, parallel.shard(params), PROMPTS, key, config, decode=decode)
        return [list(map(int, c)) for c in out.completions], out.logprobs

    decode = Letters().decode
    wanted = tokens()
    for mesh in some_of(2):
        with use(mesh):
            found = tokens()
        assert found[0] == wanted[0], mesh
        same(found[1], wanted[1])
    return sum(map(len, wanted[0]))


def check_checkpoints_move():
    """Saved on eight devices, read on one, two and four, written there, and read on eight again."""
    with tempfile.TemporaryDirectory() as directory:
        with use("data=2,fsdp=2,tensor=2"):
            state = run_sft()[2]
            Checkpointer(f"{directory}/8").save(3, state, {})
            shapes = jax.eval_shape(lambda: state)
        wanted, last = bits(state), 8
        for count, mesh in ((1, None), (2, "fsdp=2"), (4, "fsdp=2,tensor=2"), (8, "data=8")):
            with use(mesh) if mesh else contextlib.nullcontext():
                template = parallel.sharded_shapes(shapes)
                found, _, step = Checkpointer(f"{directory}/{last}", warn=print_to_stderr).restore(
                    template
                )
                assert step == 3 and bits(found) == wanted, count
                kernel = found.params["layers_0"]["q_proj"]["kernel"]
                assert len(kernel.sharding.device_set) == count
                again = Checkpointer(f"{directory}/again{count}", asynchronous=count % 4 == 0)
                again.save(3, found, {})
                again.wait()
                last = f"again{count}"
    return len(wanted)


def gpt_oss():
    return shape(
        model_type="gpt_oss",
        hidden_size=64,
        intermediate_size=32,
        output_bias=True,
        attention_sinks=True,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=32,
        expert_bias=True,
        swiglu_limit=7.0,
    )


def check_experts_in_mxfp4_are_read_in_parts():
    """Each device's part equals that of what one device reads."""
    config, rng = gpt_oss(), np.random.default_rng(0)
    model = Transformer(config)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
    with tempfile.TemporaryDirectory() as directory:
        path = save_pretrained(f"{directory}/model", model, params) / "model.safetensors"
        tensors = load_file(path)
        for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "down_proj"))]:
            E, D, F = tensors.pop(name).shape
            blocks = rng.integers(0, 256, (E, F, D // 32, 16))
            tensors[f"{name}_blocks"] = blocks.astype(np.uint8)
            tensors[f"{name}_scales"] = rng.integers(120, 130, blocks.shape[:3]).astype(np.uint8)
        save_file(tensors, path, metadata={"format": "pt"})
        wanted = load_pretrained(path.parent)[1]
        with use("data=2,fsdp=2,tensor=2", config):
            found = load_pretrained(path.parent)[1]
            cut = found["layers_0"]["experts"]["down_proj"].sharding.spec
        assert bits(found) == bits(wanted) != bits(params)
    return str(cut)


def check_weights_are_read_in_parts():
    """Families with transposed, joined and stacked tensors; each device's part by itself."""
    told = {}
    for name, config in {
        "qwen2": shape(model_type="qwen2", output_bias=False),
        "phi3": shape(model_type="phi3", attention_bias=False),
        "mixtral": shape(
            model_type="mixtral",
            attention_bias=False,
            intermediate_size=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
        ),
        "gpt_oss": gpt_oss(),
        "apertus": shape(
            model_type="apertus",
            output_bias=True,
            qk_norm="head",
            gated_mlp=False,
            hidden_act="xielu",
        ),
    }.items():
        model = Transformer(config)
        params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
        with tempfile.TemporaryDirectory() as directory:
            path = save_pretrained(f"{directory}/model", model, params)
            with use("data=2,fsdp=2,tensor=2", config):
                found = load_pretrained(path)[1]
                assert bits(found) == bits(params), name
                kernel = found["layers_0"]["k_proj"]["kernel"]
                told[name] = str(kernel.sharding.spec)
                again = save_pretrained(f"{directory}/again", model, found)
            assert bits(load_pretrained(again)[1]) == bits(params), name
    return told


def check_a_batch_that_does_not_divide_is_refused():
    with use("data=8"):
        try:
            parallel.shard_batch({"x": np.zeros((12, 2))})
        except ValueError as error:
            return str(error)
    raise AssertionError("12 rows on 8 devices")


def check_a_job_on_a_mesh():
    """From flags: two rows per device on four devices are eight on one."""
    losses = {}
    with tempfile.TemporaryDirectory() as directory:
        rows = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(24)]
        for name, flags in {
            "one": {"per_device_train_batch_size": 16},
            "mesh": {"per_device_train_batch_size": 4, "mesh": "data=2,fsdp=2,tensor=2"},
        }.items():
            config = SFTConfig().replace(
                max_steps=3, logging_steps=1.0, output_dir=f"{directory}/{name}", **flags
            )
            console = Console(file=io.StringIO(), width=200)
            result = TrainerEngine(console=console).run_job(config, rows)
            log = (result.output_dir / "metrics.jsonl").read_text().splitlines()
            losses[name] = [line["loss"] for line in map(json.loads, log) if "loss" in line]
        text = console.file.getvalue()
        assert "mesh: data=2,fsdp=2,tensor=2 on 8 x cpu" in text, text
        same(losses["mesh"], losses["one"])
        # And on, on another mesh with as many rows.
        config = config.replace(
            max_steps=4, mesh="data=8", per_device_train_batch_size=2, resume="auto",
            allow_config_change=["max_steps"],
        )  # fmt: skip
        TrainerEngine(console=console).run_job(config, rows)
        log = (result.output_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line).get("step") for line in log]


CHECKS = {name[6:]: f for name, f in globals().items() if name.startswith("check_")}

# Minutes, for what other checks hold in part: rollouts as GRPO's, losses as DPO's, layers as SFT's.
ONLY_IN_ALL = ("online_dpo", "ppo", "quantised_weights", "shared_keys")


def main(names):
    assert jax.device_count() == 8, jax.devices()
    usual = [name for name in CHECKS if ALL or name not in ONLY_IN_ALL]
    for name in [name for name in names if name != "--all"] or usual:
        try:
            print(json.dumps({"check": name, "told": CHECKS[name]()}), flush=True)
        except Exception:
            print(json.dumps({"check": name, "error": traceback.format_exc()}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
