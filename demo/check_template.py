"""Checks that model/chat_template.jinja renders the generator's dialogues to exactly the training text: in Jinja2 as
transformers sets it up and, where the `minijinja` package is installed, in the Rust engine."""

import json
import random
from pathlib import Path

import jinja2
import jinja2.sandbox

import chat
import dialogues

TEMPLATE = (Path(__file__).parent / "model" / "chat_template.jinja").read_text()


def in_python(**variables) -> str:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(TEMPLATE).render(**variables)


def in_rust(**variables) -> str:
    import minijinja
    environment = minijinja.Environment(trim_blocks=True, lstrip_blocks=True, pycompat=True)
    return environment.render_str(TEMPLATE, **variables)


def as_clients_send(rng: random.Random, messages: list[dict]) -> list[dict]:
    """The shapes of the same messages on the wire: text parts, functions, arguments as JSON text, the thought inline."""
    sent = []
    for message in messages:
        message = dict(message)
        if message["role"] == "user" and rng.random() < 0.3:
            message["content"] = [{"type": "text", "text": message["content"]}]
        if message.get("tool_calls"):
            message["tool_calls"] = [{"id": "1", "type": "function", "function": call} for call in message["tool_calls"]]
            if not message["content"] and rng.random() < 0.5:
                message["content"] = None
        elif "reasoning_content" in message and rng.random() < 0.3:
            message["content"] = f"<think>\n{message.pop('reasoning_content')}\n</think>\n\n{message['content']}"
        sent.append(message)
    return sent


def main() -> None:
    engines = [(in_python, "python")]
    try:
        import minijinja  # noqa: F401
        engines.append((in_rust, "compact"))
    except ImportError:
        print("minijinja is not installed: only Jinja2 is checked")
    rng = random.Random(5)
    for _ in range(500):
        messages, offered = (dialogues.with_tools if rng.random() < 0.6 else dialogues.plain)(rng)
        sent = as_clients_send(rng, messages)
        tools = [{"type": "function", "function": tool} for tool in offered] if rng.random() < 0.7 else offered
        until = max(place for place, message in enumerate(messages) if message["role"] == "assistant")
        for engine, style in engines:
            whole = "".join(text for text, _ in chat.render(messages, offered, style))
            assert _same(engine(messages=sent, tools=tools or None, add_generation_prompt=False), whole, style)
            assert _same(engine(messages=sent[:until], tools=tools, add_generation_prompt=True), chat.prompt(messages[:until], offered, style), style)
    print("500 dialogues passed,", len(engines), "engines")


def _same(rendered: str, wanted: str, style: str) -> bool:
    if style != "python":  # The order of the keys of a tool may differ between engines: compare all other lines.
        rendered, wanted = ("\n".join(line for line in text.split("\n") if not line.startswith("<tool>")) for text in (rendered, wanted))
    if rendered != wanted:
        print(repr(rendered), repr(wanted), sep="\n")
    return rendered == wanted


if __name__ == "__main__":
    main()
