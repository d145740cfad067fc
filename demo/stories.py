"""Short stories from templates: about two hundred words each, with the hero, place or thing that the user asked for."""

import random

from words import ADJECTIVES, ANIMALS, NAMES, NOUNS, request

PLACES = ["forest", "village", "harbor", "valley", "meadow", "city", "castle", "lighthouse", "garden", "island", "mountain", "library"]
OPENINGS = ["Once upon a time there was a {a} {k} named {h}. {h} lived near the {p}, in a house with a round door.",
            "Long ago, a {a} {k} called {h} lived close to the {p}. Every morning {h} woke up before the sun.",
            "In a {p} far away lived {h}, a {a} {k}. Everybody there knew {h} and said hello.",
            "There was once a {k} whose name was {h}. {h} was {a} and lived beside the {p} with an old clock."]
WISHES = ["One day {h} found a strange {o} on the path. It was covered with dust, and nobody knew who had lost it.",
          "One evening {h} heard of a {o} that could shine in the dark. From then on {h} thought of nothing else.",
          "One morning the {o} of the {p} was gone. Everybody was sad, and so {h} decided to find it."]
SETOUTS = ["{h} packed some bread and a small lamp, closed the door and walked down the long road.",
           "So {h} put on a warm coat, took a map and went out into the wind.",
           "Without waiting, {h} said goodbye to the neighbors and followed the river to the north."]
MEETINGS = ["On the way {h} met {f}, a {b} {m}, who was sitting under a tree. {f} asked, \"May I come with you?\" {h} was glad and said yes.",
            "At a bridge stood {f}, a {b} {m}. {f} said, \"I know the way, but I do not like to walk alone.\" So they went on together.",
            "After a while {h} came upon {f}, a {b} {m}, whose foot was caught in a fence. {h} helped, and {f} promised to help in return."]
TROUBLES = ["Soon it began to rain, and the road turned into mud. They had to hold on to each other so that nobody would fall.",
            "Then night came, and the lamp went out. They could hear the wind, but they could not see the path.",
            "But a wide river lay before them, and the old bridge was broken. For a moment they did not know what to do."]
SOLUTIONS = ["\"Let us share the work,\" said {f}. {h} carried one half, {f} carried the other half, and so it became easy.",
             "{h} had an idea. Together they counted to three, pulled as hard as they could, and it worked.",
             "\"Do not worry,\" said {h}. \"Two small lights are as good as a big one.\" And step by step they found the way."]
FINDINGS = ["Behind a hill they found the {o}. It was lying in the grass and it was even more beautiful than they had thought.",
            "At last they saw the {o}. An old {m2} had kept it safe and gave it to them with a smile.",
            "When the sun came up, they saw the {o} right in front of them. They laughed and danced around it."]
RETURNS = ["They brought it home to the {p}, and there was a feast with cake and music that lasted all night.",
           "On the way back they sang songs, and the road seemed much shorter than before.",
           "Back at the {p}, everybody came to look, and {h} told the story again and again."]
ENDINGS = ["From that day on {h} and {f} were the best of friends. The end.",
           "And {h} learned that even a long road is short when friends walk it together. The end.",
           "If you visit the {p} today, you may still see {h} and {f} sitting by the door. The end."]
ASKS = ["Tell me a story.|Write a story.|Tell me a short story.|Write a short story.|I would like to hear a story.|Tell a bedtime story.|A story please.|Tell me something long.|Make up a story.|Write a long story.|Tell me a long story.",
        "Tell me a story about a {k}.|Write a story about a {k}.|Tell me a short story about a {a} {k}.|Write a short story about a {k}.|Story about a {k}, please.|Make up a story with a {k}.|Tell me a tale about a {k}.",
        "Tell me a story about a {k} named {h}.|Write a story about {h} the {k}.|Tell a story about a {k} called {h}.|Write a short story about a {k} named {h}.",
        "Tell me a story about a {o}.|Write a story about a lost {o}.|Tell me a short story about a {o}.|Write a short story about a {k} and a {o}.|Tell me a story about a {k} who finds a {o}.",
        "Tell me a story about a {k} in a {p}.|Write a short story about a {k} near the {p}.|Tell me a story that happens in a {p}."]


def story(rng: random.Random) -> tuple[str, str, str]:
    hero, friend = rng.sample(NAMES, 2)
    kind, other, third = rng.sample(ANIMALS, 3)
    slots = {"h": hero, "f": friend, "k": kind, "m": other, "m2": third, "a": rng.choice(ADJECTIVES), "b": rng.choice(ADJECTIVES),
             "o": rng.choice(NOUNS), "p": rng.choice(PLACES)}
    ask = rng.choice(rng.choice(ASKS).split("|"))
    parts = [OPENINGS, WISHES, SETOUTS, MEETINGS, TROUBLES, SOLUTIONS, FINDINGS, RETURNS, ENDINGS]
    sentences = [rng.choice(part) for part in parts]
    text = request(rng, ask).format(**slots).replace(" a o", " an o").replace(" a e", " an e").replace(" a a", " an a")
    whole = " ".join(sentences).format(**slots)
    for vowel in "aeiou":
        whole = whole.replace(f" a {vowel}", f" an {vowel}")
        text = text.replace(f" a {vowel}", f" an {vowel}")
    halves = whole.index(sentences[4].format(**slots)[:20])
    return text, f"A story about {hero}, a {kind}, and a {slots['o']}.", whole[:halves].rstrip() + "\n\n" + whole[halves:]
