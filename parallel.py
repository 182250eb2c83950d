"""What changes when one device becomes many.

`Mesh` says where this process stands; `Mesh()` is a process on its own, and every function here is then the identity.
It is made once, in train.py, and handed on as an argument: no module of this project asks who it is.

  expert parallelism   ranks of an ep group share out the experts; tokens travel to theirs and back     [Kimi K2 §2.4.2]
  ZeRO-1               each matrix has one owner, with its optimizer state; gradients go there, weights come back

World = pp × dp; an ep group lies inside dp: rank r of dp is number r % ep of ep group r // ep. What is not an expert is
the same on all dp ranks; an expert is on dp/ep of them (`edp`).
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
import torch.distributed.nn.functional                             # imported later, its defaults would hold the group
from torch.distributed.device_mesh import init_device_mesh

from kernels import accumulation_dtype, listed


@dataclass(frozen=True)
class MeshConfig:
    pp: int = 1                  # pipeline stages
    ep: int = 1                  # ranks that share out the experts; dp is the rest: world / pp
    timeout: float = 600.0       # seconds after which a collective that waits for a lost rank fails; saving takes less

    def __post_init__(self):
        if not self.timeout > 0:
            raise ValueError(f"mesh.timeout={self.timeout}: must be positive, in seconds")
        for name in ("pp", "ep"):
            if getattr(self, name) < 1:
                raise ValueError(f"mesh.{name}={getattr(self, name)}: must be at least 1")

    def check(self, world, n_expert):
        """Raise ValueError where so many ranks and experts cannot be laid out so."""
        if self.pp > 1:
            raise ValueError(f"mesh.pp={self.pp}: there is no pipeline yet; pp=1")
        if world % (self.pp * self.ep):
            raise ValueError(f"mesh.pp={self.pp} × ep={self.ep} does not divide the {world} ranks there are")
        if self.ep > 1 and (n_expert == 0 or n_expert % self.ep):
            raise ValueError(f"mesh.ep={self.ep} does not divide the model's {n_expert} experts")


GROUPS = {}                      # axis: its process group


class Axis(NamedTuple):
    """One direction of the mesh. It holds the name of its process group, and not the group: gloo's threads end with the
    last reference to their group, and one that outlives the interpreter aborts the process. So `leave_mesh` has to be
    able to drop them all, whoever still holds a mesh."""
    rank: int = 0
    size: int = 1
    name: str = ""               # "" where there is nobody to talk to

    @property
    def group(self):
        return GROUPS[self.name]


class Mesh(NamedTuple):
    """This process's coordinates: among all ranks, data parallel, pipeline stage, place in its expert group, replica of
    its experts; and the device it computes on. What all ranks decide together, they decide over `world`."""
    world: Axis = Axis()
    dp: Axis = Axis()
    pp: Axis = Axis()
    ep: Axis = Axis()
    edp: Axis = Axis()
    device: torch.device = torch.device("cpu")


def this_rank():
    """This process's rank as torchrun set it; known before the process group is. Where there is one process it is 0."""
    return int(os.environ.get("RANK", 0)) if world_size() > 1 else 0


def world_size():
    """How many ranks there are, as torchrun set it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def launch_id():
    """Names the launch that this process belongs to, its restarts included: the host, and torchrun's process and when
    that began. "" where there is no torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    began = ""
    with contextlib.suppress(OSError):                             # Linux alone has it: against numbers used again
        began = Path(f"/proc/{os.getppid()}/stat").read_text().rsplit(")", 1)[1].split()[19]
    return f"{os.uname().nodename} {os.getppid()} {began}"


