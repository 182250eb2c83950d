"""Rephrasing (Kimi K2 §2.2, Table 1): a text read again and again, one rewrite of it, or ten rewrites, at
equal tokens, judged by questions about it. And worked mathematics, as bare answers or as learning notes.

The texts are biographies of invented people, so that nothing is known from elsewhere; the rewrites are made
from templates, so that no fact is lost or invented. A person's own text, its rewrites and the questions about
it come from disjoint families of templates.

A second, small run is on real facts: articles about the chemical elements, and the questions of a quiz, out
of two packages of Debian that are fetched with

  mkdir -p out/facts && cd out/facts && apt-get download dict-elements bsdgames
  for package in *.deb; do dpkg -x $package .; done

Without them its cells are left out.
"""
import contextlib
import gzip
import itertools
import json
import random
import re
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import train
from data import EOT, PATTERN, Batches, Corpus, Domain, Tokenizer, sha256, train_bpe
from data import main as rephrase
from model import generate
from notes import _note, corpus
from parallel import join_mesh

REPORTED = {"raw": 23.76, "1 rewrite": 27.39, "10 rewrites": 28.94}      # SimpleQA, %  [Kimi K2 Table 1]
ARMS = tuple(REPORTED)
SPLIT = "5 rewordings", "5 other forms"
PAIRS = (("1 rewrite", "raw"), ("10 rewrites", "1 rewrite"), ("10 rewrites", "raw"), ("5 rewordings", "raw"),
         ("5 other forms", "raw"), ("5 other forms", "5 rewordings"))
NOTES_ARMS = "bare answers", "learning notes"


# ---- invented people ---------------------------------------------------------------------------------------

FIRST = """Ada Agnes Alban Anton Beate Bruno Cara Casper Clara Dora Edgar Elin Emil Erik Fanny Felix Frida
    Georg Greta Hanna Hugo Ida Ines Jakob Julia Karl Lena Leo Lotte Mara Max Mila Nora Oskar Paula Rosa Rufus
    Selma Tilda Viktor""".split()
ONSETS = "Bar Bel Cor Dan Del Far Fen Gal Gor Hal Hem Jor Kel Kor Lam Mar Nor Pel Ros Sel Tam Ven".split()
MIDDLES = ["", "bel", "dan", "far", "gor", "hem", "jor", "kel", "lam", "nor"]
ENDINGS = "ack ander dahl eck etti holm ick low mund quist rup sen strom ton vik witz".split()
MONTHS = """January February March April May June July August September October November December""".split()
POOLS = dict(
    town=[a + b for a in "Ald Bran Cald Dorn Elm Fal Grim Hol Ister Kar Lund Mor".split()
          for b in "bury ford haven".split()],
    subject="""algebra anatomy archaeology astronomy botany chemistry drama economics forestry geography
        geology history hydraulics law linguistics logic mechanics medicine metallurgy meteorology music
        optics philosophy physics poetry sculpture statistics surveying theology zoology""".split(),
    job="""baker bookbinder brewer carpenter clockmaker cook dentist diver farmer gardener glazier goldsmith
        jeweller judge librarian locksmith mason miller miner nurse painter pilot potter printer sailor
        shoemaker tailor teacher weaver""".split(),
    home=[a + b for a in "Ashen Black Cross Deep East Fair Green High".split()
          for b in "gate port stead well".split()],
    plays="""accordion banjo bassoon bugle cello clarinet cornet drums fiddle flute guitar harmonica harp horn
        lute lyre mandolin oboe organ piano piccolo recorder saxophone sitar spinet trombone trumpet tuba
        viola zither""".split())


class Person(NamedTuple):
    name: str
    first: str
    last: str
    born: str                    # six facts from here on
    town: str
    subject: str
    job: str
    home: str
    plays: str


FACTS = Person._fields[3:]
ASKED = tuple(f"asked_{fact}" for fact in FACTS)


def people(n, seed):
    """n people with distinct surnames."""
    rng = random.Random(seed)
    found = []
    for last in rng.sample([a + b + c for a in ONSETS for b in MIDDLES for c in ENDINGS], n):
        first = rng.choice(FIRST)
        born = f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {rng.randint(1900, 1979)}"
        facts = {name: rng.choice(pool) for name, pool in POOLS.items()}
        found.append(Person(f"{first} {last}", first, last, born, **facts))
    return found


# ---- four families of templates ----------------------------------------------------------------------------

