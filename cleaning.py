"""Which documents of a source are worth training on: not too short, and no duplicates of others.

  exact            texts that differ only in case, white space or composition of characters are the same
  near-duplicate   two texts whose sets of shingles A and B, the runs of 5 words in each, have
                       J(A, B) = |A ∩ B| / |A ∪ B| >= 0.9                                          (1)
                   compared exactly, on 64-bit hashes of the runs
  MinHash          finds the pairs to compare: the smallest value of a hash function is the same in A as in B
                   with probability J. Two documents meet, in a bucket, if all values of one of 14 bands of 8
                   hash functions agree:
                       P(they meet) = 1 - (1 - J⁸)¹⁴                .9996 at J = .9                (2)
  who stays        a document is removed only for one that stays and that is its own near-duplicate. In a
                   chain A ~ B ~ C with A ≁ C, B goes and both ends stay: no chain can swallow a corpus. This
                   is decided in an order given by the contents, longest first, so the order in which
                   documents are read does not matter
  bounds           about 200 bytes of memory a document, and in each process some 10 times its batch of 4 MB
                   or its longest document. On the disk, 350 bytes a document, and 8 a word for documents that
                   meet others. No document is compared with more than 64, so time is linear for any text;
                   how many met more is reported

Letters:  N documents  n words, shingles or texts of a batch
Run:      python data.py clean IN OUT [--min_tokens=24] ...     IN: a file, a folder, or NAME=PATH
"""
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import tempfile
import threading
import time
import unicodedata
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex

from data import PATTERN, DataConfig, atomic, locked, mix, read_options, write_atomically
from sources import rows

MIN_TOKENS = 24                  # shorter documents are dropped                                   [Motif]
SHINGLE = 5                      # words
BANDS, HASHES = 14, 8            # bands of a signature, values in a band
SIMILAR = 0.9                    # (1)
COMPARED = 64                    # comparisons of a document, at most
REMEMBERED = 256                 # members of a bucket that a document can meet
KEPT, SHORT, EXACT, NEAR = range(4)
REASONS = "kept", "too short", "exact duplicate", "near-duplicate"
FACTS = np.dtype([("digest", "<u8", 2), ("raw", "<u8"), ("shingles", "<u4"), ("short", "?")])

# Scripts without spaces between words: kana, Han, Thai, Lao, Tibetan, Burmese, Khmer, by their blocks.
UNSPACED = re.compile("[\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
                      "\U00020000-\U0003ffff\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff]")


# ---- a text → its shingles → its signature -----------------------------------------------------------------

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
    return " ".join(UNSPACED.sub(r" \g<0> ", plain).split())


