"""Reading .pt files: every number, a little at a time, and no code."""

import os
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from cogview2_jax.published.pickles import Unread
from cogview2_jax.published.torch_files import Tensor, TorchFile
from tests.published import published_files as pf

RNG = np.random.default_rng(0)
NUMBERS = RNG.standard_normal((6, 5, 4))


def content(file):
    with TorchFile(file) as opened:
        return opened.content


def refusal(file) -> str:
    with pytest.raises(ValueError) as caught:
        with TorchFile(file) as opened:
            for value in opened.content.values():
                if isinstance(value, Tensor):
                    value.read()
    assert str(caught.value).startswith(str(file)) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_dtype_and_shape_is_read_exactly(protocol, tmp_path):
    arrays = {
        dtype: (100 * NUMBERS).astype(dtype)
        for dtype in ("float16", "float32", "float64", "int32", "int64", "uint8")
    }
    arrays |= {"scalar": np.float32(3.5)[None][0:1].reshape(()), "none": np.zeros((0, 3), "f4")}
    file = tmp_path / "a.pt"
    pf.write_pt(file, {key: pf.Tensor(each) for key, each in arrays.items()}, protocol=protocol)
    with TorchFile(file) as opened:
        assert opened.content.keys() == arrays.keys()
        for name, expected in arrays.items():
            found = opened.content[name]
            assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
            for read in (
                found.read(),
                np.concatenate([np.atleast_1d(b) for b in found.blocks(50)]),
            ):
                assert read.dtype == expected.dtype
                np.testing.assert_array_equal(
                    read, np.atleast_1d(expected) if read.ndim else expected
                )


def test_the_format_before_torch_1_6(tmp_path):
    arrays = {"a": NUMBERS.astype("f4"), "b": NUMBERS[0], "c": np.arange(5), "none": np.zeros(0)}
    whole = np.arange(24, dtype="f4")
    written = {name: pf.Tensor(each) for name, each in arrays.items()}
    written["part"] = pf.Tensor(pf.View(whole, 4, (2, 3), (6, 1)))
    pf.write_old(tmp_path / "a.pth", {"state_dict": written, "epoch": 3})
    with TorchFile(tmp_path / "a.pth") as opened:
        assert opened.content["epoch"] == 3
        found = opened.content["state_dict"]
        for name, expected in arrays.items():
            np.testing.assert_array_equal(found[name].read(), expected)
        np.testing.assert_array_equal(found["part"].read(), [[4, 5, 6], [10, 11, 12]])


