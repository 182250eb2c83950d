"""What can be measured of text that a model has written, without another model.

  fidelity       of a rewrite to its source: numbers, dates, names, negations and sentences, kept or added
  integration    of a text made of several: fused, or one after the other
  diversity      of a set: how much its documents repeat one another

The recipes of data.py refuse by them; the limits are chosen in notes/fidelity and notes/fusion.
"""
import decimal
import functools
import itertools
import math
import re
import zlib
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np
import regex

from data import UNSPACED, find_source, folded, parse_domains, rows_of_file, spaced


# ---- what a rewrite keeps ----------------------------------------------------------------------------------

# No model is asked. Numbers, dates and names are looked up, both ways; so are the words of each sentence that
# few others of the document have, and negations. What that does not see:
#   two facts of the document that have changed places: all of its numbers are still there
#   a statement turned into its opposite by other words than a negation, or in another language than English
#   numbers in words: they answer for digits ("3", "three"), but are not looked for themselves
#   names in scripts without capitals, in German, and those that only begin sentences: they are not judged

LENGTH = 0.3, 3.0                # characters of a rewrite over those of its source                     [ours]
COPIED = 0.8                     # share of its runs of 8 words that the source has                     [ours]
FLOOD = 100_000                  # characters of one that is too long, above which it is not read       [ours]
LEAST = 0.9                      # share of the source's numbers, dates or names that it has  [notes/fidelity]
ADDED = 0                        # of its own; negations that came or went                    [notes/fidelity]
FOUND = 0.2                      # share of a sentence's content that the other text has      [notes/fidelity]

FUNCTION_WORDS = frozenset("""about after all also and any are because been before being both but can could
    did does done each either else every few for from had has have her here his how however its itself just
    made make many may might more most much must nor not off one only other our out over own same shall she
    should since some such than that the their them then there these they this those through thus too under
    until use used using very was were what when where whether which while who whom whose why will with within
    would you your""".split())
WORD = regex.compile(r"[\p{L}\p{M}\p{N}_]+(?:['’][\p{L}\p{M}]+)*")

# What only gives a text its form: bullets, headings, "Step 3:", "Q:", an item's number, borders of cells.
BULLET = r"(?:[-*•+]|#+)[ \t]+"
LABEL = regex.compile(rf"(?mi)^[ \t>]*(?:{BULLET})?\**(?:(?:step|question|answer|part|section|q|a)\b[ \t]*"
                      rf"\d*|\d{{1,2}})[ \t]*[.):]\**[ \t]+|^[ \t>]*{BULLET}|[ \t]*\|[ \t]*")
SHORT = r"\b(?:\p{L}|Mr|Mrs|Dr|St|vs|No(?=\.\s+\p{N}))\."
SENTENCE_END = regex.compile(rf"(?<=[.!?…]['\"”’)\]*]{{0,3}})(?<!{SHORT})\s+"
                             r"(?=['\"“‘(\[*]*[\p{Lu}\p{Lo}\p{N}])|(?<=[。！？])|\n\s*\n")

IN_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
SCALES = dict(hundred=100, thousand=10 ** 3, million=10 ** 6, billion=10 ** 9, trillion=10 ** 12)
EXACT = decimal.Context(prec=10 ** 6)
GROUPING = r"[,\u00a0\u202f]"    # between thousands
NUMBER = regex.compile(rf"(?<![\p{{L}}_][\p{{N}}.]{{0,9}})(?:(?<![\p{{L}}\p{{N}})])[-−])?"
                       rf"(?:\d{{1,3}}(?:{GROUPING}\d{{3}})+(?!\d)|\d+)(?:\.\d+)*|"
                       rf"(?<![\p{{L}}\p{{N}}_])\.\d+|\b(?:{'|'.join(IN_WORDS)})\b", regex.I)
SCALE = regex.compile(rf"[- ]?({'|'.join(SCALES)})\b", regex.I)
PERCENT = regex.compile(r"\s?(?:%|per ?cent\b)", regex.I)

MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec".split()
MONTH = (r"(?P<month>Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|"
         r"Sept?(?:ember)?|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)\b\.?")
