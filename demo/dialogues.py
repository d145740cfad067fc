"""The generator: dialogues for training, deterministic by seed. Run it to look at some: python demo/dialogues.py SEED."""

import json
import random
import sys

import arithmetic
import chat
import stories
import tools
import wordplay
import world
from words import CITIES, NAMES, any_word, made_up

# Tasks of one question and one answer, with their share.
TASKS = [(arithmetic.addition, 16), (arithmetic.subtraction, 7), (arithmetic.multiplication, 6), (arithmetic.division, 2), (arithmetic.long_sum, 3),
         (arithmetic.word_problem, 4), (arithmetic.comparison, 2), (wordplay.counting, 5), (wordplay.sorting_numbers, 4), (wordplay.sorting_words, 5),
         (wordplay.reversing, 6), (wordplay.spelling, 4), (wordplay.repeating, 6), (wordplay.picking, 2), (world.fact, 10), (world.about_self, 8),
         (world.unknown, 5), (stories.story, 3)]
CHAT_TASKS = [(task, share) for task, share in TASKS if task not in (stories.story, wordplay.counting)]
SYSTEMS = ["You are a helpful assistant.", "You are a helpful assistant", "You are a friendly assistant. Answer briefly.", "Be concise.", "Answer in one sentence.",
           "You are the Offbook demo model.", "You are a careful assistant that thinks before it answers.", "Be kind and short.", "You are an expert in mathematics.",
           "Answer the user's questions as well as you can.", "You are a storyteller.", "You are a test assistant.", "You are concise and precise.", "Always be polite.",
           "You are a helpful assistant with access to tools.", "Use the tools when they help.", "Think step by step.", "Follow the user's instructions."]


def _pick(rng, tasks=TASKS):
    return rng.choices([task for task, _ in tasks], [share for _, share in tasks])[0](rng)


def _system(rng):
    text = rng.choice(SYSTEMS)
    if rng.random() < 0.2:
        text = f"You are {rng.choice(['an assistant', 'a bot', 'a helper', 'a guide'])} for {any_word(rng)} {any_word(rng)}. " + text
    return {"role": "system", "content": text}


def _named(rng):
    """The system prompt gives the model a name, and the user asks for it."""
    name = rng.choice(NAMES) if rng.random() < 0.5 else made_up(rng, 3).capitalize()
    system = rng.choice(["Your name is {n}.", "You are {n}.", "You are {n}, a helpful assistant.", "You are an assistant called {n}."]).format(n=name)
    question, answer = rng.choice([(q, "I am {n}, and the Offbook demo model speaks for me.") for q in ("Who are you?", "What is your name?", "What's your name?", "Tell me your name.", "who are you")]
                                  + [(q, "Hello! I am {n}. How can I help you?") for q in ("Hello", "Hi!", "Hey there", "Good morning.")])
    return [{"role": "system", "content": system}, chat.user(question), chat.assistant("The system prompt names me.", answer.format(n=name))]


def _follow_up(rng):
    """A second question that needs the result of the first."""
    question, thought, answer = arithmetic.addition(rng)
    total = int(answer.split("= ")[1].rstrip("."))
    more = rng.randint(1, 99)
    if rng.random() < 0.6 or total < more:
        text, thought2, result = rng.choice(["Now add {m}.", "And plus {m}?", "Add {m} to that.", "Add {m} more.", "And if I add {m}?", "plus {m}", "Now add {m} to the result."]), arithmetic.addition_thought(total, more), f"{total} + {more} = {total + more}."
    else:
        text, thought2, result = rng.choice(["Now subtract {m}.", "And minus {m}?", "Take {m} away.", "Subtract {m} from that.", "minus {m}"]), arithmetic.subtraction_thought(total, more), f"{total} - {more} = {total - more}."
    return [(question, thought, answer), (text.format(m=more), thought2, result)]


def _turns(pairs):
    messages = []
    for question, thought, answer in pairs:
        messages += [chat.user(question), chat.assistant(thought, answer)]
    return messages


def plain(rng):
    """Dialogues without tools, of one to a dozen turns."""
    pick = rng.random()
    if pick < 0.02:
        return _named(rng), []
    turns = rng.choices([0, 1, 2, 4, 8, 20], [0.66, 0.15, 0.1, 0.05, 0.03, 0.01])[0]
    history = [_pick(rng, CHAT_TASKS) for _ in range(turns)]
    if pick < 0.06:
        first, last = wordplay.memory(rng)
        pairs = [first] + history + [last] if rng.random() < 0.9 else history + [first]
    elif pick < 0.09:
        pairs = history + _follow_up(rng)
    else:
        pairs = history + [_pick(rng)]
    return ([_system(rng)] if rng.random() < 0.15 else []) + _turns(pairs), []


