"""Text → tokens → batches. What is unusual:

  no download      the default corpus is text that every Python installation carries: the documentation in the
                   standard library (prose), its source without that documentation (code), and worked
                   arithmetic (math; the only generated domain). It differs a little between Python versions.
  no loader state  batch(step) is a pure function of (seed, step): nothing to save or to lose. The global
                   batch does not depend on the number of ranks; a rank takes its slice.
  moving mixture   domain weights move linearly over a horizon of tokens [Motif §3.2.1]. Each window is due at
                   a time given in closed form, so the windows taken from a domain never fall and stay within
                   3 of the integral of its weight.

Letters:  N windows  D domains  B windows of a batch (b: of a rank)  T context, tokens  V vocabulary
Run:      python data.py stats [--vocab=4096] [--files=NAME=PATH] [--tokenizer=bytes|bpe|gpt2] ...
"""
import contextlib, fcntl, functools, gzip, hashlib, heapq, inspect, json, os, re, sys, time, zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch


@dataclass(frozen=True)
class DataConfig:
    domains: str = "prose:0.70:0.20,code:0.20:0.50,math:0.10:0.30"  # NAME:START_WEIGHT:END_WEIGHT,...  from
                                    # prose to code and math, as in Motif's schedule; the numbers:  [ours]
    files: str = ""                 # NAME=PATH,...  UTF-8 text, .jsonl, .json, these with .gz, or a folder of them
                                    # (no comma in a path); names that `domains` does not know replace it, weights equal
    skip_bad: bool = False          # leave out records without a `text`, rather than stop
    tokenizer: str = "bpe"          # "bytes" | "bpe", trained on the training text | a tiktoken name ("gpt2") | a
                                    # tokenizer.json, of a run or of a Hugging Face folder
    horizon: int = 0                # tokens over which the weights move; the end weights hold after it. Its
                                    # own number, so that stopping early changes nothing an earlier step saw
    doc_mask: bool = False          # attention may not cross documents; pre-training lets it          [ours]
    cache: str = "cache"            # folder of trained tokenizers and token shards


EMBEDDED = "prose", "code", "math"
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def parse_domains(config):
    """DataConfig → (names, start weights (D,), end weights (D,), {name: path}).  ValueError: what is wrong."""
    paths, rows = {}, []
    for item in filter(None, config.files.split(",")):
        name, _, path = item.partition("=")
        if not name or not path: raise ValueError(f"files: {item!r} is not NAME=PATH")
        if name in paths: raise ValueError(f"files: {name!r} is given twice")
        paths[name] = path

    for item in filter(None, config.domains.split(",")):
        name, *weights = item.split(":")
        try:
            start, end = (float(w) for w in weights)
        except ValueError:
            raise ValueError(f"domains: {item!r} is not NAME:START_WEIGHT:END_WEIGHT, two numbers") from None
        if not (start >= 0 and end >= 0): raise ValueError(f"domains: {item!r} has a weight that is not >= 0")
        rows.append((name, start, end))
    if paths and not any(name in paths for name, _, _ in rows):
        rows = [(name, 1 / len(paths), 1 / len(paths)) for name in paths]

    names = [name for name, _, _ in rows]
    for name in (*names, *paths):                                # it becomes a part of file names
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", name):
            raise ValueError(f"domains: {name!r} is no name: letters, digits and _ - . (not first), 64 at most")
    for name in names:
        if names.count(name) > 1: raise ValueError(f"domains: {name!r} is given twice")
        if name == "shakespeare" and name not in paths:
            raise ValueError("domain 'shakespeare' needs its text: --data.files=shakespeare=PATH; "
                             f"Tiny Shakespeare (1.1 MB) is at {SHAKESPEARE}")
        if name not in paths and name not in EMBEDDED:
            raise ValueError(f"domains: {name!r} has no text; known: {', '.join(EMBEDDED)}; "
                             f"your own: --data.files={name}=PATH")
    for name in paths:
        if name not in names: raise ValueError(f"files: {name!r} is not in domains ({', '.join(names)})")
    start, end = (np.array([row[i] for row in rows]) for i in (1, 2))                    # (D,), (D,)
    for which, w in (("start", start.sum()), ("end", end.sum())):
        if not abs(w - 1) <= 1e-6: raise ValueError(f"domains: the {which} weights sum to {w:g}, not 1")
    return names, start, end, paths


# ---- Documents of a domain, and their split ----------------------------------------------------------------

