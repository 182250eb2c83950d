"""Post-training (Motif §4; Kimi K2 §3.1): answers are learned (SFT), then which of two answers is better
(DPO, coarse and fine), on plain, evolved, fused and concatenated data, with MuonClip and with AdamW.

The task is arithmetic, where a checker says which answers are right: an expression is worked out one
operation a line. A family is the shape of an expression and its operations, such as (n + n) * n; the
families of the test are in no training data of any stage.
"""
import functools
import json
import random
import re
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F

import train
from data import chat_ids, digest64, write_atomically
from model import generate
from notes import _note, corpus

ROOT = Path("out/post_training")   # runs and data, kept so that arms which share a beginning train it once
LEAST, MOST = -20, 20              # of every value on the way
LONGEST = 48                       # tokens of an answer
SFT = "SFT"
DATA_ARMS = "SFT, evolved", "SFT, fused", "SFT, concatenated"
LENGTHS = {"SFT, shortest left out": 0.25, "SFT, longest alone": 0.75}     # shares that are left out
COARSE, LONGER, FINE, RIGHT = ("DPO coarse", "DPO coarse, twice as long", "DPO coarse, then fine",
                               "SFT on right answers")
ADAMW = "SFT with AdamW"
STAGES = "base", SFT, COARSE, LONGER, FINE, RIGHT
GROUPS = "two", "deep", "wide"
COMPARED = ((SFT, "base", "unseen"), (COARSE, SFT, "unseen"), (COARSE, SFT, "sampled"),
            (LONGER, COARSE, "unseen"), (LONGER, COARSE, "seen"), (FINE, LONGER, "unseen"),
            (FINE, LONGER, "accuracy"), (RIGHT, SFT, "unseen"), (FINE, RIGHT, "unseen"),
            (FINE, RIGHT, "accuracy"),
            ("SFT, evolved", SFT, "unseen"), ("SFT, fused", SFT, "unseen"),
            ("SFT, concatenated", SFT, "unseen"), ("SFT, fused", "SFT, concatenated", "unseen"),
            ("SFT, evolved", "SFT, fused", "unseen"),
            *((arm, SFT, group) for arm in LENGTHS for group in ("unseen", "seen")))
RATES = (*(f"{SFT}, lr {lr}" for lr in (0.001, 0.01)),
         *(f"{ADAMW}, lr {lr}" for lr in (0.0003, 0.001, 0.003)))


# ---- problems ----------------------------------------------------------------------------------------------
# An expression is a number or [left, operation, right].

