"""Is anything lost when a run is killed, its files are damaged, or its machine changes?

Each fault strikes a real training process at a random moment. Then one command resumes the run, which must
end with the weights, optimizer state and log of an uninterrupted run: bit for bit, except for the last two
kinds, where the ranks change and only the losses have to be close.

  python -m notes.faults            the campaign          python -m notes.faults --quick      one of each
"""
import contextlib
import csv
import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import torch

import data
import muonclip
import train
from model import ModelConfig
from notes import _note

HERE = Path(__file__).parent.parent
KINDS = {
    "kill": "SIGKILL at a step", "kill in save": "SIGKILL at a line of the save",
    "kill in average": "SIGKILL while a snapshot is added or the mean put back",
    "kill in evaluation": "SIGKILL in an evaluation or before its row",
    "flipped byte": "a bit of a checkpoint's file",
    "flipped value": "a digit in a manifest that stays JSON",
    "missing file": "a file of a checkpoint is gone",
    "full disk": "no space left in the save", "stop in save": "SIGTERM or Ctrl-C in the save",
    "launcher killed": "torchrun alone", "rank killed": "one rank of two; torchrun restarts both",
    "layout changed": "all ranks, twice, each time resumed with other stages, ep and dp",
    "node killed": "agent and rank of one node of two, started again"}
SLOW = "layout changed", "node killed"


# ---- the run that is struck --------------------------------------------------------------------------------

MODEL = ModelConfig(n_layer=2, n_head=4, n_kv_head=4, d_model=32, d_head=8, d_ff=48, vocab_size=261,
                    context=32)
EXPERTS = replace(MODEL, n_layer=4, differential=False, act="silu", tie=False, q_rank=12, kv_rank=10,
                  d_rope=4, d_value=6, n_expert=8, n_dense=1, n_active=2, d_expert=16, n_group=4,
                  top_group=2, route_scale=2.0)
MIXED = dict(model=EXPERTS)
LAYOUTS = (1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)           # dp, ep
MESHES = [(1, "pp=1"), (2, "ep=2"), (4, "ep=4"), (2, "pp=2"), (4, "pp=4"), (4, "pp=2 ep=2"),
          (4, "pp=2 chunks=2"), (4, "pp=2 chunks=2 ep=2"),         # ranks, options of the mesh
          (2, "pp=2 chunks=2 recompute=norm,act,mla fp8=expert_up,act offload=true")]
PERIOD = dict(average_every=8 * 8 * 32, average_of=4)              # averages after 8, 16 and 24 of 30 steps
OPTIONS = *(f"--{key}={value}" for key, value in PERIOD.items()), "--eval_every=30"


def write_sentences(folder):
    """Write a small file of sentences with enough structure to learn from. → its path"""
    rng = random.Random(0)
    nouns = "river stone lamp garden engine letter winter harbour".split()
    verbs = "holds finds turns keeps".split()
    lines = (f"The {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)}.\n" for _ in range(2000))
    (folder / "mine.txt").write_text("".join(lines))
    return folder / "mine.txt"


def tiny_run(path, **changes):
    """The configuration of a run of 30 steps on the text at `path`, which takes a few seconds."""
    config = train.Config(model=MODEL, tokens=30 * 8 * 32, batch=8, micro=4, eval_every=10, eval_windows=4,
                          save_every=4, optim=muonclip.OptimConfig(lr=0.02, tau=0.3, exact_logits=True),
                          data=data.DataConfig(domains="mine:1:1", files=f"mine={path}", tokenizer="bytes",
                                               cache=str(path.parent / "cache")))
    return replace(config, **changes)


def command(path, out, *more, **changes):
    """The command line of such a run: [python, train.py, options]."""
    config = tiny_run(path, **changes)
    options = [f"--{f}={getattr(config, f)}"
               for f in ("tokens", "batch", "micro", "eval_every", "eval_windows", "save_every")]
    for part in ("model", "optim", "data"):
        default, own = getattr(train.RECIPES["laptop"], part), getattr(config, part)
        options += [f"--{part}.{f.name}={getattr(own, f.name)}" for f in fields(own)
                    if getattr(own, f.name) != getattr(default, f.name)]
    return [sys.executable, str(HERE / "train.py"), *options, f"--out={out}", *more]


def log_of(out):
    """The rows of log.csv, without the time and speed columns."""
    with open(out / "log.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in ("tokens_per_s", "mfu", "seconds")}
                for row in csv.DictReader(file)]


def weights_of(out):
    """The tensors of a run's newest checkpoint, by name."""
    return train.newest_checkpoint(out)[1]


# ---- processes ---------------------------------------------------------------------------------------------