def documents(name, path=None, skip_bad=False):
    """Every document of a domain, duplicates included.  Of one's own (.gz or not): a file of text is one document,
    every record of .jsonl or .json another, in its field `text`; a folder is all such files in it (.txt, .md,
    .jsonl, .json).  Prints what was read, and what was not.
    ValueError: which file, and where; `skip_bad` leaves bad records out, and says how many."""
    if path is None: return embedded().documents(name)
    found, read, (files, left_out) = [], 0, own_files(name, path)
    for file in files:
        with reading(name): raw = file.read_bytes()
        raw = unpack(file, raw) if file.name.lower().endswith(".gz") else raw
        if kind_of(file) == "text":
            texts = [read_text(file, raw)]
        elif file != Path(path) and kind_of(file) == "json" and not holds_text(file, raw):
            left_out["without a `text`"].append(file)            # package.json, say, between the texts of a folder
            continue
        else:
            texts = read_records(file, raw, skip_bad)
        texts = [text for text in texts if text.strip()]
        found += texts
        read += bool(texts)
        if not texts: left_out["empty"].append(file)
    if not found: raise ValueError(f"files: {name}={path} is empty; give text in UTF-8")
    size = sum(len(text.encode()) for text in found)
    missing = [f"{len(them)} {why} ({', '.join(file.name for file in them[:3])}{', ...' * (len(them) > 3)})"
               for why, them in left_out.items()]
    print(f"{name}={path}: {read} file{'s' * (read != 1)}, {len(found):,} document{'s' * (len(found) != 1)}, "
          f"{size:,} bytes"
          + f"; left out: {', '.join(missing)}" * bool(missing))
    return found


def own_files(name, path):
    """→ (the files of a domain of one's own, sorted; {why: files and folders that are left out})"""
    root, left_out = Path(path), defaultdict(list)
    if not root.is_dir():
        if root.exists() and not root.is_file():
            raise ValueError(f"files: {name}={path} is a pipe or a device, which gives its text only once: save that "
                             "in a file")
        return [root], left_out

    def unreadable(error): raise error
    files, seen = [], set()
    with reading(name):
        for folder, folders, names in os.walk(root, onerror=unreadable, followlinks=True):
            seen.add(os.path.realpath(folder))                   # a link may lead back up
            for part in sorted(folders):
                if part.startswith("."): left_out["hidden"].append(Path(folder, part))
                elif os.path.realpath(Path(folder, part)) in seen: left_out["read already"].append(Path(folder, part))
                else: continue
                folders.remove(part)
            folders.sort()
            for file in (Path(folder, name) for name in sorted(names)):
                if file.name.startswith("."): left_out["hidden"].append(file)
                elif not file.name.lower().removesuffix(".gz").endswith(KINDS): left_out["of another kind"].append(file)
                elif not file.is_file(): left_out["neither file nor folder"].append(file)
                else: files.append(file)
    if not files:
        raise ValueError(f"files: {name}={path}: no {', '.join(KINDS)} in this folder, nor one of these with .gz")
    return sorted(files), left_out


@contextlib.contextmanager
def reading(name):
    try:
        yield
    except OSError as error:
        raise ValueError(f"files: cannot read {name}={error.filename}: {error.strerror}; give a text file, a .jsonl, "
                         "or a folder of them") from None


KINDS = ".txt", ".md", ".jsonl", ".json"


def kind_of(file):
    """How a file is read, which its name says: "text", "jsonl" or "json"."""
    suffix = file.name.lower().removesuffix(".gz").rpartition(".")[2]
    return suffix if suffix in ("jsonl", "json") else "text"


def unpack(file, raw):
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"files: {file} is a damaged gzip file: {error}") from None


def read_text(file, raw):
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"files: {file} is not UTF-8 at byte {error.start}; convert it") from None


def records(file, raw):
    """[(where, a record: its JSON in bytes, or what that says)].  A .json is an array, or one record, or lines after
    all; blank lines are none."""
    if kind_of(file) == "json":
        with contextlib.suppress(ValueError, RecursionError):
            whole = json.loads(raw)
            whole = whole if isinstance(whole, list) else [whole]
            return [(f"record {number}", record) for number, record in enumerate(whole, 1)]
    return [(f"line {number}", line) for number, line in enumerate(raw.split(b"\n"), 1) if line.strip()]


def text_of(record):
    """Its field `text`.  One of BAD_RECORD where there is none."""
    text = (json.loads(record) if isinstance(record, bytes) else record)["text"]
    text.encode()                                                # JSON can spell half of a surrogate pair
    return text


BAD_RECORD = ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError


def holds_text(file, raw):
    """Whether any record does."""
    for _, record in records(file, raw):
        with contextlib.suppress(*BAD_RECORD):
            text_of(record)
            return True
    return False


def read_records(file, raw, skip_bad):
    """The field `text` of every record."""
    found, bad, all_of_it = [], 0, records(file, raw)
    for where, record in all_of_it:
        try:
            found.append(text_of(record))
        except BAD_RECORD as error:
            if not skip_bad:
                why = "no text in UTF-8" if isinstance(error, UnicodeError) else "no JSON object with a string `text`"
                raise ValueError(f"files: {file}, {where}: {why}; mend it, or --data.skip_bad=true") from None
            bad += 1
    if bad: print(f"{file}: {bad} bad records of {len(all_of_it)} left out")
    return found


