"""Files → documents → tokens → batches. What is unusual:

  no download      the default corpus is text that every Python installation carries: the documentation
                   of the standard library (prose), its source without that documentation (code), and
                   worked arithmetic (math; the only generated domain). It differs a little between
                   Python versions.
  no silence       a row without text, or a file that is damaged or cut short, stops the reading; what is
                   left out is counted. Large text is streamed: memory does not depend on its size.
  no loader state  batch(step) is a pure function of (seed, step), so checkpoints hold no loader state.
                   The global batch does not depend on the number of ranks; each rank takes its slice.
  moving mixture   domain weights move linearly over a horizon of tokens [Motif §3.2.1]. The due time of
                   every window has a closed form, so the number of windows taken from a domain never
                   falls and stays within 3 of the integral of the domain's weight.
  compared exactly a near-duplicate goes only after a comparison with one that stays; MinHash finds the pairs.
  whole packs      conversations are packed once into windows, each a document of its own, and none is cut
                   but after an answer; both answers of a pair stay in one pack.
  paid for once    recipes have a model rewrite data; every answer is kept, so that a killed one goes on.

Letters:  N windows  D domains  W windows of a domain  b windows of a rank's batch  T context in tokens
          V vocabulary size
Run:      python data.py stats [--vocab=4096] [--files=NAME=PATH] [--tokenizer=bytes|bpe|gpt2] ...
          python data.py prepare [--workers=2] ...     make the token shards, and print how far it is
          python data.py clean IN OUT [--min_tokens=24] ...      IN: a file, a folder, or NAME=PATH
          python data.py rephrase|learning-notes|exam|evolve|fuse|reject IN OUT.jsonl ...       see --help
          python data.py origin --at=TOKEN ...         file and row of a training token of each domain
          python data.py sources                       what is known of published sets, and what to download
"""
from __future__ import annotations     # Batch names torch, which is imported only where it is used: worker
                                       # processes do without it
import bisect
import contextlib
import fcntl
import functools
import gzip
import hashlib
import heapq
import importlib
import inspect
import io
import itertools
import json
import math
import operator
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
import unicodedata
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import regex
import tiktoken


# ---- configuration -----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class DataConfig:
    domains: str = "prose:0.70:0.20,code:0.20:0.50,math:0.10:0.30"  # NAME:START_WEIGHT:END_WEIGHT,...
                                 # from prose to code and math, as in Motif's schedule; the numbers:  [ours]
    mixture: str = ""            # "motif": its eight domains in place of `domains`
    files: str = ""              # NAME=PATH,...  UTF-8 text, .jsonl, .json, .csv, each also as .gz or .zst,
                                 # .parquet, or a folder of them; SET:PATH reads a published set, see `python
                                 # data.py sources`. No comma in a path. If `domains` has none of these names,
                                 # they replace it, with equal weights
    column: str = "text"         # the column or field of a record that holds the text
    where: str = ""              # FIELD>=VALUE,...  rows that are read; NAME:FIELD.. is for one domain
    budget: str = ""             # 100MB | 5000documents: how much of each domain of files is read
    skip_bad: bool = False       # leave out records without a string text instead of stopping
    rehydrate: bool = False      # repeat FineWeb2's training documents by the size of the cluster
                                 # of duplicates that each stands for, as its README says
    clean: bool = False          # leave out short documents and duplicates, as `python data.py clean` does
    min_tokens: int = 24         # fewer are short                                                  [Motif]
    tokenizer: str = "bpe"       # "bytes" | "bpe", trained on the training text | a tiktoken name ("gpt2")
                                 # | the path of a tokenizer.json, from a run or a Hugging Face folder
    horizon: int = 0             # tokens over which the weights move; afterwards the end weights hold. A
                                 # separate number, so stopping early does not change the batches before
    doc_mask: bool = False       # attention may not cross documents; pre-training lets it         [ours]
                                 # Conversations are always apart
    cache: str = "cache"         # folder of trained tokenizers and token shards
    verify: bool = False         # also compare the digests of the shards of large text at the start


EMBEDDED = "prose", "code", "math"
MIXTURES = {"motif": "web:.68:.33,multilingual:.07:0,korean:.01:.30,academic:.06:.03,"      # [Motif Table 2]
                     "specialized:.05:.01,code:.10:.18,math:.02:.10,reasoning:.01:.05"}
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def parse_domains(config):
    """DataConfig → (names, start weights (D,), end weights (D,), {name: path}).

    Raises ValueError, naming the faulty item."""
    # The user's files: {name: path}.
    paths = {}
    for item in filter(None, config.files.split(",")):
        name, _, path = item.partition("=")
        if not name or not path:
            raise ValueError(f"files: {item!r} is not NAME=PATH")
        if name in paths:
            raise ValueError(f"files: {name!r} is given twice")
        paths[name] = path

    # The schedule: (name, start weight, end weight) of each domain.
    if config.mixture not in ("", *MIXTURES):
        raise ValueError(f"mixture: {config.mixture!r} is unknown; known: {', '.join(MIXTURES)}")
    rows = []
    for item in filter(None, MIXTURES.get(config.mixture, config.domains).split(",")):
        name, *weights = item.split(":")
        try:
            start, end = (float(w) for w in weights)
        except ValueError:
            raise ValueError(f"domains: {item!r} is not NAME:START_WEIGHT:END_WEIGHT, two numbers") from None
        if not (start >= 0 and end >= 0):
            raise ValueError(f"domains: {item!r} has a weight that is not >= 0")
        rows.append((name, start, end))
    if paths and not config.mixture and not any(name in paths for name, _, _ in rows):
        rows = [(name, 1 / len(paths), 1 / len(paths)) for name in paths]

    # Names become parts of file names in the cache.
    names = [name for name, _, _ in rows]
    for name in (*names, *paths):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", name):
            raise ValueError(f"domains: {name!r} is no name: letters, digits and _ - . (not first), "
                             "64 at most")

    # Every domain needs a text, and every text a domain.
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"domains: {name!r} is given twice")
        if name == "shakespeare" and name not in paths:
            raise ValueError("domain 'shakespeare' needs its text: --data.files=shakespeare=PATH; "
                             f"Tiny Shakespeare (1.1 MB) is at {SHAKESPEARE}")
        if name not in paths and name not in EMBEDDED:
            missing = [name for name in names if name not in (*paths, *EMBEDDED)]
            raise ValueError(f"domains: {', '.join(map(repr, missing))} without text; known: "
                             f"{', '.join(EMBEDDED)}; your own: --data.files={name}=PATH")
    for name in paths:
        if name not in names:
            raise ValueError(f"files: {name!r} is not in domains ({', '.join(names)})")
    if config.where:
        datasets().parse_where(config.where, paths)
    parse_budget(config.budget)
    if config.rehydrate and (config.clean or not any(re.match("fineweb2:", path) for path in paths.values())):
        raise ValueError("rehydrate: needs --data.files=NAME=fineweb2:PATH, without --data.clean")

    # The weights of each end of the schedule sum to 1.
    start = np.array([weight for _, weight, _ in rows])          # (D,)
    end = np.array([weight for _, _, weight in rows])            # (D,)
    for which, total in (("start", start.sum()), ("end", end.sum())):
        if not abs(total - 1) <= 1e-6:
            raise ValueError(f"domains: the {which} weights sum to {total:g}, not 1")
    return names, start, end, paths


# ---- files that are written whole; digests -----------------------------------------------------------------

@contextlib.contextmanager
def atomic(path, mode="wb", alone=False, **how):
    """Yield a file that replaces `path` once it is complete and on disk.

    A reader sees all of it or the previous content, even after a crash. alone: no other process writes it
    now, so that the temporary file has one name. how: options of `open`."""
    tmp = Path(f"{path}.tmp" if alone else f"{path}.{os.getpid()}.tmp")
    try:
        with open(tmp, mode, **how) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def write_atomically(path, data):
    """Write bytes or an array to `path`: see `atomic`."""
    with atomic(path) as file:
        file.write(data)


@contextlib.contextmanager
def locked(folder):
    """Hold the folder's lock: one process builds, the others wait and then load.

    The kernel releases the lock of a process that dies. The folder may be renamed or removed meanwhile: then
    those who wait take the lock of a new one."""
    path = Path(folder, "lock")
    while True:
        os.makedirs(folder, exist_ok=True)
        with open(path, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                yield
                return


def read_json(path, *needs):
    """The fields `needs` of a JSON file in the cache, as a dict; None if it is missing or damaged.

    Prints a line if it is damaged."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_bytes())
        return {name: found[name] for name in needs}
    except (ValueError, KeyError, TypeError, RecursionError):
        print(f"{path}: damaged, building it again")
        return None


def stamp(path):
    """[size in bytes, modification time in ns]: a file with the same stamp counts as unchanged."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]


def digest(path, record):
    """sha256 of a file, which is read only if its stamp differs from the recorded one.

    record {path: [size, time, digest]} is updated in place. A file modified within the last two seconds is
    not recorded: it could change again without changing its stamp."""
    now = stamp(path)
    name = str(path.absolute())
    known = record.get(name)
    if type(known) is list and len(known) == 3 and known[:2] == now and type(known[2]) is str:
        return known[2]

    hashed = file_digest(path)

    # Record the digest only if the file did not change meanwhile.
    record.pop(name, None)
    if now == stamp(path) and abs(time.time_ns() - now[1]) > 2e9:
        record[name] = [*now, hashed]
    return hashed


def file_digest(path, head=b""):
    """sha256 of `head` and the bytes of a file, in hexadecimal."""
    h = hashlib.sha256(head)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            h.update(block)
    return h.hexdigest()


def sha256(*parts):
    """Hex digest of strings, bytes, arrays. Lengths are hashed too: "ab", "c" differs from "a", "bc"."""
    h = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else memoryview(part).cast("B")
        h.update(b"%d:" % len(part))
        h.update(part)
    return h.hexdigest()


def digest64(text):
    """The first 64 bits of a text's `sha256`, as a number."""
    return int(sha256(text)[:16], 16)


def mix(x):
    """splitmix64: uint64 (N,) → (N,); every output bit depends on every input bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


# ---- sources: the files of a domain ------------------------------------------------------------------------

LARGE = 256_000_000              # bytes of text that are held in memory; more is streamed
PIECE = 1_000_000                # bytes; a streamed text file of more than 16 pieces is cut into them
LONGEST_ROW = 16_000_000         # bytes of a record of streamed text
PACKED = ".gz", ".zst", ".zstd"
REPORT = "report.json"           # beside clean text
CALLS = ".calls.jsonl"           # beside the output of a recipe
KINDS = ".txt", ".md", ".jsonl", ".json", ".csv", ".parquet"
NO_MEMORY = "a worker was killed, probably for memory: fewer --workers"
BAD_RECORD = ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError


class Row(NamedTuple):
    """A document, and where it lies."""
    text: str
    file: str
    number: int                  # from 1: the line of a .jsonl, the record of a .json, the row of a table
    split_with: str = ""         # hexadecimal digits that decide its side in place of its hash: see `clean`
    times: int = 1               # how often it is in the training text: see DataConfig.rehydrate
    parent: str = ""             # the document that it was made of, in the output of a recipe


class Source(NamedTuple):
    """The files of a domain, in order, and how they are read. Worker processes get it as JSON."""
    name: str
    root: str
    files: list
    kind: str                    # a published set of notes/datasets.py, or ""
    where: str                   # the conditions of this domain
    column: str
    skip_bad: bool
    large: bool                  # streamed into a shard for each file, not held in memory
    rehydrate: bool


def find_source(name, path, config):
    """A domain's Source, and {reason: files and folders left out}. `path`: PATH or SET:PATH.

    Raises ValueError if there is nothing to read, or nothing that should be."""
    # A published set has its own kinds of files, and some that are left out.
    kind, colon, root = path.partition(":")
    if colon and re.fullmatch("[a-z0-9-]+", kind) and not Path(path).exists():
        if kind not in datasets().SETS:
            raise ValueError(f"files: {name}={path}: neither a file nor a published set: known sets are "
                             f"{', '.join(datasets().SETS)}")
        files, left_out = own_files(name, root, datasets().SETS[kind].kinds)
        traps = datasets().traps(kind, Path(root), files)
    else:
        kind, root = "", path
        files, left_out = own_files(name, root)
        traps = {}
        if len(files) > 1 and any(re.search(r"\.(csv|parquet|zstd?)\b", file.name.lower()) for file in files):
            probe = Source(name, root, [], "", "", config.column, False, False, False)
            traps = datasets().beside_tables(name, root, files, functools.partial(holds_text, probe))
    for file, why in traps.items():
        left_out[why].append(file)
    files = [file for file in files if file not in traps]
    if not files:
        raise ValueError(f"files: {name}={path} has nothing but files {' and '.join(left_out)}; without "
                         f"`{kind}:` they are read")

    # Is the text held in memory, or streamed? Compressed text is taken to be four times as long.
    with reading(name):
        size = sum(os.stat(file).st_size * (4 if str(file).lower().endswith((*PACKED, ".parquet")) else 1)
                   for file in files)
    budget, of_bytes = parse_budget(config.budget)
    size = min(size, budget if of_bytes else budget * 50_000)    # a long document
    where = datasets().parse_where(config.where) if config.where else []
    rehydrate = config.rehydrate and kind == "fineweb2"
    return Source(name, root, [str(file) for file in files], kind,
                  ",".join(c.said for c in where if c.domain in ("", name)), config.column, config.skip_bad,
                  size > LARGE or rehydrate, rehydrate), left_out


def bare(file):
    """The name of a file in lower case, without .gz or .zst."""
    return re.sub(r"\.(gz|zstd?)$", "", Path(file).name.lower())


def own_files(name, path, kinds=KINDS):
    """The files of a user's domain → (sorted paths, {reason: files and folders left out}).

    Raises ValueError if there is nothing to read."""
    root = Path(path)
    left_out = defaultdict(list)
    if not root.is_dir():
        if root.exists() and not root.is_file():
            raise ValueError(f"files: {name}={path} is a pipe or a device, which gives its text only "
                             "once: save that in a file")
        return [root], left_out

    # os.walk skips folders that it cannot list, unless its error handler raises.
    def unreadable(error):
        raise error

    files = []
    seen = set()                                                 # real paths: a link may lead back up
    with reading(name):
        for folder, folders, filenames in os.walk(root, onerror=unreadable, followlinks=True):
            seen.add(os.path.realpath(folder))

            # What is removed from `folders` is not walked.
            for part in sorted(folders):
                child = Path(folder, part)
                if part.startswith("."):
                    left_out["hidden"].append(child)
                    folders.remove(part)
                elif os.path.realpath(child) in seen:
                    left_out["read already"].append(child)
                    folders.remove(part)
            folders.sort()

            # The files of this folder.
            for filename in sorted(filenames):
                file = Path(folder, filename)
                if file.name.startswith("."):
                    left_out["hidden"].append(file)
                elif filename == REPORT and "00000.jsonl" in filenames:
                    pass                                         # of `clean`, about the text here
                elif filename.endswith(CALLS):
                    left_out["answers of a recipe"].append(file)
                elif not (bare(file).endswith(kinds) or file.name.lower().endswith(kinds)):
                    left_out["of another kind"].append(file)
                elif not file.is_file():
                    left_out["neither file nor folder"].append(file)
                else:
                    files.append(file)
    if not files:
        raise ValueError(f"files: {name}={path}: no {', '.join(kinds)} in this folder, nor one of these "
                         "with .gz or .zst")
    return sorted(files), left_out


@contextlib.contextmanager
def reading(name):
    """Raise an OSError of the body as a ValueError that names the domain and the file."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"files: cannot read {name}={error.filename}: {error.strerror}; give a "
                         f"file that ends in {' '.join(KINDS)}, or a folder of them") from None


def from_notes(module, what):
    """A module of notes/, imported on use: runs on text of your own work without. Raises ValueError, saying
    what it is for, if it is missing."""
    try:
        return importlib.import_module(f"notes.{module}")
    except ImportError:
        raise ValueError(f"{what} notes/{module}.py, which is not here") from None


def embedded():
    """The module that makes the default corpus."""
    return from_notes("corpus", "give your own text, --data.files=NAME=PATH: the default text is made by")


def datasets():
    """The module that knows published sets, conditions, and formats that need a package."""
    return from_notes("datasets", "published sets, tables, zstd and conditions need")


def server():
    """The module that asks a model server."""
    return from_notes("endpoint", "a model server is asked by")


def measures():
    """The module that compares a rewrite with its source, or a fusion with its sources."""
    return from_notes("measures", "what a model has written is judged by")


# ---- sources: their rows -----------------------------------------------------------------------------------

def rows(name, path, config):
    """Every Row of a user's domain, file by file, as far as its conditions and its budget let it: a text file
    is one document; a .jsonl or .json file has one per record, in its field `text`; so has a table; a folder
    stands for all such files below it.

    Prints what was read, and what was left out and why. Raises ValueError, naming the file and the position
    in it; with `skip_bad`, bad records are counted and left out instead."""
    source, left_out = find_source(name, path, config)
    left, of_bytes = parse_budget(config.budget)
    total = Counter()
    read = documents = size = 0                                  # files that hold text; of them, in bytes
    for file in source.files:
        counts = Counter()
        before = documents
        for row in rows_of_file(source, file, counts):
            length = len(row.text.encode())
            size += length
            documents += 1
            left -= length if of_bytes else 1
            yield row
            if left <= 0:
                break
        if counts["bad"]:
            print(f"{file}: {counts['bad']} bad records of {counts['rows']} left out")
        if documents > before:
            read += 1
        else:
            left_out["without a `text`" if counts["without a `text`"] else "empty"].append(file)
        total += counts
        if left <= 0:
            break
    if not documents:
        raise ValueError(f"files: {name}={path} is empty; give text in UTF-8{reasons({}, total)}")

    # One line: what was read, and for each reason the number and the first names left out.
    print(f"{name}={path}: {several(read, 'file')}, {several(documents, 'document')}, {size:,} bytes"
          f"{described(source)}{reasons(left_out, total)}")


def described(source):
    """For a line: the column that is read, and those there are; what set the files look like."""
    line = ""
    there = fields_there(source, source.files[0])
    if there:
        line = f"; text from `{source.column}` (there are: {shortened(there)})"
    if source.large and any(kind_of(file) == "text" and os.stat(file).st_size > 16 * PIECE
                            for file in source.files):
        line += f"; text files above {16 * PIECE:,} bytes are cut into documents of {PIECE:,}"
    if not source.kind:
        with contextlib.suppress(ValueError):                    # without notes/ there is no such advice
            for kind in datasets().looks_like(source.files):
                line += f"; this looks like {kind}: {kind}:PATH knows what to leave out of it"
    return line


def reasons(left_out, counts):
    """For a line: what is left out, files by reason with the first names, and rows by reason."""
    found = []
    for why, skipped in left_out.items():
        examples = [Path(file).name for file in skipped[:3]] + ["..."] * (len(skipped) > 3)
        if skipped:
            found.append(f"{len(skipped)} {why} ({', '.join(examples)})")
    found += [f"{several(n, 'row')} {why}" for why, n in counts.items()
              if n and why not in ("rows", "at", "without a `text`")]
    return f"; left out: {', '.join(found)}" if found else ""


def several(n, what):
    """"1 file", "1,000 files"."""
    return f"{n:,} {what}{'s' * (n != 1)}"


def fields_there(source, file):
    """The columns of a table, or the fields of the first record; [] for plain text."""
    kind = kind_of(file) if packing_of(file) != "parquet" else "parquet"
    if kind == "text":
        return []
    if kind == "parquet":
        return datasets().open_parquet(file).schema_arrow.names
    for _, record in records(source, file, kind, Counter()):
        with contextlib.suppress(*BAD_RECORD):
            return list(json.loads(record) if isinstance(record, bytes) else record)
        break
    return []


def rows_of_file(source, file, counts):
    """The Rows of one file, in order, whose memory is bounded by the longest row, or LARGE in a small source.

    counts, a Counter, gets the rows read, those left out by reason, and `at`, bytes of the file read so far.
    Raises ValueError, naming the file and the row, at a bad one; `skip_bad` counts it instead."""
    kind = kind_of(file)
    with reading(source.name):
        if packing_of(file) == "parquet":
            kind = "parquet"

        # A folder of texts may contain JSON that is no text, such as package.json.
        if kind == "json" and Path(file) != Path(source.root) and not holds_text(source, file):
            counts["without a `text`"] += 1
            return
        check = datasets().Check(source, file, kind) if source.where else None
        unit = dict(jsonl="line", json="record", text="piece").get(kind, "row")
        limit = LONGEST_ROW if source.large else LARGE
        needed = check.fields if check else set()
        if source.rehydrate:
            needed = needed | {datasets().CLUSTER}
        for number, record in records(source, file, kind, counts, needed):
            counts["rows"] += 1
            try:
                if isinstance(record, bytes):
                    record = json.loads(record)
                text = text_of(record, source.column)
            except BAD_RECORD as error:
                if not source.skip_bad:
                    raise bad_row(source, file, unit, number, record, error) from None
                counts["bad"] += 1
                continue
            if len(text) > limit // 4 and len(text.encode()) > limit:
                raise ValueError(f"files: {file}, {unit} {number} is longer than {limit // 10 ** 6} MB")

            # Blank documents do not count. Each row is counted by the first condition that it fails.
            if not text.strip():
                counts["blank"] += 1
                continue
            if source.kind == "txt360":
                record["bucket"] = Path(file).parent.name
            failed = check and check.failed(record)
            if failed:
                counts[f"not {failed}"] += 1
            else:
                together = str(record.get("split_with", ""))
                together = together if re.fullmatch("[0-9a-f]{16}", together) else ""
                times = datasets().repetitions(record[datasets().CLUSTER]) if source.rehydrate else 1
                yield Row(text, file, number, together, times, str(record.get("parent") or ""))

        for field, names in check.missing.items() if check else ():
            if names:
                raise ValueError(f"where: {file} has no field {field!r}; it has: {shortened(names)}")


