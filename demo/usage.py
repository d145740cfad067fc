"""Measures how evenly the router uses the experts over fresh dialogues: python demo/usage.py"""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer

import checkpoint
from dialogues import dialogue


def main() -> None:
    folder = Path(__file__).parent / "model"
    network, tokenizer = checkpoint.load(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    rng, total = random.Random(99), 0
    for _ in range(150):
        ids = tokenizer.encode("".join(text for text, _ in dialogue(rng)), add_special_tokens=False).ids[:2048]
        with torch.no_grad():
            total = total + network(torch.tensor([ids]), torch.arange(len(ids))[None])[1]
    for layer, share in enumerate(total / total.sum(-1, keepdim=True)):
        print(f"layer {layer}: least used expert {100 * share.min():.1f} %, most used {100 * share.max():.1f} % (even would be {100 / len(share):.2f} %)")


if __name__ == "__main__":
    main()
