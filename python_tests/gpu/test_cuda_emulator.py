"""The emulator in python_tests/cuda_host: correct kernels pass in any order, and planted bugs are found."""

import ctypes
import functools
import re

import pytest
import torch
from cuda_host import Emulator, build, guarded, missing
from cuda_host.build import HERE

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

VARIANTS = ("plain", "race", "undefined")
ORDERS = [("fifo", 0), ("reverse", 0), ("random", 1), *(("warp_priority", seed) for seed in range(4))]
every_build = pytest.mark.parametrize("variant", VARIANTS)
every_order = pytest.mark.parametrize(("order", "seed"), ORDERS)


@functools.cache
def library(stem, variant):
    return build([HERE / f"{stem}.cu"], stem, variant)


def run(variant, order, seed, launcher, reads, writes, *arguments, times=1):
    tensors = {**reads, **writes}
    arguments = [tensors.get(name, name) if isinstance(name, str) else name for name in arguments]
    with Emulator(library("unit", variant), order, seed, reads=reads, writes=writes) as emulator:
        for _ in range(times):
            emulator.launch(launcher, *arguments, None)


def unknown(*shape):
    return guarded(torch.full(shape, float("nan")))


# Correct kernels


@every_build
@every_order
def test_block_sum(variant, order, seed):
    rows, normal = guarded(torch.rand(5, 1000)), unknown(5, 1000)
    run(variant, order, seed, "unit_normalize", {"rows": rows}, {"normal": normal}, "rows", 5, 1000, "normal")
    torch.testing.assert_close(normal, rows / rows.sum(1, keepdim=True))


@every_build
@every_order
def test_last_block_finishes(variant, order, seed):
    values = guarded(torch.arange(20000.0) % 9)
    writes = {"partials": unknown(13), "ticket": guarded(torch.zeros(1, dtype=torch.int32)), "total": unknown(1)}
    arguments = ("values", 20000, 13, "partials", "ticket", "total")
    run(variant, order, seed, "unit_ticketed_sum", {"values": values}, writes, *arguments, times=2)
    assert writes["total"].item() == values.sum().item()
    assert writes["ticket"].item() == 0


@every_build
@every_order
def test_last_warp_finishes(variant, order, seed):
    values, sums = guarded(torch.arange(3 * 256.0) % 9), unknown(3)
    run(variant, order, seed, "unit_last_warp", {"x": values}, {"y": sums}, "x", 3, "y")
    assert torch.equal(sums, values.view(3, 256).sum(1))


@every_build
@every_order
def test_transposition(variant, order, seed):
    matrix, output = guarded(torch.rand(70, 45)), unknown(45, 70)
    run(variant, order, seed, "unit_transpose", {"x": matrix}, {"y": output}, "x", 70, 45, "y")
    assert torch.equal(output, matrix.T)


@every_build
@every_order
def test_warp_collectives(variant, order, seed):
    values = guarded(torch.randint(0, 100, (3 * 256,), dtype=torch.int32))
    sums = guarded(torch.full_like(values, -7))
    run(variant, order, seed, "unit_prefix", {"x": values}, {"y": sums}, "x", 3, "y")
    assert torch.equal(sums.view(-1, 32), values.view(-1, 32).cumsum(1, dtype=torch.int32))


@every_build
@every_order
def test_vector_copy(variant, order, seed):
    values, copy = guarded(torch.rand(4 * 300)), unknown(4 * 300)
    run(variant, order, seed, "unit_copy", {"x": values}, {"y": copy}, "x", 300, "y")
    assert torch.equal(values, copy)


