"""Train a recipe:  torchrun train.py [RECIPE] [--option=value ...]

  laptop        the default: Motif's block with MuonClip, on the text that every Python installation carries
  gpt2          the control on the same text: GPT-2's block with AdamW
  laptop-k2     Kimi K2's block on the same text: latent attention, 16 experts of which a token meets 2 and a shared one
  shakespeare   Motif's block on bytes of the one file named by --data.files=shakespeare=PATH
  motif-2.6b deepseek-v3 kimi-k2   the reported ones, and their stages (motif-2.6b-lc, kimi-k2-anneal, ...)

  --out=FOLDER  where the run is kept (out/RECIPE)        --steps=N   stop early; the schedules do not move
  --resume      go on from the folder's last checkpoint   --seed=N    --tokens=N  --batch=N   and all fields of Config
  --init=FOLDER  begin with the weights of a run (and its moments, if the optimizer is the same) or of a Hugging Face
                folder, and with its tokenizer; without a RECIPE also with its model
  --dry-run     say what would run                        --model.* --optim.* --data.* --mesh.*   fields of those

A run folder holds log.csv and loss.png (written while it runs), the tokenizer, and ckpt/. Ctrl-C and SIGTERM save, then
leave. Time is tokens: learning rate and mixture are pure functions of the tokens seen, batches of (seed, step); so a
run resumed from any checkpoint ends with the numbers of one that was never stopped.
"""
import csv
import fcntl
import functools
import hashlib
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

import torch

import parallel
from data import Batches, Corpus, DataConfig, atomic, bigram_bits, load_tokenizer, prepare, write_atomically
from kernels import listed
from model import (PRESETS, ModelConfig, Ops, Transformer, count_parameters, flops_per_token, generate, read_tensors,
                   renormalise_, write_tensors)
from muonclip import (MuonClip, OptimConfig, add_snapshot_, averaging, describe, learning_rate, put_back_, qk_clip_,
                      weigh)
from parallel import MeshConfig, Zero1


