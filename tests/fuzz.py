"""Damaged and hostile input for all that `fedmoe` reads, and what comes of each case: python tests/fuzz.py --cases 10000 --out FILE."""

import argparse
import datetime
import gzip
import io
import json
import pickle
import shutil
import struct
import sys
import tempfile
import time
import tracemalloc
import zipfile
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from fedmoe_jax import models
from fedmoe_jax.data import sources
from fedmoe_jax.deploy import messages
from fedmoe_jax.experts import partition
from fedmoe_jax.training import export, fields, metrics, profiles
from fedmoe_jax.training.checkpoint import Checkpoints
from fedmoe_jax.training.config import TrainConfig, from_toml, parse, to_toml, validate
from fedmoe_jax.training.weights import load_weights

MOST_BYTES = 32 << 20  # of memory for one case; no file here has more than 100 kB
MOST_SECONDS = 20.0
WORDS = (
    "", "0", "-1", "1e999", "nan", "inf", "9" * 5000, "10" * 20, "1.5", "true", "None", "a", "\0", "\n", "\udcff", "é", "a=b", "x=[[", "{}",
    "--", "-", "-h", "--=", "--out", "/dev/null", "..", "no.toml", "[" * 3000, "hidden=1", "os:system", "digits", "--resume", "%s",
)  # fmt: skip
VALUES = ("true", "-1", "nan", "1e400", "9" * 400, "[1, 2]", "{a = 1}", '"\\u0000"', "''", "2020-01-01", "[" * 2000, "'hf:'", "9" * 5000)


class Marker:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def mutated(draw, data):
    """Bytes with some flipped, cut, repeated, inserted or replaced by extreme numbers."""
    data = bytearray(data)
    for _ in range(draw.integers(1, 4)):
        at, kind = int(draw.integers(0, len(data) + 1)), draw.integers(0, 6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << int(draw.integers(0, 8))
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at : at + 4] = draw.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f"])
        elif kind == 3:
            data[at:at] = draw.bytes(int(draw.integers(1, 9)))
        elif kind == 4:
            del data[at : at + int(draw.integers(1, 50))]
        else:
            data[at:at] = data[max(0, at - 30) : at]
    return bytes(data)