def split_documents(docs, val=0.05):
    """docs → (train, val) without exact duplicates.  A hash of the text decides, so that a document keeps its
    side when others come or go: the lowest `val` of all possible hashes are validation.  Few documents, or uneven
    ones, need more care: validation is to have 1% of the bytes, so the next lowest hash follows until it has; and
    at most 10%, so that a larger document stays in training, or gives its last tenth if there is no other."""
    docs = list(dict.fromkeys(docs))
    hashes, sizes = [int(sha256(doc)[:8], 16) for doc in docs], [len(doc.encode()) for doc in docs]
    total, held, keep = sum(sizes), 0, [len(doc) for doc in docs]       # bytes; characters left for training
    for i in sorted(range(len(docs)), key=hashes.__getitem__):
        enough = held >= total / 100
        if hashes[i] > val * 2 ** 32 and enough: break
        if held + sizes[i] <= total / 10: keep[i] = 0
        elif not enough: keep[i] = len(docs[i]) * 9 // 10
        held += len(docs[i][keep[i]:].encode())
    train, held_out = ([doc[:n] for doc, n in zip(docs, keep)], [doc[n:] for doc, n in zip(docs, keep)])
    return [part for part in train if part], [part for part in held_out if part]


def text_key(record, name, path=None, skip_bad=False):
    """Names the text of a domain, how it is read and how it is cut, without extracting it.  record: see `digest`."""
    if path:
        steps = documents, records, text_of, read_records, split_documents
        files, _ = own_files(name, path)
        with reading(name): parts = [f"{kind_of(file)} {digest(file, record)}" for file in files]
        return sha256(str(skip_bad), *parts, *map(inspect.getsource, steps))
    parts = [f"{module} {digest(file, record)}" for module, file in embedded().library_files()]
    return sha256(name, *parts, inspect.getsource(embedded()), inspect.getsource(split_documents))


def embedded():
    """The module that makes the default text.  It is none of the ideas, so it is imported where it is needed."""
    try:
        from notes import corpus
        return corpus
    except ImportError:
        raise ValueError("the default text is made by notes/corpus.py, which is not here: give your own, "
                         "--data.files=NAME=PATH") from None


def stamp(path):
    """[size, time of the last change]: by these a file is known again."""
    about = os.stat(path)
    return [about.st_size, about.st_mtime_ns]


def digest(path, record):
    """sha256 of a file, which is read only where its size or time is not that of record {path: [size, time,
    digest]}.  One that changed within the last two seconds is not recorded: it could do so again in that time."""
    now, known = stamp(path), record.get(str(path.absolute()))
    if type(known) is list and len(known) == 3 and known[:2] == now and type(known[2]) is str: return known[2]
    h = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20): h.update(part)
    record.pop(str(path.absolute()), None)
    if now == stamp(path) and time.time_ns() - now[1] > 2e9: record[str(path.absolute())] = [*now, h.hexdigest()]
    return h.hexdigest()


def sha256(*parts):
    """hex digest of strings, bytes, arrays.  Lengths go in, so that "ab", "c" is not "a", "bc"."""
    h = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else memoryview(part).cast("B")
        h.update(b"%d:" % len(part))
        h.update(part)
    return h.hexdigest()


# ---- Tokenizers --------------------------------------------------------------------------------------------

BLANKS = re.compile(r"(\s{4096})")       # tiktoken's engine gives up on a million blanks in a row: such are cut
LONGEST = 128                   # characters of a word that BPE training reads as one; longer ones are cut
EOT = "<|endoftext|>"
SPECIALS = EOT, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"      # the last ids of every vocabulary
BPE_CHARS = 32_000_000          # characters of a document that BPE training reads; more costs only memory

# A word with the one mark or blank before it; up to 3 digits; marks; line ends with the next line's
# indentation, one token at any depth; other blanks, less the last, which belongs to the word behind it.
PATTERN = (r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+"
           r"|\s*\n[ \t]*|\s+(?!\S)|\s+")


def merge(word, a, b, new):
    """[.., a, b, ..] → [.., new, ..], from the left."""
    out, i = [], 0
    while i < len(word):
        hit = word[i] == a and i + 1 < len(word) and word[i + 1] == b
        out.append(new if hit else word[i])
        i += 2 if hit else 1
    return out


