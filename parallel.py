"""What changes when one device becomes many.

`Mesh` is this process's place among the ranks; `Mesh()` is a process on its own, for which every
collective here is the identity. It is built once, in train.py, and passed as an argument: no module asks
for its rank.

  expert parallelism   ranks of an ep group divide the experts; tokens are dispatched to them and their
                       outputs combined                                                 [Kimi K2 §2.4.2]
  ZeRO-1               each matrix has one owner, which alone keeps its optimizer state: gradients are
                       reduced to the owner, weights broadcast from it

World = pp × dp; an ep group lies inside dp: rank r of dp is number r % ep of ep group r // ep. Experts
are replicated on dp/ep ranks (`edp`), everything else on all dp ranks.
"""
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.nn.functional    # imported after a process group exists, its defaults would hold it
from torch.distributed.device_mesh import init_device_mesh

from kernels import accumulation_dtype, listed


@dataclass(frozen=True)
class MeshConfig:
    """How the ranks are laid out; dp = world / pp. ValueError names the field to change."""
    pp: int = 1                  # pipeline stages
    ep: int = 1                  # ranks that divide the experts among them
    timeout: float = 600.0       # seconds that a collective waits for a rank; saving has to take less

    def __post_init__(self):
        if not self.timeout > 0:
            raise ValueError(f"mesh.timeout={self.timeout}: must be positive, in seconds")
        for name in ("pp", "ep"):
            if getattr(self, name) < 1:
                raise ValueError(f"mesh.{name}={getattr(self, name)}: must be at least 1")

    def check(self, world, n_expert):
        """Raise ValueError unless `world` ranks and `n_expert` experts can be laid out this way."""
        rules = [
            (self.pp == 1,
             f"mesh.pp={self.pp}: there is no pipeline yet; pp=1"),
            (world % (self.pp * self.ep) == 0,
             f"mesh.pp={self.pp} × ep={self.ep} does not divide the {world} ranks there are"),
            (self.ep == 1 or n_expert > 0 and n_expert % self.ep == 0,
             f"mesh.ep={self.ep} does not divide the model's {n_expert} experts"),
        ]
        for holds, message in rules:
            if not holds:
                raise ValueError(message)


GROUPS = {}                      # name of an axis: its process group


class Axis(NamedTuple):
    """One direction of the mesh: this process's rank along it, and its size.

    It holds the name of its process group and not the group itself. gloo's threads end with the last
    reference to their group, and a thread that outlives the interpreter aborts the process: so
    `leave_mesh` has to be able to drop every reference, whoever still holds a mesh."""
    rank: int = 0
    size: int = 1
    name: str = ""               # "" without a process group

    @property
    def group(self):
        return GROUPS[self.name]


class Mesh(NamedTuple):
    """This process's coordinates, and the device it computes on. Decisions that all ranks take together
    go over `world`."""
    world: Axis = Axis()         # all ranks
    dp: Axis = Axis()            # data parallel
    pp: Axis = Axis()            # pipeline stage
    ep: Axis = Axis()            # place in the expert-parallel group
    edp: Axis = Axis()           # replica of this rank's experts
    device: torch.device = torch.device("cpu")


def this_rank():
    """This process's rank as torchrun set it, known before the process group; 0 for a single process."""
    if world_size() > 1:
        return int(os.environ.get("RANK", 0))
    return 0


def world_size():
    """The number of ranks, as torchrun set it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def launch_id():
    """Names the torchrun launch of this process, restarts included: host, torchrun's pid and start time.
    "" without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""

    # The start time tells a reused pid apart; only Linux has /proc.
    began = ""
    with contextlib.suppress(OSError):
        began = Path(f"/proc/{os.getppid()}/stat").read_text().rsplit(")", 1)[1].split()[19]
    return f"{os.uname().nodename} {os.getppid()} {began}"


