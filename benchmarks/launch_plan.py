"""What each kernel of a GPU takes of it, without one: registers, shared memory, programs at a time.

    python benchmarks/launch_plan.py [--target 90] [--quick]

Compiles every kernel of ``method/fast`` with the ptxas that comes with Triton, as it is launched at
the sizes of ``restricted_head.py`` and ``moclip_step.py``. Registers, bytes of the stack (what does
not fit into registers) and shared memory are read from the machine code. "programs" is how many
fit on one processor of an H100 at a time, "warps" how many of its 64 warps they are. The last line
is one JSON object. With --quick it is one way of each kernel, with all that can be switched on.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lrmc_ray.method.fast import (
    dense_loss,
    dense_triton,
    head_triton,
    loss_launch,
    moclip_launch,
    moclip_triton,
    parts_triton,
    rounding_triton,
    tail_triton,
    tile_triton,
)
from lrmc_ray.method.fast.chunk_table import CHUNK
from lrmc_ray.method.measure import NUM_ANGLE_BINS

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
REGISTERS, SHARED_BYTES, WARPS = 65_536, 227 * 1024, 64
"""Of one processor of compute capability 9.0."""
RESERVED_SHARED_BYTES = 1024
"""Of every program, by the driver."""
HIDDEN = (576, 2560, 2**14)
"""Sizes of the hidden state; the last is the largest that is taken."""
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
INTEGERS = {
    "offsets": "*i64",
    "bounds parts tile_rows entry_places blocks": "*i32",
    "token_ids tokens gold_ids rows tail_places entries positions partial_rows tail_ids": "*i32",
    "hidden_stride weight_stride target_stride upstream_stride": "i32",
    "num_hidden num_tail num_rows num_tokens": "i32",
}
FLOATS = {
    "logit_scale softcap first_rate second_rate decay step_size": "fp32",
    "outside tail_logits tail_logweights loss dlogits dhidden upstream": "*fp32",
    "partial partial_bias bias_target scales": "*fp32",
    "logprobs": "*fp16",
}


def signature(weight: str, **more: str) -> dict[str, str]:
    """Types of all arguments by name; those of another kernel do no harm."""
    found = {name: f"*{weight}" for name in ("hidden", "weight", "bias", "target")}
    for group in (INTEGERS, FLOATS):
        found |= {name: kind for names, kind in group.items() for name in names.split()}
    return found | more


def cases() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Name, kernel, types and constants of each way that a kernel is launched."""
    for weight, dtype in TYPES.items():
        for hidden in HIDDEN:
            tile = {**loss_launch.candidate_tile(hidden, dtype.itemsize), "GATHERS": True}
            options = {"HAS_BIAS": False, "HAS_CAP": False, "WANTS_GRADIENT": True}
            for name, is_anchor, has_tail in (
                ("restricted", False, False),
                ("restricted with tail", False, True),
                ("anchor with tail", True, True),
            ):
                flags = {"IS_ANCHOR": is_anchor, "HAS_TAIL": has_tail}
                title = f"candidate_loss, {name}, {weight}, D {hidden}"
                constants = {**options, **flags, **tile}
                yield title, head_triton.candidate_loss, signature(weight), constants
            yield from part_cases(weight, hidden, dtype.itemsize)
        ready = {"IS_ANCHOR": True, "HAS_TAIL": True, "GATHERS": False, **loss_launch.READY_TILE}
        yield (
            f"candidate_loss of given logits, {weight}",
            head_triton.candidate_loss,
            signature(weight),
            {**options, **ready},
        )
        yield from dense_cases(weight)
        rows = {"HAS_WEIGHT": True, "HAS_BIAS": False}
        yield (
            f"add_token_rows, {weight}",
            head_triton.add_token_rows,
            signature(weight),
            {**rows, **loss_launch.ROWS_TILE},
        )
        yield (
            f"add_partial_rows, {weight}",
            head_triton.add_partial_rows,
            signature(weight),
            {**rows, "BLOCK_D": loss_launch.ROWS_TILE["BLOCK_D"], "num_warps": 4},
        )
        forward = loss_launch.tail_tile(dtype)
        gradient = loss_launch.tail_tile(dtype, is_gradient=True)
        shape = {"HAS_BIAS": False, "HAS_CAP": False}
        for name, kernel, constants in (
            ("tail_products", tail_triton.tail_products, {**shape, **forward}),
            ("add_tail_to_hidden", tail_triton.add_tail_to_hidden, gradient),
            ("add_tail_to_weight", tail_triton.add_tail_to_weight, {**rows, **gradient}),
        ):
            yield f"{name}, {weight}", kernel, signature(weight), constants
        for name, kernel, constants in (
            (
                "tile_products",
                tile_triton.tile_products,
                {**shape, **loss_launch.dense_tile(dtype)},
            ),
            (
                "tile_gradients",
                tile_triton.tile_gradients,
                loss_launch.dense_tile(dtype, is_gradient=True),
            ),
        ):
            yield f"{name}, {weight}", kernel, signature(weight), constants
        yield from moclip_cases(weight)


def part_cases(
    weight: str, hidden: int, itemsize: int
) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """The kernels of positions in parts."""
    tile = loss_launch.part_tile(hidden, itemsize)
    types, title = signature(weight), f"{weight}, D {hidden}"
    options = {"HAS_BIAS": False, "HAS_CAP": False, **tile}
    yield f"part_products, {title}", parts_triton.part_products, types, options
    yield f"part_gradients, {title}", parts_triton.part_gradients, types, tile
    if weight == "fp32" and hidden == HIDDEN[0]:
        stretch = {name: loss_launch.ROWS_TILE[name] for name in ("BLOCK_D", "num_warps")}
        yield "add_parts", parts_triton.add_parts, types, stretch


