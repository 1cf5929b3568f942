"""Image folders: IDX and CIFAR files made here, whole and damaged."""

import gzip
import pickle
import struct

import numpy as np
import pytest

from fedmoe_jax.data.sources import load

GENERATOR = np.random.default_rng(0)
PIXELS = GENERATOR.integers(0, 256, (20, 4, 4, 3), np.uint8)
LABELS = np.arange(20) % 4


def idx(array, shape=None):
    shape = shape or array.shape
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape) + array.tobytes()


def idx_folder(folder, end=""):
    folder.mkdir(exist_ok=True)
    pack = gzip.compress if end == ".gz" else bytes
    for part, count in (("train", 20), ("t10k", 8)):
        (folder / f"{part}-images-idx3-ubyte{end}").write_bytes(pack(idx(PIXELS[:count, :, :, 0])))
        (folder / f"{part}-labels-idx1-ubyte{end}").write_bytes(pack(idx(LABELS[:count].astype(np.uint8))))
    return folder


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("inner", ["", "raw"])
def test_idx(tmp_path, end, inner):
    idx_folder(tmp_path / inner, end)
    data = load(tmp_path)
    np.testing.assert_array_equal(data.x, PIXELS[..., :1])
    np.testing.assert_array_equal(data.y, LABELS)
    np.testing.assert_array_equal(data.test_x, PIXELS[:8, ..., :1])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train-images-idx3-ubyte", idx(PIXELS[..., 0], (21, 4, 4)), r"the header says \[21, 4, 4\], 336 bytes, and 320 follow"),
        ("train-images-idx3-ubyte", idx(PIXELS[..., 0], (2**32 - 1,) * 3), "the header says"),
        ("train-images-idx3-ubyte", idx(PIXELS[..., 0]) + b"1", "the header says"),
        ("train-images-idx3-ubyte", idx(PIXELS[..., 0], (20, 16)), "expected 3 dimensions"),
        ("train-images-idx3-ubyte", b"", "not an IDX file"),
        ("train-images-idx3-ubyte", b"\0\0\x08\x03\0\0", "not an IDX file"),
        ("train-images-idx3-ubyte", b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", "not an IDX file of unsigned bytes"),
        ("train-images-idx3-ubyte", gzip.compress(idx(PIXELS[..., 0]))[:-20], "damaged gzip"),
        ("t10k-labels-idx1-ubyte", idx(LABELS[:7].astype(np.uint8)), "7 labels for 8 images"),
        ("t10k-labels-idx1-ubyte", None, "t10k-labels-idx1-ubyte is missing"),
    ],
)
def test_idx_errors_name_the_file(tmp_path, file, content, message):
    path = idx_folder(tmp_path) / file
    path.write_bytes(content) if content is not None else path.unlink()
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path)
    assert file in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


CIFAR = GENERATOR.integers(0, 256, (6, 3072), np.uint8)
CIFAR_LABELS = [3, 9, 0, 1, 7, 3]


