"""Calls of a model server with OpenAI's interface, and the journal that keeps the answers of `data.generate`.

  calls      one HTTP request each, made again after errors that pass: 408, 409, 429, 5xx, a timeout, a
             connection that is cut, half an answer, an error in a response of status 200
  journal    OUT.calls.jsonl: a line for each answer, so that none is paid for twice
"""
import contextlib
import fcntl
import hashlib
import io
import json
import math
import os
import re
import socket
import sys
import threading
import time
from collections import Counter, defaultdict
from urllib.parse import urlsplit

from data import BAD_RECORD, estimated_tokens, several, without_thinking


# ---- one call ----------------------------------------------------------------------------------------------

FIRST_WAIT = 0.5                 # seconds before the second try of a call; doubled for each further try
LONGEST_WAIT = 600               # seconds; a server that asks for more ends the run
LARGEST = 64 << 20               # bytes of a response
OVERFLOW = re.compile("(?i)context.?(length|size|window)|exceed_context|(prompt|input).{0,30}too long")
MODERATED = re.compile("(?i)moderat|flagged|content.{0,20}(filter|polic)")       # of 403: this prompt alone
NO_USE = re.compile("(?i)model_not_found|insufficient_quota|invalid_api_key|model .{0,80}not (found|exist)")


class Unanswered(Exception):
    """A call without an answer: (why, seconds to wait before the next try, at least). inf: no try helps."""


def ask(endpoint, request, key, journal):
    """Make a call, again if need be → {answer, finish, usage} or {error}; None if it was not answered."""
    for tried in range(endpoint.retries + 1):
        if journal.stopped:
            return None
        try:
            return completion(*post(endpoint, request), endpoint.key())
        except Unanswered as error:
            why, seconds = error.args
            if seconds > LONGEST_WAIT:
                journal.stop(f"{why}; the model is {endpoint.model}")
            elif tried < endpoint.retries:
                # Exponential back-off, spread over calls by their hashes: 0.75 to 1.25 of it.
                journal.count("calls tried again", why)
                spread = 0.75 + int(key[tried:tried + 8], 16) / 2 ** 33
                journal.ending.wait(seconds + min(FIRST_WAIT * 2 ** tried, 60) * spread)
    return None


def post(endpoint, request):
    """One HTTP request → (status, headers, body). No proxy is used; a redirection is not followed, since it
    could carry the key to another host."""
    import http.client
    address = urlsplit(endpoint.endpoint)
    path = f"{address.path.rstrip('/')}/chat/completions" + f"?{address.query}" * bool(address.query)
    headers = {"Content-Type": "application/json"}
    if endpoint.key():
        headers["Authorization"] = f"Bearer {endpoint.key()}"
    kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
    late = time.monotonic() + endpoint.timeout
    try:
        with contextlib.closing(kind(address.netloc, timeout=endpoint.timeout)) as connection:
            connection.request("POST", path, json.dumps(request), headers)
            response = connection.getresponse()
            blocks, size = [], 0
            while block := response.read1(1 << 20):
                blocks.append(block)
                size += len(block)
                if time.monotonic() > late:                      # the connection's timeout is for each block
                    raise TimeoutError
                if size > LARGEST:
                    raise Unanswered("an answer without end", 0)
            return response.status, response.headers, b"".join(blocks)
    except (OSError, http.client.HTTPException) as error:
        # A name that nobody has stays so; a name server that does not answer may come back.
        if isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN:
            raise Unanswered(f"no server of that name: {address.hostname}", math.inf) from None
        why = "timeout" if isinstance(error, TimeoutError) else type(error).__name__
        raise Unanswered(why, 0) from None


