"""Published sets that `data.py` reads by name, conditions, and formats that need a package of their own.

  by name      NAME=SET:PATH, for the sets in SETS, whose folders hold things not to be read: rejects, test
               splits, second copies
  conditions   on the fields of a row, parsed and never evaluated
  formats      .parquet by pyarrow; zstd by Python 3.14 or backports.zstd, which notice a file cut short

Run:  python data.py sources        what is known of each set, and what to download
"""
import csv
import io
import itertools
import operator
import os
import re
from pathlib import Path
from typing import NamedTuple


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

CLUSTER = "minhash_cluster_size"
OFTEN = (1, 1), (2, 2), (4, 3), (99, 5), (999, 8)                # (size of the cluster at most, repetitions)
MOST_OFTEN = 8

LOOKS = {"fineweb2": r"[a-z]{3}_[A-Z][a-z]{3}(_removed)?", "txt360": "TxT360.*",
         "finemath": "(finemath|infiwebmath)-[34]plus", "dclm": r"global-shard_\d+_.*"}


def show():
    """Print what is known of the published sets."""
    for name, known in SETS.items():
        print(f"{name}: --data.files=NAME={name}:PATH")
        for what, text in zip(known._fields[1:], known[1:]):
            print(f"  {what.replace('_', ' '):10}{text or '-'}")
    print("download: `hf download --repo-type dataset REPOSITORY --include PATTERN --local-dir PATH`")


def looks_like(files):
    """The sets that the names of folders remind of."""
    parts = {part for file in files for part in Path(file).parts}
    return [kind for kind, mark in LOOKS.items() if any(re.fullmatch(mark, part) for part in parts)]


def traps(kind, root, files):
    """{file: why it is left out} of a set."""
    base = root.absolute() if root.is_dir() else root.absolute().parent
    below = {file: file.absolute().relative_to(base).parts[:-1] for file in files}
    parts = {file: (base.name, *inner) for file, inner in below.items()}
    folders = set().union(*parts.values())
    language_of_base = re.fullmatch(LOOKS["fineweb2"], base.parent.name)
    samples = [int(folder[:-2]) for folder in folders if re.fullmatch(r"\d+BT", folder)]
    packed_lines = any(".jsonl.z" in file.name.lower() for file in files)
    copies = [copy for copy in COPIES if copy in folders]
    if all(set(copies) & set(here) for here in parts.values()):
        copies = copies[1:]                                      # the original is not here

    # The name of the folder itself counts if it is part of the set for sure: "test" may be anybody's.
    def why(file, here):
        if kind == "fineweb2" and any(part.endswith("_removed") for part in (base.parent.name, *here)):
            return "rejected by FineWeb2's own filters"
        if kind == "fineweb2" and ("test" in below[file] or language_of_base and base.name == "test"):
            return "of FineWeb2's test split"
        if kind == "finemath" and any("4plus" in part and part.replace("4", "3") in folders for part in here):
            return "contained in 3plus"
        if kind == "dclm" and file.name.lower().endswith(".parquet") and packed_lines:
            return "a copy of the .jsonl.zstd"
        if kind == "txt360" and set(copies) & set(here):
            return "a copy of other documents here"
        if kind == "fineweb-edu" and any(re.fullmatch(r"\d+BT", part) for part in below[file]):
            smaller = f"{max(samples)}BT" not in here
            return "a sample of others here" if smaller or any("data" in p for p in below.values()) else ""
    return {file: reason for file, here in parts.items() if (reason := why(file, here))}


def repetitions(cluster):
    """How often a document counts that stands for a cluster of duplicates                 [FineWeb2's README]

    Of the largest clusters it is thought to be junk: once."""
    return next((times for most, times in OFTEN if cluster <= most), 1)


def twice(sources):
    """A line for each two sources of the same set of which one contains text of the other."""
    for one, other in itertools.combinations(sources, 2):
        if one.kind != other.kind:
            continue
        files = [Path(file).absolute() for file in one.files + other.files]
        base = Path(os.path.commonpath([file.parent for file in files]))
        why = set(traps(one.kind, base, files).values())
        if len(set(files)) < len(files):
            why.add("the same files")
        if why:
            yield f"warning: {one.name} and {other.name} share text: {', '.join(sorted(why))}"


# ---- tables beside text, and conditions --------------------------------------------------------------------

