"""The default text, which a run without --data.files trains on, and a checker of its arithmetic.

  prose   docstrings of Python's standard library         found as files on this machine; differs slightly
  code    its source without the docstrings               between Python versions
  math    worked problems with every step, generated      the same on every machine

`check` reads a worked problem like a pupil's answer: it computes every statement exactly, and the last line
must solve what the first one asks. It does not know how the problems are generated.
"""
import ast
import functools
import math
import random
import re
import sysconfig
import warnings
from fractions import Fraction
from pathlib import Path


def documents(name):
    """The documents of the domain "prose", "code" or "math"."""
    return worked_math() if name == "math" else library()[name == "code"]


# ---- prose and code: the standard library ------------------------------------------------------------------

def library_files():
    """[(module name, path)] of the standard library, sorted; found as files, never imported. Left out: tests;
    installed packages; the generated tables `encodings` and html.entities; files generated when this Python
    was built (_sysconfigdata, config-*), which name paths and differ between machines."""
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "entities"}
    root, found = Path(sysconfig.get_paths()["stdlib"]), []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not any(p in skip or p.startswith(("_sysconfigdata", "config-")) for p in parts):
            found.append((".".join(p for p in parts if p != "__init__"), path))
    if not found: raise ValueError(f"no library sources in {root}: give your text, --data.files=NAME=PATH")
    return found


def split_docstrings(source, module):
    """source text → ([(qualified name, docstring)], the source without docstrings).  An empty body gets
    `pass`. SyntaxError if the source does not parse before or after."""
    docs, cuts = [], []

    def visit(node, name):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr): continue             # most of the tree, and without docstrings
            named = isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            visit(child, f"{name}.{child.name}" if named else name)
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)): return
        if ast.get_docstring(node) is not None:
            docs.append((node.body[0].lineno, name, ast.get_docstring(node)))
            cuts.append((node.body[0], len(node.body) == 1))

    visit(ast.parse(source), module)
    lines = source.encode().split(b"\n")         # ast counts columns in UTF-8 bytes; a form feed ends no line
    for node, empty in sorted(cuts, key=lambda c: -c[0].lineno):                     # from the bottom up
        first, last = node.lineno - 1, node.end_lineno
        before, after = lines[first][:node.col_offset], lines[last - 1][node.end_col_offset:]
        if empty or before.strip() or after.strip():
            lines[first:last] = [before + b"pass" + after]
        else:
            while last < len(lines) and not lines[last].strip(): last += 1            # blank lines below
            lines[first:last] = []
    code = b"\n".join(lines).decode()
    ast.parse(code)
    return [(name, doc) for _, name, doc in sorted(docs)], code


@functools.cache                                                 # both domains come from one pass
def library(every=1):
    """(prose documents, code documents). No docstring is in both, and none is in the prose twice.

    every: of so many files, one is read."""
    prose, code, seen = [], [], set()
    for module, path in library_files()[::every]:
        try:
            source = path.read_bytes().decode().replace("\r\n", "\n")
            if module == "pydoc_data.topics":                   # topics = {title: text}: language reference
                table = ast.parse(source).body[-1].value
                prose += [f"{title}\n\n{text.strip()}\n" for title, text in ast.literal_eval(table).items()]
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")                  # old escapes in old modules
                docs, body = split_docstrings(source, module)
        except (UnicodeDecodeError, SyntaxError):                # a few old files are Latin-1; dropped
            continue
        new = [(name, doc) for name, doc in docs if doc.strip() and not (doc in seen or seen.add(doc))]
        if new: prose.append("\n\n".join(f"{name}\n\n{doc.strip()}" for name, doc in new) + "\n")
        if body.strip(): code.append(body.strip() + "\n")
    return prose, code


# ---- math: worked problems, generated ----------------------------------------------------------------------
# A problem is a function random.Random → lines.  Every `=` between numbers is a true statement: see `check`.

def between(rng, low, high):                                    # only random() is guaranteed to give the same
    return low + int(rng.random() * (high - low + 1))           # numbers in every Python version

def one_of(rng, *options): return options[between(rng, 0, len(options) - 1)]
def natural(rng, digits):  return between(rng, 10 ** (k := between(rng, 0, digits - 1)), 10 ** (k + 1) - 1)
def nonzero(rng, size):    return between(rng, 1, size) * one_of(rng, -1, 1)
def paren(n):              return f"({n})" if n < 0 else f"{n}"

