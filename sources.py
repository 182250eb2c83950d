"""Files → rows: which files a domain has, and the documents in them, one after another.

  by look      text, .jsonl, .json, .csv, each also with .gz or .zst, .parquet, or a folder of them;
               compression and parquet are known by their first bytes, not by the name
  by name      SET:PATH, for the published sets in SETS, whose folders hold things not to be read: rejects,
               test splits, second copies
  streaming    memory does not depend on the size of a file; a row knows its file and its number there
  no silence   a row without text, or a file that is damaged or cut short, stops the reading; what is left out
               by conditions or --data.skip_bad is counted
"""
import contextlib
import csv
import gzip
import io
import itertools
import json
import math
import operator
import os
import re
import zlib
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

LARGE = 256_000_000             # bytes of text that are held in memory; more is streamed
PIECE = 1_000_000               # bytes; a streamed text file of more than 16 pieces is cut into them
LONGEST_ROW = 64_000_000        # bytes of a record
PACKED = ".gz", ".zst", ".zstd"
KINDS = ".txt", ".md", ".jsonl", ".json", ".csv", ".parquet"
BAD_RECORD = ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError


# ---- published sets ----------------------------------------------------------------------------------------

class Set(NamedTuple):
    """What is known of a published set. `python data.py sources` prints it."""
    kinds: tuple                 # ends of the names of its files
    download: str                # repository of the Hugging Face hub, and the pattern to download
    schema: str
    quality: str                 # the field that --data.where may call "quality"
    licence: str
    size: str
    left_out: str


SETS = {
    "fineweb2": Set(
        (".parquet",),
        "HuggingFaceFW/fineweb-2  data/kor_Hang/train/*.parquet  (any language_Script but English)",
        "text, id, dump, url, date, file_path, language, language_script, language_score, "
        "minhash_cluster_size, top_langs", "language_score", "ODC-By",
        "kor_Hang 106 GB for 229 GB of text; files up to 4.9 GB",
        "the folders *_removed, which its filters rejected, and test"),
    "finemath": Set(
        (".parquet",), "HuggingFaceTB/finemath  finemath-4plus/*.parquet  (or finemath-3plus, infiwebmath-*)",
        "text, url, score, int_score, token_count, char_count, metadata; finemath-* has ten more",
        "int_score", "ODC-By", "finemath-4plus 18 GB, finemath-3plus 65 GB, infiwebmath-3plus 47 GB",
        "4plus beside 3plus, which contains it"),
    "dclm": Set(
        (".jsonl.zstd", ".jsonl.zst", ".parquet"),
        "mlfoundations/dclm-baseline-1.0  global-shard_01_of_10/local-shard_0_of_10/*.jsonl.zstd",
        "text, url, metadata {WARC-*}, language_id_whole_page_fasttext {en}, previous_word_count, ...",
        "fasttext_openhermes_reddit_eli5_vs_rw_v2_bigram_200k_train_prob", "CC-BY-4.0",
        "4T tokens; files of 90 to 340 MB", "the parquet copy beside the .jsonl.zstd"),
    "txt360": Set(
        (".jsonl.gz", ".jsonl"), "LLM360/TxT360  data/common-crawl/CC-MAIN-2024-10/1-1/*.jsonl.gz",
        "text, meta {}; the folder (1-1, 2-5, ..) is the number of duplicates: the field `bucket`",
        "", "ODC-By", "files of 1 to 215 MB",
        "the copies TxT360_BestOfWeb and TxT360_QA beside the original"),
    "fineweb-edu": Set(
        (".parquet",), "HuggingFaceFW/fineweb-edu  sample/10BT/*.parquet  (or data/CC-MAIN-2024-10/*)",
        "text, id, dump, url, file_path, language, language_score, token_count, score, int_score",
        "int_score", "ODC-By", "sample/10BT: files of 2.2 GB",
        "the smaller samples beside the larger; duplicates between dumps stay: clean it"),
}
COPIES = "TxT360_BestOfWeb", "TxT360_QA"


class Row(NamedTuple):
    """A document, and where it lies."""
    text: str
    file: str
    number: int                  # from 1: the line of a .jsonl, the record of a .json, the row of a table