@every_build
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversions_round_as_torch(variant, dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    below, above = (torch.nextafter(every, torch.tensor(float(sign + "inf"))) for sign in "-+")
    halfway = (every + torch.cat([every[1:], every[:1]])) / 2
    drawn = torch.randint(-(2**31), 2**31 - 1, (20000,), dtype=torch.int32).view(torch.float32)
    values = guarded(torch.cat([every, below, above, halfway, drawn]))
    stored, back = guarded(torch.zeros_like(values, dtype=dtype)), unknown(values.numel())
    launcher = "unit_half" if dtype == torch.float16 else "unit_bfloat16"
    run(variant, "fifo", 0, launcher, {"x": values}, {"s": stored, "y": back}, "x", values.numel(), "s", "y")
    expected = values.to(dtype)
    number = ~expected.isnan()
    assert torch.equal(stored[number].view(torch.int16), expected[number].view(torch.int16))
    assert torch.equal(back[number], expected[number].float())
    assert back[~number].isnan().all()


def test_portable_fibers(monkeypatch):
    monkeypatch.setenv("CXX", "g++ -DCUDA_HOST_UCONTEXT")
    portable = build([HERE / "unit.cu"], "unit-portable", "plain")
    values, sums = torch.randint(0, 100, (256,), dtype=torch.int32), torch.zeros(256, dtype=torch.int32)
    with Emulator(portable, "warp_priority", 1) as emulator:
        emulator.launch("unit_prefix", values, 1, sums, None)
    assert torch.equal(sums.view(-1, 32), values.view(-1, 32).cumsum(1, dtype=torch.int32))


# Planted bugs


SOURCE = (HERE / "planted.cu").read_text().splitlines()


def place(kernel, text):
    """Return a pattern for the first line with this text in a kernel, as a report names it."""
    start = next(i for i, line in enumerate(SOURCE) if re.search(rf"(void|float) {kernel}\(", line))
    line = next(i for i in range(start, len(SOURCE)) if text in SOURCE[i])
    return rf"python_tests/cuda_host/planted\.cu:{line + 1}\b"


def planted(kernel, variant, order="fifo", seed=0, bug=True):
    """Return "right", "wrong" or the error of two consecutive launches."""
    values = guarded(torch.arange(512.0) % 37 + 1)
    partials, ticket = unknown(4), guarded(torch.zeros(1, dtype=torch.int32))
    writes = {"partials": partials, "ticket": ticket}
    given = None if bug and kernel == "given_pointer" else partials
    for _ in range(2):
        output = guarded(torch.full((512,), -5.0))
        emulator = Emulator(
            library("planted", variant), order, seed, reads={"input": values}, writes={"output": output, **writes}
        )
        try:
            with emulator:
                emulator.launch(f"planted_{kernel}", int(bug), values, output, given, ticket, None)
        except RuntimeError as error:
            return str(error)
        if not torch.equal(output, expected(kernel, values)):
            return "wrong"
    return "right"


def expected(kernel, values):
    blocks = values.view(4, 128)
    if kernel == "barrier_before_read":
        return blocks.flip(1).flatten()
    if kernel == "barrier_before_overwrite":
        return (4 * blocks.sum(1, keepdim=True)).expand(4, 128).flatten()
    if kernel in {"warp_barrier", "shuffle_for_barrier"}:
        return values.view(-1, 2).flip(1).flatten()
    if kernel in {"fence_before_ticket", "fence_after_ticket", "fence_of_block", "ticket_reset"}:
        return values.sum().expand(512)
    if kernel == "divergent_mask":
        halves = values.view(-1, 2, 8, 2)
        return torch.stack([halves[:, 0].flip(-1), halves[:, 1]], 1).flatten()
    if kernel == "shuffle_from_gone":
        lanes = torch.arange(512) % 32
        return torch.where(lanes == 31, -5.0, values.view(-1, 32)[:, 30].repeat_interleave(32))
    if kernel == "unaligned_vector":
        return values.view(-1, 8)[:, 1:5].sum(1).repeat_interleave(8)
    return values


RACE = r"race on .*(read|write|atomic) by thread .*; (read|write|atomic) by thread .*planted\.cu:\d+"
# Outcomes in plain builds in order, in plain builds with warp priorities, with UBSan, and in race builds; None if the
# outcome is undetermined.
BUGS = {
    "barrier_before_read": ("wrong", "wrong", "wrong", RACE),
    "barrier_before_overwrite": ("right", "wrong", "right", RACE),
    "warp_barrier": ("wrong", "wrong", "wrong", RACE),
    "shuffle_for_barrier": ("right", "right", "right", RACE),
    "unwritten_shared": ("wrong", "wrong", "wrong", "wrong"),
    "fence_before_ticket": ("right", "right", "right", RACE),
    "fence_after_ticket": ("right", "right", "right", RACE),
    "fence_of_block": ("right", "right", "right", RACE),
    "ticket_reset": ("wrong", "wrong", "wrong", "wrong"),
    "atomic_count": ("right", "right", "right", RACE),
    "gone_before_barrier": (r"deadlock: .* waits at __syncthreads, .*; thread \(100, 0, 0\) has left the kernel",) * 4,
    "different_barriers": ("threads of one block meet at different barriers",) * 4,
    "divergent_mask": (r"deadlock: .*__syncthreads.*; thread .* waits at __shfl_xor_sync with mask 0xffffffff",) * 4,
    "own_lane_in_mask": (r"__shfl_sync with mask 0x0000ffff, .*: the mask does not name its own lane",) * 4,
    "shuffle_from_gone": ("wrong",) * 4,
    "unaligned_vector": (None, None, "undefined behavior", None),
    "past_tensor": (*(r"outside memory: just past the end of tensor input",) * 3, "read of 4 bytes outside"),
    "write_to_input": ("wrong", "wrong", "wrong", "write of 4 bytes to read-only memory: byte .* of tensor input"),
    "past_dynamic_shared": (
        *("outside memory: just past the end of dynamic shared memory",) * 3,
        "write of 4 bytes outside the tensors: just past the end of dynamic shared memory",
    ),
    "past_static_shared": ("wrong", "wrong", "undefined behavior", RACE),
    "given_pointer": (*("null pointer|address 0x",) * 2, "undefined behavior", "read of 4 bytes outside"),
    "bounded_stack": ("stack overflow",) * 4,
}
COLUMNS = {
    "plain": ("plain", [("fifo", 0)]),
    "priority": ("plain", [("warp_priority", seed) for seed in range(5)]),
    "undefined": ("undefined", [("fifo", 0)]),
    "race": ("race", [("fifo", 0), ("reverse", 0), ("random", 0), ("warp_priority", 0)]),
}


@pytest.mark.parametrize("kernel", BUGS)
@pytest.mark.parametrize("column", COLUMNS)
def test_planted_bug(kernel, column):
    variant, orders = COLUMNS[column]
    outcome = BUGS[kernel][list(COLUMNS).index(column)]
    for order in orders if outcome else []:
        found = planted(kernel, variant, *order)
        assert re.search(outcome, found), f"{order}: {found}"
        if outcome not in {"right", "wrong"}:
            assert re.match(rf"cudaErrorLaunchFailure: kernel {kernel}<true>, block \(\d, 0, 0\): ", found)


@every_build
@pytest.mark.parametrize("kernel", BUGS)
def test_nothing_is_found_without_the_bug(kernel, variant):
    assert [planted(kernel, variant, *order, bug=False) for order in ORDERS] == ["right"] * len(ORDERS)


def test_reports_name_the_lines():
    barrier = place("gone_before_barrier", "__syncthreads")
    assert re.search(rf"waits at __syncthreads, {barrier};", planted("gone_before_barrier", "plain"))
    shuffle = place("divergent_mask", "__shfl_xor_sync")
    assert re.search(rf"mask 0xffffffff, {shuffle}", planted("divergent_mask", "plain"))
    write, read = place("barrier_before_read", "copy[threadIdx.x] ="), place("barrier_before_read", "a.output")
    for order in ("fifo", "warp_priority"):
        report = planted("barrier_before_read", "race", order)
        assert re.search(write, report)
        assert re.search(read, report)
    partials = place("ticketed_sum", "a.partials[blockIdx.x] ="), place("ticketed_sum", "total += a.partials")
    report = planted("fence_before_ticket", "race")
    assert re.search(rf"write by thread .*{partials[0]}.*; read by thread .*{partials[1]}", report)
    assert re.search(place("past_tensor", "a.input"), planted("past_tensor", "plain"))
    assert re.search(place("unaligned_vector", "float4*>"), planted("unaligned_vector", "undefined"))


# The host side


def empty(grid=(1, 1, 1), block=(32, 1, 1), shared=0, limit=0, max_shared=0):
    with Emulator(library("planted", "plain"), max_shared=max_shared) as emulator:
        emulator.launch("planted_empty", *grid, *block, shared, limit, None)
        return emulator.counters


def test_launches_within_limits():
    before = empty().launches
    counters = empty(grid=(3, 2, 2), block=(16, 1, 64), shared=48 << 10)
    assert counters.launches == before + 1
    assert (*counters.grid, *counters.block, counters.dynamic_shared_bytes) == (3, 2, 2, 16, 1, 64, 48 << 10)
    assert empty(grid=(1, 65535, 1), block=(1, 1, 1)).grid[1] == 65535
    assert empty(shared=100 << 10, limit=100 << 10).dynamic_shared_bytes == 100 << 10
    assert empty(shared=232448, limit=232448).dynamic_shared_bytes == 232448


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ({"grid": (0, 1, 1)}, "InvalidConfiguration.*a dimension is zero"),
        ({"block": (1, 0, 1)}, "InvalidConfiguration.*a dimension is zero"),
        ({"block": (1025, 1, 1)}, "InvalidConfiguration.*more than 1024 threads"),
        ({"block": (64, 32, 1)}, "InvalidConfiguration.*more than 1024 threads"),
        ({"block": (1, 1, 65)}, "InvalidConfiguration.*more than 64 threads in z"),
        ({"block": (65536, 65536, 1)}, "InvalidConfiguration.*more than 1024 threads"),
        ({"grid": (2**31, 1, 1)}, r"InvalidConfiguration.*more than 2\^31 - 1 blocks"),
        ({"grid": (1, 65536, 1)}, "InvalidConfiguration.*more than 65535 blocks in y or z"),
        ({"grid": (1, 1, 65536)}, "InvalidConfiguration.*more than 65535 blocks in y or z"),
        ({"shared": (48 << 10) + 1}, "InvalidValue.*49153 bytes of dynamic shared memory, but 49152 are allowed"),
        ({"shared": 65537, "limit": 65536}, "InvalidValue.*65537 bytes of dynamic shared memory, but 65536"),
        ({"limit": 232449}, "InvalidValue.*232449 bytes of dynamic shared memory, but the device has 232448"),
        ({"limit": 101377, "max_shared": 101376}, "InvalidValue.*101377 bytes .* the device has 101376"),
    ],
)
def test_launches_beyond_limits(shape, text):
    with pytest.raises(RuntimeError, match=text):
        empty(**shape)
    # The refusal leaves no error behind.
    empty()


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match="no-such-compiler is not installed"):
        build([HERE / "unit.cu"], "unit", "plain")


def test_a_compiler_error_is_shown(tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text("#include <cuda_runtime.h>\n__global__ void kernel() { not_declared(); }\n")
    with pytest.raises(RuntimeError, match="not_declared"):
        build([source], "broken", "plain")


def test_errors_do_not_outlive_a_launch():
    emulator = Emulator(library("planted", "plain"))
    assert "deadlock" in planted("gone_before_barrier", "plain")
    assert planted("gone_before_barrier", "plain", bug=False) == "right"
    with emulator:
        assert emulator.library.planted_empty(*map(ctypes.c_int64, (1, 1, 1, 32, 1, 1, 0, 0)), None) == 0
