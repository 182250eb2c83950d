"""Fidelity: do damaged rewrites look different from honest ones, without a model that reads them?"""
import functools
import random
import re
import statistics

from notes import _note, corpus, measures

# What is done to a rewrite. The thresholds are chosen on one row of kinds and tested on the other.
KINDS = dict(number="a number changed", name="a name changed", dropped="a sentence dropped",
             date="a date changed", negation="a negation turned", invented="a sentence invented",
             exchanged="two numbers exchanged")
HALVES = ("number", "name", "dropped"), ("date", "negation", "invented")
FORMS = "reordered", "questions and answers", "list", "a fifth of the words changed", "two fifths changed"
MONTHS = ("January February March April May June July August September October November December").split()
PLACES = "Lisbon Oslo Cairo Quito Hanoi Dublin Lima Turin Nairobi Perth Bergen Kyoto".split()
PEOPLE = "Amara Bruno Celia Dmitri Elena Farid Greta Hugo Ingrid Jonas Keiko Lamar".split()
FAMILIES = "Abbott Brandt Castro Dufour Eriksen Fontaine Garcia Hoffman Ivanov Jansen Kimura Lund".split()
PLANTED = ("{name} described this on {date}, after {n} trials in {place}.",
           "A survey of {n} programs, which {name} began in {place}, was finished on {date}.",
           "On {date} the group in {place} counted {n} such cases, and {name} wrote them down.")
SYNONYMS = dict(item.split(":") for item in """return:give returns:gives contains:holds contain:hold
    must:should used:employed called:named string:text value:quantity values:quantities method:procedure
    creates:makes create:make object:thing objects:things specified:given default:standard whether:if
    returned:given raises:causes raised:caused given:supplied otherwise:else arguments:inputs argument:input
    result:outcome current:present provides:offers also:too following:next instance:example available:at_hand
    found:discovered allows:permits cannot:is_unable_to different:distinct several:some""".split())


# ---- texts, and rewrites of them ---------------------------------------------------------------------------

def ends_well(paragraph):
    """Whether it is prose: it begins and ends as a sentence does, and most of it is letters."""
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    whole = paragraph[0].isupper() and paragraph[-1] == "."
    return whole and len(paragraph) > 60 and letters > 0.92 * len(paragraph)


@functools.cache
def passages(every):
    """Lists of 5 to 14 sentences of the default prose, at most two from one document.

    every: of so many files of the library, one is read."""
    found = []
    for document in corpus.library(every)[0]:
        here = []
        paragraphs = [" ".join(paragraph.split()) for paragraph in document.split("\n\n")]
        for paragraph in dict.fromkeys(filter(ends_well, filter(None, paragraphs))):
            here += measures.sentences_of(paragraph)
            if len(here) >= 5:
                found.append(here[:14])
                here = []
                if len(found) > 1 and found[-2][0] in document:
                    break
    random.Random(0).shuffle(found)
    return found


def spelled(date, how):
    year, month, day = date
    name = MONTHS[month - 1]
    return (f"{day} {name} {year}", f"{name} {day}, {year}", f"{year}-{month:02}-{day:02}")[how]


def fact(rng):
    """An invented sentence with a name, a place, a date and a number, which the default prose hardly has."""
    date = rng.randint(1900, 2020), rng.randint(1, 12), rng.randint(1, 28)
    return rng.choice(PLANTED).format(name=f"{rng.choice(PEOPLE)} {rng.choice(FAMILIES)}",
                                      n=rng.randint(13, 9999), place=rng.choice(PLACES),
                                      date=spelled(date, 0))


def source_of(number, every, rng):
    """The sentences of a passage, with two invented ones."""
    sentences = list(passages(every)[number % len(passages(every))])
    for _ in range(2):
        sentences.insert(rng.randint(0, len(sentences)), fact(rng))
    return sentences


def respelled(sentence, rng):
    """Other words from the table, dates and large numbers written otherwise."""
    def date(match):
        return spelled((int(match[3]), MONTHS.index(match[2]) + 1, int(match[1])), rng.choice((1, 2)))
    def number(match):
        return match[0] if match[1] is None else f"{int(match[1]):,}"
    sentence = re.sub(r"[A-Z][a-z]+ \d{4}|(?<![\w.,-])(\d{4})(?= [a-z])", number, sentence)
    sentence = re.sub(rf"\b(\d\d?) ({'|'.join(MONTHS)}) (\d{{4}})", date, sentence)
    swap = lambda match: SYNONYMS.get(match[0], match[0]).replace("_", " ")
    sentence = re.sub(r"\b[a-z]+\b", swap, sentence)
    condition = re.fullmatch(r"(If|When) ([^,]+), (.+)\.", sentence)
    if condition:
        sentence = f"{condition[3][0].upper()}{condition[3][1:]} {condition[1].lower()} {condition[2]}."
    return sentence


@functools.cache
def common_words(every):
    texts = (" ".join(sentences) for sentences in passages(every))
    words = [word for text in texts for word in re.findall(r"\b[a-z]{4,9}\b", text)]
    return sorted(word for word in set(words) - measures.FUNCTION_WORDS if not measures.NEGATION.search(word))