class Source(NamedTuple):
    """The files of a domain, in order, and how they are read. Worker processes get it as JSON."""
    name: str
    root: str
    files: list
    kind: str                    # a name in SETS, or ""
    where: str                   # the conditions of this domain
    column: str
    skip_bad: bool
    large: bool                  # streamed into a shard for each file, not held in memory


def show_sets():
    """Print what is known of the published sets."""
    for name, known in SETS.items():
        print(f"{name}: --data.files=NAME={name}:PATH")
        for what, text in zip(known._fields[1:], known[1:]):
            print(f"  {what.replace('_', ' '):10}{text or '-'}")
    print("download: `hf download --repo-type dataset REPOSITORY --include PATTERN --local-dir PATH`")


# ---- the files of a domain ---------------------------------------------------------------------------------

def find_source(name, path, config):
    """A domain's Source, and {reason: files and folders left out}. `path`: PATH or SET:PATH.

    Raises ValueError if there is nothing to read, or nothing that should be."""
    kind, colon, root = path.partition(":")
    if not colon or kind not in SETS:
        kind, root = "", path
    files, left_out = own_files(name, root, SETS[kind].kinds if kind else KINDS)
    files = choose(name, kind, Path(root), files, left_out)

    # Is the text held in memory, or streamed? Compressed text is taken to be four times as long.
    with reading(name):
        size = sum(os.stat(file).st_size * (4 if str(file).lower().endswith((*PACKED, ".parquet")) else 1)
                   for file in files)
    where = [c.said for c in parse_where(config.where) if c.domain in ("", name)]
    return Source(name, root, [str(file) for file in files], kind, ",".join(where), config.column,
                  config.skip_bad, size > LARGE or bool(config.budget)), left_out


def choose(name, kind, root, files, left_out):
    """The files that are read. Others go to `left_out`, with the reason: the traps of published sets."""
    base = root.absolute() if root.is_dir() else root.absolute().parent
    parts = {file: (base.name, *file.absolute().relative_to(base).parts[:-1]) for file in files}
    folders = set().union(*parts.values())
    endings = {bare(file).rpartition(".")[2] for file in files} & {"csv", "parquet", "jsonl"}
    tables = {"csv", "parquet"} & endings or any(file.name.lower().endswith(PACKED[1:]) for file in files)
    samples = [int(folder[:-2]) for folder in folders if re.fullmatch(r"\d+BT", folder)]
    copies = [copy for copy in COPIES if copy in folders]
    if all(set(copies) & set(here) for here in parts.values()):
        copies = copies[1:]                                      # the original is not here

    def why(file):
        here = parts[file]
        if not kind and tables and file.name.lower().endswith((".txt", ".md", ".json")):
            return "beside the data"
        if kind == "fineweb2" and any(part.endswith("_removed") for part in (base.parent.name, *here)):
            return "rejected by FineWeb2's own filters"
        if kind == "fineweb2" and "test" in here:
            return "of FineWeb2's test split"
        if kind == "finemath" and any("4plus" in part and part.replace("4", "3") in folders for part in here):
            return "contained in 3plus"
        if kind == "dclm" and bare(file).endswith(".parquet") and "jsonl" in endings:
            return "a copy of the .jsonl.zstd"
        if kind == "txt360" and set(copies) & set(here):
            return "a copy of other documents here"
        if kind == "fineweb-edu" and "sample" in here:
            smaller = samples and f"{max(samples)}BT" not in here
            return "a sample of others here" if "data" in folders or smaller else ""

    # A folder of tables often has a README beside them. Different tables in it are a mistake.
    if not kind and len(endings) > 1:
        raise ValueError(f"files: {name}={root} mixes .{' and .'.join(sorted(endings))}: give each a name of "
                         "its own")
    kept = []
    for file in files:
        reason = why(file)
        if reason:
            left_out[reason].append(file)
        else:
            kept.append(file)
    if not kept:
        raise ValueError(f"files: {name}={kind}:{root} has nothing but files {' and '.join(left_out)}; "
                         f"without `{kind}:` they are read")
    return kept