def saved(**arrays):
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def zipped(change=lambda data: data, **arrays):
    """An .npz with the right checksums of arrays whose .npy files were changed."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            npy = io.BytesIO()
            np.save(npy, array)
            archive.writestr(f"{name}.npy", change(npy.getvalue()))
    return stream.getvalue()


def toml(draw, folder):
    text = to_toml(TrainConfig()).encode()
    names = list(fields.hints(TrainConfig))
    if draw.random() < 0.5:
        text = "\n".join(f"{draw.choice(names)} = {draw.choice(VALUES)}" for _ in range(draw.integers(1, 3))).encode(
            "utf-8", "surrogatepass"
        )
    (folder / "a.toml").write_bytes(text if draw.random() < 0.3 else mutated(draw, text))
    validate(TrainConfig(**from_toml(folder / "a.toml")))


def command(draw, folder):
    names, words = [f"--{name}" for name in (*fields.hints(TrainConfig), "model_options.hidden")], []
    for _ in range(draw.integers(1, 5)):
        words += [str(draw.choice(names))] * (draw.random() < 0.8) + [str(draw.choice(WORDS))] * (draw.random() < 0.8)
    try:
        parse(TrainConfig, words, "fedmoe train")
    except SystemExit as error:
        if error.code:
            raise
        raise ValueError("help") from None


def npz(draw, folder):
    x, y = draw.random((30, 2, 2)).astype(np.float32), np.arange(30) % 3
    kind = draw.integers(0, 6)
    if kind == 0:
        arrays = {"x": np.array([Marker(folder / "executed")] * 30, object), "y": y}
    elif kind == 1:
        x[draw.integers(0, 30)] = draw.choice([np.nan, np.inf, -np.inf])
        arrays = {"x": x, "y": y}
    elif kind == 2:
        dtypes = ["S3", "c8", "M8[s]", "f8", "i1", "u8", "?", "f2", "U2", [("a", "i4")]]
        arrays = {
            "x": x.astype("f8").astype(dtypes[int(draw.integers(0, 9))]),
            "y": (y - draw.integers(0, 2)).astype("f4"),
            "task": np.array("a"),
        }
    elif kind == 3:
        shapes = [(0,), (30,), (30, 0), (30, 1, 0, 2), (1, 30), ()]
        arrays = {
            name: np.zeros(shapes[int(draw.integers(0, 6))], draw.choice(["i4", "f4"])) for name in ("x", "y", "test_x", "client_ids")
        }
    else:
        arrays = {"x": x, "y": y}
    data = saved(**arrays)
    if kind == 4:  # a header that says more than follows
        lie = draw.choice([b"(9999999,)", b"(3, 99999)", b"(-3, 2, 2)", b"(9**9, 2) ", b"(30, 4, 1)", b"(30, 2, 9)"])
        data = zipped(lambda npy: npy.replace(b"(30, 2, 2)", lie), **arrays)
    elif kind == 5 and draw.random() < 0.5:
        data = zipped(lambda npy: mutated(draw, npy[:128]) + npy[128:], **arrays)
    (folder / "a.npz").write_bytes(mutated(draw, data) if kind == 5 and draw.random() < 0.5 else data)
    sources.load(folder / "a.npz")


def idx(draw, folder):
    for part in ("train", "t10k"):
        for name, shape in (("images-idx3", (20, 4, 4)), ("labels-idx1", (20,))):
            content = b"\0\0\x08" + bytes([len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + bytes(np.arange(np.prod(shape)) % 5)
            content = mutated(draw, content) if draw.random() < 0.15 else content
            content = gzip.compress(content, 1) if draw.random() < 0.3 else content
            (folder / f"{part}-{name}-ubyte").write_bytes(mutated(draw, content) if draw.random() < 0.1 else content)
    sources.load(folder)


def cifar(draw, folder):
    pixels, labels = np.zeros((4, 3072), np.uint8), [0, 1, 2, 3]
    hostile = [Marker(folder / "executed"), b"", [labels] * 3, {}, 10**5000, np.array([0.5] * 4), None]
    binary = draw.random() < 0.3
    for name in ("data_batch_1", "test_batch"):
        batch = {b"data": pixels, b"labels": labels}
        if draw.random() < 0.3:
            batch[[b"data", b"labels"][int(draw.integers(0, 2))]] = hostile[int(draw.integers(0, 7))]
        content = bytes(4 * 3073) if binary else pickle.dumps(batch, protocol=int(draw.integers(0, 6)))
        if draw.random() < 0.1:
            content = (
                b"\x80\x05}r" + struct.pack("<I", 2**31 - 1) + b"." if draw.random() < 0.5 else b"\x80\x05\x96" + b"\xff" * 5 + b"\0\0\0."
            )
        name += ".bin" if binary else ""
        (folder / name).write_bytes(mutated(draw, content) if draw.random() < 0.4 else content)
    sources.load(folder)


STATE = {"x": jnp.arange(6.0), "key": jax.random.key(0), "half": jnp.ones(3, jnp.bfloat16)}
JSONS = ("", "{}", "[]", "null", '{"crc32": 0, "content": {}}', "[" * 50_000, '{"content": {"schema": 2}, "crc32": 1}', "9" * 5000)


def checkpoint(draw, folder, cache={}):  # noqa: B006
    if "made" not in cache:
        cache["made"] = Path(tempfile.mkdtemp()) / "checkpoints"
        Checkpoints(cache["made"]).save(4, STATE, {"chunk": 3})
    shutil.copytree(cache["made"], folder / "c")
    files = sorted(path for path in (folder / "c").rglob("*") if path.is_file())
    victim, kind = files[int(draw.integers(0, len(files)))], draw.integers(0, 5)
    if kind == 0:
        victim.unlink()
    elif kind == 1:
        (folder / "c" / "4" / "checkpoint.json").write_text(str(draw.choice(JSONS)))
    elif kind == 2:
        shutil.rmtree(victim.parent)
    else:
        victim.write_bytes(mutated(draw, victim.read_bytes()))
    changed = sorted(path for path in (folder / "c").rglob("*") if path.is_file()) != files
    changed = changed or any(path.read_bytes() != (cache["made"] / path.relative_to(folder / "c")).read_bytes() for path in files)
    _, state, extra = Checkpoints(folder / "c").restore(STATE)
    same = jnp.array_equal(state["x"], STATE["x"]) and (state["key"] == STATE["key"]).all() and extra == {"chunk": 3}
    assert same and (not changed or victim.name == "checkpoint.json"), "a changed checkpoint was read"


def weights(draw, folder, cache={}):  # noqa: B006
    if "model" not in cache:
        model = models.create("mlp", input_shape=(4,), num_classes=3, num_experts=2, top_k=1, seed=0, hidden=4)
        parts = partition(model)
        named = {
            "/".join(map(str, key)): np.asarray(variable)
            for part in (parts.experts, parts.shared)
            for key, variable in nnx.to_flat_state(part)
        }
        cache.update(model=model, named=named)
    named, kind = dict(cache["named"]), draw.integers(0, 5)
    name = list(named)[int(draw.integers(0, len(named)))]
    if kind == 0:
        named[name] = np.array([Marker(folder / "executed")], object)
    elif kind == 1:
        named[name] = np.full_like(named[name], draw.choice([np.nan, np.inf]))
    elif kind == 2:
        changed = [named[name].astype("U3"), named[name].astype("c8"), named[name].astype("M8[s]"), named[name][None], named[name][:0]]
        named[name] = changed[int(draw.integers(0, 5))]
    data = saved(**named)
    if kind == 3:
        data = zipped(lambda npy: mutated(draw, npy) if draw.random() < 0.3 else npy, **named)
    (folder / "w.npz").write_bytes(mutated(draw, data) if kind == 4 else data)
    load_weights(cache["model"], str(folder / "w.npz"))


def profile(draw, folder):
    text = json.dumps(dict.fromkeys(profiles._WHAT, 1e9)).encode() * int(draw.integers(1, 3))
    (folder / "p.json").write_bytes(mutated(draw, text))
    profiles.read(folder / "p.json")


def log(draw, folder):
    text = b"".join(json.dumps({"round": round, "load": [1, 2]}).encode() + b"\n" for round in range(5))
    (folder / "metrics.jsonl").write_bytes(mutated(draw, text))
    whole = metrics.MetricsLog(folder / "metrics.jsonl")
    whole.truncate(whole.whole())
    assert [line["round"] for line in metrics.read(whole.path)] == list(range(whole.whole()))


def message(draw, folder):
    arrays = {"w": np.ones((2, 3), np.float32), "n": np.arange(3, dtype=np.int32)}
    kind = draw.integers(0, 4)
    if kind == 0:
        arrays["w"] = (arrays["w"] * draw.choice([np.nan, np.inf, 1.0])).astype(draw.choice(["float32", "float16", "float64"]))
    header = {"round": 1, "train_loss": 0.5} if kind != 1 else {"round": True, str(draw.choice(WORDS[1:])): [1.0]}
    data = messages.encode("update", header, arrays)
    if kind == 2:
        size = int(draw.choice([0, 1 << 20, 1 << 62, len(data)]))
        data = size.to_bytes(8, "little") + data[8:]
    data = mutated(draw, data) if kind == 3 else data
    found = messages.decode(data, "update", most_bytes=1 << 16)
    messages.check_header(found.header, {"round": int, "train_loss": float})
    messages.check_arrays(found.arrays, {"w": messages.Array((2, 3)), "n": messages.Array((3,), "int32")})


def exported(draw, folder, cache={}):  # noqa: B006
    if not cache:
        shape: dict = dict(name="mlp", input_shape=[4], num_classes=3, num_experts=2, top_k=1, seed=0, dtype=None, hidden=4)
        parts = partition(models.create(**shape | {"input_shape": (4,)}))
        tensors = {name: np.asarray(value) for part in (parts.experts, parts.shared) for name, value in export.named(part).items()}
        about = json.dumps({"format": export.FORMAT, "model": shape, "held": None, "router": "shared"}).encode()
        cache.update({"model.safetensors": safetensors.numpy.save(tensors), "config.json": about})
    changed = draw.choice([*cache, "neither"], p=[0.45, 0.5, 0.05])
    for name, data in cache.items():
        (folder / name).write_bytes(mutated(draw, data) if name == changed else data)
    export.load(folder)


TARGETS = {
    "toml": toml, "command": command, "npz": npz, "idx": idx, "cifar": cifar, "checkpoint": checkpoint, "weights": weights,
    "profile": profile, "metrics": log, "message": message, "export": exported,
}  # fmt: skip


def outcome(target, seed, folder):
    """What comes of one case: "accepted", "refused", or what went wrong."""
    folder.mkdir()
    before = {path.name for path in folder.parent.iterdir()}
    tracemalloc.reset_peak()
    held, start = tracemalloc.get_traced_memory()[0], time.monotonic()
    result = "accepted"
    try:
        TARGETS[target](np.random.default_rng(seed), folder)
    except ValueError as error:
        result = "refused" if "\n" not in str(error) and 0 < len(str(error)) < 1000 else f"wrong: not one short line: {str(error)[:100]!r}"
    except BaseException as error:
        result = f"wrong: {type(error).__name__}: {str(error)[:100]}"
    if tracemalloc.get_traced_memory()[1] - held > MOST_BYTES:
        result = "wrong: memory"
    if time.monotonic() - start > MOST_SECONDS:
        result = "wrong: time"
    if (folder / "executed").exists():
        result = "wrong: code was executed"
    if {path.name for path in folder.parent.iterdir()} != before:
        result = "wrong: written elsewhere"
    shutil.rmtree(folder)
    return result


def campaign(folder, cases, seed=0):
    """Runs so many cases of all targets in turn; counts of outcomes, and the seed of each case that went wrong."""
    counts, wrong, targets = {target: Counter() for target in TARGETS}, [], list(TARGETS)
    tracemalloc.start()
    try:
        for case in range(cases):
            target = targets[case % len(targets)]
            result = outcome(target, [seed, case], folder / "case")
            counts[target][result.partition(":")[0]] += 1
            if result.startswith("wrong"):
                wrong.append({"target": target, "seed": [seed, case], "what": result})
    finally:
        tracemalloc.stop()
    return {"cases": cases, "outcomes": {target: dict(count) for target, count in counts.items()}, "wrong": wrong}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = campaign(Path(folder), options.cases, options.seed)
    about = {"date": datetime.date.today().isoformat(), "seed": options.seed, "most_bytes": MOST_BYTES}
    metrics.write_json(options.out, found | about | metrics.environment())
    print(json.dumps(found["outcomes"]))
    return bool(found["wrong"])


if __name__ == "__main__":
    sys.exit(main())