def polynomial(*terms):
    """(2, "x"), (-3, "") → 2x - 3;  terms with a zero coefficient are omitted."""
    text = ""
    for a, x in terms:
        size = x if abs(a) == 1 and x else f"{abs(a)}{x}"
        if a: text += (" - " if a < 0 else " + ") * bool(text) + "-" * (a < 0 and not text) + size
    return text or "0"

PLACES = "ones", "tens", "hundreds", "thousands", "ten thousands", "hundred thousands"

def addition(rng):
    a, b, carry = natural(rng, 6), natural(rng, 6), 0
    lines = [one_of(rng, f"Add {a} and {b}.", f"What is {a} + {b}?", f"Find the sum: {a} and {b}.")]
    for k in range(len(str(max(a, b)))):
        p, q = a // 10 ** k % 10, b // 10 ** k % 10
        total = p + q + carry
        lines.append(f"{PLACES[k]}: {p} + {q}{f' + {carry}' if carry else ''} = {total}, write {total % 10}"
                     + (f", carry {total // 10}" if total > 9 else ""))
        carry = total // 10
    return lines + [f"The last carry, {carry}, leads."] * carry + [f"{a} + {b} = {a + b}"]

def subtraction(rng):
    (b, a), borrow = sorted((natural(rng, 6), natural(rng, 6))), 0
    lines = [one_of(rng, f"Subtract {b} from {a}.", f"What is {a} - {b}?", f"How much more is {a} than {b}?")]
    for k in range(len(str(a))):
        p, q = a // 10 ** k % 10 - borrow, b // 10 ** k % 10
        lent, borrow = f" after lending 1, {p + 1} - 1 = {p};" if borrow else "", int(p < q)
        more = f"{paren(p)} < {q}, borrow 10: {paren(p)} + 10 = {p + 10}; " if borrow else ""
        lines.append(f"{PLACES[k]}:{lent} {more}{p + 10 * borrow} - {q} = {p + 10 * borrow - q}")
    return lines + [f"{a} - {b} = {a - b}", f"Check: {a - b} + {b} = {a}"]

def multiplication(rng):
    a, b, total = natural(rng, 5), natural(rng, 4), 0
    lines = [one_of(rng, f"Multiply {a} by {b}.", f"What is {a} * {b}?", f"Multiply by parts: {a} * {b}.")]
    for k, digit in enumerate(reversed(str(b))):
        if digit == "0": continue
        part = a * int(digit) * 10 ** k
        lines.append(f"{a} * {int(digit) * 10 ** k} = {part}")
        if total: lines.append(f"{total} + {part} = {total + part}")
        total += part
    return lines + [f"So {a} * {b} = {total}"]

def division(rng):
    a, b, rest = natural(rng, 6), between(rng, 2, one_of(rng, 9, 99)), 0
    lines = [one_of(rng, f"Divide {a} by {b}.", f"What is {a} divided by {b}?", f"Long division: {a} by {b}")]
    for digit in str(a):
        now, rest = rest * 10 + int(digit), (rest * 10 + int(digit)) % b
        goes = f"{b} goes {now // b} times: {now // b} * {b} = {now - rest}, {now} - {now - rest} = {rest}"
        lines.append(f"Bring down {digit}: {now}. " + (goes if now >= b else f"{now} < {b}, write 0"))
    return lines + [f"Quotient {a // b}, remainder {rest}.", f"Check: {a // b} * {b} + {rest} = {a}"]

def fractions(rng):
    b, d = between(rng, 2, 24), between(rng, 2, 24)
    a, c, sign = between(rng, 1, 2 * b), between(rng, 1, 2 * d), one_of(rng, "+", "-")
    m = math.lcm(b, d)
    p, q = a * m // b, c * m // d
    n = p + q if sign == "+" else p - q
    g = math.gcd(n, m)
    lines = [f"{one_of(rng, 'Compute', 'Find, in lowest terms,')} {a}/{b} {sign} {c}/{d}.",
             f"The least common multiple of {b} and {d} is {m}.", f"{a}/{b} = {p}/{m} and {c}/{d} = {q}/{m}",
             f"{p}/{m} {sign} {q}/{m} = {n}/{m}"]
    return lines + [f"Divide by {g}: {n}/{m} = {n // g}/{m // g}" if g > 1 else "That is in lowest terms."]