DAY = r"(?P<day>\d{1,2})(?!\d)(?:st|nd|rd|th)?"
YEAR = r"(?P<year>\d{4})(?!\d)"
DATE = regex.compile(rf"(?<![\d.-])(?:{DAY}\.?(?: of)? {MONTH}(?:,? {YEAR})?|{MONTH} {DAY}(?:,? {YEAR})?|"
                     rf"{MONTH},? {YEAR}|{YEAR}(?P<sep>[-/])(?P<number>\d\d)(?P=sep)(?P<day>\d\d)(?!\d)|"
                     rf"{YEAR}[年년]\s?(?P<number>\d\d?)[月월]\s?(?P<day>\d\d?)[日일])")

NAME = regex.compile(r"(?<=[\p{L}\p{N},;]\s)\p{Lu}[\p{L}\p{M}\p{N}_'’]+")
NEGATION = regex.compile(r"\b(?:[Nn]ot?|[Nn]ever|none|None(?= of)|[Nn]othing|[Nn]obody|[Nn]either|nor|"
                         r"[Cc]annot|[Ww]ithout)\b|n['’]t\b")
# Other ways to say it. Beside them, a negation that comes or goes means nothing.
HIDDEN_NEGATION = regex.compile(r"\b(?:unable|impossible|fail(?:s|ed)?|lack(?:s|ing)?|except|unless|hardly|"
                                r"refuse[sd]?|instead of|rather than)\b", regex.I)


def words_of(text):
    """The words of a text, folded; a character of a script without spaces is one."""
    return WORD.findall(spaced(folded(text)))


def runs(words, n):
    """The runs of n words; the only one of fewer."""
    return list(zip(*(words[i:] for i in range(min(n, len(words))))))


@functools.lru_cache(1 << 16)
def root_of(word):
    """What a word has in common with other forms of it, by a rough rule: "named" and "names" are "nam"."""
    return re.sub("(?<=...)(?:ing|edly|ed|es|ly|s|e)$", "", re.sub("['’].*", "", word))[:6]


def content(text):
    """The stems of the content words of a text, in order."""
    return [root_of(word) for word in words_of(text) if word not in FUNCTION_WORDS
            and (len(word) > 2 or UNSPACED.match(word))]


def flowing(text):
    """A text without the labels of its form: every item or cell of a table is a paragraph, on one line."""
    text = regex.sub(r"[ \t\r]+", " ", text)
    paragraphs = regex.split(r"\n\s*\n", LABEL.sub("\n\n", text))
    return "\n\n".join(regex.sub(r"[ \t]*\n[ \t]*", " ", paragraph) for paragraph in paragraphs)


def sentences_of(text):
    """The sentences of a text, items and cells of tables among them."""
    return [part for part in SENTENCE_END.split(flowing(text)) if part.strip()]


def dates_of(text):
    """The dates of a text as (year, month, day), 0 where one is not said, and the text without them."""
    found = set()
    for match in DATE.finditer(text):
        said = match.groupdict()
        month = MONTHS.index(said["month"][:3].lower()) + 1 if said["month"] else int(said["number"])
        found.add((int(said["year"] or 0), month, int(said["day"] or 0)))
    return found, DATE.sub(" ", text)


def numbers_of(text):
    """The numbers of a text in digits, and those in words, as sets of strings: "1,000" and "one thousand" are
    1000, "5 percent" is 5%. Every digit counts. A version such as 3.11.2 stays as it is."""
    digits, words = set(), set()
    for match in NUMBER.finditer(text):
        said = re.sub(GROUPING, "", match[0]).lower().replace("−", "-")
        if said.count(".") > 1:
            digits.add(said)
            continue
        value = decimal.Decimal(IN_WORDS.index(said) if said in IN_WORDS else said)
        end = match.end()
        while scale := SCALE.match(text, end):
            value = EXACT.multiply(value, SCALES[scale[1].lower()])
            end = scale.end()
        percent = "%" if PERCENT.match(text, end) else ""
        (words if said in IN_WORDS else digits).add(f"{value.normalize(EXACT):f}{percent}")
    return digits, words


def names_of(text):
    """The words that have a capital, although no sentence begins with them, more often than not. Lines in
    capitals or in the style of titles say nothing. Empty for German, where every noun has one."""
    small = Counter(regex.findall(r"\b\p{Ll}[\p{L}\p{M}]*", text))
    if 20 * sum(small[word] for word in ("der", "die", "das", "und", "ist", "ein", "eine")) > small.total():
        return set()
    names = Counter()
    for line in text.splitlines():
        long = [word for word in WORD.findall(line) if len(word) > 3]
        if 2 * sum(word[0].isupper() for word in long) <= len(long):
            names.update(re.sub("['’]s?$", "", name) for name in NAME.findall(line))
    return {name.casefold() for name, n in names.items()
            if n > small[name.lower()] and not regex.fullmatch(MONTH, name)}


