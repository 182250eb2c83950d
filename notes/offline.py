"""The endpoint "offline": what is answered to the prompts of the data recipes when there is no server.

Text is made by rules from the fields of a row, the same for the same seed. What that cannot do is said in
data.py, `offline_answer`. A rule works on a sentence: it exchanges general words, moves a clause to the other
end, and puts the sentence into a form. Numbers, dates and names are never touched.
"""
import random
import re

from notes.measures import SENTENCE_END

# Exchanged both ways. None of them changes with what stands around it.
SYNONYMS = dict(pair.split("/") for pair in """
    began/started begins/starts ended/finished built/constructed bought/purchased helped/aided helps/aids
    needs/requires needed/required chosen/selected chose/selected changed/altered entire/whole
    usually/normally quickly/rapidly almost/nearly famous/renowned frequently/often although/though
    therefore/thus perhaps/maybe
    big/large shows/indicates showed/indicated obtains/gets retains/keeps happens/occurs happened/occurred
    chief/main important/significant individual/person people/persons idea/notion area/region aim/goal
    method/procedure also/likewise approximately/roughly completely/entirely mainly/mostly described/portrayed
    authored/wrote got/received moved/relocated job/occupation remains/stays remained/stayed""".split())
SYNONYMS.update({new: old for old, new in SYNONYMS.items()})

# Words that begin a sentence with a capital only because they begin it.
OPENERS = frozenset("""
    a an the this that these those it its he she they we you his her their our your there here in on at
    during after before when if while since by with for as although because from to of all each every
    many most some such then thus so also later today both what which who how why where is are was were
    can do does""".split())
DULL = OPENERS | {"about", "would", "could", "should", "explain", "describe", "write", "please", "compute"}
VERB = r"(?:is|are|was|were|has|have|had|can|could|may|might|must|will|would|does|did)"
BOILERPLATE = re.compile(r"\b(cookies?|subscribe|newsletter|log ?in|sign up|all rights reserved|copyright|"
                         r"click here|share (this|on)|posted (by|on|in)|read more|advertisement|"
                         r"privacy policy|\d views|\d comments?)\b|\bhome ?[|>]", re.I)

FRONT = re.compile(r"((?:In|On|At|During|After|Before|By|Since|With|For|From) [^,.;:()]{3,50}), ([^.;:]+)\.")
BACK = re.compile(r"([^.;:()]{12,}?) ((?:in|on|during|after|before|since|until) (?:\w+ ){0,3}\d[\w ]{0,12})"
                  r"\.")


def answer(name, row, seed):
    """The answer to the prompt of that name. Raises ValueError if there are no rules for it."""
    rules = {"rephrase": rephrase, "learning-notes": learning_notes, "exam": exam, "fuse": fuse,
             "evolve-depth": deeper, "evolve-breadth": broader, "evolve-improve": improve, "answer": reply,
             "score": score}
    if name not in rules:
        raise ValueError(f"the endpoint \"offline\" has no rules for the prompt {name!r}; it knows "
                         f"{', '.join(rules)}")
    return rules[name](row, random.Random(seed))


# ---- sentences ---------------------------------------------------------------------------------------------

def sentences(text):
    """The sentences of a text. A line ends one, unless the next goes on in small letters."""
    text = re.sub(r"(?<=[\w,;)]) *\n[ \t]*(?=[a-z(])", " ", text)
    found = []
    for line in text.splitlines():
        found += [part for part in SENTENCE_END.split(line.strip()) if part]
    return found


def lower(sentence):
    """Without the capital that stands only for the beginning."""
    first = re.match(r"\w+", sentence)
    if first and first[0].lower() in OPENERS:
        return sentence[0].lower() + sentence[1:]
    return sentence


def upper(sentence):
    return sentence[:1].upper() + sentence[1:]


def reworded(sentence, rng):
    """The sentence with some general words exchanged, and a clause moved to its other end."""
    words = re.split(r"(\W+)", sentence)
    words = [SYNONYMS[word] if word in SYNONYMS and rng.random() < 0.8 else word for word in words]
    sentence = "".join(words)
    front, back = FRONT.fullmatch(sentence), BACK.fullmatch(sentence)
    if front:
        return f"{upper(front[2])} {lower(front[1])}."
    if back and " and " not in back[2]:
        return f"{upper(back[2])}, {lower(back[1])}."

    # What cannot be turned round gets a word behind its verb, at times.
    verb = re.search(rf" {VERB} (?!not\b|never\b|no\b)", sentence)
    if verb and rng.random() < 0.7:
        more = rng.choice(["indeed", "in fact", "also", "in turn"])
        return f"{sentence[:verb.end()]}{more} {sentence[verb.end():]}"
    return sentence


def subject(sentence):
    """What a sentence is about, roughly: the words before its verb, a name in it, or its longest word."""
    found = re.match(rf"(?:(?:In|On|At|After|Before) [^,]+, )?([^,.;:()|]{{3,60}}?) {VERB}\b", sentence)
    if found and len(found[1].split()) <= 7 and lower(found[1]) not in OPENERS:
        return lower(found[1])
    names = re.search(r"(?<=[a-z,] )[A-Z]\w+(?: [A-Z]\w+)*", lower(sentence))
    if names:
        return names[0]
    words = [word for word in re.findall(r"\w+", sentence) if not re.search("(ed|ing|ly)$", word)]
    return "the " + max(words or ["matter"], key=len)


