"""Times decode steps of MiniMax-M2.5's shape in mlx-lm, for a comparison with `offbook bench step`.

    python3 deploy/bench/mlx_lm_step.py LAYERS BATCH [STEPS]

Weights are random codes at 5 bits in groups of 64, the router at 8, as in MiniMax-M2.5-5bit. Each sequence
has 128 positions before the first step that is timed; each step is submitted before the one before is read, as
mlx-lm's own loop does. Prints the median of a step in milliseconds, as one line of JSON.
"""

import json
import statistics
import sys
import time

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import minimax
from mlx_lm.models.cache import make_prompt_cache
from mlx.utils import tree_flatten

SHAPE = dict(
    model_type="minimax", hidden_size=3072, intermediate_size=1536, num_attention_heads=48,
    num_key_value_heads=8, max_position_embeddings=196608, num_experts_per_tok=8,
    num_local_experts=256, shared_intermediate_size=0, head_dim=128, rotary_dim=64,
    rms_norm_eps=1e-6, rope_theta=5000000, vocab_size=200064, tie_word_embeddings=False,
    scoring_func="sigmoid", use_qk_norm=True,
)
POSITIONS = 128


def without_global_scale(function):
    """mlx-lm says `global_scale=None` to MLX 0.32.2 too, which has no such argument and means the same."""
    return lambda *args, global_scale=None, **more: function(*args, **more)


def draw(name, array):
    """Numbers that keep activations finite: the speed of a step does not depend on what they mean."""
    if array.dtype == mx.uint32:
        return mx.random.randint(0, 2**31 - 1, array.shape).astype(mx.uint32)
    if name.endswith("scales"):
        return mx.full(array.shape, 1e-3, dtype=mx.bfloat16)
    if name.endswith("biases"):
        return mx.full(array.shape, -1.5e-2, dtype=mx.bfloat16)
    if "correction" in name:
        return mx.zeros(array.shape)
    return mx.ones(array.shape, dtype=mx.bfloat16)


def packing(path, part):
    if not hasattr(part, "to_quantized"):
        return False
    return {"group_size": 64, "bits": 8} if path.endswith("gate") else True


def fill(model):
    # What is not quantised yet is never computed: only its shape is looked at.
    nn.quantize(model, group_size=64, bits=5, class_predicate=packing)
    for name, array in tree_flatten(model.parameters()):
        drawn = draw(name, array)
        mx.eval(drawn)
        model.load_weights([(name, drawn)], strict=False)


def main(layers, batch, steps):
    if mx.__version__ == "0.32.2":
        for name in ("gather_qmm", "quantized_matmul"):
            setattr(mx, name, without_global_scale(getattr(mx, name)))
    model = minimax.Model(minimax.ModelArgs.from_dict(SHAPE | dict(num_hidden_layers=layers)))
    fill(model)
    cache = make_prompt_cache(model)
    prompt = mx.random.randint(0, SHAPE["vocab_size"], (batch, POSITIONS))
    token = mx.argmax(model(prompt, cache=cache)[:, -1, :], axis=-1)
    mx.eval(token)
    times = []
    for _ in range(steps + 1):
        following = mx.argmax(model(token[:, None], cache=cache)[:, -1, :], axis=-1)
        mx.async_eval(following)
        token.tolist()
        times.append(time.perf_counter())
        token = following
    gaps = [after - before for before, after in zip(times[1:], times[2:])]
    print(json.dumps(dict(
        layers=layers, batch=batch, steps=len(gaps), step_ms=statistics.median(gaps) * 1e3,
        mlx=mx.__version__, device=str(mx.default_device()),
    )))


if __name__ == "__main__":
    layers, batch, *steps = map(int, sys.argv[1:])
    main(layers, batch, *(steps or [200]))
