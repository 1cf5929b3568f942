"""Coverage-guided fuzzing of what reads strangers' bytes, where atheris is installed: python tests/fuzz_coverage.py TARGET -runs=20000

TARGET is message, toml, npz, idx, profile or metrics; flags are those of libFuzzer. Whatever is read is accepted or refused in one line;
anything else ends with a traceback and the bytes in a file crash-*. What came of it: tests/results/fuzz_coverage.json.
"""

import gzip
import json
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fedmoe_jax"]):
    import fuzz
    import numpy as np

    from fedmoe_jax.data import sources
    from fedmoe_jax.data.npz import read_npz
    from fedmoe_jax.deploy import messages
    from fedmoe_jax.training import metrics, profiles
    from fedmoe_jax.training.config import TrainConfig, from_toml, validate

FOLDER = Path(tempfile.mkdtemp(prefix="fedmoe-fuzz-"))


def file(name, data):
    path = FOLDER / name
    path.write_bytes(data)
    return path


def message(data):
    found = messages.decode(data, "update", most_bytes=1 << 16)
    messages.check_header(found.header, {"round": int})
    messages.check_arrays(found.arrays, {"w": messages.Array((2, 3))})


def toml(data):
    validate(TrainConfig(**from_toml(file("a.toml", data))))


def idx(data):
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        file(f"{name}.gz", gzip.compress(data) if "train" in name else data)
    sources.load(str(FOLDER))


TARGETS = {
    "message": (message, messages.encode("update", {"round": 1}, {"w": np.ones((2, 3), np.float32)})),
    "toml": (toml, b'rounds = 3\ndata = "digits"\n[model_options]\nhidden = 3\n'),
    "npz": (lambda data: read_npz(file("a.npz", data)), fuzz.saved(x=np.zeros((3, 2), np.float32), y=np.zeros(3, np.int32))),
    "idx": (idx, b"\0\0\x08\x03" + b"\0\0\0\2" * 3 + bytes(8)),
    "profile": (lambda data: profiles.read(file("p.json", data)), json.dumps(dict.fromkeys(profiles._WHAT, 1e9)).encode()),
    "metrics": (lambda data: metrics.read(file("metrics.jsonl", data)), b'{"round": 0}\n{"round": 1}\n'),
}


def main():
    name, *flags = sys.argv[1:]
    target, seed = TARGETS[name]
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    (corpus / "seed").write_bytes(seed)

    def one(data):
        try:
            target(data)
        except ValueError as error:
            assert str(error) and "\n" not in str(error) and len(str(error)) < 1000, str(error)

    atheris.Setup([sys.argv[0], str(corpus), *flags], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