def dense_cases(weight: str) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """The kernels of all logits; derivatives of float16 are divided, others are not."""
    kinds = {"logits": "*fp32", "dlogits": f"*{weight}", "scaled": f"*{weight}"}
    types = signature(weight, **kinds, state="*fp32", rests="*fp32")
    options = {"HAS_BIAS": False, "HAS_CAP": False, **dense_loss.TILE}
    for name, is_anchor, has_tail in (
        ("restricted", False, False),
        ("anchor with tail", True, True),
    ):
        flags = {"IS_ANCHOR": is_anchor, "HAS_TAIL": has_tail}
        title = f"{name}, {weight}"
        constants = {**options, **flags}
        if weight == "fp32":  # the products are, whatever the weight
            yield f"row_losses, {name}", dense_triton.row_losses, types, constants
        constants["DIVIDES"] = False
        yield f"row_derivatives, {title}", dense_triton.row_derivatives, types, constants


def moclip_cases(weight: str) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    wide = {
        name: "*i64" for name in ["table", "sizes", "owners", "starts", "spans", "bounds", "rows"]
    }
    wide |= {name: "*fp64" for name in ["partial", "dots", "numbers", "counts"]}
    doubles = signature(weight, **wide)
    kind = tl.bfloat16 if weight == "bf16" else tl.float32
    sizes = {"ALIGNED": True, "CHUNK": CHUNK, "BLOCK": moclip_launch.BLOCK, "num_warps": 4}
    types = {"GRAD_TYPE": kind, "MOMENT_TYPE": tl.float32}
    yield f"chunk_dots, {weight}", moclip_triton.chunk_dots, doubles, {**types, **sizes}
    flags = {"CLIP": "cautious", "SEES_CAPPED": False, "IS_CAUTIOUS": True, "IS_REDUCED": False}
    more = {"TOGETHER": moclip_launch.TOGETHER, "NUMBERS": moclip_launch.NUMBERS}
    constants = {"PARAM_TYPE": kind, **types, **flags, **sizes, **more, "BINS": NUM_ANGLE_BINS}
    yield f"chunk_update, cautious, {weight}", moclip_triton.chunk_update, doubles, constants
    for clip in ("project", "momentum", "none"):
        other = {**constants, "CLIP": clip, "IS_CAUTIOUS": False}
        yield f"chunk_update, {clip}, {weight}", moclip_triton.chunk_update, doubles, other
    if weight == "fp32":
        halves = {**constants, "MOMENT_TYPE": tl.bfloat16}
        yield "chunk_update, bf16 moments, fp32", moclip_triton.chunk_update, doubles, halves
        yield (
            "add_spans",
            moclip_triton.add_spans,
            doubles,
            {"TOGETHER": moclip_launch.TOGETHER, "num_warps": 4},
        )
        yield "set_to_one", rounding_triton.set_to_one, doubles, {"num_warps": 4}


def with_all_options(constants: dict[str, Any]) -> dict[str, Any]:
    """The constants of a way that does everything a kernel can."""
    return {name: True if value is False else value for name, value in constants.items()}


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], target: int) -> Any:
    """The kernel as Triton compiles it; pointers and sizes are multiples of 16, as they are."""
    constants = dict(constants)
    num_warps = constants.pop("num_warps")
    names = [parameter.name for parameter in kernel.params]
    kinds = {name: "constexpr" if name in constants else types[name] for name in names}
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if kinds[name].startswith("*") or (kinds[name] == "i32" and name != "upstream_stride")
    }
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=attributes)
    options = {"num_warps": num_warps}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def resources(binary: Any) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack, from the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", output)
    assert found is not None, output
    registers, stack = map(int, found.groups())
    warps = binary.metadata.num_warps
    # Registers are handed out to a warp in parts of 256.
    of_warp = -(-32 * registers // 256) * 256
    programs = min(
        REGISTERS // (of_warp * warps),
        SHARED_BYTES // (binary.metadata.shared + RESERVED_SHARED_BYTES),
        WARPS // warps,
    )
    loads = re.findall(r"ld\.global\.(?:\w+(?:::\w+)?\.)*(v[248]\.)?[bfsu]\d+", binary.asm["ptx"])
    return {
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": binary.metadata.shared,
        "num_warps": warps,
        "programs": programs,
        "warps": programs * warps,
        "wide_loads": sum(bool(width) for width in loads),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", type=int, default=90, help="compute capability, times 10")
    parser.add_argument("--quick", action="store_true", help="one way of each kernel")
    args = parser.parse_args()
    titles = ("registers", "stack", "shared", "programs", "warps")
    print(f"{'kernel':50s}" + "".join(f"{title:>10s}" for title in titles))
    rows = {}
    seen: set[str] = set()
    for name, kernel, types, constants in cases():
        if args.quick:
            if kernel.fn.__name__ in seen:
                continue
            seen.add(kernel.fn.__name__)
            is_wide = constants.get("WIDE")
            constants = with_all_options(constants) | ({} if is_wide is None else {"WIDE": is_wide})
        row = resources(compiled(kernel, types, constants, args.target))
        rows[name] = row
        values = (row[x] for x in ("registers", "stack_bytes", "shared_bytes", "programs", "warps"))
        print(f"{name:50s}" + "".join(f"{value:10d}" for value in values), flush=True)
    versions = {"triton": triton.__version__, "target": args.target}
    print(json.dumps({"benchmark": "launch_plan", **versions, "kernels": rows}))


if __name__ == "__main__":
    main()