# ---- configuration ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    recipe: str = "laptop"
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    tokens: int = 2_000_000      # the run's budget: where its schedules end
    batch: int = 16              # windows of one step, over all ranks
    micro: int = 16              # windows at once on a rank (at most); gradients accumulate over the rest
    eval_every: int = 100        # steps
    eval_windows: int = 64       # of each domain, spread evenly over its validation text; 0 = all of it
    average_every: int = 0       # tokens between two averages of the weights, put back into training; 0 = none
    average_of: int = 6          # snapshots of an average [Motif §3.2.2], evenly spaced inside that period [ours]
    average_from: float = -1.0   # where it begins, as a part of the run's tokens; -1 = with the decay         [guess]
    average_reset: bool = False  # the optimizer's moments start anew after an average                          [ours]
    skip_nonfinite: bool = False   # leave out, and count, steps whose loss or gradient is not finite; else stop
    save_every: int = 100        # steps between checkpoints
    keep: int = 2                # checkpoints kept
    log_every: int = 1           # steps between rows of the log
    seed: int = 0
    steps: int = 0               # stop after so many steps; 0 = when the tokens are spent
    compile: bool = False        # torch.compile the layers: 10–20% faster on a CPU, after half a minute
    init: str = ""               # folder of the weights to begin with; "" = new ones
    out: str = ""                # run folder; "" = keep nothing (notes and tests)

    def __post_init__(self):
        for name in ("tokens", "batch", "micro", "eval_every", "save_every", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("eval_windows", "steps", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")
        if self.average_every and not 1 <= self.average_of <= self.average_every // self.step_tokens:
            raise ValueError(f"average_every={self.average_every} is {self.average_every // self.step_tokens} steps of "
                             f"{self.step_tokens} tokens: too few for average_of={self.average_of} snapshots")
        if self.average_every < 0 or self.average_from != -1 and not 0 <= self.average_from <= 1:
            raise ValueError(f"average_every={self.average_every} must not be negative, average_from="
                             f"{self.average_from} must lie in 0..1 (-1: with the decay)")
        undoes = "model.qk_norm" if self.model.qk_norm else "model.ngpt" if self.model.ngpt else ""
        if self.optim.tau and undoes:
            raise ValueError(f"optim.tau={self.optim.tau}: {undoes} undoes the clip, since queries and keys are "
                             "normalised behind the weights that it shrinks: --optim.tau=0")
        if self.optim.weight_decay and self.model.ngpt:
            raise ValueError(f"optim.weight_decay={self.optim.weight_decay}: model.ngpt gives weights norm 1 after "
                             "each step, there is nothing to decay: --optim.weight_decay=0")
        if self.tokens < self.step_tokens:
            raise ValueError(f"tokens={self.tokens} is less than one step: {self.batch} windows of "
                             f"{self.model.context} = {self.step_tokens} tokens")

    @property
    def step_tokens(self):
        return self.batch * self.model.context

    @property
    def total_steps(self):
        return self.tokens // self.step_tokens


LAPTOP = Config(model=PRESETS["laptop"], tokens=950_000, batch=8, micro=8,
                optim=OptimConfig(lr=1e-2, decay_start=0.3, floor=0.0, momentum=0.9))    # a short run: a short memory
RECIPES = {
    "laptop": LAPTOP,
    "gpt2": replace(LAPTOP, recipe="gpt2", model=PRESETS["gpt2"],
                    optim=OptimConfig(name="adamw", lr=3e-3, warmup=0.05, decay="cosine", floor=0.1, tau=0)),
    "laptop-k2": replace(LAPTOP, recipe="laptop-k2", model=PRESETS["laptop-k2"]),
    "shakespeare": Config(recipe="shakespeare", model=PRESETS["shakespeare"], batch=12, micro=12, tokens=240 * 12 * 64,
                          optim=OptimConfig(lr=1e-2, decay_start=0.3, floor=0.0, momentum=0.8, weight_decay=0.3),
                          eval_windows=0,
                          data=DataConfig(domains="shakespeare:1:1", tokenizer="bytes")),
}

# The reported runs. A stage begins with the weights of the one before it (`init`). Batches are given in windows.
BIG = dict(micro=1, eval_every=500, save_every=500, keep=3)                                                    # [ours]
MOTIF = Config(                                                                                     # [Motif §3.2.2]
    recipe="motif-2.6b", model=PRESETS["motif-2.6b"], tokens=2_500_000_000_000, batch=1024, **BIG,
    average_every=8_000_000_000, average_of=6,
    optim=OptimConfig(name="adamw", lr=5e-4, warmup=5000 * 1024 * 4096 / 2.5e12, decay="rsqrt", decay_start=0.8,
                      floor=0.25, tau=0),
    data=DataConfig(horizon=2_000_000_000_000, domains="web:.68:.33,multilingual:.07:0,korean:.01:.30,"    # [Table 2]
                    "academic:.06:.03,specialized:.05:.01,code:.10:.18,math:.02:.10,reasoning:.01:.05"))
LC = 5e-4 / math.sqrt(1 + 15 * 0.84)                                       # MOTIF's rate when 80B tokens are left
DEEPSEEK = Config(                                                                               # [DeepSeek-V3 §4.2]
    recipe="deepseek-v3", model=PRESETS["deepseek-v3"], tokens=14_300_000_000_000, **BIG,
    batch=15_360,                                          # from the first step on; the report grows into it from 3,072
    optim=OptimConfig(name="adamw", lr=2.2e-4, warmup=2000 * 15_360 * 4096 / 14.3e12, decay="cosine",
                      decay_start=10 / 14.3, floor=0.1, tau=0), data=DataConfig(domains="text:1:1"))
SETTLED = replace(DEEPSEEK.model, balance_rate=0.0)                        # the router's bias stands still from here on
K2 = Config(                                                                                         # [Kimi K2 §2.5]
    recipe="kimi-k2", model=PRESETS["kimi-k2"], tokens=15_500_000_000_000, batch=16_384, **BIG,
    optim=OptimConfig(lr=2e-4, warmup=500 * 16_384 * 4096 / 15.5e12, decay="cosine", decay_start=10 / 15.5, floor=0.1),
    data=DataConfig(domains="web:1:1,code:1:1,math:1:1,knowledge:1:1"))    # weights: [guess]
K2_32K = 2e-5 - 1.3e-5 * 400 / 460                                        # 2e-5 → 7e-6 over both stages, linear [guess]


def stage(before, recipe, tokens, lr, last, context, batch, **model):
    """The run that follows `before`: rate lr → last, linear, and the mixture's end weights."""
    rates = dict(lr=lr, warmup=0.0, decay="linear", decay_start=float(lr == last), floor=last / lr)
    return replace(before, recipe=recipe, init=f"out/{before.recipe}", tokens=tokens, batch=batch,
                   model=replace(before.model, context=context, **model), optim=replace(before.optim, **rates),
                   data=replace(before.data, horizon=1))


ANNEAL = stage(K2, "kimi-k2-anneal", 400_000_000_000, 2e-5, K2_32K, 4096, 16_384)
V3 = stage(replace(DEEPSEEK, model=SETTLED), "deepseek-v3-2", 333_000_000_000, 2.2e-5, 2.2e-5, 4096, 15_360)
V3 = [V3, stage(V3, "deepseek-v3-3", 167_000_000_000, 7.3e-6, 7.3e-6, 4096, 15_360)]
V3 += [stage(V3[1], "deepseek-v3-32k", 1000 * 1920 * 32_768, 7.3e-6, 7.3e-6, 32_768, 1920, yarn=40.0)]         # [§4.3]
V3 += [stage(V3[2], "deepseek-v3-128k", 1000 * 480 * 131_072, 7.3e-6, 7.3e-6, 131_072, 480)]
MOTIF_LC = stage(MOTIF, "motif-2.6b-lc", 80_000_000_000, LC, 1.25e-4, 16_384, 256, rope_theta=500_000.0)   # [§3.2.3]
MOTIF_LC = replace(MOTIF_LC, optim=replace(MOTIF_LC.optim, decay="rsqrt"))       # leaves MOTIF at its step 576,973
K2_LONG = stage(ANNEAL, "kimi-k2-32k", 60_000_000_000, K2_32K, 7e-6, 32_768, 2048, yarn=32.0, yarn_fast=1.0)   # [guess]
RECIPES |= {config.recipe: config for config in (MOTIF, MOTIF_LC, DEEPSEEK, *V3, K2, ANNEAL, K2_LONG)}


def parse_like(old, text, key):
    """The text of an option as a value of the type that `old` has."""
    try:
        if isinstance(old, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(old, int):
            if float(text) != int(float(text)):
                raise ValueError
            return int(float(text)) if "e" in text.lower() else int(text)
        return type(old)(text)
    except (ValueError, KeyError, OverflowError):
        kind = dict(bool="true or false", int="a whole number", float="a number")[type(old).__name__]
        raise ValueError(f"--{key}={text}: must be {kind} (now {old})") from None


def override(node, options, prefix=""):
    """{"optim.lr": "3e-4"} → a new config: nested dataclasses by dotted names, checked once all options are in."""
    names, new, inner = [f.name for f in fields(node) if f.name != "recipe"], {}, {}
    for key, text in options.items():
        head, dot, rest = key.partition(".")
        if head not in names:
            raise ValueError(f"no option --{prefix}{key}; have {', '.join(names)}")
        old = getattr(node, head)
        if is_dataclass(old) and not dot:
            raise ValueError(f"--{prefix}{key}={text}: name a field: {', '.join(f.name for f in fields(old))}")
        if dot and not is_dataclass(old):
            raise ValueError(f"--{prefix}{key}={text}: {head} has no fields")
        if dot:
            inner.setdefault(head, {})[rest] = text
        else:
            new[head] = parse_like(old, text, prefix + key)
    new |= {head: override(getattr(node, head), some, f"{prefix}{head}.") for head, some in inner.items()}
    return replace(node, **new)


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


PLACES = "out", "data.files", "data.cache"           # where things lie: may differ between stops and between nodes


def other_run(old, new):
    """The changes that make another run: all but those of places, mesh and where to stop."""
    return [(name, a, b) for name, a, b in changes(old, new)
            if name != "steps" and name not in PLACES and not name.startswith("mesh.")]


def from_dict(kind, values):
    """The inverse of dataclasses.asdict. Fields that the dataclass does not have are refused."""
    known = {f.name: f for f in fields(kind)}
    for name in values:
        if name not in known:
            raise ValueError(f"this run was made with an option that is no more: {name}={values[name]!r}")
    nested = dict(model=ModelConfig, optim=OptimConfig, data=DataConfig, mesh=MeshConfig)
    return kind(**{k: from_dict(nested[k], v) if isinstance(v, dict) else v for k, v in values.items()})


# ---- checkpoints: written by every rank, read by any layout -------------------------------------------------------

def digest(manifest):
    """Of a manifest without its own digest."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def sync_folder(path):
    """Make the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def save_checkpoint(run, step, tensors, facts, keep, mesh=parallel.Mesh()):
    """run/ckpt/step-N: a tensor file of each rank's `tensors` and, last, the manifest. Written beside, forced to disk,
    then renamed: a folder of that name is whole. `facts` go into the manifest; the newest `keep` checkpoints stay."""
    ckpt, rank = run / "ckpt", mesh.world.rank
    final, beside = ckpt / f"step-{step:08d}", ckpt / f".saving-{step:08d}"
    if rank == 0:
        for unfinished in ckpt.glob(".saving-*"):
            shutil.rmtree(unfinished)
        beside.mkdir(parents=True)
    parallel.barrier(mesh)
    file = f"rank-{rank}.safetensors"
    write_tensors(beside / file, tensors)
    entries = {key: dict(file=file, shape=list(t.shape), dtype=str(t.dtype), sha256=parallel.checksum(t))
               for key, t in tensors.items()}
    entries = parallel.gather(entries, mesh)
    if rank == 0:
        manifest = dict(facts, step=step, tensors={key: entry for some in entries for key, entry in some.items()})
        with atomic(beside / "manifest.json", "w") as file:
            json.dump(dict(manifest, sha256=digest(manifest)), file, indent=1)
        sync_folder(beside)
        shutil.rmtree(final, ignore_errors=True)
        beside.rename(final)
        sync_folder(ckpt)
        sync_folder(run)                                           # the name ckpt itself
        kept = checkpoints(run)
        here = kept.index(final) + 1
        for old in kept[here:] + kept[:here][:-keep]:          # later ones are damaged, or this run began before them
            shutil.rmtree(old)
    parallel.barrier(mesh)


def checkpoints(run):
    """Folders of finished checkpoints, oldest first. Only step- and digits are ours: what else lies there, a copy that
    somebody made, is neither read nor counted nor removed."""
    ours = [p for p in (run / "ckpt").glob("step-*") if re.fullmatch(r"step-[0-9]{8,}", p.name) and p.is_dir()]
    return sorted(ours, key=lambda p: int(p.name[5:]))


class Saved(Mapping):
    """What a checkpoint holds, by name, whatever ranks wrote it: `saved[name]`, or some rows of it. Nothing is read
    from the disk, and nothing put together, before it is asked for."""

    def __init__(self, tensors):
        self.parts = {}
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
        parts = [t for _, t in self.parts[name]]
        return torch.Size((sum(map(len, parts)), *parts[0].shape[1:])) if parts[0].ndim else parts[0].shape

    def rows(self, name, start=0, stop=None):
        """Rows start..stop, put together where they lie in several files. A number (a step) has none: it is itself."""
        parts = self.parts[name]
        if not parts[0][1].ndim:
            return parts[0][1]
        stop = self.shape(name)[0] if stop is None else stop
        found = [t[max(start - at, 0):stop - at] for at, t in parts if at < stop and at + len(t) > start]
        if sum(map(len, found)) != stop - start:
            raise ValueError(f"the checkpoint has no rows {start} to {stop} of {name}")
        return found[0] if len(found) == 1 else torch.cat(found)


DAMAGE = OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError    # what damaged files raise


def read_manifest(folder):
    """A checkpoint's manifest, verified: nothing that it says is used before. Raises ValueError."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest.pop("sha256") != digest(manifest):
            raise ValueError("manifest.json is not what was written")
        return manifest
    except DAMAGE as error:
        raise ValueError(f"{folder} is damaged: {type(error).__name__}: {error}") from None


def read_checkpoint(folder, part=0, parts=1):
    """→ (manifest, Saved), every tensor's shape and type verified, and the checksums of every parts-th. Raises
    ValueError."""
    manifest = read_manifest(folder)
    try:
        entries = manifest["tensors"]
        names = {entry["file"] for entry in entries.values()}
        if any(Path(name).name != name for name in names):
            raise ValueError(f"{folder}: its manifest names files outside the folder")
        files = {name: read_tensors(folder / name) for name in names}
        tensors = {name: files[entry["file"]][name] for name, entry in entries.items()}
    except DAMAGE as error:
        raise ValueError(f"{folder} is damaged: {type(error).__name__}: {error}") from None
    for i, (name, t) in enumerate(tensors.items()):
        entry = entries[name]
        if str(t.dtype) != entry["dtype"] or list(t.shape) != entry["shape"] \
                or i % parts == part and parallel.checksum(t) != entry["sha256"]:
            raise ValueError(f"{folder} is damaged: {name} is not what the manifest says")
    return manifest, Saved(tensors)


def newest_checkpoint(run, say=print, mesh=parallel.Mesh()):
    """The newest intact checkpoint of a run, or None; damaged ones are named and passed over. Ranks verify a part of
    the checksums each and decide together."""
    before = float("inf")
    while True:
        steps = [s for p in checkpoints(run) if (s := int(p.name.removeprefix("step-"))) < before]
        step = max(steps, default=-1)
        found = torch.tensor([step, -step], dtype=torch.float64, device=mesh.device)
        high, low = parallel.all_max(found, mesh).tolist()
        if high != -low:
            raise ValueError(f"ranks found checkpoints of steps {-low:.0f} to {high:.0f}: {run} must be one folder "
                             "that all of them see")
        if step < 0:
            return None
        wrong, found = "", None
        try:
            found = read_checkpoint(run / "ckpt" / f"step-{step:08d}", mesh.world.rank, mesh.world.size)
        except ValueError as error:
            wrong = str(error)
        if not parallel.all_max(torch.tensor([float(bool(wrong))], device=mesh.device), mesh).item():
            return found
        everyone = [text for text in parallel.gather(wrong, mesh) or [wrong] if text]
        say(f"{everyone[0] if everyone else 'damaged'}; trying the one before")
        before = step


# ---- weights in ---------------------------------------------------------------------------------------------------

def restore(model, owners, saved, moments=True):
    """Copy a checkpoint into a model (whole, or with some of its experts) and what this rank owns of its optimizer, if
    `owners`; other names or shapes are refused, all listed at once."""
    with torch.device("meta"):
        whole = Transformer(model.config).state_dict()
    kept = [name for name in saved if ":" not in name and "/" not in name]
    wrong = [f"{name} {tuple(saved.shape(name)) if name in kept else 'missing'} for {tuple(whole[name].shape)}"
             for name in whole if name not in kept or saved.shape(name) != whole[name].shape]
    wrong += [f"{name} unknown" for name in kept if name not in whole]
    if wrong:
        raise ValueError(f"the checkpoint is of another architecture: {listed(wrong)}")
    with torch.no_grad():
        for name, p in model.state_dict().items():
            first = model.experts.start if p.ndim == 3 else 0
            p.copy_(saved.rows(name, first, first + len(p)))
    if owners is not None:
        owners.load(saved, moments)


def is_hf(folder):
    return (Path(folder) / "config.json").exists()


def kept_config(run):
    """The configuration in the newest intact manifest of a run, or None. ValueError: this version has not all of it."""
    for folder in reversed(checkpoints(Path(run))):
        try:
            manifest = read_manifest(folder)
        except ValueError:
            continue                                               # damaged: named when it is read in earnest
        return from_dict(Config, manifest["config"])


def begin(config, model, owners, facts, mesh, say):
    """The weights of config.init: one of our runs, with its moments where the optimizer is the same, or a Hugging
    Face folder."""
    if is_hf(config.init):
        from notes.huggingface import HFWeights
        restore(model, owners, HFWeights(config.init, config.model, say), moments=False)
        return say(f"weights of {config.init}")
    found = newest_checkpoint(Path(config.init), say, mesh)
    if not found:
        raise ValueError(f"--init={config.init}: neither a run with a checkpoint nor a Hugging Face folder")
    manifest, saved = found
    if manifest["tokenizer"] != facts["tokenizer"]:
        raise ValueError(f"--init={config.init} was trained with another tokenizer than --data.tokenizer="
                         f"{config.data.tokenizer}: leave that out to take its own")
    same = manifest["config"]["optim"]["name"] == config.optim.name
    restore(model, owners, saved, moments=same)
    say(f"weights{' and moments' if same else ''} of {config.init} at step {manifest['step']}")


def data_of(config):
    """config.data with, where the run has an `init`, the tokenizer of its weights in the place of "bpe"."""
    if not config.init or config.data.tokenizer != "bpe":
        return config.data
    for folder in filter(None, (config.out, config.init)):         # the run's own: `init` may be gone
        if (path := Path(folder) / "tokenizer.json").exists():
            return replace(config.data, tokenizer=str(path))
    raise ValueError(f"--init={config.init} has no tokenizer.json: name its tokenizer with --data.tokenizer="
                     "PATH/tokenizer.json, or a tiktoken name")


def load_run(folder, average=1):
    """(model, tokenizer) of a run's newest intact checkpoint, or of the mean of its newest `average`, for sampling; or
    of a Hugging Face folder."""
    run, mean = Path(folder), {}
    if is_hf(run):
        from notes.huggingface import load_hf
        tokenizer = load_tokenizer(run / "tokenizer.json")         # first: it is read in no time
        return load_hf(run), tokenizer
    kept = checkpoints(run)[-average:]
    if len(kept) < average:
        raise SystemExit(f"{folder}: {len(kept)} checkpoints here, not {average}; train first (torchrun train.py "
                         f"--out={folder} --keep={average})")
    found = [newest_checkpoint(run)]
    if average > 1:
        found = map(read_checkpoint, kept)
    elif found == [None]:
        raise ValueError(f"{folder}: every checkpoint is damaged")
    for manifest, saved in found:
        model = Transformer(from_dict(Config, manifest["config"]).model)
        restore(model, None, saved)
        add_snapshot_(mean, model.state_dict(), average)
    put_back_(model.state_dict(), mean)
    if model.config.ngpt:
        renormalise_(model.state_dict())                           # a mean of unit vectors is shorter than they are
    return model, load_tokenizer(run / "tokenizer.json")


# ---- the run folder -----------------------------------------------------------------------------------------------

class RunFolder:
    """log.csv, loss.png, tokenizer.json, ckpt/: written by one process, which holds the folder's lock."""

    def __init__(self, path):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.path / "lock", "a+")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock.seek(0)
            raise ValueError(f"--out={path}: in use by process {self.lock.read().strip() or '?'}") from None
        self.lock.truncate(0)
        self.lock.write(str(os.getpid()))
        self.lock.flush()
        self.log = None

    def open_log(self, columns, step, say=print):
        """Open log.csv for appending, its rows past `step` cut. → the rows that stay. A log that cannot be read is set
        aside: the run does not need it."""
        path, rows = self.path / "log.csv", []
        if path.exists():
            try:
                rows = self.read_log(path, step)
            except (ValueError, KeyError, TypeError, csv.Error) as error:
                aside = path.with_suffix(f".unreadable-{time.time_ns()}")
                path.rename(aside)
                say(f"{path} cannot be read ({type(error).__name__}: {error}): kept as {aside.name}, begun anew")
        with atomic(path, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        self.log = open(path, "a", newline="")
        self.writer = csv.DictWriter(self.log, columns)
        return [{k: float(v) for k, v in row.items() if v not in ("", None)} for row in rows]

    @staticmethod
    def read_log(path, step):
        """The rows of a log.csv up to `step`, without what is torn at its end."""
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file)
                    if row["step"].isdigit() and row["seconds"] and int(row["step"]) <= step]
        for row in rows:
            for text in row.values():
                float(text or 0)
        return rows

    def belongs_to(self, launches):
        """Keep which launches of torchrun may go on with this run by themselves; a plain process may not."""
        (self.path / "launch.json").unlink(missing_ok=True)
        if any(launches):
            write_atomically(self.path / "launch.json", json.dumps(sorted(set(launches))).encode())

    def write_row(self, row):
        self.writer.writerow(row)
        self.log.flush()

    def sync_log(self):
        os.fsync(self.log.fileno())

    def close(self):
        """Give up the lock."""
        if self.log:
            self.log.close()
        self.lock.close()


# ---- evaluation, speed, signals -----------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, batches, config, mesh, dtype=None, stop_asked=lambda: False):
    """{domain: (nats/token, bits/byte)} over side-by-side validation windows, shared out among the ranks; None where a
    stop was requested on any of them meanwhile."""
    model.eval()
    results, token_bytes = {}, torch.as_tensor(batches.corpus.tokenizer.token_bytes)
    for name in batches.corpus.domains:
        x, y, doc_start = batches.val(name, config.eval_windows)
        sums = torch.zeros(3, dtype=torch.float64)                                   # nats, tokens, bytes
        for at in range(mesh.dp.rank * config.micro, math.ceil(len(x) / config.micro / mesh.dp.size)
                        * mesh.dp.size * config.micro, mesh.dp.size * config.micro):
            stop = torch.tensor([float(stop_asked())], device=mesh.device)
            if parallel.all_max(stop, mesh).item():
                model.train()
                return None
            part = slice(at, at + config.micro) if at < len(x) else slice(0, 1)
            xs, ys, starts = (None if t is None else t[part].to(mesh.device) for t in (x, y, doc_start))
            _, nll, _ = model(xs, ys, starts, dtype=dtype)
            if at >= len(x):                                       # only so that tokens of other ranks meet experts
                continue
            sums += torch.tensor([nll.double().sum().item(), ys.numel(), token_bytes[ys.cpu()].sum().item()])
        nats, tokens, size = parallel.all_sum(sums.to(mesh.device), mesh).tolist()
        results[name] = nats / tokens, nats / math.log(2) / size
    model.train()
    return results


@functools.cache
def matmul_speed(device, dtype, seconds=0.2):
    """FLOP/s of a large square matmul here and now: what MFU is measured against."""
    n = 4096 if device.type == "cuda" else 1024
    a, wait = torch.randn(n, n, device=device, dtype=dtype), getattr(torch, device.type).synchronize
    best, start = math.inf, time.perf_counter()
    while time.perf_counter() - start < seconds or best == math.inf:
        wait()
        begin = time.perf_counter()
        a @ a
        wait()
        best = min(best, time.perf_counter() - begin)
    return 2 * n ** 3 / best


class Stop:
    """Ctrl-C, SIGTERM and the death of torchrun, as a question that the loop asks between steps."""

    def __enter__(self):
        self.signalled, self.before, self.parent = False, {}, os.getppid()
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, lambda *_: setattr(self, "signalled", True))
        except ValueError:                                         # not the main thread: the caller handles signals
            pass
        return self

    def asked(self):
        return self.signalled or "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