def linear(rng):
    x, a, b, c = between(rng, -15, 15), nonzero(rng, 12), nonzero(rng, 40), between(rng, -9, 9)
    if a == c: a = 13                                            # otherwise every x or none is a solution
    d = (a - c) * x + b
    lines = [f"{one_of(rng, 'Solve', 'Find x:', 'Solve for x:')} {polynomial((a, 'x'), (b, ''))} = "
             f"{polynomial((c, 'x'), (d, ''))}"]
    if c: lines.append(f"{'Subtract' if c > 0 else 'Add'} {polynomial((abs(c), 'x'))} on both sides: "
                       f"{polynomial((a - c, 'x'), (b, ''))} = {d}")
    verb = "Subtract" if b > 0 else "Add"
    return lines + [f"{verb} {abs(b)} on both sides: {polynomial((a - c, 'x'))} = {d - b}",
                    f"Divide by {a - c}: x = {d - b} / {paren(a - c)} = {x}",
                    f"Check on the left: {a} * {paren(x)} + {paren(b)} = {a * x + b}",
                    f"Check on the right: {c} * {paren(x)} + {paren(d)} = {c * x + d}"]

def quadratic(rng):
    k, m, n = between(rng, 1, 4), nonzero(rng, 12), nonzero(rng, 12)    # k (x + m)(x + n) = 0
    b, c = m + n, m * n
    lines = [f"{one_of(rng, 'Solve by factoring:', 'Find every solution of')} "
             f"{polynomial((k, 'x^2'), (k * b, 'x'), (k * c, ''))} = 0"]
    if k > 1: lines.append(f"Divide by {k}: {polynomial((1, 'x^2'), (b, 'x'), (c, ''))} = 0")
    lines.append(f"Find two numbers with product {c} and sum {b}.")
    for p in (s * p for p in range(1, abs(c) + 1) if c % p == 0 for s in (1, -1)):
        q = c // p
        lines.append(f"{p} * {paren(q)} = {c}, {p} + {paren(q)} = {p + q}" + ", yes" * (p + q == b))
        if p + q == b: break
    f, g = polynomial((1, "x"), (p, "")), polynomial((1, "x"), (q, ""))
    return lines + [f"({f})({g}) = 0", f"x = {-p}" + (f" or x = {-q}" if p != q else ", twice")]

def system(rng):
    x, y = between(rng, -9, 9), between(rng, -9, 9)
    a, b, c, d = (nonzero(rng, 9) for _ in range(4))
    if a * d == b * c: d += 1 if d != -1 else 2                  # parallel; a is not 0, so now they cross
    e, f = a * x + b * y, c * x + d * y
    left, right = (polynomial((p, "x"), (q, "y")) for p, q in ((a, b), (c, d)))
    minor = a * d - b * c
    u, v = c * e, a * f
    return [f"{one_of(rng, 'Solve the system', 'Find x and y:')} {left} = {e}, {right} = {f}",
            f"Multiply the first by {c}: {polynomial((a * c, 'x'), (b * c, 'y'))} = {u}",
            f"Multiply the second by {a}: {polynomial((a * c, 'x'), (a * d, 'y'))} = {v}",
            f"Subtract the first from the second: {polynomial((minor, 'y'))} = {v} - {paren(u)} = {v - u}",
            f"y = {v - u} / {paren(minor)} = {y}",
            f"Put y into the first: {polynomial((a, 'x'))} = {e} - {paren(b)} * {paren(y)} = {a * x}",
            f"x = {a * x} / {paren(a)} = {x}",
            f"Check in the second: {c} * {paren(x)} + {paren(d)} * {paren(y)} = {f}"]

def percentage(rng):
    p, n = 5 * between(rng, 1, 19), 20 * between(rng, 1, 400)    # multiples of 5% and 20: p% of n is whole
    g, part, up = math.gcd(p, 100), n * p // 100, one_of(rng, True, False)
    thing = one_of(rng, "price", "rent", "fee", "wage", "stock of paper", "crowd", "harvest", "bill")
    moves = one_of(rng, "rises", "goes up") if up else one_of(rng, "falls", "goes down")
    return [f"A {thing} of {n} {moves} by {p}%. {one_of(rng, 'What is it then?', 'Find the new value.')}",
            f"{p}% is {p}/100 = {p // g}/{100 // g}", f"{n} * {p // g} = {n * p // g}",
            f"{n * p // g} / {100 // g} = {part}",
            f"{n} + {part} = {n + part}" if up else f"{n} - {part} = {n - part}"]