class Sentence(NamedTuple):
    stems: frozenset             # of its content words
    negated: bool | None         # None: a question, or not to be judged


class Facts(NamedTuple):
    """What a text states, as far as it can be looked up."""
    numbers: set                 # in digits: the other text has to have them
    answers: set                 # they, those in words and parts of dates: what numbers are looked for among
    dates: set
    names: set
    words: set                   # all of its words: what names are looked for among
    sentences: list
    stems: set                   # of all sentences


def facts_of(text):
    """A text → its Facts."""
    dates, rest = dates_of(flowing(text))
    digits, words = numbers_of(rest)
    parts = {str(part) for date in dates for part in (date[0], date[2])}
    known = {re.sub("['’]s?$", "", word) for word in WORD.findall(text.casefold())}
    sentences = []
    for part in sentences_of(text):
        unclear = part.rstrip("\"'”’)* \n").endswith(("?", "？")) or HIDDEN_NEGATION.search(part)
        negated = None if unclear else bool(NEGATION.search(part))
        sentences.append(Sentence(frozenset(content(part)), negated))
    stems = {stem for sentence in sentences for stem in sentence.stems}
    return Facts(digits, digits | words | parts, dates, names_of(text), known, sentences, stems)


class Fidelity(NamedTuple):
    """What a rewrite keeps of its source, and what it adds. A share is 1 where there is nothing to keep."""
    length: float                # characters, over those of the source
    copied: float                # share of its runs of 8 words that the source has
    numbers: float               # share of the source's numbers that it has
    dates: float
    names: float
    numbers_added: int           # that the source does not have
    dates_added: int
    names_added: int
    negations: int               # that came or went: see `turned`
    covered: float               # how much of a sentence of the source is found in it: see `least`
    supported: float             # how much of a sentence of its own is found in the source


def fidelity(source, text):
    """Two texts → Fidelity of the second to the first. A flood, see above, keeps nothing."""
    length = len(text.strip()) / max(1, len(source.strip()))
    if length > LENGTH[1] and len(text) > FLOOD:
        return Fidelity(length, *[0.0] * 4, *[0] * 4, *[0.0] * 2)
    a, b = facts_of(source), facts_of(text)

    # A date is kept by one that says the same or more, and has to be supported in this way itself.
    says = lambda date, other: all(mine in (0, its) for mine, its in zip(date, other))
    dates = [any(says(date, other) for other in b.dates) for date in a.dates]
    new_dates = [date for date in b.dates if not any(says(date, other) for other in a.dates)]

    mine = runs(words_of(text), 8)
    there = set(runs(words_of(source), len(mine[0]) if mine else 8))
    return Fidelity(length=length,
                    copied=share(sum(run in there for run in mine), len(mine)),
                    numbers=share(len(a.numbers & b.answers), len(a.numbers)),
                    dates=share(sum(dates), len(dates)),
                    names=share(len(a.names & b.words), len(a.names)),
                    numbers_added=len(b.numbers - a.answers),
                    dates_added=len(new_dates),
                    names_added=len(b.names - a.words),
                    negations=turned(a.sentences, b.sentences) + turned(b.sentences, a.sentences),
                    covered=least([s.stems for s in a.sentences], b.stems),
                    supported=least([s.stems for s in b.sentences if s.negated is not None], a.stems))


def share(part, whole):
    return part / whole if whole else 1.0


def weights(sentences):
    """A weight for each stem: 1 / the sentences that have it."""
    return {stem: 1 / n for stem, n in Counter(stem for stems in sentences for stem in stems).items()}


