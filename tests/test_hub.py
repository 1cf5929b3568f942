"""Hugging Face data sets: columns to arrays, and what goes wrong. The hub itself is not reached."""

import sys

import numpy as np
import pytest

from fedmoe_jax.data import hub
from fedmoe_jax.data.sources import from_arrays, load

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), np.uint8)
LABELS = np.arange(20) % 4


def test_hub_extra_is_named_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in ("hf:owner/name", "owner/name", "hf:mnist"):
        message = r"pip install '\.\[hub\]'"
        with pytest.raises(ValueError, match=message) as caught:
            load(name)
        assert repr(name.removeprefix("hf:")) in str(caught.value)


class FakeHub:
    """Stands for the module `datasets`."""

    def __init__(self, splits):
        self.splits = splits

    def load_dataset(self, path, configuration):
        if isinstance(self.splits, Exception):
            raise self.splits
        self.asked = path, configuration
        return {key: Columns(columns) for key, columns in self.splits.items()}


class Columns(dict):
    @property
    def column_names(self):
        return list(self)


def test_hub(monkeypatch):
    fake = FakeHub({"train": {"img": list(PIXELS), "fine_label": list(LABELS)}, "test": {"img": list(PIXELS[:3]), "fine_label": [1, 2, 3]}})
    monkeypatch.setitem(sys.modules, "datasets", fake)
    data = load("hf:owner/name:small")
    assert fake.asked == ("owner/name", "small") and len(data.test_x) == 3
    np.testing.assert_array_equal(data.x, PIXELS)
    monkeypatch.setitem(sys.modules, "datasets", FakeHub(ConnectionError("no\nnetwork")))
    with pytest.raises(ValueError, match="'owner/name' cannot be loaded from the Hugging Face hub: no network"):
        load("owner/name")
    monkeypatch.setitem(sys.modules, "datasets", FakeHub({"all": {}}))
    with pytest.raises(ValueError, match="'owner/name' has no split 'train', only all"):
        load("owner/name")


def test_hub_columns():
    table = Columns(b=[1.0, 2.0], a=[3.0, 4.0], label=["yes", "no"], user_id=["u", "v"])
    arrays = hub.to_arrays(table, Columns(b=[5.0], a=[6.0], label=["yes"]), "n")
    np.testing.assert_array_equal(arrays["x"], [[1, 3], [2, 4]])
    assert list(arrays["y"]) == [1, 0] and list(arrays["test_y"]) == [1] and list(arrays["client_ids"]) == ["u", "v"]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"image": [1]}, "no label column"),
        ({"label": [1]}, "no input column"),
        ({"text": ["a", "b"], "label": [0, 1]}, "column 'text' holds no numbers or images"),
        ({"image": [PIXELS[0], PIXELS[0, :2]], "label": [0, 1]}, "rows of column 'image' differ in size"),
        ({"a": [[1, 2]], "b": [[1, 2]], "label": [0]}, "which column is the input"),
    ],
)
def test_hub_column_errors(train, message):
    with pytest.raises(ValueError, match=message):
        hub.to_arrays(Columns(train), None, "n")


@pytest.mark.filterwarnings("default")
def test_hub_with_the_real_package():
    datasets = pytest.importorskip("datasets")
    image = pytest.importorskip("PIL.Image")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list("abcd")), "writer_id": datasets.Value("int32")}
    )
    for pixels in (PIXELS, PIXELS[..., 0]):
        columns = {"image": [image.fromarray(one) for one in pixels], "label": list(LABELS), "writer_id": list(LABELS)}
        arrays = hub.to_arrays(datasets.Dataset.from_dict(columns, features=features), None, "n")
        np.testing.assert_array_equal(arrays["x"], pixels if pixels.ndim == 4 else pixels[..., None])
        data = from_arrays(arrays, "n")
        assert data.x.dtype == np.uint8 and data.num_classes == 4
    matrix = datasets.Dataset.from_dict({"features": [[1.0, 2.0], [3.0, 4.0]], "label": [0, 1]})
    np.testing.assert_array_equal(hub.to_arrays(matrix, None, "n")["x"], [[1, 2], [3, 4]])
