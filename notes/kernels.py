"""Compile every Triton kernel for GPUs that are not here, and read what came out.

  python -m notes.kernels           # every kernel at real shapes: writes kernels.csv and kernels.md's table
  python -m notes.kernels --plot    # the table from kernels.csv alone

Triton's compiler needs no device: it is told a target, and it comes with NVIDIA's assembler and AMD's. What a
device would refuse, or what would make a kernel slow, shows in the result: shared memory beyond the chip's,
registers that spill to memory, a matmul without matrix instructions.
"""
import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kernels

CSV = Path(__file__).with_suffix(".csv")


class Target(NamedTuple):
    """A chip that a kernel is compiled for."""
    gpu: GPUTarget
    shared: int                    # most bytes of shared memory that a program may have
    matrix: str                    # a matrix instruction, as a regular expression


TARGETS = {"sm_80": Target(GPUTarget("cuda", 80, 32), 163 << 10, r"\bmma\.sync"),                 # A100
           "sm_90": Target(GPUTarget("cuda", 90, 32), 227 << 10, r"\bwgmma\.mma_async"),          # H100
           "sm_100": Target(GPUTarget("cuda", 100, 32), 227 << 10, r"\b(tcgen05\.mma|mma\.sync)"),  # B200
           "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 << 10, r"\bv_mfma")}               # MI300


class Proof(NamedTuple):
    """A kernel as its launcher calls it, at a real shape."""
    name: str
    kernel: object
    signature: dict                # argument → its type, "constexpr" if it is a constant
    constexprs: dict               # the constants
    options: dict                  # warps, stages
    matmul: bool = False           # whether it must have matrix instructions
    odd: tuple = ()                # sizes that are no multiple of 16
    targets: tuple = tuple(TARGETS)
    spills: int = 0                # bytes of a thread that may be spilled


def poly_norm(D, gated, odd=()):
    """Forward and backward of bfloat16, with float32 coefficients."""
    options = kernels.poly_norm_block(D)
    constexprs = dict(BLOCK=options.pop("BLOCK"))
    types = dict.fromkeys(("x_ptr", "u_ptr", "y_ptr", "g_ptr", "dx_ptr", "du_ptr"), "*bf16")
    types |= dict.fromkeys(("w_ptr", "b_ptr", "r_ptr", "sums_ptr"), "*fp32")
    types |= dict(D="i32", eps="fp32", BLOCK="constexpr")
    if not gated:
        constexprs |= dict(u_ptr=None, du_ptr=None)
        types |= dict(u_ptr="constexpr", du_ptr="constexpr")
    for what, kernel in (("forward", kernels.poly_norm_forward_kernel),
                         ("backward", kernels.poly_norm_backward_kernel)):
        yield Proof(f"PolyNorm{', gated' if gated else ''}, width {D}, {what}", kernel,
                    {arg: types[arg] for arg in kernel.arg_names},
                    {arg: value for arg, value in constexprs.items() if arg in kernel.arg_names}, options,
                    odd=odd)


def fp8(dtype):
    """Pack and unpack, from and to a dtype."""
    options = dict(kernels.FP8_ROWS, enable_fp_fusion=False)
    constexprs = dict(ROWS=options.pop("ROWS"), TILE=kernels.TILE)
    types = dict(x_ptr=f"*{dtype}", codes_ptr="*u8", scale_ptr="*fp32", N="i32", D="i32", tiles="i32")
    types |= dict.fromkeys(constexprs, "constexpr")
    for what, kernel in (("pack", kernels.fp8_pack_kernel), ("unpack", kernels.fp8_unpack_kernel)):
        yield Proof(f"FP8 tiles, {what}, {dtype}", kernel, {arg: types[arg] for arg in kernel.arg_names},
                    constexprs, options, odd=("tiles",))


ENGINE = "hopper", "blackwell"     # families of chips with an engine that copies tiles


def tile_type(of, dtype, *shape):
    """The type of a tensor that is loaded by tiles: where an engine copies them, a descriptor."""
    return f"tensordesc<{dtype}[{','.join(map(str, shape))}]>" if of in ENGINE else "*" + dtype


def symmetric(of, targets):
    """x·xᵀ, and the closing step of Newton–Schulz's polynomial."""
    kernel = kernels.symmetric_kernel
    block, step, warps, stages = kernels.SYMMETRIC_TILES[2]
    types = dict(rows=tile_type(of, "bf16", block, step), x="*bf16", c="*bf16", ratio="fp32", beta="fp32",
                 **dict.fromkeys(("B", "m", "n"), "i32"))
    for name, square in (("symmetric product", False), ("symmetric square", True)):
        constants = dict(SQUARE=square, BLOCK=block, STEP=step, GROUP=8)
        types |= dict.fromkeys(constants, "constexpr")
        yield Proof(name, kernel, {arg: types[arg] for arg in kernel.arg_names}, constants,
                    tile_options(of, warps, stages), True, ("B",), targets)


def experts(of, targets):
    """The three products of experts of 7168 × 2048, with large tiles and small ones."""
    large, small, without_engine = kernels.GROUPED_TILES[2]
    for size, tiles in (("large", large if of in ENGINE else without_engine), ("small", small)):
        block_m, block_n, step, warps, stages = tiles
        options = tile_options(of, warps, stages)
        numbers = dict.fromkeys(("M", "E", "n", "width", "O", "D"), "i32") | dict(ends="*i64", y="*bf16")
        kernel = kernels.grouped_kernel
        for name, inner, of_w in (("forward", 2, (block_n, step)), ("by input", 1, (step, block_n))):
            constants = dict(INNER=inner, EXPERTS=32, BLOCK_M=block_m, BLOCK_N=block_n, STEP=step, GROUP=8)
            types = numbers | dict(x=tile_type(of, "bf16", block_m, step), w=tile_type(of, "bf16", 1, *of_w))
            types |= dict.fromkeys(constants, "constexpr")
            yield Proof(f"experts, {name}, {size}", kernel, {arg: types[arg] for arg in kernel.arg_names},
                        constants, options, True, ("M", "E"), targets)
        kernel = kernels.grouped_weight_kernel
        constants = dict(BLOCK_O=block_m, BLOCK_D=block_n, STEP=step, GROUP=8)
        types = numbers | dict(g=tile_type(of, "bf16", step, block_m), x=tile_type(of, "bf16", step, block_n),
                               dw="*fp32", **dict.fromkeys(constants, "constexpr"))
        yield Proof(f"experts, by weight, {size}", kernel, {arg: types[arg] for arg in kernel.arg_names},
                    constants, options, True, ("M", "E"), targets)


def tile_options(of, warps, stages):
    """AMD's GPUs have shared memory for two stages."""
    return dict(num_warps=warps, num_stages=2 if of == "hip" else stages)


# Bytes that a thread may spill where an H200 is faster so than with a tile that spills nothing
FASTER_WITH_SPILLS = {"attention 128/256, keys": 112}


def flash(of, targets):
    """Flash attention's kernels with the tiles of a row of FLASH_TILES: plain, latent and differential
    widths, without documents and with them."""
    for d, dv, maps in ((128, 128, 1), (192, 128, 1), (128, 256, 2)):
        for documents in (False, True):
            for kind, (constants, options) in kernels.flash_plan(of, d, dv, documents).items():
                kernel = dict(forward=kernels.flash_forward_kernel, queries=kernels.flash_queries_kernel)
                kernel = kernel.get(kind, kernels.flash_keys_kernel)
                given = dict(constants, MAPS=maps, DOCS=documents)
                if kind == "forward":
                    given["WANT_MAX"] = True
                name = f"attention {d}/{dv}, {kind}" + ", documents" * documents
                odd = ("starts_b", "H", "Hv")

                # The backward at widths beyond 128 may spill a little
                spills = 0
                if kind != "forward" and (d, dv) != (128, 128):
                    spills = 64
                if of == "hopper":
                    spills = FASTER_WITH_SPILLS.get(name, spills)
                yield Proof(name, kernel, flash_types(kernel, given, of), given, options, True, odd, targets,
                            spills)


def flash_types(kernel, constants, of):
    """{argument: its type}. Of tensors, the name says what their tiles are: queries and their like have M
    rows, keys and values N; the parts of queries and keys have D1 and D2 columns, values and their like V."""
    types = {}
    for name in kernel.arg_names:
        letter = name.removeprefix("d")[0]
        if name in constants:
            types[name] = "constexpr"
        elif name.endswith(("_in", "_out")) and of in ENGINE:
            rows = constants["M" if letter in "qyg" else "N"]
            columns = constants["V"]
            if letter in "qk":
                columns = constants["D2"] if "2" in name and constants["D2"] else constants["D1"]
            types[name] = f"tensordesc<bf16[1,1,{rows},{columns}]>"
        elif name.endswith(("_in", "_out")):
            types[name] = ("*bf16", "i32", "i32", "i32", "i32")
        elif name in ("starts_ptr", "until_ptr"):
            types[name] = "*i32"
        elif name.endswith("_ptr"):
            types[name] = "*fp32"
        else:
            types[name] = "fp32" if name.startswith("scale") else "i32"
    return types


# Tiles are loaded by Hopper's engine or by pointers, and chosen for what a chip has room for.
FAMILIES = ("cuda", ("sm_80",)), ("hopper", ("sm_90",)), ("blackwell", ("sm_100",)), ("hip", ("gfx942",))

# PolyNorm's kernels are the same for all widths from 2048 on that are multiples of 16
PROOFS = [*poly_norm(8192, True), *poly_norm(8192, False), *poly_norm(11_001, True, odd=("D",)),
          *fp8("bf16"), *fp8("fp32"),
          *(proof for of, targets in FAMILIES for make in (symmetric, experts, flash)
            for proof in make(of, targets))]


def compiled(proof, gpu):
    """What Triton makes of it. A launch notes which pointers and sizes are multiples of 16: most are, and
    memory is then read 16 bytes at a time."""
    attrs = {}
    for i, (name, kind) in enumerate(proof.signature.items()):
        places = [(i,)]
        if isinstance(kind, tuple):            # a pointer and its strides
            places = [(i, j) for j in range(len(kind))]
        elif kind[0] not in "*i" or name in proof.odd:
            continue
        attrs |= dict.fromkeys(places, [["tt.divisibility", 16]])
    source = ASTSource(proof.kernel, proof.signature, proof.constexprs, attrs)
    return triton.compile(source, target=gpu, options={"enable_fp_fusion": True, **proof.options})


def machine_code(binary):
    """(registers, bytes of a thread's stack) in a CUDA binary. Our kernels have no arrays of their own, so
    that a stack holds spilled registers and nothing else."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(binary)
        said = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return [int(number) for number in re.search(r"REG:(\d+) STACK:(\d+)", said).groups()]


def measure(proof, name):
    """One row: the kernel compiled for a target."""
    target = TARGETS[name]
    result = compiled(proof, target.gpu)
    if target.gpu.backend == "cuda":
        text = result.asm["ptx"]
        registers, spilled = machine_code(result.asm["cubin"])
    else:
        text = result.asm["amdgcn"]
        registers, spills = (int(re.search(rf"\.{what}: +(\d+)", text)[1])
                             for what in ("vgpr_count", "vgpr_spill_count"))
        spilled = 4 * spills
    return dict(kernel=proof.name, target=name, warps=proof.options["num_warps"], registers=registers,
                shared=result.metadata.shared, spilled=spilled,
                allowed=proof.spills, matrix=len(re.findall(target.matrix, text)), matmul=int(proof.matmul))


def faults(row):
    """What is wrong with a row, in words."""
    if row["shared"] > TARGETS[row["target"]].shared:
        yield f"{row['shared']:.0f} bytes of shared memory"
    if row["spilled"] > row["allowed"]:
        yield f"{row['spilled']:.0f} bytes spilled"
    if row["matmul"] and not row["matrix"]:
        yield "no matrix instructions"


def prove(proofs, targets=TARGETS):
    """Compile the proofs for the named targets, leaving nothing behind → rows."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            return [measure(proof, name) for proof in proofs for name in targets if name in proof.targets]
        finally:
            del os.environ["TRITON_CACHE_DIR"]


def table(rows):
    """One line a kernel: for each target warps, registers, shared memory, spills, matrix instructions."""
    cells = {}
    for row in rows:
        cell = f"{row['warps']:.0f} · {row['registers']:.0f} · {row['shared'] / 1024:.1f}"
        cell += f" · {row['spilled']:.0f}"
        cell += f" · {row['matrix']:.0f}" if row["matmul"] else ""
        cells.setdefault(row["kernel"], {})[row["target"]] = cell
    return [("kernel", *TARGETS),
            *((kernel, *(found.get(name, "–") for name in TARGETS)) for kernel, found in cells.items())]


def main(argv):
    from notes import _note                                        # late: it imports the whole repository
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", action="store_true", help="the table from the CSV alone")
    if not parser.parse_args(argv).plot:
        _note.write(CSV, prove(PROOFS))
    with open(CSV, newline="") as file:
        rows = [{k: v if k in ("kernel", "target") else float(v) for k, v in row.items()}
                for row in csv.DictReader(file)]
    _note.write_table(CSV.with_suffix(".md"), _note.table(*table(rows)))
    wrong = [f"{row['kernel']}, {row['target']}: {fault}" for row in rows for fault in faults(row)]
    print("\n".join([f"{len(rows)} compiled, {len(wrong)} faults", *wrong]))
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main(sys.argv[1:])