def completion(status, headers, body, key):
    """A response → {answer, finish, usage}, or {error} if this request is never answered."""
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError):
        reply = None
    error = reply.get("error") if isinstance(reply, dict) else None
    if status == 200 and not error:
        try:
            choice = reply["choices"][0]
            answer = choice["message"].get("content")
            finish = str(choice.get("finish_reason"))[:20]
        except (TypeError, LookupError, AttributeError):
            if body.lstrip().startswith(b"<"):
                raise Unanswered("the server sends a page, not an answer: does its address lack /v1?",
                                 math.inf) from None
            raise Unanswered("half an answer", 0) from None
        usage = reply.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        tokens = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
        return dict(answer=answer if isinstance(answer, str) else None, finish=finish,
                    usage=tokens if all(type(n) is int and n >= 0 for n in tokens) else None)

    # An error, at times in a response of status 200. Servers differ in its form, so its text decides.
    said = " ".join((json.dumps(error or reply) if reply else body.decode(errors="replace")).split())
    shown, said = without(key, said)[:300], said[:300]
    why = str(status)
    if status == 200:
        why = "error in a 200"
        code = error.get("code") if isinstance(error, dict) else 0
        status = code if type(code) is int and code >= 400 else 500
    if OVERFLOW.search(said) and status != 429 or status in (400, 413, 422) and not NO_USE.search(said):
        why = "over the context window" if OVERFLOW.search(said) else str(status)
        return dict(error=f"{status} {shown}", why=why)
    if status == 403 and MODERATED.search(said):
        return dict(error=f"{status} {shown}", why="moderated")
    if NO_USE.search(said) or status < 500 and status not in (408, 409, 425, 429):
        raise Unanswered(f"the server says {status} {shown}", math.inf)
    seconds = seconds_to_wait(headers)
    if seconds > LONGEST_WAIT:
        why = f"the server says {status} and to wait {seconds:,.0f} s"
    raise Unanswered(why, seconds)


def without(key, text):
    """A text of a server as it may be printed and kept: without the key. A short key is in many a text by
    chance, and to mask its letters would show them: such a text is left out as a whole."""
    if key and key in text:
        return text.replace(key, "[key]") if len(key) >= 8 else "[a text with the key in it]"
    return text


def seconds_to_wait(headers):
    """What retry-after-ms or Retry-After, in seconds or as a date, asks for; else 0."""
    from email.utils import parsedate_to_datetime
    asked = headers.get("Retry-After")
    for read in (lambda: float(headers.get("retry-after-ms")) / 1000, lambda: float(asked),
                 lambda: parsedate_to_datetime(asked).timestamp() - time.time()):
        with contextlib.suppress(ValueError, TypeError):
            return max(0.0, read())
    return 0.0


# ---- the journal -------------------------------------------------------------------------------------------

