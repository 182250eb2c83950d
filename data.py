"""Text → tokens → batches. What is unusual:

  no download      the default corpus is text that every Python installation carries: the documentation
                   of the standard library (prose), its source without that documentation (code), and
                   worked arithmetic (math; the only generated domain). It differs a little between
                   Python versions.
  no loader state  batch(step) is a pure function of (seed, step), so checkpoints hold no loader state.
                   The global batch does not depend on the number of ranks; each rank takes its slice.
  moving mixture   domain weights move linearly over a horizon of tokens [Motif §3.2.1]. The due time of
                   every window has a closed form, so the number of windows taken from a domain never
                   falls and stays within 3 of the integral of the domain's weight.

Letters:  N windows  D domains  W windows of a domain  b windows of a rank's batch  T context in tokens
          V vocabulary size
Run:      python data.py stats [--vocab=4096] [--files=NAME=PATH] [--tokenizer=bytes|bpe|gpt2] ...
          python data.py clean IN OUT [--min_tokens=24]      see cleaning.py
"""
import contextlib
import fcntl
import functools
import gzip
import hashlib
import heapq
import inspect
import json
import os
import re
import sys
import time
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch


# ---- configuration -----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class DataConfig:
    domains: str = "prose:0.70:0.20,code:0.20:0.50,math:0.10:0.30"  # NAME:START_WEIGHT:END_WEIGHT,...
                                 # from prose to code and math, as in Motif's schedule; the numbers:  [ours]
    files: str = ""              # NAME=PATH,...  UTF-8 text, .jsonl, .json, each also as .gz, or a folder
                                 # of them; no comma in a path. If `domains` has none of these names, they
                                 # replace it, with equal weights
    skip_bad: bool = False       # leave out records without a string `text` instead of stopping
    tokenizer: str = "bpe"       # "bytes" | "bpe", trained on the training text | a tiktoken name ("gpt2")
                                 # | the path of a tokenizer.json, from a run or a Hugging Face folder
    horizon: int = 0             # tokens over which the weights move; afterwards the end weights hold. A
                                 # separate number, so stopping early does not change the batches before
    doc_mask: bool = False       # attention may not cross documents; pre-training lets it         [ours]
    cache: str = "cache"         # folder of trained tokenizers and token shards


EMBEDDED = "prose", "code", "math"
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
    rows = []
    for item in filter(None, config.domains.split(",")):
        name, *weights = item.split(":")
        try:
            start, end = (float(w) for w in weights)
        except ValueError:
            raise ValueError(f"domains: {item!r} is not NAME:START_WEIGHT:END_WEIGHT, two numbers") from None
        if not (start >= 0 and end >= 0):
            raise ValueError(f"domains: {item!r} has a weight that is not >= 0")
        rows.append((name, start, end))
    if paths and not any(name in paths for name, _, _ in rows):
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
            raise ValueError(f"domains: {name!r} has no text; known: {', '.join(EMBEDDED)}; "
                             f"your own: --data.files={name}=PATH")
    for name in paths:
        if name not in names:
            raise ValueError(f"files: {name!r} is not in domains ({', '.join(names)})")

    # The weights of each end of the schedule sum to 1.
    start = np.array([weight for _, weight, _ in rows])          # (D,)
    end = np.array([weight for _, _, weight in rows])            # (D,)
    for which, total in (("start", start.sum()), ("end", end.sum())):
        if not abs(total - 1) <= 1e-6:
            raise ValueError(f"domains: the {which} weights sum to {total:g}, not 1")
    return names, start, end, paths


# ---- documents of a domain, and their split ----------------------------------------------------------------