def reworded(sentence, part, every, rng):
    """With that part of its words replaced by others, drawn at random: a stand-in for a freer rewriter."""
    change = lambda match: rng.choice(common_words(every)) if rng.random() < part else match[0]
    words = "never|none|nothing|neither|cannot|without"
    return re.sub(rf"\b(?!(?:{words})\b)[a-z]{{4,}}\b", change, sentence)


def honest(sentences, form, every, rng):
    """A faithful rewrite, as a list of its sentences, and how to join them."""
    sentences = [respelled(sentence, rng) for sentence in sentences]
    if form == "reordered":
        cut = rng.randint(1, len(sentences) - 1)
        return sentences[cut:] + sentences[:cut], " "
    if form == "questions and answers":
        about = lambda s: max(re.findall(r"[a-z]+", s) or ["this"], key=len)
        return [f"Q: What is known about the {about(s)}?\nA: {s}" for s in sentences], "\n"
    if form == "list":
        parts = [part for s in sentences for part in re.split(r"(?<=\w); |(?<=\w), and (?=\w+ \w+ \w+)", s)]
        return [f"{i}. {part[0].upper()}{part[1:]}" for i, part in enumerate(parts, 1)], "\n"
    part = 0.2 if form.startswith("a fifth") else 0.4
    return [reworded(sentence, part, every, rng) for sentence in sentences], " "


# ---- damage ------------------------------------------------------------------------------------------------

def replaced(text, pattern, new, rng):
    """One match of the pattern replaced by new(match); None if there is none."""
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    match = rng.choice(matches)
    return text[:match.start()] + new(match) + text[match.end():]


NUMBER = r"(?<![\w.,-])(?<!\d, )(\d,\d{3}|\d{2,4})(?= [a-z])(?! (?:January|February|March|April|May|June))"
SPELLED = rf"(?:{'|'.join(MONTHS)}) \d\d?, \d{{4}}|\d{{4}}-\d\d-\d\d"


VERBS = r"\b(is|are|was|can|may|must|should|will)"


def turned_around(sentence):
    """The sentence with its negation taken away, or one added; None if there is no simple way."""
    question, answer, statement = sentence.rpartition("\nA: ")
    if re.search(VERBS + " not ", statement):
        statement = re.sub(VERBS + " not ", r"\1 ", statement, count=1)
    elif re.search(VERBS + " ", statement) and not measures.NEGATION.search(statement):
        statement = re.sub(VERBS + " ", r"\1 not ", statement, count=1)
    else:
        return None
    return question + answer + statement


def damaged(kind, sentences, join, number, every, rng):
    """The rewrite with one fault of this kind; None if it has nothing to damage."""
    text = join.join(sentences)
    if kind == "number":
        return replaced(text, NUMBER, lambda match: str(rng.randint(13, 9999)), rng)
    if kind == "name":
        others = PEOPLE + FAMILIES + PLACES
        new = lambda match: rng.choice([name for name in others if name not in text])
        return replaced(text, rf"\b({'|'.join(others)})\b", new, rng)
    if kind == "date":
        change = lambda match: spelled((rng.randint(1900, 2020), rng.randint(1, 12), rng.randint(1, 28)), 1)
        return replaced(text, SPELLED, change, rng)
    if kind == "exchanged":
        found = list(re.finditer(NUMBER, text))
        if len(found) < 2 or found[0][0] == found[-1][0]:
            return None
        a, b = found[0], found[-1]
        return text[:a.start()] + b[0] + text[a.end():b.start()] + a[0] + text[b.end():]
    sentences = list(sentences)
    if kind == "negation":
        can = [i for i, sentence in enumerate(sentences) if turned_around(sentence)]
        if not can:
            return None
        at = rng.choice(can)
        sentences[at] = turned_around(sentences[at])
    elif kind == "dropped":
        del sentences[rng.randrange(len(sentences))]
    else:
        # A real one, without a number, from another document.
        other = [s for s in passages(every)[(number + 1) % len(passages(every))] if not re.search(r"\d", s)]
        if not other:
            return None
        sentences.insert(rng.randint(0, len(sentences)), rng.choice(other))
    return join.join(sentences)


# ---- the grid ----------------------------------------------------------------------------------------------

def cells(quick):
    n = 6 if quick else 120
    return [(kind, half, n) for kind in ("honest", *KINDS) for half in range(2)]


def run(kind, half, n):
    """The measures of n rewrites. Each kind of damage is done to the same honest rewrites."""
    every = 20 if n < 60 else 1                                  # --quick: fewer files to read
    for i in range(n):
        number = half * n + i
        rng = random.Random(number)
        sentences = source_of(number, every, rng)
        form = i % len(FORMS)
        rewritten, join = honest(sentences, FORMS[form], every, rng)
        text = join.join(rewritten)
        if kind != "honest":
            text = damaged(kind, rewritten, join, number, every, rng)
        if text is None:
            continue
        m = measures.fidelity(" ".join(sentences), text)
        yield dict(form=form, kept=round(min(m.numbers, m.dates, m.names), 4), negations=m.negations,
                   added=m.numbers_added + m.dates_added + m.names_added,
                   found=round(min(m.covered, m.supported), 4))