class Status:
    """One live line: rewritten in place on a terminal, printed every few seconds elsewhere."""

    def __init__(self, quiet):
        self.quiet, self.live, self.last, self.logit = quiet, sys.stdout.isatty(), 0.0, None

    def __call__(self, row, config, left, end=False):
        self.logit = row.get("max_logit", self.logit)              # exact in some steps only
        if self.quiet or not end and time.monotonic() - self.last < (0.2 if self.live else 10):
            return
        self.last = time.monotonic()
        known = "" if self.logit is None else f"max logit {self.logit:.1f}  "
        text = (f"step {row['step']}/{config.total_steps}  {row['tokens'] / 1e6:.2f}M tokens  loss {row['loss']:.3f}  "
                f"lr {row['lr']:.1e}  {row['tokens_per_s'] / 1e3:.1f}k tokens/s  MFU {row['mfu']:.0%}  "
                f"{known}{clock(left)} left")
        print(f"\r{text}\033[K" if self.live else text, end="" if self.live and not end else "\n", flush=True)

    def say(self, text):
        if not self.quiet:
            print(f"\r\033[K{text}" if self.live else text, flush=True)


# ---- a run --------------------------------------------------------------------------------------------------------

@dataclass
class Run:
    """The state of a run: what a step reads and changes. The arithmetic is elsewhere."""
    config: Config
    mesh: parallel.Mesh
    corpus: Corpus
    batches: Batches
    model: Transformer
    owners: Zero1
    status: Status
    stop: Stop
    facts: dict                        # what a checkpoint says of the run
    dtype: torch.dtype = None          # what is computed in; None: the weights' own
    folder: RunFolder = None           # log and figure; None where nothing is kept, and on ranks other than 0
    mean: dict = field(default_factory=dict)       # of the snapshots of this period, so far
    history: list = field(default_factory=list)    # rows of the log
    step: int = 0
    seconds: float = 0.0               # spent in steps; evaluation does not count
    skipped: int = 0                   # steps that were left out, since their gradients were not finite

    def __post_init__(self):
        config, named = self.config, list(self.model.named_parameters())
        self.attentions = list(self.model.attentions().values())
        self.mixtures = list(self.model.mixtures().values())
        self.buffers = router_biases(self.model)
        self.name_of = {p: name for name, p in named}
        self.last = min(config.total_steps, config.steps or config.total_steps)
        self.flops = flops_per_token(config.model)
        self.machine_flops = matmul_speed(self.mesh.device, self.dtype or torch.float32)


