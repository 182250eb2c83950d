"""Fusion: can a text made of several sources be told from the sources in a row, without a model?"""
import random
import re
import statistics

from notes import _note, measures
from notes.fidelity import area, passages, respelled, reworded, roc

# What is made of the sources: first what counts as fused, then what does not.
FUSED = dict(joined="sentences joined in pairs", halves="halves of sentences joined",
             partly="every third sentence joined, others in turn")
NOT_FUSED = dict(concatenated="one source after the other", paraphrased="the same, 3 words in 10 changed",
                 bridged="the same, a sentence about both between", interleaved="their sentences in turn",
                 dropped="one source missing")
KINDS = FUSED | NOT_FUSED
SIZES = {0: "two, of two sentences each", 2: "two", 3: "three", 4: "four"}
# The thresholds are chosen on these, of two sources, and tested on all others.
CHOSEN_ON = ("joined", "partly"), ("concatenated", "interleaved", "dropped")


# ---- texts made of several sources -------------------------------------------------------------------------

def lowered(sentence):
    """As it stands inside another sentence: no capital unless for a name, no full stop."""
    inside = sentence if sentence[1:2].isupper() else sentence[0].lower() + sentence[1:]
    return inside.rstrip(".")


def joined(a, b, rng):
    """A sentence of each of two sources as one: grammatical, but it connects nothing in thought."""
    pattern = rng.choice(("While {a}, {b}.", "Just as {a}, so {b}.", "Since {a}, it matters that {b}.",
                          "It follows that {b}, provided that {a}."))
    return pattern.format(a=lowered(a), b=lowered(b))