def bare(file):
    """The name of a file in lower case, without .gz or .zst."""
    name = Path(file).name.lower()
    for ending in PACKED:
        name = name.removesuffix(ending)
    return name


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
        raise ValueError(f"files: cannot read {name}={error.filename}: {error.strerror}; give a text "
                         "file, a .jsonl, or a folder of them") from None


# ---- their rows --------------------------------------------------------------------------------------------

def rows(name, path, config):
    """Every Row of a user's domain, file by file, as far as its conditions and its budget let it.

    Prints what was read, and what was left out and why."""
    source, left_out = find_source(name, path, config)
    left, of_bytes = parse_budget(config.budget)
    counts = Counter()
    for file in source.files:
        for row in rows_of_file(source, file, counts):
            left -= len(row.text.encode()) if of_bytes else 1
            yield row
            if left <= 0:
                break
        if left <= 0:
            break
    print(f"{name}={path}: {counts['rows']:,} rows{columns(source)}{reasons(left_out, counts)}")


def columns(source):
    """For a line: the column that is read, and those there are; what set the files look like."""
    line = ""
    there = fields_there(source, source.files[0])
    if there:
        line = f"; text from `{source.column}` (there are: {listed(there)})"
    if source.large and any(kind_of(file) == "text" and os.stat(file).st_size > 16 * PIECE
                            for file in source.files):
        line += f"; text files above {16 * PIECE:,} bytes are cut into documents of {PIECE:,}"
    parts = {part for file in source.files for part in Path(file).parts}
    for kind, mark in (("fineweb2", r"[a-z]{3}_[A-Z][a-z]{3}(_removed)?"), ("txt360", "TxT360.*"),
                       ("finemath", "(finemath|infiwebmath)-[34]plus"), ("dclm", r"global-shard_\d+_.*")):
        if not source.kind and any(re.fullmatch(mark, part) for part in parts):
            line += f"; this looks like {kind}: {kind}:PATH knows what to leave out of it"
    return line


def reasons(left_out, counts):
    """For a line: what is left out, files by reason with the first names, and rows by reason."""
    found = []
    for why, skipped in left_out.items():
        examples = [Path(file).name for file in skipped[:3]] + ["..."] * (len(skipped) > 3)
        if skipped:
            found.append(f"{len(skipped)} {why} ({', '.join(examples)})")
    found += [f"{n:,} {'row' + 's' * (n != 1)} {why}" for why, n in counts.items()
              if n and why not in ("rows", "at", "without a `text`")]
    return f"; left out: {', '.join(found)}" if found else ""


def fields_there(source, file):
    """The columns of a table, or the fields of the first record; [] for plain text."""
    kind = kind_of(file) if packing_of(file) != "parquet" else "parquet"
    if kind == "text":
        return []
    if kind == "parquet":
        return open_parquet(file).schema_arrow.names
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
        where = parse_where(source.where)
        quality = SETS[source.kind].quality if source.kind else ""
        where = [c._replace(field=quality) if quality and c.field == "quality" else c for c in where]
        unit = dict(jsonl="line", json="record", text="piece").get(kind, "row")
        first = True
        for number, record in records(source, file, kind, counts, {c.field for c in where}):
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

            # Blank documents do not count. Each row is counted by the first condition that it fails.
            if not text.strip():
                counts["blank"] += 1
                continue
            if source.kind == "txt360":
                record["bucket"] = Path(file).parent.name
            failed = next((c for c in where if not holds(c, record, file, first)), None)
            first = False
            if failed:
                counts[f"not {failed.said}"] += 1
            else:
                yield Row(text, file, number)


def bad_row(source, file, unit, number, record, error):
    """The ValueError for a row whose text cannot be taken."""
    why = f"no JSON object with a string `{source.column}`"
    if unit == "row":
        why = f"no string in the column `{source.column}`"
    if isinstance(record, dict) and source.column not in record:
        why += f", only {listed(record)}"
    if isinstance(error, UnicodeError):
        why = "no text in UTF-8"
    return ValueError(f"files: {file}, {unit} {number}: {why}; mend it, or --data.skip_bad=true")


def listed(names):
    """The first names, for a message of one line."""
    names = [str(name)[:40].replace("\n", " ") for name in names]
    return ", ".join(names[:24]) + (f", and {len(names) - 24} more" if len(names) > 24 else "")


