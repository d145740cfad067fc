"""Trains the tokenizer on the generator's text: byte-level BPE whose words never include a space, digits one by one."""

import argparse
import json
import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import chat
from dialogues import dialogue

# Hidden from decoded text when special tokens are skipped; the thought and the call have to stay visible to parsers.
SPECIAL = [chat.BEGIN, chat.TURN, chat.END]
VISIBLE = [chat.THINK, chat.THOUGHT_END, chat.CALL, chat.CALL_END]
VOCABULARY = 1536  # A multiple of 64 * 3, and enough for the generator's few hundred words.


def train(dialogues: int, seed: int) -> Tokenizer:
    rng = random.Random(seed)
    tokenizer = Tokenizer(models.BPE())
    # A word has the same tokens after a space, a quote or a bracket, so that copying an argument is a plain copy.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{N}|\p{L}+|[^\p{N}\p{L}]+"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
                                  special_tokens=[AddedToken(text, special=True) for text in SPECIAL] + [AddedToken(text, special=False) for text in VISIBLE])
    marks = SPECIAL + VISIBLE

    def texts():
        for _ in range(dialogues):
            text = "".join(piece for piece, _ in dialogue(rng))
            for mark in marks:
                text = text.replace(mark, "")
            yield text
    tokenizer.train_from_iterator(texts(), trainer)
    data = json.loads(tokenizer.to_str())
    for token in data["added_tokens"]:
        token["special"] = token["content"] in SPECIAL
    return Tokenizer.from_str(json.dumps(data))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model" / "tokenizer.json")
    parser.add_argument("--dialogues", type=int, default=30000)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    made = train(arguments.dialogues, arguments.seed)
    made.save(str(arguments.out))
    print(made.get_vocab_size(), "tokens", {mark: made.token_to_id(mark) for mark in SPECIAL + VISIBLE})