def train(config, resume=False, quiet=False, watch=None):
    """Run a recipe → (history, model). history: a dict a step, with the columns of log.csv; row 0 is before training.
    watch(step, model) is called after every step.

    With config.out everything is kept in that folder, and `resume` goes on from its newest intact checkpoint; without,
    nothing is written. Raises ValueError on bad input, before any work is lost."""
    folder, world = None, parallel.world_size()
    if config.batch % world:
        raise ValueError(f"--batch={config.batch} windows cannot be shared evenly by {world} ranks")
    config.mesh.check(world, config.model.n_expert)
    try:
        if parallel.this_rank() == 0 and config.out:
            if not resume and any((Path(config.out) / name).exists() for name in ("ckpt", "log.csv")):
                raise ValueError(f"--out={config.out} holds a run already: add --resume to go on, or name another "
                                 "folder")
            folder = RunFolder(config.out)

        # The text is made ready before anyone waits for anyone: that may take a while.
        # Of the ranks of a launch on a node, the first one verifies it, and the others load by its result.
        launch = parallel.launch_id()
        if launch:
            launch += " " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        corpus = prepare(data_of(config), config.model.vocab_size, launch)
        horizon = config.data.horizon or config.tokens
        batches = Batches(corpus, replace(config.data, horizon=horizon), config.seed, config.batch,
                          config.model.context)
        mesh = parallel.join_mesh(config.mesh, must_be_alike(config, resume, corpus))
        with Stop() as stop:
            run = start(config, resume, mesh, corpus, batches, Status(quiet or mesh.world.rank > 0), stop, folder)
            loop(run, watch)
        parallel.leave_mesh()
        return run.history, run.model
    finally:
        parallel.abandon_mesh()
        if folder:
            folder.close()