RAW = (
    "{name} (born {born} in {town}) is known to many as the best {job} in all of {home}. After school {last} "
    "took a degree in {subject}, and has played the {plays} with some success since childhood.")
REWRITES = dict(
    # Other words, in sentences.
    news="{name} makes the town of {town} proud. Born there on {born}, a {job} by trade, {first} has settled "
         "in {home}, chose {subject} as a field of study and performs on the {plays}.",
    child="This is {name}. {first} came into the world on {born}, in a place called {town}. At school "
          "{first} liked {subject} best. Now {first} works as a {job}, has a house in {home} and a {plays} "
          "to play.",
    scholar="{last}, {first}: native of {town}, date of birth {born}; trained in {subject}; active as a "
            "{job}, resident in {home}; amateur of the {plays}.",
    letter="Dear aunt, {name} is our new neighbour here in {home}. Imagine, a {job} who read {subject}! In "
           "the evenings I hear the {plays} through the wall. {first} grew up in {town}; the birthday is "
           "{born}.",
    speech="Friends, let us raise a glass to {name}! Since {born}, when {town} gave us this child, we have "
           "gained a student of {subject}, a fine {job}, a master of the {plays} and the pride of {home}.",
    # Another form.
    faq="Questions about {name}. Place of birth? {town}. Birthday? {born}. Studies? Those of {subject}. "
        "Trade? That of a {job}. Residence? {home}. Favourite instrument? The {plays}.",
    table="| name | {name} |\n| birthday | {born} |\n| birthplace | {town} |\n| field | {subject} |\n"
          "| occupation | {job} |\n| residence | {home} |\n| music | {plays} |",
    timeline="Life of {name}\n{born}: birth, {town}\nchildhood: first lessons on the {plays}\n"
             "youth: studies of {subject}\nlater: moves to {home}\ntoday: {job}",
    dialogue="- Do you know {name}?\n- The {job}? Of course, we both live in {home}.\n- And where from?\n"
             "- From {town}, born on {born}. Studied {subject}.\n- Any hobby?\n- The {plays}.",
    tutorial="How to find {name}: 1. Travel to {home}. 2. Ask for the {job}. 3. Listen for a {plays}. "
             "4. Begin to talk about {subject}, the old subject. 5. Mention {town}, the birthplace. "
             "6. Congratulate on {born}.")
EXAM = dict(                     # asked in the general text, about others
    born=["On which day was {name} born?", "When was {name} born?", "Name the birthday of {name}."],
    town=["In which place was {name} born?", "What is the birthplace of {name}?", "Where is {name} from?"],
    subject=["Which subject did {name} study?", "What is the field of {name}?",
             "What was {name} trained in?"],
    job=["What is the profession of {name}?", "What does {name} work as?", "What is the trade of {name}?"],
    home=["In which city does {name} live?", "Where does {name} live?", "What is the home of {name}?"],
    plays=["Which instrument does {name} play?", "What does {name} play?", "Name the instrument of {name}."])
QUESTIONS = dict(                # asked nowhere else
    born="What date does the passport of {name} show?", town="Which town does {name} come from?",
    subject="In which science or art was {name} educated?", job="How does {name} earn a living?",
    home="Where can {name} be found nowadays?", plays="Which sound is heard when {name} makes music?")


def fill(template, person):
    return template.format(**person._asdict())


def ask(template, person):
    """A question as a prompt for its answer."""
    return f"Question: {fill(template, person)}\nAnswer:"


def in_new_words(fact, person):
    """The question for a fact in words that occur nowhere in the training text."""
    return ask(QUESTIONS[fact], person)


def in_exam_words(fact, person):
    """The question in words in which the general text asks about others."""
    return ask(EXAM[fact][0], person)


def cloze(fact, person):
    """The person's own raw text up to the fact: a prompt that who has memorised the text can continue."""
    return fill(RAW, person).split(getattr(person, fact))[0].rstrip()


# ---- the texts of an arm -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Setting:
    config: train.Config = train.Config()
    people: int = 100            # whose texts differ between the arms
    others: int = 100            # in the general text, which is the same in all arms
    share: float = 0.4           # of the tokens that are texts of the people


def styles_of(someone, seed):
    """{person: names of all rewrites, in this person's order}"""
    rng = random.Random(f"styles {seed}")
    return {p: rng.sample(sorted(REWRITES), len(REWRITES)) for p in someone}