def first_line(error):
    """What an error of another package says, for a message of one line."""
    return str(error).split("\n")[0][:200]


# ---- formats -----------------------------------------------------------------------------------------------

def kind_of(file):
    """How a file is parsed, judged by its name: "text", "jsonl", "json" or "csv". A parquet file and
    compression are known by their first bytes."""
    suffix = bare(file).rpartition(".")[2]
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
    if kind == "parquet":
        yield from parquet_records(source, file, counts, fields)
        return
    limit = 16 * PIECE if source.large else LARGE
    if kind == "json":
        # An array of records or a single one. If it does not parse as a whole, it is read as .jsonl.
        with unpacked(file) as (stream, _):
            raw = stream.read(max(limit, LONGEST_ROW) + 1)
        long = len(raw) > max(limit, LONGEST_ROW)
        if long and raw.lstrip().startswith(b"["):
            raise ValueError(f"files: {file} is too long for an array in one piece: write it as .jsonl, a "
                             "record on each line")
        with contextlib.suppress(ValueError, RecursionError):
            whole = json.loads(b"" if long else raw)
            yield from enumerate(whole if isinstance(whole, list) else [whole], 1)
            return
    with unpacked(file) as (stream, raw):
        if kind == "text":
            found = pieces(file, stream, limit)
        elif kind == "csv":
            found = csv_records(source, file, stream, fields)
        else:
            found = lines(file, stream)
        for number, record in found:
            if number % 64 == 0 or kind == "text":
                counts["at"] = raw.tell()
            yield number, {source.column: record} if kind == "text" else record


def lines(file, stream):
    """(number, line) of each line that is not blank."""
    for number in itertools.count(1):
        line = stream.readline(LONGEST_ROW + 1)
        if not line:
            return
        if len(line) > LONGEST_ROW:
            raise ValueError(f"files: {file}, line {number} is longer than {LONGEST_ROW // 10 ** 6} MB")
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
            # zstd of Python 3.14, or its backport. Other bindings read a file that is cut short as whole.
            try:
                from compression import zstd
            except ImportError:
                try:
                    from backports import zstd
                except ImportError:
                    raise ValueError(f"files: {file} is compressed by zstd: pip install "
                                     "backports.zstd") from None
            stream = io.BufferedReader(zstd.ZstdFile(raw), 1 << 20)
            damaged += (zstd.ZstdError,)
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
        # Cut after a line; in a line without end, before the first byte of a character.
        cut = rest.rfind(b"\n", 0, PIECE) + 1 or min(PIECE, len(rest))
        while cut < len(rest) and rest[cut] & 0xC0 == 0x80 and cut > 1:
            cut -= 1
        number += 1
        yield number, read_text(file, rest[:cut], start)
        start += cut
        rest = rest[cut:]
        if len(rest) <= PIECE:
            rest += stream.read(PIECE + 1)


def csv_records(source, file, stream, fields):
    """(number, {column: value}) of a .csv file with a header; the header is not counted."""
    csv.field_size_limit(LONGEST_ROW)
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    table = csv.reader(text, strict=True)
    number = 0
    try:
        header = next(table, [])
        has_columns(source, file, header, fields)
        for number, row in enumerate(table, 1):
            if row:
                yield number, dict(zip(header, row)) if len(row) == len(header) else None
    except csv.Error as error:
        raise ValueError(f"files: {file}, row {number + 1}: {error}") from None


def has_columns(source, file, names, fields=()):
    """Raise ValueError unless a table has the column of the text, and those of the conditions."""
    if source.column not in names:
        raise ValueError(f"files: {file} has no column {source.column!r}; it has: {listed(names) or 'none'}; "
                         "name one with --data.column=NAME")
    for field in fields:
        if field not in names and field.partition(".")[0] not in names and field != "bucket":
            raise ValueError(f"where: {file} has no field {field!r}; it has: {listed(names)}")