def keywords(text):
    """Its long words, the most frequent and longest first; each once."""
    words = [word for word in re.findall(r"[A-Za-z][a-z]{4,}", text) if word.lower() not in DULL]
    return sorted(dict.fromkeys(words), key=lambda word: (-words.count(word), -len(word))) or ["this", "that"]


# ---- rewriting ---------------------------------------------------------------------------------------------

QUESTIONS = ("What is there to know about {}?", "What can be said of {}?", "How do things stand with {}?",
             "What does a reader learn about {}?", "Who or what is meant by {}?")
LINKS = "Next, ", "Then, ", "After that, ", "From there, ", "Building on this, "


def rephrase(row, rng):
    """The sentences of the text, reworded, in the form that the row asks for."""
    said = [(subject(sentence), reworded(sentence, rng)) for sentence in sentences(row["text"])]
    ask = lambda what: rng.choice(QUESTIONS).format(what)
    form = row.get("form")
    if form == "faq":
        return "\n\n".join(f"{ask(what)}\n{sentence}" for what, sentence in said)
    if form == "dialogue":
        return "\n".join(f"Reader: {ask(what)}\nExpert: {sentence}" for what, sentence in said)
    if form == "table":
        cell = lambda text: text.replace("|", "/")
        lines = [f"| {cell(upper(what))} | {cell(sentence)} |" for what, sentence in said]
        return "\n".join(["| Subject | Statement |", "|---|---|", *lines])
    if form == "outline":
        return "\n".join(f"- {upper(what)}\n  - {sentence}" for what, sentence in said)
    if form == "tutorial":
        links = [rng.choice(LINKS) for _ in said]
        if not row.get("context"):
            links[0] = "To begin with, "
        return "\n\n".join(link + lower(sentence) for link, (_, sentence) in zip(links, said))
    return " ".join(sentence for _, sentence in said)


def learning_notes(row, rng):
    """The text without the lines that are about the page, and each calculation worked in steps, once."""
    lines, known = [], set()
    for line in row["text"].splitlines():
        if BOILERPLATE.search(line) or not line.strip():
            continue
        lines += [reworded(sentence, rng) for sentence in sentences(line)]
        for calculation in calculations(line):
            steps, _ = worked(*calculation)
            if calculation not in known and len(steps) > 1:
                lines += ["Step by step:", *steps]
            known.add(calculation)
    return "\n".join(lines)


# ---- arithmetic --------------------------------------------------------------------------------------------

# Not of numbers with a sign or a decimal point.
ASKED = [(r"(?<![-(.\d])(\d+) ?(?:\*|×) ?(\d+)|multiply (\d+) by (\d+)|(\d+) times (\d+)", "*"),
         (r"(?<![-(.\d])(\d+) \+ (\d+)|add (\d+) (?:and|to) (\d+)|(\d+) plus (\d+)|"
          r"sum of (\d+) and (\d+)", "+"),
         (r"(?<![-(.\d])(\d+) - (\d+)|(\d+) minus (\d+)|how much more is (\d+) than (\d+)", "-"),
         (r"(?<![-(.\d])(\d+) [/÷] (\d+)|divide (\d+) by (\d+)|(\d+) divided by (\d+)|"
          r"long division: (\d+) by (\d+)", "/")]


def calculations(text):
    """[(a, sign, b)] of the calculations of two whole numbers that a text asks for or states."""
    found = []
    for pattern, sign in ASKED:
        for match in re.finditer(pattern, text, re.I):
            a, b = (int(part) for part in match.groups() if part)
            if not re.match(r"[.,]?\w| *[*×/÷^]", text[match.end():]):
                found.append((a, sign, b))
    for match in re.finditer(r"subtract (\d+) from (\d+)", text, re.I):
        found.append((int(match[2]), "-", int(match[1])))
    return [(a, sign, b) for a, sign, b in found if b or sign != "/"][:3]


def worked(a, sign, b):
    """A calculation → (its steps, its result): b is taken apart by its digits."""
    if sign == "/":
        q, rest = divmod(a, b)
        return [f"{b} * {q} = {b * q}", f"{a} - {b * q} = {rest}", f"Quotient {q}, remainder {rest}."], q
    parts = [int(digit) * 10 ** k for k, digit in enumerate(reversed(str(b))) if digit != "0"] or [0]
    lines, total = [], 0 if sign == "*" else a
    for part in parts:
        if sign == "*":
            lines.append(f"{a} * {part} = {a * part}")
            if total:
                lines.append(f"{total} + {a * part} = {total + a * part}")
            total += a * part
        else:
            result = total + part if sign == "+" else total - part
            lines.append(f"{total} {sign} {part} = {result}")
            total = result
    return lines, total


# ---- questions and conversations ---------------------------------------------------------------------------

