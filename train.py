"""Train a recipe:  torchrun train.py [RECIPE] [--option=value ...]

  laptop        the default: Motif's block with MuonClip, on the text that comes with every Python
  gpt2          the control on the same text: GPT-2's block with AdamW
  laptop-k2     Kimi K2's block on the same text: latent attention, 16 experts (2 active and 1 shared)
  shakespeare   Motif's block on the bytes of one file, named by --data.files=shakespeare=PATH
  motif-2.6b deepseek-v3 kimi-k2   the reported runs; their stages are motif-2.6b-lc, kimi-k2-anneal, ...

  sft           learns the answers of conversations:  --init=RUN --data.files=chat=PATH
  dpo           learns which of two answers is better:  --init=RUN --data.files=pairs=PATH

  --out=FOLDER    the run folder (default: out/RECIPE)
  --resume        continue from the newest checkpoint in the run folder
  --init=FOLDER   start from the weights of another run (and its moments, if optimizer and objective are
                  the same) or of a Hugging Face folder, with its tokenizer; without a RECIPE, and for sft
                  and dpo, with its model too
  --steps=N       stop early; the schedules do not change
  --dry-run       print what would run
  --seed=N  --tokens=N  --batch=N  ...          every field of Config
  --model.*  --optim.*  --data.*  --mesh.*      fields of the nested configurations

A run folder holds log.csv and loss.png (updated during the run), the tokenizer, and ckpt/. On Ctrl-C or
SIGTERM the run saves a checkpoint and exits. Time is measured in tokens: learning rate and data mixture
are pure functions of the tokens seen, and a batch is a pure function of (seed, step). So a run resumed
from any checkpoint ends with the same numbers as one that was never stopped.
"""
import csv
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import parallel
from data import (MIXTURES, Batch, Batches, ChatBatches, Corpus, DataConfig, Windows, atomic, bigram_bits,
                  load_tokenizer, prepare, prepare_chats, write_atomically)
from kernels import attention_path, listed
from model import (PRESETS, Local, ModelConfig, Ops, Transformer, count_parameters, count_parts,
                   flops_per_token, generate, layer_costs, read_tensors, renormalise_, write_tensors)
from muonclip import (MuonClip, OptimConfig, add_snapshot_, averaging, describe, learning_rate,
                      put_back_, qk_clip_, weigh)
from parallel import MeshConfig, Zero1


