"""Nothing is lost: runs that are killed, interrupted, out of disk or damaged go on to the same bits as one that was left alone."""

import dataclasses
import errno
import gc
import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import jax
import kills
import numpy as np
import pytest

from fedmoe_jax import cli
from fedmoe_jax.data import sources
from fedmoe_jax.training import clients, metrics, setup, trainer
from fedmoe_jax.training.checkpoint import Checkpoints
from fedmoe_jax.training.config import TrainConfig, UsageError, to_toml
from fedmoe_jax.training.interrupt import Interrupted, Interrupts, alone
from fedmoe_jax.training.metrics import MetricsLog

CONFIG = TrainConfig(
    population=20, cohort=5, experts=4, rounds=8, eval_every=2, checkpoint_every=2, aligner="greedy", client_schedule="constant",
    model_options={"hidden": 16},
)  # fmt: skip
OPERATIONS = [(os, "fsync"), (os, "replace"), (Path, "rename"), (Path, "unlink"), (shutil, "rmtree"), (Checkpoints, "_checkpointer")]


class Killed(BaseException):
    """Stands for SIGKILL in this process."""


@pytest.fixture(scope="module")
def compiled():
    return trainer.Run(setup.build(CONFIG))


@pytest.fixture
def quick(compiled, monkeypatch):
    """Lets all runs use one compiled program, and leave out pictures."""

    def again(built, note=print):
        compiled.setup, compiled.note, compiled.chunk = built, note, CONFIG.cohort
        compiled.start(built)
        return compiled

    built = compiled.setup
    monkeypatch.setattr(trainer, "build", lambda config: built)
    monkeypatch.setattr(trainer, "Run", again)
    monkeypatch.setattr(trainer, "draw_run", lambda *args: None)
    yield built
    compiled.setup = built


@pytest.fixture(scope="module")
def left_alone(compiled, tmp_path_factory):
    """A run without faults."""
    out = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as patch:
        compiled.start(compiled.setup)
        patch.setattr(trainer, "build", lambda config: compiled.setup)
        patch.setattr(trainer, "Run", lambda *args, **options: compiled)
        patch.setattr(trainer, "draw_run", lambda *args: None)
        trainer.train(CONFIG, out)
    return out


@pytest.fixture
def copy(left_alone, tmp_path):
    """The run without faults, as if it had been killed right before its summary."""
    shutil.copytree(left_alone, tmp_path / "copy")
    (tmp_path / "copy" / "summary.json").unlink()
    return tmp_path / "copy"


def go_on(out, left_alone):
    """Resumes a run, or starts it again if it had left nothing, and compares it with the one left alone."""
    trainer.train(CONFIG, out, resume=(out / "config.toml").exists())
    assert kills.differences(out, left_alone) == []


def fail_at(patch, at, error):
    """Makes the operation of this number on files fail; returns how many there were."""
    count = [0]

    def before(real):
        def call(*args, **options):
            count[0] += 1
            if count[0] == at:
                raise error
            return real(*args, **options)

        return call

    for owner, name in OPERATIONS:
        patch.setattr(owner, name, before(getattr(owner, name)))
    return count


@pytest.fixture(scope="module")
def operations(left_alone, compiled, tmp_path_factory):
    """How many operations on files a run takes."""
    with pytest.MonkeyPatch.context() as patch:
        compiled.start(compiled.setup)
        patch.setattr(trainer, "build", lambda config: compiled.setup)
        patch.setattr(trainer, "Run", lambda *args, **options: compiled)
        patch.setattr(trainer, "draw_run", lambda *args: None)
        count = fail_at(patch, -1, None)
        trainer.train(CONFIG, tmp_path_factory.mktemp("counted"))
    assert count[0] > 50
    return count[0]


FULL = pytest.param(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), id="full", marks=pytest.mark.slow)


@pytest.mark.parametrize("error", [pytest.param(Killed(), id="killed"), FULL])
def test_a_fault_in_any_operation_on_files_loses_nothing(error, quick, operations, left_alone, tmp_path):
    before = 0
    for number, at in enumerate(np.random.default_rng(0).choice(operations, 3, replace=False) + 1):
        out = tmp_path / f"run-{number}"
        with pytest.MonkeyPatch.context() as patch, pytest.raises((Killed, OSError)) as caught:
            fail_at(patch, int(at), error)
            trainer.train(CONFIG, out)
        assert "\n" not in str(caught.value)
        before += (out / "checkpoints").exists()
        go_on(out, left_alone)
    assert before