def worker(args, log, befalls=(), number=0, fault=""):
    """A training process. The fault strikes before the `number`-th line of our code that runs inside the
    functions `befalls` of train.py or anything they call."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    count = itertools.count(1)

    def strike():
        if "kill" in fault:
            os.kill(os.getpid(), signal.SIGKILL)
        print("struck", flush=True)
        if fault == "stop in save":
            os.kill(os.getpid(), signal.SIGTERM if number % 2 else signal.SIGINT)
        elif os.path.ismount(Path(log).parent):                    # a disk of our own: fill it
            filler = Path(log).parent / "filler"
            with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 12))
        else:                                                      # otherwise, limit the size of files
            resource.setrlimit(resource.RLIMIT_FSIZE, (number % 1000, resource.RLIM_INFINITY))

    def trace(frame, event, _):
        if event == "line" and next(count) == number:
            strike()
        return trace if Path(frame.f_code.co_filename).parent == HERE else None

    def watched(f):
        @functools.wraps(f)
        def run(*args, **kwargs):
            sys.settrace(trace)
            try:
                return f(*args, **kwargs)
            finally:
                sys.settrace(None)
        return run
    for name in befalls:
        setattr(train, name, watched(getattr(train, name)))
    train.main(args)


def start(args, log, *fault):
    """Start a `worker` from a server process that has done the slow imports already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch._dynamo", "matplotlib.pyplot"])         # seconds each
    process = context.Process(target=worker, args=(args, str(log), *fault))
    process.start()
    return process


def wait_for(step, out, alive, saved=1):
    """Wait for this step in the log and for `saved` checkpoints. → False if the process ended first"""
    deadline = time.monotonic() + 90
    while alive():
        assert time.monotonic() < deadline, f"{out}: step {step} was not reached"
        if last_step(out) >= step and len(train.checkpoints(out)) >= saved:
            return True
        time.sleep(0.002)
    return False


def last_step(out):
    """The last step in the log, 0 if there is none yet."""
    with contextlib.suppress(FileNotFoundError, ValueError, IndexError):
        return int((out / "log.csv").read_text().splitlines()[-1].split(",")[0])
    return 0


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def under_torchrun(path, out, ranks, restarts=0, more=(), **changes):
    """Start the run on several ranks of this machine. → the launcher's process"""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
           f"--max-restarts={restarts}", *command(path, out, *OPTIONS, *more, **changes)[1:]]
    env = dict(os.environ, OMP_NUM_THREADS="1", TORCHELASTIC_ERROR_FILE="")
    return subprocess.Popen(run, stdout=open(out.parent / "log.txt", "a"), stderr=subprocess.STDOUT, env=env,
                            cwd=out.parent, start_new_session=True)


def node(path, out, number, port, *more):
    """One of two torchrun agents that play two nodes with one rank each; node 0 hosts the rendezvous."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
           "--max-restarts=3", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}",
           f"--rdzv-conf=is_host={int(number == 0)}", "--local-addr=127.0.0.1",
           *command(path, out, *OPTIONS, "--mesh.timeout=20", *more)[1:]]
    env = dict(os.environ, OMP_NUM_THREADS="1", TORCHELASTIC_ERROR_FILE="",
               TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    with open(out.parent / f"log-{number}.txt", "a") as log:
        return subprocess.Popen(run, stdout=log, stderr=subprocess.STDOUT, cwd=out.parent,
                                start_new_session=True, env=env)


# ---- faults ------------------------------------------------------------------------------------------------

def node_trial(path, out, whole, rng):
    """Two nodes, of which the one that does not host the rendezvous is killed, agent and rank, and started
    again with --resume. Meanwhile the other node restarts its own rank, and the run ends as if nothing had
    happened. → steps computed again"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    host, other = node(path, out, 0, port), node(path, out, 1, port)
    if not wait_for(rng.randrange(2, 20), out, lambda: host.poll() is None):
        return None
    children = Path(f"/proc/{other.pid}/task/{other.pid}/children").read_text().split()
    for pid in (other.pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)
    other.wait()
    reached, saved = last_step(out), int(train.checkpoints(out)[-1].name[-8:])
    other = node(path, out, 1, port, "--resume")
    ended_well = host.wait(180) == 0 and other.wait(60) == 0
    assert ended_well, "".join(log.read_text() for log in out.parent.glob("log-*.txt"))
    ours, theirs = log_of(out), log_of(whole)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    assert math.isclose(float(ours[-1]["val_mine"]), float(theirs[-1]["val_mine"]), rel_tol=2e-3)
    return max(0, reached - saved)