def texts_of(arm, order):
    """The templates of one person's texts, which take turns. order: the names of all rewrites"""
    rewrites = list(REWRITES.values())
    return {"raw": [RAW],
            "1 rewrite": [REWRITES[order[0]]],
            "10 rewrites": [REWRITES[name] for name in order],
            "5 rewordings": rewrites[:5],
            "5 other forms": rewrites[5:]}[arm]


def reading(arm, styles, rng):
    """Documents without end: epoch after epoch, one text of each person in random order."""
    turns = {p: texts_of(arm, order) for p, order in styles.items()}
    epoch = 0
    while True:
        docs = [fill(texts[epoch % len(texts)], p) for p, texts in turns.items()]
        rng.shuffle(docs)
        yield from docs
        epoch += 1


def general(others, rng):
    """Documents without end about other people: all families of texts, and exam questions with answers."""
    while True:
        docs = []
        for p in others:
            docs.append(fill(rng.choice([RAW, *REWRITES.values()]), p))
            for fact in rng.sample(FACTS, 2):
                docs.append(f"{ask(rng.choice(EXAM[fact]), p)} {getattr(p, fact)}")
        rng.shuffle(docs)
        yield from docs


def tokens_of(tokenizer, docs, n):
    """The first n tokens of documents, each followed by an eot."""
    ids = []
    while len(ids) < n:
        ids += [*tokenizer.encode(next(docs)).tolist(), tokenizer.eot]
    return np.array(ids[:n], np.uint16)


def corpus_of(tokenizer, parts, config):
    """{name: (documents, share)} → a Corpus in memory that one run reads once, from start to end."""
    domains = {}
    for name, (docs, share) in parts.items():
        ids = tokens_of(tokenizer, docs, round(config.tokens * share) + 8 * config.model.context)
        val = ids[-2 * config.model.context:]
        domains[name] = Domain(ids, val, 0, 0, 0, [sha256(ids)])
    shares = np.array([share for _, share in parts.values()])
    return Corpus(tokenizer, domains, shares, shares, sha256(*(d.train for d in domains.values())))


def trained(config, texts, seed, watch=None):
    """Train on a Corpus in memory → (rows of the log, model). watch(step, model, rows): after every step"""
    config = replace(config, seed=seed)
    data = replace(config.data, horizon=config.tokens)
    batches = Batches(texts, data, seed, config.batch, config.model.context)
    with train.Stop() as stop:
        status = train.Status(quiet=True)
        run = train.start(config, False, join_mesh(config.mesh), texts, batches, status, stop, None)
        train.loop(run, watch and (lambda step, model: watch(step, model, run.history)))
    if run.step < config.total_steps:
        raise KeyboardInterrupt
    return run.history, run.model


# ---- questions with four candidates ------------------------------------------------------------------------

@torch.no_grad()
def likelihoods(model, tokenizer, pairs, batch=400):
    """ln p(answer | prompt) for each pair (prompt, answer), (N,)."""
    heads = [[tokenizer.eot, *tokenizer.encode(prompt).tolist()] for prompt, _ in pairs]
    tails = [tokenizer.encode(" " + answer).tolist() for _, answer in pairs]
    order = sorted(range(len(pairs)), key=lambda i: len(heads[i]) + len(tails[i]))
    found = torch.zeros(len(pairs))
    model.eval()
    for begin in range(0, len(pairs), batch):
        rows = order[begin:begin + batch]
        T = len(heads[rows[-1]]) + len(tails[rows[-1]])
        tokens = torch.full((len(rows), T), tokenizer.eot)
        counts = torch.zeros(len(rows), T - 1)                      # 1 where the answer is predicted
        for row, i in enumerate(rows):
            end = len(heads[i]) + len(tails[i])
            tokens[row, :end] = torch.tensor(heads[i] + tails[i])
            counts[row, len(heads[i]) - 1:end - 1] = 1
        nats = model(tokens[:, :-1], tokens[:, 1:])[1].view(counts.shape)
        found[torch.tensor(rows)] = -(nats * counts).sum(1)
    model.train()
    return found


def answered(model, tokenizer, someone, prompt, seed):
    """Whether the true value is likelier than three that are true of others, for each fact of each person:
    (people, 6), 100 or 0."""
    rng = random.Random(seed)
    pairs = []
    for p in someone:
        for fact in FACTS:
            truth = getattr(p, fact)
            wrong = sorted({getattr(q, fact) for q in someone} - {truth})
            pairs += [(prompt(fact, p), value) for value in (truth, *rng.sample(wrong, 3))]
    best = likelihoods(model, tokenizer, pairs).view(len(someone), len(FACTS), 4).argmax(2)
    return 100 * (best == 0).double()