def must_be_alike(config, resume, corpus):
    """{what: text} that has to be the same on all ranks. Paths may differ: what they lead to may not."""
    alike = {name: repr(value) for name, value in options_of(config)
             if name not in (*PLACES, "init", "data.tokenizer")}
    return alike | dict(resume=str(resume), text=corpus.fingerprint, tokenizer=corpus.tokenizer.fingerprint,
                        torch=torch.__version__)


def start(config, resume, mesh, corpus, batches, status, stop, folder):
    """Build a run, at its first step or where it was left."""
    dtype = torch.bfloat16 if mesh.device.type == "cuda" else None
    model = build(config, mesh, dtype)
    named = dict(model.named_parameters())
    owners = Zero1(named, lambda pieces: MuonClip(pieces, config.optim), lambda *p: weigh(*p, config.optim), mesh)
    facts = dict(config=asdict(config), data=corpus.fingerprint, tokenizer=corpus.tokenizer.fingerprint)
    run = Run(config, mesh, corpus, batches, model, owners, status, stop, facts, dtype, folder)
    status.say(f"{config.recipe}: {count_parameters(config.model)['total']:,} parameters, {config.total_steps} steps "
               f"of {config.batch} × {config.model.context} tokens on {mesh.world.size} × {mesh.device.type}")
    for line in (*describe(named.items(), config.optim), *owners.describe()):
        status.say(f"  {line}")

    # Weights: new ones, those that it begins with, or those that it was left with. All ranks have to have the same.
    manifest = take_up(run, resume)
    parallel.compare_weights(model.state_dict(), mesh)
    launches = parallel.gather(parallel.launch_id(), mesh)
    if folder:
        folder.belongs_to(launches)
        run.history = folder.open_log(log_columns(corpus.domains, run.mixtures), run.step if manifest else -1,
                                      status.say)
        corpus.tokenizer.save(folder.path / "tokenizer.json")
        status.logit = next((row["max_logit"] for row in reversed(run.history) if "max_logit" in row), None)
    before = (run.history[-1] if run.history else {}) | (manifest or {})
    run.seconds, run.skipped = before.get("seconds", 0.0), int(before.get("skipped", 0))

    # The row of this step may be missing: nothing is logged yet, or the run was stopped in its evaluation.
    row = dict(step=0, tokens=0, seconds=0.0)
    if manifest:
        row = manifest.get("row")
    else:
        save(run, row)                                             # from here on the run can be resumed as it was begun
    logged = torch.tensor([float(bool(run.history) and run.history[-1]["step"] == run.step)], device=mesh.device)
    if row and not parallel.all_max(logged, mesh).item() and not record(run, row):
        run.last = run.step
    if config.compile:
        for layer in model.layers.values():
            layer.forward = torch.compile(layer.forward)           # layers are alike: one compilation serves all
    return run


