"""A round on several devices is that of one, and its program moves what the formula says; checks run in a process of eight devices."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import fedmoe_jax as fm
from fedmoe_jax import sharding
from fedmoe_jax.distributed import traffic
from tests import small_round

TESTS = Path(__file__).parent
EXPERTS = 8
CLOSE = 2e-6  # of weights and scores of order 1, after one to three rounds


def checks(which, timeout):
    """The lines that tests/mesh_checks.py prints."""
    command = [sys.executable, str(TESTS / "mesh_checks.py"), which]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def light():
    return checks("light", 540)


@pytest.fixture(scope="module")
def program(light):
    (line,) = (line for line in light if line["check"] == "program")
    found = [traffic.Collective(**each | {"shapes": tuple(map(tuple, each["shapes"]))}) for each in line["collectives"]]
    return line | {"collectives": found}


def test_what_is_exchanged_is_what_is_there(light):
    exact = [line["exact"] for line in light if line["check"] in ("take", "ring")]
    assert len(exact) == 4 and all(exact)


def test_rounds_are_those_of_one_device(light, program):
    apart = [line for line in light if "state" in line]
    assert {line["check"] for line in apart} == {"program", "kept"}
    assert max(max(line["state"], line["info"]) for line in apart) < CLOSE


def test_rules_that_collect_see_the_same_clients_in_the_same_order(light):
    (line,) = (line for line in light if line["check"] == "kept")
    assert line["all_but_residuals"] == 0 and line["state"] < 1e-9  # a client's own residual is what its program rounds it to


def test_state_is_spread_and_stays_where_it_is(program):
    assert program["kept"]
    assert program["fitness"] == "P(('client', 'expert'),)" and program["experts"] == "P('expert',)"


def test_no_device_has_all_experts(program):
    """Neither as a result of a collective nor of anything else."""
    assert program["stacks"] == ["[8,6,8]", "[8,8,6]"] and program["whole_stacks"] == []


def test_no_device_gets_the_data_of_the_population(program):
    """Only places for the clients that it trains: those of all are 4 x 22 rows, of each of 4 devices' two clients 9."""
    floats = [c for c in program["collectives"] if any(shape[-1:] == (program["floats"],) and len(shape) > 2 for shape in c.shapes)]
    examples = [c for c in floats if c.shapes[0][1:3] == (2, program["largest"])]
    assert [c.kind for c in examples] == ["reduce-scatter"] and examples[0].shapes == ((1, 2, program["largest"], program["floats"]),)
    gathered = [c for c in program["collectives"] if c.kind == "all-gather"]
    assert gathered and max(np.prod(shape) for c in gathered for shape in c.shapes) < program["examples"]


def test_bytes_are_those_of_the_formula(program):
    sizes = {name: program[name] for name in ("expert_bytes", "shared_bytes", "largest")}
    mesh = dict(clients=2, experts=2, cohort=11, chunk=2, num_experts=EXPERTS, candidates=3)
    expected = traffic.expected(**mesh, **sizes, example_bytes=4.0 * program["floats"] + 4)
    moved = dict.fromkeys(("examples", "ring", "sum", "rest"), 0.0)
    for each in program["collectives"]:
        assert each.times is not None
        of_data = each.kind == "reduce-scatter" and program["largest"] in each.shapes[0]
        kind = "ring" if "ppermute" in each.name else "examples" if of_data else "rest"
        kind = "sum" if each.kind == "all-reduce" and "psum" in each.name else kind
        moved[kind] += each.bytes * each.times
    counts = 4 * (EXPERTS / 2 + 1)  # tokens of a device's experts, and examples
    assert moved["examples"] == expected["examples"]
    assert moved["ring"] == expected["gather"] + expected["combine"] + 2 * counts
    assert moved["sum"] == expected["sum"] + counts
    assert moved["rest"] < 4 * 11 * 80  # whole numbers and scores of 11 clients


def test_checkpoints_go_on_with_another_number_of_devices(light):
    (line,) = (line for line in light if line["check"] == "checkpoint")
    assert line["there"] == line["back"] == 0 and line["on"] < CLOSE and line["placed"]


def test_fetching_is_chosen_where_fewer_slots_than_experts_are_wanted():
    sizes = dict(cohort=64, chunk=8, expert_bytes=100.0, shared_bytes=10.0, example_bytes=4.0, largest=5)
    few = traffic.expected(clients=1, experts=2, num_experts=64, candidates=3, **sizes)
    many = traffic.expected(clients=1, experts=2, num_experts=32, candidates=3, **sizes)
    assert few["gather"] == 4 * 24 * 100 and many["gather"] == 4 * 16 * 100 and few["sum"] == 0


