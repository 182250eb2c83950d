"""The whole life of a model, from files to a conversation, on the text that comes with every Python:

  raw files → clean → rewritten → tokens → pre-trained while the mixture moves → annealed, with averages →
  4 × the context → SFT → pairs → DPO → a conversation → exported → read back

  python -m notes.whole_life           # into out/life. A stage is a command that you could type, and is
                                       # printed; killed at any moment, it goes on where it was
  python -m notes.whole_life --plot    # figure and table of the recorded life, from whole_life.csv
  python -m notes.whole_life --quick   # a toy of it, in seconds, into out/quick

Three of the stages have their commands in this file: see STEPS.
"""
import contextlib
import inspect
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from random import Random

import torch

import data
import model
import train
from notes import _note, corpus
from notes.huggingface import load_hf

RAW = "prose", "code", "math"
MOVING = "prose:.55:.15,rewrites:.15:.05,code:.2:.5,math:.1:.3"    # START:END, as in the default recipe
LAST = "prose:.15:.15,rewrites:.05:.05,code:.5:.5,math:.3:.3"


# ---- the stages --------------------------------------------------------------------------------------------

def life(at):
    """{stage: (what it leaves, its command)}, in order; everything lies in the folder `at`."""
    files = f"prose={at}/prose,rewrites={at}/rewrites.jsonl,code={at}/code,math={at}/raw/math.jsonl"
    text = f"--data.files={files} --data.domains={LAST} --optim.warmup=0 --optim.decay_start=0"
    pairs = f"{at}/pairs.jsonl"
    return {
        # Text, from files to tokens
        "raw": (f"{at}/raw", f"python -m notes.whole_life raw {at}/raw"),
        "clean prose": (f"{at}/prose", f"python data.py clean prose={at}/raw/prose.jsonl {at}/prose"),
        "clean code": (f"{at}/code", f"python data.py clean code={at}/raw/code.jsonl {at}/code"),
        "rephrase": (f"{at}/rewrites.jsonl",
                     f"python data.py rephrase {at}/prose {at}/rewrites.jsonl --n=1 --budget=400KB"),
        "tokens": ("", f"python data.py prepare --files={files} --domains={MOVING}"),

        # Pre-training at a constant rate, which then falls to zero in each stage. From 4 × context on, a step
        # has as many tokens as before, in a quarter of the windows.
        "pre-train": (f"{at}/base",
                      f"torchrun train.py laptop-k2 --data.files={files} --data.domains={MOVING} "
                      f"--optim.decay_start=1 --tokens=700000 --out={at}/base"),
        "anneal": (f"{at}/anneal",
                   f"torchrun train.py --init={at}/base {text} --seed=1 --tokens=245760 "
                   f"--average_every=122880 --out={at}/anneal"),
        "4 × context": (f"{at}/long",
                        f"torchrun train.py --init={at}/anneal {text} --seed=2 --model.context=1024 "
                        "--model.yarn=4 --model.yarn_from=256 --model.yarn_fast=1 --optim.lr=3e-3 "
                        f"--tokens=160000 --eval_windows=16 --batch=2 --out={at}/long"),

        # Conversations, and which of two answers is better
        "SFT": (f"{at}/sft", f"torchrun train.py sft --init={at}/long --data.files=chat={at}/raw/sums.jsonl "
                f"--tokens=960000 --batch=2 --out={at}/sft"),
        "pairs": (pairs,
                  f"python -m notes.whole_life pairs {at}/sft {at}/raw/sums.jsonl {pairs} --first=800"),
        "DPO": (f"{at}/dpo", f"torchrun train.py dpo --init={at}/sft --data.files=pairs={pairs} "
                f"--tokens=120000 --batch=8 --out={at}/dpo"),

        # Out of the repository
        "conversation": (f"{at}/talk.txt", f"python model.py --chat {at}/dpo --temperature=0 --tokens=120 "
                         f"< {at}/raw/talk.txt > {at}/talk.txt"),
        "export": (f"{at}/hf", f"python model.py --sample {at}/dpo --export {at}/hf"),
        "read back": ("", f"python -m notes.whole_life compare {at}/dpo {at}/hf"),
    }


