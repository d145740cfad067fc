"""Counting, sorting, reversing, spelling, repeating: small tasks on words and numbers."""

import random

from words import NAMES, NOUNS, any_word, made_up, request, vary


def counting(rng: random.Random) -> tuple[str, str, str]:
    pick = rng.random()
    if pick < 0.55:
        low = 1 if rng.random() < 0.6 else rng.randint(0, 60)
        high = low + rng.choice([rng.randint(2, 12), rng.randint(5, 30), rng.randint(20, 60), rng.randint(50, 99)])
        if low == 1 and rng.random() < 0.15:
            high = rng.choice([10, 20, 50, 100])
        if low == 1 and rng.random() < 0.6:
            text = rng.choice(["Count to {h}.", "Count up to {h}.", "Count from 1 to {h}.", "Count to {h} for me.", "List the numbers up to {h}."])
        else:
            text = rng.choice(["Count from {l} to {h}.", "List the numbers from {l} to {h}.", "Count up from {l} to {h}.",
                               "Write the numbers {l} to {h}.", "Give me all numbers from {l} to {h}.", "Print the numbers between {l} and {h}."])
        numbers, thought = range(low, high + 1), f"From {low} to {high}, one by one."
    elif pick < 0.8:
        high = rng.randint(3, 30)
        low = rng.choice([1, 1, 0, rng.randint(0, high - 1)])
        text = rng.choice(["Count down from {h} to {l}.", "Count backwards from {h} to {l}.", "Count from {h} down to {l}."])
        numbers, thought = range(high, low - 1, -1), f"From {high} down to {low}."
    else:
        step = rng.choice([2, 3, 5, 10])
        low = step if rng.random() < 0.6 else 0
        high = step * rng.randint(3, 12)
        text = rng.choice(["Count by {s}s from {l} to {h}.", "Count from {l} to {h} in steps of {s}.", "Count in {s}s from {l} to {h}."])
        numbers, thought = range(low, high + 1, step), f"From {low} to {high} in steps of {step}."
        return request(rng, text).format(l=low, h=high, s=step), thought, ", ".join(map(str, numbers)) + "."
    return request(rng, text).format(l=low, h=high), thought, ", ".join(map(str, numbers)) + "."


def sorting_numbers(rng: random.Random) -> tuple[str, str, str]:
    numbers = rng.sample(range(0, rng.choice([10, 100, 100, 1000])), rng.randint(3, 7))
    down = rng.random() < 0.3
    listing = rng.choice([", ", ", ", " ", ","]).join(map(str, numbers))
    order = rng.choice([" in descending order", " from largest to smallest", " descending"]) if down else \
        rng.choice(["", " in ascending order", " from smallest to largest", " ascending"])
    text = rng.choice([f"Sort these numbers{order}: {{l}}", f"Sort {{l}}{order}.", f"Sort the numbers {{l}}{order}.",
                       f"Order these numbers{order}: {{l}}.", f"Put these numbers in order{order.replace(' in', ',')}: {{l}}"])
    ordered = sorted(numbers, reverse=down)
    return request(rng, text).format(l=listing), _by_digits(numbers), ", ".join(map(str, ordered)) + "."


def _by_digits(numbers: list[int]) -> str:
    """The smallest first, those with fewer digits before those with more."""
    groups = [[number for number in sorted(numbers) if len(str(number)) == digits] for digits in range(1, 5)]
    return " ".join(f"With {len(str(group[0]))} digits {' '.join(map(str, group))}." for group in groups if group)


def sorting_words(rng: random.Random) -> tuple[str, str, str]:
    words = rng.sample(NOUNS, rng.randint(3, 6))
    listing = rng.choice([", ", ", ", " "]).join(words)
    if rng.random() < 0.25:
        listing = ", ".join(words[:-1]) + " and " + words[-1]
    text = rng.choice(["Sort these words: {l}", "Sort these words alphabetically: {l}", "Sort {l} alphabetically.", "Put these words in alphabetical order: {l}.",
                       "Order the words {l} from A to Z.", "Sort the words {l}.", "Alphabetize: {l}", "Sort: {l}", "sort {l}", "Sort this list: {l}", "Sort this list of words: {l}", "Arrange these words in alphabetical order: {l}"])
    ordered = sorted(words)
    return request(rng, text).format(l=listing), ", ".join(f"{word[0]} {word[1]} {word}" for word in words) + ".", ", ".join(ordered) + "."