def bad_row(source, file, unit, number, record, error):
    """The ValueError for a row whose text cannot be taken."""
    why = f"no JSON object with a string `{source.column}`"
    if unit == "row":
        why = f"no string in the column `{source.column}`"
    if isinstance(record, dict) and source.column not in record:
        why += f", only {shortened(record)}"
    if isinstance(error, UnicodeError):
        why = "no text in UTF-8"
    return ValueError(f"files: {file}, {unit} {number}: {why}; mend it, or --data.skip_bad=true")


def shortened(names):
    """The first names, for a message of one line."""
    names = [str(name)[:40].replace("\n", " ") for name in names]
    return ", ".join(names[:24]) + (f", and {len(names) - 24} more" if len(names) > 24 else "")


# ---- sources: formats --------------------------------------------------------------------------------------

def kind_of(file):
    """How a file is parsed: "text", "jsonl", "json" or "csv", by its name; by its first line if the name only
    says that it is compressed. A parquet file and compression are known by their first bytes."""
    suffix = bare(file).rpartition(".")[2]
    if not bare(file).endswith(KINDS) and str(file).lower().endswith(PACKED):
        with unpacked(file) as (stream, _), contextlib.suppress(*BAD_RECORD):
            return "jsonl" if isinstance(json.loads(stream.readline(LONGEST_ROW)), dict) else "text"
    return suffix if suffix in ("jsonl", "json", "csv") else "text"


def packing_of(file):
    """"parquet", "gzip", "zstd" or "", by the first bytes. Raises ValueError if the name says otherwise."""
    with open(file, "rb") as raw:
        head = raw.read(4)
    found = ""
    if head == b"PAR1":
        found = "parquet"
    elif head[:2] == b"\x1f\x8b":
        found = "gzip"
    elif head == b"\x28\xb5\x2f\xfd" or head[1:] == b"\x2a\x4d\x18" and head[0] >> 4 == 5:
        found = "zstd"                                           # a frame, or one to be skipped
    name = str(file).lower()
    for expected, endings in (("gzip", ".gz"), ("zstd", (".zst", ".zstd")), ("parquet", ".parquet")):
        if name.endswith(endings) and not found:
            raise ValueError(f"files: {file} is a damaged {expected} file: it does not begin like one")
    return found


def records(source, file, kind, counts, fields=()):
    """(number, record) of each row of a file; a .jsonl line is left as bytes. fields: what else is read."""
    columns = functools.partial(has_columns, source, file, fields)
    if kind == "parquet":
        yield from datasets().parquet_records(file, source.column, fields, columns, counts)
        return
    limit = LONGEST_ROW if source.large else LARGE
    if kind == "json":
        # An array of records or a single one. If it does not parse as a whole, it is read as .jsonl.
        with unpacked(file) as (stream, _):
            raw = stream.read(limit + 1)
        long = len(raw) > limit
        if long and raw.lstrip().startswith(b"["):
            raise ValueError(f"files: {file} is too long for an array in one piece: write it as .jsonl, a "
                             "record on each line")
        with contextlib.suppress(ValueError, RecursionError):
            whole = json.loads(b"" if long else raw)
            yield from enumerate(whole if isinstance(whole, list) else [whole], 1)
            return
    with unpacked(file) as (stream, raw):
        if kind == "text":
            found = pieces(file, stream, 16 * PIECE if source.large else LARGE)
        elif kind == "csv":
            found = datasets().csv_records(file, stream, limit, columns)
        else:
            found = lines(file, stream, limit)
        for number, record in found:
            if number % 64 == 0 or kind == "text":
                counts["at"] = raw.tell()
            yield number, {source.column: record} if kind == "text" else record


def lines(file, stream, limit):
    """(number, line) of each line that is not blank."""
    for number in itertools.count(1):
        line = stream.readline(limit + 1)
        if not line:
            return
        if len(line) > limit:
            raise ValueError(f"files: {file}, line {number} is longer than {limit // 10 ** 6} MB")
        if line.strip():
            yield number, line


@contextlib.contextmanager
def unpacked(file):
    """Open a file → (stream of its unpacked bytes; the file itself, whose position shows the progress).

    Raises ValueError if the compressed data are damaged or end too early."""
    packing = packing_of(file)
    damaged = (OSError, EOFError, zlib.error)
    with open(file, "rb") as raw:
        stream = raw
        if packing == "gzip":
            stream = io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20)
        if packing == "zstd":
            stream, error = datasets().open_zstd(file, raw)
            stream = io.BufferedReader(stream, 1 << 20)
            damaged += (error,)
        try:
            yield stream, raw
        except damaged as error:
            if not packing:
                raise
            raise ValueError(f"files: {file} is a damaged {packing} file: {error}") from None


def read_text(file, raw, start=0):
    """UTF-8 bytes → str. Raises ValueError with the position of the first invalid byte."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"files: {file} is not UTF-8 at byte {start + error.start}; convert it") from None


def pieces(file, stream, limit):
    """(number, text) of a text file: a single one, or pieces of about PIECE bytes if it is above `limit`."""
    rest = stream.read(limit + 1)
    if len(rest) <= limit:
        yield 1, read_text(file, rest)
        return
    number = start = 0
    while rest:
        # Cut after a line; in a line without end, before the first byte of a character. The last two pieces
        # share what is left.
        size = min(PIECE, (len(rest) + 1) // 2) if len(rest) > PIECE else len(rest)
        cut = len(rest)
        if size < cut:
            cut = rest.rfind(b"\n", size // 2, size) + 1 or size
        while cut < len(rest) and rest[cut] & 0xC0 == 0x80 and cut > 1:
            cut -= 1
        number += 1
        yield number, read_text(file, rest[:cut], start)
        start += cut
        rest = rest[cut:]
        if len(rest) <= 2 * PIECE:
            rest += stream.read(2 * PIECE)


def has_columns(source, file, fields, names):
    """Raise ValueError unless a table has the column of the text, and those of the conditions."""
    if source.column not in names:
        raise ValueError(f"files: {file} has no column {source.column!r}; it has: "
                         f"{shortened(names) or 'none'}; name one with --data.column=NAME")
    for field in fields:
        if field not in names and field.partition(".")[0] not in names and field != "bucket":
            raise ValueError(f"where: {file} has no field {field!r}; it has: {shortened(names)}")


def text_of(record, column="text"):
    """A field of a record, as a string. Raises one of BAD_RECORD if there is none."""
    text = record[column]

    # JSON may hold a lone surrogate, which has no encoding in UTF-8.
    text.encode()
    return text


def holds_text(source, file):
    """Whether any record of a .json file has a text."""
    for _, record in records(source, file, "json", Counter()):
        with contextlib.suppress(*BAD_RECORD):
            text_of(json.loads(record) if isinstance(record, bytes) else record, source.column)
            return True
    return False


def parse_budget(text):
    """"100MB" → (100e6, True), "5000documents" → (5000, False), "" → (inf, True). Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(KB|MB|GB|TB|documents?)\s*|\s*", text, re.I)
    if not match or match[1] and not float(match[1]):
        raise ValueError(f"budget: {text!r} is not like 100MB, 2GB or 5000documents")
    if not match[1]:
        return math.inf, True
    unit = match[2].upper()
    if unit.startswith("DOC"):
        return int(float(match[1])), False
    return int(float(match[1]) * 1000 ** (1 + "KMGT".index(unit[0]))), True


# ---- cleaning: a text → its shingles → its signature -------------------------------------------------------

# exact            texts that differ only in case, white space or composition of characters are the same
# near-duplicate   two texts whose sets of shingles A and B, the runs of 5 words in each, have
#                      J(A, B) = |A ∩ B| / |A ∪ B| >= 0.9                                           (1)
#                  compared exactly, on 64-bit hashes of the runs
# MinHash          finds the pairs to compare: the smallest value of a hash function is the same in A as in B
#                  with probability J. Two documents meet, in a bucket, if all values of one of 14 bands of 8
#                  hash functions agree:
#                      P(they meet) = 1 - (1 - J⁸)¹⁴                .9996 at J = .9                 (2)
# who stays        a document is removed only for one that stays and that is its own near-duplicate. In a
#                  chain A ~ B ~ C with A ≁ C, B goes and both ends stay: no chain can swallow a corpus. It is
#                  decided in an order given by the contents, longest first: that of reading does not matter
# bounds           about 200 bytes of memory a document, and in each process some 10 times its batch of 4 MB
#                  or its longest document. On the disk, 350 bytes a document, and 8 a word for documents that
#                  meet others. No document is compared with more than 64, so time is linear for any text

SHINGLE = 5                      # words
BANDS, HASHES = 14, 8            # bands of a signature, values in a band
SIMILAR = 0.9                    # (1)
CLEAN_BATCH = 1 << 22            # characters of text that are signed at a time
IN_FLIGHT = 32_000_000           # bytes of text that wait for workers or are with them
COMPARED = 64                    # comparisons of a document, at most
REMEMBERED = 256                 # members of a bucket that a document can meet
KEPT, SHORT, EXACT, NEAR = range(4)
REASONS = "kept", "too short", "exact duplicate", "near-duplicate"
FACTS = np.dtype([("digest", "<u8", 2), ("raw", "<u8"), ("shingles", "<u4"), ("short", "?")])


# Scripts without spaces between words: kana, Han, Thai, Lao, Tibetan, Burmese, Khmer, by their blocks.
UNSPACED = re.compile("[\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
                      "\U00020000-\U0003ffff\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff]")


def folded(text):
    """The text as it is compared: case folded, NFC, runs of white space as one blank."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    text = text.casefold()                                       # which may undo NFC
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.split())


def spaced(plain):
    """A folded text in which each character of a script without spaces stands between blanks, as a word by
    itself: there a shingle is 5 characters."""
    if plain.isascii():
        return plain
    blocks = (plain[i:i + 65536] for i in range(0, len(plain), 65536))     # the parts of one take memory
    return re.sub("  +", " ", "".join(UNSPACED.sub(r" \g<0> ", block) for block in blocks)).strip()


def about_tokens(words):
    """An estimate of the tokens of a spaced text, whatever the tokenizer: one for every 8 bytes begun of each
    piece of PATTERN. There is at least one for 8 bytes."""
    return sum((len(piece.encode()) + 7) // 8 for piece in regex.findall(PATTERN, words))


MANY_LETTERS = re.compile("[^ ]{257}")
BASE = 0x9E3779B97F4A7C13                                        # odd: it has an inverse modulo 2⁶⁴
INVERSE = pow(BASE, -1, 2 ** 64)
TABLE = mix(np.arange(256, dtype=np.uint64))
FACTOR, SUMMAND = mix(np.arange(2 * BANDS * HASHES, dtype=np.uint64)).reshape(2, -1, 1)    # (112, 1) each
FACTOR |= np.uint64(1)


def shingles_of(words):
    """Spaced text of n words → a hash of each run of 5 words, uint64 (max(0, n - 4),):
         h(run) = Σ_i TABLE[byte i of the run] BASE^i mod 2⁶⁴                                   (3)
    It is the difference of two prefix sums, times a power of the inverse. Of a long word the digest counts,
    so that 4096 words are some 1 MB at most."""
    if MANY_LETTERS.search(words):
        words = " ".join(sha256(word) if len(word) > 256 else word for word in words.split(" "))
    text = np.frombuffer(f" {words} ".encode(), np.uint8)
    blanks = np.flatnonzero(text == 32)                                                    # (n + 1,)
    found = [np.zeros(0, np.uint64)]
    for i in range(0, len(blanks) - SHINGLE, 4096):
        at = blanks[i:i + 4096 + SHINGLE]
        part = text[at[0]:at[-1]]
        at = at - at[0]

        # Prefix sums, and the inverse powers.
        power, inverse = (np.full(len(part) + 1, base, np.uint64) for base in (BASE, INVERSE))
        power[0] = inverse[0] = 1
        sums = np.zeros(len(part) + 1, np.uint64)
        np.cumsum(TABLE[part] * power.cumprod()[:-1], out=sums[1:])
        found.append((sums[at[SHINGLE:]] - sums[at[:-SHINGLE]]) * inverse.cumprod()[at[:-SHINGLE]])
    return mix(np.concatenate(found))


def signature(shingles):
    """uint64 (n,) → the smallest value of each hash function (a·h + b mod 2⁶⁴) >> 32, uint32 (112,)."""
    low = np.full(len(FACTOR), 2 ** 64 - 1, np.uint64)

    # Blocks that fit the processor's cache. The shift comes last: it changes no order.
    for i in range(0, len(shingles), 512):
        values = FACTOR * shingles[i:i + 512]                                              # (112, 512)
        values += SUMMAND
        np.minimum(low, values.min(1), out=low)
    return (low >> np.uint64(32)).astype(np.uint32)


def jaccard(a, b):
    """(1) for two sets, each a sorted array without repetition; 0 if one is empty."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / max(1, len(a) + len(b) - both)