# A toy of it: what is appended to a command. A later option wins.
TOY = {"raw": "--few", "clean prose": "--workers=1", "clean code": "--workers=1", "rephrase": "--budget=9KB",
       "tokens": "--tokenizer=bytes",
       "pre-train": "--data.tokenizer=bytes --batch=4 --tokens=1024 --model.n_layer=2 --model.n_head=2 "
                    "--model.n_kv_head=2 --model.d_model=32 --model.d_ff=32 --model.n_expert=4 "
                    "--model.d_expert=16 --model.vocab_size=261 --model.context=32",
       "anneal": "--batch=4 --tokens=1536 --average_every=768",
       "4 × context": "--model.context=128 --model.yarn_from=32 --tokens=1024",
       "SFT": "--tokens=1024", "pairs": "--first=8", "DPO": "--tokens=1024"}


def cells(quick):
    """A stage depends on all before it, so its setting has their commands too."""
    at = "out/quick/life" if quick else "out/life"
    commands = []
    found = []
    for stage, (_, command) in life(at).items():
        if quick and stage in TOY:
            command += f" {TOY[stage]}"
        commands.append(command)
        found.append((stage, 0, (at, quick, *commands)))
    return found


def run(stage, seed, setting):
    """A `run` of _note: the command of a stage, then what it left, in numbers."""
    at, toy, *_, command = setting
    product, _ = life(at)[stage]
    if stage == "raw" and Path(at, "base").exists():
        raise SystemExit(f"{at} has the runs of an earlier life: remove the folder to begin another")

    # What an earlier attempt left that was killed: a run goes on, everything else is made anew.
    if product and Path(product).exists():
        if "torchrun" in command:
            command += " --resume"
        elif Path(product).is_dir():
            shutil.rmtree(product)
        else:
            Path(product).unlink()
    print(f"\n--- {stage}\n$ {command}", flush=True)
    try:
        found = execute(command, toy)
        yield from measure(stage, Path(at), command, found)
    except (SystemExit, ValueError, OSError, KeyboardInterrupt) as error:
        print(f"\nThe stage \"{stage}\" did not end: {error or type(error).__name__}\n  {command}\n"
              "Started again, python -m notes.whole_life goes on here.", flush=True)
        raise SystemExit(1) from None


