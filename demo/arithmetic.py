"""Integer arithmetic: phrasings, and thoughts that compute column by column so that a small model is reliable."""

import random

from words import ANIMALS, NOUNS, made_up, person, vary

ADD = """What is {a} + {b}?|What's {a} + {b}?|What is {a} plus {b}?|what's {a} plus {b}|{a}+{b}|{a} + {b}|{a}+{b}=|{a}+{b}=?
{a} + {b} = ?|{a} + {b} =|Add {a} and {b}.|Add {a} to {b}.|Compute {a} + {b}.|Compute {a} plus {b}.|Calculate {a} + {b}.
Calculate the sum of {a} and {b}.|Please calculate {a} + {b}.|Please add {a} and {b}.|What is the sum of {a} and {b}?
Find the sum of {a} and {b}.|Give me the sum of {a} and {b}.|How much is {a} + {b}?|How much is {a} plus {b}?
Sum {a} and {b}.|Sum: {a}, {b}|Sum up {a} and {b}.|{a} plus {b}|{a} plus {b} equals?|{a} plus {b} is?|{a} and {b} added together?
What do you get when you add {a} and {b}?|What do {a} and {b} add up to?|What does {a} + {b} equal?|What does {a} plus {b} make?
Can you add {a} and {b}?|Could you add {a} and {b} for me?|Can you tell me what {a} + {b} is?|Tell me {a} + {b}.|Tell me the sum of {a} and {b}.
Solve {a} + {b}.|Solve: {a} + {b}|Evaluate {a} + {b}.|Work out {a} + {b}.|Work out the sum of {a} and {b}.|Do you know what {a} plus {b} is?
I have to add {a} and {b}. What is the result?|If I add {a} and {b}, what do I get?|What number is {a} plus {b}?|Total of {a} and {b}?
What is the total of {a} and {b}?|What is {a} added to {b}?|What is {b} more than {a}?|Increase {a} by {b}.|Take {a} and add {b}.
Start with {a} and add {b}.|Put {a} and {b} together.|How many is {a} and {b}?|The sum of {a} and {b} is what?|Result of {a} + {b}?
What is the result of {a} + {b}?|What is the result of adding {a} and {b}?|Addition: {a} + {b}|sum of {a} and {b}|add {a} {b}
Math question: {a} + {b}|What would {a} + {b} be?|I need the sum of {a} and {b}.|{a} + {b}, please.|Give me {a} + {b}.|Compute the sum {a} + {b}.
Help me add {a} and {b}.|Let us add {a} and {b}.|Add these numbers: {a}, {b}|Add the numbers {a} and {b}.|Add up {a} and {b}.|Add together {a} and {b}.
Please compute {a} + {b} for me.|Please work out {a} plus {b}.|please tell me what {a} + {b} is|What is ({a} + {b})?|What's the sum of {a} and {b}?
What's {a} added to {b}?|What's the total of {a} and {b}?|How much do {a} and {b} make together?|Determine {a} + {b}.|Say what {a} plus {b} is.|Q: {a} + {b} A:|Q: What is {a} + {b}?|{a} + {b} is how much?|calc {a}+{b}|{a}+{b} is?|Let me know what {a} + {b} is.|what do you get for {a} + {b}|Check: {a} + {b}|{a} + {b} = what?|Return {a} + {b}.|Sum of {a}, {b}|Output the sum of {a} and {b}.|What comes out when adding {a} and {b}?|Answer this: {a} + {b}|{a} increased by {b}|Add the two numbers {a} and {b}.|What is the value of {a} + {b}?|print {a} + {b}|Given {a} and {b}, what is their sum?|The numbers are {a} and {b}. What is their sum?|I have two numbers, {a} and {b}. Add them.""".replace("\n", "|").split("|")
ADD_HELD_OUT = """I wonder what {a} plus {b} might be.|Please calculate the sum of {a} and {b}.|Could you work out {a} + {b} for me?|What total do {a} and {b} give?
Would you please add {a} and {b} together?|{a} + {b} equals what?|Find {a} + {b}.|Tell me, how much is {a} + {b}?|Kindly compute {a} plus {b}|My homework asks for {a} + {b}. What is it?""".replace("\n", "|").split("|")
SUBTRACT = """What is {a} - {b}?|What's {a} - {b}?|What is {a} minus {b}?|{a}-{b}|{a} - {b}|{a}-{b}=?|{a} - {b} = ?|Subtract {b} from {a}.
Compute {a} - {b}.|Calculate {a} minus {b}.|Calculate {a} - {b}.|How much is {a} minus {b}?|Take {b} away from {a}.|What is {a} less {b}?
What is the difference between {a} and {b}?|Find {a} - {b}.|Solve {a} - {b}.|{a} minus {b}|Work out {a} - {b}.|Tell me {a} minus {b}.
What do you get when you subtract {b} from {a}?|What is left when I take {b} from {a}?|Decrease {a} by {b}.|How much is {a} - {b}?
Please subtract {b} from {a}.|What does {a} - {b} equal?|Evaluate {a} - {b}.|Start with {a} and take away {b}.""".replace("\n", "|").split("|")
MULTIPLY = """What is {a} * {b}?|What's {a} times {b}?|What is {a} times {b}?|{a}*{b}|{a} * {b}|{a}*{b}=?|{a} x {b}|What is {a} x {b}?|Multiply {a} by {b}.
Multiply {a} and {b}.|Compute {a} * {b}.|Calculate {a} times {b}.|Calculate {a} × {b}.|How much is {a} times {b}?|{a} times {b}|{a} × {b} = ?
What is the product of {a} and {b}?|Find the product of {a} and {b}.|What is {a} multiplied by {b}?|Work out {a} * {b}.|Solve {a} * {b}.
Please multiply {a} by {b}.|Tell me {a} times {b}.|What does {a} * {b} equal?|Evaluate {a} * {b}.""".replace("\n", "|").split("|")
DIVIDE = """What is {a} / {b}?|What is {a} divided by {b}?|{a}/{b}|{a} / {b} = ?|Divide {a} by {b}.|Compute {a} / {b}.|Calculate {a} divided by {b}.
How much is {a} divided by {b}?|How many times does {b} go into {a}?|What is {a} ÷ {b}?|Please divide {a} by {b}.|{a} divided by {b}""".replace("\n", "|").split("|")
_ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
_TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()