def join_mesh(config, facts=None):
    """The mesh of this process, from torchrun's variables; a plain `python train.py` is a mesh of one.

    NCCL on GPUs, gloo on CPUs. Call it when the data is ready: from here on, a rank that has to wait
    longer than config.timeout fails. `facts` {what: text} must be equal on all ranks; `compare` checks that
    first. ValueError: fewer GPUs than ranks, or ranks not started alike. LostRank: a rank is missing."""
    # Device: one GPU for each rank of this host, else the CPU
    world = world_size()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"--nproc-per-node: local rank {local}, but only {torch.cuda.device_count()} GPUs here")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world == 1:
        return Mesh(device=device)

    # All ranks, in a process group of this launch alone
    timeout = timedelta(seconds=config.timeout)
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(meet(store, rank, world, config.timeout), store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    GROUPS["world"] = dist.group.WORLD
    everyone = Axis(rank, world, "world")
    compare(facts or {}, Mesh(everyone, device=device))

    # The two grids: pp × dp, and edp × ep
    axes = dict(world=everyone)
    dp = world // config.pp
    grids = [
        (("pp", "dp"), (config.pp, dp)),
        (("edp", "ep"), (world // config.ep, config.ep)),
    ]
    for names, sizes in grids:
        grid = init_device_mesh(device.type, sizes, mesh_dim_names=names)
        for name, size in zip(names, sizes):
            GROUPS[name] = grid.get_group(name)
            axes[name] = Axis(grid.get_local_rank(name), size, name)
    return Mesh(**axes, device=device)


def meet(store, rank, world, timeout):
    """A name on which exactly the processes alive now agree. LostRank: none within `timeout` seconds.

    torchrun's store survives a restart: without a name of its own, a new process group would read the
    addresses of dead processes; and torchrun's agents disagree about how often they have restarted. Each
    process draws a random id, and four messages go through the store (A is rank 0's id, B rank 1's):

        rank 0   call = A                     rank 0 calls under its own id
        rank 1   A/1 = B                      the others answer to the call they read
        rank 0   A/confirmed = B              rank 0 has every answer, and says whose
        rank 1   reads B there: the name is A

    An answer may be that of a dead predecessor: a rank that does not find its own id among the confirmed
    ones waits for rank 0's next call."""
    me = uuid.uuid4().hex
    deadline = time.monotonic() + timeout

    # Rank 0 calls, waits for every answer, and confirms them.
    if rank == 0:
        store.set("call", me)
        answers = [store.get(f"{me}/{r}").decode() for r in range(1, world)]
        store.set(f"{me}/confirmed", ",".join(answers))
        return me

    # Answer, then wait for the confirmation or for another call.
    while time.monotonic() < deadline:
        call = store.get("call").decode()
        store.set(f"{call}/{rank}", me)
        while store.get("call").decode() == call and time.monotonic() < deadline:
            if store.check([f"{call}/confirmed"]):
                if me in store.get(f"{call}/confirmed").decode().split(","):
                    return call
            time.sleep(0.02)
    raise LostRank(f"rank {rank} was not called by rank 0 within {timeout:g} seconds")


def leave_mesh():
    """Leave in order, when every message has arrived. The communication threads have ended on return."""
    GROUPS.clear()
    abandon_mesh()


def abandon_mesh():
    """Leave after an error: messages that are still in flight are not waited for."""
    if dist.is_initialized():
        dist.destroy_process_group()


class LostRank(RuntimeError):
    """Another rank died, or did not answer within the timeout: no collective can be completed."""


@contextlib.contextmanager
def talking(mesh):
    """Put around a collective, and nothing else: its failure becomes LostRank. gloo reports a lost rank as
    a bare RuntimeError, which any computation might raise too."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        what = str(error).splitlines()[0]
        raise LostRank(f"rank {mesh.world.rank} lost contact with another rank: {what}") from error


def barrier(mesh):
    """Wait until every rank is here."""
    if mesh.world.size > 1:
        with talking(mesh):
            dist.barrier(mesh.world.group)


def all_max(t, mesh):
    """Elementwise maximum over all ranks, in place."""
    if mesh.world.size > 1:
        with talking(mesh):
            dist.all_reduce(t, dist.ReduceOp.MAX, mesh.world.group)
    return t


def all_sum(t, mesh, axis=None):
    """Elementwise sum over all ranks, or over those of one axis, in place."""
    axis = axis or mesh.world
    if axis.size > 1:
        with talking(mesh):
            dist.all_reduce(t, dist.ReduceOp.SUM, axis.group)
    return t


def gather(thing, mesh):
    """A JSON value → the list of every rank's on rank 0, None elsewhere. JSON and not pickle: what comes
    over the network is data, never code."""
    if mesh.world.size == 1:
        return [thing]

    # All ranks pad their bytes with blanks to the longest.
    raw = torch.frombuffer(bytearray(json.dumps(thing).encode()), dtype=torch.uint8)
    longest = int(all_max(torch.tensor([len(raw)], device=mesh.device), mesh).item())
    padded = torch.full((longest,), ord(" "), dtype=torch.uint8, device=mesh.device)
    padded[:len(raw)] = raw

    # Only rank 0 receives; JSON ignores the trailing blanks.
    everyone = None
    if mesh.world.rank == 0:
        everyone = [torch.empty_like(padded) for _ in range(mesh.world.size)]
    with talking(mesh):
        dist.gather(padded, everyone, group=mesh.world.group, group_dst=0)
    if everyone is None:
        return None
    return [json.loads(t.cpu().numpy().tobytes()) for t in everyone]


COMPARED = 512                   # facts at most; a fixed size, so that ranks of another version can compare


def compare(facts, mesh, like=0):
    """Check that `facts` {what: text} equal those of rank `like`. Each rank may name another reference.

    ValueError, on all ranks: which rank differs from which, and in what. One collective, 8 bytes a fact."""
    if mesh.world.size == 1:
        return

    # A row: the rank to be compared with, then a hash of each fact. The first fact is the list of names.
    names = ["version", *facts]
    texts = [" ".join(names), *facts.values()]
    mine = torch.zeros(1 + COMPARED, dtype=torch.int64)
    mine[0] = like
    for i, text in enumerate(texts, 1):
        mine[i] = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)

    # All rows to all ranks
    mine = mine.to(mesh.device)
    table = [torch.empty_like(mine) for _ in range(mesh.world.size)]
    with talking(mesh):
        dist.all_gather(table, mine, group=mesh.world.group)

    # Every rank finds the same differences.
    said = []
    table = torch.stack(table).tolist()
    for rank, (reference, *row) in enumerate(table):
        wanted = table[reference][1:]
        different = [name for name, a, b in zip(names, row, wanted) if a != b]
        if row[0] != wanted[0]:              # the lists of names differ, so no other column can be compared
            different = names[:1]
        if different:
            said.append(f"rank {rank} has another {', '.join(different)} than rank {reference}")
    if said:
        raise ValueError(f"{listed(said, 4)}: start all ranks with the same command, files and software")


def checksum(t):
    """sha256 of a tensor's bytes."""
    raw = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()


def compare_weights(tensors, mesh):
    """`compare` for {name: weight}. All ranks of a stage hold the same weights, except for experts (3-D):
    those are equal on the ranks with the same place in their ep group."""
    if mesh.world.size == 1:
        return
    stage = mesh.pp.rank * mesh.dp.size
    for what, stacked, like in (("weights", False, stage), ("experts", True, stage + mesh.ep.rank)):
        digests = [f"{name} {checksum(t)}" for name, t in tensors.items() if (t.ndim == 3) == stacked]
        compare({what: " ".join(digests)}, mesh, like)


# ---- plans -------------------------------------------------------------------------------------------------

class Act(NamedTuple):
    """One step of a rank's plan."""
    op: str                      # "F" forward, "B" backward
    micro: int                   # index of the micro-batch
    chunk: int = 0               # index of the rank's range of layers


def straight(windows, micro):
    """The plan without a pipeline, for `windows` windows in micro-batches of `micro`: F0 B0 F1 B1 ..."""
    return [Act(op, i) for i in range(-(-windows // micro)) for op in "FB"]


def execute(plan, chunks, batch, micro, mesh, dtype=None):
    """Run a plan: the gradients of this rank's loss, accumulated over its micro-batches in p.grad, or in
    the buckets of ZeRO-1. The loss is the mean over windows, or the sum of weight × term if the batch has
    weights.

    chunks: callables (x, y, doc_start, weight, dtype) → (loss, its terms (N,), balance loss).
    → nats/token of each window (b,), in float64 on the mesh's device."""
    share = len(batch.x)
    losses = torch.empty(share, dtype=torch.float64, device=mesh.device)
    live = {}                                                      # forward act: loss, until its backward
    for act in plan:
        # A backward frees the graph that its forward built.
        if act.op == "B":
            live.pop(act._replace(op="F")).backward()
            continue

        # The windows of this micro-batch, on the device
        part = slice(act.micro * micro, (act.micro + 1) * micro)
        here = []
        for t in (batch.x, batch.y, batch.doc_start, batch.weight):
            here.append(None if t is None else t[part].to(mesh.device))

        # Its part of the loss. A balance loss is always a mean over windows.
        loss, terms, balance = chunks[act.chunk](*here, dtype=dtype)
        losses[part] = terms.detach().double().view(len(here[0]), -1).mean(1)
        of_all = len(here[0]) / share
        if batch.weight is None:
            live[act] = (loss + balance) * of_all
        else:
            live[act] = loss + balance * of_all
    return losses


# ---- expert parallelism ------------------------------------------------------------------------------------

class Trip:
    """An all-to-all in flight: `sent[i]` rows go to rank i of ep, `received[i]` rows come from it.
    Gradients take the same way back.

    Depart starts it and Arrive waits for it. What is computed between the two overlaps with the transfer:
    the shared expert in the forward, its gradient in the backward."""

    def __init__(self, mesh, sent, received):
        self.mesh = mesh
        self.sent = sent
        self.received = received

    def start(self, x, sent, received):
        """x (sum(sent), ...) → a tensor (sum(received), ...) that `wait` will have filled."""
        out = x.new_empty(sum(received), *x.shape[1:])
        with talking(self.mesh):
            self.work = dist.all_to_all_single(out, x.contiguous(), received, sent, self.mesh.ep.group,
                                               async_op=True)
        return out

    def wait(self):
        work = self.work
        self.work = None                                           # a handle keeps both tensors alive
        with talking(self.mesh):
            work.wait()


class Depart(torch.autograd.Function):
    """Forward: start the transfer. Backward: wait for the gradient that Arrive has sent back."""

    @staticmethod
    def forward(ctx, x, trip):
        ctx.trip = trip
        return trip.start(x, trip.sent, trip.received)             # not filled yet

    @staticmethod
    def backward(ctx, _):
        ctx.trip.wait()
        gradient = ctx.trip.gradient
        ctx.trip.gradient = None
        return gradient, None


class Arrive(torch.autograd.Function):
    """Forward: wait for the transfer. Backward: send the gradient back, without waiting."""

    @staticmethod
    def forward(ctx, x, trip):
        ctx.trip = trip
        trip.wait()
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        ctx.trip.gradient = ctx.trip.start(g, ctx.trip.received, ctx.trip.sent)
        return g, None                                             # a placeholder: Depart has the real one


def expert_exchange(mesh):
    """Dispatch and combine: the `exchange` of a model whose experts are divided over mesh.ep, in the
    order of its ranks.

    exchange(tokens (M, C), weight (M, 1), counts (E,)), the first two sorted by expert, starts to send each
    token to its expert, and returns
        arrive() → tokens (N, C), weight (N, 1), counts (E/n,), back
    with what was sent here, sorted by expert, and the number of tokens of each expert here;
    back(y (N, C)) → (M, C) returns the experts' outputs, in the order in which the tokens were given.
    Nothing is padded; any count may be 0."""
    n = mesh.ep.size

    def exchange(tokens, weight, counts):
        # How many tokens come from each rank for each expert here: received (n·E/n,)
        received = torch.empty_like(counts)
        with talking(mesh):
            dist.all_to_all_single(received, counts, group=mesh.ep.group)
        sent, got = (c.view(n, -1).sum(1).tolist() for c in (counts, received))

        # Dispatch: tokens leave with their weight as a last column.
        trip = Trip(mesh, sent, got)
        moving = Depart.apply(torch.cat((tokens, weight), 1), trip)

        def arrive():
            # The order that turns rows sorted by source rank, then expert, into rows sorted by expert
            expert = torch.arange(len(counts) // n, device=counts.device).repeat(n)
            order = expert.repeat_interleave(received).argsort(stable=True)
            inverse = order.argsort()

            # Combine: outputs in the order of arrival, over the reverse all-to-all
            home = Trip(mesh, got, sent)

            def back(y):
                return Arrive.apply(Depart.apply(y[inverse], home), home)

            # The dispatched rows, once they are here
            rows = Arrive.apply(moving, trip)[order]
            return rows[:, :-1].contiguous(), rows[:, -1:], received.view(n, -1).sum(0), back
        return arrive
    return exchange


# ---- ZeRO-1: who owns what ---------------------------------------------------------------------------------

class Piece(NamedTuple):
    """The unit of ownership, transfer and saving: rows start..stop of a parameter that has `rows` rows on
    all ranks together.

    A matrix is one piece, since its update needs the whole matrix, and so is each expert of a stack.
    Elementwise tensors (embeddings, vectors) may be cut between any two rows."""
    name: str
    start: int
    stop: int
    rows: int

    @property
    def key(self):
        if (self.start, self.stop) == (0, self.rows):
            return self.name
        return f"{self.name}[{self.start}:{self.stop}]"


def share_out(items, n):
    """[(piece, bytes, operations)] → the pieces of each of n owners.

    First the matrices, costliest first: each goes to the owner with the fewest operations so far, among
    those that it leaves at 1.1 times the mean of bytes or less. Then elementwise tensors (0 operations) are
    cut by rows to even out bytes. For two owners:

                          bytes   operations   owner 0      owner 1
        matrix a              8            4   a
        matrix b              8            3                b
        matrix c              8            2                c             (3 < 4 operations so far)
        embedding e[12]      12            0   e[0:10]      e[10:12]
                                         sum   18 bytes, 4  18 bytes, 5
    """
    # Matrices, by operations under the bound on bytes
    bound = 1.1 * sum(size for _, size, _ in items) / n
    own = [[] for _ in range(n)]
    size_of = [0.0] * n
    work_of = [0.0] * n
    matrices = [item for item in items if item[2]]
    for piece, size, work in sorted(matrices, key=lambda item: (-item[2], item[0])):
        fitting = [r for r in range(n) if size_of[r] + size <= bound]
        if fitting:
            r = min(fitting, key=lambda r: (work_of[r], size_of[r]))
        else:
            r = min(range(n), key=size_of.__getitem__)
        own[r].append(piece)
        size_of[r] += size
        work_of[r] += work

    # The level of bytes to which elementwise tensors raise the k + 1 owners that have the fewest
    elementwise = [(piece, size) for piece, size, work in items if not work]
    left = sum(size for _, size in elementwise)
    level = 0.0
    for k, size in enumerate(sorted(size_of)):
        level = (left + sum(sorted(size_of)[:k + 1])) / (k + 1)
        if k + 1 == n or level <= sorted(size_of)[k + 1]:
            break

    # Fill one owner after another up to that level; the last takes what is left.
    r = 0
    room = level - size_of[0]
    for piece, size in elementwise:
        start = piece.start
        row = size / (piece.stop - piece.start)
        while start < piece.stop:
            while room < row / 2 and r < n - 1:
                r += 1
                room = level - size_of[r]
            stop = piece.stop
            if r < n - 1:
                stop = min(piece.stop, start + max(1, round(room / row)))
            own[r].append(piece._replace(start=start, stop=stop))
            room -= (stop - start) * row
            start = stop
    return [sorted(pieces) for pieces in own]


def pieces_of(name, p, cost, mesh, axis):
    """The pieces of a parameter, as items of `share_out`. cost: (bytes, operations) of the whole parameter.
    A stack of experts is cut into single experts where they have replicas that can own them."""
    # Experts are numbered over all ranks of ep.
    first = 0
    rows = len(p)
    if p.ndim == 3:
        first = mesh.ep.rank * len(p)
        rows = mesh.ep.size * len(p)

    # One piece, or one for each expert, at an equal part of the cost
    stops = [first + len(p)]
    if p.ndim == 3 and axis.size > 1:
        stops = range(first + 1, first + len(p) + 1)
    starts = [first, *stops[:-1]]
    return [(Piece(name, start, stop, rows), *(c / len(stops) for c in cost))
            for start, stop in zip(starts, stops)]


def numbers(piece, p):
    """The number of elements of a piece of parameter p."""
    return (piece.stop - piece.start) * (p.numel() // len(p))


def gradient_bytes(pieces, parameters):
    """Bytes of the pieces' gradients, which are kept in float32 or wider."""
    total = 0
    for piece in pieces:
        p = parameters[piece.name]
        total += numbers(piece, p) * accumulation_dtype(p.dtype).itemsize
    return total


def layout(parameters, weigh, mesh, room=math.inf, chunk=lambda name: 0):
    """Who owns what → {"dp" or "edp": [the buckets of each owner on that axis]}; a bucket is a list of
    pieces. A pure function: all ranks of the axis compute the same, and nothing is moved.

    parameters {name: parameter}: 3-D ones are stacks of this rank's experts, others equal on all of dp.
    weigh(name, parameter) → (bytes of its optimizer state, operations of its update; 0 = elementwise).
    A bucket holds pieces of one dtype and one chunk of layers (`chunk(name)`), and at most `room` bytes of
    gradients, unless a single piece is larger."""
    def kind(piece):
        return chunk(piece.name), str(parameters[piece.name].dtype)

    def cut(pieces, room):
        buckets = []
        for piece in sorted(pieces, key=kind):
            fits = buckets and kind(piece) == kind(buckets[-1][0]) and \
                gradient_bytes([*buckets[-1], piece], parameters) <= room
            if not fits:
                buckets.append([])
            buckets[-1].append(piece)
        return buckets

    owned = {}
    for axis_name, axis in (("dp", mesh.dp), ("edp", mesh.edp)):
        # Experts have owners among their replicas, everything else among dp.
        items = []
        for name, p in parameters.items():
            if (p.ndim == 3) == (axis_name == "edp"):
                items += pieces_of(name, p, weigh(name, p), mesh, axis)

        # A single owner sends nothing, so its buckets need no bound.
        bound = room if axis.size > 1 else math.inf
        owned[axis_name] = [cut(pieces, bound) for pieces in share_out(items, axis.size)]
    return owned


# ---- ZeRO-1: gradients to their owners, weights back -------------------------------------------------------
# The phases of a step, and the methods of Zero1 that run them:
#
#   accumulate   autograd's hook (`take`) adds each gradient to its bucket's float32 sum, and frees it.
#   reduce       each bucket is summed over its ranks onto its owner, which divides by dp: `master.grad`.
#   clip         `clip_norm_` takes one norm over all owners and scales their gradients.
#   update       `step`: owners update their masters, one round (a bucket of each owner) after another.
#   broadcast    `step` sends each updated round (`send_weights`, `take_weights`) while the next is updated.
#   free         `drop` frees the gradients.
#
# `travel` and `arrive` bound the bytes in flight of the two phases that communicate.

@dataclass(eq=False)
class Bucket:
    """Pieces of one dtype that travel together, to or from their owner: a rank of `axis`."""
    axis: Axis
    owner: int
    pieces: list
    gradient: torch.Tensor = None    # flat sum of this rank's gradients, float32 or wider; None if empty

    @property
    def mine(self):
        return self.owner == self.axis.rank


class Zero1:
    """Each piece of the model has one owner among the ranks that hold it; only the owner has its optimizer
    state [ZeRO §5.1]

    parameters, weigh, chunk: see `layout`. make([(key, tensor)]) → a torch optimizer for these. Where
    parameters are narrower than float32, owners keep a float32 master.

    Memory. A single process leaves gradients where autograd puts them. On several ranks they live in their
    buckets: 4 bytes an element until `reduce`, after which only the owner has them, as views of the bucket.
    At most `in_air` bytes are in flight at a time; a whole round of buckets fits."""

    def __init__(self, parameters, make, weigh, mesh, bucket_bytes=32 << 20, in_air=256 << 20,
                 chunk=lambda name: 0):
        self.mesh = mesh
        self.parameters = parameters
        self.in_air = in_air
        self.works = {name: weigh(name, p)[1] for name, p in parameters.items()}
        self.flying = []                                           # (request, tensor, bucket, land)

        # A round is one bucket of each owner: updated at the same time, then sent.
        self.rounds = []
        room = min(bucket_bytes, in_air // mesh.dp.size)
        for name, owners in layout(parameters, weigh, mesh, room, chunk).items():
            axis = getattr(mesh, name)
            for some in itertools.zip_longest(*owners):
                self.rounds.append([Bucket(axis, r, pieces) for r, pieces in enumerate(some) if pieces])

        # What is owned here: masters, and one optimizer a bucket
        self.masters = {}
        self.optimizers = {}
        for bucket in self.buckets():
            if not bucket.mine:
                continue
            for piece in bucket.pieces:
                master = self.rows(piece)
                if master.dtype != accumulation_dtype(master.dtype):
                    master = master.float()
                self.masters[piece] = master
            trained = [piece for piece in bucket.pieces if self.parameters[piece.name].requires_grad]
            if trained:
                self.optimizers[bucket] = make([(piece.key, self.masters[piece]) for piece in trained])

        # Where the gradient of a parameter goes: name → [(bucket, piece, its slice of the bucket)]
        self.places = {}
        for bucket in self.buckets():
            at = 0
            for piece in bucket.pieces:
                stop = at + numbers(piece, parameters[piece.name])
                self.places.setdefault(piece.name, []).append((bucket, piece, slice(at, stop)))
                at = stop

        # Gradients go there as soon as autograd has them.
        if mesh.dp.size > 1:
            for name, p in parameters.items():
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(functools.partial(self.take, name))

    def buckets(self):
        return [bucket for some in self.rounds for bucket in some]

    def trained(self):
        """{piece: master} of what is owned here and not frozen."""
        owned = self.masters.items()
        return {piece: master for piece, master in owned if self.parameters[piece.name].requires_grad}

    def rows(self, piece, of=None):
        """The rows of a piece in this rank's parameter, or in `of`, a tensor of the same shape."""
        p = self.parameters[piece.name].detach() if of is None else of
        if len(p) == piece.stop - piece.start:
            return p
        first = self.mesh.ep.rank * len(p) if p.ndim == 3 else 0
        return p[piece.start - first:piece.stop - first]

    def take(self, name, p):
        """Called by autograd when p.grad is complete: into the buckets, and freed."""
        self.accumulate(name, p.grad)
        p.grad = None

    @torch.no_grad()
    def accumulate(self, name, gradient):
        """Add a gradient of this rank to the buckets that hold its parameter."""
        for bucket, piece, where in self.places[name]:
            self.fill(bucket)
            bucket.gradient[where].add_(self.rows(piece, gradient).flatten())

    def fill(self, bucket):
        """Start a bucket's sum at zero. It stays zero where no token was routed to its experts."""
        if bucket.gradient is None:
            p = self.parameters[bucket.pieces[0].name]
            size = sum(numbers(piece, self.parameters[piece.name]) for piece in bucket.pieces)
            bucket.gradient = torch.zeros(size, dtype=accumulation_dtype(p.dtype), device=p.device)

    def travel(self, buckets, start, land):
        """start(bucket) → (request, tensor) sends a bucket, land(bucket, tensor) takes it on arrival.

        At most `in_air` bytes are in flight, or one bucket; `arrive` waits for the rest."""
        for bucket in buckets:
            # A single owner has nothing to send.
            if bucket.axis.size == 1:
                land(bucket, None)
                continue

            # Wait until there is room in the air, then send.
            room = self.in_air - gradient_bytes(bucket.pieces, self.parameters)
            while self.flying and sum(tensor.nbytes for _, tensor, *_ in self.flying) > room:
                self.arrive(1)
            request, tensor = start(bucket)
            self.flying.append((request, tensor, bucket, land))

    def arrive(self, n=None):
        """Wait for the first n in flight, or for all."""
        if n is None:
            n = len(self.flying)
        for request, tensor, bucket, land in self.flying[:n]:
            with talking(self.mesh):
                request.wait()
            land(bucket, tensor)
        del self.flying[:n]

    @torch.no_grad()
    def reduce(self):
        """The mean over dp of all gradients, into the owners' `master.grad`. An expert's gradient too is
        summed over its replicas and divided by dp: together they have seen the tokens of all of dp."""
        # One process owns everything, and keeps autograd's gradients.
        n = self.mesh.dp.size
        if n == 1:
            for piece, master in self.trained().items():
                gradient = self.parameters[piece.name].grad
                if gradient is None:
                    master.grad = torch.zeros_like(master)
                else:
                    master.grad = self.rows(piece, gradient)
            return

        # On several, the ranks of an axis sum each bucket onto its owner.
        def start(bucket):
            self.fill(bucket)
            with talking(self.mesh):
                request = dist.reduce(bucket.gradient, group_dst=bucket.owner, group=bucket.axis.group,
                                      async_op=True)
            return request, bucket.gradient

        # The owner's masters get views of it; the other ranks free it.
        def land(bucket, _):
            self.fill(bucket)
            if bucket.mine:
                bucket.gradient.div_(n)
                sizes = [self.masters[piece].numel() for piece in bucket.pieces]
                for piece, mine in zip(bucket.pieces, bucket.gradient.split(sizes)):
                    if self.parameters[piece.name].requires_grad:
                        self.masters[piece].grad = mine.view_as(self.masters[piece])
            bucket.gradient = None

        # All buckets; on return every gradient is where it belongs.
        self.travel(self.buckets(), start, land)
        self.arrive()

    def set_rate(self, lr):
        """Set the learning rate of every optimizer."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr

    def forget(self):
        """Reset the optimizers' moments."""
        for optimizer in self.optimizers.values():
            optimizer.state.clear()

    def drop(self):
        """After a step: free the gradients."""
        for tensor in (*self.parameters.values(), *self.masters.values()):
            tensor.grad = None

    @torch.no_grad()
    def clip_norm_(self, largest):
        """Scale the owners' gradients to a norm of at most `largest`. → the norm before, over all ranks

        In float64. Squares are summed tensor by tensor, in the order of their names, so that no number of
        dp ranks changes the norm; then over the stages, each of which has other tensors."""
        # The squared norm of each tensor's rows that are owned here
        index = {name: i for i, name in enumerate(sorted(self.parameters))}
        squares = torch.zeros(len(index), dtype=torch.float64, device=self.mesh.device)
        trained = self.trained()
        gradients = [master.grad for master in trained.values()]
        if gradients:
            norms = torch.stack(torch._foreach_norm(gradients, 2, torch.float64))
            where = torch.tensor([index[piece.name] for piece in trained], device=norms.device)
            squares.index_add_(0, where, norms.square())

        # Summed over all ranks. On a GPU the factor is applied even if it is 1, to avoid a synchronization.
        norm = all_sum(all_sum(squares, self.mesh, self.mesh.dp).sum(), self.mesh, self.mesh.pp).sqrt()
        if gradients and (norm.device.type != "cpu" or norm > largest):
            torch._foreach_mul_(gradients, (largest / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @torch.no_grad()
    def step(self, update, follow):
        """Owners update their pieces (if `update`), follow({key: master}) adjusts them, and all ranks get
        the new weights: those of a round are broadcast while the next round is updated."""
        trained = self.trained()
        for some in self.rounds:
            # Update this rank's own bucket, then start to broadcast the whole round.
            for bucket in some:
                if bucket.mine:
                    if update and bucket in self.optimizers:
                        self.optimizers[bucket].step()
                    follow({piece.key: trained[piece] for piece in bucket.pieces if piece in trained})
            self.travel(some, self.send_weights, self.take_weights)
        self.arrive()

    def send_weights(self, bucket):
        """Start to broadcast a bucket's weights, flat and in their own dtype. → (request, flat)"""
        here = [self.rows(piece) for piece in bucket.pieces]
        flat = here[0].new_empty(sum(t.numel() for t in here))
        if bucket.mine:
            torch.cat([self.masters[piece].to(flat.dtype).flatten() for piece in bucket.pieces], out=flat)
        with talking(self.mesh):
            request = dist.broadcast(flat, group_src=bucket.owner, group=bucket.axis.group, async_op=True)
        return request, flat

    def take_weights(self, bucket, flat):
        """Copy weights into the parameters: the received ones, or the owner's masters unless they share
        memory."""
        for piece in bucket.pieces:
            here = self.rows(piece)
            if not bucket.mine:
                mine, flat = flat[:here.numel()], flat[here.numel():]
                here.copy_(mine.view_as(here))
            elif here.data_ptr() != self.masters[piece].data_ptr():
                here.copy_(self.masters[piece])

    def sound(self):
        """Whether this rank's own gradients are finite, before they are reduced: a boolean tensor, ()."""
        # On several ranks gradients are in buckets, on one rank in p.grad.
        found = [bucket.gradient for bucket in self.buckets() if bucket.gradient is not None]
        found += [p.grad for p in self.parameters.values() if p.grad is not None]
        return torch.nn.utils.get_total_norm(found).isfinite()

    def describe(self):
        """A line for each axis on which some ranks have no matrix to update."""
        for axis in (self.mesh.dp, self.mesh.edp):
            buckets = [bucket for bucket in self.buckets() if bucket.axis is axis]
            owned = [(bucket.owner, piece.name) for bucket in buckets for piece in bucket.pieces]
            busy = {owner for owner, name in owned if self.works[name]}
            if axis.size > 1 and buckets and len(busy) < axis.size:
                yield f"{axis.size} ranks, but only {len(busy)} own a matrix: the others wait for its update"

    def tensors(self):
        """{key: tensor} of what this rank owns: masters, and its optimizers' state under "KEY:STATE"."""
        kept = {piece.key: master for piece, master in self.masters.items()}
        for optimizer in self.optimizers.values():
            kept |= optimizer.tensors()
        return kept

    @torch.no_grad()
    def load(self, saved, moments=True):
        """Read masters, and their optimizer state if `moments`, from a checkpoint (`Saved`) of any layout.
        ValueError: it has optimizer state of parameters that this model lacks."""
        # Which states were saved: parameter name → ["momentum", ...]
        states = {}
        for name in saved:
            name, colon, state = name.partition(":")
            if colon and moments:
                states.setdefault(name, []).append(state)
        lost = [name for name in states if name not in self.parameters]
        if lost:
            raise ValueError(f"the optimizer state is of another model: {listed(lost)} unknown")

        # Masters: the rows owned here
        own = {piece.key: piece for piece in self.masters}
        for piece, master in self.masters.items():
            master.copy_(saved.rows(piece.name, piece.start, piece.stop))

        # The same rows of each state
        for optimizer in self.optimizers.values():
            keys = [key for group in optimizer.param_groups for key in group["names"]]
            tensors = {}
            for key in keys:
                name, start, stop, _ = own[key]
                for state in states.get(name, ()):
                    tensors[f"{key}:{state}"] = saved.rows(f"{name}:{state}", start, stop)
            optimizer.load(tensors)
