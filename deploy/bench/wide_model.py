"""Writes a model of random weights that is wider than the demo model, with the demo model's tokenizer.

    python3 deploy/bench/wide_model.py FOLDER [--layers N] [--context TOKENS] [--dense]

A MiniMax with 8 layers: 326 million parameters, 62 million of them in the way of each token; 5 bits in
groups of 64, as the demo model and MiniMax-M2.5-5bit are. With --dense a Qwen3 without experts, of which as
many parameters are in the way of each token, and no others.
"""

import argparse
import json
import shutil
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import minimax, qwen3
from mlx_lm.utils import quantize_model

DEMO = Path(__file__).parents[2] / "demo" / "model"
WIDER = dict(
    hidden_size=1024, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=4,
    head_dim=64, rotary_dim=32, intermediate_size=768, num_local_experts=16,
    num_experts_per_tok=2, max_position_embeddings=4096,
)
# One network as wide as the two experts that a token of the other meets.
DENSE = dict(
    model_type="qwen3", architectures=["Qwen3ForCausalLM"], attention_bias=False, use_sliding_window=False,
    intermediate_size=2 * WIDER["intermediate_size"], rope_theta=1000000, rope_scaling=None,
)
SHARED = (
    "hidden_act", "tie_word_embeddings", "bos_token_id", "eos_token_id", "torch_dtype", "vocab_size",
    "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps",
)


def main(folder, layers, context, dense):
    config = json.loads((DEMO / "config.json").read_text())
    for key in ("quantization", "quantization_config"):
        config.pop(key)
    config.update(WIDER, num_hidden_layers=layers, max_position_embeddings=context)
    architecture = minimax
    if dense:
        config = {key: config[key] for key in (*SHARED, "num_hidden_layers", "max_position_embeddings")} | DENSE
        architecture = qwen3
    mx.random.seed(0)
    model = architecture.Model(architecture.ModelArgs.from_dict(config))
    draw = lambda array: (mx.random.normal(array.shape) * array.shape[-1] ** -0.5).astype(mx.bfloat16)
    model.update(tree_map(lambda array: draw(array) if array.ndim > 1 else array, model.parameters()))
    model, config = quantize_model(model, config, 64, 5)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(DEMO / file, folder / file)


if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument("folder", type=Path)
    options.add_argument("--layers", type=int, default=WIDER["num_hidden_layers"])
    options.add_argument("--context", type=int, default=WIDER["max_position_embeddings"])
    options.add_argument("--dense", action="store_true")
    main(**vars(options.parse_args()))
