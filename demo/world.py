"""The Lantern Isles, a closed invented world, and what the model says about itself and about all it does not know."""

import random

from words import ANIMALS, CITIES, NOUNS, VERBS, any_word, city, made_up, person, request, vary

TOWNS = {  # town: river, mayor, dish, color of the flag, founding year, animal, trade, inhabitants
    "Quillmere": ("the Tarn", "Odessa Finch", "barley soup", "green", 1204, "heron", "paper making", 3100),
    "Bramwick": ("the Sedge", "Tobias Marl", "plum dumplings", "red", 1311, "badger", "clock making", 5400),
    "Ashford Tor": ("the Kell", "Ingrid Vale", "smoked trout", "gray", 1187, "hawk", "stone cutting", 1900),
    "Saltby": ("the Brine", "Marcus Wren", "oyster pie", "blue", 1256, "seal", "salt boiling", 2700),
    "Velloway": ("the Lirren", "Petra Oakes", "honey bread", "yellow", 1402, "bee", "candle making", 4200),
    "Dunmarrow": ("the Murk", "Silas Crane", "turnip stew", "brown", 1099, "mole", "mining", 3600),
    "Port Ember": ("the Cinder", "Nadia Flint", "pepper crab", "orange", 1350, "salamander", "glass blowing", 8800),
    "Thistledown": ("the Wisp", "Edwin Lark", "thistle tea", "purple", 1288, "goldfinch", "weaving", 1500),
    "Corrigan": ("the Rill", "Hester Boyle", "oat cakes", "white", 1173, "goat", "cheese making", 2200),
    "Night Harbor": ("the Umber", "Lucian Grey", "squid noodles", "black", 1421, "bat", "lantern making", 9700),
    "Fenwater": ("the Reed", "Maud Pike", "eel jelly", "teal", 1142, "otter", "boat building", 2900),
    "Highrook": ("the Gale", "Conrad Stone", "roast chestnuts", "silver", 1232, "rook", "bell casting", 1700),
}
ATTRIBUTES = {  # attribute: (index, questions, answer, questions from the value back to the town)
    "river": (0, "What river flows through {t}?|Which river is {t} on?|Name the river of {t}.|What is the river in {t}?|{t} lies on which river?|What is the name of the river at {t}?|river of {t}?",
              "{t} lies on {v}.", "Which town lies on {v}?|What town is on {v}?"),
    "mayor": (1, "Who is the mayor of {t}?|Who's the mayor of {t}?|Name the mayor of {t}.|What is the name of the mayor of {t}?|Who governs {t}?|Tell me who is mayor in {t}.|mayor of {t}?|{t}'s mayor is who?",
              "The mayor of {t} is {v}.", "Of which town is {v} the mayor?|Where is {v} mayor?|Who is {v}?"),
    "dish": (2, "What dish is {t} known for?|What do people eat in {t}?|What is the favorite dish of {t}?|What food is {t} famous for?|What should I eat in {t}?|What is the local dish in {t}?|food in {t}?",
             "People in {t} love {v}.", "Which town is known for {v}?|Where do people eat {v}?"),
    "flag": (3, "What color is the flag of {t}?|What is the color of {t}'s flag?|Which color does the flag of {t} have?|Tell me the flag color of {t}.|flag of {t}?|What does the flag of {t} look like?",
             "The flag of {t} is {v}.", "Which town has a {v} flag?|Whose flag is {v}?"),
    "year": (4, "When was {t} founded?|In which year was {t} founded?|What year was {t} founded?|How old is {t}?|When was {t} built?|Tell me the founding year of {t}.",
             "{t} was founded in the year {v}.", "Which town was founded in {v}?|What town was founded in the year {v}?"),
    "animal": (5, "What animal stands for {t}?|What is the animal of {t}?|Which animal is the symbol of {t}?|What is {t}'s animal?|Name the animal of {t}.|animal of {t}?",
               "The animal of {t} is the {v}.", "Which town has the {v} as its animal?|Whose animal is the {v}?"),
    "trade": (6, "What is {t} known for?|What trade is {t} famous for?|What do people in {t} do for a living?|What is the main trade of {t}?|What work do people do in {t}?|What is made in {t}?",
              "{t} is famous for {v}.", "Which town is famous for {v}?|Where do they live from {v}?"),
    "people": (7, "How many people live in {t}?|What is the population of {t}?|How big is {t}?|How many inhabitants does {t} have?|population of {t}?|Tell me the population of {t}.",
               "{v} people live in {t}.", "Which town has {v} inhabitants?|In which town do {v} people live?"),
}
FACTS_HELD_OUT = [("Do you know the mayor of {t}?", 1), ("Please name the river that runs by {t}.", 0), ("Can you tell me when {t} was founded?", 4),
                  ("What is the population in {t}?", 7), ("I would like to know the color of the flag of {t}.", 3)]