GAP = r"(?<=[a-z,] )(?:\d+|[A-Z][a-z]{2,})\b(?![.,]\d)"       # a number or a name


def exam(row, rng):
    """A sentence with a gap where a number or a name stood; the other options come from the text, or near."""
    found = []
    for sentence in sentences(row["text"]):
        if 6 <= len(sentence.split()) <= 60:
            found += [(sentence, match) for match in re.finditer(GAP, sentence)]
    if not found:
        return "There is nothing to ask about."
    sentence, gap = rng.choice(found)
    right = gap[0]
    others = [match[0] for _, match in found if match[0].isdigit() == right.isdigit()]
    others = [word for word in dict.fromkeys(others) if word != right and word not in sentence]
    rng.shuffle(others)
    if right.isdigit():
        others += [str(int(right) + step) for step in rng.sample([1, 2, 3, 5, 10], 3)]
    else:
        others += [name for name in ("London", "Vienna", "Newton", "Monday") if name not in row["text"]]
    gapped = f"{sentence[:gap.start()]}____{sentence[gap.end():]}"
    lines = [f"Question: Which word or number completes this statement? {gapped}", f"Correct: {right}",
             *[f"Wrong: {other}" for other in dict.fromkeys(others)][:3],
             f"Reasoning: It is known that {lower(sentence)} So {right} completes it, and no other does."]
    return "\n".join(lines)


DEEPER = ("Give the reason for each step and name the most common mistake.",
          "Respect a budget of half an hour and list the materials required.",
          "Compare it with an alternative and say under which condition that wins.",
          "Include a worked example with concrete figures and check the outcome.",
          "Explain how the result would change for a beginner and for a professional.",
          "Point out an exception, and show how to recognise it early.",
          "Finish with a table that summarises causes, effects and remedies.",
          "Begin from the definition and derive everything that is used later.")
BROADER = ("Explain how {0} could be taught to somebody who knows only {1}, and where the comparison ends.",
           "Which rarely discussed property of {0} matters most in practice, and how would you measure it?",
           "Design a small experiment that separates the influence of {0} from that of {1}.",
           "Write a short guide for archivists who catalogue documents about {0}.")


def deeper(row, rng):
    """The request with a further demand; one time in ten as it was, as a weak model does."""
    left = [demand for demand in DEEPER if demand not in row["instruction"]]
    if rng.random() < 0.1 or not left:
        return row["instruction"]
    return f"{row['instruction']} {rng.choice(left)}"


def broader(row, rng):
    words = keywords(row["instruction"])
    return rng.choice(BROADER).format(words[0].lower(), words[min(1, len(words) - 1)].lower())


def improve(row, rng):
    rule = "Never give the request back unchanged, and never mention these instructions in it.\n\n"
    return row["method"].replace("Request:", f"{rule}Request:", 1)


def reply(row, rng):
    """A calculation, which is wrong one time in three; otherwise sentences about the words of the request."""
    asked = calculations(row["instruction"])
    if asked:
        lines, result = worked(*asked[0])
        if rng.random() < 0.35:
            wrong = result + rng.choice([-10, -1, 1, 10, 100])
            lines[-1] = lines[-1].replace(str(result), str(wrong))
            result = wrong
        return "\n".join([*lines, f"The answer is {result}."])
    words = [word.lower() for word in keywords(row["instruction"])]
    first, second = words[0], words[min(1, len(words) - 1)]
    said = [f"Everything here depends on {first}.",
            f"It has to be seen together with {second}, which limits it.",
            f"A good start is to write down what is known of {first}, and to change little at a time.",
            f"Where {second} and {first} disagree, the case that is easier to check decides."]
    rng.shuffle(said)
    return " ".join(said[:rng.randint(2, 4)])


def fuse(row, rng):
    """One request that needs all, and sentences that each say something of two conversations."""
    said = []
    for source in row["sources"]:
        turns = re.split(r"^(?:User|Assistant|System): ", source, flags=re.M)[1:]
        said.append((sentences(turns[0])[-1], [part for turn in turns[1:] for part in sentences(turn)]))
    topics = [keywords(" ".join([request, *parts]))[0].lower() for request, parts in said]
    request = ", and at the same time ".join(lower(request).rstrip("?!.") for request, _ in said)
    lines = []
    for i in range(max(len(parts) for _, parts in said)):
        there = [parts[i].rstrip(".!?") for _, parts in said if i < len(parts)]
        if len(there) == 1:
            other = rng.choice([topic for topic, (_, parts) in zip(topics, said) if i >= len(parts)])
            there.insert(0, f"With {other} in mind")
        lines.append(f"{there[0]}, {'' if there[0].startswith('With ') else 'while '}"
                     f"{', while '.join(lower(part) for part in there[1:])}.")
    return (f"User: I am working on {' and '.join(topics)} together: {request}?\n"
            f"Assistant: {' '.join(lines)}")


def score(row, rng):
    """0 to 10 for the share of the request's long words that the answer has, and for its length."""
    words = keywords(row["instruction"])
    taken = sum(word.lower() in row["answer"].lower() for word in words) / len(words)
    return str(min(10, round(8 * taken + min(2, len(row["answer"]) / 200))))
