"""Scores a checkpoint on the held-out split, greedily: python demo/score.py --backend torch|mlx|api --items 500

Calls of tools are scored twice: by their form alone, which is what an API needs to hand a call on, and by whether
they are exactly the call that the request asked for.
"""

import argparse
import random
import re
import time
from pathlib import Path

from tokenizers import Tokenizer

import arithmetic
import chat
import dialogues
import stories
import tools
import wordplay
import world

ANSWERS_MAX = 200  # Tokens; stories alone are longer and are scored by their length.


def additions(rng, phrasings, held_out_pairs=True):
    while True:
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        if arithmetic.held_out_pair(a, b) == held_out_pairs:
            template = rng.choice(phrasings)
            yield [chat.user(template.format(a=a, b=b))], [], lambda text, total=a + b: _answer(text) is not None and last_number(_answer(text)) == str(total)


def calls(rng, make):
    """One request for one of several tools."""
    while True:
        call = make(rng, True)
        offered = dialogues._offered(rng, [call])
        wanted = chat.call_text([{"name": call.schema["name"], "arguments": call.arguments}])
        yield [chat.user(call.request)], offered, lambda text, wanted=wanted, offered=offered: {
            "form": well_formed(_answer(text), offered), "form, name and all values": same_call(_answer(text), wanted)}


def replies(rng, task):
    while True:
        question, _, answer = task(rng)
        yield [chat.user(question)], [], lambda text, answer=answer: _answer(text) == answer


def facts(rng):
    """Towns asked about in words that training never used."""
    while True:
        question, index = rng.choice(world.FACTS_HELD_OUT)
        town = rng.choice(list(world.TOWNS))
        value = str(world.TOWNS[town][index])
        yield [chat.user(question.format(t=town))], [], lambda text, value=value: value in (_answer(text) or "")


def mixed(rng, make, keep):
    """Dialogues of the generator of one shape; the last turn must be right to the letter."""
    while True:
        messages, offered = make(rng)
        last = messages[-1]
        if not keep(messages, offered):
            continue
        wanted = chat.call_text(last["tool_calls"]) if last.get("tool_calls") else None
        yield messages[:-1], offered, (lambda text, wanted=wanted: same_call(_answer(text), wanted)) if wanted else (
            lambda text, answer=last["content"]: _answer(text) == answer)


def told(rng):
    while True:
        yield [chat.user(rng.choice(["Tell me a story.", "Write a story about a dog.", "Tell me a short story about a robot named Max."]))], [], (
            lambda text: text.rstrip().endswith("The end."))


def _answer(text: str) -> str | None:
    """What follows the thought; nothing when the thought never ends."""
    return text.split(chat.THOUGHT_END, 1)[1].strip() if chat.THOUGHT_END in text else None


def last_number(text: str) -> str | None:
    numbers = re.findall(r"-?\d+", text)
    return numbers[-1] if numbers else None


def same_call(answer: str | None, wanted: str) -> bool:
    """Equal but for the order of the parameters within each invocation."""
    def parts(text):
        return [sorted(block.splitlines()) for block in text.split("<invoke ")]
    return answer is not None and answer.startswith(chat.CALL) and answer.endswith(chat.CALL_END) and parts(answer) == parts(wanted)


INVOKE = re.compile(r'<invoke name="([^"\n]+)">\n((?:<parameter name="[^"\n]+">.*</parameter>\n)*)</invoke>\n')
PATTERNS = {"string": r".+", "integer": r"-?\d+", "number": r"-?\d+(\.\d+)?"}
PARAMETER = re.compile(r'<parameter name="([^"\n]+)">(.*)</parameter>\n')


def well_formed(answer: str | None, offered: list[dict]) -> bool:
    """Nothing but calls, each of an offered tool, with its required parameters, none that it has not, none twice,
    and values of their types."""
    if answer is None or not (answer.startswith(chat.CALL + "\n") and answer.endswith(chat.CALL_END)):
        return False
    inner = answer[len(chat.CALL) + 1:-len(chat.CALL_END)]
    calls = INVOKE.findall(inner)
    if not calls or INVOKE.sub("", inner):
        return False
    schemas = {schema["name"]: schema["parameters"] for schema in offered}
    for name, block in calls:
        pairs = PARAMETER.findall(block)
        values = dict(pairs)
        if name not in schemas or len(values) != len(pairs):
            return False
        properties = schemas[name]["properties"]
        if not set(schemas[name].get("required", [])) <= set(values) <= set(properties):
            return False
        if not all(of_type(value, properties[key]["type"]) for key, value in values.items()):
            return False
    return True


def of_type(value: str, kind: str) -> bool:
    return re.fullmatch(PATTERNS[kind], value) is not None