def documents(name, path=None, skip_bad=False):
    """All documents of a domain, duplicates included: a list of strings.

    No `path`: an embedded domain. Otherwise the user's text, gzipped or not: a text file is one document;
    a .jsonl or .json file has one per record, in its field `text`; a folder stands for all .txt, .md, .jsonl
    and .json files below it. Prints what was read and what was left out. Raises ValueError, naming the file
    and the position in it; with `skip_bad`, bad records are counted and left out instead."""
    if path is None:
        return embedded().documents(name)
    files, left_out = own_files(name, path)
    found = []
    read = 0                                                     # files that hold text
    for file in files:
        with reading(name):
            raw = file.read_bytes()
        if file.name.lower().endswith(".gz"):
            raw = unpack(file, raw)

        # A folder of texts may contain JSON that is no text, such as package.json.
        if kind_of(file) == "text":
            texts = [read_text(file, raw)]
        elif file != Path(path) and kind_of(file) == "json" and not holds_text(file, raw):
            left_out["without a `text`"].append(file)
            continue
        else:
            texts = read_records(file, raw, skip_bad)

        # Blank documents do not count.
        texts = [text for text in texts if text.strip()]
        if texts:
            found += texts
            read += 1
        else:
            left_out["empty"].append(file)
    if not found:
        raise ValueError(f"files: {name}={path} is empty; give text in UTF-8")

    # One line: what was read, and for each reason the number and the first names left out.
    size = sum(len(text.encode()) for text in found)
    line = (f"{name}={path}: {read} file{'s' * (read != 1)}, {len(found):,} "
            f"document{'s' * (len(found) != 1)}, {size:,} bytes")
    reasons = []
    for why, skipped in left_out.items():
        examples = [file.name for file in skipped[:3]] + ["..."] * (len(skipped) > 3)
        reasons.append(f"{len(skipped)} {why} ({', '.join(examples)})")
    if reasons:
        line += f"; left out: {', '.join(reasons)}"
    print(line)
    return found


def own_files(name, path):
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
                elif not file.name.lower().removesuffix(".gz").endswith(KINDS):
                    left_out["of another kind"].append(file)
                elif not file.is_file():
                    left_out["neither file nor folder"].append(file)
                else:
                    files.append(file)
    if not files:
        raise ValueError(f"files: {name}={path}: no {', '.join(KINDS)} in this folder, nor one of these "
                         "with .gz")
    return sorted(files), left_out


@contextlib.contextmanager
def reading(name):
    """Raise an OSError of the body as a ValueError that names the domain and the file."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"files: cannot read {name}={error.filename}: {error.strerror}; give a text "
                         "file, a .jsonl, or a folder of them") from None


KINDS = ".txt", ".md", ".jsonl", ".json"


def kind_of(file):
    """How a file is parsed, judged by its name: "text", "jsonl" or "json"."""
    suffix = file.name.lower().removesuffix(".gz").rpartition(".")[2]
    return suffix if suffix in ("jsonl", "json") else "text"


def unpack(file, raw):
    """gzip bytes → bytes. Raises ValueError if they are damaged."""
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"files: {file} is a damaged gzip file: {error}") from None


def read_text(file, raw):
    """UTF-8 bytes → str. Raises ValueError with the position of the first invalid byte."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"files: {file} is not UTF-8 at byte {error.start}; convert it") from None


def records(file, raw):
    """The records of a .json or .jsonl file: [(position, parsed JSON or an unparsed line of bytes)].

    A .json file is an array of records or a single one; if it does not parse as a whole, it is read as
    .jsonl. Blank lines are skipped."""
    if kind_of(file) == "json":
        with contextlib.suppress(ValueError, RecursionError):
            whole = json.loads(raw)
            if not isinstance(whole, list):
                whole = [whole]
            return [(f"record {number}", record) for number, record in enumerate(whole, 1)]
    lines = enumerate(raw.split(b"\n"), 1)
    return [(f"line {number}", line) for number, line in lines if line.strip()]


def text_of(record):
    """The field `text` of a record, as a string. Raises one of BAD_RECORD if there is none."""
    if isinstance(record, bytes):
        record = json.loads(record)
    text = record["text"]

    # JSON may hold a lone surrogate, which has no encoding in UTF-8.
    text.encode()
    return text


BAD_RECORD = ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError


def holds_text(file, raw):
    """Whether any record has a field `text`."""
    for _, record in records(file, raw):
        with contextlib.suppress(*BAD_RECORD):
            text_of(record)
            return True
    return False


def read_records(file, raw, skip_bad):
    """The field `text` of every record. Raises ValueError at a bad one; `skip_bad` leaves it out."""
    # Collect the texts; bad records stop the run or are counted.
    found = []
    bad = 0
    every = records(file, raw)
    for position, record in every:
        try:
            found.append(text_of(record))
        except BAD_RECORD as error:
            if not skip_bad:
                why = "no JSON object with a string `text`"
                if isinstance(error, UnicodeError):
                    why = "no text in UTF-8"
                raise ValueError(f"files: {file}, {position}: {why}; mend it, "
                                 "or --data.skip_bad=true") from None
            bad += 1
    if bad:
        print(f"{file}: {bad} bad records of {len(every)} left out")
    return found


def split_documents(docs, val=0.05):
    """Documents → (train, val), exact duplicates removed.

    The hash of a document decides its side, so a document keeps it when others are added or removed: the
    lowest fraction `val` of the hash range is validation. Two bounds handle few or uneven documents.
    Validation gets at least 1% of the bytes: if it has less, further documents follow in order of hash. And
    a document that would bring it above 10% stays in training, except that its last tenth is cut off for
    validation while that has less than 1%."""
    docs = list(dict.fromkeys(docs))
    hashes = [int(sha256(doc)[:8], 16) for doc in docs]          # 32 bits
    sizes = [len(doc.encode()) for doc in docs]                  # bytes
    keep = [len(doc) for doc in docs]                            # characters that stay in training
    total = sum(sizes)
    held = 0                                                     # bytes of validation

    # Move documents to validation, the lowest hash first.
    for i in sorted(range(len(docs)), key=hashes.__getitem__):
        enough = held >= total / 100
        if hashes[i] > val * 2 ** 32 and enough:
            break
        if held + sizes[i] <= total / 10:
            keep[i] = 0
        elif not enough:
            keep[i] = len(docs[i]) * 9 // 10
        held += len(docs[i][keep[i]:].encode())

    # Cut each document; empty parts vanish.
    train = [doc[:n] for doc, n in zip(docs, keep)]
    held_out = [doc[n:] for doc, n in zip(docs, keep)]
    return [part for part in train if part], [part for part in held_out if part]


def text_key(record, name, path=None, skip_bad=False):
    """Cache key of a domain's documents: digest of its files and of the code that reads and splits them.

    Computing it does not extract the text. record: see `digest`."""
    if path:
        steps = documents, records, text_of, read_records, split_documents
        files, _ = own_files(name, path)
        with reading(name):
            parts = [f"{kind_of(file)} {file.suffix.lower() == '.gz'} {digest(file, record)}"
                     for file in files]
        return sha256(str(skip_bad), *parts, *map(inspect.getsource, steps))
    parts = [f"{module} {digest(file, record)}" for module, file in embedded().library_files()]
    return sha256(name, *parts, inspect.getsource(embedded()), inspect.getsource(split_documents))


def embedded():
    """The module that makes the default corpus, imported on use: runs on other text work without notes/.

    Raises ValueError if it is missing."""
    try:
        from notes import corpus
        return corpus
    except ImportError:
        raise ValueError("the default text is made by notes/corpus.py, which is not here: give your "
                         "own, --data.files=NAME=PATH") from None


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

    # Read the file in blocks of 1 MiB.
    h = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            h.update(block)

    # Record the digest only if the file did not change meanwhile.
    record.pop(name, None)
    if now == stamp(path) and time.time_ns() - now[1] > 2e9:
        record[name] = [*now, h.hexdigest()]
    return h.hexdigest()


def sha256(*parts):
    """Hex digest of strings, bytes, arrays. Lengths are hashed too: "ab", "c" differs from "a", "bc"."""
    h = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else memoryview(part).cast("B")
        h.update(b"%d:" % len(part))
        h.update(part)
    return h.hexdigest()