def beside_tables(name, root, files, holds_text):
    """{file: why it is left out}: a folder of tables often has a README, or JSON about them, beside them. A
    folder of text is read without the tables in it. Raises ValueError if there are different tables."""
    tables = [file for file in files
              if re.search(r"\.((csv|parquet)(\.gz)?|zstd?)$", file.name.lower())]
    others = [file for file in files if file not in set(tables)]
    about = [file for file in others if re.match("readme|licen[cs]e", file.name.lower())
             or re.search(r"\.json(\.gz)?$", file.name.lower()) and not holds_text(file)]
    if tables and len(about) < len(others):
        return dict.fromkeys(tables, "a table beside text: name it on its own")
    endings = {ending for file in tables
               for ending in re.findall(r"\.(?:csv|parquet|jsonl)(?=$|\.gz$|\.zstd?$)", file.name.lower())}
    if len(endings) > 1:
        raise ValueError(f"files: {name}={root} mixes {' and '.join(sorted(endings))}: give each a name of "
                         "its own")
    return dict.fromkeys(about, "beside the data") if tables else {}


class Condition(NamedTuple):
    domain: str                  # "": every domain of files
    field: str                   # "a.b" is the field b within a
    sign: str
    value: str
    said: str                    # without the domain


DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.I)
SIGNS = {">=": operator.ge, "<=": operator.le, "!=": operator.ne, "==": operator.eq, "=": operator.eq,
         ">": operator.gt, "<": operator.lt}


def parse_where(text, domains=None):
    """[NAME:]FIELD>=VALUE,... → [Condition]. Raises ValueError, naming a faulty item or an unknown domain."""
    found = []
    for item in filter(None, text.split(",")):
        match = re.fullmatch(r"\s*(?:([\w.-]+):)?([\w.-]+?)\s*(>=|<=|!=|==|=|>|<)\s*([^<>=!].*?)\s*", item)
        if not match:
            raise ValueError(f"where: {item!r} is not FIELD>=VALUE, with one of {' '.join(SIGNS)}")
        domain, *parts = match.groups()
        if domain and domains is not None and domain not in domains:
            raise ValueError(f"where: {domain!r} is not in files ({', '.join(domains)})")
        found.append(Condition(domain or "", *parts, "".join(parts)))
    return found


def look_up(record, field):
    """(True, the value of a field), or (False, the names that stand in its place)."""
    value = record
    for part in field.split(".") if field not in record else [field]:
        if not isinstance(value, dict) or part not in value:
            return False, list(value if value and isinstance(value, dict) else record)
        value = value[part]
    return True, value


def holds(condition, value, file, kind):
    """Whether a value meets a condition; null meets none. Numbers are compared as numbers; a table of .csv
    has only strings, which count as numbers if both are. Raises ValueError if the types differ."""
    if value is None:
        return False
    wanted = condition.value
    what = f"where: {condition.said}: {condition.field!r} is"
    if isinstance(value, bool):
        if wanted.lower() not in ("true", "false", "1", "0"):
            raise ValueError(f"{what} true or false in {file}")
        wanted = wanted.lower() in ("true", "1")
    elif isinstance(value, (dict, list)):
        raise ValueError(f"{what} not a number or a string in {file}")
    elif hasattr(value, "__float__") or kind == "csv" and DECIMAL.fullmatch(value):
        if DECIMAL.fullmatch(wanted):
            value, wanted = float(value), float(wanted)
        elif kind != "csv":
            raise ValueError(f"{what} a number in {file}")
    else:
        value = str(value)
    return SIGNS[condition.sign](value, wanted)


class Check:
    """The conditions on the rows of a file."""

    def __init__(self, source, file, kind):
        quality = SETS[source.kind].quality if source.kind else ""
        self.conditions = [c._replace(field=quality) if quality and c.field == "quality" else c
                           for c in parse_where(source.where)]
        self.fields = {c.field for c in self.conditions}
        self.file = file
        self.kind = kind
        self.missing = {c.field: {} for c in self.conditions}    # fields not seen yet: what is there instead

    def failed(self, record):
        """The first condition that a record does not meet, or "". All are looked at, for unknown fields."""
        failed = []
        for c in self.conditions:
            there, value = look_up(record, c.field)
            if there:
                self.missing.pop(c.field, None)
            elif c.field in self.missing and len(self.missing[c.field]) < 100:
                self.missing[c.field].update(dict.fromkeys(value))
            if not (there and holds(c, value, self.file, self.kind)):
                failed.append(c.said)
        return failed[0] if failed else ""