@pytest.mark.parametrize("at", [1, 4])
def test_a_torn_line_is_written_again(at, quick, left_alone, tmp_path):
    real, written = MetricsLog.append, []

    def append(log, values):
        written.append(1)
        if len(written) == at:
            with log.path.open("a") as file:
                file.write('{"round": 1, "train_lo')
            raise Killed
        real(log, values)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(MetricsLog, "append", append)
        trainer.train(CONFIG, tmp_path / "run")
    go_on(tmp_path / "run", left_alone)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # coroutines that Orbax leaves behind
def test_a_file_too_large_for_the_disk_is_one_line(quick, left_alone, tmp_path, capsys, monkeypatch):
    (tmp_path / "config.toml").write_text(to_toml(CONFIG))
    real, begin, saved = Checkpoints._write, Checkpoints.begin, []

    def begin_and_wait(checkpoints, *args):  # the limit is of the whole process
        begin(checkpoints, *args)
        checkpoints.wait()

    def write(checkpoints, *args):
        saved.append(1)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            if len(saved) == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))
            real(checkpoints, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(Checkpoints, "_write", write)
    monkeypatch.setattr(Checkpoints, "begin", begin_and_wait)
    out = tmp_path / "run"
    assert cli.main(["train", str(tmp_path / "config.toml"), "--out", str(out)]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "the checkpoint of round 6 cannot be written" in err and f"--resume --out {out}" in err
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["2", "4"]
    gc.collect()


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_after_the_block_in_flight(number, status, quick, left_alone, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    (tmp_path / "config.toml").write_text(to_toml(CONFIG))

    def append(log, values, real=MetricsLog.append):
        real(log, values)
        if values["round"] == 2:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "append", append)
        assert cli.main(["train", str(tmp_path / "config.toml"), "--out", str(out)]) == status
    assert signal.getsignal(number) is before
    assert capsys.readouterr().err == f"fedmoe train: interrupted; go on with fedmoe train --resume --out {out}\n"
    assert len(metrics.read(out / "metrics.jsonl")) == 4 and Checkpoints(out / "checkpoints").latest() == 4
    go_on(out, left_alone)


def test_a_signal_before_the_first_round_ends_at_once(quick, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trainer, "build", lambda config: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(10))
    assert cli.main(["train", "--out", str(tmp_path / "run")]) == 143
    assert capsys.readouterr().err == "fedmoe train: interrupted\n" and not (tmp_path / "run").exists()


def test_ignored_signals_stay_ignored_and_the_second_is_not_kept():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(KeyboardInterrupt) as caught, Interrupts() as interrupts, interrupts.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.pending()
        os.kill(os.getpid(), signal.SIGINT)
    assert not isinstance(caught.value, Interrupted)


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    with alone(tmp_path / "run"), pytest.raises(UsageError, match="is in use"), alone(tmp_path / "run"):
        pass
    with alone(tmp_path / "run"):
        pass


def files_of(checkpoint):
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", ["flipped", "cut", "removed", "empty", "json"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_used(damage, quick, copy, left_alone, capsys):
    newest = copy / "checkpoints" / "8"
    largest = max(files_of(newest / "state"), key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    if damage == "flipped":
        largest.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    elif damage == "cut":
        largest.write_bytes(content[: len(content) // 2])
    elif damage == "removed":
        largest.unlink()
    elif damage == "empty":
        shutil.rmtree(newest)
        newest.mkdir()
    else:
        (newest / "checkpoint.json").write_text('{"content": {}, "crc32": 0}')
    go_on(copy, left_alone)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "checkpoint" in line]
    assert "the checkpoint of round 8 cannot be read" in line and line.endswith("going back to that of round 6")


def test_metrics_that_are_lost_take_the_run_back(quick, copy, left_alone):
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:7]))
    go_on(copy, left_alone)
    (copy / "summary.json").unlink()
    (copy / "metrics.jsonl").write_text("".join(lines[:3] + lines[4:]))
    with pytest.raises(ValueError, match="no checkpoint of round 3 or before, where the metrics end"):
        trainer.train(CONFIG, copy, resume=True)


@pytest.mark.parametrize("schema", [1, 3])
def test_checkpoints_of_another_schema_are_refused(schema, quick, copy):
    for folder in (copy / "checkpoints").iterdir():
        if schema == 1:  # what Orbax's manager left
            (folder / "checkpoint.json").unlink()
            (folder / "extra").mkdir()
        else:
            about = json.loads((folder / "checkpoint.json").read_text())
            about["content"]["schema"] = schema
            from fedmoe_jax.training.integrity import text_crc

            about["crc32"] = text_crc(about["content"])
            (folder / "checkpoint.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"checkpoints/8: .* version of fedmoe_jax"):
        trainer.train(CONFIG, copy, resume=True)


@pytest.mark.parametrize("name", ["data", "profile"])
def test_other_data_under_the_same_name_are_refused(name, quick, copy, monkeypatch):
    other = dataclasses.replace(quick, digests=quick.digests | {name: "another"})
    monkeypatch.setattr(trainer, "build", lambda config: other)
    with pytest.raises(UsageError, match=f"--resume: the content of {name} differs"):
        trainer.train(CONFIG, copy, resume=True)


def test_digests_tell_arrays_apart():
    data = sources.load("digits")
    x = data.x.copy()
    x[-1, -1, -1, 0] += 1
    others = [dict(x=x), dict(y=data.y[::-1]), dict(x=data.x.reshape(len(x), -1)), dict(y=data.y.astype(np.int64))]
    digests = {dataclasses.replace(data, **other).digest() for other in others}
    assert len(digests | {data.digest()}) == 5 and data.digest() == sources.load("digits").digest()
    profiles = [clients.profile(dataclasses.replace(CONFIG, profile="tiers", seed=seed), 20) for seed in (0, 0, 1)]
    assert [clients.digest(one) == clients.digest(profiles[0]) for one in profiles] == [True, True, False]


def test_a_run_goes_on_without_what_it_started_from(quick, copy, monkeypatch):
    config = dataclasses.replace(CONFIG, init_from="gone.npz")
    (copy / "config.toml").write_text(to_toml(config))
    given = []
    monkeypatch.setattr(trainer, "build", lambda config: given.append(config.init_from) or quick)
    trainer.train(config, copy, resume=True)
    assert given == [None]


def test_a_report_that_is_missing_is_written(quick, copy):
    trainer.train(CONFIG, copy, resume=True)
    (copy / "report.html").unlink()
    trainer.train(CONFIG, copy, resume=True)
    assert (copy / "report.html").exists()


@pytest.mark.slow
def test_another_chunk_may_go_on(compiled, copy, left_alone):
    shutil.rmtree(copy / "checkpoints" / "8")
    trainer.train(dataclasses.replace(CONFIG, chunk=2), copy, resume=True)
    assert Checkpoints(copy / "checkpoints").latest() == 8
    ours, theirs = kills.exact(copy), kills.exact(left_alone)
    assert ours[:6] == theirs[:6]
    np.testing.assert_allclose(ours[-1]["train_loss"], theirs[-1]["train_loss"], rtol=1e-4)


def test_the_same_seed_gives_the_same_bits(compiled):
    runs = []
    for built in (compiled.setup, setup.build(CONFIG), setup.variant(compiled.setup, dataclasses.replace(CONFIG, seed=1))):
        compiled.start(built)
        records = [record for (record,) in compiled.blocks()]
        lines = [{name: value for name, value in line.items() if name not in kills.MEASURED} for line in records]
        leaves = [leaf for leaf in jax.tree.leaves(compiled.state) if leaf is not compiled.state.key]
        runs.append((json.dumps(lines), [np.asarray(leaf).tobytes() for leaf in leaves]))
    assert runs[0] == runs[1] and runs[0] != runs[2]


def test_a_killed_process_is_continued(quick, left_alone, tmp_path):
    out, phases = tmp_path / "run", tmp_path / "phases"
    (tmp_path / "config.toml").write_text(to_toml(CONFIG))
    process = kills.launch(phases, ["train", tmp_path / "config.toml", "--out", out], jax.config.jax_compilation_cache_dir)
    assert kills.wait_for(process, phases, "checkpoint", 3), process.communicate()
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (out / "summary.json").exists()
    go_on(out, left_alone)


@pytest.mark.slow
def test_thirty_kills(tmp_path):
    found = kills.campaign(tmp_path, 30)
    assert len(found["kills"]) == 30 and all(run["status"] == 0 and not run["differs"] for run in found["runs"])