class Journal:
    """The answers of all runs of OUT, in OUT.calls.jsonl: one line each, which is only appended; and counts.

    A line is found by the hash of its request. That has neither the API key nor the server's address in it,
    so a model may move. A line is written before its answer is used: a process that is killed loses the calls
    in flight, one a thread at most, and nothing else. It is on the disk a second later: a sync for each line
    would take longer than many a call, so a power cut may lose that second. Memory: 120 bytes a line."""

    def __init__(self, path, endpoint, dry_run=False):
        self.path = path
        self.endpoint = endpoint                                 # for its budget
        self.dry_run = dry_run                                   # offline answers stand for those of calls
        self.lock = threading.Lock()
        self.places = {}                                         # first 64 bits of a key → start of its line
        self.end = self.calls = self.tokens = 0                  # of the file, of all runs
        self.made = self.flying = self.asked = 0                 # calls of this run, in flight; their prompts
        self.fruitless = Counter()                               # in a row
        self.counts = defaultdict(Counter)                       # of rows, answers refused, ...: by reason
        self.stopped = ""                                        # why no more calls are made
        self.interrupted = False                                 # answers in flight are being waited for
        self.ending = threading.Event()
        self.example = ""                                        # the first prompt
        self.said = self.synced = self.begun = time.monotonic()
        if dry_run:
            self.file = open(path, "rb") if os.path.exists(path) else io.BytesIO()
        else:
            self.file = open(path, "a+b")
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{path}: another process writes it; give another OUT") from None

        # Where each line begins. After a kill the last one may not be whole: it is cut off.
        self.file.seek(0)
        for number, line in enumerate(self.file, 1):
            if not line.endswith(b"\n"):
                if not dry_run:
                    self.file.truncate(self.end)
                break
            try:
                call = json.loads(line)
                self.places[int(call["key"][:16], 16)] = self.end
                self.tokens += call["tokens"]
            except BAD_RECORD:
                raise ValueError(f"{path}, line {number} is damaged: remove the line, and its call is made "
                                 "again") from None
            self.calls += 1
            self.end += len(line)
        self.before = self.end                                   # what follows is of this run

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        # Ctrl-C may come where `generate` does not see it. A second one leaves without the answers in flight.
        try:
            if kind is KeyboardInterrupt and not self.interrupted:
                self.stop("interrupted")
                while self.flying:
                    time.sleep(.01)
        except KeyboardInterrupt:
            kind = KeyboardInterrupt
        with self.lock:                                          # no line is half written
            if not self.dry_run:
                os.fsync(self.file.fileno())
            if kind is KeyboardInterrupt and self.flying:
                sys.stdout.flush()
                os._exit(130)                                    # the threads could not be ended otherwise
            self.file.close()

    def find(self, key, again=None):
        """The call with that key, or None; None, too, for one of an earlier run that is to be made again:
        again(call) says whether."""
        with self.lock:
            place = self.places.get(int(key[:16], 16))
            if place is None:
                return None
            self.file.seek(place)
            call = json.loads(self.file.readline())
        again = again and place < self.before and again(call)
        return call if call["key"] == key and not again else None

    def may_call(self, text):
        """Whether a call may be made; `add` has to end it."""
        with self.lock:
            self.example = self.example or text
            for what, spent in (("calls", self.calls + self.flying), ("tokens", self.tokens)):
                budget = getattr(self.endpoint, what)
                if 0 < budget <= spent and not self.dry_run:
                    self.stop(f"the budget of {budget:,} {what} is spent")
            self.flying += not self.stopped
            return not self.stopped

    def add(self, text, found, **call):
        """Write a call that has ended → the call. found: what it brought; None: no answer."""
        with self.lock:
            self.flying -= 1
            if found is None:
                self.in_a_row("calls without an answer", 3)
                return None
            asked = estimated_tokens(text)
            tokens = sum(found.get("usage") or (asked, estimated_tokens(found.get("answer"))))
            call |= found | dict(tokens=tokens)
            if call.get("answer"):                               # may be a prompt, which is named by its hash
                answer = without_thinking(call["answer"], text).encode(errors="replace")
                call["sha256"] = hashlib.sha256(answer).hexdigest()
            if not self.dry_run:
                line = json.dumps(call).encode() + b"\n"
                self.file.write(line)
                self.file.flush()
                self.places[int(call["key"][:16], 16)] = self.end
                self.end += len(line)
                if time.monotonic() > self.synced + 1:
                    os.fsync(self.file.fileno())
                    self.synced = time.monotonic()
            self.made += 1
            self.calls += 1
            self.asked += asked
            self.tokens += tokens
            self.fruitless["calls without an answer"] = 0
            return call

    def in_a_row(self, what, most):
        """Count what ends the run when it comes so many times with nothing good in between."""
        self.fruitless[what] += 1
        if self.fruitless[what] >= most:
            self.stop(f"{most} {what} in a row")

    def stop(self, why):
        """Make no more calls: what is not in the journal is missing."""
        if why == "interrupted":
            self.interrupted = True
            if self.flying and self.endpoint.endpoint != "offline" and not self.dry_run:
                print(f"waiting for {several(self.flying, 'answer')} in flight, paid for already; Ctrl-C "
                      "again goes without", flush=True)
        elif not self.stopped:
            print(f"no more calls: {why}; every answer is kept in {self.path}", flush=True)
        self.stopped = self.stopped or why
        self.ending.set()

    def count(self, what, why, hopeless=False):
        """hopeless: a new answer that no other could better. A server that gives only such is left alone."""
        with self.lock:
            self.counts[what][why] += 1
            if hopeless:
                self.in_a_row(f"rows that the server refuses ({why})", 20)
            elif why == "taken":
                self.fruitless.clear()

    def progress(self):
        """A line every five seconds."""
        now = time.monotonic()
        if now > self.said + 5:
            self.said = now
            rows = self.counts["rows"]
            line = f"{rows['taken']:,} answers taken, {rows['refused for good']:,} refused for good; "
            line += f"{self.made:,} calls, {self.made / (now - self.begun):.1f} a second; "
            line += f"{self.tokens:,} tokens in all"
            print(f"{line}{listed('; tried again', self.counts['calls tried again'])}", flush=True)


def listed(what, counts):
    """": 3 timeout, 1 429" after `what`, most frequent first; "" if there is none."""
    return f"{what}: {', '.join(f'{n:,} {why}' for why, n in counts.most_common())}" if counts else ""


def summary(journal):
    """Print what a run, or a dry run, has done → the number of rows that are missing."""
    if journal.dry_run:
        answers = journal.made * journal.endpoint.max_tokens
        print(f"The first prompt:\n{journal.example}\n\ndry run, nothing is sent: {journal.made:,} calls, "
              f"some {journal.asked:,} tokens of prompts and {answers:,} of answers at most; up to "
              f"{journal.endpoint.attempts} times that if answers are refused")
        return 0
    print(f"{journal.made:,} calls now; {journal.calls:,} and {journal.tokens:,} tokens in all")
    for what, counts in sorted(journal.counts.items()):
        print(listed(what, counts))
    missing = journal.counts["rows"]["missing"]
    if missing:
        print(f"{several(missing, 'row')} missing: the same command goes on from here")
    return missing
