"""Data sets by name: digits, .npz files, functions, and their splits."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_jax.data.sources import Dataset, from_arrays, load, split

GENERATOR = np.random.default_rng(0)
PIXELS = GENERATOR.integers(0, 256, (20, 4, 4, 3), np.uint8)
LABELS = np.arange(20) % 4


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def fails(name, message, **options):
    with pytest.raises(ValueError, match=message) as caught:
        load(name, **options)
    assert "data" in str(caught.value) and str(name) in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


def test_digits():
    data = load("digits", seed=1)
    assert data.x.shape == (1797 - len(data.test_x), 8, 8, 1) and data.x.dtype == np.float32 and data.y.dtype == np.int32
    assert (data.x.min(), data.x.max(), data.num_classes, data.task) == (0, 1, 10, "classification")
    counts, test_counts = np.bincount(data.y), np.bincount(data.test_y)
    assert np.abs(test_counts / (counts + test_counts) - 0.2).max() < 0.005
    assert np.array_equal(data.test_x, load("digits", seed=1).test_x)
    assert not np.array_equal(data.test_y, load("digits", seed=2).test_y)


def test_npz_holds_out_disjoint_examples(tmp_path):
    path = save(tmp_path / "a.npz", x=np.arange(40).reshape(20, 2) / 2, y=LABELS, clients=LABELS + 7)
    data = load(path, test_fraction=0.4)
    assert data.x.shape == (12, 2) and data.test_x.shape == (8, 2) and data.x.dtype == np.float32
    together = np.concatenate([data.x, data.test_x])[:, 0]
    np.testing.assert_array_equal(np.sort(together), np.arange(20))
    np.testing.assert_array_equal(data.y, data.x[:, 0] % 4)
    np.testing.assert_array_equal(data.client_ids, data.y + 7)


def test_npz_keeps_its_test_set_and_pixels(tmp_path):
    data = load(save(tmp_path / "a.npz", x=PIXELS, y=LABELS[:, None], test_x=PIXELS[:3], test_y=LABELS[:3], num_classes=9))
    np.testing.assert_array_equal(data.x, PIXELS)
    assert data.x.dtype == np.uint8 and data.num_classes == 9 and data.y.shape == (20,) and len(data.test_x) == 3


@pytest.mark.parametrize(
    ("x", "dtype"),
    [
        (PIXELS.astype(np.int64), np.uint8),
        (PIXELS.astype(np.int64) * 2, np.float32),
        (PIXELS[:, 0, 0].astype(int), np.float32),
        (PIXELS.astype(np.float16), np.float32),
    ],
)
def test_dtypes(x, dtype):
    data = from_arrays({"x": x, "y": LABELS, "test_x": x, "test_y": LABELS}, "a")
    assert data.x.dtype == dtype
    np.testing.assert_array_equal(data.x, x)


def test_two_dimensional_targets_are_next_tokens(tmp_path):
    tokens = GENERATOR.integers(0, 30, (10, 6))
    data = load(save(tmp_path / "a.npz", x=tokens[:, :-1], y=tokens[:, 1:]))
    assert (data.task, data.num_classes) == ("next_token", tokens.max() + 1) and data.x.dtype == data.y.dtype == np.int32
    assert len(data.test_x) == 2
    with pytest.raises(ValueError, match="'dirichlet' needs a class"):
        split(data, kind="dirichlet", num_clients=2)
    assert len(split(data, kind="iid", num_clients=2)) == 2


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": PIXELS}, "'y' is missing"),
        ({"x": PIXELS, "y": LABELS[:5]}, "y has 5 rows for the 20 of x"),
        ({"x": PIXELS, "y": LABELS - 1}, "y must hold integers from 0, and reaches from -1"),
        ({"x": PIXELS, "y": LABELS / 2}, "y must hold integers, one class an example, not float64"),
        ({"x": PIXELS[:, :, 0, 0], "y": PIXELS[:, :2, 0, 0]}, r"y must hold integers, one class an example, not uint8 of shape \(20, 2\)"),
        ({"x": LABELS, "y": LABELS}, r"x must hold numbers of shape \[example, ...features\]"),
        ({"x": np.array([["a"]] * 20), "y": LABELS}, "x must hold numbers"),
        ({"x": np.full((20, 2), np.nan), "y": LABELS}, "x must be finite"),
        ({"x": np.full((20, 2), 1e300), "y": LABELS}, "x must be finite"),
        ({"x": PIXELS[:0], "y": LABELS[:0]}, "x must hold numbers"),
        ({"x": PIXELS[:4], "y": LABELS[:4]}, "4 examples are too few to hold out a test set"),
        ({"x": PIXELS, "y": LABELS, "test_x": PIXELS}, "test_x and test_y must be given together"),
        ({"x": PIXELS, "y": LABELS, "test_x": PIXELS[:, :2], "test_y": LABELS}, "test_x must look like x"),
        ({"x": PIXELS, "y": LABELS, "client_ids": LABELS[:3]}, "client_ids must be 20 integers or strings"),
        ({"x": PIXELS, "y": LABELS, "num_classes": 3}, "num_classes must be an integer of at least 4"),
        ({"x": PIXELS, "y": LABELS, "task": "regression"}, "task must be classification or next_token"),
        ({"x": PIXELS, "y": LABELS, "task": "next_token"}, "x must hold tokens"),
        ({"x": np.array([object()] * 20), "y": LABELS}, "not a readable .npz file"),
    ],
)
def test_npz_errors(tmp_path, arrays, message):
    fails(save(tmp_path / "a.npz", **arrays), message)


@settings(max_examples=60, deadline=None)
@given(place=st.floats(0, 1), change=st.integers(1, 255), cut=st.booleans())
def test_damaged_npz_never_raises_anything_else(tmp_path_factory, place, change, cut):
    path = save(tmp_path_factory.mktemp("npz") / "a.npz", x=PIXELS, y=LABELS)
    data = bytearray(path.read_bytes())
    at = int(place * (len(data) - 1))
    data = data[:at] if cut else data
    if not cut:
        data[at] ^= change
    path.write_bytes(data)
    try:
        load(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert not cut


def test_test_fraction_is_checked():
    fails("digits", "test_fraction must be above 0", test_fraction=0.0)


def test_missing_and_unreadable(tmp_path):
    fails(tmp_path / "none.npz", "no such file or folder")
    fails("missing.npz", "no such file or folder")
    fails("digit", "no such file or folder, and no name of data .*digits, .*owner/name")
    with pytest.raises(ValueError, match="data must name a data set"):
        load("")
    fails("a" * 300 + "/?", "no such file or folder")
    (tmp_path / "a.csv").write_text("x,y")
    fails(tmp_path / "a.csv", "expected an .npz file")
    (tmp_path / "a.npz").write_bytes(b"hello")
    fails(tmp_path / "a.npz", "not a readable .npz file")
    np.save(tmp_path / "b.npy", LABELS)
    (tmp_path / "b.npy").rename(tmp_path / "b.npz")
    fails(tmp_path / "b.npz", "not a readable .npz file")


def test_functions(tmp_path, monkeypatch):
    (tmp_path / "own_data.py").write_text(
        "import numpy as np\n"
        "def pair(): return np.ones((20, 3)), np.arange(20) % 4\n"
        "def four(): return (*pair(), *pair())\n"
        "def named(): return dict(x=np.ones((20, 3)), y=np.arange(20) % 4, client_ids=np.arange(20))\n"
        "def needs(argument): return argument\n"
        "def wrong(): return 3\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert len(load("own_data:pair").test_x) == 4
    assert len(load("own_data:four").x) == 20
    assert load("own_data:named").client_ids is not None
    fails("own_data:needs", r"must be a function without arguments \(missing a required argument: 'argument'\)")
    fails("own_data:wrong", "must return a Dataset, .* not int")
    fails("own_data:number", "must be a function")
    fails("own_data:absent", "no attribute 'absent'")
    fails("no_such_module:pair", "No module named 'no_such_module'")
    sys.modules.pop("own_data")


def dataset(ids=None):
    return Dataset(PIXELS, LABELS, PIXELS, LABELS, ids, 4, "d", "classification")


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "classes", "natural"])
def test_split_uses_every_example_once(kind):
    data = dataset(LABELS * 10)
    rows = split(data, kind=kind, num_clients=4, seed=5)
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(20))
    assert len(rows) == 4


def test_natural_split_takes_a_seeded_subset():
    data = dataset(np.arange(20) // 2)
    assert len(split(data, kind="natural")) == 10
    rows = split(data, kind="natural", num_clients=4, seed=0)
    assert len(rows) == 4 and all(len(set(data.client_ids[one])) == 1 for one in rows)
    several = {tuple(data.client_ids[one[0]] for one in split(data, kind="natural", num_clients=4, seed=seed)) for seed in range(5)}
    assert len(several) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "natural"}, "needs client IDs, and data d has none"),
        ({"kind": "pathological", "num_clients": 2}, "split must be one of iid, dirichlet, classes, natural"),
        ({"kind": "iid"}, "num_clients must be given"),
        ({"kind": "iid", "num_clients": 21}, "num_clients must be at most the number of examples"),
        ({"kind": "dirichlet", "num_clients": 2, "alpha": -1.0}, "alpha must be above 0"),
        ({"kind": "classes", "num_clients": 5, "classes_per_client": 5}, "classes_per_client must be 1 to 4"),
    ],
)
def test_split_errors(options, message):
    with pytest.raises(ValueError, match=message):
        split(dataset(), **options)


def test_natural_split_of_too_many_clients():
    with pytest.raises(ValueError, match="num_clients must be 1 to 4, the natural clients of data d, not 5"):
        split(dataset(LABELS), kind="natural", num_clients=5)