def euclid(rng):
    g = between(rng, 1, 30)
    a, b = g * between(rng, 20, 300), g * between(rng, 5, 200)
    lines, p, q = [f"{one_of(rng, 'Find', 'Compute')} the greatest common divisor of {a} and {b}."], a, b
    while q:
        lines.append(f"{p} = {p // q} * {q} + {p % q}")
        p, q = q, p % q
    return lines + [f"The last divisor is {p}.", f"Least common multiple: {a} / {p} * {b} = {a * b // p}"]

def expression(rng):
    """An expression, evaluated one operation at a time, always the leftmost possible one."""
    def grow(depth):
        if depth == 0 or rng.random() < 0.15: return between(rng, 1, 12)
        return [grow(depth - 1), one_of(rng, "+", "-", "*"), grow(depth - 1)]

    def show(t): return paren(t) if isinstance(t, int) else f"({show(t[0])} {t[1]} {show(t[2])})"

    def step(t):
        a, op, b = t
        if isinstance(a, int) and isinstance(b, int):
            return {"+": a + b, "-": a - b, "*": a * b}[op]
        return [a, op, step(b)] if isinstance(a, int) else [step(a), op, b]

    tree = [grow(2), one_of(rng, "+", "-", "*"), grow(2)]
    lines = [f"{one_of(rng, 'Evaluate', 'Work out', 'Simplify')} step by step:", show(tree)[1:-1]]
    while isinstance(tree, list):
        tree = step(tree)
        lines.append(f"= {tree if isinstance(tree, int) else show(tree)[1:-1]}")
    return lines

PROBLEMS = (addition, subtraction, multiplication, division, fractions, linear, quadratic, system, percentage,
            euclid, expression)

def worked_math(size=2_000_000):
    """Distinct worked problems, one document each, about `size` bytes in all; the same on every machine."""
    rng, found = random.Random(2026), {}                         # a dict keeps the order and drops duplicates
    while size > 0:
        text = "\n".join(one_of(rng, *PROBLEMS)(rng)) + "\n"
        if text not in found: size -= len(text)
        found[text] = None
    return list(found)


# ---- the checker of arithmetic -----------------------------------------------------------------------------

STATEMENT = re.compile(r"(?<![\w^])[-(\d][-\d+*/() ]*(?:= [-(\d][-\d+*/() ]*)+")
MAY_STATE = re.compile(r"(?:[-\d+*/() ]+|= (?=[-(\d]))+")        # it holds one statement at most
APPLY = {ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b, ast.Mult: lambda a, b: a * b,
         ast.Div: lambda a, b: a / b}


def number(node):
    """A parsed expression of + - * / → an exact Fraction.  KeyError, ZeroDivisionError: it is none"""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp):
        return -number(node.operand)
    return APPLY[type(node.op)](number(node.left), number(node.right))


def value(text, **known):
    """The exact value of a text such as "3x^2 - (4 + x)", with the variables' values in `known`."""
    text = re.sub(r"(\d)([xy])", r"\1*\2", text).replace("^2", "**2").replace(")(", ")*(")
    for name, v in known.items():
        text = re.sub(rf"\b{name}\b|(?<=\*){name}", f"({v})", text)
    text = re.sub(r"\(([^()]*)\)\*\*2", r"(\1)*(\1)", text)
    return number(ast.parse(text.strip(), mode="eval").body)


def check(problem):
    """A worked problem → (number of statements checked, kind or None).  ValueError: a statement that is
    false, or an answer that does not fit the question."""
    try:
        return statements(problem), answer(problem)
    except (AttributeError, IndexError, KeyError, TypeError, SyntaxError, ZeroDivisionError) as error:
        raise ValueError(f"cannot be read: {type(error).__name__}: {error}") from None