def train_bpe(texts, vocab_size):
    """Byte-level BPE → ranks {bytes: id}, vocab_size - 5 of them (5 ids are left for specials).  Merges the
    most frequent pair, ties to the smallest pair of ids.  ValueError if the text has too few pairs."""
    import regex
    if (size := vocab_size - len(SPECIALS)) < 256:
        raise ValueError(f"vocab_size {vocab_size}: bpe needs at least {256 + len(SPECIALS)}")
    freq = Counter()
    for text in texts: freq.update(regex.findall(PATTERN, text[:BPE_CHARS]))
    for word in [word for word in freq if len(word) > LONGEST]:
        n = freq.pop(word)
        for i in range(0, len(word), LONGEST): freq[word[i:i + LONGEST]] += n
    words, freq = [list(word.encode()) for word in freq], list(freq.values())
    count, where = Counter(), defaultdict(set)       # of a pair: how often, and the words that may hold it
    for w, word in enumerate(words):
        for pair in zip(word, word[1:]):
            count[pair] += freq[w]
            where[pair].add(w)

    pieces = [bytes([i]) for i in range(256)]
    heap = [(-n, pair) for pair, n in count.items()]
    heapq.heapify(heap)
    said = time.time()
    while (new := len(pieces)) < size:
        if time.time() - said > 5:
            print(f"bpe: {new} of {size} tokens", flush=True)
            said = time.time()
        if not heap:
            raise ValueError(f"vocab_size {vocab_size}: the text gives only {new + len(SPECIALS)} tokens")
        n, pair = heapq.heappop(heap)
        if -n != count[pair]:                    # stale: a count grows only in the merge that makes the pair,
            if count[pair]: heapq.heappush(heap, (-count[pair], pair))       # so the top is an upper bound
            continue
        pieces.append(pieces[pair[0]] + pieces[pair[1]])
        born = set()
        for w in where.pop(pair):
            for p in zip(words[w], words[w][1:]): count[p] -= freq[w]
            words[w] = merge(words[w], *pair, new)
            for p in zip(words[w], words[w][1:]):
                count[p] += freq[w]
                if new in p:
                    born.add(p)
                    where[p].add(w)
        for p in born: heapq.heappush(heap, (-count[p], p))
    return {piece: i for i, piece in enumerate(pieces)}


class Tokenizer:
    """Text ↔ ids.  n_vocab, eot, specials {name: id}, token_bytes (V,) bytes a token stands for (0: special),
    fingerprint.  encode never reads specials in text; they are put in by id."""
    def __init__(self, name, pattern, ranks):
        first = max(ranks.values()) + 1
        self.specials = {special: first + i for i, special in enumerate(SPECIALS)}
        self.n_vocab, self.eot = first + len(SPECIALS), first
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens=self.specials)
        self.pieces = [b""] * self.n_vocab                       # an encoding may have unused ids
        for piece, i in ranks.items(): self.pieces[i] = piece
        self.token_bytes = np.array([len(piece) for piece in self.pieces])                # (V,) int64
        for special, i in self.specials.items(): self.pieces[i] = special.encode()
        self.fingerprint = sha256(pattern, *self.pieces)

    def encode(self, text):
        """str → ids, uint32"""
        parts = BLANKS.split(text) if BLANKS.search(text) else [text]
        return np.concatenate([self.encoding.encode_to_numpy(part, disallowed_special=()) for part in parts])

    def decode(self, ids):
        """ids → str; broken UTF-8, and ids of a padded vocabulary that stand for nothing, become U+FFFD"""
        return b"".join(self.pieces[i] if i < self.n_vocab else b"\xff" for i in ids).decode("utf-8", "replace")

    def save(self, path):
        """All of it as one JSON file, for load_tokenizer."""
        pieces = [piece.hex() for piece in self.pieces[:self.eot]]
        saved = dict(name=self.encoding.name, pattern=self.encoding._pat_str, pieces=pieces,
                     fingerprint=self.fingerprint)
        write_atomically(path, json.dumps(saved).encode())


def load_tokenizer(path):
    """What Tokenizer.save wrote, or the tokenizer.json of a Hugging Face folder.  ValueError if the file is damaged."""
    try:
        text = Path(path).read_text("utf-8")
        saved = json.loads(text)
        if "pieces" in saved:
            ranks = {bytes.fromhex(piece): i for i, piece in enumerate(saved["pieces"]) if piece}
            tokenizer = Tokenizer(saved["name"], saved["pattern"], ranks)
            if tokenizer.fingerprint != saved["fingerprint"]: raise ValueError
            return tokenizer
        theirs = (saved["huggingface"], saved["eot"]) if "huggingface" in saved else None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError):
        raise ValueError(f"{path}: damaged") from None
    from notes.huggingface import HuggingFaceTokenizer, read_hf_tokenizer
    if not theirs: return read_hf_tokenizer(Path(path), text)
    if [type(part) for part in theirs] != [str, int]: raise ValueError(f"{path}: damaged")
    tokenizer = HuggingFaceTokenizer(*theirs)
    if not 0 <= tokenizer.eot < tokenizer.n_vocab: raise ValueError(f"{path}: damaged: eot {tokenizer.eot}")
    return tokenizer