def open_parquet(file):
    """A pyarrow ParquetFile, which reads a column in blocks instead of whole."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError(f"files: {file} is a parquet file: pip install pyarrow") from None
    try:
        return parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
    except (OSError, ValueError) as error:
        raise ValueError(f"files: {file} is a damaged parquet file: {first_line(error)}") from None


def parquet_records(source, file, counts, fields):
    """(number, {column: value}) of a parquet file, from the columns that are needed."""
    table = open_parquet(file)
    has_columns(source, file, table.schema_arrow.names, fields)
    kind = str(table.schema_arrow.field(source.column).type)
    if not any(name in kind for name in ("string", "binary", "null")) or "<" in kind.replace(
            "dictionary<", "", 1):
        raise ValueError(f"files: {file}: the column {source.column!r} is {kind}, not a string; name another "
                         "with --data.column=NAME")

    # A batch of rows has about 4 MB by the file's own account, at most 1,000 rows.
    about, size = table.metadata, os.stat(file).st_size
    whole = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
    count = max(1, min(1000, 4_000_000 * about.num_rows // max(1, whole)))
    names = [source.column, *sorted(fields - {source.column, "bucket"})] if fields else [source.column]
    number = 0
    try:
        for batch in table.iter_batches(count, columns=names, use_threads=False):
            for record in batch_records(batch):
                number += 1
                yield number, record
            counts["at"] = size * number // about.num_rows
    except (OSError, ValueError) as error:
        raise ValueError(f"files: {file}, after row {number}: damaged: {first_line(error)}") from None
    if number != about.num_rows:
        raise ValueError(f"files: {file}: damaged: {number} of {about.num_rows} rows")


def batch_records(batch):
    """The rows of a pyarrow RecordBatch as dicts. One that is not UTF-8 is None: nothing else is lost."""
    try:
        return [text_in_bytes(record) for record in batch.to_pylist()]
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [None]
        return [record for i in range(batch.num_rows) for record in batch_records(batch.slice(i, 1))]


def text_in_bytes(record):
    """Decode the binary fields of a record: some writers do not mark their strings as such."""
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in record.items()}


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


# ---- conditions and budgets --------------------------------------------------------------------------------

class Condition(NamedTuple):
    domain: str                  # "": every domain of files
    field: str                   # "a.b" is the field b within a
    sign: str
    value: str
    said: str                    # without the domain


SIGNS = {">=": operator.ge, "<=": operator.le, "!=": operator.ne, "==": operator.eq, "=": operator.eq,
         ">": operator.gt, "<": operator.lt}


def parse_where(text):
    """[NAME:]FIELD>=VALUE,... → [Condition]. Raises ValueError, naming the faulty item."""
    found = []
    for item in filter(None, text.split(",")):
        match = re.fullmatch(r"\s*(?:([\w.-]+):)?([\w.-]+?)\s*(>=|<=|!=|==|=|>|<)\s*([^<>=!].*?)\s*", item)
        if not match:
            raise ValueError(f"where: {item!r} is not FIELD>=VALUE, with one of {' '.join(SIGNS)}")
        domain, *parts = match.groups()
        found.append(Condition(domain or "", *parts, "".join(parts)))
    return found


def holds(condition, record, file, first):
    """Whether a record meets a condition. A field that is missing or null meets none.

    Raises ValueError if the first record of the file lacks the field, or the types differ."""
    value = record
    for part in condition.field.split(".") if condition.field not in record else [condition.field]:
        if not isinstance(value, dict) or part not in value:
            if first:
                raise ValueError(f"where: {file} has no field {condition.field!r}; it has: "
                                 f"{listed(value if isinstance(value, dict) else record)}")
            return False
        value = value[part]
    if value is None:
        return False
    wanted = condition.value
    if isinstance(value, bool):
        value, wanted = str(value).lower(), wanted.lower()
    elif isinstance(value, (dict, list)):
        raise ValueError(f"where: {condition.field!r} is not a number or a string in {file}")

    # In a .csv every value is a string: it counts as a number where both are.
    try:
        value, wanted = float(value), float(wanted)
    except (TypeError, ValueError):
        if isinstance(value, (int, float)):
            raise ValueError(f"where: {condition.said}: {condition.field!r} is a number in {file}") from None
        value = str(value)
    return SIGNS[condition.sign](value, wanted)


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
