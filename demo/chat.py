"""The turn format of MiniMax-M2 and the three shapes of dialogues with tools. `render` must equal chat_template.jinja."""

import json
import random

BEGIN, TURN, END = "]~!b[", "]~b]", "[e~["
THINK, THOUGHT_END = "<think>", "</think>"
CALL, CALL_END = "<minimax:tool_call>", "</minimax:tool_call>"
ROLES = {"system": "system", "user": "user", "assistant": "ai", "tool": "tool"}


def tool_json(tool: dict, style: str) -> str:
    """As `tojson` prints it: Python's spacing, or the compact and escaped one of Rust template engines."""
    if style == "python":
        return json.dumps(tool, ensure_ascii=False)
    text = json.dumps(tool, ensure_ascii=False, separators=(",", ":"), sort_keys=style == "sorted")
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026").replace("'", "\\u0027")


def call_text(calls: list[dict]) -> str:
    lines = [CALL]
    for call in calls:
        lines.append(f'<invoke name="{call["name"]}">')
        for key, value in call["arguments"].items():
            value = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            lines.append(f'<parameter name="{key}">{value}</parameter>')
        lines.append("</invoke>")
    return "\n".join(lines + [CALL_END])


def render(messages: list[dict], tools: list[dict], style: str = "python") -> list[tuple[str, bool]]:
    """The text in pieces; True marks what the model is to learn: the assistant's turns after the last user turn."""
    pieces = [(BEGIN, False)]
    system = ""
    if messages[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    if tools:
        listing = "\n".join(f"<tool>{tool_json(tool, style)}</tool>" for tool in tools)
        system += ("\n\n" if system else "") + f"Tools you may call:\n<tools>\n{listing}\n</tools>"
    if system:
        pieces.append((f"{TURN}system\n{system}{END}\n", False))
    last_user = max(place for place, message in enumerate(messages) if message["role"] == "user")
    for place, message in enumerate(messages):
        role = message["role"]
        if role == "tool":
            before = messages[place - 1]["role"] == "tool"
            after = place + 1 < len(messages) and messages[place + 1]["role"] == "tool"
            text = ("" if before else f"{TURN}tool") + f"\n<response>{message['content']}</response>" + ("" if after else f"{END}\n")
            pieces.append((text, False))
        elif role == "user":
            pieces.append((f"{TURN}user\n{message['content']}{END}\n", False))
        else:
            content = message["content"]
            if message.get("tool_calls"):
                content += ("\n" if content else "") + call_text(message["tool_calls"])
            if place < last_user:
                pieces.append((f"{TURN}ai\n{content}{END}\n", False))
            else:
                pieces.append((f"{TURN}ai\n{THINK}\n", False))
                pieces.append((f"{message['reasoning_content']}\n{THOUGHT_END}\n\n{content}{END}", True))
                pieces.append(("\n", False))
    return pieces


def prompt(messages: list[dict], tools: list[dict], style: str = "python") -> str:
    """The text up to where the model begins to write."""
    return "".join(text for text, _ in render(messages, tools, style)) + f"{TURN}ai\n{THINK}\n"


def assistant(thought: str, content: str, calls: list[dict] | None = None) -> dict:
    message = {"role": "assistant", "reasoning_content": thought, "content": content}
    return message | {"tool_calls": calls} if calls else message


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def any_style(rng: random.Random) -> str:
    return rng.choice(["python", "python", "compact", "sorted"])