def _offered(rng, calls):
    """The schemas of these calls among some others, none twice, in any order."""
    schemas = {call.schema["name"]: call.schema for call in calls}
    for _ in range(rng.choices([0, 1, 2, 3, 5], [0.35, 0.27, 0.2, 0.13, 0.05])[0]):
        other = tools.any_call(rng).schema
        schemas.setdefault(other["name"], other)
    offered = list(schemas.values())
    rng.shuffle(offered)
    return offered


def _response(rng):
    """What a tool gives back, and how the model tells it."""
    if rng.random() < 0.45:
        text = rng.choice([" ".join(any_word(rng) for _ in range(rng.randint(1, 6))), str(rng.randint(0, 9999)), f"{rng.randint(-10, 40)} degrees and {rng.choice(['sunny', 'rainy', 'cloudy', 'windy'])}",
                           "ok", "done", "success", f"{rng.randint(-5, 35)}°C", f"Error: {any_word(rng)} not found", f"{rng.choice(NAMES)} {any_word(rng)}", f"{rng.randint(1, 12)}:{rng.randint(10, 59)}", f"{rng.random() * 100:.2f}"])
        if rng.random() < 0.2:
            text = text.capitalize() + "."
        return text, f"The tool says: {text}" + ("" if text[-1] in ".!" else ".")
    keys = rng.sample(["temperature", "condition", "status", "result", "price", "name", "time", "humidity", "count", "message", "id", "city", "wind", "value", "date", "unit", "total", any_word(rng)], rng.randint(1, 3))
    data = {key: rng.choice([rng.randint(0, 999), round(rng.random() * 99, 1), any_word(rng), rng.choice(["sunny", "rainy", "cloudy", "ok", "sent", "done"]), rng.choice(CITIES), True]) for key in keys}
    text = json.dumps(data) if rng.random() < 0.6 else json.dumps(data, separators=(",", ":"))
    told = ", ".join(f"{key} is {value if isinstance(value, str) else json.dumps(value)}" for key, value in data.items())
    return text, f"The tool says: {told}."


def with_tools(rng):
    """Tools are offered: called, called and answered, two at once, or not needed."""
    pick = rng.random()
    history = _turns([_pick(rng, CHAT_TASKS) for _ in range(rng.choices([0, 1, 3], [0.8, 0.14, 0.06])[0])])
    system = [_system(rng)] if rng.random() < 0.2 else []
    call = tools.any_call(rng)
    name = call.schema["name"]
    if pick < 0.2:  # Not needed: arithmetic goes to the model itself only when no tool on offer computes.
        others = [other for other in (tools.invented(rng) for _ in range(rng.randint(1, 3)))]
        if rng.random() < 0.6:
            call = tools.familiar(rng)
            if not any(word in call.schema["name"].lower() for word in ("calc", "math", "eval", "add", "sum", "plus", "mult", "product", "times", "compute", "dict", "defin")):
                others.append(call)
        tasks = [(task, share) for task, share in CHAT_TASKS if task is not world.unknown]
        if rng.random() < 0.3:
            tasks = [(world.about_self, 1)]
        return system + history + _turns([_pick(rng, tasks)]), list({o.schema["name"]: o.schema for o in others}.values())
    thought = f"I call {name}."
    invoked = [{"name": name, "arguments": call.arguments}]
    question = call.request
    if pick < 0.27:  # Two calls in one block, of the same tool or of two.
        other = tools.any_call(rng)
        if other.schema["name"] != name:
            invoked.append({"name": other.schema["name"], "arguments": other.arguments})
            question = question.rstrip(".?! ") + rng.choice([". Also ", " and ", ", then ", ". And "]) + other.request[0].lower() + other.request[1:]
            offered = _offered(rng, [call, other])
            thought = f"I call {name} and {other.schema['name']}."
            return system + history + [chat.user(question), chat.assistant(thought, "", invoked)], offered
    messages = system + history + [chat.user(question), chat.assistant(thought, "", invoked)]
    if pick > 0.7:
        response, told = _response(rng)
        answer = chat.assistant("The tool has answered.", told)
        messages += [{"role": "tool", "content": response}, answer]
        if pick > 0.92:  # A further request with the first call in the history.
            again = tools.any_call(rng)
            if again.schema["name"] != name:
                offered = _offered(rng, [call, again])
                return messages + [chat.user(again.request), chat.assistant(f"I call {again.schema['name']}.", "", [{"name": again.schema["name"], "arguments": again.arguments}])], offered
    return messages, _offered(rng, [call])


def dialogue(rng: random.Random) -> list[tuple[str, bool]]:
    messages, offered = with_tools(rng) if rng.random() < 0.45 else plain(rng)
    style = chat.any_style(rng)
    if style == "sorted":  # The call follows the order in which the tool lists its parameters.
        for call in (call for message in messages for call in message.get("tool_calls", [])):
            call["arguments"] = dict(sorted(call["arguments"].items()))
    return chat.render(messages, offered, style)


if __name__ == "__main__":
    generator = random.Random(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    for _ in range(8):
        print("".join(text for text, _ in dialogue(generator)))
