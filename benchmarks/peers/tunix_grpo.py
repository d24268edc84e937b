"""GRPO with Tunix: `python benchmarks/peers/tunix_grpo.py MODEL_DIR`; see compare.py.

Float32, no rematerialisation, Tunix's own rollout engine. MODEL_DIR holds a model of the Llama
family.
"""

import importlib.metadata
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import task
import transformers
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as weights
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout import base_rollout

MAX_PROMPT = 64  # prompts are padded on the left to this many tokens


def read_config(model_dir: str) -> llama.ModelConfig:
    """Tunix's configuration of a Hugging Face directory."""
    config = json.loads(Path(model_dir, "config.json").read_text())
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    return llama.ModelConfig(
        num_layers=config["num_hidden_layers"],
        vocab_size=config["vocab_size"],
        embed_dim=config["hidden_size"],
        hidden_dim=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        head_dim=config["head_dim"],
        num_kv_heads=config["num_key_value_heads"],
        rope_theta=int(theta),
        norm_eps=config["rms_norm_eps"],
        weight_tying=config["tie_word_embeddings"],
    )


def main(model_dir: str, steps: int = 8) -> None:
    """Trains for a few steps. Rewards are asked for once a step, so a step is the time between."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    with mesh:
        model = weights.create_model_from_safe_tensors(
            model_dir, read_config(model_dir), mesh, jnp.float32
        )
    asked, lengths = [], []

    def right(prompts, completions, answer, **columns):
        asked.append(time.perf_counter())
        lengths.append(np.mean([len(tokenizer.encode(str(text))) + 1 for text in completions]))
        return [task.reward(str(text), str(a)) for text, a in zip(completions, answer, strict=True)]

    rollout = base_rollout.RolloutConfig(
        max_tokens_to_generate=task.NEW_TOKENS,
        max_prompt_length=MAX_PROMPT,
        kv_cache_size=MAX_PROMPT + task.NEW_TOKENS + 8,
        temperature=1.0,
        top_p=None,
        eos_tokens=[tokenizer.eos_token_id],
    )
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.adamw(task.LEARNING_RATE),
        eval_every_n_steps=1000,
        max_steps=steps,
        mini_batch_size=task.PROMPTS,
        train_micro_batch_size=task.PROMPTS,
    )
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.ROLLOUT, rl_cluster.Role.REFERENCE)
    cluster = rl_cluster.RLCluster(
        actor=model,
        tokenizer=tokenizer,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={role: mesh for role in roles},
            training_config=training,
            rollout_config=rollout,
        ),
    )
    learner = GRPOLearner(
        cluster, GRPOConfig(num_generations=task.COMPLETIONS, beta=0.0), reward_fns=[right]
    )
    rows = task.rows(task.PROMPTS * (steps + 1))
    texts = [
        tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        for row in rows
    ]
    answers = [row["answer"] for row in rows]
    batches = [
        {
            "prompts": np.array(texts[i : i + task.PROMPTS]),
            "answer": np.array(answers[i : i + task.PROMPTS]),
        }
        for i in range(0, len(rows), task.PROMPTS)
    ]
    learner.train(batches)
    asked.append(time.perf_counter())
    version = importlib.metadata.version("google-tunix")
    task.report(f"Tunix {version}", np.diff(asked).tolist(), lengths)


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