def test_turns_of_loops_in_a_program_are_counted():
    program = """
%inner (p: f32[]) -> f32[] {
  %a = f32[8,2]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}, metadata={op_name="jit(f)/g"}
}
ENTRY %main (p: f32[]) -> f32[] {
  %w = (s32[], f32[]) while(%t), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  %r = (f32[4]{0}, u8[2]{0}) all-reduce(%y, %z), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%sum
  %b = f32[2]{0} collective-permute(%x), source_target_pairs={{0,1}}
}
"""
    gather, reduce, permute = traffic.collectives(program, 8)
    assert gather == ("all-gather", ((8, 2),), 4, 48.0, 3, "jit(f)/g")
    assert (reduce.devices, reduce.bytes, reduce.times) == (8, 2 * 7 / 8 * 18, 1)
    assert (permute.kind, permute.bytes) == ("collective-permute", 8.0)
    begun = """
  %s = ((f32[4,2]{1,0}, u8[4]{0}), (f32[2,2]{1,0}, u8[2]{0}), u32[]) reduce-scatter-start(%x, %y), replica_groups={{0,1}}, to_apply=%sum
  %d = f32[2,2]{1,0} reduce-scatter-done(%s)
  %g = (f32[2]{0}, f32[4]{0}) all-gather-start(%x), replica_groups={{0,1}}, dimensions={0}
  %a = (f32[4]{0}, u8[2]{0}) all-reduce-start(%y, %z), replica_groups={{0,1}}, to_apply=%sum
  %b = ((f32[4]{0}, u8[2]{0}), (f32[4]{0}, u8[2]{0}), u32[]) all-reduce-start(%y, %z), replica_groups={{0,1}}, to_apply=%sum
  %c = (f32[4]{0}, f32[4]{0}) all-reduce-start(%y), replica_groups={{0,1}}, to_apply=%sum
  %d = f32[4]{0} all-reduce-start(%y), replica_groups={{0,1}}, to_apply=%sum
"""
    found = [(c.kind, c.bytes) for c in traffic.collectives(begun, 2)]
    sums = [("all-reduce", 18), ("all-reduce", 18), ("all-reduce", 16), ("all-reduce", 16)]
    assert found == [("reduce-scatter", 18), ("all-gather", 8), *sums]
    unknown = program.replace(', backend_config={"known_trip_count":{"n":"3"}}', "")
    assert traffic.collectives(unknown, 8)[0].times is None


def test_one_device_is_as_without_a_mesh():
    mesh, data = fm.distributed.mesh(1), small_round.population()
    assert sharding.checked(mesh, 4) is None and fm.distributed.place(data, mesh) is data


def test_meshes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="experts is 2, it must be from 1 to the number of devices, 1"):
        fm.distributed.mesh(1, 2, devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="clients is 3, it must be from 1 to 1"):
        fm.distributed.mesh(3, devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="mesh has the axes"):
        small_round.algorithm(mesh=jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]))
    three = jax.sharding.Mesh(np.array(jax.devices()[:1] * 3).reshape(1, 3), sharding.AXES)
    with pytest.raises(ValueError, match="mesh has 3 devices along expert, they must divide the experts of a group, 4"):
        sharding.checked(three, 4)


def looks_right(lines):
    assert len(lines) == 8 * 10 + 16 and {line["clients"] * line["experts"] for line in lines} == {1, 2, 4, 8}
    for line in lines:  # Adam magnifies the rounding of gradients that are about as small as its epsilon
        assert max(line["state"], line["info"]) < (1e-3 if line["check"] == "adam" else 2e-5), line


@pytest.mark.slow
def test_all_aligners_and_options():
    """Both engines on 1, 2, 4 and 8 devices; results are committed in tests/results/mesh.json."""
    looks_right(checks("aligners", 7200) + checks("options", 7200))


@pytest.mark.slow
def test_the_command_trains_on_several_devices_and_goes_on_with_others():
    (line,) = checks("command", 900)
    assert line["statuses"] == [0, 0, 0] and line["apart"] < 1e-4, line


def test_committed_results_look_right():
    looks_right(json.loads((TESTS / "results" / "mesh.json").read_text()))


@pytest.mark.slow
def test_what_clients_send_arrives_and_devices_that_are_left_out_are_seen():
    found = {line["check"]: line["holds"] for line in checks("mass", 540)}
    assert found == {"good, primal": True, "good, dual": True, "not summed over clients": False, "a device left out": False}


@pytest.mark.slow
def test_a_client_with_broken_data_is_left_out_on_all_devices():
    found = checks("broken", 600)
    assert len(found) == 8 and all(max(line["state"], line["info"]) < 2e-5 for line in found), found
