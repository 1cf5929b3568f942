"""Rounds of real clients, all in one process: those of the simulation, and what becomes of clients that vanish, lie or come late."""

import dataclasses
import json
import threading
from multiprocessing import connection

import jax
import numpy as np
import pytest
import real_clients as real

from fedmoe_jax.deploy import layout as layouts
from fedmoe_jax.deploy import loop, messages, terms, worker
from fedmoe_jax.deploy.client import Client
from fedmoe_jax.deploy.loop import Reply
from fedmoe_jax.deploy.messages import RefusedError
from fedmoe_jax.deploy.server import Server
from fedmoe_jax.training import metrics
from fedmoe_jax.training.evaluate import evaluate_run
from fedmoe_jax.training.export import export_run, load
from fedmoe_jax.training.interrupt import StoppedError

pytest.importorskip("safetensors", reason="safetensors is not installed")

NODES = [f"node-{number}" for number in range(4)]


def assert_close(state, expected):
    """All of a state but the pace, for which real seconds count."""
    states = ({name: value for name, value in vars(each).items() if name not in ("key", "pace")} for each in (state, expected))
    for leaf, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-6)


def weight_bytes(message, kind):
    """Bytes of weights in a message."""
    arrays = messages.decode(message, kind, most_bytes=1 << 30).arrays
    return sum(value.nbytes for name, value in arrays.items() if name.startswith(("shared.", "expert.")))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, made data, clients, server after three rounds that were compared with the simulation, its notes)."""
    folder, made, notes = tmp_path_factory.mktemp("deploy"), real.data(), []
    real.write(folder, made)
    of, members = real.config(folder, router_prior=2.0), real.clients(folder)
    states, infos, built = real.simulated(made, of)
    server = real.served(folder, of, members, notes.append)
    assert server.setup.solo_examples == built.solo_examples
    for number, info in enumerate(infos):
        tasks = server.open(NODES)
        assert set(tasks) == set(NODES)
        sent = real.updates(tasks, members)
        assert sum(weight_bytes(task, "task") for task in tasks.values()) == info.bytes_down
        assert sum(weight_bytes(update, "update") for update in sent.values()) == info.bytes_up
        for node in reversed(sent):
            assert server.accept(node, sent[node])
        record = server.close()
        assert_close(server.state, states[number + 1])
        for name in ("train_loss", "load", "fitness_mean", "bytes_down", "bytes_up", "coverage"):
            np.testing.assert_allclose(record[name], getattr(info, name), rtol=1e-5)
    assert infos[1].bytes_down < infos[0].bytes_down  # what clients still have is not sent again
    return folder, made, members, server, notes


@pytest.fixture
def server(run):
    """The server as it is after three rounds, whatever other tests did to it."""
    *_, server, _ = run
    before, config = (server.state, dict(server.roster.clients)), server.config
    yield server
    server.config = config
    server.state, server.roster.clients, server._open, server._rejected = *before, None, 0
    server.checkpoints.save(3, server.state, {"run": server.roster.run})
    server.log.truncate(3)


def test_three_rounds_are_those_of_the_simulation_and_leave_a_run(run):
    folder, made, _, server, notes = run
    assert [line for line in notes if "refused" in line] == []
    summary = server.finish()
    records = metrics.read(folder / "run" / "metrics.jsonl")
    assert [record["round"] for record in records] == [0, 1, 2] and summary["last"]["eval_accuracy"] is not None
    assert (folder / "run" / "weights.npz").exists()
    told = evaluate_run(folder / "run", server.config, server.config.data)
    assert told["eval_accuracy"] == summary["last"]["eval_accuracy"] and "client_accuracy_mean" not in told
    held = export_run(folder / "run", server.config, folder / "export", client=1)["held"]
    assert len(set(held)) == 2 and load(folder / "export").logits(made[0][:5]).shape == (5, real.CLASSES)


def test_a_server_that_died_goes_on_where_its_last_round_ended(run, server):
    folder, _, members, *_ = run
    server.open(NODES)  # and dies
    again = Server(server.config, folder / "run", note=lambda line: None)
    again.start()
    assert again.done == 3 and again.roster == server.roster and again.terms == server.terms
    assert_close(again.state, server.state)
    assert not again.accept("node-0", b"")  # nothing is asked of it before the round begins again
    assert again.enter("node-0", members[0].hello()) == 0


def test_a_task_has_the_assigned_experts_only_that_the_client_does_not_have(server):
    held = server.state.cache
    for node, task in server.open(NODES).items():
        found = messages.decode(task, "task", most_bytes=1 << 30)
        wanted = {e for e in found.header["held"] + found.header["probed"] if e >= 0}
        number = int(node[-1])
        fresh = {e for e in wanted if e in held.experts[number] and server.state.last_trained[e] < held.round[number]}
        assert {int(name.split(".")[1]) for name in found.arrays if name.startswith("expert.")} == wanted - fresh
        assert len(wanted) == 3


def merged(server, before, sent, name="into.kernel"):
    """A shared weight after FedAvg of these updates, by the book."""
    found = [messages.decode(update, "update", most_bytes=1 << 30) for update in sent]
    examples = sum(message.header["examples"] for message in found)
    assert all(np.abs(message.arrays[f"shared.{name}"]).max() > 1e-4 for message in found)
    change = sum(message.header["examples"] * message.arrays[f"shared.{name}"] for message in found) / examples
    return layouts.host(before.shared)[name] + change


def test_clients_that_vanish_are_left_out_and_said_to_have_nothing(run, server):
    _, _, members, _, notes = run
    before, tasks = server.state, server.open(NODES)
    sent = real.updates(tasks, members)
    for node in NODES[:2]:
        assert server.accept(node, sent[node])
    assert server.waiting == {2, 3}
    record = server.close()
    assert "nothing came from clients [2, 3]" in notes[-1]
    assert record["dropped_clients"] == 2 and record["rejected_updates"] == 0 and sum(record["load"]) == 4
    np.testing.assert_allclose(
        layouts.host(server.state.shared)["into.kernel"], merged(server, before, [sent[n] for n in NODES[:2]]), atol=1e-6
    )
    assert (np.asarray(server.state.cache.experts)[[2, 3]] == -1).all()
    np.testing.assert_array_equal(server.state.aligner.fitness.value[2:], before.aligner.fitness.value[2:])
    assert np.isfinite(server.state.pace).all()


def test_a_round_without_clients_changes_no_weights(server):
    before = server.state
    assert server.open([]) == {}
    record = server.close()
    assert record["unavailable_clients"] == 5 and server.done == 4
    jax.tree.map(np.testing.assert_array_equal, (server.state.experts, server.state.shared), (before.experts, before.shared))


def test_a_cohort_is_drawn_from_those_who_are_there(run, tmp_path):
    folder, _, members, *_ = run
    server = real.served(tmp_path, dataclasses.replace(real.config(folder), population=200, cohort=3), members)
    seen = []
    for _ in range(6):
        tasks = server.open(NODES[:3] if len(seen) == 5 else NODES)
        assert len(tasks) == 3 and server.waiting == {int(node[-1]) for node in tasks}
        seen.append(frozenset(tasks))
        assert server.close()["unavailable_clients"] == 0
    assert len(set(seen)) > 1 and seen[5] == frozenset(NODES[:3])


def altered(update, header=None, **arrays):
    """An update with other fields and arrays; None takes one away."""
    found = messages.decode(update, "update", most_bytes=1 << 30)
    values = {name: value for name, value in (found.arrays | arrays).items() if value is not None}
    return messages.encode("update", found.header | (header or {}), values)


BAD = {
    "no message": lambda update: b"nonsense",
    "it has": lambda update: update + bytes(1 << 20),
    "it is a task": lambda update: messages.encode("task", {}, {}),
    "it is of run, round and client": lambda update: altered(update, {"round": 2}),
    "'other'": lambda update: altered(update, {"run": "other"}),
    "3)": lambda update: altered(update, {"client": 3}),
    "it is of 8 examples": lambda update: altered(update, {"examples": 8}),
    "train_loss of its header": lambda update: altered(update, {"train_loss": "low"}),
    "its header has or lacks": lambda update: altered(update, {"more": 1}),
    "it lacks shared.into.kernel": lambda update: altered(update, **{"shared.into.kernel": None}),
    "it has expert.99.moe.w_in": lambda update: altered(update, **{"expert.99.moe.w_in": np.zeros(3, np.float32)}),
    "not float32[6, 8]": lambda update: altered(update, **{"shared.into.kernel": np.zeros((8, 6), np.float32)}),
    "is float64": lambda update: altered(update, **{"shared.into.kernel": np.zeros((6, 8))}),
    "shared.into.kernel is not finite": lambda update: altered(update, **{"shared.into.kernel": np.full((6, 8), np.nan, np.float32)}),
    "tokens has numbers below 0": lambda update: altered(update, tokens=np.array([-1, 1], np.int32)),
    "it tells of [1000": lambda update: altered(update, tokens=np.array([1000, 1], np.int32)),
    "shares that are right": lambda update: altered(update, correct=np.array([2, 0], np.float32)),
    "losses below 0": lambda update: altered(update, solo_loss=np.array([-9, 0, 0], np.float32)),
    "its own training is not finite": lambda update: altered(update, {"rejected": True}),
    "it is a ??[31m": lambda update: messages.encode("\ud800\x1b[31m", {}, {}),  # what no log or terminal can take
    "run, round and client ('aaaa": lambda update: altered(update, {"run": "a" * 50_000}),
}


def test_updates_that_are_not_what_they_must_be_are_refused_told_and_counted(run, server):
    _, _, members, _, notes = run
    before, sent = server.state, real.updates(server.open(NODES), members)
    for reason, bad in BAD.items():
        assert not server.accept("node-1", bad(sent["node-1"]))
        assert reason in notes[-1] and "node-1" in notes[-1] and notes[-1].isprintable() and len(notes[-1]) < 400
    assert not server.accept("stranger", sent["node-1"]) and "nothing is asked of it" in notes[-1]
    for node in ("node-0", "node-2", "node-3"):
        assert server.accept(node, sent[node])
    assert not server.accept("node-0", sent["node-0"]) and "has sent its update before" in notes[-1]
    assert server.waiting == set()
    record = server.close()
    assert record["rejected_updates"] == len(BAD) + 2
    good = [sent[node] for node in ("node-0", "node-2", "node-3")]
    np.testing.assert_allclose(layouts.host(server.state.shared)["into.kernel"], merged(server, before, good), atol=1e-6)
    assert not server.accept("node-1", sent["node-1"]) and "nothing is asked of it" in notes[-1]  # too late
    server.open(NODES)
    assert not server.accept("node-1", sent["node-1"]) and "it is of run, round and client" in notes[-1]  # and stale


def test_updates_of_earlier_rounds_are_refused_and_the_real_ones_still_waited_for(run, server):
    _, _, members, _, notes = run
    late = real.updates(server.open(NODES[:2]), members)
    assert server.accept("node-0", late["node-0"])
    server.close()
    assert not server.accept("node-1", late["node-1"]) and "nothing is asked of it" in notes[-1]  # between two rounds
    server.refuse("node-1", "it broke")
    sent = real.updates(server.open(NODES[:2]), members)
    assert not server.accept("node-1", late["node-1"]) and "it is of run, round and client" in notes[-1]
    assert not server.accept("node-1", b"nonsense", stale=True) and "it is late" in notes[-1]
    assert server.waiting == {0, 1}
    for node, update in sent.items():
        assert server.accept(node, update)
    record = server.close()
    assert record["rejected_updates"] == 4 and record["dropped_clients"] == 0
    server.open(NODES[:2])
    assert server.close()["rejected_updates"] == 0


def test_numbers_that_are_too_large_for_sums_do_not_reach_the_model(run, server):
    _, _, members, *_ = run
    before, sent = server.state, real.updates(server.open(NODES), members)
    assert server.accept("node-0", altered(sent["node-0"], **{"shared.into.kernel": np.full((6, 8), 3e38, np.float32)}))
    for node in NODES[1:]:
        assert server.accept(node, sent[node])
    assert server.close()["rejected_updates"] == 1
    good = [sent[node] for node in NODES[1:]]
    np.testing.assert_allclose(layouts.host(server.state.shared)["into.kernel"], merged(server, before, good), atol=1e-6)


def test_messages_have_room_for_the_names_of_many_arrays():
    wanted = {f"expert.{expert}.layers.11.experts.w_{expert}": messages.Array((1, 2, 3)) for expert in range(2000)}
    data = messages.encode("update", {}, {name: np.zeros(shape, dtype) for name, (shape, dtype) in wanted.items()})
    assert int.from_bytes(data[:8], "little") > 1 << 17 and len(data) < messages.most_bytes(wanted)
    few = {name: wanted[name] for name in list(wanted)[:1]}
    assert 24 < messages.most_bytes(few) < 1 << 17


def test_a_client_that_comes_late_takes_part_from_then_on(run, server):
    folder, made, *_ = run
    if not (folder / "late").exists():
        (folder / "late").mkdir()
    np.savez(folder / "late" / "data.npz", x=made[0][:7], y=made[1][:7])
    late = Client(folder / "late", folder / "late" / "kept")
    (folder / "late" / "kept" / "profile.json").write_text(json.dumps(real.FAST))
    assert server.enter("node-late", late.hello()) == 4
    tasks = server.open([*NODES, "node-late"])
    assert set(tasks) == {*NODES, "node-late"}
    assert server.accept("node-late", late.train(tasks["node-late"]))
    assert server.close()["dropped_clients"] == 4 and server.state.cache.round[4] == 3


def test_strangers_and_their_numbers_are_refused(run, server):
    _, _, members, _, notes = run

    def hello(**changes):
        found = messages.decode(members[0].hello(), "hello", most_bytes=1 << 20)
        profile = changes.pop("profile", found.arrays["profile"])
        return messages.encode("hello", found.header | changes, {"profile": profile})

    for data, reason in (
        (b"", "no message"),
        (hello(number=3), "number 3 is not free"),
        (hello(number=5), "number 5 is not free"),
        (hello(number=4, shape=[7]), "its examples are of [7]"),
        (hello(number=4, classes=4), "4 classes"),
        (hello(number=4, examples=0), "0 examples"),
        (hello(number=4, profile=np.zeros(4, np.float32)), "to afford"),
        (hello(number=4, profile=np.full(4, np.inf, np.float32)), "not finite"),
        (hello(number=True), "number of its header"),
    ):
        assert server.enter("stranger", data) is None and reason in notes[-1]
    assert server.enter("node-0", hello(number=4)) is None  # it is number 0 already
    assert server.enter("node-0", hello(number=-1)) == 0
    assert server.enter("new", hello(number=-1)) == 4 and server.enter("newer", hello(number=-1)) is None


def test_clients_refuse_tasks_that_they_cannot_trust(run, server, tmp_path):
    folder, _, members, *_ = run
    task = messages.decode(server.open(NODES)["node-0"], "task", most_bytes=1 << 30)

    def refused(client=members[0], arrays=None, **changes):
        with pytest.raises(RefusedError) as caught:
            client.train(messages.encode("task", task.header | changes, task.arrays | (arrays or {})))
        return str(caught.value)

    told = task.header["terms"]
    foreign = told | {"config": told["config"] | {"model": "os:system"}}
    assert "is code that this client does not trust" in refused(terms=foreign)
    assert terms.read(foreign, trusted="os:system").config.model == "os:system"
    assert "its terms cannot be read" in refused(terms=told | {"config": {"model": "mlp"}})
    assert "the run is for [7] and 3" in refused(terms=told | {"shape": [7]})
    assert "its experts are not those" in refused(experts=task.header["experts"][1:])
    assert "no numbers" in refused(held=["a", 1])
    assert "is not finite" in refused(arrays={"prior": np.full(2, np.nan, np.float32)})
    forgetful = Client(folder / "client-0", tmp_path)
    there = [[expert, version, 1] for expert, version, _ in task.header["experts"]]
    kept = {name: value for name, value in task.arrays.items() if not name.startswith("expert.")}
    with pytest.raises(RefusedError, match="it counts on version"):
        forgetful.train(messages.encode("task", task.header | {"experts": there}, kept))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"router": "personal", "aligner": "balanced", "probes": 0, "top_k": 2},
        {"aggregator": "median", "clip_norm": 0.5, "reject_above": 5.0, "server_optimizer": "momentum", "local_steps": 3},
        {"fitness": "loss", "prox": 0.1, "client_optimizer": "adam", "shared_experts": 1, "cohort": 3},
        {"model": "transformer", "assignment": "per_layer", "model_options": {"features": 16, "heads": 2, "expert_hidden": 8}},
    ],
)
def test_other_rounds_are_those_of_the_simulation(tmp_path, changes):
    made = real.text() if changes.get("model") == "transformer" else real.data()
    real.write(tmp_path, made)
    of, members = real.config(tmp_path, **({"population": 4, "cohort": 4} | changes)), real.clients(tmp_path)
    states, _, _ = real.simulated(made, of)
    server = real.served(tmp_path, of, members)
    for number in range(3):
        if number == 1:  # it dies after it has sent its tasks, and goes on
            real.updates(server.open(NODES), members)
            server = Server(of, tmp_path / "run", note=lambda line: None)
            server.start()
        for node, update in real.updates(server.open(NODES), members).items():
            assert server.accept(node, update)
        server.close()
        expected = states[number + 1]
        if of.router == "personal":
            for path, rows in layouts.host(expected.personal).items():
                for client, member in enumerate(members):
                    np.testing.assert_allclose(
                        member.shelf.routers(server.roster.run, number + 1)[path], rows[client], rtol=1e-5, atol=1e-6
                    )
            initial = states[0].experts["moe"]["router"]
            expected = dataclasses.replace(expected, personal=None)
            expected.experts["moe"]["router"] = initial
        assert_close(server.state, expected)


class FakeLink:
    """Clients at hand, who answer a step after they are asked; `script(step, link)` changes who is connected."""

    def __init__(self, members, script):
        self.members, self.script, self.step = members, script, 0
        self.connected, self.mute, self.asked, self.void, self.shy = set(members), set(), [], [], []

    def nodes(self):
        self.script(self.step, self)
        self.step += 1
        return sorted(self.connected)

    def push(self, kind, messages, seconds):
        self.asked += [(kind, node, data) for node, data in messages.items() if node not in self.mute]

    def poll(self):
        asked, self.asked = self.asked, []
        return [self._reply(*question) for question in asked if question[1] in self.connected]

    def _reply(self, kind, node, data):
        if kind == "hello" and node in self.shy:
            self.shy.remove(node)
            return Reply(node, kind, None, "it is\nbusy")
        if kind == "task" and node in self.void:
            self.void.remove(node)
            return Reply(node, kind, None, "it broke")
        return Reply(node, kind, self.members[node].hello() if kind == "hello" else self.members[node].train(data))


def test_the_loop_greets_waits_and_does_without_those_that_do_not_answer(run, server):
    _, _, members, _, notes = run
    before, seconds, seen = server.state, [0.0], []
    server.config, known = dataclasses.replace(server.config, rounds=6), len(notes)

    def script(step, link):
        seen.append((step, server.done, len(link.connected)))
        if step == 0:
            link.connected = {"node-0", "node-1"}  # too few to begin
        elif step == 4:
            assert server.done == 3 and server._open is None
            link.connected, link.void = set(link.members), ["node-3"]  # round 3: node-3 fails
        elif server.done == 4 and not link.mute:
            link.mute = {"node-2"}  # does not answer in round 5: round 4 is under way

    def sleep(pause):
        seconds[0] += 10 * pause

    link = FakeLink({f"node-{number}": client for number, client in enumerate(members)}, script)
    loop.serve(server, link, least=3, patience=100.0, clock=lambda: seconds[0], sleep=sleep)
    told = notes[known:]
    assert server.done == 6 and [record["round"] for record in metrics.read(server.log.path)] == [0, 1, 2, 3, 4, 5]
    assert any("node-3 sent is refused: it broke" in line for line in told)
    assert sum("nothing came from clients [2]" in line for line in told) == 1 and 100 <= seconds[0] < 300
    assert not np.array_equal(layouts.host(server.state.shared)["into.kernel"], layouts.host(before.shared)["into.kernel"])


def test_the_loop_ends_when_nobody_trains_any_more(run, server):
    _, _, members, *_ = run
    server.config, seconds = dataclasses.replace(server.config, rounds=1000), [0.0]

    def script(step, link):
        link.void = [] if server.done == 9 else list(link.members)

    def sleep(pause):
        seconds[0] += pause

    link = FakeLink({f"node-{number}": client for number, client in enumerate(members)}, script)
    with pytest.raises(StoppedError, match="nobody has trained in 10 rounds in a row"):
        loop.serve(server, link, least=4, patience=100.0, clock=lambda: seconds[0], sleep=sleep)
    trained = [record["clients_per_second"] > 0 for record in metrics.read(server.log.path)]
    assert trained[3:] == [False] * 6 + [True] + [False] * 10


def test_the_loop_does_not_take_a_late_answer_for_the_one_that_it_waits_for(run, server):
    _, _, members, *_ = run
    server.config, seconds = dataclasses.replace(server.config, rounds=4), [0.0]

    class Late(FakeLink):
        def poll(self):
            replies = super().poll()
            early = [Reply(r.node, r.kind, data, "it broke", True) for r in replies if r.kind == "task" for data in (None, b"nonsense")]
            return [*early, *replies]

    def sleep(pause):
        seconds[0] += pause

    link = Late({f"node-{number}": client for number, client in enumerate(members)}, lambda step, link: None)
    loop.serve(server, link, least=4, patience=100.0, clock=lambda: seconds[0], sleep=sleep)
    record = metrics.read(server.log.path)[-1]
    assert record["rejected_updates"] == 4 and record["dropped_clients"] == 0 and sum(record["load"]) == 8


def test_a_client_whose_first_answer_is_none_is_asked_again(run, server):
    _, _, members, _, notes = run
    server.config, seconds = dataclasses.replace(server.config, rounds=4), [0.0]

    def sleep(pause):
        seconds[0] += 10 * pause
        assert seconds[0] < 500, "it is never asked again"

    link = FakeLink({f"node-{number}": client for number, client in enumerate(members)}, lambda step, link: None)
    link.shy = ["node-2"]
    loop.serve(server, link, least=4, patience=100.0, clock=lambda: seconds[0], sleep=sleep)
    assert server.done == 4 and seconds[0] >= 100
    assert [line for line in notes if "does not say" in line] == ["node node-2 does not say what it is: it is busy"]


def test_the_clients_process_answers_on_a_socket_and_survives_its_errors(run, server, tmp_path):
    _, _, members, *_ = run
    with worker.listener(tmp_path / "private") as socket:
        assert (tmp_path / "private").stat().st_mode & 0o777 == 0o700
        threading.Thread(target=worker.work, args=(members[0], socket), daemon=True).start()

        def ask(request):
            with connection.Client(str(tmp_path / "private" / "socket"), "AF_UNIX") as asked:
                asked.send_bytes(request)
                return asked.recv_bytes()

        assert ask(b"h") == b"+" + members[0].hello()
        assert ask(b"tnonsense") == b"-it is no message"
        assert ask(b"x").startswith(b"-KeyError")
        answer = ask(b"t" + server.open(NODES)["node-0"])
        assert server.accept("node-0", answer[1:])