# ---- formats -----------------------------------------------------------------------------------------------

def open_zstd(file, raw):
    """(stream of the unpacked bytes of a zstd file; what it raises if they are damaged)"""
    try:
        from compression import zstd
    except ImportError:
        try:
            from backports import zstd
        except ImportError:
            raise ValueError(f"files: {file} is compressed by zstd: pip install backports.zstd") from None
    return zstd.ZstdFile(raw), zstd.ZstdError


def first_line(error):
    """What an error of another package says, for a message of one line."""
    return str(error).split("\n")[0][:200]


def csv_records(file, stream, limit, columns):
    """(number, {column: value}) of a .csv file with a header, which is not counted. columns(names)
    raises ValueError unless those that are needed are there."""
    csv.field_size_limit(limit)
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    table = csv.reader(text, strict=True)
    number = 0
    try:
        header = next(table, [])
        columns(header)
        for number, row in enumerate(table, 1):
            if row:
                yield number, dict(zip(header, row)) if len(row) == len(header) else None
    except csv.Error as error:
        raise ValueError(f"files: {file}, row {number + 1}: {error}") from None


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


def parquet_records(file, column, fields, columns, counts):
    """(number, {column: value}) of a parquet file: the column of the text, and those of `fields`. columns:
    see csv_records. pyarrow unpacks a page of a column as a whole: usually 1 MB, but as much as they are
    long for 1,024 long rows in one. Raises ValueError if a worker has no room for that."""
    table = open_parquet(file)
    columns(table.schema_arrow.names)
    kind = str(table.schema_arrow.field(column).type)
    if not any(name in kind for name in ("string", "binary", "null")) or "<" in kind.replace(
            "dictionary<", "", 1):
        raise ValueError(f"files: {file}: the column {column!r} is {kind}, not a string; name another "
                         "with --data.column=NAME")

    # A batch of rows has about 4 MB by the file's own account, at most 1,000 rows.
    about, size = table.metadata, os.stat(file).st_size
    whole = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
    count = max(1, min(1000, 4_000_000 * about.num_rows // max(1, whole)))
    there = table.schema_arrow.names
    names = {column, *(field if field in there else field.partition(".")[0] for field in fields)} & {*there}
    number = 0
    try:
        for batch in table.iter_batches(count, columns=sorted(names), use_threads=False):
            for record in batch_records(batch):
                number += 1
                yield number, record
            counts["at"] = size * number // about.num_rows
    except (OSError, ValueError) as error:
        raise ValueError(f"files: {file}, after row {number}: damaged: {first_line(error)}") from None
    except MemoryError:
        raise ValueError(f"files: {file}, after row {number}: a page of the column is too large for the "
                         "memory of a worker: write the file with smaller pages") from None
    if number != about.num_rows:
        raise ValueError(f"files: {file}: damaged: {number} of {about.num_rows} rows")


def parquet_rows(file):
    """(number, {column: value}) of a parquet file, every column: conversations lie in lists of structs."""
    table = open_parquet(file)
    number = 0
    try:
        for batch in table.iter_batches(100, use_threads=False):
            for record in batch_records(batch):
                number += 1
                yield number, record
    except (OSError, ValueError) as error:
        raise ValueError(f"files: {file}, after row {number}: damaged: {first_line(error)}") from None


def batch_records(batch):
    """The rows of a pyarrow RecordBatch as dicts, one at a time if they are long, or may be: the size of a
    dictionary says nothing about it. One that is not UTF-8 is None: nothing else is lost."""
    long = batch.nbytes > 32_000_000 or any("dictionary" in str(kind) for kind in batch.schema.types)
    if not long or batch.num_rows == 1:
        try:
            yield from [text_in_bytes(record) for record in batch.to_pylist()]
            return
        except UnicodeDecodeError:
            if batch.num_rows == 1:
                yield None
                return
    for i in range(batch.num_rows):
        yield from batch_records(batch.slice(i, 1))


def text_in_bytes(record):
    """Decode the binary fields of a record: some writers do not mark their strings as such."""
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in record.items()}