def test_a_pickle_of_the_old_format_runs_nothing(tmp_path):
    pf.write_old(tmp_path / "a.pth", {"a": Evil(os.system, f"touch {tmp_path / 'ran'}")})
    assert f"asks for '{os.system.__module__}.system'" in refusal(tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()


def test_files_of_the_old_format_that_torch_wrote(tmp_path):
    torch = pytest.importorskip("torch")
    arrays = {"a": torch.arange(24.0).reshape(4, 6), "b": torch.ones(3, dtype=torch.float16)}
    arrays["part"] = arrays["a"][1:3, 2:5].T
    file = tmp_path / "a.pth"
    torch.save(arrays, file, _use_new_zipfile_serialization=False)
    with TorchFile(file) as opened:
        for name, expected in arrays.items():
            np.testing.assert_array_equal(opened.content[name].read(), expected.numpy())


def test_views_of_one_storage(tmp_path):
    storage = np.arange(24, dtype=np.float32)
    views = {
        "rows": pf.View(storage, 8, (2, 4), (4, 1)),
        "transposed": pf.View(storage, 0, (4, 6), (1, 4)),
        "columns": pf.View(storage, 1, (6, 2), (4, 1)),
        "repeated": pf.View(storage, 5, (3, 2), (0, 1)),
    }
    file = tmp_path / "a.pt"
    pf.write_pt(file, {name: pf.Tensor(view) for name, view in views.items()})
    grid = storage.reshape(6, 4)
    expected = {
        "rows": grid[2:4],
        "transposed": grid.T,
        "columns": grid[:, 1:3],
        "repeated": np.tile(storage[5:7], (3, 1)),
    }
    with TorchFile(file) as opened:
        for name, found in opened.content.items():
            np.testing.assert_array_equal(found.read(), expected[name])


def test_plain_values_are_kept_and_objects_passed_over(tmp_path):
    pf.write_pt(tmp_path / "a.pt", pf.state({}, ranks=2, step=7))
    found = content(tmp_path / "a.pt")
    assert (found["global_steps"], found["mp_world_size"], found["optimizer"]) == (7, 2, None)
    assert found["ds_config"] == {"train_micro_batch_size_per_gpu": 4, "fp16": {"enabled": True}}
    assert isinstance(found["args"], Unread)
    assert isinstance(found["sparse_tensor_module_names"], Unread)
    assert isinstance(found["client_lr_scheduler"]["end_lr"], Unread)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_file_that_torch_wrote(protocol, tmp_path):
    torch = pytest.importorskip("torch")
    numbers = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
    made = {
        "half": numbers.half(),
        "bfloat16": numbers.bfloat16(),
        "part": numbers[1:, 2],
        "transposed": numbers.transpose(0, 2),
        "step": 3,
    }
    torch.save(made, tmp_path / "a.pt", pickle_protocol=protocol)
    with TorchFile(tmp_path / "a.pt") as opened:
        assert opened.content["step"] == 3
        for name in ("half", "bfloat16", "part", "transposed"):
            found = opened.content[name].read()
            assert str(found.dtype) == str(made[name].dtype).removeprefix("torch.")
            np.testing.assert_array_equal(found.astype(np.float32), made[name].float().numpy())


def test_a_large_tensor_is_never_in_memory(tmp_path):
    file = tmp_path / "a.pt"
    pf.write_pt(file, {"large": pf.Tensor(np.ones((4000, 2500), np.float32))})
    tracemalloc.start()
    try:
        with TorchFile(file) as opened:
            total = sum(int(block.sum()) for block in opened.content["large"].blocks(1 << 20))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 10_000_000
    assert peak < 4 << 20  # of 40 MB; the sum of a block is taken in one more


class Evil:
    """Runs a command where it is loaded."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", [1, 2, 4])
@pytest.mark.parametrize("inside", ["alone", "module", "key of a dict"])
def test_a_pickle_that_would_run_a_command_runs_nothing(protocol, inside, tmp_path):
    marker = tmp_path / "ran"
    evil = Evil(os.system, f"touch {marker}")
    made = {"alone": evil, "module": {"module": {"w": evil}}, "key of a dict": {evil: 1}}[inside]
    pf.write_pt(tmp_path / "a.pt", made, protocol=protocol)
    assert f"asks for '{os.system.__module__}.system'" in refusal(tmp_path / "a.pt")
    assert not marker.exists()
    pickle.loads(pickle.dumps(evil))  # it does where pickle loads it
    assert marker.exists()


EVIL = {
    "eval": (b"\x80\x02c__builtin__\neval\nX\x05\0\0\0print\x85R.", "'__builtin__.eval'"),
    "a name within a module": (b"\x80\x04\x8c\x05torch\x8c\x05_C.os\x93.", "'torch._C.os'"),
    "getattr": (b"\x80\x02cbuiltins\ngetattr\n.", "'builtins.getattr'"),
    "import": (b"c__builtin__\n__import__\n(S'os'\ntR.", "'__builtin__.__import__'"),
    "torch's own loader": (b"\x80\x02ctorch\nload\n.", "'torch.load'"),
    "an instance": (b"(S'ls'\nios\nsystem\n.", "opcode INST"),
    "an object": (b"(cargparse\nNamespace\no.", "opcode OBJ"),
    "a registered extension": (b"\x80\x02\x82\x01.", "opcode EXT1"),
    "a persistent name": (b"Pabc\n.", "opcode PERSID"),
    "a tensor of no storage": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\0K\0))tR.",
        "damaged",
    ),
    "a call of a string": (b"\x80\x02X\x01\0\0\0a)R.", "a call of what is no function"),
    "a state of a class": (b"\x80\x02cargparse\nNamespace\n}b.", "a state of what is no object"),
    "a tuple as a key": (b"\x80\x02}(K\x01\x85K\x01u.", "a key that is a tuple"),
    "no end": (b"\x80\x02}", "damaged"),
    "nothing on the stack": (b"\x80\x02.", "damaged"),
    "no pickle": (b"abc", "damaged"),
    "empty": (b"", "damaged"),
    "a memo that is not there": (b"\x80\x02h\x09.", "damaged"),
    "a string without end": (b"\x80\x02X\xff\xff\xff\x7fa.", "damaged"),
}


@pytest.mark.parametrize("name", EVIL)
def test_a_strange_pickle_is_refused(name, tmp_path):
    pickled, message = EVIL[name]
    pf.write_archive(tmp_path / "a.pt", pickled, [])
    assert message in refusal(tmp_path / "a.pt")


def test_a_memo_place_of_billions_takes_no_memory(tmp_path):
    pf.write_archive(tmp_path / "a.pt", b"\x80\x02}r\xff\xff\xff\x7f.", [])
    tracemalloc.start()
    try:
        assert content(tmp_path / "a.pt") == {}
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def damage_entries(change):
    def damage(file):
        entries = pf.read_entries(file)
        change(entries)
        pf.write_entries(file, entries)

    return damage


def old(change):
    """A damage of a file in the format before torch 1.6."""

    def damage(file):
        pf.write_old(file, {"a": pf.Tensor(NUMBERS), "b": pf.Tensor(NUMBERS[0])})
        before = file.read_bytes()
        file.write_bytes(change(before))
        assert file.read_bytes() != before

    return damage


def flip(file):
    content = bytearray(file.read_bytes())
    content[content.index(NUMBERS.astype("f4").tobytes()[:40]) + 7] ^= 1
    file.write_bytes(content)


def cut(share):
    return lambda file: file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])


def compress(file):
    entries = pf.read_entries(file)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, each in entries.items():
            archive.writestr(f"a/{name}", each)


def edit_header(file):
    content = bytearray(file.read_bytes())
    place = content.index(b"a/data/0")
    content[place : place + 8] = b"a/data/7"
    file.write_bytes(content)


DAMAGES = {
    "a changed byte": (flip, "the checksum of 'data/0' is wrong"),
    "cut in half": (cut(0.5), "damaged"),
    "cut at the end": (cut(0.99), "damaged"),
    "empty": (lambda file: file.write_bytes(b""), "not a zip archive"),
    "of another kind": (lambda file: file.write_bytes(b"\x89PNG" * 99), "not a zip archive"),
    "of old torch and cut": (old(lambda content: content[:-1]), "it ends within storage '1'"),
    "of old torch and cut in its pickles": (old(lambda content: content[:300]), "damaged"),
    "of old torch and nothing else": (old(lambda content: content[:15] + bytes(99)), "damaged"),
    "of an older torch": (
        old(lambda content: content.replace(b"\x80\x02M\xe9\x03.", b"\x80\x02M\xe8\x03.")),
        "version 1000 of torch's old format: only 1001 is read",
    ),
    "of old torch on a large machine": (
        old(lambda content: content.replace(b"little_endianq\x01\x88", b"little_endianq\x01\x89")),
        "old format",
    ),
    "of old torch with other storages": (
        lambda file: pf.write_old(file, {"a": pf.Tensor(NUMBERS)}, keys=["7"]),
        "its storages are not those",
    ),
    "an archive of something else": (
        lambda file: pf.write_entries(file, {"readme.txt": b"hello"}),
        "it has no data.pkl",
    ),
    "compressed": (compress, "compressed or encrypted"),
    "of a large machine": (
        damage_entries(lambda entries: entries.update(byteorder=b"big")),
        "byte order b'big'",
    ),
    "without its numbers": (
        damage_entries(lambda entries: entries.pop("data/0")),
        "no entry 'data/0'",
    ),
    "with few numbers": (
        damage_entries(lambda entries: entries.update({"data/0": bytes(16)})),
        "entry 'data/0' has 16 bytes, not 120 numbers",
    ),
    "another header": (edit_header, "another header in place of"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_refused_in_one_line(name, tmp_path):
    damage, message = DAMAGES[name]
    pf.write_pt(tmp_path / "a.pt", {"w": pf.Tensor(NUMBERS.astype(np.float32))})
    damage(tmp_path / "a.pt")
    assert message in refusal(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "view",
    [
        (1, (6, 4), (4, 1)),
        (0, (6, 4), (5, 1)),
        (0, (-6, 4), (4, 1)),
        (24, (1,), (1,)),
        (0, (6,), (4, 1)),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(view, tmp_path):
    pf.write_pt(tmp_path / "a.pt", {"w": pf.Tensor(pf.View(np.ones(24, np.float32), *view))})
    assert "damaged" in refusal(tmp_path / "a.pt")


def test_any_changed_byte_leads_to_a_refusal_or_to_the_same_numbers(tmp_path):
    file, numbers = tmp_path / "a.pt", np.arange(6, dtype=np.float32)
    pf.write_pt(file, {"w": pf.Tensor(numbers), "step": 3})
    whole = file.read_bytes()
    for place in range(0, len(whole), 3):
        file.write_bytes(whole[:place] + struct.pack("B", whole[place] ^ 0x41) + whole[place + 1 :])
        try:
            with TorchFile(file) as opened:
                read = opened.content["w"].read()
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            np.testing.assert_array_equal(read, numbers)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        TorchFile(tmp_path / "nowhere.pt")
    with pytest.raises(ValueError, match="is not a file"):
        TorchFile(tmp_path)