def join_mesh(config, facts=None):
    """The mesh of this process, from the variables that torchrun sets; a plain `python train.py` stands alone.

    NCCL on GPUs, gloo on CPUs. Call it when data is ready: from here on, who waits longer than the timeout fails.
    `facts` {what: text} must be the same on all ranks (`compare`); that is found out before anything else is agreed."""
    world = world_size()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise ValueError(f"--nproc-per-node: local rank {local}, but only {torch.cuda.device_count()} GPUs here")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world == 1:
        return Mesh(device=device)
    timeout = timedelta(seconds=config.timeout)
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(meet(store, rank, world, config.timeout), store)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world,
                            timeout=timeout)
    GROUPS["world"] = dist.group.WORLD
    everyone = Axis(rank, world, "world")
    compare(facts or {}, Mesh(everyone, device=device))
    axes, dp = dict(world=everyone), world // config.pp
    for names, sizes in ((("pp", "dp"), (config.pp, dp)), (("edp", "ep"), (world // config.ep, config.ep))):
        grid = init_device_mesh(device.type, sizes, mesh_dim_names=names)
        for name, size in zip(names, sizes):
            GROUPS[name] = grid.get_group(name)
            axes[name] = Axis(grid.get_local_rank(name), size, name)
    return Mesh(**axes, device=device)


def meet(store, rank, world, timeout):
    """A name that exactly the processes that are here now agree upon.

    torchrun's store outlives a restart: without a name of its own, a new process group reads the addresses of the dead;
    and agents do not agree on how often they have restarted. So rank 0 calls with a new name; the others answer to what
    they hear until rank 0 has confirmed them, themselves and not one that died."""
    me, deadline = uuid.uuid4().hex, time.monotonic() + timeout
    if rank == 0:
        store.set("call", me)
        answers = [store.get(f"{me}/{r}").decode() for r in range(1, world)]           # waits for each
        store.set(f"{me}/confirmed", ",".join(answers))
        return me
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
    """When all that was sent has arrived. The threads that talked have ended when this returns."""
    GROUPS.clear()
    abandon_mesh()


def abandon_mesh():
    """After an error: what is still under way is not waited for."""
    if dist.is_initialized():
        dist.destroy_process_group()


class LostRank(RuntimeError):
    """Another rank died, or did not answer within the timeout: nothing that needs all of them can go on."""


@contextlib.contextmanager
def talking(mesh):
    """Around a collective, and nothing else: its failure means that another rank is lost. gloo reports that as a bare
    RuntimeError, which is also what any computation would raise."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        what = str(error).splitlines()[0]
        raise LostRank(f"rank {mesh.world.rank} lost contact with another rank: {what}") from error


def barrier(mesh):
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
    """Elementwise sum over all ranks, or those of one axis, in place."""
    axis = axis or mesh.world
    if axis.size > 1:
        with talking(mesh):
            dist.all_reduce(t, dist.ReduceOp.SUM, axis.group)
    return t


def gather(thing, mesh):
    """Something that JSON can hold → the list of every rank's on rank 0, None elsewhere. Not pickle: what comes over
    the network is data, and no code."""
    if mesh.world.size == 1:
        return [thing]
    raw = torch.frombuffer(bytearray(json.dumps(thing).encode()), dtype=torch.uint8)
    longest = int(all_max(torch.tensor([len(raw)], device=mesh.device), mesh).item())
    padded = torch.full((longest,), ord(" "), dtype=torch.uint8, device=mesh.device)
    padded[:len(raw)] = raw
    everyone = None
    if mesh.world.rank == 0:
        everyone = [torch.empty_like(padded) for _ in range(mesh.world.size)]
    with talking(mesh):
        dist.gather(padded, everyone, group=mesh.world.group, group_dst=0)
    return everyone and [json.loads(t.cpu().numpy().tobytes()) for t in everyone]


COMPARED = 512                   # facts at most: a fixed number, so that ranks of another version can be told too


def compare(facts, mesh, like=0):
    """Raise ValueError, on all ranks, where one's `facts` {what: text} are not those of the rank that it names: who
    differs from whom, and in what. One collective, of 8 bytes a fact."""
    if mesh.world.size == 1:
        return
    names = ["version", *facts]
    texts = [" ".join(names), *facts.values()]
    mine = torch.zeros(1 + COMPARED, dtype=torch.int64)
    mine[0] = like
    for i, text in enumerate(texts, 1):
        mine[i] = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
    mine = mine.to(mesh.device)
    table = [torch.empty_like(mine) for _ in range(mesh.world.size)]
    with talking(mesh):
        dist.all_gather(table, mine, group=mesh.world.group)
    said = []
    table = torch.stack(table).tolist()
    for rank, (reference, *row) in enumerate(table):
        wanted = table[reference][1:]
        different = [name for name, a, b in zip(names, row, wanted) if a != b]
        if row[0] != wanted[0]:                                    # of facts with other names, nothing else can be said
            different = names[:1]
        if different:
            said.append(f"rank {rank} has another {', '.join(different)} than rank {reference}")
    if said:
        raise ValueError(f"{listed(said, 4)}: start all ranks with the same command, files and software")


def checksum(t):
    return hashlib.sha256(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def compare_weights(tensors, mesh):
    """`compare` for {name: weight}: all ranks of a stage have the same, but for experts (3-D) the same part of them."""
    if mesh.world.size == 1:
        return
    stage = mesh.pp.rank * mesh.dp.size
    for what, stacked, like in (("weights", False, stage), ("experts", True, stage + mesh.ep.rank)):
        digests = [f"{name} {checksum(t)}" for name, t in tensors.items() if (t.ndim == 3) == stacked]
        compare({what: " ".join(digests)}, mesh, like)


# ---- plans --------------------------------------------------------------------------------------------------------

class Act(NamedTuple):
    op: str                      # "F" forward, "B" backward
    micro: int                   # of which micro-batch
    chunk: int = 0               # through which of this rank's ranges of layers


def straight(windows, micro):
    """The plan of a process on its own, for so many windows in micro-batches of `micro`: F0 B0 F1 B1 ..."""
    return [Act(op, i) for i in range(-(-windows // micro)) for op in "FB"]


def execute(plan, chunks, batch, micro, mesh, dtype=None):
    """Run a plan: gradients of the mean loss of this rank's windows, or of the loss weighted as the batch says,
    accumulated over its micro-batches: into p.grad, or where the owners' hooks put them.

    chunks: callables (x, y, doc_start, weight, dtype) → (loss, its terms (N,), balance loss). → nats/token of each
    window (b,), in float64 on the mesh's device."""
    share, live = len(batch.x), {}
    losses = torch.empty(share, dtype=torch.float64, device=mesh.device)
    for act in plan:
        part = slice(act.micro * micro, (act.micro + 1) * micro)
        if act.op == "F":
            here = [None if t is None else t[part].to(mesh.device)
                    for t in (batch.x, batch.y, batch.doc_start, batch.weight)]
            loss, terms, balance = chunks[act.chunk](*here, dtype=dtype)
            losses[part] = terms.detach().double().view(len(here[0]), -1).mean(1)
            of_all = len(here[0]) / share                          # balance is a mean over windows
            live[act] = (loss + balance) * of_all if batch.weight is None else loss + balance * of_all
        else:
            live.pop(act._replace(op="F")).backward()
    return losses


# ---- expert parallelism -------------------------------------------------------------------------------------------

class Trip:
    """An all-to-all on its way: `sent[i]` rows go to rank i of ep, `received[i]` come from it. Their gradients take the
    same way back. Depart starts it and Arrive waits for it, so that what stands between them is computed meanwhile:
    forwards the shared expert, backwards its gradient."""

    def __init__(self, mesh, sent, received):
        self.mesh, self.sent, self.received = mesh, sent, received

    def start(self, x, sent, received):
        out = x.new_empty(sum(received), *x.shape[1:])
        with talking(self.mesh):
            self.work = dist.all_to_all_single(out, x.contiguous(), received, sent, self.mesh.ep.group, async_op=True)
        return out

    def wait(self):
        work, self.work = self.work, None                          # it holds both tensors as long as it lives
        with talking(self.mesh):
            work.wait()


class Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, trip):
        ctx.trip = trip
        return trip.start(x, trip.sent, trip.received)             # not there yet

    @staticmethod
    def backward(ctx, _):
        ctx.trip.wait()
        gradient, ctx.trip.gradient = ctx.trip.gradient, None
        return gradient, None


class Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, trip):
        ctx.trip = trip
        trip.wait()
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        ctx.trip.gradient = ctx.trip.start(g, ctx.trip.received, ctx.trip.sent)
        return g, None                                             # a stand-in: Depart has the real one


def expert_exchange(mesh):
    """The `exchange` of a model whose experts are shared out over mesh.ep: rank i has the i-th part of them.

    exchange(tokens (M, C), weight (M, 1), both sorted by expert, counts (E,)) sends them off, the weight in a last
    column; `arrive()` → the tokens and weights that came here, sorted by expert, how many each expert here has, and the
    way back. No token and no expert is padded; any count may be 0."""
    n = mesh.ep.size

    def exchange(tokens, weight, counts):
        received = torch.empty_like(counts)                        # (n·E/n,) from each rank, for each expert here
        with talking(mesh):
            dist.all_to_all_single(received, counts, group=mesh.ep.group)
        sent, got = (c.view(n, -1).sum(1).tolist() for c in (counts, received))
        trip = Trip(mesh, sent, got)
        moving = Depart.apply(torch.cat((tokens, weight), 1), trip)

        def arrive():
            expert = torch.arange(len(counts) // n, device=counts.device).repeat(n).repeat_interleave(received)
            order = expert.argsort(stable=True)
            inverse, home = order.argsort(), Trip(mesh, got, sent)
            back = lambda y: Arrive.apply(Depart.apply(y[inverse], home), home)
            rows = Arrive.apply(moving, trip)[order]
            return rows[:, :-1].contiguous(), rows[:, -1:], received.view(n, -1).sum(0), back
        return arrive
    return exchange


# ---- ZeRO-1: who owns what ----------------------------------------------------------------------------------------

class Piece(NamedTuple):
    """Rows start..stop of a parameter that has `rows` of them on all ranks together: what is owned, sent and saved.

    A matrix is one piece, since its update needs all of it; so is each expert of a stack; what is updated element by
    element (embeddings, vectors) is cut anywhere."""
    name: str
    start: int
    stop: int
    rows: int

    @property
    def key(self):
        return self.name if (self.start, self.stop) == (0, self.rows) else f"{self.name}[{self.start}:{self.stop}]"


def share_out(items, n):
    """[(piece, bytes, operations)] → a list of pieces for each of n owners.

    Whole pieces go, the costliest first, to the owner with the fewest operations so far among those that stay below 1.1
    times the mean of bytes. Then what has no operations is poured in, to one level of bytes."""
    bound = 1.1 * sum(size for _, size, _ in items) / n
    own, size_of, work_of = [[] for _ in range(n)], [0.0] * n, [0.0] * n
    for piece, size, work in sorted((i for i in items if i[2]), key=lambda i: (-i[2], i[0])):
        room = [r for r in range(n) if size_of[r] + size <= bound]
        r = min(room, key=lambda r: (work_of[r], size_of[r])) if room else min(range(n), key=size_of.__getitem__)
        own[r].append(piece)
        size_of[r] += size
        work_of[r] += work
    liquid = [(piece, size) for piece, size, work in items if not work]
    left, level = sum(size for _, size in liquid), 0.0
    for k, size in enumerate(sorted(size_of)):                     # the level at which it fills the lowest k + 1
        level = (left + sum(sorted(size_of)[:k + 1])) / (k + 1)
        if k + 1 == n or level <= sorted(size_of)[k + 1]:
            break
    r, room = 0, level - size_of[0]
    for piece, size in liquid:
        start, row = piece.start, size / (piece.stop - piece.start)
        while start < piece.stop:
            while room < row / 2 and r < n - 1:
                r += 1
                room = level - size_of[r]
            stop = piece.stop if r == n - 1 else min(piece.stop, start + max(1, round(room / row)))
            own[r].append(piece._replace(start=start, stop=stop))
            room -= (stop - start) * row
            start = stop
    return [sorted(pieces) for pieces in own]


def pieces_of(name, p, cost, mesh, axis):
    """A parameter → [(piece, bytes, operations)]. cost: of all of it. Where experts have replicas, each is a piece."""
    stacked = p.ndim == 3
    first = mesh.ep.rank * len(p) if stacked else 0
    stops = range(first + 1, first + len(p) + 1) if stacked and axis.size > 1 else [first + len(p)]
    starts = [first, *stops[:-1]]
    rows = len(p) * (mesh.ep.size if stacked else 1)
    return [(Piece(name, start, stop, rows), *(c / len(stops) for c in cost)) for start, stop in zip(starts, stops)]


def numbers(piece, p):
    """How many numbers of parameter p a piece has."""
    return (piece.stop - piece.start) * (p.numel() // len(p))


def gradient_bytes(pieces, parameters):
    """Gradients are kept in float32, or wider."""
    return sum(numbers(piece, parameters[piece.name]) * accumulation_dtype(parameters[piece.name].dtype).itemsize
               for piece in pieces)


def layout(parameters, weigh, mesh, room=math.inf, chunk=lambda name: 0):
    """Who owns what → {"dp" or "edp": [the buckets of each owner on that axis]}; a bucket is a list of pieces. Pure: it
    is the same on all ranks of the axis, and nothing is moved.

    `parameters` {name: parameter}: 3-D ones are stacks of this rank's experts, others are the same on every dp rank.
    `weigh(name, parameter)` → (bytes of its state, operations of its update; 0: element by element). The gradients of a
    bucket are of one dtype and of one chunk of layers (`chunk(name)`), and of `room` bytes; one piece may be larger."""
    def kind(piece):
        return chunk(piece.name), str(parameters[piece.name].dtype)

    def cut(pieces, room):
        buckets = []
        for piece in sorted(pieces, key=kind):
            if not buckets or kind(piece) != kind(buckets[-1][0]) or \
                    gradient_bytes([*buckets[-1], piece], parameters) > room:
                buckets.append([])
            buckets[-1].append(piece)
        return buckets
    owned = {}
    for name, axis in (("dp", mesh.dp), ("edp", mesh.edp)):
        items = [item for name_of, p in parameters.items() if (p.ndim == 3) == (name == "edp")
                 for item in pieces_of(name_of, p, weigh(name_of, p), mesh, axis)]
        owned[name] = [cut(pieces, room if axis.size > 1 else math.inf) for pieces in share_out(items, axis.size)]
    return owned


# ---- ZeRO-1: gradients to their owners, weights back --------------------------------------------------------------

@dataclass(eq=False)
class Bucket:
    """Pieces of one dtype that travel together, from or to their owner: a rank of `axis`."""
    axis: Axis
    owner: int
    pieces: list
    gradient: torch.Tensor = None    # flat: this rank's own, in float32 or wider; None where there is none yet

    @property
    def mine(self):
        return self.owner == self.axis.rank


class Zero1:
    """Each piece of the model has one owner among the ranks that hold it; only there is its optimizer state [ZeRO §5.1]

    `parameters`, `weigh`, `chunk`: see `layout`. `make([(key, tensor)])` → a torch optimizer for these. Where
    parameters are narrower than float32, owners keep a float32 master.

    Gradients. One process leaves them where autograd puts them. On several ranks, each is added to its bucket's float32
    sum as soon as it appears (`accumulate`) and dropped; the bucket is what travels, and the owner's `master.grad` is a
    view of it. So 4 bytes a number are alive until `reduce`, and only the owner's after it. No more than `in_air` bytes
    are on their way at a time, and a bucket is small enough for one of every owner to be."""

    def __init__(self, parameters, make, weigh, mesh, bucket_bytes=32 << 20, in_air=256 << 20, chunk=lambda name: 0):
        self.mesh, self.parameters, self.in_air = mesh, parameters, in_air
        self.works = {name: weigh(name, p)[1] for name, p in parameters.items()}
        self.flying = []                                           # (request, tensor, bucket, land)

        # Rounds: a bucket of each owner, which are computed at the same time and sent after another.
        self.rounds = []
        room = min(bucket_bytes, in_air // mesh.dp.size)
        for name, owners in layout(parameters, weigh, mesh, room, chunk).items():
            for some in itertools.zip_longest(*owners):
                self.rounds.append([Bucket(getattr(mesh, name), r, pieces) for r, pieces in enumerate(some) if pieces])

        # What is owned here: masters, and an optimizer a bucket.
        self.masters, self.optimizers = {}, {}
        for bucket in self.buckets():
            if bucket.mine:
                for piece in bucket.pieces:
                    here = self.rows(piece)
                    self.masters[piece] = here if here.dtype == accumulation_dtype(here.dtype) else here.float()
                trained = [piece for piece in bucket.pieces if self.parameters[piece.name].requires_grad]
                if trained:
                    self.optimizers[bucket] = make([(piece.key, self.masters[piece]) for piece in trained])

        # Where the gradient of a parameter goes: name → [(bucket, piece, where in its sum)].
        self.places = {}
        for bucket in self.buckets():
            at = 0
            for piece in bucket.pieces:
                stop = at + numbers(piece, parameters[piece.name])
                self.places.setdefault(piece.name, []).append((bucket, piece, slice(at, stop)))
                at = stop
        if mesh.dp.size > 1:
            for name, p in parameters.items():
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(functools.partial(self.take, name))

    def buckets(self):
        return [bucket for some in self.rounds for bucket in some]

    def trained(self):
        """{piece: master} of what is owned here and not frozen."""
        return {piece: master for piece, master in self.masters.items() if self.parameters[piece.name].requires_grad}

    def rows(self, piece, of=None):
        """The rows of a piece in this rank's parameter, or in `of`, a tensor like it."""
        p = self.parameters[piece.name].detach() if of is None else of
        first = self.mesh.ep.rank * len(p) if p.ndim == 3 else 0
        return p if len(p) == piece.stop - piece.start else p[piece.start - first:piece.stop - first]

    def take(self, name, p):
        """Called by autograd when p.grad is complete."""
        self.accumulate(name, p.grad)
        p.grad = None

    @torch.no_grad()
    def accumulate(self, name, gradient):
        """Add a gradient of this rank to the sums of the buckets that its parameter is in."""
        for bucket, piece, where in self.places[name]:
            self.fill(bucket)
            bucket.gradient[where].add_(self.rows(piece, gradient).flatten())

    def fill(self, bucket):
        """A bucket has a sum: zeros where no gradient came, as for an expert without a token."""
        if bucket.gradient is None:
            p = self.parameters[bucket.pieces[0].name]
            size = sum(numbers(piece, self.parameters[piece.name]) for piece in bucket.pieces)
            bucket.gradient = torch.zeros(size, dtype=accumulation_dtype(p.dtype), device=p.device)

    def travel(self, buckets, start, land):
        """`start(bucket)` → (request, tensor), then `land(bucket, tensor)` when it is there. No more than
        `in_air` bytes are under way at a time, or one bucket; `arrive` waits for the rest."""
        for bucket in buckets:
            if bucket.axis.size == 1:
                land(bucket, None)
                continue
            room = self.in_air - gradient_bytes(bucket.pieces, self.parameters)
            while self.flying and sum(tensor.nbytes for _, tensor, *_ in self.flying) > room:
                self.arrive(1)
            request, tensor = start(bucket)
            self.flying.append((request, tensor, bucket, land))

    def arrive(self, n=None):
        """Land the n that left first, or all."""
        n = len(self.flying) if n is None else n
        for request, tensor, bucket, land in self.flying[:n]:
            with talking(self.mesh):
                request.wait()
            land(bucket, tensor)
        del self.flying[:n]

    @torch.no_grad()
    def reduce(self):
        """The mean over dp of all gradients, to the owners: into `master.grad`. That of an expert is the sum over its
        replicas, divided by dp too: its ranks have seen the tokens of all of dp."""
        n = self.mesh.dp.size
        if n == 1:
            for piece, master in self.trained().items():
                found = self.parameters[piece.name].grad
                master.grad = torch.zeros_like(master) if found is None else self.rows(piece, found)
            return

        def start(bucket):
            self.fill(bucket)
            with talking(self.mesh):
                return dist.reduce(bucket.gradient, group_dst=bucket.owner, group=bucket.axis.group,
                                   async_op=True), bucket.gradient

        def land(bucket, _):
            self.fill(bucket)
            if bucket.mine:
                bucket.gradient.div_(n)
                sizes = [self.masters[piece].numel() for piece in bucket.pieces]
                for piece, mine in zip(bucket.pieces, bucket.gradient.split(sizes)):
                    if self.parameters[piece.name].requires_grad:
                        self.masters[piece].grad = mine.view_as(self.masters[piece])
            bucket.gradient = None
        self.travel(self.buckets(), start, land)
        self.arrive()

    def set_rate(self, lr):
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr

    def forget(self):
        """The optimizers' moments begin anew."""
        for optimizer in self.optimizers.values():
            optimizer.state.clear()

    def drop(self):
        """After a step: gradients are not kept through the next one."""
        for tensor in (*self.parameters.values(), *self.masters.values()):
            tensor.grad = None

    @torch.no_grad()
    def clip_norm_(self, largest):
        """Scale the owners' gradients to a norm of at most `largest`. → the norm over all ranks, float64: squares are
        summed tensor by tensor, in the order of their names, so that no number of dp ranks changes it; then over the
        stages, each of which has other tensors."""
        index = {name: i for i, name in enumerate(sorted(self.parameters))}
        squares = torch.zeros(len(index), dtype=torch.float64, device=self.mesh.device)
        trained = self.trained()
        gradients = [master.grad for master in trained.values()]
        if gradients:
            norms = torch.stack(torch._foreach_norm(gradients, 2, torch.float64))
            where = torch.tensor([index[piece.name] for piece in trained], device=norms.device)
            squares.index_add_(0, where, norms.square())
        norm = all_sum(all_sum(squares, self.mesh, self.mesh.dp).sum(), self.mesh, self.mesh.pp).sqrt()
        if gradients and (norm.device.type != "cpu" or norm > largest):            # a GPU is not waited for
            torch._foreach_mul_(gradients, (largest / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @torch.no_grad()
    def step(self, update, follow):
        """Owners update their pieces (if `update`), `follow({key: master})` does what comes after, and everybody gets
        the new weights. In each round an owner first does its own bucket, then all of that round are sent: they travel
        while the next is computed."""
        trained = self.trained()
        for some in self.rounds:
            for bucket in some:
                if bucket.mine:
                    if update and bucket in self.optimizers:
                        self.optimizers[bucket].step()
                    follow({piece.key: trained[piece] for piece in bucket.pieces if piece in trained})
            self.travel(some, self.send_weights, self.take_weights)
        self.arrive()

    def send_weights(self, bucket):
        here = [self.rows(piece) for piece in bucket.pieces]       # of one dtype; the owner's masters may be wider
        flat = here[0].new_empty(sum(t.numel() for t in here))
        if bucket.mine:
            torch.cat([self.masters[piece].to(flat.dtype).flatten() for piece in bucket.pieces], out=flat)
        with talking(self.mesh):
            return dist.broadcast(flat, group_src=bucket.owner, group=bucket.axis.group, async_op=True), flat

    def take_weights(self, bucket, flat):
        for piece in bucket.pieces:
            here = self.rows(piece)
            if not bucket.mine:
                mine, flat = flat[:here.numel()], flat[here.numel():]
                here.copy_(mine.view_as(here))
            elif here.data_ptr() != self.masters[piece].data_ptr():
                here.copy_(self.masters[piece])

    def sound(self):
        """Whether this rank's own gradients are finite, before they are added to those of the others; a tensor."""
        found = [bucket.gradient for bucket in self.buckets() if bucket.gradient is not None]
        found += [p.grad for p in self.parameters.values() if p.grad is not None]
        return torch.nn.utils.get_total_norm(found).isfinite()

    def describe(self):
        """Where ranks have less to do than others, say so."""
        for axis in (self.mesh.dp, self.mesh.edp):
            buckets = [bucket for bucket in self.buckets() if bucket.axis is axis]
            busy = {bucket.owner for bucket in buckets if any(self.works[piece.name] for piece in bucket.pieces)}
            if axis.size > 1 and buckets and len(busy) < axis.size:
                yield f"{axis.size} ranks, but only {len(busy)} own a matrix: the others wait for its update"

    def tensors(self):
        """{key: tensor} of what this rank owns: masters, and "KEY:STATE" of its optimizers."""
        kept = {piece.key: master for piece, master in self.masters.items()}
        for optimizer in self.optimizers.values():
            kept |= optimizer.tensors()
        return kept

    @torch.no_grad()
    def load(self, saved, moments=True):
        """Masters, and the optimizer state that belongs to them, of a checkpoint (`Saved`) of any layout."""
        states = {}
        for name in saved:
            name, colon, state = name.partition(":")
            if colon and moments:
                states.setdefault(name, []).append(state)
        lost = [name for name in states if name not in self.parameters]
        if lost:
            raise ValueError(f"the optimizer state is of another model: {listed(lost)} unknown")
        own = {piece.key: piece for piece in self.masters}
        for piece, master in self.masters.items():
            master.copy_(saved.rows(piece.name, piece.start, piece.stop))
        for optimizer in self.optimizers.values():
            keys = [key for group in optimizer.param_groups for key in group["names"]]
            optimizer.load({f"{key}:{state}": saved.rows(f"{own[key].name}:{state}", own[key].start, own[key].stop)
                            for key in keys for state in states.get(own[key].name, ())})