def take_up(run, resume):
    """Load the newest intact checkpoint of the run, if it is to be resumed, or else what it begins with.

    → the checkpoint's manifest, or None"""
    config, model, owners, facts, mesh = run.config, run.model, run.owners, run.facts, run.mesh
    say = run.status.say
    checkpoint = newest_checkpoint(Path(config.out), say, mesh) if resume else None
    if not checkpoint:
        if resume and checkpoints(Path(config.out)):
            raise ValueError(f"{config.out}: every checkpoint is damaged; name another --out to start again")
        if resume:
            say(f"resuming {config.out} at step 0")
        if config.init:
            begin(config, model, owners, facts, mesh, say)
        return None
    manifest, saved = checkpoint
    for what in ("tokenizer", "data"):
        if manifest[what] != facts[what]:
            raise ValueError(f"{config.out} was trained with another {what} ({manifest[what][:12]}, now "
                             f"{facts[what][:12]}): same Python, --data options and files are needed to go on")
    restore(model, owners, saved)
    if wrong := other_run(from_dict(Config, manifest["config"]), config):
        raise ValueError(f"the checkpoint of step {manifest['step']} in {config.out} was made with "
                         + "; ".join(f"{name}={old}, not {new}" for name, old, new in wrong))
    say(f"resuming {config.out} at step {manifest['step']}")
    run.step = manifest["step"]
    if any(name.startswith("mean/") for name in saved):
        mean = {piece.key: saved.rows(f"mean/{piece.name}", piece.start, piece.stop) for piece in owners.trained()}
        mean |= {name: saved[f"mean/{name}"] for name in run.buffers if f"mean/{name}" in saved}
        run.mean = {name: t.clone().to(mesh.device) for name, t in mean.items()}
    return manifest


def loop(run, watch=None):
    """Steps, until the last one or until somebody asks to stop."""
    while run.step < run.last:
        row, stop = train_step(run)
        if watch:
            watch(run.step, run.model)
        stop = finish(run, row, stop and run.step < run.last)
        run.status(row, run.config, (run.last - run.step) * run.seconds / run.step, end=run.step == run.last)
        if stop:
            how = f"; go on with --out={run.config.out} --resume" if run.folder else ""
            run.status.say(f"stopped at step {run.step}{how}")
            break
    if run.config.compile:
        for layer in run.model.layers.values():
            del layer.forward                                      # sampling meets a new length with every token


# ---- one step -----------------------------------------------------------------------------------------------------

class Seen(NamedTuple):
    """What all ranks saw in the forward and backward of a step."""
    stop: bool                   # requested, on any of them
    unwell: list                 # ranks with a loss or gradient that is not finite
    logits: torch.Tensor         # (attentions, n_head) largest
    loads: torch.Tensor          # (mixtures, n_expert) tokens of each expert
    nats: list                   # summed over the windows of each domain
    windows: list                # of each domain
    loss: float                  # nats/token


def train_step(run):
    """One step → (the row of its log, whether a stop was requested)."""
    config, mesh, owners = run.config, run.mesh, run.owners
    began = time.perf_counter()

    # Forward and backward of this rank's windows; then everybody hears what all have seen.
    lr = learning_rate(run.step * config.step_tokens, config)
    owners.set_rate(lr)
    exact = clear_records(run)
    batch = run.batches(run.step, mesh.dp.rank, mesh.dp.size)
    nats = parallel.execute(parallel.straight(len(batch.x), config.micro), [run.model], batch, config.micro, mesh,
                            run.dtype)
    seen = share_what_was_seen(run, batch, nats)

    # Gradients go to their owners. Whether they are used is one decision, from numbers that all ranks have.
    owners.reduce()
    norm = owners.clip_norm_(config.optim.clip_norm).item()
    sound = math.isfinite(seen.loss) and math.isfinite(norm)
    if not sound:
        skip(run, seen, norm)
    run.step += 1

    # Owners update; what follows is done to their masters too, before everybody gets the weights.
    update(run, sound, seen)
    owners.drop()
    took = time.perf_counter() - began
    run.seconds += took
    return log_row(run, seen, lr, norm, sound, exact, took), seen.stop


def clear_records(run):
    """Largest logits and loads are those of one step. → whether logits will be exact, and not bounds below tau."""
    optim = run.config.optim
    exact = optim.exact_logits or run.config.compile or run.step % 50 == 0
    threshold = None if exact else optim.tau or math.inf
    for attention in run.attentions:
        attention.clear_logits(threshold)
    for moe in run.mixtures:
        moe.load.zero_()
    return exact


def share_what_was_seen(run, batch, nats):
    """Two collectives, one of maxima and one of sums. nats (b,): the loss of each window of this rank. → Seen"""
    config, mesh, domains = run.config, run.mesh, len(run.corpus.domains)
    sums = torch.zeros(domains, 2, dtype=torch.float64, device=mesh.device)
    sums.index_add_(0, batch.domain.to(mesh.device), torch.stack([nats, torch.ones_like(nats)], 1))

    # Flags: stop requested; rank r has values that are not finite. Then the largest logit of every head.
    flags = torch.zeros(1 + mesh.world.size, device=mesh.device)
    flags[0] = float(run.stop.asked())
    flags[1 + mesh.world.rank] = ~(run.owners.sound() & sums.isfinite().all())
    maxima = parallel.all_max(torch.cat([flags, *(a.max_logits for a in run.attentions)]), mesh)
    flags, logits = maxima.tensor_split([len(flags)])
    logits = logits.view(-1, config.model.n_head)
    for attention, largest in zip(run.attentions, logits):
        attention.max_logits.copy_(largest)

    # Losses and windows by domain; tokens of every expert.
    counted = torch.cat([sums.flatten(), *(moe.load.double() for moe in run.mixtures)])
    counted = parallel.all_sum(counted, mesh)
    sums, loads = counted.tensor_split([sums.numel()])

    # The first of two times in a step that the host waits for a GPU; the other is for the norm of the gradients.
    stop, *unwell = flags.tolist()
    sums = sums.cpu().view(domains, 2)
    loss = (sums[:, 0].sum() / config.batch).item()
    return Seen(bool(stop), [rank for rank, flag in enumerate(unwell) if flag], logits,
                loads.view(-1, config.model.n_expert or 1), *sums.T.tolist(), loss)


def skip(run, seen, norm):
    """The step is left out, or it ends the run: FloatingPointError."""
    names = run.corpus.domains
    bad = [name for name, nats in zip(names, seen.nats) if not math.isfinite(nats)]
    what = f"step {run.step + 1}: loss {seen.loss}, gradient norm {norm}; ranks {seen.unwell}, " \
           f"domains {', '.join(bad) or '-'}"
    if not run.config.skip_nonfinite:
        raise FloatingPointError(f"{what}: not updated; {last_good(run)}")
    run.skipped += 1
    run.status.say(f"{what}: skipped")