def python2_pickle(array, labels, key=b"labels"):
    """What cPickle of Python 2 wrote: protocol 2, byte strings, numpy.core.multiarray."""

    def short(value):
        return b"U" + bytes([len(value)]) + value

    data = array.tobytes()
    dtype = b"cnumpy\ndtype\n" + short(b"u1") + b"K\x00K\x01\x87R(K\x03" + short(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"".join(b"J" + struct.pack("<i", size) for size in array.shape)
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + short(b"b") + b"\x87R"
    state = b"(K\x01(" + shape + b"t" + dtype + b"\x89T" + struct.pack("<i", len(data)) + data + b"tb"
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + short(b"data") + made + state + short(key) + listed + b"u."


def cifar_folder(folder, version):
    folder.mkdir(exist_ok=True)
    halves = {"data_batch_1": slice(0, 2), "data_batch_2": slice(2, 4), "test_batch": slice(4, 6)}
    for name, rows in halves.items():
        pixels, labels = CIFAR[rows], CIFAR_LABELS[rows]
        if version == "binary":
            (folder / f"{name}.bin").write_bytes(np.c_[np.uint8(labels), pixels].tobytes())
        elif version == "python2":
            (folder / name).write_bytes(python2_pickle(pixels, labels))
        else:
            (folder / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": labels}, protocol=version))
    return folder


@pytest.mark.parametrize("version", ["python2", "binary", 2, 4, 5])
def test_cifar10(tmp_path, version):
    data = load(cifar_folder(tmp_path / "cifar-10", version).parent)
    assert data.x.shape == (4, 32, 32, 3) and data.x.dtype == np.uint8 and data.num_classes == 10
    assert data.x[1, 2, 5, 2] == CIFAR[1, 2 * 1024 + 2 * 32 + 5]
    np.testing.assert_array_equal(data.x.transpose(0, 3, 1, 2).reshape(4, -1), CIFAR[:4])
    np.testing.assert_array_equal(data.y, CIFAR_LABELS[:4])
    np.testing.assert_array_equal(data.test_y, CIFAR_LABELS[4:])


def test_python2_pickle_is_what_pickle_reads():
    batch = pickle.loads(python2_pickle(CIFAR, CIFAR_LABELS).replace(b"K\x00K\x01\x87R", b"\x89\x88\x87R"), encoding="bytes")
    np.testing.assert_array_equal(batch[b"data"], CIFAR)
    assert batch[b"labels"] == CIFAR_LABELS


def test_cifar100(tmp_path):
    fine = [99, 0, 50, 1, 2, 3]
    for name in ("train", "test"):
        (tmp_path / name).write_bytes(python2_pickle(CIFAR, fine, b"fine_labels"))
    data = load(tmp_path)
    (tmp_path / "binary").mkdir()
    for name in ("train", "test"):
        (tmp_path / "binary" / f"{name}.bin").write_bytes(np.c_[np.uint8([7] * 6), np.uint8(fine), CIFAR].tobytes())
    binary = load(tmp_path / "binary")
    for one in (data, binary):
        assert one.num_classes == 100 and list(one.y) == fine and len(one.test_x) == 6
    np.testing.assert_array_equal(data.x, binary.x)


class Hostile:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def float_batch():
    return pickle.dumps({b"data": CIFAR.astype(float), b"labels": CIFAR_LABELS})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Hostile(eval, "open('PWNED', 'w')")), "builtins.eval, which is refused"),
        (pickle.dumps({b"data": Hostile(__import__, "os"), b"labels": []}), "which is refused"),
        (b"cnumpy\nndarray\n(J\xff\xff\xff\x7ftR.", "not a CIFAR-10 batch"),
        (b"cnumpy.f2py.diagnose\nrun\n)R.", "numpy.f2py.diagnose.run, which is refused"),
        (pickle.dumps({b"data": np.array([object()]), b"labels": [1]}), "which is refused|not a CIFAR-10 batch"),
        (pickle.dumps({b"data": CIFAR[:, :-1], b"labels": CIFAR_LABELS}), r"6 labels for uint8 pixels of shape \[6, 3071\]"),
        (pickle.dumps({b"data": CIFAR, b"labels": CIFAR_LABELS[1:]}), "5 labels for"),
        (pickle.dumps({b"data": CIFAR, b"labels": [10] * 6}), "labels reach from 10 to 10, not 0 to 9"),
        (pickle.dumps({b"data": CIFAR}), "not a CIFAR-10 batch"),
        (pickle.dumps([1, 2]), "not a CIFAR-10 batch"),
        (python2_pickle(CIFAR, CIFAR_LABELS)[:900], "not a CIFAR-10 batch"),
        (python2_pickle(CIFAR, CIFAR_LABELS).replace(struct.pack("<i", 3072), struct.pack("<i", 3073), 1), "not a CIFAR-10 batch"),
        (float_batch(), "which is refused"),
        (b"", "not a CIFAR-10 batch"),
        (None, "cannot read the file"),
    ],
)
def test_cifar_pickles_are_not_trusted(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    path = cifar_folder(tmp_path / "cifar", 2) / "data_batch_2"
    path.write_bytes(content) if content is not None else path.rename(path.with_name("data_batch_3"))
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / "cifar")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "PWNED").exists()


def test_cifar_binary_sizes_are_checked(tmp_path):
    path = cifar_folder(tmp_path, "binary") / "test_batch.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a whole number of CIFAR-10 records") as caught:
        load(tmp_path)
    assert str(path) in str(caught.value)


def test_unknown_and_ambiguous_folders(tmp_path):
    with pytest.raises(ValueError, match="no IDX files") as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    idx_folder(tmp_path / "a"), idx_folder(tmp_path / "b")
    with pytest.raises(ValueError, match="several data sets in this folder, name one of a, b"):
        load(tmp_path)