def execute(command, toy):
    """Run a command as a shell would → what its function returns. SystemExit if it fails.

    All but data.py run in this process, which saves them their start, and a kill ends all there is; cleaning
    starts processes, which it must not do beside the threads of torch. A toy has no time for that."""
    _, program, *words = shlex.split(command.replace(" -m ", " "))
    if program == "data.py":
        line = [sys.executable, _note.HERE.parent / program, *words]
        status = data.main(words) if toy else subprocess.run(line).returncode
        if status:
            raise SystemExit(f"status {status}")
        return

    # `< FILE` and `> FILE`
    with contextlib.ExitStack() as stack:
        if "<" in words:
            *words, _, said, _, heard = words
            to = stack.enter_context(open(heard, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(to))
            stack.callback(setattr, sys, "stdin", sys.stdin)
            sys.stdin = stack.enter_context(open(said, encoding="utf-8"))
        mains = {"train.py": train.main, "model.py": model.main, "notes.whole_life": step}
        return mains[program](words)


# ---- what a stage left, in numbers -------------------------------------------------------------------------

def measure(stage, at, command, found):
    """Rows of a stage: sizes (documents, bytes, tokens) and scores; then its curve, if it trains."""
    if stage in ("raw", "pairs", "read back"):
        yield found
    elif stage.startswith("clean"):
        name = stage.split()[1]
        report = json.loads((at / name / data.REPORT).read_text("utf-8"))
        yield dict(documents=report["documents"]["kept"], bytes=report["bytes"]["kept"],
                   read=sum(report["documents"].values()))
    elif stage == "rephrase":
        texts = [row["text"] for row in lines_of(at / "rewrites.jsonl")]
        yield dict(documents=len(texts), bytes=sum(len(text.encode()) for text in texts))
    elif stage == "tokens":
        yield tokens_there(command)
    elif stage == "conversation":
        print(said := (at / "talk.txt").read_text("utf-8"))
        yield dict(text=said.partition("\n")[2].strip())
    elif stage == "export":
        yield dict(bytes=sum(file.stat().st_size for file in (at / "hf").iterdir()))
    else:
        yield from trained(stage, Path(life(at)[stage][0]), at)


def tokens_there(command):
    """The size of the shards that `prepare` has made, and bits/byte of bigrams, which models have to beat."""
    options = [word for word in shlex.split(command) if word.startswith("--")]
    config, _ = data.read_options(options)
    there = data.prepare(config, 4096)
    domains = there.domains.values()
    bigram = [data.bigram_bits(d.train, d.val, there.tokenizer) for d in domains]
    return dict(tokens=sum(len(d.train) + len(d.val) for d in domains), bpb=statistics.mean(bigram),
                bytes=sum(d.train_bytes + d.val_bytes for d in domains))


def trained(stage, folder, at):
    """The scores of a run before and after it, from its log; what it solves; and its curve."""
    config = train.kept_config(folder)
    history = train.RunFolder.read_log(folder / "log.csv", config.total_steps)
    rows = [{name: float(value) for name, value in row.items() if value} for row in history]
    if rows[-1]["step"] < config.total_steps:
        raise SystemExit(f"stopped at step {rows[-1]['step']:.0f} of {config.total_steps}")
    curve = []
    for what in ("bpb", "accuracy"):
        for row in rows:
            values = [value for name, value in row.items() if name.startswith(f"{what}_")]
            if values:
                curve.append({"seen": row["tokens"], what: statistics.mean(values)})
    what = "accuracy" if stage == "DPO" else "bpb"
    about = dict(tokens=rows[-1]["tokens"], after=curve[-1][what])
    if stage != "DPO":
        about["before"] = curve[0][what]                           # two equal models prefer neither answer
    if stage in ("4 × context", "SFT", "DPO"):
        problems = lines_of(at / "raw/unseen.jsonl")
        answers = solve(folder, problems, chat=stage != "4 × context")
        solved = [right(problem, answer) for problem, (answer,) in zip(problems, answers, strict=True)]
        about["solved"] = statistics.mean(solved)
        print(f"{stage}: {sum(solved):.0f} of {len(problems)} unseen problems solved", flush=True)
    return [about, *curve]


def right(problem, answer):
    """Whether an answer states the result, on a line of its own, and nothing that is false."""
    try:
        corpus.check(problem["instruction"] + "\n" + answer)
    except ValueError:
        return False
    return problem["result"] in answer.splitlines()


def lines_of(path):
    """The records of a .jsonl file."""
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def solve(folder, problems, chat=True, n=1, temperature=0.0):
    """n answers of a run's model to each problem: as a conversation, or as a text that it goes on with."""
    net, tokenizer = train.load_run(folder)
    most = max(len(tokenizer.encode(problem["output"])) for problem in problems) + 1

    # Prompts of the same length are answered together.
    together = defaultdict(list)
    prompts = []
    for i, problem in enumerate(problems):
        if chat:
            ids, _ = data.chat_ids([dict(role="user", content=problem["instruction"])], tokenizer)
            prompts.append([*ids.tolist(), tokenizer.specials["<|assistant|>"]])
        else:
            prompts.append([tokenizer.eot, *tokenizer.encode(problem["instruction"] + "\n").tolist()])
        together[len(prompts[-1])].append(i)

    # An answer ends at the first special.
    found = [[] for _ in problems]
    for length, numbers in together.items():
        asked = torch.tensor([prompts[i] for i in numbers for _ in range(n)])
        written = model.generate(net, asked, most, temperature)[:, length:].tolist()
        for k, ids in enumerate(written):
            end = next((at for at, token in enumerate(ids) if token in tokenizer.specials.values()), most)
            found[numbers[k // n]].append(tokenizer.decode(ids[:end]))
    return found


# ---- the steps that have their commands here ---------------------------------------------------------------

def raw(folder, few=False):
    """Raw text, a .jsonl file for each domain; problems as conversations, and others that stay unseen; what
    will be said to the model."""
    if few:
        here = _note.HERE.parent
        texts = {name: [path.read_text("utf-8")[:6000] for path in sorted(here.glob(pattern))[:6]]
                 for name, pattern in (("prose", "notes/*.md"), ("code", "notes/*.py"))}
        texts["math"] = corpus.worked_math(20_000)
    else:
        texts = {name: corpus.documents(name) for name in RAW}

    # What is asked later stands nowhere in the text, in whatever words and order.
    known, unseen = sums(*((60, 4) if few else (4000, 200)))
    asked = {operands(problem["result"]) for problem in unseen}
    texts["math"] = [text for text in texts["math"] if not stated(text) & asked]

    # The folder gets its name when it is complete.
    partial = Path(f"{folder}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    records = {name: [dict(text=text) for text in some] for name, some in texts.items()}
    for name, some in (records | dict(sums=known, unseen=unseen)).items():
        write_lines(partial / f"{name}.jsonl", some)
    said = ["Add 27 and 15.", "What is 64 - 38?", "Find the sum: 8 and 90.", "Who are you?"]
    (partial / "talk.txt").write_text("\n/reset\n".join(said[-1:] if few else said) + "\n", "utf-8")
    partial.rename(folder)
    return dict(documents=sum(map(len, texts.values())),
                bytes=sum(len(text.encode()) for some in texts.values() for text in some))


SUM = re.compile(r"(?<![-+*/] )(?<![-\w])\d+ [-+] \d+ = \d+\b")       # not the end of a longer one


def operands(line):
    """What two sums or differences that are the same have in common: (sign, smaller, larger)."""
    a, sign, b, *_ = line.split()
    return sign, *sorted((int(a), int(b)))


def stated(text):
    """The operands of all sums and differences that a text works out, checks included."""
    return {operands(line) for line in SUM.findall(text)}


def sums(n, unseen):
    """n sums and differences of numbers up to 99, and others that the first n state nowhere, as records of
    conversations."""
    rng, found = Random(1), {}
    while len(found) < n + 4 * unseen:
        question, *steps = corpus.one_of(rng, corpus.addition, corpus.subtraction)(rng)
        result = next(filter(SUM.fullmatch, steps))
        key = operands(result)
        if key[-1] < 100:
            found.setdefault(key, dict(instruction=question, output="\n".join(steps), result=result))
    order = sorted(found)
    Random(2).shuffle(order)

    # The others have two digits: sums of one digit are steps of all.
    asked = [key for key in order if key[1] > 9][:unseen]
    known = [found[key] for key in order if not stated(found[key]["output"]) & set(asked)]
    return known[:n], [found[key] for key in asked]


def write_lines(path, records):
    with data.atomic(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def pairs(folder, path, out, first):
    """Four answers of the model to each of the first problems. A pair is a right one, or the worked solution
    if none is right, and a wrong one."""
    some = lines_of(path)[:first]
    answers = solve(folder, some, n=4, temperature=1.0)
    rows, count = [], 0
    for problem, texts in zip(some, answers, strict=True):
        good = [text for text in texts if right(problem, text)]
        bad = [text for text in texts if text.strip() and text not in good]
        count += len(good)
        if bad:
            rows.append(dict(prompt=problem["instruction"], chosen=(good or [problem["output"]])[0],
                             rejected=bad[0]))
    if not rows:
        raise ValueError(f"{folder}: all its answers are right, so there are no pairs; --first=N asks more")
    write_lines(out, rows)
    print(f"{out}: {len(rows)} pairs of {len(some)} problems; {count} of {4 * len(some)} answers are right")
    return dict(documents=len(rows), solved=count / 4 / len(some))


def compare(run, folder):
    """The largest difference between the logits of a run and of its export, read by this repository and, if
    it is installed, by transformers, which must also lay out a conversation in the same tokens."""
    net, tokenizer = train.load_run(run)
    asked = [dict(role="user", content="Add 27 and 15.")]
    ids, _ = data.chat_ids(asked, tokenizer)
    x = torch.from_numpy(ids).long()[None]
    with torch.no_grad():
        ours = net.eval()(x)
        found = dict(difference=(ours - load_hf(folder).eval()(x)).abs().max().item())
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError:
            print("transformers is not installed: the export is read by this repository alone")
        else:
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            found["transformers"] = (ours - theirs(x).logits).abs().max().item()
            read = AutoTokenizer.from_pretrained(folder).apply_chat_template(asked, return_dict=False)
            if read != ids.tolist():
                raise SystemExit(f"{folder}: transformers reads a conversation as other tokens: {read}")
    print(f"{folder}: the logits differ by at most " + apart(found))
    return found


def apart(found):
    """The differences of `compare` in words."""
    return ", ".join(f"{found[name]:.0e} {where}" for name, where in
                     (("difference", "here"), ("transformers", "in transformers")) if name in found)


STEPS = dict(raw=raw, pairs=pairs, compare=compare)


def step(words):
    """A command of this file: raw FOLDER [--few], pairs RUN PROBLEMS OUT --first=N, compare RUN EXPORT."""
    options = {}
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            options[name] = int(value) if value else True
    paths = [word for word in words[1:] if not word.startswith("--")]
    try:
        given = inspect.signature(STEPS[words[0]]).bind(*paths, **options)
    except TypeError as error:
        raise SystemExit(f"{words[0]}: {error}. {step.__doc__}") from None
    return STEPS[words[0]](*given.args, **given.kwargs)


# ---- page and figure ---------------------------------------------------------------------------------------

def size(row):
    """What a stage leaves or reads, in words."""
    sizes = []
    if "documents" in row:
        sizes.append(f"{row['documents']:,.0f} {'pairs' if row['arm'] == 'pairs' else 'documents'}")
    if "bytes" in row:
        sizes.append(f"{row['bytes'] / 1e6:.2f} MB")
    if "tokens" in row:
        sizes.append(f"{row['tokens']:,.0f} tokens")
    return ", ".join(sizes)


def score(row):
    """The scores of a stage, in words."""
    found = []
    if "read" in row:
        found.append(f"{row['read'] - row['documents']:,.0f} of {row['read']:,.0f} left out")
    if row["arm"] == "DPO":
        found.append(f"{row['after']:.0%} of unseen pairs in the right order")
    elif "before" in row:
        of = "answers: " if row["arm"] == "SFT" else ""
        found.append(f"{of}{row['before']:.3f} → {row['after']:.3f} bits/byte")
    if row["arm"] == "tokens":
        found.append(f"bigrams: {row['bpb']:.3f} bits/byte")
    if "solved" in row:
        whose = "sampled answers right" if row["arm"] == "pairs" else "unseen problems solved"
        found.append(f"{row['solved']:.0%} of {whose}")
    if "difference" in row:
        found.append(f"logits differ by {apart(row)}")
    return "; ".join(found)


def show(rows):
    stages = {row["arm"]: row for row in rows if "minutes" in row}
    figure, [(curves, solved, times)] = _note.panels(1, 3, width=13, height=3.6)

    # Bits/byte over the tokens of three stages, one after the other
    begin = 0
    for stage in ("pre-train", "anneal", "4 × context"):
        points = [row for row in rows if row["arm"] == stage and "seen" in row]
        at = [(begin + row["seen"]) / 1e6 for row in points]
        curves.plot(at, [row["bpb"] for row in points], "o-", ms=4, label=stage)
        begin += stages[stage]["tokens"]
    curves.axhline(stages["tokens"]["bpb"], color="0.4", ls=":", lw=1.5, label="bigrams")
    curves.set(xlabel="million tokens", ylabel="bits/byte, mean of 4 domains", ylim=(0, None))
    curves.legend()

    # What is solved after each stage, and how long each took
    after = "4 × context", "SFT", "DPO"
    bars = solved.bar(after, [100 * stages[stage]["solved"] for stage in after], color=_note.COLOURS[2])
    solved.bar_label(bars, fmt="{:.0f}%")
    solved.set(ylabel="unseen problems solved, %", ylim=(0, 105))
    names = list(stages)[::-1]
    bars = times.barh(names, [60 * stages[name]["minutes"] for name in names], color=_note.COLOURS[0])
    times.bar_label(bars, fmt=" {:.0f}", fontsize=8)
    times.set(xlabel="seconds")
    times.tick_params(axis="y", labelsize=9)

    table = _note.table(("stage", "size", "seconds", "score"),
                        *((name, size(row), f"{60 * row['minutes']:.0f}", score(row))
                          for name, row in stages.items()))
    talk = [line for line in stages["conversation"]["text"].splitlines() if line not in ("> /reset", ">")]
    return figure, [*table, "", "The conversation, as it was; each question begins a new one:", "", "```",
                    *talk, "```"]


def main(argv):
    if argv and argv[0] in STEPS:
        return step(argv)
    if "--quick" in argv:
        shutil.rmtree("out/quick/life", ignore_errors=True)
    _note.main("whole_life", cells, run, show, argv, folder=Path("out/life"))


if __name__ == "__main__":
    main(sys.argv[1:])