@functools.cache
def families():
    """{group: ([families that are trained on], [families of the test])}"""
    ops = "+-*"
    one = [["n", op, "n"] for op in ops]
    two = [tree for op in ops for of in one for tree in ([of, op, "n"], ["n", op, of])]
    deep = [[of, op, "n"] for op in ops for of in two if isinstance(of[0], list)]
    wide = [[left, op, right] for op in ops for left in one for right in one]
    groups = dict(one=one, two=two, deep=deep, wide=wide)
    rng = random.Random(2026)
    test = {group: rng.sample(of, len(of) // 3 * (group != "one")) for group, of in groups.items()}
    unseen = sum(test.values(), [])
    return {group: ([tree for tree in of if not any(form in unseen for form in forms(tree))], test[group])
            for group, of in groups.items()}


def forms(tree):
    """The families of all expressions on the way to an answer, and of their parts."""
    if not isinstance(tree, list):
        return []
    return [tree, *forms(tree[0]), *forms(tree[2]), *forms(step(tree))]


def written(tree):
    """An expression as text, without the outer brackets."""
    inner = lambda part: f"({written(part)})" if isinstance(part, list) else corpus.paren(part)
    return f"{inner(tree[0])} {tree[1]} {inner(tree[2])}" if isinstance(tree, list) else str(tree)


def step(tree):
    """The expression after its leftmost operation that can be done."""
    left, op, right = tree
    if isinstance(left, list):
        return [step(left), op, right]
    if isinstance(right, list):
        return [left, op, step(right)]
    if left == "n":
        return "n"                                                 # of a family
    return {"+": left + right, "-": left - right, "*": left * right}[op]


def worked(tree):
    """The answer: what is left after each operation, one a line. None if a value is out of range."""
    lines = []
    while isinstance(tree, list):
        tree = step(tree)
        numbers = [int(n) for n in re.findall(r"-?\d+", re.sub(r" - ", " + ", written(tree)))]
        if not all(LEAST <= n <= MOST for n in numbers):
            return None
        lines.append(f"= {written(tree)}")
    return "\n".join(lines)


def filled(family, rng):
    """A family with numbers for its n."""
    if family == "n":
        return rng.randint(1, 9)
    return [filled(family[0], rng), family[1], filled(family[2], rng)]


def problem(family, rng):
    """An expression of the family whose values stay in range."""
    while True:
        tree = filled(family, rng)
        if worked(tree):
            return tree


def problems(groups, n, rng, test=False, known=()):
    """n different expressions of the groups' families, in turn, none of which is `known`."""
    of = [family for group in groups for family in families()[group][test]]
    found = {}
    for i in range(100 * n):
        tree = problem(of[i % len(of)], rng)
        if written(tree) not in known:
            found[written(tree)] = tree
        if len(found) == n:
            break
    return list(found.values())


def question(tree):
    return f"Work out:\n{written(tree)}"


def right(asked, answer):
    """Whether every line of an answer is true, and the last one is a number."""
    try:
        corpus.check(f"{asked}\n{answer}")
    except ValueError:
        return False
    lines = answer.split("\n")
    return all(line.startswith("= ") for line in lines) and bool(re.fullmatch(r"= -?\d+", lines[-1]))


# ---- data of each stage ------------------------------------------------------------------------------------

def chat(asked, answer):
    return dict(messages=[dict(role="user", content=asked), dict(role="assistant", content=answer)])


def harder(tree, rng):
    """An evolved request: one more operation, around the expression or in place of its last part, so that it
    is of a family that may be trained on."""
    known = [family for group in ("two", "deep", "wide") for family in families()[group][0]]
    while True:
        op, n = rng.choice("+-*"), rng.randint(1, 9)
        new = rng.choice([[tree, op, n], [n, op, tree], [tree[0], tree[1], [n, op, rng.randint(1, 9)]]])
        if family_of(new) in known and worked(new):
            return new


def both(one, other, rng):
    """A fused request, which cannot be answered without the answers of both. None: out of range."""
    known = families()["wide"][0]
    options = [tree for op in "+-*" for tree in ([one, op, other], [other, op, one])
               if family_of(tree) in known and worked(tree)]
    return rng.choice(options) if options else None


def family_of(tree):
    return [family_of(tree[0]), tree[1], family_of(tree[2])] if isinstance(tree, list) else "n"


def texts(seed, s):
    """What is pre-trained on: sums and products as facts, and worked expressions as plain text."""
    rng = random.Random(f"text {seed}")
    facts = []
    while len(facts) < s.facts:
        a, op, b = rng.randint(LEAST, MOST), rng.choice("+-*"), rng.randint(LEAST, MOST)
        if op == "*":
            a, b = rng.randint(-12, 12), rng.randint(-12, 12)
        if worked([a, op, b]):
            facts.append(f"{written([a, op, b])}\n{worked([a, op, b])}")
    told = [f"{question(tree)}\n{worked(tree)}\n" for tree in problems(("one", "two"), s.told, rng)]
    facts = ["\n".join(facts[i:i + 8]) + "\n" for i in range(0, len(facts), 8)]
    return dict(facts=[dict(text=text) for text in facts], worked=[dict(text=text) for text in told])


def lessons(arm, seed, s):
    """{domain: conversations} of an SFT arm. All begin from the same plain requests."""
    rng = random.Random(f"chat {seed}")
    plain = problems(("one", "two"), s.plain, rng)
    found = dict(plain=[chat(question(tree), worked(tree)) for tree in plain])
    if arm in LENGTHS:
        length = lambda record: sum(len(message["content"]) for message in record["messages"])
        found["plain"] = sorted(found["plain"], key=length)[int(LENGTHS[arm] * s.plain):]
    if arm == "SFT, evolved":
        found["evolved"] = [chat(question(new), worked(new)) for new in (harder(tree, rng) for tree in plain)]
    if arm == "SFT, fused":
        single = problems(("one",), 150, rng)
        pairs = ((rng.choice(single), rng.choice(single)) for _ in range(10 * s.plain))
        fused = [tree for tree in (both(*pair, rng) for pair in pairs) if tree][:s.plain]
        found["fused"] = [chat(question(tree), worked(tree)) for tree in fused]
    if arm == "SFT, concatenated":
        turns = [(rng.choice(plain), rng.choice(plain)) for _ in plain]
        found["concatenated"] = [chat("\n\n".join(map(question, two)), "\n\n".join(map(worked, two)))
                                 for two in turns]
    return found


def pairs_of(model, tokenizer, trees, seed, s, fine=False):
    """A right and a wrong answer, both sampled, to each question that has both kinds. The fine ones: of all
    such pairs of a question the one with the longest common beginning."""
    rng = random.Random(f"pairs {seed}")
    sampled = {}
    for i in range(s.answers):
        for tree, answer in zip(trees, answers(model, tokenizer, trees, 1.0, 1000 * seed + i)):
            sampled.setdefault(question(tree), [worked(tree), "= 99"] * s.toy).append(answer)
    found = []
    for asked, said in sampled.items():
        good, bad = ([one for one in dict.fromkeys(said) if right(asked, one) == side and one.strip()]
                     for side in (True, False))
        options = [(a, b) for a in good for b in bad]
        if options:
            a, b = max(options, key=lambda pair: alike(*pair)) if fine else rng.choice(options)
            found.append(dict(prompt=asked, chosen=a, rejected=b))
    return found


def alike(a, b):
    """Characters that two answers have in common at the beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


# ---- what a model answers ----------------------------------------------------------------------------------

def prompt_of(tokenizer, asked, text=False):
    """A question → ids; text: as pre-training would write it, not as a conversation."""
    if text:
        return [tokenizer.eot, *tokenizer.encode(asked + "\n").tolist()]
    ids, _ = chat_ids([dict(role="user", content=asked)], tokenizer)
    return [*ids.tolist(), tokenizer.specials["<|assistant|>"]]


def written_on(model, tokenizer, trees, temperature, seed, text=False):
    """(tokens (B, P + LONGEST), P, their places in `trees`) for questions whose prompts have P tokens."""
    by_length = {}
    for i, tree in enumerate(trees):
        prompt = prompt_of(tokenizer, question(tree), text)
        by_length.setdefault(len(prompt), []).append((i, prompt))
    for length, some in by_length.items():
        prompts = torch.tensor([prompt for _, prompt in some])
        tokens = generate(model, prompts, LONGEST, temperature, seed=seed + length)
        yield tokens, length, [i for i, _ in some]


def answers(model, tokenizer, trees, temperature=0.0, seed=0, text=False):
    """The model's answer to each question, up to its end token."""
    end = tokenizer.decode([tokenizer.eot if text else tokenizer.specials["<|end|>"]])
    found = [""] * len(trees)
    for tokens, length, places in written_on(model, tokenizer, trees, temperature, seed, text):
        for i, ids in zip(places, tokens[:, length:].tolist()):
            found[i], ended, _ = tokenizer.decode(ids).partition(end)
            found[i] = found[i].rstrip("\n") if ended else ""      # cut off, it is no answer
    return found


def passed(model, tokenizer, trees, temperature=0.0, text=False):
    """% of the questions that are answered right."""
    said = answers(model, tokenizer, trees, temperature, 7, text)
    return 100 * statistics.mean(right(question(tree), answer) for tree, answer in zip(trees, said))


@torch.no_grad()
def divergence(model, reference, tokenizer, trees):
    """KL(π ‖ π_ref) of whole answers, in nats: summed along answers that π has sampled."""
    end = tokenizer.specials["<|end|>"]
    total = 0.0
    for tokens, length, _ in written_on(model, tokenizer, trees, 1.0, 11):
        p, q = (F.log_softmax(of(tokens)[:, length - 1:-1].double(), -1) for of in (model, reference))
        ended = (tokens[:, length:] == end).cumsum(1) - (tokens[:, length:] == end).long() > 0
        total += ((p.exp() * (p - q)).sum(-1) * ~ended).sum().item()
    return total / len(trees)


@torch.no_grad()
def log_probabilities(model, tokenizer, pairs):
    """Pairs → ln π of both answers, (pairs, 2)."""
    found = []
    for pair in pairs:
        both = []
        for side in ("chosen", "rejected"):
            head = prompt_of(tokenizer, pair["prompt"])
            tail = [*tokenizer.encode(pair[side]).tolist(), tokenizer.specials["<|end|>"]]
            tokens = torch.tensor([head + tail])
            nats = model(tokens[:, :-1], tokens[:, 1:])[1][len(head) - 1:]
            both.append(-nats.sum().item())
        found.append(both)
    return torch.tensor(found, dtype=torch.float64)


# ---- stages ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Setting:
    base: train.Config = field(default_factory=train.Config)
    sft: train.Config = field(default_factory=train.Config)
    dpo: train.Config = field(default_factory=train.Config)
    facts: int = 40_000          # of the pre-training
    told: int = 3000             # worked expressions of the pre-training
    plain: int = 1000            # conversations
    asked: int = 2000            # questions that pairs are sampled for
    answers: int = 8             # sampled for each
    tests: int = 200             # questions of each group in the test
    toy: bool = False            # a right and a wrong answer count as sampled: a toy ends none


def kept(config, name, seed, files):
    """The configuration of a stage, whose name and data decide its folder. files: {domain: records}"""
    key = _note.key(config) + f"{digest64(json.dumps(files)):016x}"[:8]
    folder = ROOT / re.sub(r"\W+", "-", f"{name} {seed} {key}")
    paths = {}
    for domain, records in files.items():
        paths[domain] = folder / f"{domain}.jsonl"
        if not paths[domain].exists():
            folder.mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps(record) + "\n" for record in records)
            write_atomically(paths[domain], lines.encode())
    share = 1 / len(files)
    data = replace(config.data, files=",".join(f"{domain}={path}" for domain, path in paths.items()),
                   domains=",".join(f"{domain}:{share}:{share}" for domain in files),
                   cache=str(folder / "cache"))
    return replace(config, seed=seed, out=str(folder / "run"), data=data)


def trained(config):
    """Train, or go on, or read what was trained → rows of the log. Ctrl-C ends the grid."""
    rows, _ = train.train(config, resume=True, quiet=True)
    if not rows or rows[-1]["step"] < config.total_steps:
        raise KeyboardInterrupt
    return rows


def stage(arm, seed, s):
    """Train an arm, and before that what it begins with, unless they are there → (rows of the log, folder)"""
    if arm == "base":
        config = kept(s.base, arm, seed, texts(seed, s))
        return trained(config), config.out
    if arm in (SFT, *DATA_ARMS, *LENGTHS) or arm.startswith((SFT + ", lr", ADAMW)):
        _, init = stage("base", seed, s)
        lr = re.search(r"lr ([\d.]+)", arm)
        name = "adamw" if arm.startswith(ADAMW) else s.sft.optim.name
        optim = replace(s.sft.optim, name=name, **(dict(lr=float(lr[1])) if lr else {}))
        config = kept(replace(s.sft, init=init, optim=optim), arm, seed, lessons(arm, seed, s))
        return trained(config), config.out

    # From pairs that the model has sampled at the beginning of the stage.
    longer = 2 if arm in (LONGER, RIGHT) else 1
    _, init = stage(COARSE if arm == FINE else SFT, seed, s)
    pairs = sampled_pairs(init, seed, s, arm == FINE)
    if arm == RIGHT:
        config = replace(s.sft, tokens=longer * s.dpo.tokens, batch=s.dpo.batch, micro=s.dpo.micro,
                         optim=replace(s.sft.optim, lr=s.sft.optim.lr / 4))
        files = dict(right=[chat(pair["prompt"], pair["chosen"]) for pair in pairs])
    else:
        config = replace(s.dpo, tokens=longer * s.dpo.tokens)
        files = dict(pairs=pairs)
    config = kept(replace(config, init=init), arm, seed, files)
    return trained(config), config.out


@functools.cache
def sampled_pairs(init, seed, s, fine):
    """Pairs of answers to questions of all families that are trained on, other than those of SFT."""
    known = {written(tree) for tree in problems(("one", "two"), s.plain, random.Random(f"chat {seed}"))}
    trees = problems(GROUPS, s.asked, random.Random(f"asked {seed} {fine}"), known=known)
    return pairs_of(*train.load_run(init), trees, seed, s, fine)


@functools.cache
def tested_pairs(init, seed, s):
    """Pairs of answers to the test's questions."""
    tests = test_set(s.tests)
    return pairs_of(*train.load_run(init), sum((tests[group] for group in GROUPS), []), seed, s)


@functools.cache
def test_set(tests):
    """{group: expressions of unseen families}, the same for all seeds; `seen`: of trained families."""
    rng = random.Random("test")
    found = {group: problems((group,), tests, rng, test=True) for group in ("two", "deep", "wide")}
    return found | dict(seen=problems(("two",), tests, rng))


def run(arm, seed, s):
    rows, folder = stage(arm, seed, s)
    model, tokenizer = train.load_run(folder)
    model.eval()
    tests = test_set(s.tests)
    text = arm == "base"
    first = dict(tokens=rows[-1]["tokens"], loss=statistics.mean(row["loss"] for row in rows[1:][-20:]))
    first |= {group: passed(model, tokenizer, trees, 0.0, text) for group, trees in tests.items()}
    first["sampled"] = passed(model, tokenizer, tests["two"], 1.0, text)
    if arm == "base":
        return [first]

    # Beside the SFT arm: divergence, and pairs of the test's questions that it has sampled.
    _, start = stage(SFT, seed, s)
    reference, _ = train.load_run(start)
    reference.eval()
    pairs = tested_pairs(start, seed, s)
    now, before = (log_probabilities(of, tokenizer, pairs) for of in (model, reference))
    margins = (now - before)[:, 0] - (now - before)[:, 1]
    first |= dict(pairs=len(pairs), likelier=100 * (now[:, 0] > now[:, 1]).double().mean().item(),
                  kl=divergence(model, reference, tokenizer, tests["two"]))
    if arm != SFT:
        first["accuracy"] = 100 * (margins > 0).double().mean().item()
    curve = [dict(step=row["step"], margin=row["rewards/margins"], trained=row["rewards/accuracies"])
             for row in rows if "rewards/margins" in row and row["step"] % 5 == 0]
    return [first, *curve]


# ---- the grid ----------------------------------------------------------------------------------------------

def cells(quick):
    model = replace(train.RECIPES["laptop"].model, n_layer=3, n_head=4, n_kv_head=4, d_model=64, d_head=16,
                    d_ff=192, vocab_size=261, context=128)
    same = dict(model=model, batch=16, micro=16, eval_every=10 ** 9, eval_windows=1, save_every=10 ** 9)
    same |= dict(data=replace(train.RECIPES["laptop"].data, tokenizer="bytes"))
    base, sft, dpo = (replace(train.RECIPES[name], **same) for name in ("laptop", "sft", "dpo"))
    base = replace(base, tokens=1500 * 16 * 128, data=replace(base.data, doc_mask=True))
    dpo = replace(dpo, tokens=40 * 16 * 128, eval_windows=0, optim=replace(dpo.optim, lr=3e-4))
    s = Setting(base, replace(sft, tokens=80 * 16 * 128), dpo)
    if quick:
        small = replace(model, n_layer=1, n_head=2, n_kv_head=2, d_model=16, d_ff=16)
        base, sft, dpo = (replace(of, model=small, tokens=4 * 16 * 128) for of in (s.base, s.sft, s.dpo))
        s = Setting(base, sft, dpo, facts=400, told=100, plain=60, asked=12, answers=2, tests=6, toy=True)
        return [(arm, 0, s) for arm in ("base", SFT, "SFT, fused", COARSE, FINE)]
    arms = "base", SFT, *DATA_ARMS, COARSE, LONGER, FINE, RIGHT
    found = [(arm, seed, s) for seed in range(3) for arm in arms]
    found += [(arm, seed, s) for seed in (3, 4) for arm in ("base", SFT)]
    return found + [(arm, seed, s) for seed in range(3) for arm in (*RATES, *LENGTHS)]


# ---- figure and tables -------------------------------------------------------------------------------------

def results(rows):
    """{arm: {seed: the row of its results}}, in the order of the grid. unseen: the mean of GROUPS."""
    found = {}
    for row in rows:
        if "two" in row:
            unseen = statistics.mean(row[group] for group in GROUPS)
            found.setdefault(row["arm"], {})[row["seed"]] = row | dict(unseen=unseen)
    return found


def paired(found):
    """The results of the seeds that every arm has, if there are any: a seed is easier or harder for all."""
    seeds = set.intersection(*(set(of) for of in found.values()))
    return {arm: {seed: row for seed, row in of.items() if not seeds or seed in seeds}
            for arm, of in found.items()}


def bars(axis, found, arms, measure, colours=_note.COLOURS):
    """A bar for the mean of each arm, and a point for each seed."""
    arms = [arm for arm in arms if arm in found]
    for x, arm in enumerate(arms):
        values = [row[measure] for row in found[arm].values()]
        axis.bar(x, statistics.mean(values), 0.6, color=colours[x % 7], alpha=0.5)
        axis.plot([x + 0.1 * (i - (len(values) - 1) / 2) for i in range(len(values))], values, "o", ms=4,
                  color=colours[x % 7])
    axis.set(xticks=range(len(arms)), xticklabels=[arm.replace(" ", "\n") for arm in arms])
    axis.tick_params(axis="x", labelsize=8)


def show(rows):
    every = results(rows)
    found = paired(every)
    figure, [(stages, data, cost, rates)] = _note.panels(1, 4, width=17, height=3.9)
    bars(stages, found, STAGES, "unseen")
    stages.set(title="stages: unseen, mean of three, % right")

    # Plain, evolved, fused and concatenated data, by group of families
    arms = [arm for arm in (SFT, *DATA_ARMS) if arm in found]
    for i, arm in enumerate(arms):
        for x, group in enumerate((*GROUPS, "seen")):
            values = [row[group] for row in found[arm].values()]
            at = x + 0.2 * (i - 1.5)
            data.bar(at, statistics.mean(values), 0.18, color=_note.COLOURS[i], alpha=0.5,
                     label=arm.replace(SFT + ", ", "half ").replace(SFT, "plain") if not x else None)
            data.plot([at] * len(values), values, "o", ms=3, color=_note.COLOURS[i])
    data.set(title="data, at equal tokens: % right", xticks=range(4), ylim=(0, 130),
             xticklabels=("unseen,\ntwo", "unseen,\ndeep", "unseen,\nwide", "trained\nfamilies"))
    data.legend(ncols=2, loc="upper left")

    # What preferring costs
    for i, arm in enumerate(arm for arm in (COARSE, LONGER, FINE, RIGHT) if arm in found):
        some = found[arm].values()
        cost.plot([row["kl"] for row in some], [row["accuracy"] for row in some], "o", color=_note.COLOURS[i],
                  label=arm)
    cost.axhline(50, color="0.4", ls=":", lw=1.5)
    cost.set(title="pairs of unseen families preferred rightly, %", xlabel="KL to SFT, nats an answer",
             ylim=(40, 90))
    if cost.lines[1:]:
        cost.legend()

    # Learning rates
    for name, label in ((SFT, "MuonClip"), (ADAMW, "AdamW")):
        tried = {rate_of(arm): [row["two"] for row in of.values()] for arm, of in found.items()
                 if arm == name or arm.startswith(f"{name}, lr")}
        tried = dict(sorted(tried.items()))
        for lr, values in tried.items():
            rates.plot([lr] * len(values), values, "o", ms=4, color=_note.COLOURS[name == ADAMW])
        rates.plot(list(tried), list(map(statistics.mean, tried.values())), label=label,
                   color=_note.COLOURS[name == ADAMW])
    rates.set(title="optimizers: unseen, two, % right", xlabel="learning rate", xscale="log", ylim=(0, 100))
    rates.legend()
    return figure, tables(every)


def rate_of(arm):
    """The learning rate in an arm's name, or that of the recipe."""
    named = re.search(r"lr ([\d.]+)", arm)
    return float(named[1]) if named else train.SFT.optim.lr


def tables(found):
    """Lines of the page's tables."""
    alike = paired(found)

    def cell(arm, name, digits=1):
        values = [row[name] for row in alike[arm].values() if name in row]
        return _note.spread(values, digits) if values else "–"
    columns = dict(two="unseen, two", deep="unseen, deep", wide="unseen, wide", seen="trained families",
                   sampled="unseen, two, sampled", likelier="right one likelier",
                   accuracy="preferred rightly")
    lines = _note.table(
        ("% right", "seeds", *columns.values(), "KL to SFT, nats an answer",
         "training loss, nats a token (DPO: a pair)"),
        *((arm, len(of), *(cell(arm, name) for name in columns), cell(arm, "kl", 3), cell(arm, "loss", 3))
          for arm, of in alike.items()))

    # Differences within seeds
    differences = [("difference, in points", "of", "mean", "standard error", "positive in")]
    best = [max((arm for arm in found if arm == name or arm.startswith(f"{name}, lr")), default="",
                key=lambda arm: statistics.mean(row["two"] for row in alike[arm].values()))
            for name in (ADAMW, SFT)]
    for more, less, measure in (*COMPARED, (best[0] or ADAMW, best[1], "two")):
        both = sorted(found.get(more, {}).keys() & found.get(less, {}).keys())
        gaps = [found[more][seed][measure] - found[less][seed][measure] for seed in both]
        what = (f"{more} over {less}", columns.get(measure, "unseen, mean of three"))
        if len(gaps) < 2:
            differences.append((*what, "not run", "–", "–"))
            continue
        error = statistics.stdev(gaps) / len(gaps) ** 0.5
        differences.append((*what, f"{statistics.mean(gaps):+.1f}", f"{error:.1f}",
                            f"{sum(gap > 0 for gap in gaps)} of {len(gaps)}"))
    lines += ["", *_note.table(*differences)]

    # What is missing, and what could be seen
    missing = [f"{arm} {seed}" for arm, seed, _ in cells(False) if seed not in found.get(arm, {})]
    if missing:
        lines += ["", f"Not run yet (arm and seed): {'; '.join(missing)}."]
    for measure in ("two", "unseen"):
        values = [row[measure] for row in found.get(SFT, {}).values()]
        if len(values) > 2:
            smallest = 2 * statistics.stdev(values) * (2 / 3) ** 0.5
            of = columns.get(measure, "unseen, mean of three")
            lines += ["", f"{of}: SFT deviates by {statistics.stdev(values):.1f} points over {len(values)} "
                          f"seeds. Not paired by seed, two arms of three could be told apart from "
                          f"{smallest:.1f} points on."]
    return lines


if __name__ == "__main__":
    _note.main("post_training", cells, run, show)
