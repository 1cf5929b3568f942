"""What devices send each other in a compiled round, read off the program, and what they should by formula."""

import math
import re
from typing import NamedTuple

_BYTES = {"pred": 1, "s4": 1, "u4": 1, "bf16": 2}
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\]")
_OPERATION = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(-start)?\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_LOOP = re.compile(r"\bwhile\(.*body=%?([\w.\-]+)")
_TIMES = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(r"(?:calls|to_apply|branch_computations|true_computation|false_computation|called_computations)=\{?([%\w.\-, ]+)")


class Collective(NamedTuple):
    """One exchange of a program: what it is, the shapes of its results, devices of a group, bytes that each sends, and how often.

    `times` is None in a loop whose number of turns the program does not tell. `name` is where it was asked for.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    devices: int
    bytes: float
    times: int | None
    name: str


def collectives(program: str, num_devices: int, unknown: int | None = None) -> list[Collective]:
    """The exchanges of a compiled program.

    Args:
      program: its text, `compiled.as_text()`.
      num_devices: of the mesh.
      unknown: turns to count where a loop does not tell, such as 1 for a round of `fedmoe_jax.rounds`.

    Returns:
      Each with the bytes that a device sends, where rings of n devices send (n - 1) / n of the whole: twice for sums on all.
    """
    found, computation, callers = [], "", dict[str, tuple[str, int | None]]()
    for line in program.splitlines():
        if begins := _COMPUTATION.match(line):
            computation = begins[1]
        if loop := _LOOP.search(line):
            known = _TIMES.search(line)
            callers[loop[1]] = computation, int(known[1]) if known else unknown
        elif called := _CALLED.search(line):
            callers |= {name.strip().lstrip("%"): (computation, 1) for name in called[1].split(",")}
        if operation := _OPERATION.search(line):
            found.append((operation, line, computation))
    return [_one(operation, line, _turns(where, callers), num_devices) for operation, line, where in found]


def _turns(computation: str, callers: dict[str, tuple[str, int | None]]) -> int | None:
    """How often a computation runs."""
    times = 1
    while computation in callers:
        computation, here = callers[computation]
        if here is None:
            return None
        times *= here
    return times


def _one(operation: re.Match, line: str, times: int | None, num_devices: int) -> Collective:
    kind, arrays = operation[2], _ARRAY.findall(operation[1])
    operands = line[operation.end() :].partition(")")[0].count("%")
    tells_operands = kind != "all-reduce" or len(arrays) >= 2 * operands  # a sum may also tell its results alone
    if operation[3] and tells_operands:  # before the results, and counters after them
        arrays = [array for array in arrays if array != ("u32", "")]
        arrays = arrays[len(arrays) // 2 :]
    shapes = tuple(tuple(int(size) for size in sizes.split(",") if size) for _, sizes in arrays)
    size = sum(math.prod(shape) * _itemsize(kind_of) for shape, (kind_of, _) in zip(shapes, arrays, strict=True))
    devices = _group(line, num_devices)
    others = devices - 1
    sent = {
        "all-reduce": 2 * others / devices * size, "all-gather": others / devices * size, "reduce-scatter": others * size,
        "collective-permute": size, "all-to-all": others / devices * size,
    }[kind]  # fmt: skip
    name = re.search(r'op_name="([^"]*)"', line)
    return Collective(kind, shapes, devices, float(sent), times, name[1] if name else "")


def _itemsize(kind: str) -> int:
    return _BYTES.get(kind) or int(kind[1:]) // 8


def _group(line: str, num_devices: int) -> int:
    """Devices that exchange with each other, in one of the ways in which a program writes groups."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    if rows := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(rows[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(","))
    return num_devices


def expected(
    *,
    clients: int,
    experts: int,
    cohort: int,
    chunk: int,
    num_experts: int,
    candidates: int,
    expert_bytes: float,
    shared_bytes: float,
    example_bytes: float,
    largest: int,
) -> dict[str, float]:
    """Bytes that each device sends in a round, with an aggregator of sums.

    With n = clients x experts devices, chunks of m = `chunk` clients on each, T = ceil(cohort / (n m)) of them and E experts:

      examples  T (n - 1) m largest example_bytes                              those of the cohort, where the population is placed
      gather    T (experts - 1) min(m candidates, E / experts) expert_bytes    weights of the slots
      combine   T (experts - 1) (E / experts expert_bytes + shared_bytes)      totals pass round the ring
      sum       2 (clients - 1) / clients (E / experts expert_bytes + shared_bytes)

    What is left is small: whole numbers, and rows of scores of the cohort.

    Args:
      clients, experts: the mesh.
      cohort, chunk: clients of a round, and of a device at once.
      num_experts: E, of a group.
      candidates: experts of a group that a client receives, slots and probes.
      expert_bytes: one expert of every group.
      shared_bytes, example_bytes: the shared weights, one example with its label.
      largest: examples of the largest client.
    """
    devices, own = clients * experts, num_experts / experts
    chunk = min(chunk, -(-cohort // devices))
    chunks = -(-cohort // (devices * chunk))
    part = own * expert_bytes + shared_bytes
    return {
        "examples": chunks * (devices - 1) * chunk * largest * example_bytes,
        "gather": chunks * (experts - 1) * min(chunk * candidates, own) * expert_bytes,
        "combine": chunks * (experts - 1) * part,
        "sum": 2 * (clients - 1) / clients * part,
    }
