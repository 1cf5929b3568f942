"""Tests of the `fedmoe` command in this process: the files that it leaves, exit statuses, and one line for each mistake."""

import json

import numpy as np
import pytest

from fedmoe_jax import cli
from fedmoe_jax.training import metrics
from fedmoe_jax.training.config import TrainConfig, from_toml
from fedmoe_jax.training.metrics import METRIC_FIELDS

TINY = [
    "--population", "20", "--cohort", "5", "--experts", "4", "--rounds", "4", "--eval_every", "2", "--fitness", "usage",
    "--aligner", "greedy", "--model_options", "hidden=16",
]  # fmt: skip
EVALUATED = ("eval_loss", "eval_accuracy", *metrics.CLIENT_ACCURACIES)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    assert cli.main(["train", *TINY, "--out", str(out)]) == 0
    return out


def content(out):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*") if path.is_file()}


def refused(capsys, words, *named):
    """Checks that a command ends with status 2 and one line on standard error that has `named` in it."""
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert not out and err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in err
    for text in named:
        assert text in err


def printed(capsys, words):
    """What a command that succeeds prints."""
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def test_a_run_leaves_its_files(run):
    config = TrainConfig(**from_toml(run / "config.toml"))
    assert (config.population, config.cohort, config.rounds, config.model_options) == (20, 5, 4, {"hidden": 16})
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2, 3]
    for line in lines:
        evaluated = line["round"] in (1, 3)
        assert tuple(line) == METRIC_FIELDS
        assert {name for name, value in line.items() if value is None} == (set() if evaluated else set(EVALUATED))
        assert len(line["load"]) == 4 and sum(line["load"]) == 10
    summary = json.loads((run / "summary.json").read_text())
    assert summary["rounds"] == 4 and summary["seed"] == 0
    assert summary["last"]["eval_accuracy"] == lines[-1]["eval_accuracy"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["4"]
    with np.load(run / "weights.npz") as file:
        assert file.files and all(np.isfinite(file[name]).all() for name in file.files)
    plots = sorted((run / "plots").glob("*.png"))
    assert [path.stem for path in plots] == ["cost", "fitness", "learning", "load"] and all(
        path.read_bytes().startswith(b"\x89PNG") for path in plots
    )
    assert "<html" in (run / "report.html").read_text()
    assert not list(run.rglob("*.tmp"))


def test_tensorboard_gets_every_round(run, tmp_path):
    from fedmoe_jax.training.tensorboard import scalars

    write = scalars(str(tmp_path))
    for record in metrics.read(run / "metrics.jsonl"):
        write(None, record)
    (events,) = tmp_path.iterdir()
    content = events.read_bytes()
    assert content.count(b"train_loss") >= 1 and b"client_accuracy_p10" in content and content.count(b"load_cv_total") == 4


def test_resume_of_a_finished_run_does_nothing(run, capsys):
    before = content(run)
    assert cli.main(["train", "--resume", "--out", str(run)]) == 0
    assert content(run) == before
    refused(capsys, ["train", "--resume", "--out", run, "--rounds", 9], "rounds")
    assert content(run) == before


def test_an_existing_run_is_not_overwritten(run, capsys):
    before = content(run)
    refused(capsys, ["train", *TINY, "--out", run], "--out", "--resume")
    refused(capsys, ["compare", *TINY, "--out", run], "--out")
    assert content(run) == before


@pytest.mark.parametrize(
    "words, named",
    [
        (["--colour", "3"], "colour"),
        (["--aligner", "fairest"], "aligner"),
        (["--aligner", "no_such_module:make"], "aligner"),
        (["--model", "no_such_module:make"], "model"),
        (["--data", "no_such_module:make"], "data"),
        (["--profile", "no_such_module:make"], "profile"),
        (["--slots", "5"], "slots"),
        (["--cohort", "21"], "cohort"),
        (["--alpha", "0"], "alpha"),
        (["--alpha", "-1"], "alpha"),
        (["--rounds", "-3"], "rounds"),
        (["--client_lr", "-0.1"], "client_lr"),
        (["--population", "many"], "population"),
        (["--data", "absent.npz"], "absent.npz"),
        (["--router", "statistic"], "router"),
        (["--population", "5000"], "population"),
        (["--split", "natural"], "natural"),
        (["--model", "transformer"], "model"),
        (["--model_options", "top_k=2"], "model_options"),
        (["--model_options", "hidden=x"], "model_options"),
        (["--engine", "dual", "--client_optimizer", "adam"], "engine: 'dual' cannot serve, since client_optimizer is not linear"),
        (["--aligner", "json:dumps"], "aligner"),
        (["--profile", "json:loads"], "profile"),
        (["--profile", "math:prod"], "profile"),
        (["--model_options", "colour=3"], "colour"),
        (["--init_from", "absent.npz"], "init_from"),
        (["absent.toml"], "absent.toml"),
        (["--resume"], "--resume"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_take_one_line_and_leave_nothing(words, named, capsys, tmp_path):
    out = tmp_path / "run"
    files = [word for word in words if word.endswith(".toml")]
    flags = [word for word in words if word not in files]
    refused(capsys, ["train", *files, *TINY, *flags, "--out", out], named)
    assert not out.exists()


def test_other_mistakes_take_one_line(capsys, tmp_path):
    refused(capsys, ["fly"], "fly", "train")
    refused(capsys, ["train", *TINY], "--out")
    refused(capsys, ["compare", *TINY, "--seeds", 0, "--out", tmp_path / "a"], "seeds")
    refused(capsys, ["compare", *TINY, "--aligners", "random", "random", "--out", tmp_path / "a"], "aligners")
    refused(capsys, ["compare", *TINY, "--aligners", "random", "fairest", "--out", tmp_path / "a"], "aligner")
    refused(capsys, ["compare", *TINY, "--on_divergence", "rollback", "--out", tmp_path / "a"], "on_divergence")
    refused(capsys, ["eval"], "folder")
    refused(capsys, ["eval", tmp_path], str(tmp_path))
    refused(capsys, ["report", tmp_path / "absent"], "absent")
    refused(capsys, ["report"], "folder")
    refused(capsys, ["profile", "now"], "now")
    assert not list(tmp_path.iterdir())
    refused(capsys, [], "command")
    refused(capsys, ["bench"], "assign")
    refused(capsys, ["bench", "assign", "--experts", "0"], "experts")
    for words in (["--help"], ["eval", "--help"], ["report", "-h"], ["profile", "--help"], ["bench", "--help"]):
        assert "train" in printed(capsys, words)


@pytest.mark.parametrize("damage", [b"", b"nonsense", b"PK\x03\x04nonsense"])
def test_damaged_files_take_one_line(damage, capsys, tmp_path):
    file, out = tmp_path / "file.npz", tmp_path / "run"
    file.write_bytes(damage)
    for field in ("data", "init_from"):
        refused(capsys, ["train", *TINY, f"--{field}", file, "--out", out], field, str(file))
    assert not out.exists()


def test_eval_repeats_the_last_evaluation(run, capsys):
    found = json.loads(printed(capsys, ["eval", run]))
    last = metrics.read(run / "metrics.jsonl")[-1]
    assert found["round"] == 4 and found["data"] == "digits"
    for name in EVALUATED:
        assert found[name] == last[name]


def test_eval_on_other_data(run, capsys, tmp_path):
    draw = np.random.default_rng(0)
    file = tmp_path / "other.npz"
    x, y = draw.random((200, 8, 8, 1), np.float32), np.arange(200) % 10
    np.savez(file, x=x, y=y)
    found = json.loads(printed(capsys, ["eval", run, "--data", file]))
    assert found["data"] == str(file) and 0 <= found["eval_accuracy"] <= 0.5
    assert "client_accuracy_mean" not in found
    np.savez(file, x=x[:, :4], y=y)
    refused(capsys, ["eval", run, "--data", file], "data", "shape")
    np.savez(file, x=x, y=y + 1)
    refused(capsys, ["eval", run, "--data", file], "data", "11 classes")
    refused(capsys, ["eval", run, "--seed", 1], "seed")


def test_eval_on_other_data_takes_all_of_it(run, capsys, tmp_path):
    draw = np.random.default_rng(0)
    x, y = draw.random((200, 8, 8, 1), np.float32), np.arange(200) % 10
    np.savez(tmp_path / "all.npz", x=x, y=y)
    np.savez(tmp_path / "test.npz", x=x[:20], y=y[:20], test_x=x, test_y=y)
    one, other = (json.loads(printed(capsys, ["eval", run, "--data", tmp_path / name])) for name in ("all.npz", "test.npz"))
    assert one["eval_accuracy"] == pytest.approx(other["eval_accuracy"]) and one["eval_loss"] == pytest.approx(other["eval_loss"])


def test_out_must_be_a_place_to_write_to(capsys, tmp_path):
    (tmp_path / "file").touch()
    refused(capsys, ["train", *TINY, "--out", tmp_path / "file" / "run"], "--out", "file")


def test_report_writes_the_page_again(run, capsys):
    (run / "report.html").unlink()
    assert printed(capsys, ["report", run]).strip() == str(run / "report.html")
    assert (run / "report.html").is_file()


def test_profile_prints_one_object(capsys):
    found = json.loads(printed(capsys, ["profile"]))
    assert found["flops_per_second"] > 1e6 and found["memory_bytes"] > 1e8
    assert {"downlink_bytes_per_second", "uplink_bytes_per_second", "device"} <= set(found)


def test_a_run_with_files_can_be_had_again_from_another_folder(capsys, tmp_path, monkeypatch):
    home, away = tmp_path / "home", tmp_path / "away"
    (home / "configs").mkdir(parents=True)
    away.mkdir()
    np.savez(home / "points.npz", x=np.eye(3, dtype=np.float32)[np.arange(300) % 3], y=np.arange(300) % 3)
    client = dict.fromkeys(("flops_per_second", "memory_bytes", "downlink_bytes_per_second", "uplink_bytes_per_second"), 1e9)
    (home / "configs" / "clients.json").write_text(json.dumps(client))
    (home / "configs" / "run.toml").write_text('data = "../points.npz"\nprofile = "clients.json"\n')
    monkeypatch.chdir(home)
    printed(capsys, ["train", "configs/run.toml", *TINY, "--out", "run"])
    monkeypatch.chdir(away)
    before = content(home / "run")
    printed(capsys, ["train", "--resume", "--out", "../home/run", "--data", "../home/points.npz"])
    assert content(home / "run") == before
    found = json.loads(printed(capsys, ["eval", "../home/run", "--data", "../home/points.npz"]))
    assert "client_accuracy_mean" in found  # the run's own data
    monkeypatch.chdir(home)  # a run that was written with paths as they were given
    text = (home / "run" / "config.toml").read_text()
    (home / "run" / "config.toml").write_text(text.replace(str(home / "points.npz"), "points.npz"))
    printed(capsys, ["train", "--resume", "--out", "run"])
    assert "client_accuracy_mean" in json.loads(printed(capsys, ["eval", "run"]))
    (home / "run" / "config.toml").write_text(text)
    monkeypatch.chdir(away)
    printed(capsys, ["train", "../home/run/config.toml", "--init_from", "../home/run", "--out", "run"])
    assert from_toml("run/config.toml") == from_toml("../home/run/config.toml") | {"init_from": str(home / "run")}


def test_init_from_starts_with_the_weights_of_a_run(run, capsys, tmp_path):
    out = tmp_path / "more"
    still = ["--client_lr", "1e-30", "--rounds", "1"]  # too small to change a weight
    assert cli.main(["train", *TINY, *still, "--init_from", str(run), "--out", str(out)]) == 0
    with np.load(run / "weights.npz") as before, np.load(out / "weights.npz") as after:
        assert before.files == after.files
        for name in before.files:
            np.testing.assert_allclose(after[name], before[name], rtol=1e-6, atol=1e-20)
    last, first = metrics.read(run / "metrics.jsonl")[-1], metrics.read(out / "metrics.jsonl")[0]
    assert first["eval_accuracy"] == last["eval_accuracy"]
    for words in (["--experts", "3"], ["--model_options", "hidden=8"]):
        refused(capsys, ["train", *TINY, *words, "--init_from", run, "--out", tmp_path / "none"], "init_from", "fit")
    assert not (tmp_path / "none").exists()


def test_compare_gives_aligners_the_same_start(capsys, tmp_path):
    out = tmp_path / "compared"
    words = ["compare", *TINY, "--rounds", 2, "--aligners", "random", "load_only", "--seeds", 2, "--out", out]
    lines = printed(capsys, words)
    assert str(out / "report.html") in lines
    assert all(f"{aligner}, seed {n}, round 2  loss" in lines for aligner in ("random", "load_only") for n in (0, 1))
    table = json.loads((out / "comparison.json").read_text())
    assert set(table["aligners"]) == {"random", "load_only"} and (out / "report.html").is_file() and list((out / "plots").glob("*.png"))
    runs = {(aligner, n): metrics.read(out / aligner / f"seed-{n}" / "metrics.jsonl") for aligner in table["aligners"] for n in (0, 1)}
    for lines in runs.values():
        assert [line["round"] for line in lines] == [0, 1] and tuple(lines[0]) == METRIC_FIELDS
    for n in (0, 1):  # the simulated time is that of the sampled client with the most examples
        ours, theirs = ([line["simulated_seconds"] for line in runs[aligner, n]] for aligner in ("random", "load_only"))
        assert ours == theirs
    for aligner, figures in table["aligners"].items():
        final = [runs[aligner, n][-1]["eval_accuracy"] for n in (0, 1)]
        assert figures["eval_accuracy"]["n"] == 2
        assert figures["eval_accuracy"]["mean"] == pytest.approx(np.mean(final))


def test_data_model_and_aligner_from_a_module(capsys, tmp_path, monkeypatch):
    (tmp_path / "own_parts.py").write_text(
        "import numpy as np\n"
        "from fedmoe_jax import alignment\n"
        "from fedmoe_jax.models import create\n"
        "made = []\n"
        "def data():\n"
        "    made.append('data')\n"
        "    y = np.arange(300) % 3\n"
        "    return np.eye(3, dtype=np.float32)[y], y\n"
        "def model(**options):\n"
        "    made.append('model')\n"
        "    return create('mlp', hidden=8, **options)\n"
        "def aligner(**options):\n"
        "    made.append('aligner')\n"
        "    return alignment.greedy(**options)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    names = [word for field in ("data", "model", "aligner") for word in (f"--{field}", f"own_parts:{field}")]
    options = [word for word in TINY if word not in ("--model_options", "hidden=16")]
    assert cli.main(["train", *options, *names, "--rounds", "2", "--out", str(tmp_path / "run")]) == 0
    import own_parts  # type: ignore[import-not-found]

    assert set(own_parts.made) == {"data", "model", "aligner"}
    assert len(metrics.read(tmp_path / "run" / "metrics.jsonl")) == 2