# ---- tokenizers --------------------------------------------------------------------------------------------

BLANKS = re.compile(r"(\s{4096})")       # runs of blanks are cut: tiktoken fails on a million in a row
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
    import regex
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
        if BLANKS.search(text):
            parts = BLANKS.split(text)
        ids = [self.encoding.encode_to_numpy(part, disallowed_special=()) for part in parts]
        return np.concatenate(ids)

    def decode(self, ids):
        """ids → str. Broken UTF-8 and ids >= n_vocab, from a padded vocabulary, become U+FFFD."""
        pieces = [self.pieces[i] if i < self.n_vocab else b"\xff" for i in ids]
        return b"".join(pieces).decode("utf-8", "replace")

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

@contextlib.contextmanager
def atomic(path, mode="wb", **how):
    """Yield a file that replaces `path` once it is complete and on disk.

    A reader sees all of it or the previous content, even after a crash. how: options of `open`."""
    tmp = Path(f"{path}.{os.getpid()}.tmp")
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

    The kernel releases the lock of a process that dies."""
    os.makedirs(folder, exist_ok=True)
    with open(Path(folder, "lock"), "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


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


def cached_domain(folder, name, key, tokenizer, texts, verified):
    """The Domain of a text and a tokenizer, loaded from its shards in the cache or built there.

    key: cache key of the text. texts(): (train documents, val documents), called only if the shards have to
    be built. verified {file name: stamp}: shards whose digest has been checked; these two are added."""
    stem = f"{name}-{sha256(key, tokenizer.fingerprint)[:16]}"
    paths = [Path(folder, f"{stem}-{part}.bin") for part in ("train", "val")]
    about = Path(folder, f"{stem}.json")
    dtype = np.dtype("<u4")
    if tokenizer.n_vocab <= 65536:
        dtype = np.dtype("<u2")

    # Load the shards, or build them.
    facts = intact(about, paths, dtype, verified)
    if not facts:
        facts = write_shards(about, paths, dtype, tokenizer, texts())
    verified.update({path.name: stamp(path) for path in paths})
    train, val = (np.memmap(path, dtype, "r") for path in paths)
    return Domain(train, val, *facts["bytes"], facts["documents"], facts["sha256"])


def intact(about, paths, dtype, verified):
    """The facts in the JSON file `about` if the shards `paths` agree with them, else None.

    Prints a line if anything is damaged. Shards in `verified` whose stamp is unchanged are not hashed."""
    facts = read_json(about, "tokens", "bytes", "documents", "sha256")
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
        known = path.exists() and verified.get(path.name) == stamp(path)
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


class Corpus(NamedTuple):
    tokenizer: Tokenizer
    domains: dict                # name → Domain
    start: np.ndarray            # (D,) weights, in the order of `domains`
    end: np.ndarray              # (D,)
    fingerprint: str             # digest of the tokenizer and of all domains' tokens; checkpoints carry it


def tokenizer_of(config, vocab_size, keys, texts):
    """The tokenizer that config.tokenizer names. keys, texts: see cached_bpe."""
    if config.tokenizer == "bpe":
        return cached_bpe(config.cache, vocab_size, keys, texts)
    if config.tokenizer == "bytes":
        return Tokenizer("bytes", r"(?s:.)", {bytes([i]): i for i in range(256)})
    if config.tokenizer.endswith(".json"):
        return load_tokenizer(config.tokenizer)
    return known_encoding(config.tokenizer)


def prepare(config, vocab_size, launch=""):
    """DataConfig and the model's vocab_size → Corpus, built on the first call, later loaded from the cache.

    A text file whose stamp is unchanged is not read again. Of the processes with the same non-empty
    `launch`, the first verifies the digests of the shards; the others trust it for shards whose stamp is
    unchanged. Raises ValueError, saying what to correct."""
    names, start, end, paths = parse_domains(config)
    with locked(config.cache):
        # Digests of text files, from earlier calls.
        sources = Path(config.cache, "sources.json")
        record = {}
        saved = read_json(sources, "files")
        if saved and type(saved["files"]) is dict:
            record = saved["files"]
        before = dict(record)

        # Stamps of shards that this launch has verified.
        seen = Path(config.cache, "verified.json")
        verified = {}
        saved = read_json(seen, "launch", "files")
        if launch and saved and saved["launch"] == launch and type(saved["files"]) is dict:
            verified = saved["files"]

        # Texts are extracted only if something has to be built from them, and at most once.
        @functools.cache
        def split(name):
            return split_documents(documents(name, paths.get(name), config.skip_bad))

        def training_texts():
            return [doc for name in names for doc in split(name)[0]]

        # The tokenizer comes first: shards depend on it.
        keys = {name: text_key(record, name, paths.get(name), config.skip_bad) for name in names}
        tokenizer = tokenizer_of(config, vocab_size, keys.values(), training_texts)
        if vocab_size < tokenizer.n_vocab:
            raise ValueError(f"vocab_size {vocab_size}: {config.tokenizer} needs {tokenizer.n_vocab}")
        domains = {}
        for name in names:
            texts = functools.partial(split, name)
            domains[name] = cached_domain(config.cache, name, keys[name], tokenizer, texts, verified)

        # Save what the next call can reuse.
        if record != before:
            write_atomically(sources, json.dumps(dict(files=record)).encode())
        if launch:
            write_atomically(seen, json.dumps(dict(launch=launch, files=verified)).encode())

    # The fingerprint covers names, tokens and tokenizer.
    digests = []
    for name, domain in domains.items():
        digests += [name, *domain.sha256]
    return Corpus(tokenizer, domains, start, end, sha256(tokenizer.fingerprint, *digests))


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


def mix(x):
    """splitmix64: uint64 (N,) → (N,); every output bit depends on every input bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


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
    domain: torch.Tensor         # (b,)   int64 index in the order of corpus.domains
    weight: torch.Tensor = None  # (b, T) weights of the token losses, which are then summed; None: the mean