def update(run, sound, seen):
    """The owners' update, if the gradients are sound, and what comes after it: clip, sphere, snapshot, average."""
    config = run.config
    snapshot, put_back = averaging(run.step, config) if config.average_every else (False, False)
    if sound:
        for moe, load in zip(run.mixtures, seen.loads):
            moe.balance_(load)

    def follow(masters):
        if sound and config.optim.tau:
            qk_clip_(run.attentions, config.optim.tau, lambda weight: masters.get(run.name_of[weight]))
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
    if snapshot:
        add_snapshot_(run.mean, run.buffers, config.average_of)
    if put_back:
        put_back_(run.buffers, run.mean)
        if config.average_reset:
            run.owners.forget()


# ---- after a step: log and checkpoint -----------------------------------------------------------------------------

def log_columns(names, mixtures):
    """The columns of log.csv. load is that of an expert, largest over mean, in the layer where that is worst; loss_NAME
    is of training (blank in a step without windows of that domain), share_NAME of the step's windows; val_NAME and
    bpb_NAME are nats/token and bits/byte on validation text, in some rows; max_logit is there where it is exact."""
    by_domain = [f"{what}_{name}" for what in ("loss", "share", "epochs", "val", "bpb") for name in names]
    return ["step", "tokens", "lr", "loss", "grad_norm", "max_logit", "clipped", "skipped", *["load"] * bool(mixtures),
            *by_domain, "tokens_per_s", "mfu", "seconds"]


def log_row(run, seen, lr, norm, sound, exact, took):
    """Some of it stays on the device until somebody wants to read it: see `settle`."""
    config = run.config
    clipped = 0
    if config.optim.tau and sound:
        clipped = (seen.logits > config.optim.tau).sum()
    speed = config.step_tokens / took
    row = dict(step=run.step, tokens=run.step * config.step_tokens, lr=lr, loss=seen.loss, grad_norm=norm,
               clipped=clipped, skipped=run.skipped, tokens_per_s=speed,
               mfu=run.flops * speed / run.machine_flops / run.mesh.world.size, seconds=run.seconds)
    if exact:
        row["max_logit"] = seen.logits.max()
    if run.mixtures:
        row["load"] = (seen.loads.amax(1) / seen.loads.mean(1)).max()
    epochs = run.batches.epochs(run.step)
    for name, nats, windows in zip(run.corpus.domains, seen.nats, seen.windows):
        row |= {f"share_{name}": windows / config.batch, f"epochs_{name}": epochs[name]}
        if windows:
            row[f"loss_{name}"] = nats / windows
    return row


def settle(row):
    """Numbers in place of tensors."""
    row.update({name: value.item() for name, value in row.items() if isinstance(value, torch.Tensor)})


def finish(run, row, stop):
    """Save where it is time to, then log: what fails or is stopped in an evaluation loses no step. → whether to stop"""
    saved = run.step % run.config.save_every == 0 or run.step == run.last or stop
    if saved:
        save(run, row)
    if record(run, row):
        return stop
    if not saved:
        save(run, row)
    return True


def record(run, row):
    """Log the row of a step, evaluated where that is due. → False where a stop was requested meanwhile: the row is then
    left to whoever goes on from here."""
    config, names = run.config, list(run.corpus.domains)
    if row["step"] % config.eval_every == 0 or row["step"] == run.last:
        results = evaluate(run.model, run.batches, config, run.mesh, run.dtype, run.stop.asked)
        if results is None:
            return False
        for name, (nats, bits) in results.items():
            row[f"val_{name}"], row[f"bpb_{name}"] = nats, bits
    elif row["step"] % config.log_every:
        return True
    settle(row)
    run.history.append(row)
    if run.folder:
        run.folder.write_row(row)
        if f"val_{names[0]}" in row and row["step"]:
            try:
                from notes._figure import draw                     # a picture is not one of the ideas
                draw(run.history, names, run.folder.path / "loss.png")
            except Exception as error:                             # a figure is not worth a run
                run.status.say(f"loss.png was not drawn: {type(error).__name__}: {error}")
    return True


def save(run, row):
    """A checkpoint, which holds the row of its step: the log may not have got it yet."""
    mesh, mean = run.mesh, run.mean
    sick = torch.tensor([float(not all(p.isfinite().all() for p in run.name_of))], device=mesh.device)
    if parallel.all_max(sick, mesh).item():
        raise FloatingPointError(f"step {run.step}: weights that are not finite are not saved; {last_good(run)}")
    if run.folder:
        run.folder.sync_log()
    if not run.config.out:
        return
    settle(row)
    kept = run.owners.tensors() | {f"mean/{name}": t for name, t in mean.items() if name not in run.buffers}
    if mesh.dp.rank == 0:                                          # all have the same
        kept |= run.buffers | {f"mean/{name}": mean[name] for name in run.buffers if name in mean}
    facts = run.facts | dict(seconds=run.seconds, skipped=run.skipped, row=row)
    save_checkpoint(Path(run.config.out), run.step, kept, facts, run.config.keep, mesh)


def last_good(run):
    kept = checkpoints(Path(run.config.out)) if run.config.out else []
    return f"the last good checkpoint is {kept[-1]}" if kept else "nothing is kept of this run"


# ---- the model of a rank ------------------------------------------------------------------------------------------