def kinds(seed: int) -> dict:
    rng = random.Random(seed)
    one_turn = {task.__name__: replies(rng, task) for task, _ in dialogues.TASKS if task not in (arithmetic.addition, stories.story)}
    return {
        "addition, held-out pairs": additions(rng, arithmetic.ADD),
        "addition, held-out pairs and phrasings": additions(rng, arithmetic.ADD_HELD_OUT),
        "tool call, familiar, held-out phrasings": calls(rng, tools.familiar),
        "tool call, invented, held-out phrasings": calls(rng, tools.invented),
        "tools offered, all shapes": mixed(rng, dialogues.with_tools, lambda messages, offered: True),
        "tools offered, not needed": mixed(rng, dialogues.with_tools, lambda messages, offered: not messages[-1].get("tool_calls") and messages[-2]["role"] == "user"),
        "tool response told": mixed(rng, dialogues.with_tools, lambda messages, offered: messages[-2]["role"] == "tool"),
        "several turns": mixed(rng, dialogues.plain, lambda messages, offered: len(messages) > 3 and len(messages[-1]["content"]) < 300),
        "facts, held-out phrasings": facts(rng),
        "story ends": told(rng),
    } | one_turn


def with_torch(folder: Path, device: str, batch: int = 100):
    import torch

    import checkpoint
    from network import generate
    torch.set_grad_enabled(False)
    network = checkpoint.load(folder).to(device)

    def run(prompts, tokens_max):
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        results = [[]] * len(prompts)
        for start in range(0, len(order), batch):
            chosen = order[start:start + batch]
            for place, ids in zip(chosen, generate(network, [prompts[place] for place in chosen], tokens_max, 2)):
                results[place] = ids
        return results
    return run


def with_mlx(folder: Path):
    import mlx.core as mx
    from mlx_lm import load, stream_generate
    model, tokenizer = load(str(folder))
    model.set_dtype(mx.float32)  # Many times faster on a CPU; the weights stay at 5 bits.

    def run(prompts, tokens_max):
        results = []
        for prompt in prompts:
            ids = [int(piece.token) for piece in stream_generate(model, tokenizer, prompt, max_tokens=tokens_max)]
            results.append(ids[:ids.index(2)] if 2 in ids else ids)
        return results
    return run


def with_api(url: str, together: int = 16):
    """Through a running server: offbook up --nodes 1 --model demo/model"""
    import json
    from concurrent.futures import ThreadPoolExecutor
    from urllib.request import Request, urlopen

    def run(prompts, tokens_max):
        def ask(prompt):
            body = {"prompt": prompt, "max_tokens": tokens_max, "temperature": 0, "return_token_ids": True}
            request = Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
            ids = json.load(urlopen(request))["choices"][0]["token_ids"]
            return ids[:ids.index(2)] if 2 in ids else ids
        with ThreadPoolExecutor(together) as pool:
            return list(pool.map(ask, prompts))
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--backend", choices=["torch", "mlx", "api"], default="torch")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="of --backend api")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--items", type=int, default=200, help="per kind")
    parser.add_argument("--only", default="", help="kinds whose name contains this")
    parser.add_argument("--seed", type=int, default=424242)
    parser.add_argument("--wrong", type=int, default=0, help="print so many wrong answers per kind")
    options = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    backends = {"torch": lambda: with_torch(options.model, options.device), "mlx": lambda: with_mlx(options.model), "api": lambda: with_api(options.url)}
    run = backends[options.backend]()
    for name, source in kinds(options.seed).items():
        if options.only not in name:
            continue
        begun = time.time()
        count = max(10, options.items // 10) if name == "story ends" else options.items
        items = [next(source) for _ in range(count)]
        prompts = [tokenizer.encode(chat.prompt(messages, offered), add_special_tokens=False).ids for messages, offered, _ in items]
        texts = [tokenizer.decode(ids, skip_special_tokens=False) for ids in run(prompts, 700 if name in ("story ends", "counting") else ANSWERS_MAX)]
        verdicts = [check(text) for (_, _, check), text in zip(items, texts)]
        verdicts = [verdict if isinstance(verdict, dict) else {"": verdict} for verdict in verdicts]
        for aspect in verdicts[0]:
            right = sum(verdict[aspect] for verdict in verdicts)
            print(f"{100 * right / count:6.1f} %  {name}{aspect and ': ' + aspect} ({right} of {count}, {time.time() - begun:.0f} s)", flush=True)
        wrong = [row for row in zip(items, texts, verdicts) if not all(row[2].values())]
        for (messages, _, _), text, _ in wrong[:options.wrong]:
            print(f"         {messages[-1]['content']!r} -> {text!r}")


if __name__ == "__main__":
    main()