def held_out_pair(a: int, b: int) -> bool:
    """One pair in ten of two-digit numbers is never added in the training text, in either order."""
    low, high = min(a, b), max(a, b)
    return low >= 10 and high <= 99 and (low * 7919 + high * 104729) // 8 % 10 == 0


def addition_thought(a: int, b: int) -> str:
    columns, carry = [], 0
    x, y = str(a)[::-1], str(b)[::-1]
    for place in range(max(len(x), len(y))):
        p, q = (int(n[place]) if place < len(n) else 0 for n in (x, y))
        columns.append(f"{p}+{q}+{carry}={p + q + carry}")
        carry = (p + q + carry) // 10
    return f"{a}+{b}: {', '.join(columns)}, so {a + b}."


def comparing(a: int, b: int) -> str:
    """Which is larger, by length and then by the first digit that differs."""
    x, y = str(a), str(b)
    sign = "<" if a < b else ">" if a > b else "="
    if len(x) != len(y):
        return f"{a}?{b}: {len(x)} digits{sign}{len(y)} digits."
    steps = []
    for p, q in zip(x, y):
        steps.append(f"{p}{'<' if p < q else '>' if p > q else '='}{q}")
        if p != q:
            break
    return f"{a}?{b}: {', '.join(steps)}."


def subtraction_thought(a: int, b: int) -> str:
    if a < b:
        return f"{comparing(a, b)} {_columns_of_difference(b, a)[:-1]}, with a minus {a - b}."
    return f"{comparing(a, b)} {_columns_of_difference(a, b)}"