def halves(a, b, rng):
    """The first half of a sentence of one source and the second half of one of another."""
    a, b = lowered(a).split(), lowered(b).split()
    return " ".join(a[:(len(a) + 1) // 2]) + rng.choice((", and so ", ", much as ", ", where ")) \
        + " ".join(b[len(b) // 2:]) + "."


def combined(kind, sources, every, rng):
    """k lists of sentences → a text of that kind."""
    sources = [[respelled(sentence, rng) for sentence in source] for source in sources]
    if kind in FUSED or kind in ("paraphrased", "dropped"):
        sources = [[reworded(sentence, 0.3, every, rng) for sentence in source] for source in sources]
    if kind == "dropped":
        sources = sources[1:]
    turns = list(zip(*sources))                                    # sentence i of each source
    if kind in ("joined", "halves", "dropped"):
        join = halves if kind == "halves" else joined
        return " ".join(" ".join(fused(some, join, rng)) for some in turns)
    if kind == "partly":
        return " ".join(" ".join(some if i % 3 else fused(some, joined, rng)) for i, some in enumerate(turns))
    if kind == "interleaved":
        return " ".join(" ".join(some) for some in turns)
    parts = [" ".join(source) for source in sources]
    if kind == "bridged":
        word = [max(re.findall(r"[a-z]+", part), key=len) for part in parts]
        return "".join(f" Both the {word[i - 1]} and the {word[i]} matter here. " * (i > 0) + part
                       for i, part in enumerate(parts))
    return "\n\n".join(parts)


def fused(some, join, rng):
    """One sentence of each source → each joined with the next; in any order. One alone stays."""
    some = rng.sample(some, len(some))
    return [join(a, b, rng) for a, b in zip(some, some[1:])] or some


# ---- the grid ----------------------------------------------------------------------------------------------

def cells(quick):
    """The seed stands for the sources: see SIZES."""
    n = 4 if quick else 60
    return [(kind, size, n) for kind in KINDS for size in ((0, 2) if quick else SIZES)]


def run(kind, size, n):
    k = size or 2
    every = 20 if n < 60 else 1                                  # --quick: fewer files to read
    texts = passages(every)
    for i in range(n):
        rng = random.Random(f"{size} {i}")
        sources = [texts[(k * i + j) % len(texts)][:None if size else 2] for j in range(k)]
        text = combined(kind, sources, every, rng)
        m = measures.integration([" ".join(source) for source in sources], text)
        row = dict(purity=m.purity, switches=m.switches, mixed=m.mixed,
                   least=min(m.coverage) / max(*m.coverage, 1e-9))
        yield {name: round(value, 4) for name, value in row.items()}


# ---- thresholds and curves ---------------------------------------------------------------------------------

def doubt(row, apart=measures.APART, mixed=measures.MIXED, missing=measures.MISSING):
    """How far the worst measure is from what is asked of it: above 1, the text is no fusion."""
    return max(row["purity"] / apart, (1 - row["mixed"]) / (1 - mixed), (1 - row["least"]) / (1 - missing))


def rate(rows, **thresholds):
    """The share of the rows that are refused."""
    return sum(doubt(row, **thresholds) > 1 for row in rows) / len(rows)


def best(rows):
    """The thresholds with the largest difference between the shares refused, see CHOSEN_ON: a list, as many
    give the same."""
    good, bad = ([_note.of_arm(rows, kind).get(2, []) for kind in kinds] for kinds in CHOSEN_ON)
    mean = lambda some, thresholds: statistics.mean(rate(of, **thresholds) for of in some if of)
    options = [dict(apart=apart / 20, mixed=mixed / 20, missing=missing / 20)
               for apart in range(8, 19) for mixed in range(1, 8) for missing in range(1, 9)]
    gains = [round(mean(bad, thresholds) - mean(good, thresholds), 6) for thresholds in options]
    return [thresholds for thresholds, gain in zip(options, gains) if gain == max(gains)]


def show(rows):
    figure, [(curves, plane)] = _note.panels(1, 2, width=11, height=4.2)
    sizes = sorted({row["seed"] for row in rows})
    good = [row for row in rows if row["arm"] in FUSED]
    table = [("text", "a fusion", "AUC against fusions", *(f"refused: {SIZES[size]}" for size in sizes),
              "purity", "switches", "mixed", "least coverage")]
    for i, (kind, label) in enumerate(KINDS.items()):
        of = [row for row in rows if row["arm"] == kind]
        median = [f"{statistics.median(row[name] for row in of if row['seed']):.2f}"
                  for name in ("purity", "switches", "mixed", "least")]
        refused = [f"{rate([row for row in of if row['seed'] == size]):.0%}" for size in sizes]
        auc = ""
        if kind in NOT_FUSED:
            x, y = roc([doubt(row) for row in good], [doubt(row) for row in of])
            auc = f"{area(x, y):.3f}"
            curves.plot(x, y, label=f"{label}: {auc}", color=_note.COLOURS[i - len(FUSED)])
        table.append((label, "yes" if kind in FUSED else "no", auc, *refused, *median))
        plane.plot([row["purity"] for row in of if row["seed"]], [row["mixed"] for row in of if row["seed"]],
                   "o" if kind in FUSED else "x", ms=3, label=label, color=_note.COLOURS[i % 7], alpha=0.5)
    curves.plot([rate(good)] * 2, [0, 1], color="0.4", ls=":", lw=1.5, label="the thresholds in use")
    curves.set(title="others refused, and area", xlabel="fusions refused", xlim=(-.005, 0.2))
    curves.legend(loc="lower right")
    plane.axvline(measures.APART, color="0.4", ls=":", lw=1.5)
    plane.axhline(measures.MIXED, color="0.4", ls=":", lw=1.5)
    plane.set(title="texts of two to four sources; ○ fusions", xlabel="purity of the best cuts, 0: by chance",
              ylabel="sentences with words of two sources", xlim=(-0.25, 2.3), xticks=(0, 0.5, 1))
    plane.legend(fontsize=8, loc="upper right", markerscale=2)
    ranges = ", ".join(f"{name} {min(v[name] for v in found):g}–{max(v[name] for v in found):g}"
                       for found in [best(rows)] for name in found[0])
    return figure, [*_note.table(*table), "",
                    f"Best on two sources and five of the eight kinds, all the same: {ranges}."]


if __name__ == "__main__":
    _note.main("fusion", cells, run, show)