def sign(texts, min_tokens):
    """What is kept of each text: FACTS (n,), and its buckets, one for each band, uint64 (n, 14)."""
    facts = np.zeros(len(texts), FACTS)
    signatures = np.zeros((len(texts), BANDS * HASHES), np.uint32)
    for i, text in enumerate(texts):
        plain = folded(text)
        words = spaced(plain)
        runs = shingles_of(words)
        facts["digest"][i] = np.frombuffer(hashlib.blake2b(plain.encode(), digest_size=16).digest(), "<u8")
        facts["raw"][i] = digest64(text)
        facts["shingles"][i] = len(runs)
        facts["short"][i] = len(plain) < 8 * min_tokens and about_tokens(words) < min_tokens
        if len(runs):
            signatures[i] = signature(runs)

    # A bucket is a hash of the band's number and of its 8 values, two at a time.
    pairs = signatures.view(np.uint64).reshape(len(texts), BANDS, HASHES // 2)
    buckets = np.broadcast_to(np.arange(BANDS, dtype=np.uint64), (len(texts), BANDS))
    for i in range(HASHES // 2):
        buckets = mix(buckets ^ pairs[:, :, i])
    return facts, buckets


def shingle_sets(texts):
    """For each text its set of shingles, as a sorted array."""
    return [np.unique(shingles_of(spaced(folded(text)))) for text in texts]


def in_batches(items, text_of, size):
    """Items → lists of them, with `size` characters of text or a little more."""
    batch = []
    held = 0
    for item in items:
        batch.append(item)
        held += len(text_of(item)) + 100                         # a string takes that much more
        if held >= size:
            yield batch
            batch = []
            held = 0
    if batch:
        yield batch


def end_with_parent():
    """In a worker process: end with the parent, even if that is killed. Otherwise it would wait for ever, and
    keep the locks that it has inherited."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def in_pool(f, items, text_of, size, workers, kind, **how):
    """f of each batch of items, in order, computed by a pool of threads or processes. Batches have `size`
    characters; a few of them wait at a time, with IN_FLIGHT bytes of text or one more batch."""
    batches = in_batches(items, text_of, size)
    if workers < 2:
        yield from map(f, batches)
        return
    with kind(workers, **how) as pool:
        waiting = deque()                                        # (what will be returned, bytes of text)
        for batch in batches:
            waiting.append((pool.submit(f, batch), sum(sys.getsizeof(text_of(item)) for item in batch)))
            batch = None
            while len(waiting) > workers + 1 or sum(n for _, n in waiting) > IN_FLIGHT and len(waiting) > 1:
                yield waiting.popleft()[0].result()
        while waiting:
            yield waiting.popleft()[0].result()


def in_processes(f, texts, workers):
    """f of each batch of texts, in order, computed by worker processes."""
    return in_pool(f, texts, str, CLEAN_BATCH, workers, ProcessPoolExecutor, initializer=end_with_parent)


# ---- cleaning: which documents stay ------------------------------------------------------------------------

class Verdict(NamedTuple):
    """What becomes of N documents, in the order in which they are read."""
    why: np.ndarray              # (N,) uint8: KEPT, SHORT, EXACT or NEAR
    stays: np.ndarray            # (N,) int64: the document that stays in its place, or itself
    jaccard: np.ndarray          # (N,) float32: (1) with that one; 1 for an exact duplicate
    cluster: np.ndarray          # (N,) uint64: the same for near-duplicates, also through others; a digest of
                                 # text: a split by it has each cluster on one side
    raw: np.ndarray              # (N,) uint64: digests of the texts
    limited: int                 # documents that met more others than could be compared


def judge(read, folder, min_tokens=DataConfig.min_tokens, workers=1):
    """Which documents stay → Verdict. read(): the rows; it is called twice, and may print something the first
    time. folder: for files, to be removed by the caller."""
    facts = sign_all(read, folder, min_tokens, workers)
    N = len(facts)

    # Rank the documents: longest first, then by contents. Those that differ only in form are neighbours.
    digest = facts["digest"]
    order = np.lexsort((facts["raw"], digest[:, 1], digest[:, 0], -facts["shingles"].astype(np.int64)))
    rank = np.empty(N, np.int64)
    rank[order] = np.arange(N)
    facts = facts[order]                                         # from here on by rank
    new = np.ones(N, bool)
    new[1:] = (facts["digest"][1:] != facts["digest"][:-1]).any(1)
    first = np.maximum.accumulate(np.where(new, np.arange(N), 0))

    # Of exact duplicates only the first is compared; the others share its fate.
    use = np.flatnonzero(new & ~facts["short"] & (facts["shingles"] > 0))
    slots, met = meetings(folder, order, use)
    with contextlib.redirect_stdout(None):
        shingles, begin, size = keep_shingles(read, folder, rank, met, workers)
    stays, alike, parent, limited = near_duplicates(folder, slots, met, shingles, begin, size)
    why = np.where(new, KEPT, EXACT)
    why[(stays != np.arange(N))[first]] = NEAR
    why[facts["short"]] = SHORT
    stays = np.where(facts["short"], np.arange(N), stays[first])
    cluster = facts["digest"][:, 0][parent[first]]
    return Verdict(why.astype(np.uint8)[rank], order[stays][rank], alike[first][rank], cluster[rank],
                   facts["raw"][rank], limited)


def sign_all(read, folder, min_tokens, workers):
    """FACTS of all documents (N,). Their buckets are written to a file for each band."""
    facts = [np.zeros(0, FACTS)]
    texts = (row.text for row in read())
    done = 0
    reported = time.time()
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(Path(folder, f"band{i}"), "wb")) for i in range(BANDS)]
        for some, buckets in in_processes(functools.partial(sign, min_tokens=min_tokens), texts, workers):
            facts.append(some)
            for file, column in zip(files, buckets.T):
                file.write(np.ascontiguousarray(column))
            done += len(some)
            if time.time() - reported > 10:
                print(f"clean: {done:,} documents signed", flush=True)
                reported = time.time()
    return np.concatenate(facts)


def scratch(path, dtype, N):
    """An array (14, N) that lies on the disk, of zeros; a part that is not written to takes no room."""
    return np.asarray(np.memmap(path, dtype, "w+", shape=(BANDS, N)))


def meetings(folder, order, use):
    """Sort each band → slots (14, N), and who meets anybody (N,) bool.

    order (N,): the documents by rank. use: the ranks that count. A bucket with n of them has n slots of 14N;
    slots[band, rank] is the first slot of the bucket, -1 where a document is alone."""
    N = len(order)
    slots = scratch(Path(folder, "slots"), np.int64, N)
    met = np.zeros(N, bool)
    for band in range(BANDS):
        slots[band] = -1
        bucket = np.fromfile(Path(folder, f"band{band}"), np.uint64)[order[use]]
        by_bucket = np.argsort(bucket, kind="stable")
        bucket = bucket[by_bucket]

        # Runs of two and more.
        new = np.ones(len(bucket) + 1, bool)                     # a run begins here; or the last one ends
        new[1:-1] = bucket[1:] != bucket[:-1]
        many = np.flatnonzero(~(new[:-1] & new[1:]))
        begin = np.maximum.accumulate(np.where(new[:-1], np.arange(len(bucket)), 0))
        members = use[by_bucket[many]]
        slots[band, members] = band * N + begin[many]
        met[members] = True
    return slots, met


def keep_shingles(read, folder, rank, met, workers):
    """Write the sets of shingles of the documents that meet others, one after the other
    → all of them as one array, and by rank (N,) where each begins, and its size."""
    begin, size = np.zeros(len(rank), np.int64), np.zeros(len(rank), np.int64)
    wanted = met[rank]                                           # in the order of reading
    texts = (row.text for row, use in zip(read(), wanted) if use)
    sizes = []
    path = Path(folder, "shingles")
    with open(path, "wb") as file:
        for sets in in_processes(shingle_sets, texts, workers):
            for one in sets:
                file.write(one)
                sizes.append(len(one))
    if len(sizes) != wanted.sum():
        raise ValueError("the rows changed while they were cleaned; start again")
    size[rank[wanted]] = sizes
    begin[rank[wanted]] = np.cumsum(sizes) - sizes
    shingles = np.asarray(np.memmap(path, np.uint64, "r")) if sizes else None
    return shingles, begin, size


def members_of(members, buckets, full):
    """Those who are in some buckets, of which `full` slots are in use: each once (n,), and in how many of the
    buckets (n,). Of a large bucket only the last ones."""
    slices = zip(buckets + np.maximum(0, full - REMEMBERED), buckets + full)
    found = np.concatenate([members[a:b] for a, b in slices])
    return np.unique(found.astype(np.int64), return_counts=True)


def near_duplicates(folder, slots, met, shingles, begin, size):
    """Compare the documents that meet, in the order of their ranks → by rank (N,): the document that stays in
    its place; (1) with it; the first document of its cluster. And how many met too many others."""
    N = len(met)
    stays = np.arange(N)
    alike = np.ones(N, np.float32)
    parent = np.arange(N)
    limited = 0

    # The slots of a bucket hold the members that later ones can meet; their number is at its first slot.
    members = scratch(Path(folder, "members"), np.uint32, N).ravel()
    filled = scratch(Path(folder, "filled"), np.uint32, N).ravel()

    def root(i):
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for me in np.flatnonzero(met).tolist():
        buckets = slots[:, me]
        buckets = buckets[buckets >= 0]
        full = filled[buckets].astype(np.int64)
        others, often = members_of(members, buckets, full)
        cut_off = bool((full > REMEMBERED).any())

        # Leave out those whose size says J < 0.9. First come those that stay, then those met most often.
        fits = np.minimum(size[others], size[me]) >= SIMILAR * np.maximum(size[others], size[me])
        others, often = others[fits], often[fits]
        others = others[np.lexsort((others, -often, stays[others] != others))]

        # Compare with those of other clusters. The first near-duplicate that stays removes this document.
        mine = shingles[begin[me]:begin[me] + size[me]]
        home = me                                                # root of its cluster
        compared = 0
        for other in others.tolist():
            if root(other) == home:
                continue
            if compared == COMPARED:
                cut_off = True
                break
            compared += 1
            likeness = jaccard(mine, shingles[begin[other]:begin[other] + size[other]])
            if likeness < SIMILAR:
                continue
            if stays[me] == me and stays[other] == other:
                stays[me] = other
                alike[me] = likeness
            later, home = max(home, root(other)), min(home, root(other))
            parent[later] = home
        limited += cut_off

        # Enter the buckets; a document that is removed, which can only link clusters, while there are few.
        enter = buckets if stays[me] == me else buckets[full < COMPARED]
        members[enter + filled[enter]] = me
        filled[enter] += 1
    while (parent != parent[parent]).any():
        parent = parent[parent]
    return stays, alike, parent, limited


# ---- cleaning: clean text ----------------------------------------------------------------------------------

def judged(read, verdict):
    """The rows that were judged, once more → (number, Row). Raises ValueError if they are not the same."""
    number = -1
    for number, row in enumerate(read()):
        if number >= len(verdict.raw) or digest64(row.text) != verdict.raw[number]:
            raise ValueError(f"{row.file}, row {row.number}: changed while it was cleaned; start again")
        yield number, row
    if number + 1 != len(verdict.raw):
        raise ValueError(f"{len(verdict.raw)} rows were cleaned, {number + 1} are left of them; start again")


JSONL_SIZE = 256 << 20           # bytes of text in a file of clean text


def clean(name, path, out, config=DataConfig(), workers=None):
    """Write the documents of a source that are not too short and no duplicates to the new folder `out`, as
    .jsonl files, and a report → the report. A row has `text`, its `source`, `file` and `row`, and `copies`,
    the documents it stands for, itself included. Rows of the same cluster, the ends of a chain, have the same
    `split_with`: whoever reads them puts them on the same side of the split.

    The folder appears when it is complete; what a call that was killed has left is made again."""
    out = Path(out)
    partial = Path(f"{out}.partial")
    source, _ = find_source(name, path, config)
    root = Path(source.root).resolve()
    if root in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"clean: {out} is inside {path}, from where it would be read; write elsewhere")
    if out.exists():
        raise ValueError(f"clean: {out} exists; remove it, or name another folder")
    with locked(partial):
        try:
            # Another process may have finished meanwhile, or been killed before.
            if out.exists():
                raise ValueError(f"clean: {out} exists; remove it, or name another folder")
            for old in partial.iterdir():
                if old.is_dir():
                    shutil.rmtree(old)
                elif old.name != "lock":
                    old.unlink()

            # Judge and write.
            read = functools.partial(rows, name, path, config)
            with tempfile.TemporaryDirectory(dir=partial) as work:
                verdict = judge(read, work, config.min_tokens, workers or os.cpu_count())
            if not (verdict.why == KEPT).any():
                raise ValueError(f"clean: none of the {len(verdict.why)} documents of {path} has "
                                 f"{config.min_tokens} tokens; see --min_tokens=N")
            with contextlib.redirect_stdout(None):
                report = write_clean(read, verdict, name, partial)
            write_atomically(Path(partial, REPORT), json.dumps(report, indent=1).encode())

            # All is there: the folder gets its name. The lock goes last, as others wait for it.
            os.rename(partial, out)
        except BaseException:
            shutil.rmtree(partial)
            raise
        Path(out, "lock").unlink()
    return report


def cleaned(paths, config, workers=0):
    """{name: path} → {name: folder in the cache with the clean text}, made if it is not there, and the
    configuration that reads them. Both stay as they are unless config.clean.

    A process of its own makes it, since worker processes must not begin from one with threads or GPUs."""
    if not config.clean:
        return paths, config
    folders = {}
    for name, path in paths.items():
        source, _ = find_source(name, path, config)
        files = [f"{file} {stamp(file)}" for file in source.files]
        options = dict(where=source.where, column=source.column, skip_bad=source.skip_bad,
                       budget=config.budget, min_tokens=config.min_tokens)
        key = sha256(how_read(source, config), str(config.min_tokens), *files)[:16]
        out = folders[name] = str(Path(config.cache, f"{name}-clean-{key}"))
        if not Path(out).exists():
            words = [f"{name}={path}", out, f"--workers={workers}",
                     *[f"--{option}={value}" for option, value in options.items()]]
            done = subprocess.run([sys.executable, Path(__file__).resolve(), "clean", *words],
                                  stderr=subprocess.PIPE, text=True)
            if not Path(out).exists():                           # nor has another process made it
                said = done.stderr.strip().rpartition("\n")[2].removeprefix("data.py: ")
                raise ValueError(said or f"{out}: cleaning ended with status {done.returncode}; start again")
    return folders, replace(config, column="text", where="", skip_bad=False, budget="")


def write_clean(read, verdict, name, folder):
    """Write the documents that stay to .jsonl files → the report, a dict."""
    copies = np.bincount(verdict.stays, minlength=len(verdict.why))
    groups = examples(verdict)
    clusters, ends = np.unique(verdict.cluster[verdict.why == KEPT], return_counts=True)
    chains = set(clusters[ends > 1].tolist())                    # clusters of which more than one stays
    shown = dict.fromkeys(number for group in groups for number in group)
    size = np.zeros(len(REASONS), np.int64)                      # bytes of text
    with contextlib.ExitStack() as stack:
        files = 0
        room = 0                                                 # bytes that the open file may still take
        for number, row in judged(read, verdict):
            why = verdict.why[number]
            length = len(row.text.encode())
            size[why] += length
            origin = dict(source=name, file=str(row.file), row=row.number)
            if number in shown:
                shown[number] = dict(origin, begins=row.text[:100], why=REASONS[why],
                                     jaccard=round(float(verdict.jaccard[number]), 3))
            if why != KEPT:
                continue

            # Close a full file and begin the next.
            if room <= 0:
                stack.close()
                path = Path(folder, f"{files:05}.jsonl")
                file = stack.enter_context(atomic(path, "w", encoding="utf-8"))
                files += 1
                room = JSONL_SIZE
            line = dict(text=row.text, **origin, copies=int(copies[number]))
            if int(verdict.cluster[number]) in chains:
                line["split_with"] = f"{verdict.cluster[number]:016x}"
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            room -= length

    # Numbers, and for each example the document that stays, then some that do not.
    documents = np.bincount(verdict.why, minlength=len(REASONS))
    near = np.unique(verdict.cluster[verdict.why == NEAR])
    _, members = np.unique(verdict.cluster[verdict.why != SHORT], return_counts=True)
    return dict(documents=dict(zip(REASONS, documents.tolist())), bytes=dict(zip(REASONS, size.tolist())),
                clusters=len(near), largest=int(members.max(initial=0)), chains=len(chains),
                limited=verdict.limited, examples=[[shown[number] for number in group] for group in groups])


def examples(verdict, most=5):
    """Lists of document numbers for the report: short ones, each alone, then the largest groups of
    duplicates, each a document that stays and up to 3 that go for it."""
    groups = [[number] for number in np.flatnonzero(verdict.why == SHORT)[:most].tolist()]
    for why in (EXACT, NEAR):
        gone = np.flatnonzero(verdict.why == why)
        stays, n = np.unique(verdict.stays[gone], return_counts=True)
        for number in stays[np.argsort(-n, kind="stable")][:most].tolist():
            groups.append([number, *gone[verdict.stays[gone] == number][:3].tolist()])
    return groups


def print_report(report):
    """The report of `clean` as a table, with an example for each reason."""
    for key in REASONS:
        print(f"{key:16}{report['documents'][key]:12,} documents{report['bytes'][key] / 1e6:12.2f} MB")
    print(f"clusters with near-duplicates: {report['clusters']:,}, the largest of {report['largest']:,} "
          f"documents; chains, of which more than one stays: {report['chains']:,};\n"
          f"documents that met more others than could be compared: {report['limited']:,}")
    for why in REASONS[1:]:
        for first, *others in [group for group in report["examples"] if group[-1]["why"] == why][:1]:
            for shown in (first, *others):
                print(f"  {shown['why']}, J {shown['jaccard']}: {shown['file']}, row {shown['row']}: "
                      f"{shown['begins'][:60]!r}")


# ---- documents of a domain that fits into memory, and their split ------------------------------------------

def documents(name, path=None, config=DataConfig(), together=None):
    """All documents of a domain that fits into memory, duplicates included: a list of strings.

    No `path`: an embedded domain; otherwise see `rows`. together {text: split_with} gets those that clean
    text has."""
    if path is None:
        return embedded().documents(name)
    found = []
    size = 0
    for row in rows(name, path, config):
        found.append(row.text)
        size += len(row.text)
        if config.budget and size > 4 * LARGE:
            raise ValueError(f"budget: {config.budget} of {name} are too long for it: give it in MB")
        if row.split_with and together is not None:
            together[row.text] = row.split_with
    return found


def is_validation(hashed, val=0.05):
    """Whether the sha256 of a document, in hexadecimal, is in the lowest fraction `val` of the range."""
    return int(hashed[:8], 16) <= val * 2 ** 32


def split_documents(docs, val=0.05, together={}):
    """Documents → (train, val), exact duplicates removed.

    The hash of a document decides its side, so a document keeps it when others are added or removed: the
    lowest fraction `val` of the hash range is validation. Documents with the same value in `together`, {text:
    hash}, stay together. Two bounds handle few or uneven documents. Validation gets at least 1% of the bytes:
    if it has less, further documents follow in order of hash. And what would bring it above 10% stays in
    training, except that a document's last tenth is cut off for validation while that has less than 1%."""
    docs = list(dict.fromkeys(docs))
    groups = defaultdict(list)                                   # hash → documents, nearly always one
    for i, doc in enumerate(docs):
        groups[together.get(doc) or sha256(doc)].append(i)
    sizes = [len(doc.encode()) for doc in docs]                  # bytes
    keep = [len(doc) for doc in docs]                            # characters that stay in training
    total = sum(sizes)
    held = 0                                                     # bytes of validation

    # Move documents to validation, the lowest hash first.
    for hashed in sorted(groups, key=lambda hashed: hashed[:8]):
        enough = held >= total / 100
        if not is_validation(hashed, val) and enough:
            break
        group = groups[hashed]
        if held + sum(sizes[i] for i in group) <= total / 10:
            for i in group:
                keep[i] = 0
        elif not enough and len(group) == 1:
            keep[group[0]] = len(docs[group[0]]) * 9 // 10
        held += sum(len(docs[i][keep[i]:].encode()) for i in group)

    # Cut each document; empty parts vanish.
    train = [doc[:n] for doc, n in zip(docs, keep)]
    held_out = [doc[n:] for doc, n in zip(docs, keep)]
    return [part for part in train if part], [part for part in held_out if part]


def how_read(source, config):
    """How the files of a source are read, for the keys of the cache."""
    buckets = [Path(file).absolute().parent.name for file in source.files if source.kind == "txt360"]
    return str((READER, source.kind, source.where, source.column, source.skip_bad, source.rehydrate,
                config.budget, buckets))


def files_key(record, name, path, config, *steps):
    """Cache key of what `steps`, strings that say how, make of the files of a domain.

    Computing it does not extract the text; with a budget, it does not even read the files: their stamps have
    to do. record: see `digest`."""
    source, _ = find_source(name, path, config)
    with reading(name):
        digests = [stamp(file) if config.budget else digest(Path(file), record) for file in source.files]
        parts = [f"{kind_of(file)} {file.lower().endswith('.gz')} {hashed}"
                 for file, hashed in zip(source.files, digests)]
    return sha256(how_read(source, config), *parts, *steps)


def text_key(record, name, path=None, config=DataConfig()):
    """Cache key of a domain's documents: digest of its files and of the code that reads and splits them."""
    if path:
        steps = rows, rows_of_file, records, text_of, split_documents
        return files_key(record, name, path, config, *map(inspect.getsource, steps))
    parts = [f"{module} {digest(file, record)}" for module, file in embedded().library_files()]
    return sha256(name, *parts, inspect.getsource(embedded()), inspect.getsource(split_documents))


# ---- tokenizers --------------------------------------------------------------------------------------------

BLANKS = re.compile(r"(\s{4096})")       # runs of blanks are cut: tiktoken fails on a million in a row
MANY_BLANKS = re.compile(r"\s{8}")       # such a run shows as 8 blanks in every 512th character
LONGEST = 128                   # characters; BPE training cuts longer words into pieces of this length
EOT = "<|endoftext|>"
SPECIALS = EOT, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"   # the last ids of every vocabulary
BPE_CHARS = 32_000_000          # BPE training reads this much of a document; more only costs memory


# In order: a word with one preceding mark or blank; up to 3 digits; punctuation; line ends with the
# indentation of the next line, one token at any depth; other blanks but the last, which joins the following
# word; remaining blanks.
PATTERN = (r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+"
           r"|\s*\n[ \t]*|\s+(?!\S)|\s+")


def merge(word, a, b, new):
    """Replace the pair a, b by `new` in a list of ids, left to right: [.., a, b, ..] → [.., new, ..]."""
    out = []
    i = 0
    while i < len(word):
        hit = word[i] == a and i + 1 < len(word) and word[i + 1] == b
        out.append(new if hit else word[i])
        i += 2 if hit else 1
    return out


def train_bpe(texts, vocab_size):
    """Train byte-level BPE → ranks {bytes: id}, vocab_size - 5 of them: 5 ids are for the specials.

    Each step merges the most frequent pair, ties to the smallest pair of ids. Raises ValueError if the
    vocabulary is too small for all bytes, or the text has too few pairs to fill it."""
    size = vocab_size - len(SPECIALS)
    if size < 256:
        raise ValueError(f"vocab_size {vocab_size}: bpe needs at least {256 + len(SPECIALS)}")

    # Count distinct words: merges never cross a word, so each is processed once.
    freq = Counter()
    for text in texts:
        freq.update(regex.findall(PATTERN, text[:BPE_CHARS]))
    for word in [word for word in freq if len(word) > LONGEST]:
        n = freq.pop(word)
        for i in range(0, len(word), LONGEST):
            freq[word[i:i + LONGEST]] += n
    words = [list(word.encode()) for word in freq]               # as ids, merged in place
    freq = list(freq.values())                                   # in the order of `words`

    # Count pairs.
    count = Counter()
    where = defaultdict(set)                                     # pair → words that may contain it
    for w, word in enumerate(words):
        for pair in zip(word, word[1:]):
            count[pair] += freq[w]
            where[pair].add(w)

    # Merge until the vocabulary is full.
    pieces = [bytes([i]) for i in range(256)]                    # id → bytes
    heap = [(-n, pair) for pair, n in count.items()]
    heapq.heapify(heap)
    reported = time.time()
    while len(pieces) < size:
        new = len(pieces)
        if time.time() - reported > 5:
            print(f"bpe: {new} of {size} tokens", flush=True)
            reported = time.time()
        if not heap:
            raise ValueError(f"vocab_size {vocab_size}: the text gives only {new + len(SPECIALS)} tokens")

        # Heap entries may be stale. The count of a pair grows only in the merge that creates it, so a stale
        # entry is an upper bound: push the pair back with its present count.
        n, pair = heapq.heappop(heap)
        if -n != count[pair]:
            if count[pair]:
                heapq.heappush(heap, (-count[pair], pair))
            continue

        # Merge the pair in the words that contain it, and recount the pairs of these words.
        pieces.append(pieces[pair[0]] + pieces[pair[1]])
        created = set()
        for w in where.pop(pair):
            for p in zip(words[w], words[w][1:]):
                count[p] -= freq[w]
            words[w] = merge(words[w], *pair, new)
            for p in zip(words[w], words[w][1:]):
                count[p] += freq[w]
                if new in p:
                    created.add(p)
                    where[p].add(w)
        for p in created:
            heapq.heappush(heap, (-count[p], p))
    return {piece: i for i, piece in enumerate(pieces)}


class Tokenizer:
    """Text ↔ ids, over a tiktoken encoding.

    n_vocab, eot; specials {name: id}; pieces, the bytes of each id; token_bytes (V,), how many bytes of text
    a token stands for, 0 for a special; fingerprint, a digest of pattern and pieces. `encode` reads a special
    in text as ordinary text; specials are inserted by id only."""

    def __init__(self, name, pattern, ranks):
        first = max(ranks.values()) + 1
        self.specials = {special: first + i for i, special in enumerate(SPECIALS)}
        self.n_vocab = first + len(SPECIALS)
        self.eot = first
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens=self.specials)

        # Bytes of each id; an encoding may have unused ids, which stand for nothing.
        self.pieces = [b""] * self.n_vocab
        for piece, i in ranks.items():
            self.pieces[i] = piece
        self.token_bytes = np.array([len(piece) for piece in self.pieces])                 # (V,) int64
        for special, i in self.specials.items():
            self.pieces[i] = special.encode()
        self.fingerprint = sha256(pattern, *self.pieces)

    def encode(self, text):
        """str → ids, uint32 array"""
        parts = [text]
        if MANY_BLANKS.search(text[::512]):
            parts = BLANKS.split(text)
        ids = [self.encoding.encode_to_numpy(part, disallowed_special=()) for part in parts]
        return np.concatenate(ids)

    def bytes_of(self, ids):
        """ids → bytes. Ids >= n_vocab, from a padded vocabulary, become a byte that is not UTF-8."""
        return b"".join(self.pieces[i] if i < self.n_vocab else b"\xff" for i in ids)

    def decode(self, ids):
        """ids → str. Broken UTF-8 and ids >= n_vocab become U+FFFD."""
        return self.bytes_of(ids).decode("utf-8", "replace")

    def save(self, path):
        """Write the whole tokenizer as one JSON file, which load_tokenizer reads."""
        pieces = [piece.hex() for piece in self.pieces[:self.eot]]
        saved = dict(name=self.encoding.name, pattern=self.encoding._pat_str, pieces=pieces,
                     fingerprint=self.fingerprint)
        write_atomically(path, json.dumps(saved).encode())


def load_tokenizer(path):
    """Load what Tokenizer.save wrote, or the tokenizer.json of a Hugging Face folder.

    Raises ValueError if the file is damaged."""
    # Our own format: pieces, or the JSON of a Hugging Face tokenizer and the id of its eot.
    try:
        text = Path(path).read_text("utf-8")
        saved = json.loads(text)
        if "pieces" in saved:
            ranks = {bytes.fromhex(piece): i for i, piece in enumerate(saved["pieces"]) if piece}
            tokenizer = Tokenizer(saved["name"], saved["pattern"], ranks)
            if tokenizer.fingerprint != saved["fingerprint"]:
                raise ValueError
            return tokenizer
        theirs = None
        if "huggingface" in saved:
            theirs = saved["huggingface"], saved["eot"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError):
        raise ValueError(f"{path}: damaged") from None

    # Hugging Face: the original tokenizer.json, or what a run saved of it.
    from notes.huggingface import HuggingFaceTokenizer, read_hf_tokenizer
    if not theirs:
        return read_hf_tokenizer(Path(path), text)
    if [type(part) for part in theirs] != [str, int]:
        raise ValueError(f"{path}: damaged")
    tokenizer = HuggingFaceTokenizer(*theirs)
    if not 0 <= tokenizer.eot < tokenizer.n_vocab:
        raise ValueError(f"{path}: damaged: eot {tokenizer.eot}")
    return tokenizer


def known_encoding(name):
    """A tiktoken encoding with our specials instead of its own. gpt2's <|endoftext|> keeps its id.

    Raises ValueError if the name is unknown or tiktoken cannot load the encoding."""
    # Look the name up, then load it: from TIKTOKEN_CACHE_DIR or the network.
    known = tiktoken.list_encoding_names()
    if name not in known:
        raise ValueError(f"tokenizer {name!r}: known are bytes, bpe, PATH/tokenizer.json, "
                         f"{', '.join(known)}")
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:                       # no network, or a damaged file
        raise ValueError(f"tokenizer {name!r}: tiktoken cannot get its file ({type(error).__name__}); put "
                         "it into the folder that TIKTOKEN_CACHE_DIR names, or use bpe") from None
    return Tokenizer(name, encoding._pat_str, encoding._mergeable_ranks)


# ---- the cache: written once, verified on every load, shared by processes ----------------------------------

def cached_bpe(folder, vocab_size, keys, texts):
    """The BPE tokenizer of the training texts, loaded from the cache or trained and saved there.

    keys: cache keys of the texts. texts(): the texts, called only if the tokenizer has to be trained."""
    key = sha256(*sorted(keys), str(vocab_size), PATTERN, *map(inspect.getsource, (merge, train_bpe)))
    path = Path(folder, f"bpe-{vocab_size}-{key[:16]}.json")
    if path.exists():
        try:
            return load_tokenizer(path)
        except ValueError as error:
            print(f"{error}, building it again")

    # Train it.
    docs = texts()
    began = time.time()
    tokenizer = Tokenizer("bpe", PATTERN, train_bpe(docs, vocab_size))
    tokenizer.save(path)
    size = sum(map(len, docs)) / 1e6
    print(f"{path}: {vocab_size} tokens from {size:.1f} MB, {time.time() - began:.1f} s")
    return tokenizer


class Domain(NamedTuple):
    train: np.ndarray            # tokens, uint16 or uint32, memory-mapped; an eot follows every document
    val: np.ndarray
    train_bytes: int             # UTF-8 bytes of the text, without the eots
    val_bytes: int
    documents: int               # train + validation; a document cut in two counts twice
    sha256: list                 # digests of the tokens: train, val
    said: str = ""               # of conversations: how they fill their windows, and what was left out


def cached_domain(folder, name, key, tokenizer, texts, verified):
    """The Domain of a text and a tokenizer: see cached_shards.

    texts(): (train documents, val documents), called only if the shards have to be built."""
    dtype = np.dtype("<u4")
    if tokenizer.n_vocab <= 65536:
        dtype = np.dtype("<u2")
    write = lambda about, paths: write_shards(about, paths, dtype, tokenizer, texts())
    shards, facts = cached_shards(folder, name, key, tokenizer, dtype, write, verified)
    return Domain(*shards, *facts["bytes"], facts["documents"], facts["sha256"])


def cached_shards(folder, name, key, tokenizer, dtype, write, verified, more=()):
    """The shards of both sides and the facts about them, loaded from the cache or built there.

    key: cache key of what they are made of. write(about, paths): builds them, → facts. more: names of facts.
    verified {file name: stamp}: shards whose digest has been checked; these two are added."""
    stem = f"{name}-{sha256(key, tokenizer.fingerprint)[:16]}"
    paths = [Path(folder, f"{stem}-{side}.bin") for side in ("train", "val")]
    about = Path(folder, f"{stem}.json")
    facts = intact(about, paths, dtype, verified, more) or write(about, paths)
    verified.update({path.name: stamp(path) for path in paths})
    return [np.memmap(path, dtype, "r") for path in paths], facts


def intact(about, paths, dtype, verified, more=()):
    """The facts in the JSON file `about`, also those named in `more`, if the shards `paths` agree with them,
    else None.

    Prints a line if anything is damaged. Shards in `verified` whose stamp is unchanged are not hashed; if it
    is None, no shard is."""
    facts = read_json(about, "tokens", "bytes", "documents", "sha256", *more)
    if not facts:
        return None

    # Each of these facts is a pair: of the training and of the validation shard.
    for key, kind in (("tokens", int), ("bytes", int), ("sha256", str)):
        if type(facts[key]) is not list or [type(value) for value in facts[key]] != [kind] * 2:
            print(f"{about}: damaged, building it again")
            return None

    # The shards: first the size, then the digest.
    for path, n, expected in zip(paths, facts["tokens"], facts["sha256"]):
        size = path.stat().st_size if path.exists() else 0
        known = verified is None or path.exists() and verified.get(path.name) == stamp(path)
        damaged = size != n * dtype.itemsize
        if not damaged and not known:
            damaged = sha256(np.memmap(path, dtype, "r")) != expected
        if damaged:
            print(f"{path}: damaged ({size} of {n * dtype.itemsize} bytes), building it again")
            return None
    return facts


def write_shards(about, paths, dtype, tokenizer, docs):
    """Encode docs, (train documents, val documents), into shards → facts, as `intact` returns them."""
    began = time.time()
    facts = dict(tokens=[], bytes=[], sha256=[], documents=sum(map(len, docs)))
    for path, part in zip(paths, docs):
        # Threads run in parallel here: tiktoken releases the interpreter lock.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            ids = [ids for doc in pool.map(tokenizer.encode, part) for ids in (doc, [tokenizer.eot])]
        ids = np.concatenate(ids).astype(dtype)
        write_atomically(path, ids)
        facts["tokens"].append(len(ids))
        facts["bytes"].append(sum(len(doc.encode()) for doc in part))
        facts["sha256"].append(sha256(ids))

    # The facts come last: shards without them do not count.
    write_atomically(about, json.dumps(facts).encode())
    train, val = facts["bytes"]
    print(f"{about}: {(train + val) / 1e6:.1f} MB, {sum(facts['tokens']):,} tokens, "
          f"of which {val / (train + val):.1%} are validation, {time.time() - began:.1f} s")
    return facts


# ---- large text: one shard for each part, made by worker processes -----------------------------------------

READER = 2                       # raise it when reading or splitting changes: it is part of the shards' key
PART = 64_000_000                # bytes of the files that share a shard; a longer file has one of its own
BATCH = 1_000_000                # bytes of text that are encoded at a time
WORKER_MEMORY = 1_000_000_000    # bytes that a worker may allocate; it refuses a file that needs more
BPE_SAMPLE = 64_000_000          # bytes of text that BPE is trained on if a domain is large


class Plan(NamedTuple):
    """How the shards of a large domain are made, one for each part. Worker processes get it as JSON."""
    source: Source
    parts: list                  # of the source's files: see parts_of
    folder: str                  # of the shards, and of tokenizer.json
    width: int                   # bytes of a token: 2 or 4
    budget: str
    verified_by: str             # the launch whose processes verify the digests, or ""


class Shards:
    """The tokens of one side of a domain: arrays in files, all mapped into memory at the beginning, so that a
    later start that makes a shard anew changes nothing for this one."""

    def __init__(self, paths, counts, dtype):
        self.paths = paths
        self.counts = counts                                     # tokens of each
        self.arrays = []

        # A mapping keeps its file open.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = min(most, 10_240) if sys.platform == "darwin" else most
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
        for path, n in zip(paths, counts):
            self.arrays.append(np.memmap(path, dtype, "r") if n else np.zeros(0, dtype))
            if len(self.arrays[-1]) != n:
                raise ValueError(f"{path}: {len(self.arrays[-1]):,} tokens, not {n:,}: start again")

    def __len__(self):
        return sum(self.counts)

    def __getitem__(self, cut):
        """The first tokens, [:n]."""
        n = len(range(len(self))[cut])
        before = np.cumsum([0, *self.counts])
        return np.concatenate([ids[:max(0, n - start)] for ids, start in zip(self.arrays, before.tolist())])


class Windows:
    """Windows of T + 1 tokens, T apart, numbered through the shards of a side. None crosses a shard's end."""

    def __init__(self, ids, T):
        self.ids = ids
        self.T = T
        self.arrays = ids.arrays if isinstance(ids, Shards) else [ids]
        self.ends = np.cumsum([max(0, (len(one) - 1) // T) for one in self.arrays])        # (shards,)

    def __len__(self):
        return int(self.ends[-1])

    def __call__(self, k):
        """Window k → (the shard's tokens, the offset of the window in them)"""
        i = int(np.searchsorted(self.ends, k, side="right"))
        before = self.ends[i - 1] if i else 0
        return self.arrays[i], int(k - before) * self.T


def parts_of(files):
    """Runs of consecutive files of at most PART bytes, or a single one: lists of files. Their shards do not
    depend on anything else, and windows cross from file to file within a part."""
    parts = []
    room = 0
    for file in files:
        size = os.stat(file).st_size
        if size > room:
            parts.append([])
            room = PART
        parts[-1].append(file)
        room -= size
    return parts


def stem(source, part):
    """The name of a part's shards: that of its first file, made unique by a digest of all its paths."""
    readable = re.sub(r"[^A-Za-z0-9_.-]", "-", Path(part[0]).name)[-60:]
    return f"{readable}-{sha256(*[os.path.relpath(file, source.root) for file in part])[:12]}"


def shard_paths(plan, part):
    """(manifest, [train tokens, validation tokens], documents) of a part's shards."""
    start = f"{plan.folder}/{stem(plan.source, part)}"
    return Path(f"{start}.json"), [Path(f"{start}-train.bin"), Path(f"{start}-val.bin")], \
        Path(f"{start}-rows.bin")


def shard_of(plan, part, limit, settled=True):
    """The manifest of a part's shards, if they are whole and were made with this limit; else None.

    settled: also require that the files are unchanged, and that this launch has verified the digests."""
    about, paths, table = shard_paths(plan, part)
    dtype = np.dtype(f"<u{plan.width}")
    facts = intact(about, paths, dtype, None, ("limit", "spent", "sources", "counts", "verified_by",
                                             "files", "options"))
    if not facts or facts["limit"] != limit or not table.exists():
        return None
    if table.stat().st_size != 32 * facts["documents"]:
        return None
    if settled and (any(known[:2] != stamp(file) for known, file in zip(facts["sources"], part))
                    or plan.verified_by and facts["verified_by"] != plan.verified_by):
        return None
    return facts


def settle(plan, part, limit, tokenizer, threads, tell):
    """Make the shards of a part, unless those there prove right. The caller holds the claim on them."""
    facts = shard_of(plan, part, limit)
    if facts:
        return facts
    about, paths, _ = shard_paths(plan, part)
    facts = shard_of(plan, part, limit, settled=False)
    if facts:
        # They are whole: compare the digests of files with another time, and of what is to be verified. A
        # file of which only the beginning was read has none.
        known = facts["sources"]
        now = [source_of(file, one) if one[2] or one[:2] == stamp(file) else one[:2]
               for file, one in zip(part, known)]
        same = [one[2:] for one in now] == [one[2:] for one in known]
        if same and plan.verified_by:
            same = [tokens_digest(path) for path in paths] == facts["sha256"]
        if same:
            facts.update(sources=now, verified_by=plan.verified_by)
            write_atomically(about, json.dumps(facts).encode())
            return facts
        print(f"{about}: the source or the shards are not those it was written for, building it again",
              file=sys.stderr)
    return build_shards(plan, part, limit, tokenizer, threads, tell)


def source_of(file, known=None):
    """[size, time, digest] of a file, hashed unless its stamp is that of `known`. A file that could still
    change without changing its stamp has the time 0."""
    name = str(Path(file).absolute())
    record = {name: known}
    hashed = digest(Path(file), record)
    return record.get(name, [stamp(file)[0], 0, hashed])


def build_shards(plan, part, limit, tokenizer, threads, tell):
    """Tokenize the files of a part into its shards, then write their manifest → the manifest.

    limit: bytes or documents that may still be read, or None. tell(text=.., tokens=.., at=..) is called with
    the progress. Memory does not depend on the size of the files, but for 8 bytes a document."""
    about, paths, table = shard_paths(plan, part)
    before = [stamp(file) for file in part]

    # To hash a file of which a budget takes the beginning could take hours: its stamp has to do.
    of_bytes = parse_budget(plan.budget)[1]
    whole = limit is None or of_bytes and limit >= sum(size for size, _ in before)
    sources = [source_of(file) if whole else [*stamp(file), ""] for file in part]
    counts = Counter()
    dtype = np.dtype(f"<u{plan.width}")
    tokens, sizes, documents, spent = [0, 0], [0, 0], 0, [0]

    # Write the tokens as they come: without a manifest they do not count. The claim allows temporary files
    # of a fixed name, so that those of a process that was killed are overwritten.
    about.unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        sides = [stack.enter_context(atomic(path, alone=True)) for path in paths]
        rows_file = stack.enter_context(atomic(table, alone=True))
        chosen = chosen_documents(plan, part, limit, counts, spent)
        for table, ids in encoded(chosen, tokenizer, threads, dtype):      # (n, 5): file, row, side, tokens,
            for side in (0, 1):                                            # bytes
                mine = table[:, 2] == side
                lengths = table[mine, 3]
                sizes[side] += int(table[mine, 4].sum())
                table[mine, 3] = tokens[side] + np.cumsum(lengths) - lengths       # where each begins
                tokens[side] += len(ids[side])
                sides[side].write(ids[side])
            rows_file.write(np.ascontiguousarray(table[:, :4], "<i8"))
            documents += len(table)
            tell(text=int(table[:, 4].sum()), tokens=len(ids[0]) + len(ids[1]), at=counts["at"])
    for file, then in zip(part, before):
        if stamp(file) != then:
            raise ValueError(f"files: {file} has changed while it was read: start again when it is complete")

    # The manifest comes last.
    facts = dict(tokens=tokens, bytes=sizes, documents=documents, sha256=[tokens_digest(p) for p in paths],
                 limit=limit, spent=spent[0], sources=sources, verified_by=plan.verified_by, files=part,
                 options=dict(column=plan.source.column, where=plan.source.where, set=plan.source.kind),
                 counts={why: n for why, n in counts.items() if why != "at"})
    write_atomically(about, json.dumps(facts).encode())
    return facts


def chosen_documents(plan, part, limit, counts, spent):
    """(file, row, side, text) of each document of a part that is kept: file is an index; side 0 is training,
    1 validation.

    As in split_documents, its hash decides the side, so that copies in other parts have the same; a
    repetition within the part is left out. Bounds for few documents are not needed here. Training documents
    that count several times come again in further turns through the part: no window has two of them in a
    row."""
    of_bytes = parse_budget(plan.budget)[1]
    for turn in range(1, 1 + (datasets().MOST_OFTEN if plan.source.rehydrate else 1)):
        seen = Seen()
        if turn > 1:
            counts = Counter()                                   # rows and what is left out count once
        for i, file in enumerate(part):
            for row in rows_of_file(plan.source, file, counts):
                hashed = sha256(row.text)
                if not seen.add(int(hashed[:16], 16)):
                    counts["repeated in their shard"] += 1
                    continue
                side = int(is_validation(row.split_with or hashed))
                if turn > (1 if side else row.times):
                    continue
                yield i, row.number, side, row.text
                spent[0] += len(row.text.encode()) if of_bytes else 1
                if limit is not None and spent[0] >= limit:
                    return


class Seen:
    """A set of 64-bit hashes at 8 bytes each: a sorted array, and a set of the last ones."""

    def __init__(self, room=1 << 18):
        self.old = np.zeros(0, np.uint64)
        self.new = set()
        self.room = room

    def add(self, value):
        """Add a hash → whether it is new."""
        if value in self.new:
            return False
        at = np.searchsorted(self.old, np.uint64(value))
        if at < len(self.old) and self.old[at] == np.uint64(value):
            return False
        self.new.add(value)
        if len(self.new) >= self.room:
            new = np.fromiter(self.new, np.uint64, len(self.new))
            self.old = np.sort(np.concatenate([self.old, new]))
            self.new.clear()
        return True


def encoded(chosen, tokenizer, threads, dtype):
    """(file, row, side, text) → for each batch a table of (file, row, side, tokens, bytes of text), and the
    tokens of each side, with an eot after every document, in the same order.

    Threads run in parallel here: tiktoken releases the interpreter lock. Few batches wait at a time."""
    end = [tokenizer.eot]

    def encode(batch):
        ids = [[np.zeros(0, dtype)], [np.zeros(0, dtype)]]
        table = []
        for i, number, side, text in batch:
            here = tokenizer.encode(text)
            ids[side] += here, end
            table.append((i, number, side, len(here) + 1, len(text.encode())))
        return np.array(table, np.int64), [np.concatenate(part).astype(dtype) for part in ids]

    return in_pool(encode, chosen, operator.itemgetter(3), BATCH, threads, ThreadPoolExecutor)


def tokens_digest(path):
    """What `sha256` gives for the array in a file."""
    return file_digest(path, b"%d:" % os.stat(path).st_size)


@contextlib.contextmanager
def claimed(plan, part, wait):
    """Yield whether the shards of a part are now this process's to make. The kernel ends the claim of a
    process that dies. Different parts are different bytes of the same lock file."""
    byte = int(sha256(stem(plan.source, part))[:12], 16)
    with open(Path(plan.folder, "claims"), "w") as claims:
        try:
            fcntl.lockf(claims, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, byte)
        except (BlockingIOError, PermissionError):
            yield False
            return
        yield True


def in_order(plan, get):
    """[manifest] of the parts in order, as far as the budget goes. get(part, limit) gives one, or None."""
    found = []
    left = parse_budget(plan.budget)[0]
    for part in plan.parts:
        limit = None if left == math.inf else left
        facts = get(part, limit)
        found.append(facts)
        if limit is not None:
            if facts is None:
                break
            left -= facts["spent"]
            if left <= 0:
                break
    return found


def work(plan, threads, tell):
    """Make the shards that nobody else is making; then wait for those of others, or make them after all."""
    tokenizer = load_tokenizer(Path(plan.folder, "tokenizer.json"))

    def make(part, limit, wait):
        facts = shard_of(plan, part, limit)
        if facts:
            return facts
        with claimed(plan, part, wait) as mine:
            return settle(plan, part, limit, tokenizer, threads,
                          lambda **seen: tell(part=part, **seen)) if mine else None

    # A budget needs to know what the parts before have spent, so one after another.
    for wait in (False, True):
        in_order(plan, lambda part, limit: make(part, limit, wait or limit is not None))


def work_as_told():
    """The main function of a worker process: the plan comes in as JSON, the progress goes out as lines of
    JSON. It ends with its parent."""
    told = json.load(sys.stdin)
    plan = Plan(**told["plan"])
    plan = plan._replace(source=Source(**plan.source))

    # Standard output is the pipe to the parent, for messages alone; each is written at once, so that lines of
    # different workers do not mix. Terminated, it removes its temporary files.
    _, most = resource.getrlimit(resource.RLIMIT_DATA)           # -1: unlimited
    memory = min(told["memory"], most) if most >= 0 else told["memory"]
    resource.setrlimit(resource.RLIMIT_DATA, (memory, most))
    pipe = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    end_with_parent()
    unsaid = Counter()
    last = [0.0]

    def say(**message):
        os.write(pipe, json.dumps(message).encode() + b"\n")

    def tell(part, text, tokens, at):
        unsaid.update(text=text, tokens=tokens)
        if time.time() - last[0] > 0.5:
            last[0] = time.time()
            say(**unsaid, part=stem(plan.source, part), at=at)
            unsaid.clear()

    try:
        work(plan, told["threads"], tell)
    except (ValueError, OSError, MemoryError) as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)            # it ends by itself
        said = str(error)
        if isinstance(error, MemoryError):
            said = f"a worker needs more than {told['memory'] / 1e6:,.0f} MB of memory"
        if isinstance(error, (OSError, MemoryError)):
            said = f"{plan.folder}: {said}; shards that are complete are kept"
        say(error=said[:500])
        raise SystemExit(1) from None


def run_workers(plan, workers, sizes):
    """Run worker processes and print their progress. Raises ValueError if one fails.

    They are started afresh, without torch: about 130 MB each, and safe beside threads of this process.
    sizes {stem: bytes of the part}: those to be made."""
    cores = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    count = 1 if plan.budget else min(workers or cores, len(sizes))
    told = json.dumps(dict(plan=plan._replace(source=plan.source._asdict())._asdict(),
                           threads=max(1, cores // count), memory=WORKER_MEMORY))
    env = dict(os.environ, ARROW_DEFAULT_MEMORY_POOL="system")   # its own would reserve a GB at once
    out, into = os.pipe()
    processes = []
    with open(out) as messages:
        try:
            for _ in range(count):
                process = subprocess.Popen([sys.executable, Path(__file__).resolve(), "work"], text=True,
                                           env=env, stdin=subprocess.PIPE, stdout=into)
                processes.append(process)
                with process.stdin:
                    process.stdin.write(told)
            os.close(into)
            progress(plan, messages, sizes)
            ended = [process.wait() for process in processes]
        finally:
            for process in processes:
                process.terminate()
                process.wait()
    if any(ended):
        why = NO_MEMORY if min(ended) < 0 else f"a worker process ended with status {max(ended)}"
        raise ValueError(f"{plan.folder}: {why}; start again to go on: shards that are complete are kept")


def progress(plan, messages, sizes):
    """Print how far the workers are, every five seconds, until they have all ended."""
    began = said = time.time()
    total = Counter()
    budget, of_bytes = parse_budget(plan.budget)
    done = {}                                                    # bytes read of the last file of each part
    for message in map(json.loads, messages):
        if "error" in message:
            raise ValueError(message["error"])
        total.update(text=message.get("text", 0), tokens=message.get("tokens", 0))
        done[message["part"]] = message["at"]
        now = time.time()
        if now - said < 5 or os.environ.get("RANK", "0") != "0":
            continue
        said = now

        # The share of the bytes on the disk, or of the budget, that has been read.
        finished = [name for name in sizes if Path(plan.folder, f"{name}.json").exists()]
        read = sum(sizes[name] if name in finished else done.get(name, 0) for name in sizes)
        share = read / sum(sizes.values())
        if of_bytes and budget < math.inf:
            share = total["text"] / budget
        seconds = now - began
        left = seconds / max(share, 1e-6) - seconds
        print(f"{plan.source.name}: {len(finished):,} of {len(sizes):,} shards, "
              f"{total['text'] / seconds / 1e6:.1f} MB/s, {total['tokens'] / seconds / 1e6:.2f}M tokens/s, "
              f"{left // 60:.0f}:{left % 60:02.0f} min left", flush=True)


def large_domain(config, source, left_out, tokenizer, verify, workers):
    """The Domain of a large source: its shards are looked at, and made if they are missing."""
    # The folder's name stands for everything that its shards depend on, except the files themselves.
    root = Path(source.root).absolute()
    key = sha256(tokenizer.fingerprint, str(root), how_read(source, config))
    folder = Path(config.cache, f"{source.name}-{key[:16]}")
    width = 2 if tokenizer.n_vocab <= 65536 else 4
    plan = Plan(source, parts_of(source.files), str(folder), width, config.budget, verify)

    # Make what is missing.
    found = in_order(plan, functools.partial(shard_of, plan))
    began = 0
    loud = os.environ.get("RANK", "0") == "0"
    if None in found:
        began = time.time()
        if loud:
            print(f"{source.name}={source.root}: {several(len(source.files), 'file')}{described(source)}"
                  f"{reasons(left_out, {})}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(folder / "tokenizer.json")
        missing = [part for part, facts in itertools.zip_longest(plan.parts, found) if facts is None]
        run_workers(plan, workers, {stem(source, part): sum(os.stat(file).st_size for file in part)
                                    for part in missing})
        found = in_order(plan, functools.partial(shard_of, plan, settled=False))
        if None in found:
            raise ValueError(f"{folder}: shards are missing although they were made: start again")
    counts = sum((Counter(facts["counts"]) for facts in found), Counter())
    sizes = [sum(facts["bytes"][side] for facts in found) for side in (0, 1)]
    if not sum(sizes):
        raise ValueError(f"files: {source.name}={source.root} is empty{reasons({}, counts)}; give text")
    if began and loud:
        tokens = sum(sum(facts["tokens"]) for facts in found)
        print(f"{folder}: {several(len(found), 'shard')}, {sum(sizes) / 1e6:.1f} MB, {tokens:,} tokens, of "
              f"which {sizes[1] / sum(sizes):.1%} are validation, {time.time() - began:.1f} s"
              f"{reasons({}, counts)}", flush=True)

    # A single shard is an array, as the domains in memory have it. If a manifest is the same after mapping,
    # no other process has made its shards anew meanwhile: it would have removed it first.
    sides = []
    abouts, paths, _ = zip(*[shard_paths(plan, part) for part in plan.parts[:len(found)]])
    for side in (0, 1):
        shards = Shards([pair[side] for pair in paths], [facts["tokens"][side] for facts in found],
                        np.dtype(f"<u{width}"))
        sides.append(shards.arrays[0] if len(found) == 1 else shards)
    for about, facts in zip(abouts, found):
        if (read_json(about, "sha256") or {}).get("sha256") != facts["sha256"]:
            raise ValueError(f"{about}: another process has made these shards anew: start again")
    digests = [one for facts in found for one in facts["sha256"]]
    return Domain(*sides, *sizes, sum(facts["documents"] for facts in found), digests)


def sample_of_mixture(config, large, names, weights, texts):
    """The documents that BPE is trained on if a domain is large: about BPE_SAMPLE bytes of training text,
    each domain with its mean weight. A large one gives them from up to 16 parts, spread evenly over all,
    or from the first ones if there is a budget. large {name: Source}; texts(name): a small domain's."""
    found = []
    for name, share in zip(names, weights / weights.sum() * BPE_SAMPLE):
        parts = parts_of(large[name].files) if name in large else [[""]]
        if not config.budget:
            parts = parts[::max(1, len(parts) // 16)][:16]
        files = [file for part in parts for file in part]
        size = 0
        for i, file in enumerate(files):
            goal = share if config.budget else share * (i + 1) / len(files)
            if size >= goal:
                continue
            if name in large:
                here = (row.text for row in rows_of_file(large[name], file, Counter())
                        if not is_validation(row.split_with or sha256(row.text)))
            else:
                here = texts(name)
            for text in here:
                found.append(text)
                size += len(text.encode())
                if size >= goal:
                    break
        print(f"bpe: trained on {size / 1e6:.1f} MB of {name}", flush=True)
    return found


def large_key(source, config):
    """Cache key of a large source's text: names and sizes of its files, and how they are read."""
    files = [f"{os.path.relpath(file, source.root)} {os.stat(file).st_size}" for file in source.files]
    return sha256(how_read(source, config), *files)


# ---- a corpus: tokenizer and domains -----------------------------------------------------------------------

class Corpus(NamedTuple):
    tokenizer: Tokenizer
    domains: dict                # name → Domain
    start: np.ndarray            # (D,) weights, in the order of `domains`
    end: np.ndarray              # (D,)
    fingerprint: str             # digest of the tokenizer and of all domains' tokens; checkpoints carry it
    pack: int = 0                # 0: text; conversations: how many windows stay together, 2 with pairs


def tokenizer_of(config, vocab_size, keys, texts):
    """The tokenizer that config.tokenizer names. keys, texts: see cached_bpe."""
    if config.tokenizer == "bpe":
        return cached_bpe(config.cache, vocab_size, keys, texts)
    if config.tokenizer == "bytes":
        return Tokenizer("bytes", r"(?s:.)", {bytes([i]): i for i in range(256)})
    if config.tokenizer.endswith(".json"):
        return load_tokenizer(config.tokenizer)
    return known_encoding(config.tokenizer)


def prepare(config, vocab_size, launch="", workers=0):
    """DataConfig and the model's vocab_size → Corpus, built on the first call, later loaded from the cache.

    A text file whose stamp is unchanged is not read again. Of the processes with the same non-empty
    `launch`, the first verifies the digests of the shards; the others trust it for shards whose stamp is
    unchanged. Shards of large text are only verified if config.verify, by all processes of a launch together.
    Raises ValueError, saying what to correct."""
    names, start, end, paths = parse_domains(config)
    paths, config = cleaned(paths, config, workers)
    found = {name: find_source(name, path, config) for name, path in paths.items()}
    sets = [source for source, _ in found.values() if source.kind]
    for line in datasets().twice(sets) if len(sets) > 1 else ():
        print(line)
    large = {name: source for name, (source, _) in found.items() if source.large}
    with remembered(config.cache, launch) as (record, verified):
        # Texts are extracted only if something has to be built from them, and at most once.
        @functools.cache
        def split(name):
            together = {}
            docs = documents(name, paths.get(name), config, together)
            return split_documents(docs, together=together)

        def training_texts():
            if not large:
                return [doc for name in names for doc in split(name)[0]]
            return sample_of_mixture(config, large, names, start + end, lambda name: split(name)[0])

        # The tokenizer comes first: shards depend on it.
        keys = {}
        for name in names:
            if name in large:
                keys[name] = large_key(large[name], config)
            else:
                keys[name] = text_key(record, name, paths.get(name), config)
        tokenizer = tokenizer_of(config, vocab_size, keys.values(), training_texts)
        if vocab_size < tokenizer.n_vocab:
            raise ValueError(f"vocab_size {vocab_size}: {config.tokenizer} needs {tokenizer.n_vocab}")
        domains = dict.fromkeys(names)
        for name in names:
            if name not in large:
                texts = functools.partial(split, name)
                domains[name] = cached_domain(config.cache, name, keys[name], tokenizer, texts, verified)

    # Large text has a lock for each file: the ranks of a launch make and verify its shards together.
    verify = ""
    if config.verify:
        verify = launch or f"{os.getpid()} {time.time()}"
    for name in large:
        domains[name] = large_domain(config, *found[name], tokenizer, verify, workers)

    return corpus_of(tokenizer, domains, start, end)


@contextlib.contextmanager
def remembered(cache, launch):
    """Hold the cache's lock → (digests of source files, stamps of shards that this `launch` has verified).
    Both are to be updated in place, and are saved for the next call."""
    with locked(cache):
        sources = Path(cache, "sources.json")
        record = {}
        saved = read_json(sources, "files")
        if saved and type(saved["files"]) is dict:
            record = saved["files"]
        before = dict(record)
        seen = Path(cache, "verified.json")
        verified = {}
        saved = read_json(seen, "launch", "files")
        if launch and saved and saved["launch"] == launch and type(saved["files"]) is dict:
            verified = saved["files"]
        yield record, verified

        if record != before:
            write_atomically(sources, json.dumps(dict(files=record)).encode())
        if launch:
            write_atomically(seen, json.dumps(dict(launch=launch, files=verified)).encode())


def corpus_of(tokenizer, domains, start, end, pack=0):
    """The Corpus of these domains. The fingerprint covers names, tokens and tokenizer."""
    digests = []
    for name, domain in domains.items():
        digests += [name, *domain.sha256]
    return Corpus(tokenizer, domains, start, end, sha256(tokenizer.fingerprint, *digests), pack)


def origin(corpus, config, name, side, at):
    """Where the document with token `at` of a domain of files comes from: (file, number of the row).

    side: "train" or "val". Large text has a table of it; text held in memory is read again."""
    ids = getattr(corpus.domains[name], side)
    paths, config = cleaned(parse_domains(config)[3], config)
    found = None
    shards, counts = (ids.paths, ids.counts) if isinstance(ids, Shards) else ([ids.filename], [len(ids)])
    ends = np.cumsum(counts)
    i = int(np.searchsorted(ends, at, side="right"))
    start = str(shards[i]).removesuffix(f"-{side}.bin")
    if Path(f"{start}-rows.bin").exists():
        table = np.fromfile(f"{start}-rows.bin", "<i8").reshape(-1, 4)     # file, row, side, first token
        table = table[table[:, 2] == (side == "val")]
        first = np.searchsorted(table[:, 3], at - (ends[i] - counts[i]), side="right") - 1
        files = json.loads(Path(f"{start}.json").read_bytes())["files"]
        found = files[table[first, 0]], int(table[first, 1])
    else:
        # The document's text, from the eot before it to its own. One that was cut begins or ends with it.
        eots = np.flatnonzero(ids[:at] == corpus.tokenizer.eot)
        start = eots[-1] + 1 if len(eots) else 0
        length = int(np.argmax(ids[start:] == corpus.tokenizer.eot))
        text = corpus.tokenizer.decode(ids[start:start + length].tolist())
        source, _ = find_source(name, paths[name], config)
        for row in itertools.chain(*(rows_of_file(source, file, Counter()) for file in source.files)):
            if row.text == text or not found and (row.text.startswith(text) or row.text.endswith(text)):
                found = row.file, row.number
                if row.text == text:
                    break
    if not found:
        raise ValueError(f"files: {name} has changed since it was tokenized")

    # Clean text says itself where it comes from.
    if config.clean:
        with open(found[0], "rb") as lines:
            line = json.loads(next(itertools.islice(lines, found[1] - 1, None)))
        found = line["file"], line["row"]
    return found


# ---- mixture: which domain the n-th window comes from ------------------------------------------------------

class Mixture:
    """Weights move linearly from start to end over `horizon` windows, then the end weights hold:
         P_i(t) = ∫₀ᵗ w_i                                                    (1)   Σ_i P_i(t) = t
         due_i(j) = t with P_i(t) = j + ½                                    (2)   j = 0, 1, ..
    Windows are taken in order of due time, ties by domain. Rounding P_i instead would take windows back."""

    def __init__(self, start, end, horizon):
        self.start, self.end = (np.asarray(w, np.float64) / np.sum(w) for w in (start, end))     # (D,)
        if horizon <= 0 and not np.array_equal(self.start, self.end):
            raise ValueError(f"horizon {horizon:g}: the weights move; over how long?  "
                             "--data.horizon=TOKENS")
        self.horizon = float(horizon) if horizon > 0 else 1.0

    def integral(self, t):
        """(1): t (...) in windows → (..., D)"""
        t = np.asarray(t, np.float64)[..., None]
        u = np.minimum(t, self.horizon)
        return self.start * u + (self.end - self.start) * u * u / (2 * self.horizon) + self.end * (t - u)

    def due(self, j):
        """(2): j (..., D) → times (..., D), inf if never due. It alone decides the order of windows."""
        s, e, h = self.start, self.end, self.horizon
        y = j + 0.5
        whole = self.integral(h)                                 # (D,) P at the horizon
        with np.errstate(divide="ignore", invalid="ignore"):
            # Before the horizon P is quadratic; this form of the root has no cancellation.
            moving = 2 * y / (s + np.sqrt(np.maximum(s * s + 2 * (e - s) * y / h, 0)))
            return np.where(y <= whole, moving, h + (y - whole) / e)

    def counts(self, n):
        """How many of the first n windows each domain supplies: n (N,) → (N, D) int64, rows sum to n."""
        # At time t, between n - D - 1 and n - 1 windows are due: all of them are among the first n.
        n = np.asarray(n, np.int64)
        t = np.maximum(n - len(self.start) / 2 - 1, 0)
        c = np.floor(self.integral(t) + 0.5).astype(np.int64)                              # (N, D)

        # Each round adds the window that is due next, in the rows that are short of n.
        rows = np.arange(len(n))
        short = n > c.sum(-1)                                                              # (N,) bool
        while short.any():
            c[rows, self.due(c).argmin(-1)] += short
            short = n > c.sum(-1)
        return c

    def window_domains(self, n0, n1):
        """Windows n0 .. n1-1 → (domain (N,), index within the domain (N,))"""
        c = self.counts(np.arange(n0, n1 + 1))
        domain = np.diff(c, axis=0).argmax(-1)
        return domain, c[np.arange(n1 - n0), domain]


def permute(i, n, key):
    """The image of i under a pseudo-random permutation of 0 .. n-1, which key selects.

    i (N,), n and key (N,) or scalar → (N,) int64. A Feistel network permutes 0 .. 4^half - 1, 4^half >= n;
    results >= n go through it again."""
    arrays = [np.atleast_1d(np.asarray(a)).astype(np.uint64) for a in (i, n, key)]
    i, n, key = np.broadcast_arrays(*arrays)
    half = np.array([max(1, (int(size - 1).bit_length() + 1) // 2) for size in n.tolist()], np.uint64)
    low = (np.uint64(1) << half) - np.uint64(1)                  # mask of the right half
    x = i
    out = np.ones(len(i), bool)                                  # not mapped into 0 .. n-1 yet

    # Six Feistel rounds at a time, until every result is in range.
    while out.any():
        left, right = x >> half, x & low
        for r in range(6):
            left, right = right, left ^ mix(right ^ mix(key + np.uint64(r))) & low
        x = np.where(out, left << half | right, x)
        out = x >= n
    return x.astype(np.int64)


# ---- batches -----------------------------------------------------------------------------------------------

class Batch(NamedTuple):
    x: torch.Tensor              # (b, T) int64 tokens
    y: torch.Tensor              # (b, T) int64 targets: the token after each
    doc_start: torch.Tensor      # (b, T) int64 position where the token's document begins, or None
    domain: torch.Tensor = None  # (b,)   int64 index in the order of corpus.domains
    weight: torch.Tensor = None  # (b, T) weights of the token losses, which are then summed; None: the mean
    label: torch.Tensor = None   # (b, T) int64, of conversations: see `packed`


def document_starts(x, eot):
    """x (b, T) → (b, T): one past the last eot before a token; an eot belongs to the document it ends."""
    starts = np.where(x == eot, np.arange(1, x.shape[1] + 1), 0)[:, :-1]
    return np.maximum.accumulate(np.pad(starts, ((0, 0), (1, 0))), axis=1)


def take_windows(sources, starts, T):
    """b token arrays and the offset of a window in each → x, y (b, T) int64"""
    import torch
    rows = np.stack([ids[a:a + T + 1] for ids, a in zip(sources, starts)]).astype(np.int64)
    return tuple(torch.from_numpy(np.ascontiguousarray(part)) for part in (rows[:, :-1], rows[:, 1:]))


class Batches:
    """batch(step), a pure function of (seed, step).  batch: windows in the global batch of a step.

    Window k of a domain is tokens [kT, kT + T + 1); with several shards, of the shard that holds it. An epoch
    visits each window once, in its own order."""
    pack = 1                                                     # windows that are drawn together

    def __init__(self, corpus, config, seed, batch, context):
        self.corpus = corpus
        self.config = config
        self.seed = seed
        self.batch = batch
        self.context = context

        # Every domain needs at least one window of training and of validation text.
        self.train = [Windows(domain.train, context) for domain in corpus.domains.values()]
        self.held_out = {name: Windows(domain.val, context) for name, domain in corpus.domains.items()}
        for name, train in zip(corpus.domains, self.train):
            if len(train.arrays) > 1 and os.environ.get("RANK", "0") == "0":
                lost = len(train.ids) - context * len(train)
                print(f"{name}: {lost:,} of {len(train.ids):,} tokens are in no window, at ends of shards")
            for part, windows in (("train", train), ("validation", self.held_out[name])):
                if not len(windows):
                    raise ValueError(f"domain {name!r}: {len(windows.ids)} {part} tokens, in no shard "
                                     f"as many as a window: context {context} + 1")
        self.windows = np.array([len(windows) for windows in self.train])                  # (D,)
        self.mixture = Mixture(corpus.start, corpus.end, config.horizon / context)

    def __call__(self, step, rank=0, world=1):
        """→ Batch: this rank's contiguous slice of the global batch, b = batch / world.

        Raises ValueError if the batch is not divisible by the number of ranks."""
        if self.batch % world:
            raise ValueError(f"{self.batch} windows a batch, not divisible by {world}")
        import torch
        b, T = self.batch // world, self.context
        n0 = step * self.batch + rank * b
        domain, k = self.drawn(n0, n0 + b)

        # Cut the windows from the shards.
        x, y = take_windows(*zip(*[self.train[i](window) for i, window in zip(domain, k)]), T)
        return Batch(x, y, self.doc_start(x), torch.from_numpy(domain))

    def drawn(self, n0, n1):
        """Draws n0 .. n1-1 → the domain of each (b,), and the number of its window there (b,)"""
        # The mixture gives each window its domain and its index j among that domain's windows.
        domain, j = self.mixture.window_domains(n0, n1)                                    # (b,), (b,)
        W = self.windows[domain]                                                           # (b,)

        # The permutation is keyed by seed, domain and epoch j // W.
        key = np.full(n1 - n0, self.seed & 2 ** 64 - 1, np.uint64)
        for part in (domain, j // W):
            key = mix(mix(key) + part.astype(np.uint64))
        return domain, permute(j % W, W, key)

    def doc_start(self, x):
        """`document_starts` of x (b, T) if the configuration asks for document masking, else None."""
        if not self.config.doc_mask:
            return None
        import torch
        return torch.from_numpy(document_starts(x.numpy(), self.corpus.tokenizer.eot))

    def epochs(self, step):
        """{name: epochs of the domain seen after `step` steps}"""
        epochs = self.mixture.counts([step * self.batch // self.pack])[0] / self.windows
        return dict(zip(self.corpus.domains, epochs.tolist()))

    def val(self, name, limit=0):
        """→ Batch of `limit` evenly spaced validation windows; 0: all"""
        windows = self.held_out[name]
        n = min(limit, len(windows)) or len(windows)
        x, y = take_windows(*zip(*map(windows, np.arange(n) * len(windows) // n)), self.context)
        return Batch(x, y, self.doc_start(x))


class ChatBatches(Batches):
    """batch(step) of packed conversations, a pure function of (seed, step), with weights and labels.

    The weights are those of a mean over the global batch: 1 / N at each of its N targets; or with P pairs,
    1 / P at the targets of chosen answers and -1 / P at those of rejected ones. All are multiplied by the
    number of ranks, since gradients are averaged over them. Every rank counts N or P itself."""

    def __init__(self, corpus, config, seed, batch, context):
        self.corpus, self.config, self.seed, self.batch, self.context = corpus, config, seed, batch, context
        self.pack = corpus.pack
        domains = corpus.domains.values()
        self.sides = {side: [getattr(domain, side) for domain in domains] for side in ("train", "val")}
        self.windows = np.array([len(shard) // self.pack for shard in self.sides["train"]])           # (D,)
        self.mixture = Mixture(corpus.start, corpus.end, config.horizon / context / self.pack)

        # Pairs are numbered through all domains of a side; a domain's last pack has its highest number.
        self.pairs = {side: np.cumsum([0] + [int(np.abs(shard[-self.pack:, 1]).max()) for shard in shards])
                      for side, shards in self.sides.items()}                                         # (D+1,)

    def __call__(self, step, rank=0, world=1):
        """→ Batch: this rank's slice of the global batch, as of `Batches`."""
        packs = self.batch // self.pack
        if self.batch % (self.pack * world):
            raise ValueError(f"{self.batch} windows a batch, not divisible by {world} × {self.pack}")
        domain, k = self.drawn(step * packs, (step + 1) * packs)
        own = slice(rank * packs // world, (rank + 1) * packs // world)
        batch = self.cut("train", *self.of_packs(domain[own], k[own]))
        count = sum(self.count(self.sides["train"][i][n * self.pack:(n + 1) * self.pack, 1])
                    for i, n in zip(domain, k))
        import torch
        return batch._replace(weight=batch.label.sign().to(torch.get_default_dtype()) * world / max(1, count))

    def of_packs(self, domain, k):
        """Packs k → their windows: domain and number of each, (b,)"""
        return domain.repeat(self.pack), (k[:, None] * self.pack + np.arange(self.pack)).reshape(-1)

    def count(self, labels):
        """Targets, or pairs, in a pack: labels (pack, T + 1). The pairs of a pack have adjacent numbers."""
        numbers = np.abs(labels[labels != 0])
        return len(numbers) if self.pack == 1 else int(numbers.max() - numbers.min()) + 1

    def cut(self, side, domain, window):
        """Windows of one side, by domain and number (b,) → Batch without weights."""
        import torch
        rows = np.stack([self.sides[side][i][n] for i, n in zip(domain, window)]).astype(np.int64)
        ids, labels = torch.from_numpy(rows).unbind(1)                                     # (b, T + 1)
        x, y, labels = (part.contiguous() for part in (ids[:, :-1], ids[:, 1:], labels[:, 1:]))
        domain = torch.from_numpy(domain)
        if self.pack == 2:
            labels += labels.sign() * torch.from_numpy(self.pairs[side])[domain, None]
        starts = torch.from_numpy(document_starts(x.numpy(), self.corpus.tokenizer.eot))
        return Batch(x, y, starts, domain, label=labels)

    def val(self, name, limit=0):
        """→ Batch of about `limit` evenly spaced validation windows; 0: all"""
        return self.cut("val", *self.evaluated(name, limit))

    def evaluated(self, name, limit):
        """The windows of `val`: domain and number of each, (b,)"""
        i = list(self.corpus.domains).index(name)
        packs = len(self.sides["val"][i]) // self.pack
        n = min(-(-limit // self.pack), packs) or packs
        return self.of_packs(np.full(n, i), np.arange(n) * packs // n)

    def ever(self, steps, limit):
        """{side: windows, domain and number of each (n,)}: those that `steps` steps draw, each once, and
        those that evaluations of `limit` windows use."""
        packs = steps * self.batch // self.pack
        drawn = np.unique(np.stack(self.drawn(0, packs)), axis=1)                          # (2, n)
        held_out = [self.evaluated(name, limit) for name in self.corpus.domains]
        return dict(train=self.of_packs(*drawn), val=np.concatenate(held_out, axis=1))


# ---- the bigram baseline, which a model has to beat --------------------------------------------------------

def bigram_bits(train, val, tokenizer):
    """bits/byte of val[1:] under a Witten-Bell bigram of the tokens, T(a) = distinct followers of a:
         p(b|a) = (c(ab) + T(a) u(b)) / (c(a) + T(a)),   u(b) = (c(b) + 1) / (N + V)
    c counts in train, N tokens. An eot costs bits and stands for 0 bytes. Only the first 20M tokens of train
    and of val are used."""
    V = tokenizer.n_vocab
    train = train[:20_000_000].astype(np.int64)
    val = val[:20_000_000].astype(np.int64)

    # Counts. Only the pairs that occur are stored, coded as aV + b.
    unigram = (np.bincount(train, minlength=V) + 1) / (len(train) + V)                     # (V,) u
    pairs, n = np.unique(train[:-1] * V + train[1:], return_counts=True)                   # c(ab)
    seen = np.bincount(train[:-1], minlength=V)                                            # (V,) c(a)
    followers = np.bincount(pairs // V, minlength=V)                                       # (V,) T(a)

    # c(ab) of each pair in val, 0 if it is not among `pairs`.
    a, b = val[:-1], val[1:]
    code = a * V + b
    at = np.minimum(np.searchsorted(pairs, code), len(pairs) - 1)
    both = np.where(pairs[at] == code, n[at], 0)

    # p(b|a); where a has no follower in train, only the unigram is left.
    smooth = (both + followers[a] * unigram[b]) / np.maximum(seen[a] + followers[a], 1)
    p = np.where(seen[a] > 0, smooth, unigram[b])
    return float(-np.log2(p).sum() / tokenizer.token_bytes[b].sum())


# ---- conversations -----------------------------------------------------------------------------------------

CONVENTIONS = {"prompt/chosen/rejected": ["chosen", "rejected"], "messages": ["messages"],
               "conversations": ["conversations"], "prompt/completion": ["prompt", "completion"],
               "instruction/output": ["instruction", "output"]}  # the fields by which they are known
ROLES = dict(user="user", human="user", assistant="assistant", gpt="assistant", model="assistant",
             bot="assistant", system="system")


class Conversation(NamedTuple):
    """A record of a chat set, and where it lies."""
    messages: list               # of {"role", "content"}; of a pair those with the chosen answer
    answers: tuple               # of a pair: the chosen and the rejected answer, lists of messages; else None
    record: dict                 # without fields that are null
    file: str
    number: int                  # from 1, as in Row


def convention_of(fields):
    """The name of a record's convention, by the names of its fields; "" if it has none."""
    return next((name for name, needs in CONVENTIONS.items() if all(need in fields for need in needs)), "")


def turns(value, role):
    """A field of a record → messages: of a string one with this role, or of a list of {"role", "content"} or
    {"from", "value"}. A content may be a list of parts, {"text"} each, which are joined. Two messages in a
    row may have the same role, and stay two. Raises ValueError, saying what is wrong."""
    if isinstance(value, str):
        value = [dict(role=role, content=value)]
    if not isinstance(value, list) or not value:
        raise ValueError("there is no list of messages")
    found = []
    for i, turn in enumerate(value, 1):
        if not isinstance(turn, dict):
            raise ValueError(f"message {i} is no object with a role and a content")
        said = turn.get("from") if turn.get("role") is None else turn["role"]
        content = turn.get("value") if turn.get("content") is None else turn["content"]
        if not isinstance(said, str) or said.lower() not in ROLES:
            raise ValueError(f"message {i} has the unknown role {said!r}; known: {', '.join(ROLES)}")
        if isinstance(content, list):
            if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
                raise ValueError(f"message {i}, of {said!r}, has a part that is no text")
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"message {i}, of {said!r}, is empty")
        content.encode()                                         # JSON may hold a lone surrogate
        found.append(dict(role=ROLES[said.lower()], content=content))
    return found


def messages_of(record):
    """A record of a chat set → (its convention, its messages, and of a pair its two answers; else None).
    Raises ValueError, saying what is wrong."""
    convention = convention_of(record)
    found = []
    answers = None
    if not convention:
        raise ValueError(f"no conversation: it has {shortened(record)}; known are {', '.join(CONVENTIONS)}")
    if isinstance(record.get("system"), str) and record["system"].strip():
        found += turns(record["system"], "system")
    if convention == "prompt/chosen/rejected":
        prompt, *answers = pair_of(record)
        answers = tuple(answers)
        found += prompt + answers[0]
    elif convention == "prompt/completion":
        found += turns(record["prompt"], "user") + turns(record["completion"], "assistant")
    elif convention == "instruction/output":
        for asked, answered in record.get("history") or []:
            found += turns(asked, "user") + turns(answered, "assistant")
        found += turns(instruction_of(record), "user") + turns(record["output"], "assistant")
    else:
        found += turns(record[convention], "user")
    if found[0]["role"] == "system" and found[:1] == found[1:2]:
        del found[0]                                             # in a field of its own, too
    if not any(message["role"] == "user" for message in found):
        raise ValueError("no message is a user's")
    return convention, found, answers


def instruction_of(record):
    """The instruction of a record, with its input; None if it has none."""
    asked, more = record.get("instruction"), record.get("input")
    return asked + "\n\n" + more if asked and more else asked


def pair_of(record):
    """A record with a chosen and a rejected answer → (prompt, chosen, rejected), lists of messages.

    Some sets repeat the conversation in both answers, from its beginning or from the last message of the
    prompt on; what they have in common belongs to the prompt. Raises ValueError, saying what is wrong."""
    chosen, rejected = turns(record["chosen"], "assistant"), turns(record["rejected"], "assistant")
    n = 0
    while n < min(len(chosen), len(rejected)) and chosen[n] == rejected[n]:
        n += 1
    common = chosen[:n]

    # Unless they repeat it from the beginning on, they go on from the prompt, or from within it.
    given = record.get("prompt") or instruction_of(record)
    given = turns(given, "user") if given else []
    k = next(k for k in range(min(len(given), n), -1, -1) if given[len(given) - k:] == common[:k])
    if not given and (not n or chosen[0]["role"] == "assistant"):
        raise ValueError("the two answers have no beginning in common, and there is no prompt")
    on = not n or chosen[0]["role"] == "assistant" or given and given[-1]["role"] == "system"
    prompt = given + common[k:] if k or on else common
    if n == min(len(chosen), len(rejected)):
        raise ValueError("the chosen and the rejected answer are equal, or one is the beginning of the other")
    if not chosen[n]["role"] == rejected[n]["role"] == "assistant":
        raise ValueError("the chosen and the rejected conversation differ before an answer")
    return prompt, chosen[n:], rejected[n:]


def conversations(name, path, config, take=lambda chat: chat, option="skip_bad"):
    """Every Conversation of a user's .jsonl, .json or .parquet files, or what `take` makes of it; that too
    raises a ValueError at what is bad. `path`, conditions, budget and `skip_bad` as in `rows`; option: the
    name of `skip_bad`. Prints how many there were, of which convention, and why rows were bad."""
    source, left_out = find_source(name, path, config)
    left, of_bytes = parse_budget(config.budget)
    found, counts, bad = Counter(), Counter(), Counter()
    for file, number, record in chat_records(source, counts):
        # Fields that are null are not there: a table has them that holds several conventions.
        record = {field: value for field, value in record.items() if value is not None}
        try:
            convention, messages, answers = messages_of(record)
            taken = take(Conversation(messages, answers, record, file, number))
        except BAD_RECORD as error:
            why = str(error) if type(error) is ValueError else "a field of the wrong type, or no UTF-8"
            if not source.skip_bad:
                raise ValueError(f"files: {file}, row {number}: {why}; mend it, or --{option}=true") from None
            bad[re.sub(r"^message \d+", "a message", why)] += 1
            continue
        found[convention] += 1
        left -= len(as_text(messages).encode()) if of_bytes else 1
        yield taken
        if left <= 0:
            break
    if bad:
        why = "; ".join(f"{n:,} × {why}" for why, n in bad.most_common(3))
        counts[f"bad ({why}{'; ...' if len(bad) > 3 else ''})"] = bad.total()
    if not found:
        raise ValueError(f"files: {name}={path} has no conversations{reasons({}, counts)}")
    said = ", ".join(f"{several(n, 'conversation')} as {convention}" for convention, n in found.items())
    print(f"{name}={path}: {said}{reasons(left_out, counts)}")


def chat_records(source, counts):
    """(file, number, record) of the records of a source that meet its conditions. Bad JSON gives {}."""
    for file in source.files:
        with reading(source.name):
            kind = "parquet" if packing_of(file) == "parquet" else kind_of(file)
            if kind in ("text", "csv"):
                raise ValueError(f"files: {file} holds no conversations: give .jsonl, .json or .parquet")
            read = datasets().parquet_rows(file) if kind == "parquet" else records(source, file, kind, counts)
            check = datasets().Check(source, file, kind) if source.where else None
            for number, record in read:
                if isinstance(record, bytes):
                    try:
                        record = json.loads(record)
                    except (ValueError, RecursionError):
                        record = {}
                failed = check and isinstance(record, dict) and check.failed(record)
                if failed:
                    counts[f"not {failed}"] += 1
                else:
                    yield file, number, record if isinstance(record, dict) else {}


def first_question(messages):
    """The content of the first message that is a user's."""
    return next(message["content"] for message in messages if message["role"] == "user")


def side_key(messages):
    """What decides the side of the split of a conversation, or pair: nothing but its first question, so that
    no question is on both sides, whatever is answered, asked further or said by the system."""
    return sha256(first_question(messages))[:16]


def as_text(messages):
    """A conversation as plain text, for a run that reads text."""
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages) + "\n"


# ---- conversations: packed into windows --------------------------------------------------------------------

def chat_ids(messages, tokenizer):
    """A conversation → its ids, and which of them are targets, both (n,). This is our template; a special is
    one id, and nothing stands between the turns:

        <|system|>text<|end|><|user|>text<|end|><|assistant|>text<|end|>

    Targets are the tokens of the answers, each with the <|end|> after it. Specials spelt in a text stay text.
    To ask for an answer, append the id of <|assistant|>."""
    ids, targets = [], []
    for message in messages:
        text = tokenizer.encode(message["content"])
        ids += [[tokenizer.specials[f"<|{message['role']}|>"]], text, [tokenizer.specials["<|end|>"]]]
        targets += [[False], np.full(len(text) + 1, message["role"] == "assistant")]
    return np.concatenate(ids or [[]]).astype(np.int32), np.concatenate(targets or [[]]).astype(bool)


def lessons(chat, pairs):
    """→ [(messages that are given, messages whose answers are learned)]: one of a conversation; of a pair the
    chosen and the rejected one. Raises ValueError, saying what is wrong."""
    found = [([], chat.messages)]
    if pairs:
        if not chat.answers:
            raise ValueError(f"no pair: it has {shortened(chat.record)}, not chosen and rejected")
        given = chat.messages[:-len(chat.answers[0])]
        found = [(given, answer) for answer in chat.answers]
    for given, learned in found:
        roles = [message["role"] for message in (*given, *learned)]
        if "system" in roles[1:]:
            at = roles.index("system", 1) + 1
            raise ValueError(f"message {at} is the system's, which can only be the first")
        if "assistant" not in roles:
            raise ValueError("no message is the assistant's, so there is nothing to learn")
    return found


def fitted(taught, tokenizer, T):
    """Lessons → ([(ids, targets)] or None, tokens of the longest). Each ends with an eot. A conversation that
    is longer than a window, T + 1 tokens, is cut after the last answer to a question that fits. If none does
    there is nothing, nor of a pair that is longer: half an answer is neither better nor worse."""
    found = []
    user, end = (tokenizer.specials[name] for name in ("<|user|>", "<|end|>"))
    longest = 0
    for given, learned in taught:
        (before, _), (ids, targets) = chat_ids(given, tokenizer), chat_ids(learned, tokenizer)
        longest = max(longest, len(before) + len(ids) + 1)
        if longest > T + 1:
            asked = np.logical_or.accumulate(ids[:T] == user)    # it may begin with a greeting
            ends = np.flatnonzero(targets[:T] & (ids[:T] == end) & asked)
            if len(taught) > 1 or not len(ends):
                continue
            ids = ids[:ends[-1] + 1]
        found.append((np.concatenate([before, ids, [tokenizer.eot]]).astype(np.int32),
                      np.concatenate([before < 0, targets[:len(ids)], [False]])))
    return found if len(found) == len(taught) else None, longest


def best_fit(units, size):
    """Units of one or two pieces, [lengths] → ([the window of each piece], number of windows of this size).

    The longest units come first, each into the fullest window that has room for it, or a new one. Two pieces
    that do not fit into one window get one each, both new: these come first, so at numbers 2i and 2i + 1."""
    rooms = []                                                   # of windows that are not full, ascending
    with_room = defaultdict(list)                                # room → windows
    where = [None] * len(units)
    count = 0
    for i in sorted(range(len(units)), key=lambda i: -sum(units[i])):
        # The loads that go into a window, and how much room each will leave.
        total = sum(units[i])
        at = bisect.bisect_left(rooms, total)
        if total > size:
            filled = [(count + side, size - n) for side, n in enumerate(units[i])]
            count += len(filled)
        elif at == len(rooms):
            filled = [(count, size - total)]
            count += 1
        else:
            room = rooms[at]
            filled = [(with_room[room].pop(), room - total)]
            if not with_room[room]:
                del rooms[at]
        for window, room in filled:
            if room and not with_room[room]:
                bisect.insort(rooms, room)
            if room:
                with_room[room].append(window)
        where[i] = [window for window, _ in filled] * (len(units[i]) // len(filled))
    return where, count


def packed(units, T, pack, eot):
    """[[(ids, targets), ..]] → (N, 2, T + 1) '<i4': the ids of each window, and under each id its label.

    Labels are 0 but at targets. Of conversations these have 1. Of pairs, with pack = 2, a target of the j-th
    chosen answer has j, of the j-th rejected one -j, j = 1, 2, ..; windows 2i and 2i + 1 are a pack, which no
    pair leaves. Each piece is a document: it ends with an eot, and what is left of a window is eots."""
    where, n = best_fit([[len(ids) for ids, _ in unit] for unit in units], T + 1)
    shard = np.zeros((n + -n % pack, 2, T + 1), "<i4")
    shard[:, 0] = eot
    used = [0] * n
    order = sorted(range(len(units)), key=lambda i: where[i][0] // pack)
    for number, i in enumerate(order, 1):
        for sign, window, (ids, targets) in zip((1, -1), where[i], units[i]):
            here = slice(used[window], used[window] + len(ids))
            shard[window, 0, here] = ids
            shard[window, 1, here] = targets * (sign * number if pack == 2 else 1)
            used[window] = here.stop
    return shard


def pack_chats(name, path, config, tokenizer, T, pack):
    """The conversations, or pairs, of a domain → ([train, val] as `packed` makes them, bytes of text of both,
    how many there are, a line about what became of them). `side_key` decides the side: the lowest 5%, or one
    of these, are validation. Duplicates are left out. All are held in memory: some 15 bytes a token."""
    groups = defaultdict(list)                                   # key of the side → units
    sizes = Counter()                                            # bytes of text
    counts = Counter()
    seen = set()
    shortest = math.inf
    take = lambda chat: (chat, lessons(chat, pack == 2))
    for chat, taught in conversations(name, path, config, take, "data.skip_bad"):
        unit, longest = fitted(taught, tokenizer, T)
        if unit is None:
            counts["left out, longer than a window"] += 1
            shortest = min(shortest, longest)
            continue
        key = sha256(*(ids for ids, _ in unit))[:16]             # of what is kept
        if key in seen:
            counts["left out as a duplicate"] += 1
            continue
        seen.add(key)
        counts["cut after an answer, to fit into a window"] += longest > T + 1
        together = str(chat.record.get("split_with", ""))
        if not re.fullmatch("[0-9a-f]{16}", together):
            together = side_key(chat.messages)
        groups[together].append(unit)
        sizes[together] += sum(int(tokenizer.token_bytes[ids].sum()) for ids, _ in unit)
    if not groups:
        raise ValueError(f"files: {name}={path}: the shortest conversation takes {shortest} tokens, and a "
                         f"window has {T + 1}: --model.context={shortest - 1} or more")

    # The two sides: a question with more than a tenth of the text is held out only if all others have more.
    if len(groups) == 1:
        raise ValueError(f"files: {name}={path} has one question; validation needs another one")
    held_out = set()
    held, total = 0, sum(sizes.values())
    for hashed in sorted(groups):
        if (is_validation(hashed) or not held_out) and held + sizes[hashed] <= total / 10:
            held_out.add(hashed)
            held += sizes[hashed]
    if not held_out:
        held_out = {min(groups, key=lambda hashed: (sizes[hashed], hashed))}
        held = sizes[min(held_out)]
    units = [[unit for hashed, some in groups.items() if (hashed in held_out) == side for unit in some]
             for side in (False, True)]
    shards = [packed(some, T, pack, tokenizer.eot) for some in units]
    tokens = sum(len(ids) for some in units for unit in some for ids, _ in unit)
    windows = sum(map(len, shards))
    targets = sum(int((shard[:, 1] != 0).sum()) for shard in shards)
    more = "".join(f"; {n:,} {what}" for what, n in counts.items() if n)
    said = (f"{name}: {tokens:,} tokens in {several(windows, 'window')} of {T + 1}, which they fill to "
            f"{tokens / windows / (T + 1):.1%}; {targets / tokens:.1%} are targets{more}")
    return shards, [total - held, held], sum(map(len, units)), said


def cached_packs(folder, name, key, tokenizer, build, verified):
    """The Domain of packed conversations: see cached_shards. build(): what pack_chats returns."""
    def write(about, paths):
        shards, sizes, documents, said = build()
        for path, shard in zip(paths, shards):
            write_atomically(path, shard)
        facts = dict(tokens=[shard.size for shard in shards], bytes=sizes, documents=documents, said=said,
                     sha256=[sha256(shard) for shard in shards], width=shards[0].shape[2])
        write_atomically(about, json.dumps(facts).encode())
        return facts

    more = "width", "said"
    shards, facts = cached_shards(folder, name, key, tokenizer, np.dtype("<i4"), write, verified, more)
    shards = [shard.reshape(-1, 2, facts["width"]) for shard in shards]
    return Domain(*shards, *facts["bytes"], facts["documents"], facts["sha256"], facts["said"])


def prepare_chats(config, vocab_size, T, pairs=False, launch=""):
    """`prepare` for conversations, or pairs of answers, which become windows of T + 1 tokens → Corpus, whose
    domains hold them as `packed` makes them. Raises ValueError, saying what to correct."""
    # What they are, and the tokenizer, which comes from the run that learns them.
    names, start, end, paths = parse_domains(config)
    what = "pairs" if pairs else "chat"
    for name in names:
        if name not in paths:
            raise ValueError(f"name the conversations: --data.files={name if paths else what}=PATH, a file "
                             "or a folder of .jsonl, .json or .parquet")
    if config.clean:
        raise ValueError("clean: only for text; conversations are cleaned by what writes them")
    if config.tokenizer == "bpe":
        raise ValueError("tokenizer bpe: conversations are read with that of the run which learns them: "
                         "--init=RUN, or name another one")
    tokenizer = tokenizer_of(config, vocab_size, (), None)
    missing = [special for special in SPECIALS[1:] if special not in tokenizer.specials]
    if missing:
        raise ValueError(f"tokenizer {config.tokenizer} has no {', '.join(missing)}, which mark the turns; "
                         "that of a run of ours has them")
    if vocab_size < tokenizer.n_vocab:
        raise ValueError(f"vocab_size {vocab_size}: {config.tokenizer} needs {tokenizer.n_vocab}")

    # The cache's key stands for the files and for the code that reads and packs them. Each domain has a
    # folder with a lock of its own: while it is packed, only those wait that need it.
    pack = 2 if pairs else 1
    steps = (conversations, chat_records, records, convention_of, turns, messages_of, instruction_of, pair_of,
             first_question, side_key, chat_ids, lessons, fitted, best_fit, packed, pack_chats, is_validation)
    steps = str((T, pack, CONVENTIONS, ROLES)), *map(inspect.getsource, steps)
    domains = {}
    for name in names:
        folder = Path(config.cache, f"{name}-{what}")
        with remembered(folder, launch) as (record, verified):
            key = files_key(record, name, paths[name], config, *steps)
            build = functools.partial(pack_chats, name, paths[name], config, tokenizer, T, pack)
            domains[name] = cached_packs(folder, name, key, tokenizer, build, verified)
    return corpus_of(tokenizer, domains, start, end, pack)


# ---- generation: one function, any endpoint ----------------------------------------------------------------

LOOK_AHEAD = 32                  # rows for each thread that may be begun before an earlier one is done
USUAL_WINDOWS = {2 ** n for n in range(11, 18)}                  # tokens of prompt and answer together
REFUSAL = re.compile(r"(?i)(unfortunately, |i['’]m |i am )?((really |very )?sorry,? (but|i)|i( am|['’]m) "
                     r"(unable|not able) to|i (cannot|can['’]t|won['’]t) (help|assist|provide|comply|fulfil|"
                     r"create|generate|rewrite|answer|write|continue|complete|process|do|access))\b")
AS_MACHINE = re.compile(r"(?i)\bas an? (large |ai )*(ai|language model|assistant)\b")
PREAMBLE = re.compile(r"(?i)(sure|certainly|of course|okay)[,.!:]|here(['’]s| is| are)\b[^.\n]{0,150}:")
LEAK = re.compile(r"(?m)<\|[\w▁｜ -]{1,40}\|>|</?think>|\[/?INST\]|<</?SYS>>|<(start|end)_of_turn>|^</?s>"
                  r"|</s>$|^### (Instruction|Response|Input):")


class Refused(Exception):
    """An answer that is not taken; its text is the short reason, by which it is counted."""


class Hopeless(Refused):
    """No answer to this prompt would be taken."""


class Prompt(NamedTuple):
    name: str
    text: str
    sha256: str                  # of the file


def load_prompt(name):
    """The Prompt in notes/prompts/NAME.txt."""
    file = Path(__file__).parent / "notes" / "prompts" / f"{name}.txt"
    return Prompt(name, file.read_text("utf-8"), file_digest(file))


def fill(prompt, row):
    """The text of a prompt with {field} replaced by the row's; braces around anything else stay."""
    return re.sub(r"\{(\w+)\}", lambda found: str(row.get(found[1], found[0])), prompt.text)


@dataclass(frozen=True)
class Endpoint:
    endpoint: str = "offline"    # or the address of a server with OpenAI's interface: http://HOST/v1
    model: str = ""              # the model's name there
    key_env: str = "OPENAI_API_KEY"      # the environment variable that holds the key, if one is needed
    extra: str = ""              # a JSON object of further fields of a request; null leaves a field out
    temperature: float = -1.0    # below 0: the server's own
    max_tokens: int = 2048       # of an answer
    window: int = 0              # tokens of prompt and answer that the server holds; 0: not known
    threads: int = 8             # calls at a time
    attempts: int = 3            # answers for a row, each with its own seed, before it is refused for good
    retries: int = 7             # further tries of a call that brings no answer
    ask_again: bool = False      # ask again what the server refused in earlier runs, if it is mended
    timeout: float = 300.0       # seconds for a try
    calls: int = 0               # budget of OUT over all runs; 0: none
    tokens: int = 0              # budget of prompts and answers, which calls in flight may pass; 0: none
    seed: int = 1                # of all answers: another one asks anew

    def __post_init__(self):
        if self.endpoint != "offline" and not (is_address(self.endpoint) and self.model):
            shown = re.sub("//.*@", "//[user]@", self.endpoint)  # a password, maybe
            raise ValueError(f"endpoint: {shown!r} is not \"offline\", nor is it http://HOST/v1 (without "
                             "a user) with a model: the server's name for it, under which answers are kept")
        if not 0 <= self.retries <= 50:
            raise ValueError(f"retries: {self.retries} is not from 0 to 50")
        for name in ("max_tokens", "threads", "attempts", "timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} is not above 0")
        if not re.fullmatch("[!-~]*", self.key()):
            raise ValueError(f"the variable {self.key_env} has characters that no key has")
        try:
            self.request("", 0)
        except (ValueError, TypeError):
            raise ValueError(f"extra: {self.extra!r} is no JSON object of fields, or has one that is ours: "
                             "messages, model, stream, n") from None

    def key(self):
        """The API key. It goes into requests and nowhere else."""
        return os.environ.get(self.key_env, "").strip()

    def request(self, text, seed):
        """The fields of a request. They are few, since some servers refuse those that they do not know."""
        body = dict(max_tokens=self.max_tokens, seed=seed)
        if self.temperature >= 0:
            body["temperature"] = self.temperature
        body = body | json.loads(self.extra or "{}")
        ours = dict(model=self.model or "offline", messages=[dict(role="user", content=text)], stream=False)
        if body.keys() & {*ours, "n"}:
            raise ValueError
        return {name: value for name, value in body.items() if value is not None} | ours


def is_address(text):
    """Whether a text is the address of a server, without a user's name or password."""
    try:
        parts = urlsplit(text)
        named = "@" not in parts.netloc and parts.hostname.encode("idna") and parts.port != 0
    except (ValueError, AttributeError):                         # no port, a label that is empty; no host
        return False
    return bool(named and re.fullmatch("https?://[!-\"$-~]+", text))


def generate(rows, prompt, parse, accept, endpoint, journal, chat=False):
    """Have an answer to the prompt for each row → (row, result) in the order of rows.

    rows: dicts with "id" and what the prompt needs. parse(row, answer) → result, a dict; accept(row, result)
    → "" or why it is not taken. Both run in threads; parse may raise Refused. The result is False for a row
    that is refused for good, and None for one that is missing: no answer could be had in this run. chat: an
    answer may begin as one to a person does, "Sure" or "I cannot".

    Answers differ by the text of the prompt and by the row's "k", if it has one: rows that are equal in both
    share their calls, whatever their ids and places are."""
    rows = iter(rows)
    ahead = deque()                                              # (row, what it asks, its future), in order
    latest = {}                                                  # what is asked → its last future in `ahead`
    pool = ThreadPoolExecutor(endpoint.threads)
    patient = True
    try:
        while True:
            for row in itertools.islice(rows, LOOK_AHEAD * endpoint.threads - len(ahead)):
                asked = fill(prompt, row), row.get("k", 0)
                future = pool.submit(result_of, row, asked, prompt, parse, accept, endpoint, journal, chat,
                                     latest.get(asked))
                latest[asked] = future
                ahead.append((row, asked, future))
            if not ahead:
                return
            row, asked, future = ahead.popleft()
            while not wait([future], 1).done:
                journal.progress()
            journal.progress()
            if latest[asked] is future:
                del latest[asked]
            yield row, future.result()
    except (Exception, KeyboardInterrupt):
        patient = False                                          # a second Ctrl-C may come as early as here
        journal.stop("interrupted")
        patient = True
        raise
    finally:
        # Rows not begun are dropped; answers in flight are waited for, since they are paid for.
        pool.shutdown(patient, cancel_futures=True)


def result_of(row, asked, prompt, parse, accept, endpoint, journal, chat, twin):
    """The result for a row, False or None: up to `attempts` answers, from the journal if they are there.

    asked: the text of the prompt, and the row's k. twin: the future of an earlier row that asks the same."""
    if twin:
        wait([twin])
    text, k = asked
    again = (lambda call: refused_by_server(call, text)) if endpoint.ask_again else None
    for attempt in range(endpoint.attempts):
        # The seed is hashed beside the request as well, because `extra` may leave it out.
        seed = digest64(json.dumps([endpoint.seed, text, k, attempt])) >> 33
        request = endpoint.request(text, seed)
        key = sha256(json.dumps(request, sort_keys=True), str(seed))
        call = journal.find(key, again)
        new = call is None
        if new and journal.may_call(text):
            if endpoint.endpoint == "offline" or journal.dry_run:
                call = dict(answer=offline_answer(prompt.name, row, seed), finish="stop", usage=None)
            else:
                call = server().ask(endpoint, request, key, journal)
            call = journal.add(text, call, key=key, id=row["id"], prompt=prompt.name, attempt=attempt)
        if call is None:
            return journal.count("rows", "missing")

        # The journal has answers as they came; whether one is taken is decided anew in each run. A dry run
        # takes what stands for an answer, so that it comes to all later calls.
        pretended = new and journal.dry_run
        try:
            answer = (call["answer"].strip() if pretended else
                      answer_in(call, text, prompt, endpoint.window, chat))
            result = parse(row, answer)
            why = "" if pretended else accept(row, result)
            if why:
                raise Refused(why)
        except Refused as error:
            why, hopeless = str(error), isinstance(error, Hopeless)
        except (ValueError, ArithmeticError, RecursionError) as error:
            why, hopeless = f"it cannot be read: {type(error).__name__}", False
        else:
            journal.count("rows", "taken")
            return result | dict(id=row["id"], recipe=row.get("recipe", prompt.name), prompt=prompt.name,
                                 prompt_sha256=prompt.sha256, model=request["model"], seed=seed,
                                 parent=row.get("parent", ""))
        journal.count("answers refused", why, new and hopeless)
        if hopeless:
            journal.count("rows that the server refused; --ask_again=true asks again", why)
        if hopeless or pretended:
            break
    journal.count("rows", "refused for good")
    return False


def refused_by_server(call, text):
    """Why a server does not answer this text, until it is set up in another way; "" if it does.

    Some servers cut a prompt that is too long, and say nothing. A token holds one word at most, so fewer
    tokens than words mean a cut."""
    if "error" in call:
        return call["why"]
    return "prompt cut by the server" if call["usage"] and 0 < call["usage"][0] < len(text.split()) else ""


def answer_in(call, text, prompt, window, chat):
    """The answer of a call, without its thinking. text: what was asked. Raises Refused."""
    why = refused_by_server(call, text)
    if why:
        raise Hopeless(why)
    if call["finish"] != "stop":
        raise Refused(f"finish_reason {call['finish']}")

    # Where a prompt was cut, it and the answer tend to fill the window exactly. Without `window` that is only
    # a suspicion, but another answer would hardly be as long by chance.
    length = sum(call["usage"] or (0, 0))
    if length >= window if window else length in USUAL_WINDOWS:
        raise Refused("fills the window")

    if call["answer"] is None:
        raise Refused("null content")
    answer = without_thinking(call["answer"], text)
    if not answer or answer.startswith("<think>"):
        raise Refused("empty content")
    if re.search("[\ud800-\udfff]", answer):
        raise Refused("no text in UTF-8")

    # Marks of a chat template and lines of the prompt, unless the document itself has them.
    if any(found[0] not in text for found in LEAK.finditer(answer)):
        raise Refused("template leak")
    for line in prompt.text.splitlines():
        if len(line) >= 50 and line in answer and text.count(line) == 1:
            raise Refused("repeats the prompt")
    if not chat and REFUSAL.match(answer) or any(m[0] not in text for m in AS_MACHINE.finditer(answer[:300])):
        raise Refused("refusal")
    if not chat and PREAMBLE.match(answer):
        raise Refused("preamble")
    return answer


def without_thinking(answer, text):
    """An answer after its thinking, which comes first, at times without the tag that opens it. Where the
    prompt has the tag that closes it, so may an answer that did not think."""
    before, closed, after = answer.partition("</think>")
    opened = before.lstrip().startswith("<think>")
    if closed and "<think>" not in before.lstrip()[1:] and (opened or "</think>" not in text):
        answer = after
    return answer.strip()


def estimated_tokens(text):
    """Some four bytes of English text are a token."""
    return len((text or "").encode(errors="replace")) // 4 + 1


# ---- generation: without a server --------------------------------------------------------------------------

def offline_answer(name, row, seed):
    """The endpoint "offline" answers a prompt by rules from the fields of the row, the same for the same
    seed, so that every recipe runs without a server.

    It does not understand what it rewrites. It keeps every number, date and name, exchanges some general
    words, moves clauses, and puts sentences in order into the form that is asked for: it paraphrases little,
    and the reader makes no difference to it. What it evolves, answers, scores or fuses makes as much sense as
    its templates; of arithmetic it works out + - * / of two whole numbers. Its output shows how a recipe
    works; to train on it teaches little more than its source."""
    return from_notes("offline", "the endpoint \"offline\" is in").answer(name, row, seed)


# ---- recipes -----------------------------------------------------------------------------------------------

# A recipe is a function of documents, its options `o`, and `asking(rows, prompt, parse, accept)`, which is
# `generate` at the chosen endpoint. It yields the rows of the output in the order of the documents. Where one
# call needs the answer of another, calls are made in waves over some documents at a time.

TOGETHER = 1000                  # documents; it bounds the memory


class Document(NamedTuple):
    """What a recipe reads."""
    id: str                      # FILE#ROW
    text: str
    messages: list               # of a conversation, otherwise empty
    split_with: str              # decides its side of the split, and that of all that is made of it


def read_documents(name, path, config, what):
    """The Documents of a source in order. what: "conversations", or "text", which may be the text of
    conversations if there is nothing else."""
    source, _ = find_source(name, path, config)
    there = fields_there(source, source.files[0]) if what == "text" else []
    as_chat = what == "conversations" or config.column not in there and convention_of(there)
    for row in (conversations if as_chat else rows)(name, path, config):
        file = Path(row.file).name if row.file == source.root else os.path.relpath(row.file, source.root)
        file = os.fsencode(file).decode(errors="replace")        # a name may be any bytes
        text = as_text(row.messages) if as_chat else row.text
        together = row.record.get("split_with") if as_chat else row.split_with
        if not together:
            together = side_key(row.messages) if as_chat else sha256(text)[:16]
        yield Document(f"{file}#{row.number}", text, row.messages if as_chat else [], together)


def groups(documents):
    documents = iter(documents)
    return iter(lambda: list(itertools.islice(documents, TOGETHER)), [])


def in_order_of(key, items):
    """The items in an order that the key and their values decide."""
    return sorted(items, key=lambda item: sha256(key, str(item)))


def made(documents, result, id, **fields):
    """A row of the output: its fields, then where it comes from."""
    return dict(fields, id=id, parent=" + ".join(document.id for document in documents),
                recipe=result["recipe"], prompt_name=result["prompt"], prompt_sha256=result["prompt_sha256"],
                model=result["model"], seed=result["seed"],
                split_with=min(document.split_with for document in documents))


def as_it_is(row, answer):
    return dict(text=answer)


BYTES = 4                        # of a token, as in `estimated_tokens`
SENTENCE = re.compile(r".+?(?:[.!?][\"')\]]*(?=\s)|[。！？]|\n|\Z)\s*", re.S)


def cut(text, most):
    """A text in parts of about equal size and at most `most` tokens, by an estimate. They end with a sentence
    or a line where these are not longer than that; none is blank. Joined, they are the text."""
    size = estimated_tokens(text)
    size /= math.ceil(size / most)
    parts, length, total = [""], 0, 0
    for sentence in SENTENCE.findall(text):
        whole = len(sentence.encode()) <= most * BYTES
        for piece in [sentence] if whole else re.findall(r"\S{1,64}\s*|\s+", sentence):
            n = len(piece.encode()) / BYTES
            if parts[-1].strip() and (length + n > most or total + n / 2 > len(parts) * size):
                parts.append("")
                length = 0
            parts[-1] += piece
            length += n
            total += n
    return parts


def last_tokens(text, most):
    """The end of a text, from the beginning of a word on, unless there is none nearby."""
    end = text.encode()[-most * BYTES:].decode(errors="ignore")
    return text if len(end) == len(text) else re.sub(r"\A\S{0,64}\s+", "", end)


# ---- recipes: text from documents --------------------------------------------------------------------------

@dataclass
class Rewrite:
    """A rewrite in progress."""
    document: Document
    asked: dict                  # what the prompt gets beside the text
    parts: list                  # of the document
    written: list = field(default_factory=list)                  # the results so far
    context: str = ""            # the end of their text


def rewritten(rewrites, prompt, accept, o, asking):
    """Rewrite part after part, each with the end of what was written so far as its context → a row of the
    output for each rewrite of which every part was accepted."""
    for j in range(max(len(rewrite.parts) for rewrite in rewrites)):
        live = [rewrite for rewrite in rewrites if len(rewrite.parts) > j == len(rewrite.written)]
        asked = [dict(rewrite.asked, id=f"{rewrite.asked['id']}/{j}", text=rewrite.parts[j].strip(),
                      context=rewrite.context) for rewrite in live]
        for (_, result), rewrite in zip(asking(asked, prompt, accept=accept), live):
            if result:
                rewrite.written.append(result)
                so_far = f"{rewrite.context}\n\n{result['text']}".strip()
                rewrite.context = last_tokens(so_far, o.context)
    for rewrite in rewrites:
        if len(rewrite.written) == len(rewrite.parts):
            text = "\n\n".join(result["text"] for result in rewrite.written)
            way = {name: rewrite.asked[name] for name in ("form", "reader") if name in rewrite.asked}
            yield made([rewrite.document], rewrite.written[0], rewrite.asked["id"], text=text, **way)


def rephrase(documents, o, asking):
    """Rewrites every document n times, each time in another form (questions and answers, a table, a tutorial,
    a dialogue, ...) or for another reader. A long document is rewritten part by part, each with what was
    written before it as context. A part that loses or adds a number, a date or a name, or is a copy, is
    refused, and with it that rewrite of the document."""
    prompt = load_prompt("rephrase")
    forms, readers = choices("rephrase-forms", o.forms), choices("rephrase-readers", o.readers)
    if o.n > len(forms) * len(readers):
        raise ValueError(f"rephrase: n={o.n} is more than {len(forms)} forms × {len(readers)} readers")
    for group in groups(documents):
        rewrites = []
        for document in group:
            parts = cut(document.text, o.chunk)
            key = sha256(str(o.seed), document.text)
            for k in range(o.n):
                form = in_order_of(key, forms)[k % len(forms)]
                reader = in_order_of(key + form, readers)[k // len(forms)]
                asked = dict(id=f"{document.id}/{form}/{reader}", form=form, reader=reader,
                             form_is=forms[form], reader_is=readers[reader])
                rewrites.append(Rewrite(document, asked, parts))
        yield from rewritten(rewrites, prompt, why_not_faithful, o, asking)


def choices(name, chosen):
    """The lines NAME: DESCRIPTION of a prompt file as a dict; of those in `chosen` if it names any."""
    known = dict(line.split(": ", 1) for line in load_prompt(name).text.splitlines() if ": " in line)
    chosen = chosen.split(",") if chosen else list(known)
    for word in chosen:
        if word not in known:
            raise ValueError(f"{name}: {word!r} is unknown; known: {', '.join(known)}")
    return {word: known[word] for word in chosen}


def why_not_faithful(row, result):
    """"" or why a rewritten part is not taken. What its context says may be said again."""
    fidelity, unfaithful = measures().fidelity, measures().unfaithful
    m = fidelity(row["text"], result["text"])
    if unfaithful(m) and row["context"]:
        whole = fidelity(f"{row['context']}\n\n{row['text']}", result["text"])
        m = m._replace(numbers_added=whole.numbers_added, dates_added=whole.dates_added,
                       names_added=whole.names_added, supported=whole.supported)
    return unfaithful(m)


def learning_notes(documents, o, asking):
    """Rewrites documents as notes for learning: what is about the page and not about its matter is left out,
    missing steps are put in, and all is worked step by step, as SwallowMath does. Notes with a false
    statement of arithmetic, with less than half of the numbers or with a new name are refused."""
    prompt = load_prompt("learning-notes")
    for group in groups(documents):
        rewrites = [Rewrite(document, dict(id=document.id), cut(document.text, o.chunk))
                    for document in group]
        yield from rewritten(rewrites, prompt, why_not_instructive, o, asking)


def why_not_instructive(row, result):
    """"" or why learning notes are not taken. Steps may bring numbers, and what is left out may have some."""
    m = measures().fidelity(row["text"], result["text"])
    if m.numbers < 0.5:
        return "numbers are lost"
    if m.names_added:
        return "a name is new"
    if m.copied > measures().COPIED and m.length < 1.1:
        return "copied"
    return false_arithmetic(result["text"])


def false_arithmetic(text):
    return "false arithmetic" if from_notes("corpus", "arithmetic is checked by").false(text) else ""


EXAM = re.compile(r"Question: *(\S.*)\nCorrect: *(\S.*)\nWrong: *(\S.*)\nWrong: *(\S.*)\nWrong: *(\S.*)\n"
                  r"Reasoning: *(\S[\s\S]*)")


def exam(documents, o, asking):
    """Makes n examination questions of every document, about one part of it after another, with four options
    and the reasoning that leads to the answer. The place of the right option is balanced. A question with
    options that are alike, one that needs the text at hand, or whose answer is not in it, is refused."""
    prompt = load_prompt("exam")
    count = 0
    for group in groups(documents):
        asked, of = [], []
        for document in group:
            parts = in_order_of(sha256(str(o.seed), document.text), cut(document.text, o.chunk))
            asked += [dict(id=f"{document.id}/{k}", k=k // len(parts), text=parts[k % len(parts)].strip())
                      for k in range(o.n)]
            of += [document] * o.n
        known = set()
        for (row, result), document in zip(asking(asked, prompt, exam_question, why_not_worthy), of):
            if not result or (document.id, result["question"]) in known:
                continue
            known.add((document.id, result["question"]))

            # Of four questions in a row each has the right answer at another place.
            place = in_order_of(f"{o.seed} {count // 4}", range(4))[count % 4]
            count += 1
            options = in_order_of(row["id"], result["wrong"])
            options.insert(place, result["correct"])
            question = "\n".join([result["question"], *map("{}. {}".format, "ABCD", options)])
            answer = f"{result['reasoning']}\n\nThe answer is {'ABCD'[place]}."
            yield made([document], result, row["id"], text=f"{question}\n\n{answer}\n", answer="ABCD"[place],
                       messages=turns(question, "user") + turns(answer, "assistant"))


def exam_question(row, answer):
    """An answer of exactly the form that the prompt asks for → its fields. Raises Refused at any other."""
    match = EXAM.fullmatch(answer)
    if not match:
        raise Refused("not in the form of a question")
    question, correct, *wrong, reasoning = match.groups()
    if len({folded(option).strip(".") for option in (correct, *wrong)}) < 4:
        raise Refused("options are alike")
    return dict(question=question, correct=correct, wrong=wrong, reasoning=reasoning)


def why_not_worthy(row, result):
    """"" or why a question is not taken."""
    if re.search(r"\b(the|this) (text|passage|document|author|excerpt)\b", result["question"].lower()):
        return "it needs the text at hand"
    words_of, content = measures().words_of, measures().content
    words = {word for word in words_of(result["correct"]) if word.isdigit() or content(word)}
    if 2 * len(words & set(words_of(row["text"]))) < max(1, len(words)):
        return "the text does not have the answer"
    if not words & set(words_of(result["reasoning"])):
        return "the reasoning does not reach the answer"
    return false_arithmetic(result["reasoning"])


# ---- recipes: conversations from conversations -------------------------------------------------------------

def conversation(documents, result, id, messages, **fields):
    """A row of the output with a conversation; also as text, which a run can read."""
    return made(documents, result, id, messages=messages, text=as_text(messages), **fields)


def evolve(documents, o, asking):
    """Makes the first request of every conversation harder (depth), or puts a rarer one of the same field in
    its place (breadth), in several rounds, and has the last one answered. The prompts that say how are tried
    first, on some of the requests: a model writes a better one from what went wrong, and the one that fails
    less often is used; its text is the answer with that sha256 in OUT.calls.jsonl. A request that gained
    nothing, says nothing or repeats the prompt is dropped, and its parent has another try in the next round;
    one whose answer asks back, stalls or refuses is dropped for good."""
    methods = []
    for group in groups(documents):
        now = [first_question(document.messages) for document in group]
        for way in () if methods else ("depth", "breadth"):
            tried = in_order_of(str(o.seed), dict.fromkeys(now))[:o.dev]
            methods.append(better(load_prompt(f"evolve-{way}"), tried, asking))
            if not methods[-1]:
                print("evolve: the trial of its prompts is not complete, and nothing evolves before it is")
                return

        # After a missing answer no more is asked about that conversation: with another parent its calls would
        # not be those that are made when the answer is there.
        rounds = [[] for _ in group]                             # by which a request gained
        missing = set()
        for turn in range(o.rounds):
            broad = [digest64(f"{o.seed} {turn} {document.text}") % 100 < o.breadth for document in group]
            for which, method in enumerate(methods):
                live = [i for i in range(len(group)) if broad[i] == which and i not in missing]
                asked = [dict(id=f"{group[i].id}/{turn}", k=turn, instruction=now[i]) for i in live]
                for (_, result), i in zip(asking(asked, method, accept=why_not_gained), live):
                    if result:
                        now[i] = result["text"]
                        rounds[i].append(dict(prompt_name=result["prompt"], seed=result["seed"],
                                              prompt_sha256=result["prompt_sha256"]))
                    elif result is None:
                        missing.add(i)

        live = [i for i in range(len(group)) if rounds[i] and i not in missing]
        asked = [dict(id=f"{group[i].id}/answer", instruction=now[i]) for i in live]
        answers = asking(asked, load_prompt("answer"), accept=why_not_answered, chat=True)
        for (_, result), i in zip(answers, live):
            if result:
                messages = turns(now[i], "user") + turns(result["text"], "assistant")
                yield conversation([group[i]], result, group[i].id, messages,
                                   evolved_from=first_question(group[i].messages), evolution=rounds[i])


def better(method, requests, asking):
    """The prompt, or a model's new version of it if that fails on fewer requests [Auto Evol-Instruct]. None
    if an answer is missing."""
    failures = trial(method, requests, asking)
    if not failures:
        return None if failures is None else method
    asked = dict(id=f"{method.name}/better", method=method.text, failures="\n".join(failures))
    (_, result), = asking([asked], load_prompt("evolve-improve"), accept=why_not_usable)
    if not result:
        return None if result is None else method
    text = result["text"]
    new = Prompt(method.name, text, hashlib.sha256(text.encode()).hexdigest())
    again = trial(new, requests, asking)
    if again is None:
        return None
    print(f"{method.name}: {len(failures)} of {len(requests)} failed, of a new version {len(again)}")
    return new if len(again) < len(failures) else method


def why_not_usable(row, result):
    return "" if result["text"].count("{instruction}") == 1 else "no place for the instruction"


def trial(method, requests, asking):
    """A line for each request that a prompt cannot evolve, or whose answer fails, with the reason. None if an
    answer is missing."""
    asked = [dict(id=f"{method.sha256[:8]}/{i}", instruction=request) for i, request in enumerate(requests)]
    failures, missing = [], 0
    for prompt, accept, chat in ((method, why_not_gained, False),
                                 (load_prompt("answer"), why_not_answered, True)):
        passed = []
        for row, result in asking(asked, prompt, chat=chat):
            missing += result is None
            why = accept(row, result) if result else "no usable answer"
            if why:
                failures.append(f"- {why}: {row['instruction']}")
            else:
                passed.append(dict(id=f"{row['id']}/answer", instruction=result["text"]))
        asked = passed
    return None if missing else failures


def why_not_gained(row, result):
    """"" or why an evolved request is eliminated."""
    old, new = set(measures().content(row["instruction"])), set(measures().content(result["text"]))
    if len(new) < 2:
        return "it says nothing"
    if re.search(r"\b(given|original|evolved|rewritten|new|created) (prompt|request|instruction)s?\b",
                 result["text"].lower()):
        return "it repeats the prompt"
    return "no gain" if len(new - old) < 2 else ""


FAILURES = {
    "it asks back": r"\b(could|can|would) you (please )?(provide|clarify|share|specify|tell)|"
                    r"please (provide|share|specify|clarify)|need (some )?more (information|details|context)|"
                    r"what do you mean",
    "it only agrees": r"\A(understood|sure|certainly|of course|thanks?|got it|i understand)\b[^.]*\?\s*\Z",
    "it refuses": r"\A(?=[\s\S]*\bsorry\b)[\s\S]{0,500}\Z"}


def why_not_answered(row, result):
    """"" or why an answer fails, and with it the request, by rules in the manner of EvolKit's."""
    text = result["text"].lower()
    if not measures().content(text) and not re.search(r"\d", text):
        return "it says nothing"
    return next((why for why, pattern in FAILURES.items() if re.search(pattern, text)), "")


def fuse(documents, o, asking):
    """Makes one conversation of k, in a single call. Which ones come together is chosen by the words that
    they share: similar, unlike, or random; less than k that are left over, of every 1,000, are not used. Only
    conversations on one side of the split between training and validation come together. A result that puts
    one after the other, or their sentences in turn, or leaves one out, is refused."""
    if o.select not in ("similar", "unlike", "random") or not 2 <= o.k <= 8:
        raise ValueError(f"fuse: select={o.select} k={o.k}: similar, unlike or random, and 2 to 8")
    prompt = load_prompt("fuse")
    for group in groups(documents):
        asked, members = [], []
        for side in False, True:
            there = [document for document in group if is_validation(document.split_with) == side]
            for chosen in selected([document.text for document in there], o.k, o.select, o.seed):
                members.append([there[i] for i in chosen])
                said = [f"Conversation {n}\n{document.text}" for n, document in enumerate(members[-1], 1)]
                asked.append(dict(id=" + ".join(document.id for document in members[-1]),
                                  conversations="\n".join(said), sources=[d.text for d in members[-1]]))
        fused = asking(asked, prompt, conversation_in, why_not_integrated)
        for (row, result), together in zip(fused, members):
            if result:
                yield conversation(together, result, row["id"], result["messages"], select=o.select)


def selected(texts, k, select, seed):
    """Lists of k indices. Each text is used once; fewer than k that are left over are not used.

    Similar or unlike to the first of a list by the cosine of their words, which count less the more texts
    have them. A list is begun by the first text that is not used, in an order that the seed decides."""
    bags = np.zeros((len(texts), 4096), np.float32)
    for bag, text in zip(bags, texts):
        bag[[zlib.crc32(word.encode()) % 4096 for word in measures().content(text)]] = 1
    bags *= np.log((1 + len(texts)) / (1 + bags.sum(0)))
    bags /= np.maximum(1e-9, np.linalg.norm(bags, axis=1, keepdims=True))
    rank = dict(similar=-1, unlike=1, random=0)[select] * bags @ bags.T                    # (N, N)
    free = in_order_of(str(seed), range(len(texts)))
    while len(free) >= k:
        chosen = [free[0], *sorted(free[1:], key=lambda i: rank[free[0], i])[:k - 1]]
        free = [i for i in free if i not in chosen]
        yield chosen


def conversation_in(row, answer):
    """Turns that begin with "User:" and "Assistant:" → messages. Raises Refused at any other form."""
    before, *parts = re.split(r"^(User|Assistant): *", answer, flags=re.M)
    roles, said = parts[::2], [part.strip() for part in parts[1::2]]
    if before or not roles or roles != ["User", "Assistant"] * (len(roles) // 2) or not all(said):
        raise Refused("not in the form of a conversation")
    return dict(messages=[dict(role=role.lower(), content=text) for role, text in zip(roles, said)])


def why_not_integrated(row, result):
    text = "\n\n".join(message["content"] for message in result["messages"])
    return measures().concatenated(measures().integration(row["sources"], text))


def reject(documents, o, asking):
    """Has the last request of every conversation answered n times and keeps the best answer, if it reaches
    the threshold. At score_endpoint a model gives each 0 to 10 points, which count as 0 to 1. Without it an
    answer scores 1 if its arithmetic is right and its last number is that of the conversation's own answer,
    else 0; conversations whose own answer has no number are left out. With pairs, a row has the best answer
    and the worst, if only the best reaches the threshold."""
    judge = dict(endpoint=o.score_endpoint, model=o.score_model, key_env=o.score_key_env, extra=o.score_extra)
    if o.score_endpoint:
        try:
            asking([], load_prompt("score"), **judge)
        except ValueError as error:
            raise ValueError(f"reject: score_endpoint, score_model, score_key_env or score_extra: {error}")
    kept = left_out = 0                                          # conversations
    scored, below = 0, 0                                         # answers
    for group in groups(documents):
        if not o.score_endpoint:
            there = [document for document in group if last_number(split_last(document)[1])]
            left_out += len(group) - len(there)
            group = there
        kept += len(group)
        if not kept:
            raise ValueError("reject: no answer in IN has a number, by which new ones could be judged: give "
                             "--score_endpoint=http://HOST/v1 --score_model=NAME")
        asked = []
        for document in group:
            messages, _ = split_last(document)
            request = messages[-1]["content"] if len(messages) == 1 else as_text(messages)
            asked += [dict(id=f"{document.id}/{k}", k=k, instruction=request) for k in range(o.n)]
        answers = enumerate(asking(asked, load_prompt("answer"), accept=why_not_answered, chat=True))
        taken = [(i // o.n, row, result) for i, (row, result) in answers if result]

        # A score for each, None if the model gave none.
        if o.score_endpoint:
            rows = [dict(row, id=f"{row['id']}/score", answer=result["text"]) for _, row, result in taken]
            found = asking(rows, load_prompt("score"), points, **judge)
            scores = [result["points"] / 10 if result else None for _, result in found]
        else:
            scores = [verified(result["text"], split_last(group[i])[1]) for i, _, result in taken]
        scored += sum(score is not None for score in scores)
        below += sum(score is not None and score < o.threshold for score in scores)
        for i, document in enumerate(group):
            yield from best_of(document, [(score, result) for (j, _, result), score in zip(taken, scores)
                                          if j == i and score is not None], o)
    if kept and not o.dry_run:
        print(f"reject: {below:,} of {several(scored, 'answer')} scored below {o.threshold:g}; "
              f"{several(left_out, 'conversation')} left out, whose own answer has no number")


def split_last(document):
    """A conversation → (the messages up to its last request, the answer to that, "" if there is none)."""
    *messages, last = document.messages
    return (messages, last["content"]) if last["role"] == "assistant" else (document.messages, "")


def best_of(document, scored, o):
    """The row of the output from [(score, result)] of the answers to a conversation, or none."""
    scored = sorted(scored, key=lambda found: -found[0])         # equal ones stay in the order of their seeds
    if not scored or scored[0][0] < o.threshold:
        return
    (score, best), (least, worst) = scored[0], scored[-1]
    prompt, _ = split_last(document)
    chosen, rejected = ([dict(role="assistant", content=result["text"])] for result in (best, worst))
    about = dict(score=score, score_model=o.score_model or "arithmetic", answers=len(scored))
    if not o.pairs:
        yield conversation([document], best, document.id, prompt + chosen, **about)
    elif least < o.threshold:
        yield made([document], best, document.id, prompt=prompt, chosen=chosen, rejected=rejected,
                   text=as_text(prompt + chosen), **about, rejected_score=least, rejected_seed=worst["seed"])


def points(row, answer):
    """A number from 0 to 10. Raises Refused at anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(?: */ *10)?\.?", answer.strip("* \n"))
    if not match or float(match[1]) > 10:
        raise Refused("not a number from 0 to 10")
    return dict(points=float(match[1]))


def verified(answer, right):
    """1 if an answer's arithmetic is right and its last number that of the right one, otherwise 0."""
    return float(last_number(answer) == last_number(right) != "" and not false_arithmetic(answer))


def last_number(text):
    """The last number of a text, "" if it has none."""
    return ["", *re.findall(r"-?\d+(?:\.\d+)?(?:/\d+)?", text.replace(",", ""))][-1]


# ---- recipes: the command ----------------------------------------------------------------------------------

class Recipe(NamedTuple):
    run: object                  # its docstring is the help
    reads: str                   # "text" | "conversations"
    costs: str                   # in calls
    options: dict                # name: (default, what it is)


CONTEXT = 4096, "tokens of what was written before that a call sees at most [K2 Figure 4]"
RECIPES = {
    "rephrase": Recipe(rephrase, "text", "n for each part of a document", dict(
        n=(2, "rewrites of a document; K2 made at most two [K2 §2.2]"),
        forms=("", "names out of notes/prompts/rephrase-forms.txt, with commas; all"),
        readers=("", "the same, out of rephrase-readers.txt"),
        chunk=(256, "tokens of the document in a part [K2 Figure 4]"),
        context=CONTEXT)),
    "learning-notes": Recipe(learning_notes, "text", "1 for each part of a document", dict(
        chunk=(1024, "tokens of the document in a part"), context=CONTEXT)),
    "exam": Recipe(exam, "text", "n for each document", dict(
        n=(1, "questions about a document"), chunk=(512, "tokens of the part that a question is about"))),
    "evolve": Recipe(evolve, "conversations", "rounds + 1 for each; first, at most 8 dev + 2", dict(
        rounds=(3, "times that a request evolves"), dev=(8, "requests that the prompts are tried on"),
        breadth=(17, "percent of the steps that go into breadth; it is one of WizardLM's six kinds"))),
    "fuse": Recipe(fuse, "conversations", "1 for every k conversations", dict(
        k=(2, "conversations that become one"), select=("unlike", "similar | unlike | random"))),
    "reject": Recipe(reject, "conversations", "n for each, and as many for scores with score_endpoint", dict(
        n=(4, "answers to a request"), threshold=(0.7, "the least score that is kept"),
        score_endpoint=("", "where a model scores answers: http://HOST/v1"),
        score_model=("", "its name there"), score_key_env=("", "the environment variable with its key"),
        score_extra=("", "a JSON object of further fields of a request to it"),
        pairs=(False, "write prompt, chosen and rejected"))),
}
SHARED = dict(column=("text", "the field that holds the text"), where=("", "as --data.where of a run"),
              budget=("", "100MB or 5000documents of IN"), skip_bad=(False, "count bad records and go on"),
              dry_run=(False, "print how many calls and tokens it takes"))


def help_of(name):
    """What `python data.py NAME --help` prints."""
    recipe = RECIPES[name]
    options = [(option, default, what) for option, (default, what) in {**recipe.options, **SHARED}.items()]

    # The endpoint's options, with the comments of its fields.
    endpoint = Path(__file__).read_text("utf-8").partition("class Endpoint:\n")[2].partition("\n\n")[0]
    found = re.findall(r'(?m)^    (\w+): \w+ = "?([^"\s]*)"? *(?:# (.*))?$', endpoint)
    options, found = ("\n".join(f"  --{option}={default}".ljust(28) + what for option, default, what in some)
                      for some in (options, found))
    return f"""python data.py {name} IN OUT [--OPTION=VALUE ...]

{inspect.cleandoc(recipe.run.__doc__)}

IN is {recipe.reads}: a file, a folder or NAME=PATH. OUT is a .jsonl file. OUT.calls.jsonl keeps every
answer, so that the same command goes on after a kill and pays for no call twice.
Calls: {recipe.costs}; an answer that is refused is asked for again.

{options}

Options of the endpoint:

{found}

Without a server: {inspect.cleandoc(offline_answer.__doc__)}"""


def recipe_options(name, words):
    """Options --NAME=VALUE → (DataConfig, Endpoint, the recipe's own and dry_run). Raises SystemExit at an
    unknown one, or at a value that it cannot have."""
    own = {option: default for option, (default, _) in {**RECIPES[name].options, **SHARED}.items()}
    given = {field.name: field.default for field in fields(Endpoint)} | own
    for word in words:
        option, _, value = word.removeprefix("--").partition("=")
        option = option.replace("-", "_")
        if option not in given:
            raise SystemExit(f"{name}: unknown option {word!r}; known: --{'= --'.join(given)}=")
        kind = type(given[option])
        try:
            given[option] = dict(true=True, false=False)[value or "true"] if kind is bool else kind(value)
        except (KeyError, ValueError):
            raise SystemExit(f"{name}: {word}: {value!r} is no {kind.__name__}") from None
        if option in own and kind is int and given[option] < (option not in ("dev", "breadth")):
            raise SystemExit(f"{name}: {word}: too small")
    config = DataConfig(**{option: given[option] for option in ("column", "where", "budget", "skip_bad")})
    endpoint = Endpoint(**{field.name: given[field.name] for field in fields(Endpoint)})
    return config, endpoint, types.SimpleNamespace(**{option: given[option] for option in (*own, "seed")})


def run_recipe(name, words):
    """`python data.py NAME IN OUT [options]` → how many rows are missing."""
    if len(words) < 2 or any(word.startswith("--") for word in words[:2]):
        raise SystemExit(f"python data.py {name} IN OUT [options]; see python data.py {name} --help")
    given, out, *words = words
    config, endpoint, options = recipe_options(name, words)
    source, path = named(given)
    root = Path(find_source(source, path, config)[0].root).resolve()
    if root in (Path(out).resolve(), *Path(out).resolve().parents):
        raise ValueError(f"{name}: {out} is inside {path}, from where it would be read; write elsewhere")
    if Path(out).is_dir() or not Path(out).resolve().parent.is_dir():
        raise ValueError(f"{name}: OUT is a new file in a folder that exists; {out} is not")
    journal = None

    def asking(rows, prompt, parse=as_it_is, accept=lambda row, result: "", chat=False, **other):
        rows = (dict(row, recipe=name) for row in rows)
        return generate(rows, prompt, parse, accept, replace(endpoint, **other), journal, chat)

    list(RECIPES[name].run([], options, asking))                 # no documents: only its options are checked
    calls = server().Journal(f"{out}{CALLS}", endpoint, options.dry_run)
    with calls as journal, contextlib.ExitStack() as stack:
        file = io.StringIO()
        if not options.dry_run:
            file = stack.enter_context(atomic(out, "w", alone=True, encoding="utf-8"))     # see the journal
        count = 0
        documents = read_documents(source, path, config, RECIPES[name].reads)
        for row in RECIPES[name].run(documents, options, asking):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
        missing = server().summary(journal)
    print(f"{out}: " + ("nothing is written" if options.dry_run else several(count, "row")))
    return missing


# ---- the command -------------------------------------------------------------------------------------------

def stats(corpus):
    """Print a table with a row for each domain."""
    print(f"{'domain':12}{'documents':>10}{'MB':>8}{'tokens':>12}{'val':>10}{'bytes/token':>13}"
          f"{'windows':>14}{'bigram bits/byte':>18}")
    for (name, d), s, e in zip(corpus.domains.items(), corpus.start, corpus.end):
        size = d.train_bytes + d.val_bytes
        tokens = len(d.train) + len(d.val)
        bits = bigram_bits(d.train, d.val, corpus.tokenizer)
        print(f"{name:12}{d.documents:10,}{size / 1e6:8.2f}{tokens:12,}{len(d.val):10,}"
              f"{size / tokens:13.2f}{f'{s:.0%} → {e:.0%}':>14}{bits:18.3f}")


def read_options(options, **numbers):
    """Options --NAME=VALUE → (DataConfig, numbers): its text and boolean fields, with or without "data." in
    front, and `numbers`, given with their defaults. Raises SystemExit at an unknown one."""
    config = DataConfig()
    known = {f.name: f.default for f in fields(DataConfig)}
    for option in options:
        name, _, value = option.removeprefix("--").removeprefix("data.").partition("=")
        if name in numbers and value.isdecimal():
            numbers[name] = int(value)
        elif isinstance(known.get(name), bool):
            config = replace(config, **{name: value.lower() == "true"})
        elif isinstance(known.get(name), int) and value.isdecimal():
            config = replace(config, **{name: int(value)})
        elif isinstance(known.get(name), str):
            config = replace(config, **{name: value})
        else:
            raise SystemExit(f"unknown option {option!r}; known: --{'=N --'.join(numbers)}=N "
                             f"--{'= --'.join(known)}=")
    return config, numbers


def named(given):
    """PATH or NAME=PATH → (name, path)."""
    name, equals, path = given.partition("=")
    if Path(given).exists() or not equals:
        name, path = Path(given).name, given
    return name, path


def main(argv):
    """The command line. Raises SystemExit with one line for whatever the user has to correct."""
    if {"-h", "--help"} & set(argv):
        if argv[0] in RECIPES:
            return print(help_of(argv[0]))
        print(__doc__)
        return
    command, *options = argv or ["(none)"]
    if command == "work":
        return work_as_told()
    if command not in ("stats", "prepare", "clean", "origin", "sources", *RECIPES):
        raise SystemExit(f"unknown command {command!r}; known: stats, prepare, clean, origin, sources, "
                         f"{', '.join(RECIPES)}")
    if command == "clean":
        if len(options) < 2 or any(option.startswith("--") for option in options[:2]):
            raise SystemExit("python data.py clean IN OUT [options]: IN is a file, a folder or NAME=PATH; "
                             "OUT is a new folder")
        source, out, *options = options

    # Report errors in the input as one line, without a traceback.
    config, numbers = read_options([] if command in RECIPES else options, vocab=4096, workers=0, at=0)
    try:
        if command in RECIPES:
            return 1 if run_recipe(command, options) else None
        if command == "sources":
            return datasets().show()
        if command == "clean":
            return print_report(clean(*named(source), out, config, numbers["workers"]))
        corpus = prepare(config, numbers["vocab"], workers=numbers["workers"])
        if command == "origin":
            for name in parse_domains(config)[3]:
                print(f"{name}: token {numbers['at']} is of", "%s, row %d" % origin(
                    corpus, config, name, "train", min(numbers["at"], len(corpus.domains[name].train) - 1)))
        if command == "stats":
            stats(corpus)
            measures().print_diversity(config)
        print(f"tokenizer {corpus.tokenizer.fingerprint[:16]}  data {corpus.fingerprint[:16]}")
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"data.py: {error}") from None
    except (MemoryError, BrokenExecutor):
        raise SystemExit(f"data.py: {NO_MEMORY}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")            # the name of a file may be any bytes
    sys.exit(main(sys.argv[1:]))