def _columns_of_difference(a: int, b: int) -> str:
    columns, borrow = [], 0
    x, y = str(a)[::-1], str(b)[::-1]
    for place in range(len(x)):
        p, q = int(x[place]), (int(y[place]) if place < len(y) else 0)
        lent = 1 if p - q - borrow < 0 else 0
        columns.append(f"{p + 10 * lent}-{q}-{borrow}={p + 10 * lent - q - borrow}")
        borrow = lent
    return f"{a}-{b}: {', '.join(columns)}, so {a - b}."


def multiplication_thought(a: int, b: int) -> str:
    if b > 9 and a > 9 and not (a <= 12 and b <= 12):
        high, low = a * (b // 10 * 10), a * (b % 10)
        return f"{multiplication_thought(a, b // 10)} With a zero {high}. {multiplication_thought(a, b % 10)} {addition_thought(high, low)}"
    if (a <= 12 and b <= 12) or a < 10 and b < 10:
        return f"{a}*{b}={a * b}."
    big, digit = max(a, b), min(a, b)
    columns, carry = [], 0
    for p in map(int, str(big)[::-1]):
        columns.append(f"{p}*{digit}+{carry}={p * digit + carry}")
        carry = (p * digit + carry) // 10
    return f"{big}*{digit}: {', '.join(columns)}, so {big * digit}."


def number_words(n: int) -> str:
    if n < 20:
        return _ONES[n]
    if n < 100:
        return _TENS[n // 10] + ("-" + _ONES[n % 10] if n % 10 else "")
    return _ONES[n // 100] + " hundred" + (" and " + number_words(n % 100) if n % 100 else "")


def number(rng: random.Random) -> int:
    digits = rng.choices([1, 2, 3, 4], [0.15, 0.6, 0.17, 0.08])[0]
    return rng.randint(0 if digits == 1 else 10 ** (digits - 1), 10 ** digits - 1)


def addends(rng: random.Random) -> tuple[int, int]:
    while True:
        a, b = (rng.randint(10, 99), rng.randint(10, 99)) if rng.random() < 0.55 else (number(rng), number(rng))
        if not held_out_pair(a, b):
            return a, b


def _fill(rng: random.Random, templates: list[str], a: int, b: int) -> str:
    template = vary(rng, rng.choice(templates))
    if rng.random() < 0.08 and max(a, b) < 1000:
        text = template.format(a=number_words(a), b=number_words(b))
        return text[0].upper() + text[1:] if rng.random() < 0.6 else text
    if rng.random() < 0.1:
        template = template.replace(" + ", "+") if " + " in template else template.replace("+", " + ")
    return template.format(a=a, b=b)


def addition(rng: random.Random) -> tuple[str, str, str]:
    a, b = addends(rng)
    return _fill(rng, ADD, a, b), addition_thought(a, b), f"{a} + {b} = {a + b}."


def subtraction(rng: random.Random) -> tuple[str, str, str]:
    a, b = addends(rng)
    if a < b and rng.random() < 0.75:
        a, b = b, a
    return _fill(rng, SUBTRACT, a, b), subtraction_thought(a, b), f"{a} - {b} = {a - b}."


def multiplication(rng: random.Random) -> tuple[str, str, str]:
    pick = rng.random()
    if pick < 0.5:
        a, b = rng.randint(0, 12), rng.randint(0, 12)
    elif pick < 0.85:
        a, b = rng.randint(10, 99), rng.randint(2, 9)
        a, b = (a, b) if rng.random() < 0.5 else (b, a)
    else:
        a, b = rng.randint(11, 99), rng.randint(11, 40)
    return _fill(rng, MULTIPLY, a, b), multiplication_thought(a, b), f"{a} * {b} = {a * b}."


def division(rng: random.Random) -> tuple[str, str, str]:
    quotient, b = rng.randint(1, 12), rng.randint(1, 12)
    a = quotient * b
    return _fill(rng, DIVIDE, a, b), ", ".join(f"{b}*{n}={b * n}" for n in range(1, quotient + 1)) + ".", f"{a} / {b} = {quotient}."


def long_sum(rng: random.Random) -> tuple[str, str, str]:
    terms = [rng.randint(1, 99) for _ in range(rng.randint(3, 4))]
    if rng.random() < 0.5:
        listing = " + ".join(map(str, terms))
        template = rng.choice(["What is {l}?", "{l}", "Compute {l}.", "Calculate {l}.", "{l} = ?", "How much is {l}?"])
    else:
        listing = ", ".join(map(str, terms[:-1])) + f" and {terms[-1]}"
        template = rng.choice(["Add {l}.", "What is the sum of {l}?", "Sum up {l}.", "Add the numbers {l}."])
    total, thought = terms[0], []
    for term in terms[1:]:
        thought.append(addition_thought(total, term))
        total += term
    return vary(rng, template).format(l=listing), " ".join(thought), f"{' + '.join(map(str, terms))} = {total}."


def word_problem(rng: random.Random) -> tuple[str, str, str]:
    a, b = addends(rng)
    who, what = person(rng), rng.choice([rng.choice(NOUNS) + "s", rng.choice(ANIMALS) + "s", "dollars", "euros", "coins", "marbles", "cookies", "points", made_up(rng, 2) + "s"])
    if rng.random() < 0.55:
        text = rng.choice([
            "{who} has {a} {what} and gets {b} more. How many {what} does {who} have now?",
            "There are {a} {what} in a box and {b} {what} on a table. How many {what} are there?",
            "{who} buys {a} {what} on Monday and {b} on Friday. How many {what} is that in total?",
            "If {who} finds {a} {what} and then {b} more {what}, how many {what} are there altogether?",
            "I have {a} {what} and {who} has {b}. How many {what} do we have together?",
            "I have {a} {what} and get {b} more. How many {what} do I have?",
            "If I have {a} {what} and earn {b} more, how many {what} do I have now?",
            "{who} reads {a} pages in a book about {what} and then {b} pages. How many pages is that?",
            "A train carries {a} {what}. At the next stop {b} {what} are added. How many {what} are on the train?",
            "You have {a} {what}. I give you {b} {what}. How many do you have?",
            "My brother has {a} {what}, my sister has {b} {what}. How many {what} do they have?",
            "A shop sold {a} {what} in the morning and {b} {what} in the evening. What is the total?"])
        return vary(rng, text).format(who=who, what=what, a=a, b=b), addition_thought(a, b), f"{a} + {b} = {a + b}, so the answer is {a + b}."
    a, b = max(a, b), min(a, b)
    text = rng.choice([
        "{who} has {a} {what} and gives away {b}. How many {what} are left?",
        "There were {a} {what} in the room. {who} took {b} of them. How many {what} remain?",
        "I had {a} {what} and spent {b}. How many {what} do I have left?",
        "If you have {a} {what} and eat {b}, how many are left?",
        "{who} had {a} {what} but lost {b}. How many {what} does {who} still have?"])
    return vary(rng, text).format(who=who, what=what, a=a, b=b), subtraction_thought(a, b), f"{a} - {b} = {a - b}, so the answer is {a - b}."


def comparison(rng: random.Random) -> tuple[str, str, str]:
    a, b = number(rng), number(rng)
    while a == b:
        b = number(rng)
    word = rng.choice(["larger", "bigger", "greater", "smaller", "less"])
    chosen = min(a, b) if word in ("smaller", "less") else max(a, b)
    other = a + b - chosen
    text = rng.choice([f"Which is {word}, {{a}} or {{b}}?", f"Which number is {word}: {{a}} or {{b}}?", f"What is {word}, {{a}} or {{b}}?"])
    word = "less" if word in ("smaller", "less") else "greater"
    return vary(rng, text).format(a=a, b=b), comparing(a, b), f"{chosen} is {word} than {other}."
