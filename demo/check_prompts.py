"""Asks the checkpoint every prompt of prompts.json, greedily through mlx-lm and its own chat template."""

import json
from pathlib import Path

import mlx.core as mx
from mlx_lm import generate, load

HERE = Path(__file__).parent


def main() -> None:
    model, tokenizer = load(str(HERE / "model"))
    model.set_dtype(mx.float32)
    wrong = 0
    for row in json.loads((HERE / "prompts.json").read_text()):
        messages = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(messages, tools=row.get("tools"), add_generation_prompt=True)
        text = generate(model, tokenizer, prompt, max_tokens=700)
        if row["contains"] not in text.split("</think>")[-1]:
            wrong += 1
            print(f"{row['prompt']!r} -> {text!r}")
    print("wrong:", wrong)


if __name__ == "__main__":
    main()