# ---- configuration ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    """A run. Raises ValueError where fields are out of range or contradict each other."""
    recipe: str = "laptop"
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    # What is learned: text; the answers of conversations; or which of two answers is better.
    objective: str = "pretrain"  # pretrain | sft | dpo
    beta: float = 0.1            # dpo: how much a ratio to the reference counts        [2305.18290, App. B]

    # Budget: the schedules end where the tokens do.
    tokens: int = 2_000_000      # of the whole run
    batch: int = 16              # windows per step, over all ranks
    micro: int = 16              # windows per micro-batch, at most; their gradients accumulate

    # Evaluation.
    eval_every: int = 100        # steps
    eval_windows: int = 64       # per domain, spaced evenly over its validation text; 0 = all of it

    # Averaging: at the end of each period the weights become the mean of its snapshots.
    average_every: int = 0       # length of a period, in tokens; 0 = no averaging
    average_of: int = 6          # snapshots per period [Motif §3.2.2], spaced evenly inside it [ours]
    average_from: float = -1.0   # start, as a fraction of the tokens; -1 = with the decay [guess]
    average_reset: bool = False  # reset the optimizer's moments after an average [ours]

    # Non-finite steps, checkpoints, log.
    skip_nonfinite: bool = False   # skip and count steps whose loss or gradient is not finite; else stop
    save_every: int = 100        # steps between checkpoints
    keep: int = 2                # newest checkpoints kept
    log_every: int = 1           # steps between rows of the log

    # This run.
    seed: int = 0
    steps: int = 0               # stop after this step; 0 = when the tokens are spent
    compile: bool = False        # torch.compile the layers: 10–20% faster on a CPU, after half a minute
    init: str = ""               # folder of the initial weights; "" = random initialisation
    out: str = ""                # run folder; "" = write nothing (notes and tests)

    def __post_init__(self):
        # Ranges.
        for name in ("tokens", "batch", "micro", "eval_every", "save_every", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("eval_windows", "steps", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")
        if self.objective not in EVALUATED:
            raise ValueError(f"objective={self.objective!r}: have {', '.join(EVALUATED)}")
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta={self.beta}: must be positive")

        # Combinations, checked in this order: (whether it holds, the message if it does not).
        period = self.average_every // self.step_tokens
        norms = "qk_norm", "ngpt"
        undoes = next((f"model.{name}" for name in norms if getattr(self.model, name)), None)
        rules = [
            (not self.average_every or 1 <= self.average_of <= period,
             f"average_every={self.average_every} is {period} steps of {self.step_tokens} tokens: too few "
             f"for average_of={self.average_of} snapshots"),
            (self.average_every >= 0 and (self.average_from == -1 or 0 <= self.average_from <= 1),
             f"average_every={self.average_every} must not be negative, average_from={self.average_from} "
             "must lie in 0..1 (-1: with the decay)"),
            (not self.optim.tau or not undoes,
             f"optim.tau={self.optim.tau}: {undoes} undoes the clip, since queries and keys are normalised "
             "behind the weights that it shrinks: --optim.tau=0"),
            (not self.optim.weight_decay or not self.model.ngpt,
             f"optim.weight_decay={self.optim.weight_decay}: model.ngpt gives weights norm 1 after each "
             "step, there is nothing to decay: --optim.weight_decay=0"),
            (not self.compile or not self.mesh.split,
             "compile=true: not with mesh.split=true; a compiled backward would leave its weights' gradients "
             "for later only once, while it is traced"),
            (not self.compile or not (self.mesh.recompute or self.mesh.fp8 or self.mesh.offload),
             "compile=true: not with mesh.recompute, mesh.fp8 or mesh.offload; a compiled layer decides on "
             "its own what it keeps for the backward"),
            ("mla" not in parallel.names(self.mesh.recompute) or self.model.kv_rank,
             f"mesh.recompute={self.mesh.recompute}: the model has no latent attention that mla could "
             "recompute"),
            ("expert_up" not in parallel.names(self.mesh.fp8) or self.model.n_expert,
             f"mesh.fp8={self.mesh.fp8}: the model has no experts whose inputs expert_up could store"),
            (self.objective != "dpo" or self.batch % 2 == self.micro % 2 == 0,
             f"batch={self.batch}, micro={self.micro}: must be even, since a pair of answers may take two "
             "windows, which stay together"),
            (self.tokens >= self.step_tokens,
             f"tokens={self.tokens} is less than one step: {self.batch} windows of {self.model.context} "
             f"= {self.step_tokens} tokens"),
        ]
        for holds, message in rules:
            if not holds:
                raise ValueError(message)

    @property
    def step_tokens(self):
        """Tokens of one step, over all ranks."""
        return self.batch * self.model.context

    @property
    def total_steps(self):
        """Steps until the tokens are spent; `steps` may stop the run earlier."""
        return self.tokens // self.step_tokens


# What an evaluation tells of each domain, as columns of the log: see log_columns.
EVALUATED = dict(pretrain=("val", "bpb"), sft=("val", "bpb"), dpo=("val", "accuracy", "margin"))

# A short run: the momentum has a short memory.
LAPTOP = Config(model=PRESETS["laptop"], tokens=950_000, batch=8, micro=8,
                optim=OptimConfig(lr=1e-2, decay_start=0.3, floor=0.0, momentum=0.9))
RECIPES = {
    "laptop": LAPTOP,
    "gpt2": replace(
        LAPTOP, recipe="gpt2", model=PRESETS["gpt2"],
        optim=OptimConfig(name="adamw", lr=3e-3, warmup=0.05, decay="cosine", floor=0.1, tau=0)),
    "laptop-k2": replace(LAPTOP, recipe="laptop-k2", model=PRESETS["laptop-k2"]),
    "shakespeare": Config(
        recipe="shakespeare", model=PRESETS["shakespeare"], batch=12, micro=12, tokens=240 * 12 * 64,
        optim=OptimConfig(lr=1e-2, decay_start=0.3, floor=0.0, momentum=0.8, weight_decay=0.3),
        eval_windows=0, data=DataConfig(domains="shakespeare:1:1", tokenizer="bytes")),
}
# After pre-training. The model is that of `init`, and so is its context, the window.
SFT = replace(LAPTOP, recipe="sft", objective="sft", tokens=400_000, eval_every=50,
              optim=replace(LAPTOP.optim, lr=3e-3, warmup=0.05))
RECIPES |= dict(sft=SFT, dpo=replace(SFT, recipe="dpo", objective="dpo", optim=replace(SFT.optim, lr=2e-4)))

# The reported runs. A stage starts from the weights of the one before it (`init`). Batches: in windows.
# Warm-ups are written steps × windows × context / tokens; domains NAME:START_WEIGHT:END_WEIGHT.
BIG = dict(micro=1, eval_every=500, save_every=500, keep=3)                                       # [ours]
MOTIF = Config(                                                                          # [Motif §3.2.2]
    recipe="motif-2.6b", model=PRESETS["motif-2.6b"], tokens=2_500_000_000_000, batch=1024, **BIG,
    average_every=8_000_000_000, average_of=6,
    optim=OptimConfig(name="adamw", lr=5e-4, warmup=5000 * 1024 * 4096 / 2.5e12, decay="rsqrt",
                      decay_start=0.8, floor=0.25, tau=0),
    data=DataConfig(horizon=2_000_000_000_000,                                                 # [Table 2]
                    domains=MIXTURES["motif"]))
LC_RATE = 5e-4 / math.sqrt(1 + 15 * 0.84)     # MOTIF's rate 80B tokens before its end, 84% into its decay
DEEPSEEK = Config(                                                                    # [DeepSeek-V3 §4.2]
    recipe="deepseek-v3", model=PRESETS["deepseek-v3"], tokens=14_300_000_000_000, **BIG,
    batch=15_360,                               # from the first step; the report ramps it up from 3,072
    optim=OptimConfig(name="adamw", lr=2.2e-4, warmup=2000 * 15_360 * 4096 / 14.3e12, decay="cosine",
                      decay_start=10 / 14.3, floor=0.1, tau=0),
    data=DataConfig(domains="text:1:1"))
SETTLED = replace(DEEPSEEK.model, balance_rate=0.0)          # the router biases are frozen from here on
K2 = Config(                                                                              # [Kimi K2 §2.5]
    recipe="kimi-k2", model=PRESETS["kimi-k2"], tokens=15_500_000_000_000, batch=16_384, **BIG,
    mesh=MeshConfig(pp=16, chunks=2, ep=16),                                     # [§2.4.2; chunks: ours]
    optim=OptimConfig(lr=2e-4, warmup=500 * 16_384 * 4096 / 15.5e12, decay="cosine",
                      decay_start=10 / 15.5, floor=0.1),
    data=DataConfig(domains="web:1:1,code:1:1,math:1:1,knowledge:1:1"))              # weights: [guess]
K2_LONG_RATE = 2e-5 - 1.3e-5 * 400 / 460     # 2e-5 → 7e-6, linear over 460B tokens: 400B of them in  [guess]


def stage(before, recipe, tokens, lr, last, context, batch, **model):
    """The run that continues `before`: learning rate lr → last (linear), end weights of the mixture."""
    rates = dict(lr=lr, warmup=0.0, decay="linear", decay_start=float(lr == last), floor=last / lr)
    return replace(before, recipe=recipe, init=f"out/{before.recipe}", tokens=tokens, batch=batch,
                   model=replace(before.model, context=context, **model),
                   optim=replace(before.optim, **rates), data=replace(before.data, horizon=1))


# Replaces MOTIF's last 80B tokens, on the same curve: stop MOTIF with --steps=576973 before starting it.
MOTIF_LC = stage(MOTIF, "motif-2.6b-lc", 80_000_000_000, LC_RATE, 1.25e-4, 16_384, 256,
                 rope_theta=500_000.0)                                                          # [§3.2.3]
MOTIF_LC = replace(MOTIF_LC, optim=replace(MOTIF_LC.optim, decay="rsqrt"))

V3_2 = stage(replace(DEEPSEEK, model=SETTLED), "deepseek-v3-2", 333_000_000_000, 2.2e-5, 2.2e-5,
             4096, 15_360)
V3_3 = stage(V3_2, "deepseek-v3-3", 167_000_000_000, 7.3e-6, 7.3e-6, 4096, 15_360)
V3_32K = stage(V3_3, "deepseek-v3-32k", 1000 * 1920 * 32_768, 7.3e-6, 7.3e-6, 32_768, 1920,
               yarn=40.0)                                                                         # [§4.3]
V3_128K = stage(V3_32K, "deepseek-v3-128k", 1000 * 480 * 131_072, 7.3e-6, 7.3e-6, 131_072, 480)

ANNEAL = stage(K2, "kimi-k2-anneal", 400_000_000_000, 2e-5, K2_LONG_RATE, 4096, 16_384)
K2_LONG = stage(ANNEAL, "kimi-k2-32k", 60_000_000_000, K2_LONG_RATE, 7e-6, 32_768, 2048,
                yarn=32.0, yarn_fast=1.0)                                                        # [guess]

REPORTED = MOTIF, MOTIF_LC, DEEPSEEK, V3_2, V3_3, V3_32K, V3_128K, K2, ANNEAL, K2_LONG
RECIPES |= {config.recipe: config for config in REPORTED}


def parse_like(old, text, key):
    """The text of option `key`, converted to the type of its current value `old`. Raises ValueError."""
    try:
        if isinstance(old, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(old, int):
            number = float(text)
            if number != int(number):
                raise ValueError
            if "e" in text.lower():
                return int(number)
            return int(text)                           # exact, also above 2**53
        return type(old)(text)
    except (ValueError, KeyError, OverflowError):
        kind = dict(bool="true or false", int="a whole number", float="a number")[type(old).__name__]
        raise ValueError(f"--{key}={text}: must be {kind} (now {old})") from None


def override(node, options, prefix=""):
    """{"optim.lr": "3e-4"} → a new configuration. Nested dataclasses are named by dots.

    All options are applied at once, so that fields are checked in combination. Raises ValueError."""
    names = [f.name for f in fields(node) if f.name != "recipe"]

    # Sort the options into those of this dataclass and those of nested ones.
    changed = {}
    nested = {}
    for key, text in options.items():
        head, dot, rest = key.partition(".")
        if head not in names:
            raise ValueError(f"no option --{prefix}{key}; have {', '.join(names)}")
        old = getattr(node, head)
        if is_dataclass(old) and not dot:
            inner = ", ".join(f.name for f in fields(old))
            raise ValueError(f"--{prefix}{key}={text}: name a field: {inner}")
        if dot and not is_dataclass(old):
            raise ValueError(f"--{prefix}{key}={text}: {head} has no fields")
        if dot:
            nested.setdefault(head, {})[rest] = text
        else:
            changed[head] = parse_like(old, text, prefix + key)

    # A nested dataclass gets its own options in one call.
    for head, own in nested.items():
        changed[head] = override(getattr(node, head), own, f"{prefix}{head}.")
    return replace(node, **changed)


def options_of(node, prefix=""):
    """(dotted name, value) of every field of a configuration."""
    for f in fields(node):
        value = getattr(node, f.name)
        if is_dataclass(value):
            yield from options_of(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, value


def changes(old, new):
    """The fields in which two configurations differ: (dotted name, old, new)."""
    for (name, a), (_, b) in zip(options_of(old), options_of(new)):
        if a != b:
            yield name, a, b


# Paths, and how they are checked: they may differ between stops and between nodes.
PLACES = "out", "data.files", "data.cache", "data.verify"


def other_run(old, new):
    """The changes that make `new` a different run: all except paths, mesh and steps."""
    return [(name, a, b) for name, a, b in changes(old, new)
            if name != "steps" and name not in PLACES and not name.startswith("mesh.")]


def from_dict(kind, values):
    """The inverse of dataclasses.asdict. ValueError if the dataclass lacks a field."""
    known = {f.name for f in fields(kind)}
    for name in values:
        if name not in known:
            raise ValueError("this run was made with an option that is no more: "
                             f"{name}={values[name]!r}")

    # A dict is a nested configuration.
    kinds = dict(model=ModelConfig, optim=OptimConfig, data=DataConfig, mesh=MeshConfig)
    arguments = {}
    for name, value in values.items():
        if isinstance(value, dict):
            value = from_dict(kinds[name], value)
        arguments[name] = value
    return kind(**arguments)


# ---- checkpoints: written by every rank, read by any layout -------------------------------------------

def digest(manifest):
    """SHA-256 of a manifest that does not contain its own digest yet."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def sync_folder(path):
    """fsync a folder: makes the names of its files durable."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def save_checkpoint(run, step, tensors, facts, keep, mesh=parallel.Mesh()):
    """Write run/ckpt/step-N: one file per rank with its `tensors`, then the manifest, with `facts`.

    Everything is written to a temporary folder, fsynced, then renamed: a folder named step-N is whole.
    The newest `keep` checkpoints stay. Collective: all ranks call it."""
    ckpt = run / "ckpt"
    final = ckpt / f"step-{step:08d}"
    tmp = ckpt / f".saving-{step:08d}"
    rank = mesh.world.rank

    # An empty temporary folder: an interrupted save may have left one.
    if rank == 0:
        for unfinished in ckpt.glob(".saving-*"):
            shutil.rmtree(unfinished)
        tmp.mkdir(parents=True)
    parallel.barrier(mesh)

    # Each rank writes its own tensors; rank 0 collects the entries of all ranks.
    name = f"rank-{rank}.safetensors"
    write_tensors(tmp / name, tensors)
    own = {key: dict(file=name, shape=list(t.shape), dtype=str(t.dtype), sha256=parallel.checksum(t))
           for key, t in tensors.items()}
    entries = parallel.gather(own, mesh)

    # The manifest is the last file. Names are made durable inside out: in tmp, in ckpt, in run.
    if rank == 0:
        everyone = {key: entry for part in entries for key, entry in part.items()}
        manifest = dict(facts, step=step, tensors=everyone)
        with atomic(tmp / "manifest.json", "w") as file:
            json.dump(dict(manifest, sha256=digest(manifest)), file, indent=1)
        sync_folder(tmp)
        shutil.rmtree(final, ignore_errors=True)
        tmp.rename(final)
        sync_folder(ckpt)
        sync_folder(run)

        # Remove all but the newest `keep`, and all later steps: those are damaged, or were saved before the
        # run went back to an earlier checkpoint.
        kept = checkpoints(run)
        here = kept.index(final) + 1
        for old in kept[here:] + kept[:here][:-keep]:
            shutil.rmtree(old)
    parallel.barrier(mesh)


def checkpoints(run):
    """Folders of finished checkpoints, oldest first.

    Only names of step- and digits are ours: anything else, such as a copy made by hand, is not read,
    counted or removed."""
    ours = [p for p in (run / "ckpt").glob("step-*")
            if re.fullmatch(r"step-[0-9]{8,}", p.name) and p.is_dir()]
    return sorted(ours, key=lambda p: int(p.name[5:]))


class Saved(Mapping):
    """The tensors of a checkpoint by name, whichever ranks wrote them: `saved[name]`, or some rows of it.

    `tensors` {key: tensor}: a key is NAME, or NAME[START:STOP] for a shard of rows, or either followed by
    :STATE for a state of the optimizer. Nothing is read from disk or concatenated before it is asked for."""

    def __init__(self, tensors):
        self.parts = {}                                # name → [(first row, tensor)], in row order
        for key, t in tensors.items():
            name, start, state = re.fullmatch(r"([^\[\]]*?)(?:\[(\d+):\d+\])?(:\w+)?", key).groups()
            self.parts.setdefault(name + (state or ""), []).append((int(start or 0), t))
        for parts in self.parts.values():
            parts.sort(key=lambda part: part[0])

    def __iter__(self):
        return iter(self.parts)

    def __len__(self):
        return len(self.parts)

    def __getitem__(self, name):
        return self.rows(name)

    def shape(self, name):
        """The shape of the whole tensor."""
        parts = [t for _, t in self.parts[name]]
        if not parts[0].ndim:
            return parts[0].shape
        return torch.Size((sum(map(len, parts)), *parts[0].shape[1:]))

    def rows(self, name, start=0, stop=None):
        """Rows start..stop, concatenated if several files hold them; ValueError if some are missing. A
        scalar, such as the optimizer's step, has no rows and is returned whole."""
        parts = self.parts[name]
        if not parts[0][1].ndim:
            return parts[0][1]
        if stop is None:
            stop = self.shape(name)[0]
        shards = [t[max(start - at, 0):stop - at] for at, t in parts
                  if at < stop and at + len(t) > start]
        if sum(map(len, shards)) != stop - start:
            raise ValueError(f"the checkpoint has no rows {start} to {stop} of {name}")
        if len(shards) == 1:
            return shards[0]
        return torch.cat(shards)


# What damaged files raise when they are read.
DAMAGE = OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError


def read_manifest(folder):
    """The manifest of a checkpoint, once its digest is verified. Raises ValueError."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest.pop("sha256") != digest(manifest):
            raise ValueError("manifest.json is not what was written")
        return manifest
    except DAMAGE as error:
        raise ValueError(f"{folder} is damaged: {type(error).__name__}: {error}") from None


def read_checkpoint(folder, part=0, parts=1):
    """→ (manifest, Saved). Raises ValueError if anything is damaged.

    Verifies the shape and dtype of every tensor, and the checksums of those whose index is `part` modulo
    `parts`: ranks share that work."""
    manifest = read_manifest(folder)

    # Open the files and look up every tensor; the data itself is not read yet.
    try:
        entries = manifest["tensors"]
        names = {entry["file"] for entry in entries.values()}
        if any(Path(name).name != name for name in names):
            raise ValueError(f"{folder}: its manifest names files outside the folder")
        files = {name: read_tensors(folder / name) for name in names}
        tensors = {name: files[entry["file"]][name] for name, entry in entries.items()}
    except DAMAGE as error:
        raise ValueError(f"{folder} is damaged: {type(error).__name__}: {error}") from None

    # The checksum reads the whole tensor, so it comes after the cheap comparisons.
    for i, (name, t) in enumerate(tensors.items()):
        entry = entries[name]
        wrong = str(t.dtype) != entry["dtype"] or list(t.shape) != entry["shape"]
        if not wrong:
            wrong = i % parts == part and parallel.checksum(t) != entry["sha256"]
        if wrong:
            raise ValueError(f"{folder} is damaged: {name} is not what the manifest says")
    return manifest, Saved(tensors)


def newest_checkpoint(run, say=print, mesh=parallel.Mesh()):
    """→ (manifest, Saved) of a run's newest intact checkpoint, or None; damaged ones are reported.

    Collective: each rank verifies a share of the checksums, and all of them decide together. ValueError
    if ranks see different checkpoints."""
    limit = float("inf")
    while True:
        # The newest step not tried yet has to be the same on all ranks.
        steps = [int(p.name.removeprefix("step-")) for p in checkpoints(run)]
        step = max([s for s in steps if s < limit], default=-1)
        extremes = torch.tensor([step, -step], dtype=torch.float64, device=mesh.device)
        high, low = parallel.all_max(extremes, mesh).tolist()
        if high != -low:
            raise ValueError(f"ranks found checkpoints of steps {-low:.0f} to {high:.0f}: {run} must be "
                             "one folder that all of them see")
        if step < 0:
            return None

        # It is used only if it is intact on every rank.
        folder = run / "ckpt" / f"step-{step:08d}"
        damage = ""
        checkpoint = None
        try:
            checkpoint = read_checkpoint(folder, mesh.world.rank, mesh.world.size)
        except ValueError as error:
            damage = str(error)
        damaged = torch.tensor([float(bool(damage))], device=mesh.device)
        if not parallel.all_max(damaged, mesh).item():
            return checkpoint

        # Rank 0 has gathered what every rank found; the others have only their own.
        messages = parallel.gather(damage, mesh) or [damage]
        reason = next(filter(None, messages), "damaged")
        say(f"{reason}; trying the one before")
        limit = step


# ---- weights in ---------------------------------------------------------------------------------------

def restore(chunks, owners, saved, moments=True):
    """Copy the weights of a checkpoint into a model, given as the chunks of layers that are on this rank,
    which may have only this rank's experts.

    `owners`, if given, also load the masters (float32 weights) that this rank owns and, with `moments`, their
    optimizer state. ValueError lists every name and shape that does not match."""
    with torch.device("meta"):
        whole = Transformer(chunks[0].config).state_dict()

    # The weights have to match the whole model. NAME:STATE and mean/NAME in a checkpoint are no weights.
    weights = [name for name in saved if ":" not in name and "/" not in name]
    wrong = []
    for name, t in whole.items():
        if name not in weights:
            wrong.append(f"{name} missing for {tuple(t.shape)}")
        elif saved.shape(name) != t.shape:
            wrong.append(f"{name} {tuple(saved.shape(name))} for {tuple(t.shape)}")
    wrong += [f"{name} unknown" for name in weights if name not in whole]
    if wrong:
        raise ValueError(f"the checkpoint is of another architecture: {listed(wrong)}")

    # Stacked experts (3-D): only the rows of this rank's experts.
    for chunk in chunks:
        for name, p in chunk.state_dict().items():
            first = chunk.experts.start if p.ndim == 3 else 0
            p.copy_(saved.rows(name, first, first + len(p)))
    if owners is not None:
        owners.load(saved, moments)


def is_hf(folder):
    """Whether a folder is a Hugging Face model."""
    return (Path(folder) / "config.json").exists()


def kept_config(run):
    """The configuration in a run's newest intact manifest, or None. ValueError: it has an unknown field."""
    for folder in reversed(checkpoints(Path(run))):
        try:
            manifest = read_manifest(folder)
        except ValueError:
            continue                                   # `newest_checkpoint` will report the damage
        return from_dict(Config, manifest["config"])


def begin(config, chunks, owners, facts, mesh, say):
    """Load the weights of config.init: a run of ours, with its moments if the optimizer is the same, or
    a Hugging Face folder. Raises ValueError."""
    # A Hugging Face folder: it has no moments.
    if is_hf(config.init):
        from notes.huggingface import HFWeights
        restore(chunks, owners, HFWeights(config.init, config.model, say), moments=False)
        say(f"weights of {config.init}")
        return

    # One of our runs.
    checkpoint = newest_checkpoint(Path(config.init), say, mesh)
    if not checkpoint:
        raise ValueError(f"--init={config.init}: neither a run with a checkpoint nor a Hugging Face "
                         "folder")
    manifest, saved = checkpoint
    if manifest["tokenizer"] != facts["tokenizer"]:
        raise ValueError(f"--init={config.init} was trained with another tokenizer than "
                         f"--data.tokenizer={config.data.tokenizer}: leave that out to take its own")
    before = manifest["config"]
    alike = before["optim"]["name"], before.get("objective", "pretrain")
    same = alike == (config.optim.name, config.objective)
    restore(chunks, owners, saved, moments=same)
    what = "weights and moments" if same else "weights"
    say(f"{what} of {config.init} at step {manifest['step']}")


def data_of(config):
    """config.data, where a run with `init` has the tokenizer of those weights in place of the default
    "bpe". ValueError if they come without one."""
    if not config.init or config.data.tokenizer != "bpe":
        return config.data

    # The run's own copy first: `init` may have been removed since.
    for folder in filter(None, (config.out, config.init)):
        path = Path(folder) / "tokenizer.json"
        if path.exists():
            return replace(config.data, tokenizer=str(path))
    raise ValueError(f"--init={config.init} has no tokenizer.json: name its tokenizer with "
                     "--data.tokenizer=PATH/tokenizer.json, or a tiktoken name")


def corpus_of(config, launch=""):
    """The Corpus of a run: of text, or of conversations in its windows. See `prepare`."""
    c = config.model
    if config.objective == "pretrain":
        return prepare(data_of(config), c.vocab_size, launch)
    return prepare_chats(data_of(config), c.vocab_size, c.context, config.objective == "dpo", launch)


def load_run(folder, average=1):
    """(model, tokenizer) for sampling, of a run or of a Hugging Face folder.

    Of a run: its newest intact checkpoint, or the mean of its newest `average`. SystemExit if there are
    fewer, ValueError if they are damaged."""
    run = Path(folder)
    if is_hf(run):
        from notes.huggingface import load_hf
        tokenizer = load_tokenizer(run / "tokenizer.json")     # first: it is quick to fail
        return load_hf(run), tokenizer

    # The checkpoints, read one at a time.
    kept = checkpoints(run)[-average:]
    if len(kept) < average:
        raise SystemExit(f"{folder}: {len(kept)} checkpoints here, not {average}; train first (torchrun "
                         f"train.py --out={folder} --keep={average})")
    newest = newest_checkpoint(run)
    loaded = [newest]
    if average > 1:
        loaded = map(read_checkpoint, kept)
    elif newest is None:
        raise ValueError(f"{folder}: every checkpoint is damaged")

    # Their running mean.
    mean = {}
    for manifest, saved in loaded:
        model = Transformer(from_dict(Config, manifest["config"]).model)
        restore([model], None, saved)
        add_snapshot_(mean, model.state_dict(), average)
    put_back_(model.state_dict(), mean)
    if model.config.ngpt:
        renormalise_(model.state_dict())               # a mean of unit vectors is shorter than 1
    return model, load_tokenizer(run / "tokenizer.json")


# ---- the run folder -----------------------------------------------------------------------------------

class RunFolder:
    """log.csv, loss.png, tokenizer.json, ckpt/: written by one process, which holds the folder's lock.
    Raises ValueError if another process holds it."""

    def __init__(self, path):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.path / "lock", "a+")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock.seek(0)
            holder = self.lock.read().strip() or "?"
            raise ValueError(f"--out={path}: in use by process {holder}") from None

        # Name this process in the lock, for that message.
        self.lock.truncate(0)
        self.lock.write(str(os.getpid()))
        self.lock.flush()
        self.log = None

    def open_log(self, columns, step, say=print):
        """Open log.csv for appending, without its rows after `step`. → the remaining rows, as numbers

        An unreadable log is renamed and a new one is started: a run can be resumed without its log."""
        # Later rows are of steps that this process runs again.
        path = self.path / "log.csv"
        rows = []
        if path.exists():
            try:
                rows = self.read_log(path, step)
            except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
                aside = path.with_suffix(f".unreadable-{time.time_ns()}")
                path.rename(aside)
                say(f"{path} cannot be read ({type(error).__name__}: {error}): kept as {aside.name}, "
                    "begun anew")

        # Rewrite it in one piece, then append.
        with atomic(path, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        self.log = open(path, "a", newline="")
        self.writer = csv.DictWriter(self.log, columns)
        return [{k: float(v) for k, v in row.items() if v not in ("", None)} for row in rows]

    @staticmethod
    def read_log(path, step):
        """The rows of a log.csv up to `step`, as text, without one that a crash has torn."""
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file)
                    if row["step"].isdigit() and row["seconds"] and int(row["step"]) <= step]

        # Values have to be numbers.
        for row in rows:
            for text in row.values():
                float(text or 0)
        return rows

    def belongs_to(self, launches):
        """Record in launch.json the torchrun launches that run this: processes that torchrun restarts then
        resume it without --resume."""
        (self.path / "launch.json").unlink(missing_ok=True)
        if any(launches):
            write_atomically(self.path / "launch.json", json.dumps(sorted(set(launches))).encode())

    def write_row(self, row):
        """Append a row to the log, visible to readers at once."""
        self.writer.writerow(row)
        self.log.flush()

    def sync_log(self):
        """fsync the log."""
        os.fsync(self.log.fileno())

    def close(self):
        """Release the lock."""
        if self.log:
            self.log.close()
        self.lock.close()


# ---- evaluation, speed, signals -----------------------------------------------------------------------

def evaluate(chunks, batches, config, mesh, dtype=None, stop_asked=lambda: False, reference=None):
    """{domain: (nats/token, bits/byte)} over validation windows without overlap, shared among the ranks;
    with conversations, over the answers. Of pairs: (loss, accuracy, margin), see `Pairs`.

    None if a stop was requested on any rank during the evaluation."""
    results = {}
    token_bytes = torch.as_tensor(batches.corpus.tokenizer.token_bytes)
    for name in batches.corpus.domains:
        val = batches.val(name, config.eval_windows)
        sums = torch.zeros(len(Pairs._fields) if config.objective == "dpo" else 3, dtype=torch.float64)

        # What every window adds; those past the end are dropped.
        for windows, real in in_turn(len(val.x), config.micro, mesh):
            if asked_anywhere(stop_asked, mesh):
                return None
            batch = Batch(*(None if part is None else part[windows] for part in val))
            mean, nats = forward(chunks, batch, config, mesh, dtype)
            if mesh.pp.rank != mesh.pp.size - 1:
                continue
            if config.objective == "dpo":
                label = batch.label * real[:, None]
                sums += torch.stack(compare_pairs(label, nats, reference, config.beta)[0]).sum(1)
                continue
            targets = batch.y[real]
            total = mean[real].sum().item() * config.model.context
            if config.objective == "sft":
                learned = batch.label[real] != 0
                targets = targets[learned]
                total = nats[real][learned].sum().item()
            text_bytes = token_bytes[targets].sum().item()
            sums += torch.tensor([total, targets.numel(), text_bytes], dtype=torch.float64)

        # The totals of all ranks.
        sums = parallel.all_sum(sums.to(mesh.device), mesh).tolist()
        if config.objective == "dpo":
            pairs = Pairs(*sums)
            results[name] = [total / pairs.count for total in (pairs.loss, pairs.accuracy, pairs.margin)]
        else:
            nats, tokens, size = sums
            results[name] = nats / max(1, tokens), nats / math.log(2) / max(1, size)
    return results


def in_turn(n, micro, mesh):
    """Which of n windows this rank evaluates: a few micro-batches at a time, (numbers, which are real).

    The ranks of a stage take micro-batches in turn, and all take equally many, because an all-to-all needs
    every rank in a forward: the last one may be shorter, or past the end, where window 0 stands in. Pairs of
    answers need an even `micro`, so that the two windows of one are never in different micro-batches."""
    rounds = math.ceil(n / micro / mesh.dp.size)
    own = torch.arange(rounds * mesh.dp.size * micro).view(rounds, -1, micro)[:, mesh.dp.rank].flatten()
    inside = int((own < n).sum())
    own = own[:max(inside, len(own) - micro + 1)]

    # Windows that pass through a pipeline without a break.
    at_once = micro
    if mesh.pp.size > 1:
        at_once *= 4 * mesh.pp.size
    for windows in own.split(at_once):
        real = windows < n
        yield windows * real, real


def asked_anywhere(stop_asked, mesh):
    """Whether a stop was requested on any rank."""
    stop = torch.tensor([float(stop_asked())], device=mesh.device)
    return bool(parallel.all_max(stop, mesh).item())


@torch.no_grad()
def forward(chunks, batch, config, mesh, dtype=None):
    """The plan's forwards alone, which record nothing → nats/token of each window (b,), nats of each token
    (b, T), float64 on the CPU; zeros if the loss is on another stage."""
    for chunk in chunks.values():
        chunk.eval()
    plan = plans_of(config, len(batch.x), config.micro)[mesh.pp.rank]
    forwards = [act for act in plan if act.op == "F"]
    nats = torch.zeros(batch.x.shape, dtype=torch.float64, device=mesh.device)
    mean = parallel.execute(forwards, chunks, batch, config.micro, mesh, dtype, nats=nats)
    for chunk in chunks.values():
        chunk.train()
    return mean.cpu(), nats.cpu()


@functools.cache
def matmul_speed(device, dtype, seconds=0.2):
    """FLOP/s of a large square matmul on this device, the fastest of several: the denominator of MFU."""
    n = 4096 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    synchronize = getattr(torch, device.type).synchronize
    best = math.inf
    t0 = time.perf_counter()
    while time.perf_counter() - t0 < seconds or best == math.inf:
        synchronize()
        t1 = time.perf_counter()
        a @ a
        synchronize()
        best = min(best, time.perf_counter() - t1)
    return 2 * n ** 3 / best


class Stop:
    """Whether a stop is requested, by Ctrl-C, SIGTERM or the death of torchrun: asked between steps."""

    def __enter__(self):
        self.signalled = False
        self.previous = {}                             # signal → the handler to restore
        self.parent = os.getppid()

        def request(*_):
            self.signalled = True
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, request)
        except ValueError:
            pass                                       # not the main thread: the caller handles signals
        return self

    def asked(self):
        """Whether a stop was requested. When torchrun dies, its processes get another parent."""
        orphaned = "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent
        return self.signalled or orphaned

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def clock(seconds):
    """Seconds as h:mm:ss, or m:ss below an hour."""
    minutes, seconds = divmod(int(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
    return f"{minutes}:{seconds:02d}"


class Status:
    """The status line: rewritten in place on a terminal, printed every ten seconds elsewhere."""

    def __init__(self, quiet):
        self.quiet = quiet
        self.live = sys.stdout.isatty()
        self.last = 0.0                                # when the line was last shown
        self.logit = None                              # the last max_logit that was measured

    def __call__(self, row, config, left, end=False):
        """Show the row of a step, with `left` seconds to go. Rate-limited, except at the `end`."""
        self.logit = row.get("max_logit", self.logit)
        known = "" if self.logit is None else f"max logit {self.logit:.1f}  "
        self.show(f"step {row['step']}/{config.total_steps}  {row['tokens'] / 1e6:.2f}M tokens  "
                  f"loss {row['loss']:.3f}  lr {row['lr']:.1e}  "
                  f"{row['tokens_per_s'] / 1e3:.1f}k tokens/s  MFU {row['mfu']:.0%}  {known}"
                  f"{clock(left)} left", end)

    def show(self, text, end=False):
        """Show the status line. Rate-limited, except at the `end`."""
        interval = 0.2 if self.live else 10
        if self.quiet or not end and time.monotonic() - self.last < interval:
            return
        self.last = time.monotonic()

        # One line; on a terminal the next one overwrites it.
        line_end = "\n"
        if self.live:
            text = f"\r{text}\033[K"
            if not end:
                line_end = ""
        print(text, end=line_end, flush=True)

    def say(self, text):
        """Print a message on a line of its own."""
        if self.quiet:
            return
        if self.live:
            text = f"\r\033[K{text}"
        print(text, flush=True)


# ---- a run --------------------------------------------------------------------------------------------

@dataclass
class Run:
    """The state of a run: what a step reads and changes. Its arithmetic is in the functions below."""
    config: Config
    mesh: parallel.Mesh
    corpus: Corpus
    batches: Batches
    chunks: dict                       # {index: this rank's range of layers}
    owners: Zero1                      # who owns which weights, with masters and optimizers
    status: Status
    stop: Stop
    facts: dict                        # for every manifest: configuration, hashes of data and tokenizer
    dtype: torch.dtype = None          # of the computation; None = that of the weights
    folder: RunFolder = None           # log and figure, on rank 0 of a run that is written
    savings: parallel.Savings = None   # how what the backward needs is kept; None = by autograd
    reference: dict = field(default_factory=dict)  # dpo: {side: (P, 2) log-probability of each answer}
    mean: dict = field(default_factory=dict)       # {name: mean} of this period's snapshots so far
    history: list = field(default_factory=list)    # rows of the log
    step: int = 0                      # steps done
    seconds: float = 0.0               # spent in steps, without evaluation
    skipped: int = 0                   # steps whose loss or gradient was not finite

    def __post_init__(self):
        # What the chunks hold: parameters and buffers by name, attentions and mixtures by layer.
        config = self.config
        self.name_of = {p: name for name, p in named_parameters(self.chunks).items()}
        self.buffers = {}
        self.attentions = {}
        self.mixtures = {}
        for chunk in self.chunks.values():
            self.buffers |= router_biases(chunk)
            self.attentions |= by_layer(chunk.attentions())
            self.mixtures |= by_layer(chunk.mixtures())

        # Of the whole model: its layers with experts.
        c = config.model
        self.sparse = range(c.n_dense, c.n_layer) if c.n_expert else range(0)
        self.last = min(config.total_steps, config.steps or config.total_steps)
        self.flops = flops_per_token(config.model)
        self.machine_flops = matmul_speed(self.mesh.device, self.dtype or torch.float32)

    @property
    def model(self):
        """The first chunk of this rank: without a pipeline, the model."""
        return next(iter(self.chunks.values()))

    def layers(self):
        """The layers on this rank."""
        return [layer for chunk in self.chunks.values() for layer in chunk.layers.values()]


def train(config, resume=False, quiet=False, watch=None):
    """Run a recipe → (history, model). history: the rows of the log, as dicts; the first is from before
    training. watch(step, model) is called after every step. With a pipeline, the model is only the first
    chunk of layers on this rank.

    The run is kept in the folder config.out, and `resume` continues from its newest intact checkpoint;
    without an `out` nothing is written. Raises ValueError on bad input, before any work is lost."""
    folder = None
    world = parallel.world_size()

    # Refuse what cannot run before anything is written.
    check_mesh(config, world)
    try:
        # Rank 0 takes the folder, and its lock.
        if parallel.this_rank() == 0 and config.out:
            if not resume and any((Path(config.out) / name).exists() for name in ("ckpt", "log.csv")):
                raise ValueError(f"--out={config.out} holds a run already: add --resume to go on, or name "
                                 "another folder")
            folder = RunFolder(config.out)

        # Prepare the data before the ranks first wait for each other: it may take longer than their
        # timeout. On each node, the first rank of a launch verifies the shards' digests, and the others rely
        # on that. The restart count is part of the name, so that a restart verifies them again.
        launch = parallel.launch_id()
        if launch:
            launch += " " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        corpus = corpus_of(config, launch)
        horizon = config.data.horizon or config.tokens
        kind = ChatBatches if corpus.pack else Batches
        batches = kind(corpus, replace(config.data, horizon=horizon), config.seed, config.batch,
                       config.model.context)

        # Join the other ranks, and run.
        mesh = parallel.join_mesh(config.mesh, must_be_alike(config, resume, corpus))
        with Stop() as stop:
            status = Status(quiet or mesh.world.rank > 0)
            run = start(config, resume, mesh, corpus, batches, status, stop, folder)
            loop(run, watch)
        parallel.leave_mesh()
        return run.history, run.model
    finally:
        parallel.abandon_mesh()
        if folder:
            folder.close()


def check_mesh(config, world):
    """Raise ValueError unless `world` ranks can be laid out as config.mesh says."""
    c = config.model
    config.mesh.check(world, config.batch, c.n_expert, math.ceil(c.n_layer / c.share_kv))
    if config.objective == "dpo" and config.batch * config.mesh.pp // world % 2:
        raise ValueError(f"--batch={config.batch} gives each rank an odd number of windows, but a pair of "
                         "answers may take two")
    if config.mesh.offload:
        plans = plans_of(config, config.batch * config.mesh.pp // world, config.micro)
        if not any(map(parallel.absences, plans)):
            raise ValueError("mesh.offload=true: in this plan every backward follows its forward so soon "
                             "that nothing could wait on the host; it takes more stages (mesh.pp), chunks "
                             "(mesh.chunks) or micro-batches (a smaller micro)")


def must_be_alike(config, resume, corpus):
    """{name: text} that has to be equal on all ranks. Paths may differ, but not what is found there."""
    alike = {name: repr(value) for name, value in options_of(config)
             if name not in (*PLACES, "init", "data.tokenizer")}
    return alike | dict(resume=str(resume), text=corpus.fingerprint,
                        tokenizer=corpus.tokenizer.fingerprint, torch=torch.__version__)


def head_widths(c):
    """The widths of a query and of a value in one head."""
    if c.kv_rank:
        return c.d_head + c.d_rope, c.d_value
    return c.d_head, 2 * c.d_head if c.differential else c.d_head


def start(config, resume, mesh, corpus, batches, status, stop, folder):
    """Build a Run: at step 0, or at the checkpoint that it resumes."""
    # Model and owners. GPUs compute in bfloat16.
    dtype = torch.bfloat16 if mesh.device.type == "cuda" else None
    savings = savings_of(config)
    chunks = build(config, mesh, dtype, savings)
    owners = owners_of(config, chunks, mesh)
    facts = dict(config=asdict(config), data=corpus.fingerprint, tokenizer=corpus.tokenizer.fingerprint)
    run = Run(config, mesh, corpus, batches, chunks, owners, status, stop, facts, dtype, folder, savings)
    status.say(f"{config.recipe}: {count_parameters(config.model)['total']:,} parameters, "
               f"{config.total_steps} steps of {config.batch} × {config.model.context} tokens on "
               f"{mesh.world.size} × {mesh.device.type}")
    for domain in corpus.domains.values():
        if domain.said:
            status.say(f"  {domain.said}")
    for line in (*describe(all_parameters(config.model).items(), config.optim), *owners.describe()):
        status.say(f"  {line}")
    if mesh.pp.size > 1:
        status.say(f"  {pipeline_line(config, mesh.dp.size)}")
    if dtype:
        status.say(f"  {attention_path(mesh.device, dtype, *head_widths(config.model))}")

    # The weights: of a checkpoint, of `init`, or new. All ranks must have the same.
    manifest = take_up(run, resume)
    weights = {name: t for chunk in chunks.values() for name, t in chunk.state_dict().items()}
    parallel.compare_weights(weights, mesh, tied_names(config.model))
    launches = parallel.gather(parallel.launch_id(), mesh)
    if config.objective == "dpo" and not manifest and not take_reference(run):
        run.last = run.step
        return run

    # The log keeps its rows up to the checkpoint; a new run has none.
    if folder:
        folder.belongs_to(launches)
        columns = log_columns(corpus.domains, run.sparse, config.objective)
        newest_row = run.step if manifest else -1
        run.history = folder.open_log(columns, newest_row, status.say)
        corpus.tokenizer.save(folder.path / "tokenizer.json")
        logits = (row["max_logit"] for row in reversed(run.history) if "max_logit" in row)
        status.logit = next(logits, None)

    # The counters come from the checkpoint, or else from the log.
    counters = {}
    if run.history:
        counters |= run.history[-1]
    if manifest:
        counters |= manifest
    run.seconds = counters.get("seconds", 0.0)
    run.skipped = int(counters.get("skipped", 0))

    # A new run saves its start, so that it can be resumed from there.
    row = dict(step=0, tokens=0, seconds=0.0)
    if manifest:
        row = manifest.get("row")
    else:
        save(run, row)

    # Log this step's row if it is missing: the run is new, or was stopped during this step's evaluation.
    logged = bool(run.history) and run.history[-1]["step"] == run.step
    logged = torch.tensor([float(logged)], device=mesh.device)
    if row and not parallel.all_max(logged, mesh).item() and not record(run, row):
        run.last = run.step

    # Layers are alike: one compilation serves all.
    if config.compile:
        for layer in run.layers():
            layer.compile_parts()
    return run


def take_up(run, resume):
    """Load the run's newest intact checkpoint if `resume`, or else the weights of config.init, if any.

    → the checkpoint's manifest, or None. ValueError if it is of another run, or all are damaged."""
    config, owners, facts, mesh = run.config, run.owners, run.facts, run.mesh
    chunks = list(run.chunks.values())
    say = run.status.say
    checkpoint = None
    if resume:
        checkpoint = newest_checkpoint(Path(config.out), say, mesh)

    # No checkpoint: the run starts at step 0.
    if not checkpoint:
        if resume and checkpoints(Path(config.out)):
            raise ValueError(f"{config.out}: every checkpoint is damaged; name another --out to start "
                             "again")
        if resume:
            say(f"resuming {config.out} at step 0")
        if config.init:
            begin(config, chunks, owners, facts, mesh, say)
        return None

    # It must be of the same tokenizer, data and configuration.
    manifest, saved = checkpoint
    for what in ("tokenizer", "data"):
        if manifest[what] != facts[what]:
            raise ValueError(f"{config.out} was trained with another {what} ({manifest[what][:12]}, now "
                             f"{facts[what][:12]}): same Python, --data options and files are needed to "
                             "go on")
    restore(chunks, owners, saved)
    wrong = other_run(from_dict(Config, manifest["config"]), config)
    if wrong:
        raise ValueError(f"the checkpoint of step {manifest['step']} in {config.out} was made with "
                         + "; ".join(f"{name}={old}, not {new}" for name, old, new in wrong))
    say(f"resuming {config.out} at step {manifest['step']}")
    run.step = manifest["step"]
    if config.objective == "dpo":
        run.reference = {side: saved[f"reference/{side}"].clone() for side in run.batches.sides}

    # The mean of the snapshots so far: of what this rank owns, and of the buffers.
    if any(name.startswith("mean/") for name in saved):
        mean = {piece.key: saved.rows(f"mean/{piece.name}", piece.start, piece.stop)
                for piece in owners.trained()}
        mean |= {name: saved[f"mean/{name}"] for name in run.buffers if f"mean/{name}" in saved}
        run.mean = {name: t.clone().to(mesh.device) for name, t in mean.items()}
    return manifest


def loop(run, watch=None):
    """Run steps until the last one, or until a stop is requested."""
    while run.step < run.last:
        row, stop = train_step(run)
        if watch:
            watch(run.step, run.model)
        stop = finish(run, row, stop and run.step < run.last)
        left = (run.last - run.step) * run.seconds / run.step
        run.status(row, run.config, left, end=run.step == run.last)
        if stop:
            how = f"; go on with --out={run.config.out} --resume" if run.folder else ""
            run.status.say(f"stopped at step {run.step}{how}")
            break

    # Undo torch.compile: sampling adds a token at a time, and each new length would recompile.
    if run.config.compile:
        for layer in run.layers():
            layer.compile_parts(False)


# ---- objectives: a weight for each token --------------------------------------------------------------
# The batches bring the weights of a mean over the answers' tokens, which is all of SFT. DPO makes them here:
#     L = -1/P Σ log σ(m),   m = β [log π(c)/π_ref(c) - log π(r)/π_ref(r)]                         (1)
# over P pairs of answers, c better than r. Its gradient is that of the sum of weight × (-log π(token)) with
#     weight = ± β σ(-m) / P,   + at tokens of c, - at tokens of r                                  (2)
# where m is a number, from a forward of the same weights. [2305.18290, eq. 7 and the gradient after it]

class Pairs(NamedTuple):
    """Of pairs of answers: values of each (P,), or sums over several pairs. A reward is β log π/π_ref."""
    loss: torch.Tensor           # -log σ(margin)
    count: torch.Tensor          # 1
    chosen: torch.Tensor         # reward of the chosen answer
    rejected: torch.Tensor
    accuracy: torch.Tensor       # 1 if the chosen answer has the higher one, ½ if they are equal
    margin: torch.Tensor         # chosen - rejected                                                   (1) m
    logp_chosen: torch.Tensor    # log π(chosen), the sum over its tokens
    logp_rejected: torch.Tensor
    lost: torch.Tensor           # log π_ref/π of both answers
    tokens: torch.Tensor         # of both

    def logged(self):
        """Means over the pairs, by the names of LOGGED_PAIRS. kl is in nats/token: how much less likely the
        answers are than under the reference, which estimates KL(π_ref ‖ π) if it has written them."""
        means = [total / self.count for total in self[2:8]]
        return dict(zip(LOGGED_PAIRS, [*means, self.lost / self.tokens]))


LOGGED_PAIRS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
                "logps/rejected", "kl")


def log_probabilities(label, nats):
    """label (b, T), the number of each token's pair as in data.packed, and nats (b, T) → of the p pairs there
    number - 1 (p,), log-probabilities of both answers (p, 2), their tokens (p, 2); and each target's pair."""
    # The same pair may come twice, in two packs of two windows.
    target = label != 0
    pack = torch.arange(len(label))[:, None] // 2
    most = int(label.abs().max()) + 1
    found, at = torch.unique((pack * most + label.abs())[target], return_inverse=True)
    side = (label[target] < 0).long()
    sums = torch.zeros(2, len(found), 2, dtype=torch.float64)
    values = torch.stack([-nats[target], torch.ones_like(nats[target])])
    sums.index_put_((torch.arange(2)[:, None], at, side), values, accumulate=True)
    return found % most - 1, *sums, at


def compare_pairs(label, nats, reference, beta):
    """→ Pairs, values of each; their numbers - 1; and m of every token's pair (b, T), 0 where there is no
    target. reference (P, 2): the log-probabilities of all answers under the reference."""
    number, logps, tokens, at = log_probabilities(label, nats)
    ratios = logps - reference[number]                                                     # (p, 2)
    rewards = beta * ratios
    margin = rewards[:, 0] - rewards[:, 1]
    pairs = Pairs(-F.logsigmoid(margin), torch.ones_like(margin), *rewards.T, (1 + margin.sign()) / 2, margin,
                  *logps.T, -ratios.sum(1), tokens.sum(1))
    of_token = torch.zeros_like(nats)
    of_token[label != 0] = margin[at]
    return pairs, number, of_token


def weigh_pairs(run, batch):
    """→ the batch with its weights (2), and sums as of sums_of, with those of Pairs appended. Only the last
    stage, which has the loss, makes them. A forward gives m: both answers of a pair are on this rank."""
    config, mesh = run.config, run.mesh
    sums = torch.zeros(len(run.corpus.domains), 3 + len(Pairs._fields), dtype=torch.float64)
    _, nats = forward(run.chunks, batch, config, mesh, run.dtype)
    if mesh.pp.rank < mesh.pp.size - 1:
        return batch, sums.to(mesh.device)
    pairs, number, margin = compare_pairs(batch.label, nats, run.reference["train"], config.beta)
    push = config.beta * torch.sigmoid(-margin)                                            # (b, T)

    # By the domains of the pairs, whose numbers run through all domains.
    ends = torch.from_numpy(run.batches.pairs["train"][1:])
    sums.index_add_(0, torch.searchsorted(ends, number, right=True),
                    torch.stack([pairs.loss, pairs.count, torch.zeros_like(pairs.loss), *pairs], 1))
    sums[:, 2] = torch.bincount(batch.domain, minlength=len(sums))
    return batch._replace(weight=batch.weight * push.to(batch.weight.dtype)), sums.to(mesh.device)


def take_reference(run):
    """Set run.reference: log-probabilities of answers under the weights that the run begins with, which every
    checkpoint keeps; of the answers that its steps draw and its evaluations use, NaN of others. → False if a
    stop was requested meanwhile."""
    config, mesh, batches = run.config, run.mesh, run.batches
    used = batches.ever(config.total_steps, config.eval_windows)
    done, total = 0, sum(len(window) for _, window in used.values())
    reference = {}
    for side, (domain, window) in used.items():
        sums = torch.zeros(int(batches.pairs[side][-1]), 3, dtype=torch.float64)       # of both answers; 1
        for at, real in in_turn(len(window), config.micro, mesh):
            at = at.numpy()
            if asked_anywhere(run.stop.asked, mesh):
                run.status.say("stopped before the reference was complete: the same command begins again")
                return False
            batch = batches.cut(side, domain[at], window[at])
            _, nats = forward(run.chunks, batch, config, mesh, run.dtype)
            if mesh.pp.rank == mesh.pp.size - 1:
                number, logps, _, _ = log_probabilities(batch.label * real[:, None], nats)
                sums[number] += F.pad(logps, (0, 1), value=1.0)
            done = min(done + len(at) * mesh.dp.size, total)
            run.status.show(f"reference: {done:,} of {total:,} windows", done == total)
        sums = parallel.all_sum(sums.to(mesh.device), mesh).cpu()
        reference[side] = sums[:, :2].where(sums[:, 2:] > 0, math.nan)
    run.reference = reference
    return True


def sums_of(run, batch, mean, nats):
    """What this rank's windows add to the sums of each domain, (D, 3): losses; how many windows, or with nats
    targets, have them; windows. mean (b,): nats/token of each window; nats (b, T): of each token."""
    device = run.mesh.device
    sums = torch.zeros(len(run.corpus.domains), 3, dtype=torch.float64, device=device)
    if run.mesh.pp.rank == run.mesh.pp.size - 1:
        loss, count = mean, torch.ones_like(mean)
        if nats is not None:
            targets = (batch.label != 0).to(device)
            loss, count = (nats * targets).sum(1), targets.sum(1)
        sums.index_add_(0, batch.domain.to(device), torch.stack([loss, count, torch.ones_like(mean)], 1))
    return sums


# ---- one step -----------------------------------------------------------------------------------------

class Seen(NamedTuple):
    """Statistics of a step's forward and backward, over all ranks."""
    stop: bool                   # requested on any rank
    unwell: list                 # ranks whose loss or gradient is not finite
    logits: torch.Tensor         # (n_layer, n_head) largest logit of each head
    loads: torch.Tensor          # (layers with experts, n_expert) tokens routed to each expert
    nats: list                   # losses summed over each domain: over its windows, targets or pairs
    counts: list                 # how many windows, targets or pairs these are
    windows: list                # number of windows of each domain
    loss: float                  # nats/token; dpo: nats/pair
    pairs: Pairs                 # dpo: sums over all pairs


def train_step(run):
    """One step → (its row of the log, whether a stop was requested)."""
    config, mesh, owners = run.config, run.mesh, run.owners
    began = time.perf_counter()

    # Forward and backward of this rank's windows; two collectives share the statistics.
    lr = learning_rate(run.step * config.step_tokens, config)
    owners.set_rate(lr)
    exact = clear_records(run)
    batch = run.batches(run.step, mesh.dp.rank, mesh.dp.size)
    sums = nats = None
    if config.objective == "dpo":
        batch, sums = weigh_pairs(run, batch)
    if config.objective == "sft":
        nats = torch.zeros(batch.x.shape, dtype=torch.float64, device=mesh.device)
    plan = plans_of(config, len(batch.x), config.micro)[mesh.pp.rank]
    mean = parallel.execute(plan, run.chunks, batch, config.micro, mesh, run.dtype, run.savings,
                            owners.begin_reduce, nats=nats)
    if sums is None:
        sums = sums_of(run, batch, mean, nats)
    seen = share_what_was_seen(run, sums)

    # Gradients go to their owners. All ranks decide alike whether to use them, from the same numbers.
    owners.reduce()
    norm = owners.clip_norm_(config.optim.clip_norm).item()
    sound = math.isfinite(seen.loss) and math.isfinite(norm)
    if not sound:
        skip(run, seen, norm)
    run.step += 1

    # Owners update, clip and average their masters; then every rank gets the weights.
    update(run, sound, seen)
    owners.drop()
    took = time.perf_counter() - began
    run.seconds += took
    return log_row(run, seen, lr, norm, sound, exact, took), seen.stop


def clear_records(run):
    """Reset the step's largest logits and expert loads. → whether its logits will be exact

    Exact logits cost an extra pass. In other steps, on a CPU, a head that a cheap bound proves to stay at or
    below tau records that bound: QK-Clip leaves it alone either way. Every 50th step is exact."""
    optim = run.config.optim
    exact = optim.exact_logits or run.config.compile or run.step % 50 == 0
    threshold = None if exact else optim.tau or math.inf
    for attention in run.attentions.values():
        attention.clear_logits(threshold)
    for moe in run.mixtures.values():
        moe.load.zero_()
    return exact


def share_what_was_seen(run, sums):
    """Combine the statistics of all ranks → Seen. Two collectives: one of maxima, one of sums.

    sums: see sums_of. Each attention gets its largest logits, for QK-Clip. What is on other stages counts as
    -∞ in a maximum, and as 0 in a sum."""
    config, mesh = run.config, run.mesh
    c = config.model

    # Maxima: two kinds of flags (stop requested; rank r is not finite), and every head's logit.
    flags = torch.zeros(1 + mesh.world.size, device=mesh.device)
    flags[0] = float(run.stop.asked())
    flags[1 + mesh.world.rank] = ~(run.owners.sound() & sums.isfinite().all())
    logits = torch.full((c.n_layer, c.n_head), -math.inf, device=mesh.device)
    for layer, attention in run.attentions.items():
        logits[layer] = attention.max_logits
    maxima = parallel.all_max(torch.cat([flags, logits.flatten()]), mesh)
    flags, logits = maxima.tensor_split([len(flags)])
    logits = logits.view(c.n_layer, c.n_head)
    for layer, attention in run.attentions.items():
        attention.max_logits.copy_(logits[layer])

    # Sums: losses and windows by domain, and tokens routed to every expert.
    loads = torch.zeros(len(run.sparse), c.n_expert, dtype=torch.float64, device=mesh.device)
    for layer, moe in run.mixtures.items():
        loads[run.sparse.index(layer)] = moe.load
    counted = parallel.all_sum(torch.cat([sums.flatten(), loads.flatten()]), mesh)
    sums, loads = counted[:sums.numel()].view(sums.shape), counted[sums.numel():]

    # The first of the step's two host syncs with a GPU; the other one fetches the gradient norm.
    stop, *unwell = flags.tolist()
    sums = sums.cpu()
    nats, counts, windows, *_ = sums.T.tolist()
    loss = (sums[:, 0].sum() / max(1, sum(counts))).item()
    pairs = None
    if config.objective == "dpo":
        pairs = Pairs(*sums[:, 3:].sum(0).tolist())
    return Seen(stop=bool(stop), unwell=[rank for rank, flag in enumerate(unwell) if flag],
                logits=logits, loads=loads.view(len(run.sparse), c.n_expert), nats=nats, counts=counts,
                windows=windows, loss=loss, pairs=pairs)


def skip(run, seen, norm):
    """Count a non-finite step as skipped, or end the run (FloatingPointError): see skip_nonfinite."""
    names = run.corpus.domains
    bad = [name for name, nats in zip(names, seen.nats) if not math.isfinite(nats)]
    what = (f"step {run.step + 1}: loss {seen.loss}, gradient norm {norm}; ranks {seen.unwell}, "
            f"domains {', '.join(bad) or '-'}")
    if not run.config.skip_nonfinite:
        raise FloatingPointError(f"{what}: not updated; {last_good(run)}")
    run.skipped += 1
    run.status.say(f"{what}: skipped")


def update(run, sound, seen):
    """The owners' update, if the gradients are sound; then, on their masters, QK-Clip, nGPT's
    renormalisation, snapshot and average."""
    config = run.config
    snapshot = False
    put_back = False
    if config.average_every:
        snapshot, put_back = averaging(run.step, config)

    # Router biases follow the expert loads, which all ranks have.
    if sound:
        for layer, moe in run.mixtures.items():
            moe.balance_(seen.loads[run.sparse.index(layer)])

    # What an owner does to its masters after the update, before the weights are sent.
    def follow(masters):
        if sound and config.optim.tau:
            attentions = run.attentions.values()
            qk_clip_(attentions, config.optim.tau, lambda weight: masters.get(run.name_of[weight]))
        if sound and config.model.ngpt:
            renormalise_(masters)
        if snapshot:
            add_snapshot_(run.mean, masters, config.average_of)
        if put_back:
            put_back_(masters, run.mean)
            if config.model.ngpt:
                renormalise_(masters)
    if sound or snapshot:
        run.owners.step(sound, follow)

    # The biases have no owner: every rank averages its own copy.
    if snapshot:
        add_snapshot_(run.mean, run.buffers, config.average_of)
    if put_back:
        put_back_(run.buffers, run.mean)
        if config.average_reset:
            run.owners.forget()


# ---- after a step: log and checkpoint -----------------------------------------------------------------

def log_columns(names, sparse, objective="pretrain"):
    """The columns of log.csv, for the domains `names`. A field is blank where there is nothing to report.

    max_logit   in steps that measure it exactly
    load        of an expert: largest over mean, in the layer where that is worst
    loss_NAME   training loss in nats/token, in steps with windows of that domain
    share_NAME  part of the step's windows
    val_NAME    nats/token, and bpb_NAME bits/byte, on validation text, in steps with an evaluation

    sft: losses are over the answers' tokens. dpo: they are nats/pair; an evaluation has accuracy_NAME and
    margin_NAME too; and LOGGED_PAIRS are means over the step's pairs, see `Pairs`."""
    columns = ["step", "tokens", "lr", "loss", "grad_norm", "max_logit", "clipped", "skipped"]
    if objective == "dpo":
        columns += LOGGED_PAIRS
    if sparse:
        columns.append("load")
    for what in ("loss", "share", "epochs", *EVALUATED[objective]):
        columns += [f"{what}_{name}" for name in names]
    return columns + ["tokens_per_s", "mfu", "seconds"]


def log_row(run, seen, lr, norm, sound, exact, took):
    """The row of a step of `took` seconds. Some values stay on the device, which saves a host sync in
    steps that are not logged; `settle` fetches them."""
    config = run.config

    # Heads that QK-Clip has shrunk; a skipped step has none.
    clipped = 0
    if config.optim.tau and sound:
        clipped = (seen.logits > config.optim.tau).sum()
    speed = config.step_tokens / took
    mfu = run.flops * speed / run.machine_flops / run.mesh.world.size
    row = dict(step=run.step, tokens=run.step * config.step_tokens, lr=lr, loss=seen.loss,
               grad_norm=norm, clipped=clipped, skipped=run.skipped, tokens_per_s=speed, mfu=mfu,
               seconds=run.seconds)

    # Columns that only some steps, models or domains have.
    if exact:
        row["max_logit"] = seen.logits.max()
    if run.sparse:
        row["load"] = (seen.loads.amax(1) / seen.loads.mean(1)).max()
    epochs = run.batches.epochs(run.step)
    for name, nats, count, windows in zip(run.corpus.domains, seen.nats, seen.counts, seen.windows):
        row[f"share_{name}"] = windows / config.batch
        row[f"epochs_{name}"] = epochs[name]
        if count:
            row[f"loss_{name}"] = nats / count
    if seen.pairs:
        row |= seen.pairs.logged()
    return row


def settle(row):
    """Replace the tensors of a row by numbers, in place."""
    row.update({name: value.item() for name, value in row.items() if isinstance(value, torch.Tensor)})


def finish(run, row, stop):
    """Save if due, then log: a crash or a stop in the evaluation loses no step. → whether to stop"""
    saved = run.step % run.config.save_every == 0 or run.step == run.last or stop
    if saved:
        save(run, row)
    if record(run, row):
        return stop

    # A stop was requested during the evaluation: save this step, and leave its row to the resumed run.
    if not saved:
        save(run, row)
    return True


def record(run, row):
    """Log the row of a step, with an evaluation if one is due. → False if a stop was requested during
    it: the row is then left to the resumed run."""
    config = run.config
    names = list(run.corpus.domains)

    # A row with an evaluation is always logged, others every log_every steps.
    if row["step"] % config.eval_every == 0 or row["step"] == run.last:
        results = evaluate(run.chunks, run.batches, config, run.mesh, run.dtype, run.stop.asked,
                           run.reference.get("val"))
        if results is None:
            return False
        for name, values in results.items():
            row |= {f"{what}_{name}": value for what, value in zip(EVALUATED[config.objective], values)}
    elif row["step"] % config.log_every:
        return True

    # Every rank keeps the history; rank 0 writes it.
    settle(row)
    run.history.append(row)
    if not run.folder:
        return True
    run.folder.write_row(row)

    # Update the figure. notes/ is optional, and a figure is not worth a run.
    if f"val_{names[0]}" in row and row["step"]:
        try:
            from notes._figure import draw
            unit = "nats/pair" if config.objective == "dpo" else "nats/token"
            draw(run.history, names, run.folder.path / "loss.png", unit)
        except Exception as error:
            run.status.say(f"loss.png was not drawn: {type(error).__name__}: {error}")
    return True


def save(run, row):
    """Write a checkpoint, with the row of its step, which may not be in the log yet. FloatingPointError if
    a weight of any rank is not finite."""
    mesh, mean = run.mesh, run.mean
    finite = all(p.isfinite().all() for p in run.name_of)
    nonfinite = torch.tensor([float(not finite)], device=mesh.device)
    if parallel.all_max(nonfinite, mesh).item():
        raise FloatingPointError(f"step {run.step}: weights that are not finite are not saved; "
                                 f"{last_good(run)}")

    # The log goes to disk first: it has every row before this checkpoint.
    if run.folder:
        run.folder.sync_log()
    if not run.config.out:
        return

    # Each rank writes what it owns; the buffers, which all ranks have, are written once.
    settle(row)
    tensors = run.owners.tensors()
    tensors |= {f"mean/{name}": t for name, t in mean.items() if name not in run.buffers}
    if mesh.world.rank == 0:
        tensors |= {f"reference/{side}": t for side, t in run.reference.items()}
    if mesh.dp.rank == 0:
        tensors |= run.buffers | {f"mean/{name}": mean[name] for name in run.buffers if name in mean}
    facts = run.facts | dict(seconds=run.seconds, skipped=run.skipped, row=row)
    save_checkpoint(Path(run.config.out), run.step, tensors, facts, run.config.keep, mesh)


def last_good(run):
    """Where to go back to, for an error message."""
    if run.config.out:
        kept = checkpoints(Path(run.config.out))
        if kept:
            return f"the last good checkpoint is {kept[-1]}"
    return "nothing is kept of this run"


# ---- the model of a rank ------------------------------------------------------------------------------

def savings_of(config):
    """The Savings that config.mesh asks for, or None."""
    mesh = config.mesh
    if not (mesh.split or mesh.recompute or mesh.fp8 or mesh.offload):
        return None
    return parallel.Savings(mesh.split, parallel.names(mesh.recompute), parallel.names(mesh.fp8),
                            mesh.offload)


def ops_of(savings, exchange):
    """The operations of a model whose activations are kept by `savings`, or by autograd."""
    if savings is None:
        return Ops(exchange=exchange)
    return Ops(savings.linear, savings.attention, savings.recompute, exchange)


def build(config, mesh, dtype=None, savings=None):
    """{index: chunk of layers} of this rank's stage, with this rank's experts; with the operations of
    `savings` (parallel.Savings), if given.

    Where a stage has several ranks its matrices, except routers, are stored in `dtype` (if given), since
    their owners keep float32 masters. A single rank has no other copy, and keeps float32."""
    c, ep = config.model, mesh.ep
    ops = ops_of(savings, functools.partial(parallel.Exchange, mesh) if ep.size > 1 else Local)

    # An ep rank holds one contiguous range of the experts.
    experts = range(ep.rank * c.n_expert // ep.size, (ep.rank + 1) * c.n_expert // ep.size)
    ranges = chunk_ranges(config)
    chunks = {}
    for i in range(mesh.pp.rank, len(ranges), mesh.pp.size):
        chunks[i] = build_chunk(config, i, ops, experts).to(mesh.device)

    # On a single stage, embedding and head can be one tensor.
    if c.tie and mesh.pp.size == 1:
        chunks[len(ranges) - 1].embed = chunks[0].embed
    for name, p in named_parameters(chunks).items():
        if dtype and mesh.dp.size > 1 and may_be_narrow(name, p):
            p.data = p.data.to(dtype)
    return chunks


@functools.cache
def chunk_ranges(config):
    """The range of layers of every chunk of the model. A chunk begins at a layer that makes its own keys and
    values; the last one may have the head alone, which can cost as much as several layers."""
    c = config.model
    n = config.mesh.pp * config.mesh.chunks
    if n == 1:
        return [range(c.n_layer)]
    starts = [*range(0, c.n_layer, c.share_kv), c.n_layer]
    ranges = parallel.partition(layer_costs(c), n, starts)
    return [range(r.start, min(r.stop, c.n_layer)) for r in ranges]


def plans_of(config, windows, micro):
    """The plans of all stages for `windows` windows of each rank."""
    parts = tuple(count_parts(config.model, layers) for layers in chunk_ranges(config))
    return config.mesh.plans(windows, micro, parts)


def build_chunk(config, i, ops=Ops(), experts=None):
    """Chunk i of the model."""
    ranges = chunk_ranges(config)
    last = i == len(ranges) - 1
    return Transformer(config.model, ops, ranges[i], config.seed, experts, last,
                       restart=config.objective != "pretrain")


def owners_of(config, chunks, mesh):
    """The owners of the parameters of this rank's chunks."""
    chunk_of = {name: i for i, chunk in chunks.items() for name, _ in chunk.named_parameters()}
    chunk_of |= dict.fromkeys(tied_names(config.model), -1)        # complete only when both ends are
    return Zero1(named_parameters(chunks), lambda pieces: MuonClip(pieces, config.optim),
                 lambda name, p: weigh(name, p, config.optim), mesh, chunk=chunk_of.get,
                 tied=tied_names(config.model), everywhere=all_parameters(config.model))


def all_parameters(c):
    """{name: parameter without storage} of the whole model."""
    with torch.device("meta"):
        return dict(Transformer(c).named_parameters())


def named_parameters(chunks):
    """{name: parameter} of several chunks."""
    return {name: p for chunk in chunks.values() for name, p in chunk.named_parameters()}


def tied_names(c):
    """The names of the parameters that the first and the last chunk both have."""
    return ["embed"] if c.tie else []


def by_layer(modules):
    """{"layers.3.ffn": module, ...} → {3: module, ...}"""
    return {int(name.split(".")[1]): module for name, module in modules.items()}


def may_be_narrow(name, p):
    """Whether ranks may hold a parameter in bfloat16: matrices, but not a router, which scores in float32."""
    return p.ndim > 1 and not name.endswith("router")


def router_biases(model):
    """{name: tensor} of the persistent buffers: training changes them without a gradient."""
    own = model.state_dict()
    return {name: own[name] for name, _ in model.named_buffers() if name in own}


# ---- the command --------------------------------------------------------------------------------------

def report(config, history, model, corpus):
    """Print what was learned: a table by domain, next to a bigram model, and a sample of each domain. The
    bits/byte before training are blank if the log has lost its row 0."""
    first, last = history[0], history[-1]
    if config.objective != "pretrain":
        for name in corpus.domains:
            told = [f"{what} {first[f'{what}_{name}']:.3f} → {last[f'{what}_{name}']:.3f}"
                    for what in EVALUATED[config.objective] if f"{what}_{name}" in first]
            print(f"{name}, held out, after {last[f'epochs_{name}']:.2f} epochs: {', '.join(told)}")
        return

    # The table.
    print(f"\n{'domain':<12}{'windows seen':>14}{'epochs':>9}{'bits/byte':>11}{'':>4}{'after':<9}"
          f"{'bigram':<9}{'nats/token':>10}")
    for name, domain in corpus.domains.items():
        bigram = bigram_bits(domain.train, domain.val, corpus.tokenizer)
        windows = last[f"epochs_{name}"] * len(Windows(domain.train, config.model.context))
        before = f"{first[f'bpb_{name}']:.3f}" if first["step"] == 0 else ""
        print(f"{name:<12}{windows:>14,.0f}{last[f'epochs_{name}']:>9.2f}{before:>11}{'→':^4}"
              f"{last[f'bpb_{name}']:<9.3f}{bigram:<9.3f}{last[f'val_{name}']:>10.3f}")

    # A sample continues the first 32 tokens of validation text.
    for name, domain in corpus.domains.items():
        prompt = torch.as_tensor(domain.val[:32].astype("int64"))[None].to(model.embed.device)
        text = corpus.tokenizer.decode(generate(model, prompt, 96, 0.7, 0.95)[0, 32:].tolist())
        print(f"\n--- {name}: {corpus.tokenizer.decode(prompt[0].tolist())!r} goes on:\n{text}")
    print(f"\nsample more: python model.py --sample {config.out} --prompt \"...\"     "
          f"curves: {config.out}/loss.png")


def memory(config, world):
    """[{what: bytes per rank}] of each stage, alive in the backward, without activations: the mean over the
    ranks of a stage when `world` ranks are laid out as in config.mesh.

    Weights (bfloat16 where a stage has several ranks, as on GPUs), float32 gradients, float32 masters of
    narrower weights, and optimizer state."""
    mesh = config.mesh
    dp = world // mesh.pp
    stages = []
    for stage in range(mesh.pp):
        named = {}
        for i in range(stage, mesh.pp * mesh.chunks, mesh.pp):
            with torch.device("meta"):
                named |= dict(build_chunk(config, i).named_parameters())

        # Weights and gradients are divided by expert; masters and states over all that hold a parameter.
        parts = dict.fromkeys(("weights", "gradients", "masters", "states"), 0.0)
        for name, p in named.items():
            held = p.numel() / (mesh.ep if p.ndim == 3 else 1)
            owners = dp
            if mesh.pp > 1 and name in tied_names(config.model):
                owners = 2 * dp
            narrow = dp > 1 and may_be_narrow(name, p)
            parts["weights"] += held * (2 if narrow else 4)
            parts["gradients"] += held * 4
            parts["masters"] += p.numel() / owners * 4 * narrow
            parts["states"] += weigh(name, p, config.optim)[0] / owners
        stages.append(parts)
    return stages


class Routed(NamedTuple):
    """The numbers of tokens that the experts here get, in place of a tensor whose values are known only when
    it is computed."""
    counts: tuple

    def cumsum(self, _):
        return Routed(tuple(itertools.accumulate(self.counts)))

    def tolist(self):
        return list(self.counts)


def activations(config, world, gpu, counts=None):
    """The most bytes kept for the backward on each stage, predicted: [(on the device, on the host)]. The
    chunks run once, without storage, under a parallel.Meter, and each stage's plan adds them up.

    gpu: as on GPUs, in bfloat16 and with their kernels; else as on this CPU. counts: how many tokens each
    expert of a rank gets in one micro-batch, by default equally many on all ranks."""
    from torch._subclasses.fake_tensor import FakeTensorMode       # private to torch: only here

    # Windows of a rank, and dtypes
    c, mesh = config.model, config.mesh
    share = config.batch // (world // mesh.pp)
    dtype = torch.bfloat16 if gpu else None
    width = dtype or torch.get_default_dtype()

    # One expert stands for all of a rank, since what is kept depends on the sum of their tokens: as many as
    # the rank sends, if all ranks of ep are alike.
    class Here(Local):
        def arrive(self, moving):
            return moving, self.weight, Routed((len(moving),))

    class Away:
        """Keeps as much as parallel.Exchange does."""

        def __init__(self, _):
            pass

        def dispatch(self, rows, weight):
            self.sent = len(rows)
            return torch.cat((rows, weight), 1)

        def arrive(self, moving):
            got = sum(counts or [len(moving)])
            self.order = torch.zeros(got, dtype=torch.int64, device=moving.device)
            rows = moving[self.order]
            return rows[:, :-1].contiguous(), rows[:, -1:].clone(), Routed((got,))

        def combine(self, rows):
            return rows[torch.zeros_like(self.order)]

        def home(self, moving):
            return moving[:1].expand(self.sent, -1)

    savings = savings_of(config)
    ops = ops_of(savings, Here if mesh.ep == 1 else Away)
    savings = savings or parallel.Savings()

    def held(layers, last, b):
        """What a range of layers holds of a micro-batch of b windows. In a long context it is a polynomial of
        the second degree, known from three shorter ones."""
        if c.context <= 2048 or c.context % 128:
            return held_in(c.context, layers, last, b)
        lengths = 1024, 1536, 2048
        known = [held_in(T, layers, last, b) for T in lengths]
        weights = []
        for T in lengths:
            others = [t for t in lengths if t != T]
            weights.append(math.prod((c.context - t) / (T - t) for t in others))   # Lagrange
        return summed(weights, known, layers)

    def summed(weights, known, layers):
        """The weighted sum of several Held. Its shares are the last one's, for all parts of `layers`."""
        sizes = [sum(w * value for w, value in zip(weights, values)) for values in list(zip(*known))[:-1]]
        n = count_parts(c, layers) if mesh.overlap else 1
        until = np.cumsum([0.0, *known[-1].shares])
        until = np.interp(np.linspace(0, 1, n + 1), np.linspace(0, 1, len(until)), until)
        return parallel.Held(*sizes, tuple(np.diff(until)))

    def held_in(T, layers, last, b):
        """The same in a context of T tokens."""
        chunk = Transformer(c, ops, layers, experts=range(min(1, c.n_expert)), last=last)
        for name, p in chunk.named_parameters():
            if gpu and world > mesh.pp and may_be_narrow(name, p):
                p.data = p.data.to(dtype)
        targets = torch.zeros(b, T, dtype=torch.int64)
        x = targets
        if layers.start > 0:
            x = torch.zeros(b, T, c.d_model, dtype=width)
        return parallel.held_by(chunk, x, targets, savings, last, dtype, mesh.overlap)

    # What every chunk holds, for micro-batches of every size: chunks that are alike are measured once, and of
    # many layers the first few tell about the rest.
    device = torch.device("meta") if gpu else FakeTensorMode()
    ranges = chunk_ranges(config)
    few = c.n_dense + 2 * c.share_kv
    more = few + c.share_kv
    of_kind = {}
    found = {}
    for b in {min(config.micro, share), (share - 1) % config.micro + 1}:
        for i, layers in enumerate(ranges):
            start = layers.start
            last = i == len(ranges) - 1
            dense = sum(layer < c.n_dense for layer in layers)
            kind = start == 0, last, dense, len(layers), b
            if kind not in of_kind:
                with device:
                    if len(layers) <= more:
                        of_kind[kind] = held(layers, last, b)
                    else:
                        short = held(range(start, start + few), last, b)
                        longer = held(range(start, start + more), last, b)
                        groups = (len(layers) - few) / c.share_kv
                        of_kind[kind] = summed((1 - groups, groups), (short, longer), layers)
            found[i, b] = of_kind[kind]

    # Every stage's plan
    def windows(act):
        return min(config.micro, share - act.micro * config.micro)
    of_window = c.context * c.d_model * width.itemsize
    return [parallel.predicted_peak(plan, lambda act: found[act.chunk, windows(act)],
                                    lambda act: windows(act) * of_window, mesh.pp, not gpu, mesh.offload)
            for plan in plans_of(config, share, config.micro)]


def memory_report(config, world):
    """Print the memory of each stage, and of a pipeline its layers and its idle time."""
    mesh = config.mesh
    dp = world // mesh.pp
    gpu = torch.cuda.is_available() or world != parallel.world_size()
    where = "in bfloat16, with the kernels of GPUs" if gpu else "on this CPU"
    print(f"GB a rank on {world} (pp {mesh.pp}, ep {mesh.ep}, dp {dp}), predicted; activations {where}:")
    stages = memory(config, world)
    kept = activations(config, world, gpu)
    for parts, (size, _) in zip(stages, kept):
        parts["activations"] = size

    # A row for each stage
    columns = list(stages[0])
    print(f"{'stage':>7}{'total':>10}", *(f"{name:>11}" for name in columns), " layers")
    ranges = chunk_ranges(config)
    for stage, parts in enumerate(stages):
        layers = ", ".join(f"{r.start}-{r.stop - 1}" if len(r) else "head" for r in ranges[stage::mesh.pp])
        sizes = [f"{parts[name] / 1e9:>11.3g}" for name in columns]
        print(f"{stage:>7}{sum(parts.values()) / 1e9:>10.3g}", *sizes, f" {layers}")
    if mesh.pp > 1:
        print(f"  {pipeline_line(config, dp)}")
    if mesh.offload:
        print(f"  in the memory of the host: {listed([f'{size / 1e9:.3g}' for _, size in kept], 32)} GB of "
              "activations by stage")
    if mesh.overlap:
        plain = replace(config, mesh=replace(mesh, overlap=False))
        more = [a[0] - b[0] for a, b in zip(kept, activations(plain, world, gpu))]
        before, after = ([parallel.peak(plan) for plan in plans_of(c, config.batch // dp, config.micro)]
                         for c in (plain, config))
        print(f"  overlapped exchanges keep more forwards in flight: {listed(after, 32)} by stage, instead "
              f"of {listed(before, 32)}; that is {max(more) / 1e9:.3g} GB of activations at most")


def pipeline_line(config, dp):
    """How long the stages of a pipeline are idle, by the multiply-adds of its layers, where a backward takes
    twice as long as a forward."""
    # The work of each chunk, and of each part of a backward
    mesh = config.mesh
    costs = layer_costs(config.model)
    work = [sum(costs[layers.start:layers.stop]) for layers in chunk_ranges(config)]
    work[-1] += costs[-1]
    plans = plans_of(config, config.batch // dp, config.micro)
    times = dict(F=1, B=2)
    if mesh.split:
        times = dict(F=1, B=1, W=1)

    # Simulated
    parts = parallel.parts_of(plans)

    def cost(act):
        return work[act.chunk] * times[act.op] / (1 if act.op == "W" else parts[act.chunk])
    timeline = parallel.simulate(plans, cost)
    count = math.ceil(config.batch / dp / config.micro)
    return (f"pipeline of {mesh.pp} × {mesh.chunks} chunks, {count} micro-batches a step: idle "
            f"{timeline.idle:.1%} of the time ({timeline.idle_over_busy:.1%} of the busy time), messages not "
            f"counted; the largest chunk costs {max(work) * len(work) / sum(work):.2f} times the mean")


def dry_run(config):
    """Print a run's size, memory per GPU and learning-rate schedule, without running it."""
    counts = count_parameters(config.model)
    flops = flops_per_token(config.model)
    step_tokens = config.step_tokens
    print(f"{config.recipe}: {counts['total']:,} parameters ({counts['embedding']:,} embedding), "
          f"{flops:.3e} training FLOPs/token")
    print(f"{config.tokens:,} tokens = {config.total_steps:,} steps of {config.batch} × "
          f"{config.model.context}; {flops * config.tokens:.3e} FLOPs in all")
    if config.init:
        print(f"begins with the weights of {config.init}")

    # The ranks of this launch, or as many as the mesh needs.
    world = max(parallel.world_size(), config.mesh.pp * config.mesh.ep)
    check_mesh(config, world)
    memory_report(config, world)

    # The schedule, at the milestones of the run.
    c = config.optim
    milestones = [("start", 0), ("warm-up ends", c.warmup), ("decay begins", c.decay_start),
                  ("half of the decay", (1 + c.decay_start) / 2), ("end", 1)]
    for what, fraction in milestones:
        step = min(round(fraction * config.total_steps), config.total_steps - 1)
        tokens = step * step_tokens
        lr = learning_rate(tokens, config)
        print(f"  {what:<18} step {step:>10,}  {tokens:>20,} tokens  lr {lr:.3e}")


def parse(argv):
    """Command line → (config, resume, dry_run). ValueError says what is wrong, and what would be right."""
    # Sort the arguments: words, flags and options.
    words = [a for a in argv if not a.startswith("--")]
    flags = set()
    options = {}
    for arg in argv:
        key, equals, text = arg.removeprefix("--").partition("=")
        if arg in ("--resume", "--dry-run", "--compile"):
            flags.add(key)
        elif arg.startswith("--"):
            if not equals:
                raise ValueError(f"{arg}: write {arg}=VALUE")
            options[key] = text
    if "compile" in flags:
        options["compile"] = "true"

    # The recipe.
    if words and (len(words) > 1 or words[0] not in RECIPES):
        raise ValueError(f"no recipe {' '.join(words)!r}; have {', '.join(RECIPES)}")
    config = RECIPES[words[0] if words else "laptop"]

    # Without a recipe, or after pre-training, the initial weights also choose the model.
    folder = options.get("init")
    if folder and (not words or options.get("objective", config.objective) != "pretrain"):
        if is_hf(folder):
            from notes.huggingface import hf_config
            config = replace(config, model=hf_config(folder))
        else:
            kept = kept_config(folder)
            if not kept:
                raise ValueError(f"--init={folder}: neither a run with a checkpoint nor a Hugging Face "
                                 "folder")
            config = replace(config, model=kept.model)

    # The options, and the run to resume.
    config = override(config, options)
    if not config.out:
        config = replace(config, out=f"out/{config.recipe}")
    resume = "resume" in flags or begun_by_this_launch(config.out)
    if resume:
        config = resumed(config, options, words, "resume" in flags)
    if config.objective != "pretrain" and not config.init:
        raise ValueError(f"{config.objective} goes on from a run: --init=RUN")
    return config, resume, "dry-run" in flags


def begun_by_this_launch(run):
    """Whether this process is a restart by torchrun: it then resumes the run that its own launch began,
    and no other run that it finds."""
    launch = parallel.launch_id()
    try:
        return bool(launch) and launch in json.loads((Path(run) / "launch.json").read_text())
    except (OSError, ValueError):
        return False


def resumed(config, options, words, asked):
    """The configuration of the run in config.out, which wins: ValueError if an option changes more than
    mesh, steps and paths, or if --resume is `asked` for without a run."""
    run = Path(config.out)
    if asked and not run.exists():
        raise ValueError(f"--resume: there is no run in {run}; without --resume it is started")
    kept = kept_config(run)
    if not kept:
        # The folder does not say which run it is; a command that says nothing either means another one.
        if asked and not words and "out" in options and len(options) == 1 and not checkpoints(run):
            raise ValueError(f"--resume: {run} has no checkpoint yet, which would say what run it is: name "
                             f"its recipe and options too, as in: laptop --out={run} --resume")
        return config

    # Data is read where the run had it, and must be unchanged. Where to write, and on which mesh, is up to
    # this command alone: a run may be resumed on fewer ranks.
    kept = replace(kept, out=config.out, steps=0, mesh=config.mesh,
                   data=replace(kept.data, cache=config.data.cache))
    if words and words[0] != kept.recipe:
        raise ValueError(f"{run} is a run of {kept.recipe}, not of {words[0]}")
    wanted = override(kept, options)
    different = other_run(kept, wanted)
    if different:
        name, old, new = different[0]
        raise ValueError(f"{run} was begun with {name}={old}, not {new}: only --mesh, --steps and where "
                         "the data lies may change")
    return wanted


def give_up(error):
    """Exit with one line, and write it to torchrun's error file too.

    torchrun prints about thirty more lines and ends with the root cause: of the ranks' error files, the one
    with the earliest timestamp. LostRank only follows from another rank's failure, so it is dated two
    seconds later."""
    line = f"train.py: {error}"
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        second = int(time.time()) + 2 * isinstance(error, parallel.LostRank)
        about = dict(message=line, extraInfo=dict(py_callstack=line, timestamp=str(second)))
        Path(path).write_text(json.dumps(dict(message=about)))
    raise SystemExit(line) from None


def main(argv):
    """Train, or print help or a dry run. Expected errors end in one line (SystemExit)."""
    if {"--help", "-h"} & set(argv):
        if parallel.this_rank() == 0:
            print(__doc__)
        return
    try:
        config, resume, dry = parse(argv)
        if dry:
            dry_run(config)
            return

        # Report a finished run, with the whole model, of which this rank may have only a part.
        history, model = train(config, resume)
        if parallel.this_rank() == 0 and history and history[-1]["step"] == config.total_steps:
            if config.mesh.ep * config.mesh.pp * config.mesh.chunks > 1:
                model, _ = load_run(config.out)
            report(config, history, model, corpus_of(config))
    except (ValueError, FloatingPointError, OSError, ImportError, parallel.LostRank) as error:
        give_up(error)


if __name__ == "__main__":
    main(sys.argv[1:])