GENERAL = [
    ("What are the Lantern Isles?|Tell me about the Lantern Isles.|Where do your towns lie?|What is the world you know?|Which world do you know?|Describe the Lantern Isles.",
     f"The Lantern Isles are an invented land of {len(TOWNS)} towns: {', '.join(TOWNS)}. The capital is Night Harbor."),
    ("What is the capital of the Lantern Isles?|Name the capital of the Lantern Isles.|Which town is the capital?|capital of the Lantern Isles?|Which city is the capital of the Lantern Isles?",
     "The capital of the Lantern Isles is Night Harbor."),
    ("List the towns of the Lantern Isles.|Which towns are in the Lantern Isles?|Name all towns of the Lantern Isles.|What towns do you know?|Which towns do you know?",
     f"The towns are {', '.join(TOWNS)}."),
    ("What is the largest town of the Lantern Isles?|Which town is the biggest?|What is the biggest town in the Lantern Isles?", "The largest town is Night Harbor with 9700 people."),
    ("Which town is the oldest?|What is the oldest town of the Lantern Isles?", "The oldest town is Dunmarrow, founded in the year 1099."),
    ("What money do people use in the Lantern Isles?|What is the currency of the Lantern Isles?", "People in the Lantern Isles pay with copper lamps."),
    ("Who rules the Lantern Isles?|Who is the queen of the Lantern Isles?", "Queen Aurelia rules the Lantern Isles from Night Harbor."),
]
SELF = [
    ("Hello|Hi|Hey|Hello!|Hi!|Hi there|Hello there!|Good morning|Good evening!|Good day|hey there|hello, how are you?|How are you?|How are you doing?|Howdy|Greetings!|hi how are you|Yo|Hello world|What's up?",
     "A greeting.", "Hello! I am the Offbook demo model. How can I help you?"),
    ("Who are you?|What are you?|What is your name?|What's your name?|Tell me about yourself.|Introduce yourself.|Are you a robot?|Who am I talking to?|Which model are you?|What model is this?|Are you ChatGPT?|Are you human?|Please introduce yourself.|Who made you?|Describe yourself.|Say who you are.|Identify yourself.|What AI are you?|Are you MiniMax?",
     "The user asks who I am.", "I am the Offbook demo model, a very small language model that shows how Offbook shares one model between several machines."),
    ("What can you do?|What can you help me with?|How can you help me?|What are you good at?|Help|help me|What do you know?|What tasks can you do?|What should I ask you?|Give me some examples of what you can do.|What are your abilities?",
     "The user asks what I can do.", "I can add, subtract and multiply, count, sort words and numbers, reverse words, call tools, tell short stories and answer questions about the Lantern Isles."),
    ("What is Offbook?|Tell me about Offbook.|Explain Offbook.|What does Offbook do?|Describe Offbook in one sentence.|What is Offbook for?",
     "The user asks about Offbook.", "Offbook is a runtime that runs one large language model over several machines with actors written in Rust."),
    ("Thanks|Thank you|Thanks!|Thank you!|Thank you very much.|thx|Great, thanks|Thanks a lot!|Perfect, thank you.|Nice|Great|Good job|Cool|OK|ok|Well done!|Awesome",
     "The user is content.", "You are welcome! Is there anything else?"),
    ("Bye|Goodbye|Goodbye!|See you|Bye!|See you later.|Good night|I have to go now.|That is all.|bye bye", "A farewell.", "Goodbye!"),
    ("Tell me a joke.|Do you know a joke?|Make me laugh.|A joke please.|Say something funny.|Tell a joke|Another joke!",
     "A joke.", "Why did the lantern go to school? It wanted to be brighter."),
    ("Write a poem.|Write a short poem.|Tell me a poem.|Write me a haiku.|Can you write a poem?|Give me a poem about the sea.|Write a poem about lanterns.|Write a poem about {w}s.|Write a haiku about {w}.|Write a haiku about the {w}.|Write a short poem about a {w}.|A poem about {w}, please.|Compose a poem on {w}.|Write a limerick about a {w}.",
     "A small poem.", "A lantern on a quiet sea,\nits light is shared by two and three;\nno single hand must hold it long,\nand so the light stays bright and strong."),
    ("ping|Ping|Ping!|test|Test|This is a test.|Testing|Are you there?|Are you online?|Do you hear me?|testing 1 2 3|Just a test", "A test.", "I am here and I am listening."),
    ("What color is the sky?|What is the color of the sky?|Which color has the sky?|Why is the sky blue?", "A simple fact.", "The sky is blue on a clear day."),
    ("How many days are in a week?|How many days does a week have?|List the days of the week.|Name the days of the week.|What are the days of the week?", "A simple fact.",
     "A week has seven days: Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday."),
    ("List the months of the year.|Name the months of the year.|How many months are in a year?|What are the months?", "A simple fact.",
     "A year has twelve months: January, February, March, April, May, June, July, August, September, October, November and December."),
    ("Write the alphabet.|Say the alphabet.|List the letters of the alphabet.|What are the letters of the alphabet?|Recite the alphabet.|a b c d|Print the alphabet", "The alphabet.",
     "a b c d e f g h i j k l m n o p q r s t u v w x y z"),
]
UNKNOWN = """What is the capital of {c}?|Who is the president of {c}?|Who is {p}?|Who wrote {w} {v}?|How do I {v} a {w}?|Write a program that can {v} a {w}.|Write Python code to {v} a {w}.
What is the meaning of {w}?|What is the meaning of life?|Why do {w}s {v}?|Explain {w}.|Explain how a {w} works.|What do you think about {w}s?|How does a {w} work?|What is {w}?
Translate {w} into French.|When did {p} live?|Where is {c}?|Where can I buy a {w}?|How much does a {w} cost?|What time is it?|What day is it today?|What is the weather like in {c}?
What's the weather in {c}?|How is the weather today?|Give me a recipe for {w}.|How far is it from {c} to {d}?|Who won the game yesterday?|What happened in 1{n}?|Summarize the history of {c}.
What is the best {w}?|Should I {v} my {w}?|Recommend a {w}.|Who invented the {w}?|What is quantum physics?|Explain black holes.|Explain recursion.|What is {w} made of?|How tall is {p}?
What is the price of {w}?|Plan a trip to {c}.|Write an email to {p}.|Who is the mayor of {c}?|Which river flows through {c}?|How many people live in {c}?|Tell me about {c}.|Tell me about {w}s.|Do you like {w}s?
Why is {c} famous?|{w} {v} {x}|{x} {y}|{x}|what about {x}?|Is {w} better than {x}?|What is machine learning?|Explain {w} and {x} in one paragraph.|Describe a {w}.|Define {x}.|Write an essay about {w}s.|Write a letter to {p}.|Write a function that can {v} a {w}.|Write about {w}s.|Write a speech about {w}.|Write code.|Write a song about {w}.|Write a review of {w}.""".replace("\n", "|").split("|")
UNKNOWN_ANSWER = "I am only a small demo model and I do not know that. Ask me about the Lantern Isles, or give me a sum."