def about_tokens(words):
    """An estimate of the tokens of a spaced text, whatever the tokenizer: one for every 8 bytes begun of each
    piece of PATTERN. There is at least one for 8 bytes."""
    return sum((len(piece.encode()) + 7) // 8 for piece in regex.findall(PATTERN, words))


def short_digest(text):
    """str → 64 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


BASE = 0x9E3779B97F4A7C13                                        # odd: it has an inverse modulo 2⁶⁴
INVERSE = pow(BASE, -1, 2 ** 64)
TABLE = mix(np.arange(256, dtype=np.uint64))
FACTOR, SUMMAND = mix(np.arange(2 * BANDS * HASHES, dtype=np.uint64)).reshape(2, -1, 1)    # (112, 1) each
FACTOR |= np.uint64(1)


def shingles_of(words):
    """Spaced text of n words → a hash of each run of 5 words, uint64 (max(0, n - 4),):
         h(run) = Σ_i TABLE[byte i of the run] BASE^i mod 2⁶⁴                                   (3)
    It is the difference of two prefix sums, times a power of the inverse."""
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
        facts["raw"][i] = short_digest(text)
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


# ---- worker processes --------------------------------------------------------------------------------------

def in_batches(texts, size=1 << 22):
    """Texts → lists of them, of about `size` characters, or of one that is longer."""
    batch = []
    held = 0
    for text in texts:
        batch.append(text)
        held += len(text) + 100                                  # a string takes that much more
        if held > size:
            yield batch
            batch = []
            held = 0
    if batch:
        yield batch


def end_with_parent():
    """In a worker process: end with the parent, even if that is killed. Otherwise it would wait for ever, and
    keep the locks that it has inherited."""
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def in_processes(f, items, workers):
    """f of each item, in order, computed by worker processes; a few items are in memory at a time."""
    if workers < 2:
        yield from map(f, items)
        return
    with ProcessPoolExecutor(workers, initializer=end_with_parent) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(f, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# ---- which documents stay ----------------------------------------------------------------------------------

class Verdict(NamedTuple):
    """What becomes of N documents, in the order in which they are read."""
    why: np.ndarray              # (N,) uint8: KEPT, SHORT, EXACT or NEAR
    stays: np.ndarray            # (N,) int64: the document that stays in its place, or itself
    jaccard: np.ndarray          # (N,) float32: (1) with that one; 1 for an exact duplicate
    cluster: np.ndarray          # (N,) uint64: the same for near-duplicates, also through others; a digest of
                                 # text: a split by it has each cluster on one side
    raw: np.ndarray              # (N,) uint64: digests of the texts
    limited: int                 # documents that met more others than could be compared


def judge(read, folder, min_tokens=MIN_TOKENS, workers=1):
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
    batches = in_batches(row.text for row in read())
    done = 0
    reported = time.time()
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(Path(folder, f"band{i}"), "wb")) for i in range(BANDS)]
        for some, buckets in in_processes(functools.partial(sign, min_tokens=min_tokens), batches, workers):
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
        for sets in in_processes(shingle_sets, in_batches(texts), workers):
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


# ---- clean text --------------------------------------------------------------------------------------------

def judged(read, verdict):
    """The rows that were judged, once more → (number, Row). Raises ValueError if they are not the same."""
    number = -1
    for number, row in enumerate(read()):
        if number >= len(verdict.raw) or short_digest(row.text) != verdict.raw[number]:
            raise ValueError(f"{row.file}, row {row.number}: changed while it was cleaned; start again")
        yield number, row
    if number + 1 != len(verdict.raw):
        raise ValueError(f"{len(verdict.raw)} rows were cleaned, {number + 1} are left of them; start again")


JSONL_SIZE = 256 << 20           # bytes of text in a file of clean text


def clean(name, path, out, config=DataConfig(), min_tokens=MIN_TOKENS, workers=None):
    """Write the documents of a source that are not too short and no duplicates to the new folder `out`, as
    .jsonl files, and a report → the report. A row has `text`, its `source`, `file` and `row`, and `copies`,
    the documents it stands for, itself included.

    The folder appears when it is complete; what a call that did not end has left is made again."""
    out = Path(out)
    partial = Path(f"{out}.partial")
    root = Path(path.rpartition(":")[2]).resolve()               # of SET:PATH
    if root in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"clean: {out} is inside {path}, from where it would be read; write elsewhere")

    def refuse():
        if out.exists():
            raise ValueError(f"clean: {out} exists; remove it, or name another folder")

    refuse()
    with locked(partial):
        refuse()                                                 # another may have finished meanwhile
        for old in partial.iterdir():
            if old.is_dir():
                shutil.rmtree(old)
            elif old.name != "lock":
                old.unlink()

        # Judge and write. The tables go at once, even if this fails.
        read = functools.partial(rows, name, path, config)
        with tempfile.TemporaryDirectory(dir=partial) as work:
            verdict = judge(read, work, min_tokens, workers or os.cpu_count())
        if not (verdict.why == KEPT).any():
            raise ValueError(f"clean: none of the {len(verdict.why)} documents of {path} has {min_tokens} "
                             "tokens; see --min_tokens=N")
        with contextlib.redirect_stdout(None):
            report = write_clean(read, verdict, name, partial)
        write_atomically(Path(partial, "report.json"), json.dumps(report, indent=1).encode())

        # All is there: the folder gets its name. The lock goes last, as others wait for it.
        os.rename(partial, out)
        Path(out, "lock").unlink()
    return report


def write_clean(read, verdict, name, folder):
    """Write the documents that stay to .jsonl files → the report, a dict."""
    copies = np.bincount(verdict.stays, minlength=len(verdict.why))
    groups = examples(verdict)
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
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            room -= length

    # Numbers, and for each example the document that stays, then some that do not.
    documents = np.bincount(verdict.why, minlength=len(REASONS))
    near = np.unique(verdict.cluster[verdict.why == NEAR])
    _, members = np.unique(verdict.cluster[verdict.why != SHORT], return_counts=True)
    _, ends = np.unique(verdict.cluster[verdict.why == KEPT], return_counts=True)
    return dict(documents=dict(zip(REASONS, documents.tolist())), bytes=dict(zip(REASONS, size.tolist())),
                clusters=len(near), largest=int(members.max(initial=0)), chains=int((ends > 1).sum()),
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
    print(f"{report['clusters']:,} clusters with near-duplicates, the largest of {report['largest']:,} "
          f"documents; {report['chains']:,} are chains,\nof which more than one stays; "
          f"{report['limited']:,} documents met more others than could be compared")
    for why in REASONS[1:]:
        for first, *others in [group for group in report["examples"] if group[-1]["why"] == why][:1]:
            for shown in (first, *others):
                print(f"  {shown['why']}, J {shown['jaccard']}: {shown['file']}, row {shown['row']}: "
                      f"{shown['begins'][:60]!r}")


def clean_command(words):
    """The command line after `clean`. Raises SystemExit with one line for what the user has to correct."""
    if len(words) < 2 or any(word.startswith("--") for word in words[:2]):
        raise SystemExit("python data.py clean IN OUT [options]: IN is a file, a folder or NAME=PATH; OUT is "
                         "a new folder")
    source, out, *options = words
    config, numbers = read_options(options, min_tokens=MIN_TOKENS, workers=os.cpu_count())
    name, equals, path = source.rpartition("=")
    if not equals:
        name = Path(path).name
    try:
        print_report(clean(name, path, out, config, **numbers))
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"data.py: {error}") from None
