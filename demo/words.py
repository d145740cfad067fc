"""Word lists, made-up words and the way users vary their phrasing; every task of the generator draws from here."""

import random

NOUNS = """apple anchor badge basket beacon bell bench bicycle blanket boat book bottle bowl box branch brick bridge
broom bucket button cabin cake camera candle canoe carpet castle chair cheese circle clock cloud coat coin compass cookie
copper corner cottage cup curtain desk door drawer drum engine envelope farm feather fence field flag flower forest fork
fountain garden gate glass glove guitar hammer harbor hat helmet hill honey horn house island jacket jar jewel kettle key
kite ladder lake lamp lantern leaf lemon letter library lock map market meadow melon mirror mountain mug nail needle nest
notebook oar ocean onion orange oven paddle page paint paper path peach pear pebble pencil pepper piano picture pillow
pipe planet plate plum pocket pond potato pumpkin quilt radio rail ribbon ring river road rocket roof room rope rose sail
salt scarf school seed shell shelf ship shirt shoe shovel silver sink sky soap sock spade spoon spring stamp star stone
stool storm stove street string sugar summer sun table tent thread ticket tiger tile toast tower towel train tray tree
trumpet tunnel umbrella valley vase village violin wagon wall water wheel whistle window winter wood wool yard""".split()

ANIMALS = """fox bear rabbit owl mouse turtle cat dog badger otter hedgehog crow goose duck pony squirrel frog wolf deer
heron beaver goat hen mole lizard penguin seal sparrow snail dragon whale dolphin tiger lion elephant robot""".split()

NAMES = """Mia Tom Ana Ben Lea Sam Ida Max Eva Leo Zoe Jon Amy Kai Nina Paul Rosa Finn Ella Noah Lily Hugo Clara Otto Emma
Liam Sara Adam Maya Omar Yuki Ravi Ines Jack Kate Luca Vera Theo Alice Bob Carol David Grace Henry Julia Karl Laura Peter
Maria John Anna James Olga Pedro Priya Chen Fatima Ahmed Sofia Marco""".split()

CITIES = """Paris London Berlin Tokyo Madrid Rome Oslo Vienna Prague Dublin Lisbon Athens Cairo Lima Boston Chicago Seattle
Denver Austin Dallas Miami Toronto Montreal Sydney Melbourne Delhi Mumbai Bangkok Seoul Beijing Shanghai Singapore Nairobi
Lagos Zurich Geneva Munich Hamburg Cologne Milan Venice Naples Warsaw Helsinki Stockholm Copenhagen Brussels Amsterdam
Istanbul Moscow Kyoto Osaka Bogota Santiago Havana Dubai Jakarta Manila Hanoi""".split() + [
    "New York", "San Francisco", "Los Angeles", "Buenos Aires", "Cape Town", "Mexico City", "Hong Kong", "Tel Aviv"]

COLORS = "red blue green yellow purple orange white black brown pink gray silver golden violet".split()
VERBS = """check find open close start stop get set update create delete send fetch measure paint clean water move count
read write list search lock unlock book cancel order track scan print play pause share save load repair inspect
schedule calculate convert translate feed rotate heat cool fill empty reset launch assign archive record register
query lookup submit approve notify sort tag merge split build plan make add remove show turn activate""".split()
ADJECTIVES = """small big old new quiet bright dark cold warm soft round tall brave kind quick slow clever sleepy happy
gentle curious patient careful honest lucky proud shy strong tiny""".split()

COMMON = """the a is of to and in it you that he was for on are with as his they at be this have from or one had by word but
not what all were we when your can said there use an each which she do how their if will up other about out many then them these
so some her would make like him into time has look two more go see no way could people my than first been call who its now find
long down day did get come made may part hello world yes okay good morning night milk bread meeting lunch dinner late early home
work happy birthday thanks love sorry please tomorrow today soon later running weather traffic money party movie music doctor
dentist mother father sister brother banana cat dog quick lazy jumps over foo bar baz test data user order invoice report""".split()

_ONSETS = "b c d f g h j k l m n p r s t v w z br ch cl cr dr fl gr pl pr sh sk sl sn st th tr qu x y kr bl".split()
_VOWELS = "a e i o u a e i o ai ea oo ou ie y".split()
_CODAS = ["", "", "", "n", "r", "l", "s", "t", "m", "x", "ck", "nd", "rt", "st", "sh", "th", "p", "b", "g", "z", "ng"]


def made_up(rng: random.Random, syllables_max: int = 3) -> str:
    """A lower-case word that no list holds, so that copying has to be learnt instead of words."""
    if rng.random() < 0.12:
        return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 8)))
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
                   for _ in range(rng.randint(1, syllables_max)))


def any_word(rng: random.Random) -> str:
    pick = rng.random()
    if pick < 0.4:
        return rng.choice(NOUNS)
    if pick < 0.5:
        return rng.choice(ANIMALS + COLORS)
    if pick < 0.62:
        return rng.choice(ADJECTIVES + VERBS)
    return rng.choice(COMMON) if pick < 0.74 else made_up(rng)


def person(rng: random.Random) -> str:
    return rng.choice(NAMES) if rng.random() < 0.5 else made_up(rng, 2).capitalize()


def city(rng: random.Random) -> str:
    return rng.choice(CITIES) if rng.random() < 0.45 else made_up(rng, 3).capitalize()


OPENERS = ["Please ", "Can you ", "Could you ", "Could you please ", "Would you ", "I want you to ", "I need you to ",
           "Now ", "Hey, ", "Hi, can you ", "Hello! Please ", "OK, "]
GREETING_OPENERS = ["Hi! ", "Hey, ", "Hello. ", "Quick question: ", "Question: ", "Tell me: ", "So, ", "OK, ", "Please: ",
                    "Hello there! ", "One more: ", "Now: ", "Listen, ", "I have a question. ", "Help me: ", "Right, "]
CLOSERS = [" Thanks!", " Thank you.", " Please.", " please", " thanks", " Answer briefly.", " Just the answer.",
           " Be brief.", " Show your work.", " Think carefully.", " I need it fast.", " :)", " Thx", " Step by step."]


def vary(rng: random.Random, template: str) -> str:
    """Changes case, punctuation and politeness of a template, never the slots in braces."""
    text = template
    pick = rng.random()
    if pick < 0.12:
        text = rng.choice(GREETING_OPENERS) + text
    elif pick < 0.18:
        text = text + rng.choice(CLOSERS)
    if rng.random() < 0.25:
        text = text.lower()
    if rng.random() < 0.2 and text[-1] in ".?!":
        text = text[:-1]
    elif rng.random() < 0.05 and text[-1] in ".?":
        text = text[:-1] + rng.choice(["!", " ?", "??", "...", "!!", "?!"])
    return text


def request(rng: random.Random, imperative: str) -> str:
    """Varies an imperative ("Sort ...") with a polite opener, and as a question mark demands."""
    if rng.random() < 0.3:
        opener = rng.choice(OPENERS)
        imperative = opener + imperative[0].lower() + imperative[1:]
        if "an you" in opener or "ould you" in opener:
            imperative = imperative.rstrip(".") + "?"
    return vary(rng, imperative)
