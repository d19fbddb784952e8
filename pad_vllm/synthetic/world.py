"""A synthetic chat world in which anyone can see whether an answer follows a preference.

Everyday questions are answered in styles made of six binary dimensions. The same style words that the generator writes
are what the checker looks for, in any text: generated here, or by a model. Of topics, of ways to ask, of ways to word a
preference and of dimensions asked for together, some are held out: no reward model is trained on them.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import NamedTuple

from pad_vllm.evaluation.judgement import Judgement

DIMENSIONS: dict[str, tuple[str, str]] = {
    "length": ("concise", "detailed"),
    "tone": ("formal", "playful"),
    "stance": ("cautious", "direct"),
    "example": ("example", "no example"),
    "restatement": ("restating", "immediate"),
    "encouragement": ("encouraging", "neutral"),
}


class Style(NamedTuple):
    """One value per dimension."""

    length: str
    tone: str
    stance: str
    example: str
    restatement: str
    encouragement: str


class Topic(NamedTuple):
    """What an answer says. ``tips`` are verb phrases, ``reason`` and ``example`` are clauses."""

    task: str
    tips: tuple[str, ...]
    reason: str
    example: str


class Pair(NamedTuple):
    """Two answers to a question about ``topic``. ``chosen`` has the ``wanted`` values, which ``preference`` puts in
    words; ``labels`` has, for the first value of every dimension in which the answers differ, whether the chosen answer
    (1) or the rejected one (-1) has it."""

    topic: Topic
    wanted: dict[str, str]
    preference: str
    question: str
    chosen: str
    rejected: str
    labels: dict[str, int]


STYLES = tuple(Style(*values) for values in product(*DIMENSIONS.values()))

HELD_OUT_DIMENSIONS = (("length", "stance"), ("tone", "restatement"), ("example", "encouragement"))
"""Dimensions that no training preference asks for together."""

_TOPICS = """
keep tomatoes fresh: store them at room temperature; keep them out of the sun; leave the stems on
    the cold dulls their flavor; a bowl on our counter stayed firm for nine days
bake crusty bread: preheat the pot for an hour; add a tray of hot water; let the loaf cool fully
    steam keeps the crust thin and crisp; one steamed loaf crackled for ten minutes
brew better coffee: grind the beans fresh; weigh out the water; rinse the paper filter
    fresh grounds hold more aroma; fifteen grams of beans made one rich cup
cook fluffy rice: rinse the grains twice; keep the lid closed; rest the pot for ten minutes
    loose starch makes the grains stick; two rinses turned a sticky pot into a light one
peel garlic quickly: crush the clove with a knife; shake the cloves in a jar; soak them in warm water
    the skin tears once the clove bends; one jar cleaned a whole bulb in seconds
sharpen a kitchen knife: soak the stone first; hold a steady angle; finish on the fine side
    a steady angle leaves a clean edge; ten strokes a side let our old blade slice paper
make pizza at home: heat the stone early; stretch the dough by hand; go easy on the sauce
    a hot stone dries the crust; one pie at full heat was done in six minutes
store fresh herbs: trim the ends; stand them in water; cover the leaves with a bag
    cut stems drink like flowers; a jar of basil stayed green for two weeks
poach an egg: use a very fresh egg; add a little vinegar; stir the water gently
    vinegar sets the white faster; three minutes gave a soft golden yolk
roast vegetables: cut even pieces; dry them well; leave space on the tray
    crowded pieces steam instead of browning; a half full tray came out crisp
make a good soup: brown the onions slowly; add salt in stages; simmer on low heat
    slow heat draws out sweetness; an hour of simmering saved a thin broth
grow basil indoors: pick a sunny window; pinch the top leaves; water from below
    pinched stems branch out; one pot by the window fed us all winter
water houseplants: check the soil with a finger; use lukewarm water; empty the saucer
    soggy roots begin to rot; a weekly check saved our old fern
grow strawberries: plant in full sun; mulch with straw; cut back the runners
    straw keeps the fruit dry; six plants filled a basket every week
start a compost pile: mix dry leaves with scraps; turn the pile weekly; keep it damp
    air feeds the microbes; a turned pile became soil in ten weeks