def document_starts(x, eot):
    """x (b, T) → (b, T): one past the last eot before a token; an eot belongs to the document it ends."""
    starts = np.where(x == eot, np.arange(1, x.shape[1] + 1), 0)[:, :-1]
    return np.maximum.accumulate(np.pad(starts, ((0, 0), (1, 0))), axis=1)


def take_windows(sources, starts, T):
    """b token arrays and the offset of a window in each → x, y (b, T) int64"""
    rows = np.stack([ids[a:a + T + 1] for ids, a in zip(sources, starts)]).astype(np.int64)
    return tuple(torch.from_numpy(np.ascontiguousarray(part)) for part in (rows[:, :-1], rows[:, 1:]))


class Batches:
    """batch(step), a pure function of (seed, step).  batch: windows in the global batch of a step.

    Window k of a domain is tokens [kT, kT + T + 1). An epoch visits each window once, in its own order."""

    def __init__(self, corpus, config, seed, batch, context):
        self.corpus = corpus
        self.config = config
        self.seed = seed
        self.batch = batch
        self.context = context

        # Every domain needs at least one window of training and of validation text.
        for name, domain in corpus.domains.items():
            for part, ids in (("train", domain.train), ("validation", domain.val)):
                if len(ids) <= context:
                    raise ValueError(f"domain {name!r}: {len(ids)} {part} tokens, "
                                     f"less than a window: context {context} + 1")
        windows = [(len(domain.train) - 1) // context for domain in corpus.domains.values()]
        self.windows = np.array(windows)                                                   # (D,)
        self.mixture = Mixture(corpus.start, corpus.end, config.horizon / context)

    def __call__(self, step, rank=0, world=1):
        """→ Batch: this rank's contiguous slice of the global batch, b = batch / world.

        Raises ValueError if the batch is not divisible by the number of ranks."""
        if self.batch % world:
            raise ValueError(f"{self.batch} windows a batch, not divisible by {world}")
        b, T = self.batch // world, self.context

        # The mixture gives each window its domain and its index j among that domain's windows.
        n0 = step * self.batch + rank * b
        domain, j = self.mixture.window_domains(n0, n0 + b)                                # (b,), (b,)
        W = self.windows[domain]                                                           # (b,)

        # The permutation is keyed by seed, domain and epoch j // W.
        key = np.full(b, self.seed & 2 ** 64 - 1, np.uint64)
        for part in (domain, j // W):
            key = mix(mix(key) + part.astype(np.uint64))
        k = permute(j % W, W, key)                                                         # (b,)

        # Cut the windows from the shards.
        train = [d.train for d in self.corpus.domains.values()]
        x, y = take_windows([train[i] for i in domain], k * T, T)
        return Batch(x, y, self.doc_start(x), torch.from_numpy(domain))

    def doc_start(self, x):
        """`document_starts` of x (b, T) if the configuration asks for document masking, else None."""
        if not self.config.doc_mask:
            return None
        return torch.from_numpy(document_starts(x.numpy(), self.corpus.tokenizer.eot))

    def epochs(self, step):
        """{name: epochs of the domain seen after `step` steps}"""
        epochs = self.mixture.counts([step * self.batch])[0] / self.windows
        return dict(zip(self.corpus.domains, epochs.tolist()))

    def val(self, name, limit=0):
        """(x, y, doc_start or None), (n, T) int64: `limit` evenly spaced validation windows; 0: all"""
        ids, T = self.corpus.domains[name].val, self.context
        total = (len(ids) - 1) // T
        n = min(limit, total) or total
        x, y = take_windows([ids] * n, np.arange(n) * total // n * T, T)
        return x, y, self.doc_start(x)


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


# ---- the command -------------------------------------------------------------------------------------------

def stats(config, vocab_size):
    """Print a table with a row for each domain, and the fingerprints of tokenizer and data."""
    corpus = prepare(config, vocab_size)
    print(f"{'domain':12}{'documents':>10}{'MB':>8}{'tokens':>12}{'val':>10}{'bytes/token':>13}"
          f"{'windows':>14}{'bigram bits/byte':>18}")
    for (name, d), s, e in zip(corpus.domains.items(), corpus.start, corpus.end):
        size = d.train_bytes + d.val_bytes
        tokens = len(d.train) + len(d.val)
        bits = bigram_bits(d.train, d.val, corpus.tokenizer)
        print(f"{name:12}{d.documents:10,}{size / 1e6:8.2f}{tokens:12,}{len(d.val):10,}"
              f"{size / tokens:13.2f}{f'{s:.0%} → {e:.0%}':>14}{bits:18.3f}")
    print(f"tokenizer {corpus.tokenizer.fingerprint[:16]}  data {corpus.fingerprint[:16]}")


def read_options(options, **numbers):
    """Options --NAME=VALUE → (DataConfig, numbers): its text and boolean fields, with or without "data." in
    front, and `numbers`, given with their defaults. Raises SystemExit at an unknown one."""
    config = DataConfig()
    known = {f.name: f.default for f in fields(DataConfig) if isinstance(f.default, (str, bool))}
    for option in options:
        name, _, value = option.removeprefix("--").removeprefix("data.").partition("=")
        if name in numbers and value.isdecimal():
            numbers[name] = int(value)
        elif name in known:
            if isinstance(known[name], bool):
                value = value.lower() == "true"
            config = replace(config, **{name: value})
        else:
            raise SystemExit(f"unknown option {option!r}; known: --{'=N --'.join(numbers)}=N "
                             f"--{'= --'.join(known)}=")
    return config, numbers


def main(argv):
    """The command line. Raises SystemExit with one line for whatever the user has to correct."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return
    command, *options = argv or ["(none)"]
    if command == "clean":
        from cleaning import clean_command
        return clean_command(options)
    if command != "stats":
        raise SystemExit(f"unknown command {command!r}; known: stats, clean")

    config, numbers = read_options(options, vocab=4096)

    # Report errors in the input as one line, without a traceback.
    try:
        stats(config, numbers["vocab"])
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"data.py: {error}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