def known_encoding(name):
    """A tiktoken encoding with our specials in the place of its own.  (gpt2's <|endoftext|> keeps its id.)"""
    known = tiktoken.list_encoding_names()
    if name not in known: raise ValueError(f"tokenizer {name!r}: known are bytes, bpe, PATH/tokenizer.json, "
                                          f"{', '.join(known)}")
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:                       # no network, or a damaged file
        raise ValueError(f"tokenizer {name!r}: tiktoken cannot get its file ({type(error).__name__}); put it "
                         "into the folder that TIKTOKEN_CACHE_DIR names, or use bpe") from None
    return Tokenizer(name, encoding._pat_str, encoding._mergeable_ranks)


# ---- The cache: written once, verified on every load, shared by processes ----------------------------------

@contextlib.contextmanager
def atomic(path, mode="wb", **how):
    """A file to write to, which gets its name when it is whole and on the disk: a reader sees all of it, or what was
    there before, even after a crash."""
    beside = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(beside, mode, **how) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_atomically(path, data):
    with atomic(path) as file: file.write(data)


@contextlib.contextmanager
def locked(folder):
    """One process builds; the others wait, then load.  The system frees the lock of a process that dies."""
    os.makedirs(folder, exist_ok=True)
    with open(Path(folder, "lock"), "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def read_json(path, *needs):
    """The dict in a cache file, or None (and a line saying so) if it is damaged or missing."""
    if not path.exists(): return None
    try:
        found = json.loads(path.read_bytes())
        return {name: found[name] for name in needs}
    except (ValueError, KeyError, TypeError, RecursionError):
        print(f"{path}: damaged, building it again")


def cached_bpe(folder, vocab_size, keys, texts):
    """keys: of the training texts.  texts(): those texts, called only if there is something to build."""
    key = sha256(*sorted(keys), str(vocab_size), PATTERN, *map(inspect.getsource, (merge, train_bpe)))
    path = Path(folder, f"bpe-{vocab_size}-{key[:16]}.json")
    if path.exists():
        try:
            return load_tokenizer(path)
        except ValueError as error:
            print(f"{error}, building it again")
    texts, began = texts(), time.time()
    tokenizer = Tokenizer("bpe", PATTERN, train_bpe(texts, vocab_size))
    tokenizer.save(path)
    size = sum(map(len, texts)) / 1e6
    print(f"{path}: {vocab_size} tokens from {size:.1f} MB, {time.time() - began:.1f} s")
    return tokenizer


class Domain(NamedTuple):
    train: np.ndarray            # tokens, uint16 or uint32, memory-mapped; every document is followed by eot
    val: np.ndarray
    train_bytes: int             # UTF-8 bytes of the text behind them, without the eots
    val_bytes: int
    documents: int               # train + validation; one that is cut counts twice
    sha256: list                 # of the tokens: train, val


def cached_domain(folder, name, key, tokenizer, texts, verified):
    """texts(): (train documents, val documents), called only if there is something to build.
    verified {path: stamp}: shards whose digest was found right before; those found so now are added."""
    stem = f"{name}-{sha256(key, tokenizer.fingerprint)[:16]}"
    paths = [Path(folder, f"{stem}-{part}.bin") for part in ("train", "val")]
    dtype, about = np.dtype("<u2" if tokenizer.n_vocab <= 65536 else "<u4"), Path(folder, f"{stem}.json")
    facts = intact(about, paths, dtype, verified) or write_shards(about, paths, dtype, tokenizer, texts())
    verified |= {path.name: stamp(path) for path in paths}
    train, val = (np.memmap(path, dtype, "r") for path in paths)
    return Domain(train, val, *facts["bytes"], facts["documents"], facts["sha256"])


def intact(about, paths, dtype, verified):
    """What the file `about` says of the shards `paths`, if they are there as it says; None, and a line, if not."""
    facts = read_json(about, "tokens", "bytes", "documents", "sha256")
    if not facts: return None
    pairs = dict(tokens=int, bytes=int, sha256=str)              # of the training and the validation text
    if not all(type(facts[k]) is list and [type(v) for v in facts[k]] == [kind] * 2 for k, kind in pairs.items()):
        return print(f"{about}: damaged, building it again")
    for path, n, right in zip(paths, facts["tokens"], facts["sha256"]):
        size = path.stat().st_size if path.exists() else 0
        known = path.exists() and verified.get(path.name) == stamp(path)
        if size != n * dtype.itemsize or not known and sha256(np.memmap(path, dtype, "r")) != right:
            return print(f"{path}: damaged ({size} of {n * dtype.itemsize} bytes), building it again")
    return facts


def write_shards(about, paths, dtype, tokenizer, docs):
    """docs: (train documents, val documents) → facts, as `intact` finds them."""
    began, facts = time.time(), dict(tokens=[], bytes=[], sha256=[], documents=sum(map(len, docs)))
    for path, part in zip(paths, docs):
        with ThreadPoolExecutor(os.cpu_count()) as pool:         # tiktoken lets go of the interpreter lock
            ids = [ids for doc in pool.map(tokenizer.encode, part) for ids in (doc, [tokenizer.eot])]
        ids = np.concatenate(ids).astype(dtype)
        write_atomically(path, ids)
        facts["tokens"].append(len(ids))
        facts["bytes"].append(sum(len(doc.encode()) for doc in part))
        facts["sha256"].append(sha256(ids))
    write_atomically(about, json.dumps(facts).encode())          # last: without it the shards do not count
    train, val = facts["bytes"]
    print(f"{about}: {(train + val) / 1e6:.1f} MB, {sum(facts['tokens']):,} tokens, "
          f"of which {val / (train + val):.1%} are validation, {time.time() - began:.1f} s")
    return facts


class Corpus(NamedTuple):
    tokenizer: Tokenizer
    domains: dict                # name → Domain
    start: np.ndarray            # (D,) weights, in the order of `domains`
    end: np.ndarray              # (D,)
    fingerprint: str             # of the tokens of all domains and of the tokenizer; a checkpoint carries it


def tokenizer_of(config, vocab_size, keys, texts):
    """The one that config.tokenizer names. keys, texts: see cached_bpe."""
    if config.tokenizer == "bpe":
        return cached_bpe(config.cache, vocab_size, keys, texts)
    if config.tokenizer == "bytes":
        return Tokenizer("bytes", r"(?s:.)", {bytes([i]): i for i in range(256)})
    if config.tokenizer.endswith(".json"):
        return load_tokenizer(config.tokenizer)
    return known_encoding(config.tokenizer)


def prepare(config, vocab_size, launch=""):
    """DataConfig, the model's vocab_size → Corpus; built once, then loaded.  ValueError: what to mend.
    Text that is as large and as old as when it was last read is not read again. Of the processes that name the same
    `launch`, the first one verifies the shards' digests; the others take its word for what has not changed since."""
    names, start, end, paths = parse_domains(config)
    with locked(config.cache):
        sources, seen = Path(config.cache, "sources.json"), Path(config.cache, "verified.json")
        record = read_json(sources, "files")
        record = record["files"] if record and type(record["files"]) is dict else {}
        before, verified = dict(record), read_json(seen, "launch", "files")
        trusted = launch and verified and verified["launch"] == launch and type(verified["files"]) is dict
        verified = verified["files"] if trusted else {}
        keys = {name: text_key(record, name, paths.get(name), config.skip_bad) for name in names}
        texts = functools.cache(lambda name: split_documents(documents(name, paths.get(name), config.skip_bad)))
        train = lambda: [doc for name in names for doc in texts(name)[0]]
        tokenizer = tokenizer_of(config, vocab_size, keys.values(), train)
        if vocab_size < tokenizer.n_vocab:
            raise ValueError(f"vocab_size {vocab_size}: {config.tokenizer} needs {tokenizer.n_vocab}")
        build = {name: functools.partial(texts, name) for name in names}
        domains = {n: cached_domain(config.cache, n, keys[n], tokenizer, build[n], verified) for n in names}
        if record != before: write_atomically(sources, json.dumps(dict(files=record)).encode())
        if launch: write_atomically(seen, json.dumps(dict(launch=launch, files=verified)).encode())
    digests = (part for name, domain in domains.items() for part in (name, *domain.sha256))
    return Corpus(tokenizer, domains, start, end, sha256(tokenizer.fingerprint, *digests))


# ---- Mixture: which domain the n-th window comes from ------------------------------------------------------

class Mixture:
    """Weights move linearly from start to end over `horizon` windows, then the end weights hold:
         P_i(t) = ∫₀ᵗ w_i                                                    (1)   Σ_i P_i(t) = t
         due_i(j) = t with P_i(t) = j + ½                                    (2)   j = 0, 1, ..
    Windows are taken in order of due time, ties by domain. Rounding P_i instead would take windows back."""
    def __init__(self, start, end, horizon):
        self.start, self.end = (np.asarray(w, np.float64) / np.sum(w) for w in (start, end))        # (D,)
        if horizon <= 0 and not np.array_equal(self.start, self.end):
            raise ValueError(f"horizon {horizon:g}: the weights move; over how long?  --data.horizon=TOKENS")
        self.horizon = float(horizon) if horizon > 0 else 1.0

    def integral(self, t):
        """(1): t (...) in windows → (..., D)"""
        t = np.asarray(t, np.float64)[..., None]
        u = np.minimum(t, self.horizon)
        return self.start * u + (self.end - self.start) * u * u / (2 * self.horizon) + self.end * (t - u)

    def due(self, j):
        """(2): j (..., D) → times (..., D); inf if it never is.  The one place that decides the order."""
        s, e, h, y = self.start, self.end, self.horizon, j + 0.5
        whole = self.integral(h)                                                         # (D,) taken by then
        with np.errstate(divide="ignore", invalid="ignore"):
            moving = 2 * y / (s + np.sqrt(np.maximum(s * s + 2 * (e - s) * y / h, 0)))   # no cancellation
            return np.where(y <= whole, moving, h + (y - whole) / e)

    def counts(self, n):
        """Of the first n windows, how many each domain gives: n (N,) → (N, D) int64.  Sums to n."""
        n = np.asarray(n, np.int64)
        t = np.maximum(n - len(self.start) / 2 - 1, 0)           # by t, n - D - 1 to n - 1 windows are due,
        c = np.floor(self.integral(t) + 0.5).astype(np.int64)    # so these are of the first n          (N, D)
        rows = np.arange(len(n))
        while (left := n > c.sum(-1)).any():                     # take what is due next, one a round
            c[rows, self.due(c).argmin(-1)] += left
        return c

    def window_domains(self, n0, n1):
        """Windows n0 .. n1-1 → (domain (N,), index within the domain (N,))"""
        c = self.counts(np.arange(n0, n1 + 1))
        domain = np.diff(c, axis=0).argmax(-1)
        return domain, c[np.arange(n1 - n0), domain]


def mix(x):
    """splitmix64: uint64 (N,) → (N,), every bit depends on every bit"""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def permute(i, n, key):
    """A pseudo-random permutation of 0 .. n-1, named by key, at i.  i (N,), n, key (N,) or one → (N,) int64.
    A Feistel network permutes 4^half >= n numbers; what falls outside goes through again."""
    i, n, key = np.broadcast_arrays(*(np.atleast_1d(np.asarray(a)).astype(np.uint64) for a in (i, n, key)))
    half = np.array([max(1, (int(size - 1).bit_length() + 1) // 2) for size in n.tolist()], np.uint64)
    low, x, out = (np.uint64(1) << half) - np.uint64(1), i, np.ones(len(i), bool)
    while out.any():
        left, right = x >> half, x & low
        for r in range(6): left, right = right, left ^ mix(right ^ mix(key + np.uint64(r))) & low
        x = np.where(out, left << half | right, x)
        out = x >= n
    return x.astype(np.int64)


# ---- Batches -----------------------------------------------------------------------------------------------

class Batch(NamedTuple):
    x: torch.Tensor              # (b, T) int64 tokens
    y: torch.Tensor              # (b, T) int64 the tokens after them
    doc_start: torch.Tensor      # (b, T) int64 position where the token's document begins, or None
    domain: torch.Tensor         # (b,)   int64 index in the order of corpus.domains
    weight: torch.Tensor = None  # (b, T) of each token's loss, which is then a sum; None: the mean


def document_starts(x, eot):
    """x (b, T) → (b, T): one past the last eot before a token; an eot belongs to the document it ends."""
    starts = np.where(x == eot, np.arange(1, x.shape[1] + 1), 0)[:, :-1]
    return np.maximum.accumulate(np.pad(starts, ((0, 0), (1, 0))), axis=1)


def take_windows(sources, starts, T):
    """b token arrays and where to start in each → x, y (b, T) int64"""
    rows = np.stack([ids[a:a + T + 1] for ids, a in zip(sources, starts)]).astype(np.int64)
    return tuple(torch.from_numpy(np.ascontiguousarray(part)) for part in (rows[:, :-1], rows[:, 1:]))


class Batches:
    """batch(step), a pure function of (seed, step).  batch: windows in the global batch of a step.
    Window k of a domain is tokens [kT, kT + T + 1); all are seen once an epoch, in its own order."""
    def __init__(self, corpus, config, seed, batch, context):
        self.corpus, self.config, self.seed, self.batch, self.context = corpus, config, seed, batch, context
        for name, domain in corpus.domains.items():
            for part, ids in (("train", domain.train), ("validation", domain.val)):
                if len(ids) <= context: raise ValueError(
                    f"domain {name!r}: {len(ids)} {part} tokens, less than a window: context {context} + 1")
        self.windows = np.array([(len(d.train) - 1) // context for d in corpus.domains.values()])    # (D,)
        self.mixture = Mixture(corpus.start, corpus.end, config.horizon / context)

    def __call__(self, step, rank=0, world=1):
        """→ Batch of rank's contiguous slice, b = batch / world"""
        if self.batch % world: raise ValueError(f"{self.batch} windows a batch, not divisible by {world}")
        b, T = self.batch // world, self.context
        n0 = step * self.batch + rank * b
        domain, j = self.mixture.window_domains(n0, n0 + b)
        W = self.windows[domain]
        key = np.full(b, self.seed & 2 ** 64 - 1, np.uint64)
        for part in (domain, j // W): key = mix(mix(key) + part.astype(np.uint64))       # seed, domain, epoch
        k = permute(j % W, W, key)
        train = [d.train for d in self.corpus.domains.values()]
        x, y = take_windows([train[i] for i in domain], k * T, T)
        return Batch(x, y, self.doc_start(x), torch.from_numpy(domain))

    def doc_start(self, x):
        if self.config.doc_mask: return torch.from_numpy(document_starts(x.numpy(), self.corpus.tokenizer.eot))

    def epochs(self, step):
        """{name: epochs of the domain seen after `step` steps}"""
        epochs = self.mixture.counts([step * self.batch])[0] / self.windows
        return dict(zip(self.corpus.domains, epochs.tolist()))

    def val(self, name, limit=0):
        """(x, y, doc_start or None), each (n, T) int64: `limit` validation windows at even distances; 0: all"""
        ids, T = self.corpus.domains[name].val, self.context
        total = (len(ids) - 1) // T
        n = min(limit, total) or total
        x, y = take_windows([ids] * n, np.arange(n) * total // n * T, T)
        return x, y, self.doc_start(x)


# ---- What counting alone can do: the bar a model has to pass -----------------------------------------------

def bigram_bits(train, val, tokenizer):
    """bits/byte of val[1:] under a Witten-Bell bigram of the same tokens, T(a) = distinct followers of a:
         p(b|a) = (c(ab) + T(a) u(b)) / (c(a) + T(a)),   u(b) = (c(b) + 1) / (N + V)
    An eot costs bits and stands for 0 bytes. Of a long text, the first 20M tokens are counted."""
    V = tokenizer.n_vocab
    train, val = train[:20_000_000].astype(np.int64), val[:20_000_000].astype(np.int64)
    unigram = (np.bincount(train, minlength=V) + 1) / (len(train) + V)                   # (V,)
    pairs, n = np.unique(train[:-1] * V + train[1:], return_counts=True)                # the pairs that occur
    seen, followers = (np.bincount(a, minlength=V) for a in (train[:-1], pairs // V))    # c(a), T(a)
    a, b = val[:-1], val[1:]
    code = a * V + b
    at = np.minimum(np.searchsorted(pairs, code), len(pairs) - 1)
    both = np.where(pairs[at] == code, n[at], 0)
    smooth = (both + followers[a] * unigram[b]) / np.maximum(seen[a] + followers[a], 1)
    p = np.where(seen[a] > 0, smooth, unigram[b])
    return float(-np.log2(p).sum() / tokenizer.token_bytes[b].sum())


# ---- Command line ------------------------------------------------------------------------------------------

def stats(config, vocab_size):
    corpus = prepare(config, vocab_size)
    print(f"{'domain':12}{'documents':>10}{'MB':>8}{'tokens':>12}{'val':>10}{'bytes/token':>13}"
          f"{'windows':>14}{'bigram bits/byte':>18}")
    for (name, d), s, e in zip(corpus.domains.items(), corpus.start, corpus.end):
        size, tokens = d.train_bytes + d.val_bytes, len(d.train) + len(d.val)
        print(f"{name:12}{d.documents:10,}{size / 1e6:8.2f}{tokens:12,}{len(d.val):10,}{size / tokens:13.2f}"
              f"{f'{s:.0%} → {e:.0%}':>14}{bigram_bits(d.train, d.val, corpus.tokenizer):18.3f}")
    print(f"tokenizer {corpus.tokenizer.fingerprint[:16]}  data {corpus.fingerprint[:16]}")


def main(argv):
    if {"-h", "--help"} & set(argv): return print(__doc__)
    command, *options = argv or ["(none)"]
    if command != "stats": raise SystemExit(f"unknown command {command!r}; known: stats")
    config, vocab_size = DataConfig(), 4096
    known = {f.name: f.default for f in fields(DataConfig) if isinstance(f.default, (str, bool))}
    for option in options:
        name, _, value = option.removeprefix("--").removeprefix("data.").partition("=")
        if name == "vocab" and value.isdecimal(): vocab_size = int(value)
        elif name in known: config = replace(config, **{name: value if known[name] not in (True, False)
                                                        else value.lower() == "true"})
        else: raise SystemExit(f"unknown option {option!r}; known: --vocab=N --{'= --'.join(known)}=")
    try:
        stats(config, vocab_size)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"data.py: {error}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