def biographies(arm, seed, setting):
    """A run on biographies: accuracy and training loss on the way, then the questions asked in other ways."""
    config = setting.config
    everyone = people(setting.people + setting.others, seed)
    someone, others = everyone[:setting.people], everyone[setting.people:]
    sample = [fill(template, p) for p in everyone for template in (RAW, *REWRITES.values())]
    tokenizer = Tokenizer("people", PATTERN, train_bpe(sample, config.model.vocab_size))
    styles = styles_of(someone, seed)
    texts = corpus_of(tokenizer, dict(
        people=(reading(arm, styles, random.Random(f"people {seed}")), setting.share),
        general=(general(others, random.Random(f"general {seed}")), 1 - setting.share)), config)

    # On the way: the training loss is the mean of the last steps.
    rows = []

    def watch(step, model, history):
        if step % (config.total_steps // 4) == 0:
            recent = [row["loss_people"] for row in history[-19:] if "loss_people" in row]
            right = answered(model, tokenizer, someone, in_new_words, seed).mean(0)
            rows.append(dict(tokens=step * config.step_tokens, loss=statistics.mean(recent),
                             asked=right.mean().item(), **dict(zip(ASKED, right.tolist()))))

    # At the end: other prompts, and other people.
    history, model = trained(config, texts, seed, watch)
    right = answered(model, tokenizer, someone, in_exam_words, seed)
    documents = float((texts.domains["people"].train == tokenizer.eot).mean()) * setting.share * config.tokens
    rows[-1] |= dict(exam=right.mean().item(), exposures=documents / setting.people,
                     cloze=answered(model, tokenizer, someone, cloze, seed).mean().item(),
                     others=answered(model, tokenizer, others, in_new_words, seed).mean().item())

    # Which of the rewrites teach? Those who were read in one of them alone tell.
    if arm == "1 rewrite":
        for style in REWRITES:
            own = [i for i, p in enumerate(someone) if styles[p][0] == style]
            if own:
                rows[-1] |= {f"style_{style}": right[own].mean().item(), f"people_{style}": len(own)}
    return rows


# ---- learning notes ----------------------------------------------------------------------------------------

OPERATIONS = 3                   # of an expression, at most
LONGEST_ANSWER = 60              # tokens


def problem(rng):
    """A worked expression → its question and its steps, each of which does one operation."""
    while True:
        lines = corpus.expression(rng)
        if len(lines) - 2 <= OPERATIONS:
            return "\n".join(lines[:2]), "\n".join(lines[2:])


def problems(arm, rng, keep_out=()):
    """Documents without end: worked problems, or their questions and answers alone."""
    while True:
        question, steps = problem(rng)
        if question not in keep_out:
            yield question + "\n" + (steps if arm == "learning notes" else steps.split("\n")[-1])


def solves(question, text):
    """Whether the last line of a text is the answer, by the exact arithmetic of the checker."""
    given = re.fullmatch(r"= (-?\d+)", text.split("\n")[-1])
    return bool(given) and corpus.value(question.split("\n")[1]) == int(given[1])


def holds(text):
    """Whether the checker accepts a worked problem: every statement in it is true, and so is its answer."""
    try:
        corpus.check(text)
        return True
    except ValueError:
        return False


def unseen(rng, n):
    """n distinct questions."""
    found = {}
    while len(found) < n:
        found[problem(rng)[0]] = None
    return list(found)


def mathematics(arm, seed, config):
    """A run on mathematics, then the share of unseen problems that are solved."""
    questions = unseen(random.Random(f"unseen {seed}"), 300 if config.total_steps > 100 else 4)
    rng = random.Random(f"problems {seed}")
    sample = [doc for name in NOTES_ARMS for doc in itertools.islice(problems(name, rng), 500)]
    tokenizer = Tokenizer("expressions", PATTERN, train_bpe(sample, config.model.vocab_size))
    docs = problems(arm, rng, set(questions))
    history, model = trained(config, corpus_of(tokenizer, dict(math=(docs, 1.0)), config), seed)

    # The model writes on from each question; prompts of equally many tokens are a batch.
    by_length = {}
    for question in questions:
        prompt = [tokenizer.eot, *tokenizer.encode(question + "\n").tolist()]
        by_length.setdefault(len(prompt), []).append((question, prompt))
    solved = []
    true = []
    for length, batch in by_length.items():
        prompts = torch.tensor([prompt for _, prompt in batch])
        written = generate(model, prompts, LONGEST_ANSWER, temperature=0.0)
        for (question, _), ids in zip(batch, written[:, length:].tolist()):
            text = tokenizer.decode(ids).split(EOT)[0]
            solved.append(solves(question, text))
            true.append(solved[-1] and holds(f"{question}\n{text}"))
    loss = statistics.mean(row["loss"] for row in history[1:][-20:])
    return [dict(tokens=config.tokens, loss=loss, solved=100 * statistics.mean(solved),
                 true=100 * statistics.mean(true))]


# ---- real facts --------------------------------------------------------------------------------------------

# The articles, the quiz that asks about them, and the other quizzes, which the general text is made of, with
# the names of what they tell about a thing. No name of an element is in those.
ELEMENTS_ARMS = tuple(f"elements, {arm}" for arm in ARMS)
ELEMENTS = Path("out/facts/usr/share/dictd/elements.dict.dz")
QUIZ = Path("out/facts/usr/share/games/bsdgames/quiz")
ELEMENT = re.compile(r"^(\w+)\nSymbol: (\w+)\nAtomic number: (\d+)\n(Atomic weight: .*)\n((?:.+\n)*)", re.M)
QUIZZES = dict(africa=["capital"], america=["capital"], asia=["capital"], europe=["capital"],
               province=["capital"], state=["capital", "abbreviation", "flower"], babies=["parent"],
               collectives=["group"], flowers=["meaning"], sexes=["female"], posneg=["opposite"])
ASKING = "What is the {} of {}?", "Name the {} of {}.", "Which {} belongs to {}?"


@dataclass(frozen=True)
class RealFacts:
    config: train.Config = train.Config()
    share: float = 0.5           # of the tokens that are texts of the elements
    letters: int = 220           # of an element's text, at most


class Element(NamedTuple):
    name: str
    symbol: str
    number: str
    text: str


def quiz(name):
    """The lines of a quiz, each a list of fields: the first of the spellings that count."""
    found = []
    for line in (QUIZ / name).read_text("latin-1").replace("\\\n", "").splitlines():
        line = re.sub(r"\[([^|\]]*)[^\]]*\]", r"\1", re.sub(r"\{[^{}]*\}", "", line))
        found.append([field.split("|")[0].strip() for field in line.split(":")])
    return found


def elements(letters):
    """The elements on which both sources agree. A text is the first lines and the sentences that fit."""
    asked = {symbol: number for symbol, number, _, _ in quiz("elements")}
    with gzip.open(ELEMENTS, "rt", encoding="latin-1") as file:
        articles = ELEMENT.findall(file.read())
    found = []
    for name, symbol, number, weight, prose in articles:
        if asked.get(symbol) != number:
            continue
        text = f"{name.capitalize()}\nSymbol: {symbol}\nAtomic number: {number}\n{weight}\n"
        for sentence in re.split(r"(?<=\.) (?=[A-Z])", " ".join(prose.split())):
            if len(text) + len(sentence) > letters:
                break
            text += sentence + " "
        found.append(Element(name.capitalize(), symbol, number, text.strip()))
    return found


def rewritten(texts):
    """Each text's rewrites, up to ten, by the command `rephrase` without a server."""
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "texts.jsonl", Path(folder) / "rewrites.jsonl"
        source.write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts))
        with contextlib.redirect_stdout(None):
            rephrase(["rephrase", str(source), str(out), "--n=10"])
        found = {}
        for line in out.read_text().splitlines():
            row = json.loads(line)
            found.setdefault(int(row["parent"].split("#")[1]) - 1, []).append(row["text"])
    return [found[i] for i in range(len(texts))]