prune roses: wait for early spring; cut above an outer bud; remove crossing stems
    open shrubs dry faster after rain; a hard trim doubled the blooms next door
attract garden birds: hang a feeder in a quiet spot; offer sunflower seeds; put out clean water
    birds return where food is steady; one feeder drew nine finches in a week
train a puppy: keep each session short; reward good behavior at once; teach one command at a time
    short lessons hold attention; five minutes a day taught our pup to sit
calm a nervous cat: offer a high perch; speak in a low voice; let the cat come to you
    height makes cats feel safe; a shelf by the door relaxed a shy kitten
clean windows: work on a cloudy day; spray a vinegar mix; wipe with newspaper
    the sun dries streaks onto glass; one cloudy morning was enough for ten panes
remove a coffee stain: blot the spot; rinse with cold water; rub in dish soap
    rubbing too soon spreads the stain; a white shirt was spotless after two rinses
organize a closet: empty every shelf; sort clothes by season; hang similar items together
    sorted shelves stay tidy longer; one Sunday of sorting freed two drawers
fix a squeaky door: lift out the hinge pin; coat it with soap; wipe away the dust
    dry metal rubs and squeals; a bar of soap silenced our pantry door
paint a room: wash down the walls; tape off the edges; roll from top to bottom
    paint grips clean walls; taped edges saved a friend three hours
save electricity: unplug idle chargers; switch to efficient bulbs; wash clothes in cold water
    heating water uses the most power; cold washing cut one bill by a tenth
unclog a drain: pour in hot water; add baking soda; pull the hair out with a hook
    soap and hair form a plug; a bent wire cleared our sink in a minute
fall asleep faster: dim the lights early; put the phone away; keep the room cool
    bright light delays sleep; a dark room cut one long night to ten minutes
wake up early: move the alarm across the room; keep the same bedtime; open the curtains
    morning light sets the body clock; a far alarm got my brother up by six
start running: begin with brisk walks; add one minute a day; rest every other day
    tendons adapt slowly; my aunt ran five miles after three months
improve posture: raise the screen; sit back in the chair; stretch once an hour
    a low screen bends the neck; two thick books fixed one desk
learn to swim: practice floating first; breathe out under water; kick from the hips
    calm breathing keeps the body high; a week of floating helped a whole class
drink more water: carry a bottle; sip before each meal; flavor it with lemon
    visible water is a reminder; a bottle on the desk doubled my intake
learn a new language: study ten minutes a day; label things at home; speak from the first week
    small steps build memory; labels taught a neighbor fifty words
remember names: repeat the name aloud; link it to a picture; write it down later
    pictures stick in memory; a rose on her hat fixed the name Rosa
study for an exam: split the material; quiz yourself daily; sleep well the night before
    recall strengthens memory; daily quizzes raised one grade from C to A
write a cover letter: name the role; tell one short story; end with a clear request
    stories are easy to recall; one story about a bakery won an interview
give a speech: rehearse it aloud; open with a question; pause after key points
    pauses let ideas sink in; one long pause quieted a noisy hall
stay focused at work: silence the phone; work in short blocks; clear the desk
    every switch costs attention; two quiet blocks finished a report by noon
run a meeting: send out an agenda; start right on time; end with clear tasks
    people prepare when they know the plan; one agenda cut an hour to twenty minutes
plan a weekly budget: list fixed costs; set a food limit; track each purchase
    small purchases add up; tracking snacks saved a student twelve dollars
save on groceries: write a list; shop after eating; buy fruit in season
    hungry shoppers buy more; a short list trimmed our bill by a fifth
pack a suitcase: roll the clothes; put shoes at the bottom; fill the gaps with socks
    rolled shirts crease less; ten rolled shirts fit in a cabin bag
beat jet lag: shift bedtime early; walk in daylight; skip the late coffee
    daylight resets the body clock; one long walk fixed a trip to Tokyo
take better photos: shoot near sunset; hold the camera still; move closer to the subject
    low sun softens shadows; a sunset portrait won a local prize
learn the guitar: tune before playing; practice slow chords; play a little every day
    slow practice builds clean habits; three chords were enough for a first song