def layout_trial(path, out, whole, rng):
    """A MoE run is killed with all its ranks at a random moment, resumed in another layout, killed again and
    resumed in a third. Its log has every step, and its losses stay close to those of one process: in float32,
    rounding may send a token to another expert. → steps computed again"""
    layouts, again = rng.sample(MESHES, 3), 0
    for i, (ranks, mesh) in enumerate(layouts):
        more = ["--micro=2", *(f"--mesh.{option}" for option in mesh.split())] + ["--resume"] * (i > 0)
        launcher = under_torchrun(path, out, ranks, more=more, **MIXED)
        before = last_step(out)
        if i < 2 and wait_for(before + rng.randrange(1, 13), out, lambda: launcher.poll() is None):
            children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
            for pid in [launcher.pid, *map(int, children)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            launcher.wait()
            deadline = time.monotonic() + 30
            while any(is_alive(pid) for pid in map(int, children)):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            reached = last_step(out)
            again = max(again, reached - int(train.checkpoints(out)[-1].name[-8:]))
        elif i < 2:
            return None                                            # the run ended first
    code, said = launcher.wait(120), (out.parent / "log.txt").read_text()
    assert code == 0, said[-2000:]
    assert "Traceback" not in said.replace("torch/distributed", ""), said
    ours, theirs = log_of(out), log_of(whole)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for a, b in zip(ours, theirs):
        assert math.isclose(float(a["loss"] or 0), float(b["loss"] or 0), rel_tol=5e-3), (layouts, a["step"])
    assert math.isclose(float(ours[-1]["val_mine"]), float(theirs[-1]["val_mine"]), rel_tol=2e-3), layouts
    return again


def flip_value(file, rng):
    """Change one digit of a number in the manifest's configuration: still valid JSON, with another value."""
    text = file.read_text()
    config = text.index('"config"'), text.index("}\n }", text.index('"config"'))
    digits = [i for i in range(*config) if text[i].isdigit() and text[i - 1] in " .0123456789"]
    while True:
        at = rng.choice(digits)
        changed = text[:at] + rng.choice("0123456789") + text[at + 1:]
        with contextlib.suppress(ValueError):
            if json.loads(changed) != json.loads(text):
                return file.write_text(changed)


def befall(kind, path, out, rng):
    """Start a run and let the fault strike. → the step that the run had reached, None if it ended first"""
    if kind == "launcher killed":
        return kill_launcher(path, out, rng.randrange(1, 29))
    if kind == "rank killed":
        return kill_rank(path, out, rng.randrange(1, 29))
    if kind in ("kill", "flipped byte", "flipped value", "missing file"):
        return kill_and_damage(kind, path, out, rng)
    return strike_inside(kind, path, out, rng)


def kill_launcher(path, out, step):
    launcher = under_torchrun(path, out, 1)
    if not wait_for(step, out, lambda: launcher.poll() is None):
        return None
    pid = int((out / "lock").read_text())
    launcher.kill()
    launcher.wait()
    if is_alive(pid):
        try:
            train.RunFolder(out).close()
            assert not is_alive(pid), "the folder's lock was given away while the worker was alive"
        except ValueError as error:
            assert f"in use by process {pid}" in str(error)
    deadline = time.monotonic() + 25
    while is_alive(pid):
        assert time.monotonic() < deadline, "the worker outlives its launcher"
        time.sleep(0.01)
    return last_step(out)


def kill_rank(path, out, step):
    launcher, log = under_torchrun(path, out, 2, restarts=1), out.parent / "log.txt"
    if not wait_for(step, out, lambda: launcher.poll() is None):
        return None
    reached = last_step(out)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(children[step % 2]), signal.SIGKILL)
    assert launcher.wait(120) == 0, log.read_text()
    return reached if "lost contact" in log.read_text() or "Signal 9" in log.read_text() else None


def kill_and_damage(kind, path, out, rng):
    """SIGKILL at a step and then, unless the kind is just "kill", some damage to the newest checkpoint."""
    step, process = rng.randrange(1, 29), start(command(path, out, *OPTIONS)[2:], out.parent / "log.txt")
    struck = wait_for(step, out, process.is_alive, saved=1 if kind == "kill" else 2)
    process.kill()
    process.join()
    if not struck or process.exitcode != -signal.SIGKILL:
        return None
    if kind == "kill":
        return last_step(out)
    newest = train.checkpoints(out)[-1]
    file = newest / rng.choice(["manifest.json", "rank-0.safetensors"])
    if kind == "flipped value":
        flip_value(newest / "manifest.json", rng)
    elif kind == "missing file":
        file.unlink()
    else:
        raw = bytearray(file.read_bytes())
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        file.write_bytes(raw)
    return last_step(out)


def strike_inside(kind, path, out, rng):
    """Strike before a random line of the save, the averaging or the evaluation."""
    places = {"kill in average": (("add_snapshot_", "put_back_"), 400),
              "kill in evaluation": (("evaluate", "record"), 400)}
    where, lines = places.get(kind, (("save_checkpoint",), 4000))
    log = out.parent / "log.txt"
    process = start(command(path, out, *OPTIONS)[2:], log, where, rng.randrange(1, lines), kind)
    process.join(60)
    said = log.read_text() if log.exists() else ""
    assert "Traceback" not in said, said
    if kind == "stop in save":
        assert process.exitcode == 0, said
        return last_step(out) if "struck" in said else None
    if kind == "full disk":
        (out.parent / "filler").unlink(missing_ok=True)
        if "struck" in said and process.exitcode:
            assert process.exitcode == 1 and ("No space left" in said or "too large" in said), said
        return last_step(out) if "struck" in said else None
    return last_step(out) if process.exitcode == -signal.SIGKILL else None