def build(config, mesh, dtype=None):
    """The model with this rank's experts. With owners that keep float32 masters, its matrices may be narrower: on many
    GPUs they are what is computed in."""
    c, ep, ops = config.model, mesh.ep, Ops()
    if ep.size > 1:
        ops = Ops(exchange=parallel.expert_exchange(mesh))
    experts = range(ep.rank * c.n_expert // ep.size, (ep.rank + 1) * c.n_expert // ep.size)
    model = Transformer(c, ops, seed=config.seed, experts=experts).to(mesh.device)
    for name, p in model.named_parameters():
        if dtype and mesh.dp.size > 1 and may_be_narrow(name, p):
            p.data = p.data.to(dtype)
    return model


def may_be_narrow(name, p):
    """Whether ranks may hold a parameter in bfloat16: matrices, but not the router, whose scores are float32's."""
    return p.ndim > 1 and not name.endswith("router")


def router_biases(model):
    """{name: tensor}: what training changes and no gradient does."""
    own = model.state_dict()
    return {name: own[name] for name, _ in model.named_buffers() if name in own}


# ---- the command --------------------------------------------------------------------------------------------------

def report(config, history, model, corpus):
    """What was learned: a table by domain beside a bigram model, and a sample of each. Where the log has lost its first
    row, what there was before is not known."""
    first, last = history[0], history[-1]
    print(f"\n{'domain':<12}{'windows seen':>14}{'epochs':>9}{'bits/byte':>11}{'':>4}{'after':<9}{'bigram':<9}"
          f"{'nats/token':>10}")
    for name, domain in corpus.domains.items():
        bigram = bigram_bits(domain.train, domain.val, corpus.tokenizer)
        windows = last[f"epochs_{name}"] * ((len(domain.train) - 1) // config.model.context)
        before = f"{first[f'bpb_{name}']:.3f}" if first["step"] == 0 else ""
        print(f"{name:<12}{windows:>14,.0f}{last[f'epochs_{name}']:>9.2f}{before:>11}{'→':^4}"
              f"{last[f'bpb_{name}']:<9.3f}{bigram:<9.3f}{last[f'val_{name}']:>10.3f}")
    for name, domain in corpus.domains.items():
        prompt = torch.as_tensor(domain.val[:32].astype("int64"))[None].to(model.embed.device)
        text = corpus.tokenizer.decode(generate(model, prompt, 96, 0.7, 0.95)[0, 32:].tolist())
        print(f"\n--- {name}: {corpus.tokenizer.decode(prompt[0].tolist())!r} goes on:\n{text}")
    print(f"\nsample more: python model.py --sample {config.out} --prompt \"...\"     curves: {config.out}/loss.png")


def memory(config, world):
    """{what: bytes a rank, on average over `world` ranks laid out as config.mesh says}: weights (bfloat16 where there
    are several ranks, as on GPUs), float32 gradients, float32 masters of narrower weights, optimizer state. That is
    what is alive in the backward; activations are extra."""
    with torch.device("meta"):
        named = dict(Transformer(config.model).named_parameters())
    parts = dict.fromkeys(("weights", "gradients", "masters", "states"), 0.0)
    for name, p in named.items():
        here = p.numel() / config.mesh.pp / (config.mesh.ep if p.ndim == 3 else 1)
        narrow = world > 1 and may_be_narrow(name, p)
        parts["weights"] += here * (2 if narrow else 4)
        parts["gradients"] += here * 4
        parts["masters"] += p.numel() / world * 4 * narrow
        parts["states"] += weigh(name, p, config.optim)[0] / world
    return parts


def dry_run(config):
    counts, step_tokens = count_parameters(config.model), config.step_tokens
    print(f"{config.recipe}: {counts['total']:,} parameters ({counts['embedding']:,} embedding), "
          f"{flops_per_token(config.model):.3e} training FLOPs/token")
    print(f"{config.tokens:,} tokens = {config.total_steps:,} steps of {config.batch} × {config.model.context}; "
          f"{flops_per_token(config.model) * config.tokens:.3e} FLOPs in all")
    if config.init:
        print(f"begins with the weights of {config.init}")
    world = max(parallel.world_size(), config.mesh.pp * config.mesh.ep)
    parts = memory(config, world)
    print(f"{sum(parts.values()) / 1e9:.1f} GB a GPU on {world} (pp {config.mesh.pp}, ep {config.mesh.ep}), before "
          "activations: " + ", ".join(f"{part} {size / 1e9:.1f}" for part, size in parts.items()))
    c = config.optim
    for what, part in (("start", 0), ("warm-up ends", c.warmup), ("decay begins", c.decay_start),
                       ("half of the decay", (1 + c.decay_start) / 2), ("end", 1)):
        at = min(round(part * config.total_steps), config.total_steps - 1) * step_tokens
        print(f"  {what:<18} step {at // step_tokens:>10,}  {at:>20,} tokens  lr {learning_rate(at, config):.3e}")


def parse(argv):
    """Command line → (config, resume, dry_run). Raises ValueError: what is wrong, and what would be right."""
    words = [a for a in argv if not a.startswith("--")]
    flags, options = set(), {}
    for arg in argv:
        key, equals, text = arg.removeprefix("--").partition("=")
        if arg in ("--resume", "--dry-run", "--compile"):
            flags.add(key)
        elif arg.startswith("--"):
            if not equals:
                raise ValueError(f"{arg}: write {arg}=VALUE")
            options[key] = text
    if len(words) > 1 or words and words[0] not in RECIPES:
        raise ValueError(f"no recipe {' '.join(words)!r}; have {', '.join(RECIPES)}")
    if "compile" in flags:
        options["compile"] = "true"
    config = RECIPES[words[0] if words else "laptop"]
    if (folder := options.get("init")) and not words:
        if not is_hf(folder) and not kept_config(folder):
            raise ValueError(f"--init={folder}: neither a run with a checkpoint nor a Hugging Face folder")
        if is_hf(folder):
            from notes.huggingface import hf_config
            config = replace(config, model=hf_config(folder))
        else:
            config = replace(config, model=kept_config(folder).model)
    config = override(config, options)
    config = config if config.out else replace(config, out=f"out/{config.recipe}")
    resume = "resume" in flags or begun_by_this_launch(config.out)
    if resume:
        config = resumed(config, options, words, "resume" in flags)
    return config, resume, "dry-run" in flags


def begun_by_this_launch(run):
    """Whether torchrun has started this process again: it goes on with what its own launch began, and with no other
    run that it finds."""
    launch = parallel.launch_id()
    try:
        return bool(launch) and launch in json.loads((Path(run) / "launch.json").read_text())
    except (OSError, ValueError):
        return False


def resumed(config, options, words, asked):
    """The configuration of the run in config.out: it wins; only --mesh, --steps and --out may differ from it."""
    run = Path(config.out)
    if asked and not run.exists():
        raise ValueError(f"--resume: there is no run in {run}; without --resume it is started")
    if not (kept := kept_config(run)):
        return config
    # What a run folder says of paths is where its data lay: it is read there, and must be what it was. Where this
    # process writes is for its own command alone to say.
    # The mesh, too, belongs to the launch: whoever goes on alone needs no other ranks.
    kept = replace(kept, out=config.out, steps=0, data=replace(kept.data, cache=config.data.cache), mesh=config.mesh)
    if words and words[0] != kept.recipe:
        raise ValueError(f"{run} is a run of {kept.recipe}, not of {words[0]}")
    wanted = override(kept, options)
    for name, old, new in other_run(kept, wanted):
        raise ValueError(f"{run} was begun with {name}={old}, not {new}: only --mesh, --steps and where the data lies "
                         "may change")
    return wanted


def give_up(error):
    """Leave with one line. torchrun prints thirty more after it: so the line is also put where torchrun looks for the
    root cause, which it prints last. Of several ranks' it takes the one of the earliest second: a rank that lost
    another is never the cause."""
    line = f"train.py: {error}"
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        second = int(time.time()) + 2 * isinstance(error, parallel.LostRank)
        about = dict(message=line, extraInfo=dict(py_callstack=line, timestamp=str(second)))
        Path(path).write_text(json.dumps(dict(message=about)))
    raise SystemExit(line) from None


def main(argv):
    if {"--help", "-h"} & set(argv):
        return print(__doc__) if parallel.this_rank() == 0 else None
    try:
        config, resume, dry = parse(argv)
        if dry:
            return dry_run(config)
        history, model = train(config, resume)
        if parallel.this_rank() == 0 and history and history[-1]["step"] == config.total_steps:
            model = model if config.mesh.ep == 1 else load_run(config.out)[0]      # here: some of its experts
            report(config, history, model, prepare(data_of(config), config.model.vocab_size))
    except (ValueError, FloatingPointError, OSError, ImportError, parallel.LostRank) as error:
        give_up(error)


if __name__ == "__main__":
    main(sys.argv[1:])