def least(sentences, there):
    """The share of a sentence's content, by weight, that is among the stems `there`: of the worst sentence,
    or of the one a twentieth from the worst. Sentences of fewer than 3 stems do not count."""
    weight = weights(sentences)
    # Exact sums: the order of a set differs between processes.
    size = lambda stems: math.fsum(weight[stem] for stem in stems)
    found = sorted(size(stems & there) / size(stems) for stems in sentences if len(stems) > 2)
    return found[len(found) // 20] if found else 1.0


def turned(sentences, others):
    """How many negated sentences have counterparts among the others, none of which is negated. A counterpart
    shares half of its content, or of theirs, by weight: sentences may have been split or joined."""
    weight = weights([other.stems for other in others])
    size = lambda stems: math.fsum(weight.get(stem, 1) for stem in stems)
    sizes = [size(other.stems) for other in others]
    having = defaultdict(list)                                   # stem → those of the others that have it
    for i, other in enumerate(others):
        for stem in other.stems:
            having[stem].append(i)
    n = 0
    for stems, times in Counter(one.stems for one in sentences if one.negated).items():
        if len(stems) > 2:
            its = size(stems)
            some = {i for stem in stems for i in having.get(stem, ())}
            near = [others[i] for i in some if 2 * size(stems & others[i].stems) >= min(its, sizes[i])]
            if any(len(other.stems) > 2 for other in near) and all(other.negated is False for other in near):
                n += times
    return n


def unfaithful(measured):
    """Fidelity → "", or the first reason why a rewrite is not taken."""
    m = measured
    reasons = {"too short": m.length < LENGTH[0], "too long": m.length > LENGTH[1],
               "copied": m.copied > COPIED,
               "a number is lost": m.numbers < LEAST, "a number is new": m.numbers_added > ADDED,
               "a date is lost": m.dates < LEAST, "a date is new": m.dates_added > ADDED,
               "a name is lost": m.names < LEAST, "a name is new": m.names_added > ADDED,
               "a negation has changed": m.negations > ADDED,
               "a sentence is lost": m.covered < FOUND, "a sentence is new": m.supported < FOUND}
    return next((reason for reason, true in reasons.items() if true), "")


# ---- a fusion of sources, or one after the other -----------------------------------------------------------

# Sources are told apart by content words that only one of them has. Concatenation is what a few cuts take
# apart; paraphrasing does not hide it, as it would hide long copied runs. The same words in random order are
# the measure of chance: beside a long source, a short one hardly matters to the purity.

ORDERS = 20                      # random ones
APART = 0.7                      # purity above which it is a concatenation                     [notes/fusion]
MIXED = 0.2                      # share of a fusion's sentences with words of two sources      [notes/fusion]
MISSING = 0.2                    # coverage of a missing source over that of the best covered   [notes/fusion]


class Integration(NamedTuple):
    """How a text is made of k sources."""
    purity: float                # by the best k-1 cuts: 1 if they take it apart, 0 as in random order
    switches: float              # of the nearest source between sentences, over those in random order
    mixed: float                 # share of the sentences with words of two sources
    coverage: tuple              # for each source: share of the words that only it has, found in the text


def integration(sources, text):
    """k texts and one made of them → Integration."""
    stems = [set(content(source)) for source in sources]
    alone = [some.difference(*stems[:i], *stems[i + 1:]) for i, some in enumerate(stems)]
    owner = {stem: i for i, some in enumerate(alone) for stem in some}
    sentences = [[owner[stem] for stem in content(part) if stem in owner] for part in sentences_of(text)]
    sentences = [labels for labels in sentences if labels]
    labels = np.array([label for some in sentences for label in some], int)
    nearest = np.array([Counter(some).most_common(1)[0][0] for some in sentences], int)

    # Purity and switches, each beside its mean over random orders.
    rng = np.random.default_rng(0)
    orders = np.array([labels, *(rng.permutation(labels) for _ in range(ORDERS))])         # (S, labels)
    pure, *others = best_cuts(orders, len(sources))
    chance = sum(others) / ORDERS
    purity = share(pure - chance, len(labels) - chance) if len(labels) > chance else 0.0
    orders = np.array([nearest, *(rng.permutation(nearest) for _ in range(ORDERS))])       # (S, sentences)
    switches, *others = (orders[:, 1:] != orders[:, :-1]).sum(1)

    both = [len(set(some)) > 1 for some in sentences if len(some) > 1]
    found = set(content(text))
    return Integration(purity=float(purity),
                       switches=float(share(switches, sum(others) / ORDERS)),
                       mixed=sum(both) / max(1, len(both)),
                       coverage=tuple(share(len(some & found), len(some)) for some in alone))


def best_cuts(labels, k):
    """Sequences of labels below k, (S, n) → how many labels of each are right (S,) if it is cut, in the best
    way, into segments that carry one label each, different ones."""
    sets = np.arange(2 ** k)
    best = np.full((len(labels), 2 ** k, k), -np.inf)            # by labels used so far, and the current one
    for j in range(k):
        best[:, 1 << j, j] = 0
    for column in labels.T:
        before = best.max(2)                                     # (S, 2ᵏ)
        for j in range(k):
            unused = sets[sets >> j & 1 == 0]
            best[:, unused | 1 << j, j] = np.maximum(best[:, unused | 1 << j, j], before[:, unused])
            best[:, :, j] += (column == j)[:, None]
    return best.max((1, 2))


def concatenated(measured):
    """Integration → "", or the reason why a text is no fusion of its sources."""
    m = measured
    if min(m.coverage) <= MISSING * max(m.coverage):
        return "a source is missing"
    if m.purity > APART:
        return "one source after the other"
    return "sources in turn" if m.mixed < MIXED else ""


# ---- diversity of a set ------------------------------------------------------------------------------------

SAMPLE = 1_000_000               # bytes of a domain whose diversity is measured, at most
GROUP = 16                       # rewrites of one document that are compared, at most


class Diversity(NamedTuple):
    """Of some texts. All but the distance depend on the amount of text: compare at equal bytes."""
    documents: int
    compression: float           # bytes, over those that zlib makes of them: high if texts are alike
    distinct: float              # share of the runs of 3 words that are distinct. No run crosses documents
    repeated: float              # share of the documents' runs of 8 words that another document has
    openings: float              # share of the documents that begin with the same 8 words as another
    distance: float              # 1 - Jaccard of the runs of 3 words, mean over pairs of a group, or nan


def diversity(texts, groups=()):
    """Texts, and for each the document that it is a rewrite of, or "" → Diversity."""
    words = [words_of(text) for text in texts]
    threes = [runs(some, 3) for some in words]
    eights = Counter(run for some in words for run in set(runs(some, 8)))
    openings = Counter(tuple(some[:8]) for some in words)
    together = defaultdict(list)
    for group, some in zip(groups, threes):
        if group and len(together[group]) < GROUP:
            together[group].append(set(some))
    apart = [1 - len(a & b) / max(1, len(a | b)) for sets in together.values()
             for a, b in itertools.combinations(sets, 2)]
    raw = "\n".join(texts).encode()
    return Diversity(documents=len(texts),
                     compression=len(raw) / len(zlib.compress(raw)),
                     distinct=share(len(set().union(*threes)), sum(map(len, threes))),
                     repeated=sum(n for n in eights.values() if n > 1) / max(1, eights.total()),
                     openings=sum(n for n in openings.values() if n > 1) / max(1, len(texts)),
                     distance=sum(apart) / len(apart) if apart else math.nan)


def cut_to(found, size):
    """The first of some Rows, with `size` bytes of text in all: the last one is cut."""
    for row in found:
        raw = row.text.encode()
        if size > 0:
            yield row._replace(text=raw[:size].decode(errors="ignore"))
        size -= len(raw)
        if size <= 0:
            return


def print_diversity(config):
    """The Diversity of each domain of files as a table, at equal bytes."""
    samples = {}
    for name, path in parse_domains(config)[3].items():
        source, _ = find_source(name, path, config)
        found = (row for file in source.files for row in rows_of_file(source, file, Counter()))
        samples[name] = list(cut_to(found, SAMPLE))
    if not samples:
        return
    size = min(sum(len(row.text.encode()) for row in found) for found in samples.values())
    print(f"\ndiversity of the first {size:,} bytes of each domain of files, before any cleaning:")
    print(f"{'domain':12}{'documents':>10}" + "".join(f"{column:>13}" for column in Diversity._fields[1:]))
    for name, found in samples.items():
        found = list(cut_to(found, size))
        documents, *values = diversity([row.text for row in found], [row.parent for row in found])
        print(f"{name:12}{documents:10,}" + "".join(f"{value:13.3f}" for value in values))
    print("compression: bytes over those of zlib; distinct: share of runs of 3 words; repeated: of runs "
          "of\n8 words that another document has; openings: share of documents that begin with 8 words of "
          "another;\ndistance: 1 - Jaccard of runs of 3 words, between rewrites of one `parent`\n")