LOCK = threading.Lock()


def never_stopped(folder, name):
    """The folder of a run without faults, trained on first use: "one" process, a "pair" of ranks, a "mixed"
    MoE."""
    path, out = folder / "mine.txt", folder / name / "run"
    with LOCK:
        if not path.exists():
            write_sentences(folder)
        if not out.exists():
            out.parent.mkdir()
            launcher = under_torchrun(path, out, 1 + (name == "pair"), **MIXED if name == "mixed" else {})
            assert launcher.wait(120) == 0, (out.parent / "log.txt").read_text()
    return out


def strike_and_resume(kind, path, folder, whole, rng):
    """One fault, one resume, one comparison. → steps computed again, None if the fault came too late"""
    out, log = folder / "run", folder / "log.txt"
    if kind == "layout changed":
        return layout_trial(path, out, whole, rng)
    if kind == "node killed":
        return node_trial(path, out, whole, rng)
    reached = befall(kind, path, out, rng)
    if reached is None:
        return None
    before = log.stat().st_size if log.exists() else 0
    if kind != "rank killed":                                      # torchrun has already resumed that one
        options = command(path, out, *OPTIONS)[2:]
        if kind == "flipped value":                                # let the configuration come from the run
            options = [option for option in options if option.startswith(("--out", "--data.cache"))]
        process = start([*options, "--resume"], log)
        process.join(60)
        assert process.exitcode == 0, log.read_text()
    said = log.read_bytes()[before if kind != "rank killed" else 0:].decode()
    if kind.startswith("flipped") or kind == "missing file":
        assert "damaged" in said and "trying the one before" in said, said
    assert log_of(out) == log_of(whole), kind
    ours, theirs = weights_of(out), weights_of(whole)
    assert ours.keys() == theirs.keys(), kind
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs), kind
    at = re.search(r"resuming .* at step (\d+)", said)
    return max(0, reached - int(at[1])) if at else 0


def trial(kind, number, folder):
    """Let the fault strike runs in `folder`, at moments seeded by `number`, until it strikes one in time.
    → steps computed again.  AssertionError: what was lost"""
    rng, out_of_space = random.Random(f"{kind} {number}"), kind == "full disk"
    whole = never_stopped(folder, {"rank killed": "pair", "layout changed": "mixed"}.get(kind, "one"))
    again = None
    while again is None:
        own = Path(tempfile.mkdtemp(dir=folder))
        disk = out_of_space and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", own],
                                               capture_output=True).returncode == 0
        try:
            again = strike_and_resume(kind, folder / "mine.txt", own, whole, rng)
        finally:
            if disk:
                subprocess.run(["umount", own])
        shutil.rmtree(own)
    return again


# ---- the note ----------------------------------------------------------------------------------------------

def cells(quick):
    return [(kind, number, None) for number in range(1 if quick else 16) for kind in KINDS
            if not quick or kind not in SLOW]


@functools.cache
def folder_of_all():
    """A temporary folder for all trials, which share the runs without faults. Removed when Python exits."""
    return tempfile.TemporaryDirectory()


def run(kind, number, _):
    try:
        yield dict(survived=1, again=trial(kind, number, Path(folder_of_all().name)))
    except AssertionError as error:
        print(f"{kind}, {number}: {error}")
        yield dict(survived=0, again=math.nan)


def show(rows):
    figure, [[axis]] = _note.panels(1, 1, width=8, height=4)
    table = []
    for y, kind in enumerate(KINDS):
        mine = [row for row in rows if row["arm"] == kind]
        again = [row["again"] for row in mine if row["survived"]]
        axis.scatter(again, [y + 0.5 * (i / max(1, len(again) - 1) - 0.5) for i in range(len(again))], s=14)
        if mine:
            table.append((kind, KINDS[kind], len(mine), len(again), _note.spread(again, 0) if again else "–"))
    axis.set(xlabel="steps computed again, of 30", yticks=range(len(KINDS)), yticklabels=KINDS,
             ylim=(len(KINDS), -1))
    total, survived = len(rows), sum(row["survived"] for row in rows)
    heading = "fault", "what it is", "tried", "survived", "steps computed again"
    return figure, [*_note.table(heading, *table), "", f"{survived:.0f} of {total} survived."]


if __name__ == "__main__":
    _note.main("faults", cells, run, show)