# ---- thresholds and curves ---------------------------------------------------------------------------------

def doubt(row, kept=measures.LEAST, added=measures.ADDED, found=measures.FOUND):
    """How far the worst measure is from what is asked of it: above 1, the rewrite is refused."""
    short = lambda share, least: (1 - share) / (1 - least)
    return max(short(row["kept"], kept), row["added"] / (added + 0.5), 2 * row["negations"],
               short(row["found"], found))


def rate(rows, **thresholds):
    """The share of the rows that are refused."""
    return sum(doubt(row, **thresholds) > 1 for row in rows) / len(rows)


def chosen(rows, kinds):
    """The thresholds with the largest difference between the share of damaged rewrites of these kinds that
    are refused and that of honest ones, on the half 0. Of several, the one that asks the least."""
    half = {kind: _note.of_arm(rows, kind)[0] for kind in ("honest", *kinds)}

    def gain(thresholds):
        caught = statistics.mean(rate(half[kind], **thresholds) for kind in kinds)
        return round(caught - rate(half["honest"], **thresholds), 6)
    options = [dict(kept=kept, added=added, found=found) for kept in (0.5, 0.6, 0.7, 0.8, 0.9)
               for added in (2, 1, 0) for found in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)]
    return max(options, key=gain)


def roc(good, bad):
    """Doubts of good and of bad texts → shares refused of either, at every threshold, the highest first."""
    at = sorted({*good, *bad}, reverse=True)
    return [0.0, *(sum(x >= t for x in good) / len(good) for t in at)], \
           [0.0, *(sum(x >= t for x in bad) / len(bad) for t in at)]


def area(x, y):
    """The area below a curve: of pairs of a good text and a bad one, the share in the right order."""
    return sum((x[i + 1] - x[i]) * (y[i + 1] + y[i]) / 2 for i in range(len(x) - 1))


def show(rows):
    figure, [(curves, forms)] = _note.panels(1, 2, width=11, height=4.2)
    honest_ = [row for row in rows if row["arm"] == "honest"]
    choice = [chosen(rows, kinds) for kinds in HALVES]
    test = lambda kind: _note.of_arm(rows, kind)[1]
    table = [("damage", "rewrites", "AUC", "refused at the thresholds in use",
              "refused on the half not chosen on, by thresholds of the other kinds")]
    for i, (kind, label) in enumerate(KINDS.items()):
        bad = [row for row in rows if row["arm"] == kind]
        x, y = roc([doubt(row) for row in honest_], [doubt(row) for row in bad])
        other = HALVES[0] if kind in HALVES[1] else HALVES[1]
        held_out = f"{rate(test(kind), **choice[HALVES.index(other)]):.0%}"
        table.append((label, len(bad), f"{area(x, y):.2f}", f"{rate(bad):.0%}", held_out))
        curves.plot(x, y, label=f"{label}: {area(x, y):.2f}", ls="--" if kind == "exchanged" else "-",
                    color=_note.COLOURS[i])
    both = " / ".join(f"{rate(test('honest'), **thresholds):.0%}" for thresholds in choice)
    table.append(("none: honest rewrites", len(honest_), "", f"{rate(honest_):.0%}", both))
    curves.plot([rate(honest_)] * 2, [0, 1], color="0.4", ls=":", lw=1.5, label="the thresholds in use")
    curves.set(title="damaged rewrites refused, and area", xlabel="honest rewrites refused",
               xlim=(-.005, 0.3))
    curves.legend(loc=(0.42, 0.31))
    by_form = [[row for row in honest_ if row["form"] == i] for i in range(len(FORMS))]

    # Honest rewrites by form, over the one threshold on which kinds of rewriters disagree.
    ticks = [i / 20 for i in range(13)]
    for i, (form, of) in enumerate(zip(FORMS, by_form)):
        forms.plot(ticks, [rate(of, found=tick) for tick in ticks], label=form, color=_note.COLOURS[i])
    for kind, style in (("dropped", "--"), ("invented", ":")):
        bad = [row for row in rows if row["arm"] == kind]
        forms.plot(ticks, [rate(bad, found=tick) for tick in ticks], label=KINDS[kind], color="0.4", ls=style)
    forms.axvline(measures.FOUND, color="0.4", ls=":", lw=1.5)
    forms.set(title="refused, by form of the honest rewrite", xlabel="share of a sentence that must be found",
              xlim=(0, 1.2), xticks=(0, 0.2, 0.4, 0.6))
    forms.legend(loc="center right")
    refused = [f"{rate(of):.0%}" for of in by_form]
    forms_table = _note.table(("", *FORMS), ("honest rewrites refused", *refused))
    lines = [*_note.table(*table), "", *forms_table, ""]
    return figure, lines + _note.table(("chosen on the kinds", "kept", "added", "found"), *(
        (" · ".join(KINDS[kind] for kind in kinds), *thresholds.values())
        for kinds, thresholds in zip(HALVES, choice)))


if __name__ == "__main__":
    _note.main("fidelity", cells, run, show)