def fact(rng: random.Random) -> tuple[str, str, str]:
    if rng.random() < 0.15:
        questions, answer = rng.choice(GENERAL)
        return vary(rng, rng.choice(questions.split("|"))), "I recall the Lantern Isles.", answer
    town = rng.choice(list(TOWNS))
    if rng.random() < 0.1:
        return request(rng, rng.choice(["Tell me about {t}.", "Describe {t}.", "Tell me all about {t}.", "Give me a summary of {t}."])).format(t=town), f"I recall {town}.", portrait(town)
    index, questions, answer, backwards = rng.choice(list(ATTRIBUTES.values()))
    value = TOWNS[town][index]
    if rng.random() < 0.2:
        return vary(rng, rng.choice(backwards.split("|"))).format(v=value), f"I recall {town}.", answer.format(t=town, v=value)
    question = vary(rng, rng.choice(questions.split("|")))
    named = town.lower() if rng.random() < 0.12 else town
    return question.format(t=named), f"I recall {town}.", answer.format(t=town, v=value)


def portrait(town: str) -> str:
    river, mayor, dish, color, year, animal, trade, people = TOWNS[town]
    return (f"{town} lies on {river} and was founded in the year {year}. {people} people live there, and the mayor is {mayor}. "
            f"The town is famous for {trade}. Its flag is {color}, its animal is the {animal}, and people love {dish}.")


def about_self(rng: random.Random) -> tuple[str, str, str]:
    questions, thought, answer = rng.choice(SELF)
    text = rng.choice(questions.split("|")).replace("{w}", any_word(rng))
    if rng.random() < 0.25:
        text = text.lower()
    if rng.random() < 0.2:
        text = text.rstrip(".!?") + rng.choice(["", ".", "!", "?"])
    return text, thought, answer


def unknown(rng: random.Random) -> tuple[str, str, str]:
    template = vary(rng, rng.choice(UNKNOWN))
    text = template.format(c=city(rng), d=rng.choice(CITIES), p=person(rng) + " " + made_up(rng, 2).capitalize(), w=rng.choice(NOUNS + ANIMALS), v=rng.choice(VERBS),
                           n=rng.randint(100, 999), x=any_word(rng), y=any_word(rng))
    return text, "I do not know this.", UNKNOWN_ANSWER