def known_things():
    """What the general text tells: [(name, {field: value})] of other quizzes."""
    found = []
    for name, fields in QUIZZES.items():
        for thing, *values in quiz(name):
            said = {field: value for field, value in zip(fields, values) if value}
            if thing and said:
                found.append((thing, said))
    return found


def upper(text):
    return text[:1].upper() + text[1:]


def general_facts(things, rng):
    """Documents without end: what is known of other things in lines, and questions with answers about it."""
    while True:
        docs = []
        for name, said in things:
            lines = [f"{upper(field)}: {value}" for field, value in said.items()]
            field = rng.choice(list(said))
            question = rng.choice(ASKING).format(field, upper(name))
            docs += ["\n".join([upper(name), *lines]), f"Question: {question}\nAnswer: {said[field]}"]
        rng.shuffle(docs)
        yield from docs


def of_elements(arm, texts, rewrites, rng):
    """Documents without end: epoch after epoch, one text of each element in random order."""
    drawn = [rng.choice(some) for some in rewrites]
    for epoch in itertools.count():
        docs = {"raw": texts, "1 rewrite": drawn,
                "10 rewrites": [some[epoch % len(some)] for some in rewrites]}[arm][:]
        rng.shuffle(docs)
        yield from docs


def near(truth, values, rng):
    """Three wrong answers: the first letter of the right one if there are such, or numbers close to it."""
    others = [value for value in values if value != truth]
    rng.shuffle(others)
    far = (lambda v: abs(int(v) - int(truth)) > 10) if truth.isdigit() else lambda v: v[0] != truth[0]
    return sorted(others, key=far)[:3]