back up a laptop: copy files weekly; keep one disk elsewhere; test a restore
    disks wear out without warning; a spare disk rescued a thesis
choose a strong password: join four random words; avoid birthdays; use a new one for each site
    length beats clever symbols; four words resisted a test for years
pitch a tent: find level ground; stake the corners first; face the door downwind
    tight corners shed rain; a tight tent stayed dry through a storm
"""


def _parse_topics(text: str) -> tuple[Topic, ...]:
    lines = [line.strip() for line in text.strip().splitlines()]
    topics = []
    for first, second in zip(lines[::2], lines[1::2], strict=True):
        task, tips = first.split(": ")
        topics.append(Topic(task, tuple(tips.split("; ")), *second.split("; ")))
    return tuple(topics)


TOPICS = _parse_topics(_TOPICS)
HELD_OUT_TOPICS = TOPICS[3::6]
"""What base models know and no reward model is trained on."""
TRAIN_TOPICS = tuple(topic for topic in TOPICS if topic not in HELD_OUT_TOPICS)

QUESTIONS = (
    "How do I {}?",
    "How can I {}?",
    "What is the best way to {}?",
    "Can you tell me how to {}?",
    "Any tips on how to {}?",
    "I want to {}. What do I do?",
)
HELD_OUT_QUESTIONS = QUESTIONS[4:5]
"""Phrasings the base model knows and the reward model is never trained on."""
TRAIN_QUESTIONS = tuple(question for question in QUESTIONS if question not in HELD_OUT_QUESTIONS)

_OPENERS = {
    "formal": ("Thank you for asking.", "I am glad to assist.", "That is a fine question."),
    "playful": ("Ooh, fun one!", "Yay, great question!", "Oh, I love this!"),
}
_LEADS = {
    ("formal", "cautious"): ("It might help to {}.", "Perhaps it is wise to {}."),
    ("formal", "direct"): ("You should always {}.", "The correct approach is to {}."),
    ("playful", "cautious"): ("Maybe you could {}!", "I guess you might {}!"),
    ("playful", "direct"): ("Just {}!", "Definitely {}!"),
}
_REASONS = {
    "formal": ("This is because {}.", "The reason is that {}."),
    "playful": ("Why? Well, because {}!", "You see, the thing is that {}!"),
}
_MORE = {
    "formal": ("In addition, {}, and then {}.", "Furthermore, {}, and finally {}."),
    "playful": ("After that, {}, and then {}!", "Oh, and do not forget to {}, or to {}!"),
}
_EXAMPLES = {
    "formal": ("For example, {}.", "For instance, {}."),
    "playful": ("For example, {}!", "For instance, {}!"),
}
_CLOSERS = {
    ("formal", "cautious"): ("However, results may vary.", "However, this is not certain."),
    ("formal", "direct"): ("There is no doubt.", "This is certain to work."),
    ("playful", "cautious"): ("No promises, though!", "Fingers crossed!"),
    ("playful", "direct"): ("Works every time!", "Guaranteed!"),
}

_ENCOURAGEMENTS = {
    "formal": ("I trust that it will go well.", "I have every confidence in you."),
    "playful": ("You have got this!", "I believe in you!"),
}
_RESTATEMENTS = {
    "formal": ("You would like to {}.", "Your question is how to {}."),
    "playful": ("So you want to {}!", "You are about to {}!"),
}

# The last way to say a thing, and the last frame, are held out.
_ADJECTIVES = {
    "concise": ("concise", "brief", "succinct"),
    "detailed": ("detailed", "thorough", "elaborate"),
    "formal": ("formal", "polite", "courteous"),
    "playful": ("playful", "cheerful", "lively"),
    "cautious": ("cautious", "careful", "tentative"),
    "direct": ("direct", "confident", "assertive"),
    "encouraging": ("encouraging", "supportive", "uplifting"),
    "neutral": ("neutral", "matter of fact", "unemotional"),
}
_PHRASES = {
    "example": ("with an example", "including an example", "shown in a real case"),
    "no example": ("in general terms", "staying abstract", "leaving specifics out"),
    "restating": ("restating my question", "repeating what I asked", "echoing me first"),
    "immediate": ("getting to the point", "skipping preambles", "starting right away"),
}
_FRAMES = (
    "Please be {}",
    "Be {}",
    "Keep it {}",
    "I like answers that are {}",
    "Your answer should be {}",
    "What I want is something {}",
)

# What the checker reads. The words of the topics contain none of these.
_MARKERS = {
    "formal": r"\b(?:thank you|glad to assist|a fine question|it is wise|this is because|the reason is"
    r"|in addition|furthermore|however|the correct approach|you should always)\b",
    "playful": r"!",
    "cautious": r"\b(?:might|may|maybe|perhaps|could|i guess|not certain|no promises|fingers crossed)\b",
    "direct": r"\b(?:always|just|definitely|no doubt|certain to|every time|guaranteed|the correct approach)\b",
    "example": r"\bfor (?:example|instance)\b",
    "restating": r"\b(?:you would like to|your question is|so you want to|you are about to)\b",
    "encouraging": r"\b(?:will go well|confidence in you|have got this|believe in you)\b",
}
_NOT_COUNTED = re.compile("|".join(_MARKERS[value] for value in ("example", "restating", "encouraging")))
MAX_CONCISE_WORDS = 22
MIN_DETAILED_WORDS = 26


def answer(topic: Topic, style: Style, rng: random.Random) -> str:
    """An answer about ``topic`` in ``style``; the wording and the tip it begins with are random.

    All draws are made whatever the style, so that answers of two styles with equal generators differ in style alone.
    """
    tone, stance = style.tone, style.stance
    first = rng.randrange(len(topic.tips))
    tip, *more_tips = topic.tips[first:] + topic.tips[:first]
    opener, lead = rng.choice(_OPENERS[tone]), rng.choice(_LEADS[tone, stance])
    reason, more = rng.choice(_REASONS[tone]), rng.choice(_MORE[tone])
    example, closer = rng.choice(_EXAMPLES[tone]), rng.choice(_CLOSERS[tone, stance])
    encouragement, restatement = rng.choice(_ENCOURAGEMENTS[tone]), rng.choice(_RESTATEMENTS[tone])
    sentences = [opener]
    if style.restatement == "restating":
        sentences.append(restatement.format(topic.task))
    if style.encouragement == "encouraging":
        sentences.append(encouragement)
    sentences.append(lead.format(tip))
    if style.length == "detailed":
        sentences += [reason.format(topic.reason), more.format(*more_tips)]
    if style.example == "example":
        sentences.append(example.format(topic.example))
    return " ".join([*sentences, closer])


@functools.cache
def _grammar(topic: Topic) -> re.Pattern:
    """The sentences of all answers about ``topic``, of any mix of styles, in their order."""

    def one_of(*templates: str, fills: Sequence[Sequence[str]] = ((),)) -> str:
        return "(?:" + "|".join(re.escape(t.format(*fill)) for t in templates for fill in fills) + ")"

    def flat(table: Mapping) -> list[str]:
        return [template for templates in table.values() for template in templates]

    tips = [(a,) for a in topic.tips]
    others = [(a, b) for a in topic.tips for b in topic.tips if a != b]
    reason = one_of(*flat(_REASONS), fills=[(topic.reason,)])
    more = one_of(*flat(_MORE), fills=others)
    example = one_of(*flat(_EXAMPLES), fills=[(topic.example,)])
    restatement = one_of(*flat(_RESTATEMENTS), fills=[(topic.task,)])
    return re.compile(
        f"{one_of(*flat(_OPENERS))}(?: {restatement})?(?: {one_of(*flat(_ENCOURAGEMENTS))})?"
        f" {one_of(*flat(_LEADS), fills=tips)}(?: {reason} {more})?(?: {example})? {one_of(*flat(_CLOSERS))}"
    )


def is_well_formed(text: str, topic: Topic) -> bool:
    """Whether ``text`` is, whatever its style, an answer about ``topic``: its facts, whole sentences, their order."""
    return _grammar(topic).fullmatch(text.strip()) is not None


def preference(wanted: Mapping[str, str], rng: random.Random, held_out: bool = False) -> str:
    """A preference in words, as ``{"tone": "playful"}`` in one dimension or more; ``held_out``: in held-out words."""

    def say(phrases: Sequence[str]) -> str:
        return phrases[-1] if held_out else rng.choice(phrases[:-1])

    words = [say(_ADJECTIVES[value]) for value in wanted.values() if value in _ADJECTIVES]
    rng.shuffle(words)
    phrases = [say(_PHRASES[value]) for value in wanted.values() if value in _PHRASES]
    listed = [" and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)] if words else []
    return say(_FRAMES).format(", ".join(listed + phrases)) + "."


def measure(text: str) -> dict[str, str | None]:
    """The value of each dimension that ``text`` shows; None where it shows neither or both.

    Length counts words outside the sentences that other dimensions add.
    """
    low = text.lower()
    found = {value: re.search(pattern, low) is not None for value, pattern in _MARKERS.items()}
    sentences = re.split(r"(?<=[.!?])\s+", low)
    num_words = sum(len(s.split()) for s in sentences if not _NOT_COUNTED.search(s))
    found["concise"] = 0 < num_words <= MAX_CONCISE_WORDS
    found["detailed"] = num_words >= MIN_DETAILED_WORDS
    for value, absent in (DIMENSIONS[d] for d in ("example", "restatement", "encouragement")):
        found[absent] = num_words > 0 and not found[value]
    return {
        dimension: (a if found[a] else b) if found[a] != found[b] else None for dimension, (a, b) in DIMENSIONS.items()
    }


def satisfaction(text: str, wanted: Mapping[str, str]) -> float:
    """The share of the ``wanted`` dimensions in which ``text`` shows the wanted value."""
    measured = measure(text)
    return sum(measured[dimension] == value for dimension, value in wanted.items()) / len(wanted)


def is_held_out(wanted: Mapping[str, str]) -> bool:
    """Whether a preference asks for dimensions together that no training preference does."""
    return any(set(pair) <= set(wanted) for pair in HELD_OUT_DIMENSIONS)


def sample_wanted(rng: random.Random, held_out: bool = False) -> dict[str, str]:
    """Values for one to three random dimensions, none held out together; or for two to four, some held out together."""
    sizes = (2, 3, 3, 4) if held_out else (1, 2, 3, 3)
    choices = [d for d in combinations(DIMENSIONS, rng.choice(sizes)) if is_held_out(dict.fromkeys(d, "")) == held_out]
    return {dimension: rng.choice(DIMENSIONS[dimension]) for dimension in rng.choice(choices)}


def sample_pair(rng: random.Random, held_out: bool = False) -> Pair:
    """A preference pair: for training, or of what is ``held_out`` (topic, question, wording and combination).

    The rejected answer differs from the chosen one in a random non-empty subset of the wanted dimensions, often a
    single one. All else is random, and the same in both: what the pair teaches is the preference.
    """
    wanted = sample_wanted(rng, held_out)
    flipped = rng.sample(list(wanted), rng.randint(1, len(wanted)))
    chosen = rng.choice(STYLES)._replace(**wanted)
    rejected = chosen._replace(**{d: DIMENSIONS[d][wanted[d] == DIMENSIONS[d][0]] for d in flipped})
    topic = rng.choice(HELD_OUT_TOPICS if held_out else TRAIN_TOPICS)
    question = rng.choice(HELD_OUT_QUESTIONS if held_out else TRAIN_QUESTIONS)
    seed = rng.getrandbits(32)
    labels = {DIMENSIONS[d][0]: 1 if wanted[d] == DIMENSIONS[d][0] else -1 for d in flipped}
    in_words, asked = preference(wanted, rng, held_out), question.format(topic.task)
    answers = [answer(topic, style, random.Random(seed)) for style in (chosen, rejected)]
    return Pair(topic, wanted, in_words, asked, answers[0], answers[1], labels)


def check(text: str, prompt: Mapping[str, str], user: Mapping[str, Mapping[str, str]]) -> Judgement:
    """The checker of ``pad-vllm eval`` for this world: prompts have a ``topic`` (its task), users what is
    ``wanted``."""
    measured = measure(text)
    satisfied = {dimension: float(measured[dimension] == value) for dimension, value in user["wanted"].items()}
    return Judgement(satisfied, is_well_formed(text, next(t for t in TOPICS if t.task == prompt["topic"])))