def false(text):
    """Whether any text states something false about whole numbers and their fractions, such as 3 + 4 = 8.
    What is part of something longer is passed over: a statement with a decimal, a percentage, a letter or a
    remainder right beside it, or the end of one with letters."""
    for part in MAY_STATE.finditer(text):
        # Each "=" in it has something on its right: wherever a statement may begin, there is one to the end.
        # So the search is short, as it would not be in a long line of numbers without any.
        found = STATEMENT.search(text, *part.span()) if "=" in part[0] else None
        if not found:
            continue
        said = found[0].rstrip(" (-")
        begin, end = found.start(), found.start() + len(said)
        before, after = text[max(0, begin - 9):begin], text[end:end + 9]
        longer = r"[\w)] *$" if said[0] == "-" else r"[.,$]$|[-+*/^=] *$"
        if re.search(longer, before) or re.match(r"[.,]\d|[%^a-zA-Z]| ?(/|rem|r\b)", after):
            continue
        try:
            if len({value(side) for side in said.split("=")}) > 1:
                return True
        except (AttributeError, KeyError, SyntaxError, TypeError, ValueError, ZeroDivisionError,
                RecursionError, MemoryError):
            pass                                                 # it is none, or too long to be read
    return False


def claim(true, what):
    if not true:
        raise ValueError(f"not true: {what}")


def statements(problem):
    """Check every `=` between numbers. → how many there are"""
    checked, (_, *lines) = 0, problem.strip().split("\n")
    for line in lines:
        if "x" in line or "y" in line.replace("by", ""):
            line = re.sub(r"^.*[xy][^=]*= ", "", line)
        if line.startswith("="):
            claim(value(line[1:]) == value(lines[0]), line)
        for found in STATEMENT.findall(line):
            sides = found.rstrip(" (-").split("=")
            claim(len({value(side) for side in sides}) == 1, found)
            checked += 1
    return checked


def answer(problem):
    """Check the answer by substituting it into the question. → the kind of problem, None if not checked"""
    kind, (first, *lines) = None, problem.strip().split("\n")
    if m := re.match(r"(?:Solve for x:|Find x:|Solve) ([^,:]*) = ([^,:]*)$", first):
        kind, x = "linear", re.search(r"x = .* = (-?\d+)$", problem, re.M).group(1)
        claim(value(m[1], x=x) == value(m[2], x=x), f"x = {x}")
    if m := re.match(r"(?:Solve by factoring:|Find every solution of) (.*) = 0", first):
        kind, roots = "quadratic", re.findall(r"-?\d+", lines[-1])
        claim(roots and all(value(m[1], x=root) == 0 for root in roots), lines[-1])
        claim(len(set(roots)) == 2 or "twice" in lines[-1], lines[-1])
        factors = lines[-2].split(" = 0")[0]
        k = value(m[1], x=100) / value(factors, x=100)
        claim(all(value(m[1], x=x) == k * value(factors, x=x) for x in range(5)), lines[-2])
    if m := re.match(r"(?:Solve the system|Find x and y:) (.*) = (.*), (.*) = (.*)", first):
        kind = "system"
        y, x = (re.search(rf"^{v} = .* = (-?\d+)$", problem, re.M).group(1) for v in "yx")
        fits = value(m[1], x=x, y=y) == int(m[2]) and value(m[3], x=x, y=y) == int(m[4])
        claim(fits, f"x = {x}, y = {y}")
    if re.match(r"^ones: ", lines[0]):                             # the digits written down form the answer
        kind = "columns"
        sign = "-" if re.match(r".* - .* = ", [line for line in lines if "Check" not in line][-1]) else "+"
        rows = [line for line in lines if re.match(r"(ones|tens|.*hundreds|.*thousands): ", line)]
        digits = [re.search(r"write (\d)" if sign == "+" else r"= (\d)$", row)[1] for row in rows]
        written = int("1" * ("leads" in problem) + "".join(reversed(digits)))
        result = int(re.search(rf"^\d+ \{sign} \d+ = (\d+)$", problem, re.M)[1])
        claim(written == result, f"digits of {written}")
    if m := re.search(r"divisor of (\d+) and (\d+)", first):
        a, b = int(m[1]), int(m[2])
        claim(lines[-2] == f"The last divisor is {math.gcd(a, b)}.", lines[-2])
        claim(lines[-1].endswith(f"= {math.lcm(a, b)}"), lines[-1])
    if "ivi" in first and (m := re.search(r"(\d+) (?:by|divided by) (\d+)", first)):
        q, r = divmod(int(m[1]), int(m[2]))
        claim(f"Quotient {q}, remainder {r}." in lines, lines[-1])
    return kind