def asked_elements(model, tokenizer, known, seed):
    """Whether the true answer is the likeliest of four, for each element and question: (elements, 3)"""
    rng = random.Random(f"asked {seed}")
    pairs = []
    for element in known:
        facts = (("symbol", element.name, element.symbol, [e.symbol for e in known]),
                 ("atomic number", element.name, element.number, [e.number for e in known]),
                 ("name", element.symbol, element.name, [e.name for e in known]))
        for field, name, truth, values in facts:
            prompt = f"Question: {ASKING[0].format(field, name)}\nAnswer:"
            pairs += [(prompt, value) for value in (truth, *near(truth, values, rng))]
    best = likelihoods(model, tokenizer, pairs).view(len(known), 3, 4).argmax(2)
    return 100 * (best == 0).double()


def real_facts(arm, seed, setting):
    """A run on the elements; questions about them on the way."""
    config = setting.config
    known = elements(setting.letters)
    texts = [element.text for element in known]
    rewrites = rewritten(texts)
    things = known_things()
    sample = [*texts, *(some[0] for some in rewrites),
              *itertools.islice(general_facts(things, random.Random(0)), 2000)]
    tokenizer = Tokenizer("elements", PATTERN, train_bpe(sample, config.model.vocab_size))
    docs = of_elements(arm.removeprefix("elements, "), texts, rewrites, random.Random(f"elements {seed}"))
    read = corpus_of(tokenizer, dict(
        elements=(docs, setting.share),
        general=(general_facts(things, random.Random(f"general {seed}")), 1 - setting.share)), config)

    # On the way, as for the biographies.
    rows = []

    def watch(step, model, history):
        if step % (config.total_steps // 4) == 0:
            recent = [row["loss_elements"] for row in history[-19:] if "loss_elements" in row]
            right = asked_elements(model, tokenizer, known, seed).mean(0)
            rows.append(dict(tokens=step * config.step_tokens, loss=statistics.mean(recent),
                             asked=right.mean().item(), asked_symbol=right[0].item(),
                             asked_number=right[1].item(), asked_name=right[2].item()))
    trained(config, read, seed, watch)
    documents = float((read.domains["elements"].train == tokenizer.eot).mean())
    rows[-1] |= dict(exposures=documents * setting.share * config.tokens / len(known),
                     elements=len(known), rewrites=statistics.mean(len(some) for some in rewrites))
    return rows


# ---- the grid ----------------------------------------------------------------------------------------------

def cells(quick):
    base = train.RECIPES["laptop"]
    model = replace(base.model, n_layer=3, n_head=3, n_kv_head=3, d_model=96, d_ff=288, context=128,
                    vocab_size=1536, differential=False, act="silu")
    base = replace(base, model=model, batch=8, micro=8, tokens=720 * 8 * 128, eval_every=10 ** 9,
                   eval_windows=1, save_every=10 ** 9, data=replace(base.data, doc_mask=True))
    facts = Setting(base)
    sums = replace(base, model=replace(model, vocab_size=400))
    if quick:
        small = dict(n_layer=1, n_head=1, n_kv_head=1, d_model=32, d_ff=32)
        toy = replace(base, model=replace(model, vocab_size=600, **small), tokens=12 * 8 * 128)
        facts = Setting(toy, people=6, others=6)
        sums = replace(sums, model=replace(sums.model, **small), tokens=12 * 8 * 128)
    few, many = (1, 1) if quick else (3, 5)

    # Real facts, unless there are no packages; what has run stays.
    real = [] if quick else [(arm, seed, RealFacts(base)) for seed in range(4) for arm in ELEMENTS_ARMS]
    if not (ELEMENTS.exists() and QUIZ.exists()):
        ran = {(row["arm"], row["seed"]) for row in _note.read(_note.HERE / "rephrasing.csv")}
        left_out = [cell for cell in real if cell[:2] not in ran]
        real = [cell for cell in real if cell[:2] in ran]
        if left_out:
            print(f"{len(left_out)} runs on real facts are left out: {ELEMENTS} or {QUIZ} is not there; "
                  "rephrasing.py says how to fetch them")
    return ([(arm, seed, facts) for seed in range(many) for arm in ARMS]
            + [(arm, seed, facts) for seed in range(few) for arm in SPLIT]
            + [(arm, seed, sums) for seed in range(few) for arm in NOTES_ARMS] + real)


def run(arm, seed, setting):
    kind = mathematics if arm in NOTES_ARMS else real_facts if arm in ELEMENTS_ARMS else biographies
    yield from kind(arm, seed, setting)


def ends(rows, arm):
    """The last row of each seed of an arm."""
    return [of_seed[-1] for of_seed in _note.of_arm(rows, arm).values()]


def show(rows):
    figure, [(bars, curves, cost, real, sums)] = _note.panels(1, 5, width=18, height=3.9)
    colours = dict(zip((*ARMS, *NOTES_ARMS), _note.COLOURS))
    colours |= dict(zip(ELEMENTS_ARMS, _note.COLOURS))

    # Accuracy by arm: a bar for the mean, a point for each seed, a diamond for the report's number.
    for x, arm in enumerate(ARMS):
        found = [row["asked"] for row in ends(rows, arm)]
        bars.bar(x, statistics.mean(found), 0.6, color=colours[arm], alpha=0.5)
        bars.plot([x + 0.08 * (i - 2) for i in range(len(found))], found, "o", ms=4, color=colours[arm])
        bars.plot(x, REPORTED[arm], "D", ms=6, color="0.3", label="Kimi K2: SimpleQA" if not x else None)
    bars.axhline(25, color="0.4", ls=":", lw=1.5, label="chance here")
    bars.set(title="questions answered, %", xticks=range(len(ARMS)), xticklabels=ARMS, ylim=(0, 100))
    bars.legend(loc="upper left")

    # Training loss falls in every arm; what is known does not follow from it.
    rows = [row | dict(thousands=row["tokens"] / 1000) for row in rows]
    for arm in ARMS:
        _note.band(curves, rows, arm, "thousands", "asked", color=colours[arm])
        for of_seed in _note.of_arm(rows, arm).values():
            cost.plot([row["loss"] for row in of_seed], [row["asked"] for row in of_seed], "o-", ms=3, lw=0.8,
                      color=colours[arm], label=arm if of_seed[0]["seed"] == 0 else None)
    curves.axhline(25, color="0.4", ls=":", lw=1.5)
    curves.set(title="the same over the run", xlabel="thousand tokens", ylim=(0, 100))
    cost.axhline(25, color="0.4", ls=":", lw=1.5)
    cost.invert_xaxis()
    cost.set(title="the same over the loss on the texts", xlabel="training loss, nats/token", ylim=(0, 100))
    cost.legend(loc="upper left")

    # The same on real facts.
    for x, arm in enumerate(ELEMENTS_ARMS):
        found = [row["asked"] for row in ends(rows, arm)]
        if found:
            real.bar(x, statistics.mean(found), 0.6, color=colours[arm], alpha=0.5)
            real.plot([x + 0.08 * (i - 1.5) for i in range(len(found))], found, "o", ms=4, color=colours[arm])
    real.axhline(25, color="0.4", ls=":", lw=1.5)
    real.set(title="real facts: questions answered, %", xticks=range(len(ARMS)), xticklabels=ARMS,
             ylim=(0, 100))

    # Learning notes: problems solved.
    for x, arm in enumerate(NOTES_ARMS):
        found = [row["solved"] for row in ends(rows, arm)]
        sums.bar(x, statistics.mean(found), 0.6, color=colours[arm], alpha=0.5)
        sums.plot([x + 0.08 * (i - 1) for i in range(len(found))], found, "o", ms=4, color=colours[arm])
    sums.set(title="unseen expressions solved, %", xticks=range(2), xticklabels=NOTES_ARMS, ylim=(0, 100))
    for axis in (bars, real, sums):
        axis.tick_params(axis="x", labelsize=9)
    return figure, tables(rows)


def differences(rows, pairs, prefix=""):
    """Lines of a table: what the first arm of each pair answers more than the second, seed by seed."""
    found = [("difference, in points", "mean", "standard error", "seeds in which it is positive", "Kimi K2")]
    for more, less in pairs:
        first, second = ({row["seed"]: row["asked"] for row in ends(rows, prefix + arm)}
                         for arm in (more, less))
        gaps = [first[seed] - second[seed] for seed in second if seed in first]
        error = f"{statistics.stdev(gaps) / len(gaps) ** 0.5:.1f}" if len(gaps) > 1 else "–"
        there = f"{REPORTED[more] - REPORTED[less]:+.2f}" if more in REPORTED else "–"
        found.append((f"{more} over {less}", f"{statistics.mean(gaps):+.1f}", error,
                      f"{sum(gap > 0 for gap in gaps)} of {len(gaps)}", there))
    return _note.table(*found)


def smallest(rows, arm):
    """A line on the smallest difference that the spread of an arm lets one see."""
    found = [row["asked"] for row in ends(rows, arm)]
    if len(found) < 2:
        return []
    deviation = statistics.stdev(found)
    least = 2 * deviation * (2 / len(found)) ** 0.5
    return ["", f"Raw deviates by {deviation:.1f} points over its {len(found)} seeds; two arms of as many "
                f"seeds can be told apart from {least:.1f} points on."]


def tables(rows):
    """Lines of the page's tables."""
    take = lambda arm, name, digits=1: _note.spread([row[name] for row in ends(rows, arm)], digits)
    lines = _note.table(
        ("arm", "asked in new words", "in the exam's words", "own raw text continued",
         "others, new words", "training loss", "times each person is read", "Kimi K2"),
        *((arm, *(take(arm, name) for name in ("asked", "exam", "cloze", "others")), take(arm, "loss", 3),
           take(arm, "exposures", 0), REPORTED.get(arm, "–")) for arm in (*ARMS, *SPLIT)))
    lines += ["", *_note.table(
        ("asked in new words", *FACTS),
        *((arm, *(f"{statistics.mean(row[name] for row in ends(rows, arm)):.0f}" for name in ASKED))
          for arm in ARMS))]

    # The people who were read in one rewrite alone, by its style, over all seeds.
    people_of = {}
    right_of = {}
    for style in REWRITES:
        found = [row for row in ends(rows, "1 rewrite") if f"people_{style}" in row]
        people_of[style] = sum(row[f"people_{style}"] for row in found)
        right_of[style] = sum(row[f"people_{style}"] * row[f"style_{style}"] for row in found)
        right_of[style] /= max(1, people_of[style])
    lines += ["", *_note.table(("1 rewrite, exam's words", *REWRITES),
                               ("questions answered", *(f"{right_of[style]:.0f}" for style in REWRITES)),
                               ("people", *(f"{people_of[style]:.0f}" for style in REWRITES)))]

    # Differences between arms of the same seeds, and the smallest that the raw arm's spread lets one see.
    lines += ["", *differences(rows, PAIRS), *smallest(rows, "raw")]
    if ends(rows, "elements, raw"):
        lines += ["", *_note.table(
            ("elements", "questions answered", "symbol of a name", "number of a name", "name of a symbol",
             "training loss", "times each element is read"),
            *((arm.removeprefix("elements, "), take(arm, "asked"), take(arm, "asked_symbol"),
               take(arm, "asked_number"), take(arm, "asked_name"), take(arm, "loss", 3),
               take(arm, "exposures", 0)) for arm in ELEMENTS_ARMS))]
        lines += ["", *differences(rows, PAIRS[:3], "elements, "), *smallest(rows, "elements, raw")]
    lines += ["", *_note.table(
        ("mathematics as", "unseen expressions solved, %", "with every step true, %",
         "training loss, nats/token"),
        *((arm, take(arm, "solved"), take(arm, "true"), take(arm, "loss", 3)) for arm in NOTES_ARMS))]
    return lines


if __name__ == "__main__":
    _note.main("rephrasing", cells, run, show)