def reversing(rng: random.Random) -> tuple[str, str, str]:
    if rng.random() < 0.4:
        words = [any_word(rng) for _ in range(rng.randint(3, 6))]
        listing = rng.choice([" ", ", "]).join(words)
        text = rng.choice(["Reverse the order of these words: {l}", "Say these words in reverse order: {l}", "List these words backwards: {l}.", "Reverse this list: {l}"])
        return request(rng, text).format(l=listing), "From last to first.", ", ".join(reversed(words)) + "."
    word = any_word(rng)[:9] if rng.random() < 0.7 else made_up(rng, 2)[:8]
    text = rng.choice(["Reverse the word {w}.", "Reverse the word '{w}'.", 'Reverse "{w}".', "Spell {w} backwards.", "What is {w} spelled backwards?",
                       "Write {w} backwards.", "Reverse the letters of {w}.", "reverse {w}", "Say '{w}' in reverse.", "What is '{w}' in reverse?"])
    return request(rng, text).format(w=word), f"{' '.join(word)}. Backwards {' '.join(word[::-1])}.", f"{word} reversed is {word[::-1]}."


def spelling(rng: random.Random) -> tuple[str, str, str]:
    word = any_word(rng)[:10] if rng.random() < 0.75 else made_up(rng, 2)[:9]
    if rng.random() < 0.5:
        text = rng.choice(["Spell {w}.", "Spell the word {w}.", 'How do you spell "{w}"?', "Spell out {w}."])
        return request(rng, text).format(w=word), f"The letters of {word}.", "-".join(word) + "."
    text = rng.choice(["How many letters are in {w}?", "How many letters does the word {w} have?", "Count the letters in '{w}'.", 'How long is the word "{w}"?'])
    count = ", ".join(f"{letter} {place}" for place, letter in enumerate(word, 1))
    return vary(rng, text).format(w=word), f"I count {count}.", f"The word {word} has {len(word)} letters."


def repeating(rng: random.Random) -> tuple[str, str, str]:
    phrase = "hello world" if rng.random() < 0.05 else " ".join(any_word(rng) for _ in range(rng.randint(1, 6)))
    if rng.random() < 0.3:
        phrase = phrase.capitalize()
    if rng.random() < 0.1:
        phrase = phrase.upper()
    times = rng.randint(2, 5)
    if rng.random() < 0.3:
        text = rng.choice(["Say {p} {n} times.", "Repeat {p} {n} times.", "Write '{p}' {n} times.", 'Repeat "{p}" {n} times.'])
        return text.format(p=phrase, n=times), f"I say it {times} times.", " ".join([phrase] * times)
    text = rng.choice(["Say {p}", "Repeat after me: {p}", 'Say "{p}".', "Repeat: {p}", "Say '{p}'.", "Respond with exactly: {p}", "Reply with {p}",
                       "Echo {p}", "Answer only with: {p}", "Repeat this sentence: {p}", 'Reply with only "{p}".', "Reply with exactly: {p}", "Print {p}"])
    return text.format(p=phrase), "I repeat it.", phrase


def picking(rng: random.Random) -> tuple[str, str, str]:
    words = [any_word(rng) for _ in range(rng.randint(3, 6))]
    place = rng.randrange(len(words)) if rng.random() < 0.6 else rng.choice([0, len(words) - 1])
    name = "last" if place == len(words) - 1 else ["first", "second", "third", "fourth", "fifth"][place]
    text = rng.choice(["What is the {n} word of: {l}?", "Which word is {n} in this list: {l}?", "What is the {n} word in {l}?", "Give me the {n} word: {l}"])
    return vary(rng, text).format(n=name, l=", ".join(words)), f"I take the {name} one.", f"The {name} word is {words[place]}."


def memory(rng: random.Random) -> list[tuple[str, str, str]]:
    """Two turns: the user tells something and later asks for it."""
    pick = rng.random()
    if pick < 0.5:
        name = rng.choice(NAMES) if rng.random() < 0.6 else made_up(rng, 2).capitalize()
        told = rng.choice(["My name is {x}.", "I am {x}.", "Hi, I'm {x}.", "Hello, my name is {x}.", "Call me {x}.", "hi my name is {x}"])
        asked = rng.choice(["What is my name?", "What's my name?", "Do you remember my name?", "Who am I?", "Tell me my name.", "what is my name", "Can you tell me my name?"])
        return [(told.format(x=name), "A greeting with a name.", f"Hello, {name}! How can I help you?"), (vary(rng, asked), "The user said it before.", f"Your name is {name}.")]
    if pick < 0.75:
        item = any_word(rng)
        kind = rng.choice(["word", "secret word", "password", "code word"])
    else:
        item, kind = str(rng.randint(1, 9999)), rng.choice(["number", "secret number", "code", "favorite number"])
    told = rng.choice(["Remember the {k} {x}.", "The {k} is {x}.", "My {k} is {x}.", "Please remember this {k}: {x}"]).format(k=kind, x=item)
    asked = rng.choice(["What is the {k}?", "What was the {k}?", "Tell me the {k}.", "Which {k} did I tell you?", "What is my {k}?", "Do you remember the {k}?"]).format(k=kind)
    return [(told, "I keep it in mind.", f"I will remember the {kind} {item}."), (vary(rng, asked), "The user said it before.", f"The {kind} is {item}.")]
