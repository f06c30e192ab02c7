"""Reading: the same global batches for any number of processes, and exact resumption."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from cogview2_jax.data import manifest as manifests
from cogview2_jax.data import prepare, reading, sources
from cogview2_jax.data.manifest import Manifest
from cogview2_jax.data.records import RecordLayout
from cogview2_jax.tokenizer.pictures import open_picture

from .conftest import picture

grain = pytest.importorskip("grain")
RECORDS = 37


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """37 token records that begin with their number, in shards of 0, 10, 20 and 7."""
    from array_record.python.array_record_module import ArrayRecordWriter

    folder = tmp_path_factory.mktemp("records")
    layout = RecordLayout(3, 8, (16,))
    manifest = Manifest(manifests.TOKENS, 80, 20, layout, {})
    manifests.begin(folder, manifest)
    number = 0
    for shard, length in enumerate((0, 10, 20, 7)):
        writer = ArrayRecordWriter(str(manifest.shard_file(folder, shard)), "group_size:1")
        for _ in range(length):
            row = np.arange(layout.length, dtype="<i4") + 100 * number
            writer.write(row.tobytes())
            number += 1
        writer.close()
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    photos, folder = tmp_path_factory.mktemp("photos"), tmp_path_factory.mktemp("pictures")
    for i in range(6):
        (photos / f"{i}.jpg").write_bytes(picture(i, 60, 48))
    prepare.prepare_pictures(sources.PictureFolder(photos), folder, shard_size=4)
    return folder


def numbers(batch):
    return (batch[:, 0] // 100).tolist()


def test_every_record_once_an_epoch_in_another_order(folder):
    dataset = reading.tokens(folder, 4, seed=1)
    batches = [dataset[step] for step in range(RECORDS)]  # four epochs
    assert batches[0].dtype == np.int32 and batches[0].shape == (4, 8)
    order = np.concatenate([numbers(batch) for batch in batches]).reshape(4, RECORDS)
    assert (np.sort(order) == np.arange(RECORDS)).all()
    assert len({tuple(row) for row in order.tolist()}) == 4
    again = reading.tokens(folder, 4, seed=1)
    assert numbers(again[5]) == numbers(batches[5])
    assert numbers(reading.tokens(folder, 4, seed=2)[5]) != numbers(batches[5])


@pytest.mark.parametrize("epochs", [None, 2])
@pytest.mark.parametrize("count", [2, 4])
def test_global_batches_are_the_same_for_any_number_of_processes(folder, count, epochs):
    one = reading.tokens(folder, 8, epochs=epochs)
    many = [
        reading.tokens(folder, 8, process_index=i, process_count=count, epochs=epochs)
        for i in range(count)
    ]
    if epochs:
        assert {len(one), *map(len, many)} == {2 * RECORDS // 8}
    for step in (0, 1, 4, 5, 8):
        parts = [each[step] for each in many]
        assert {len(part) for part in parts} == {8 // count}
        np.testing.assert_array_equal(np.concatenate(parts), one[step])


def test_it_resumes_exactly(folder):
    dataset = reading.tokens(folder, 4, seed=3)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    batches = iter(dataset.to_iter_dataset(options))
    for _ in range(11):
        next(batches)
    state = batches.get_state()
    assert state == {"next_index": 11}
    expected = [next(batches) for _ in range(3)]
    resumed = iter(dataset.to_iter_dataset(options))
    resumed.set_state(state)
    for step, batch in enumerate(expected, 11):
        np.testing.assert_array_equal(next(resumed), batch)
        np.testing.assert_array_equal(dataset[step], batch)


def epoch(folder, **options):
    batches = reading.tokens(folder, 1, epochs=1, **options)
    return [numbers(batches[step])[0] for step in range(len(batches))]


def test_records_are_trained_on_or_validated_on(folder):
    training = epoch(folder, seed=1, validation_share=0.2)
    validation = epoch(folder, seed=1, validation_share=0.2, validation=True)
    assert len(validation) == 7 and sorted(training + validation) == list(range(RECORDS))
    assert sorted(validation) != list(range(RECORDS - 7, RECORDS))
    # From all over the folder: an ordered captions file is not validated on its last kind.
    assert min(validation) < 12 and max(validation) > 24
    assert sorted(epoch(folder, seed=2, validation_share=0.2)) == sorted(training)
    records = reading.Records(folder)
    assert reading.validation_numbers(records, 0.2).tolist() == sorted(validation)
    assert list(reading.training_numbers(records, 0.2)) == sorted(training)
    assert (
        sorted(epoch(folder)) == list(reading.training_numbers(records, 0)) == list(range(RECORDS))
    )
    assert training != sorted(training)


def test_a_run_keeps_how_its_records_were_split():
    assert reading.split_settings(0.0) == {}
    assert reading.split_settings(0.1) == {"validation_split": "random by picture"}


def records_of(folder, pictures, shards=1):
    """A folder of records of these pictures (numbers), each with its own text."""
    from array_record.python.array_record_module import ArrayRecordWriter

    layout = RecordLayout(3, 8, (16,))
    size = -(-len(pictures) // shards)
    manifest = Manifest(manifests.TOKENS, len(pictures), size, layout, {})
    manifests.begin(folder, manifest)
    for shard in range(shards):
        writer = ArrayRecordWriter(str(manifest.shard_file(folder, shard)), "group_size:1")
        for number in manifest.inputs(shard):
            row = np.append(np.arange(4) + 100 * number, np.arange(4) + pictures[number])
            writer.write(row.astype("<i4").tobytes())
        writer.close()
    return folder


@pytest.mark.parametrize("each", [2, 3, 5])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.13, 0.3, 0.5, 0.95])
def test_records_of_one_picture_are_not_split(tmp_path, each, share):
    """As `--apart`, lists of captions and lines that name one picture make them."""
    shown = [i // each for i in range(30)]
    records_of(tmp_path, shown, shards=4)  # pictures go over the ends of shards
    training = epoch(tmp_path, validation_share=share)
    validation = epoch(tmp_path, validation_share=share, validation=True)
    assert sorted(training + validation) == list(range(30))
    assert not {shown[i] for i in training} & {shown[i] for i in validation}
    wanted = min(max(each, round(share * 30)), 30 - each)
    assert abs(len(validation) - wanted) < each


def test_the_share_is_reached_where_pictures_differ_in_records(tmp_path):
    shown = np.repeat(np.arange(40), np.random.default_rng(0).integers(1, 6, 40)).tolist()
    records_of(tmp_path, shown)
    found = len(epoch(tmp_path, validation_share=0.25, validation=True))
    assert abs(found - len(shown) / 4) < 5


def test_a_single_picture_cannot_be_split(tmp_path):
    records_of(tmp_path, [7] * 24)
    for validation in (False, True):
        with pytest.raises(ValueError, match="24 records of one picture cannot be split: .* 0.1"):
            reading.tokens(tmp_path, 1, validation_share=0.1, validation=validation)
    assert len(epoch(tmp_path)) == 24


@pytest.mark.parametrize("share", [1, -0.1])
def test_a_share_is_below_one(folder, share):
    with pytest.raises(ValueError, match=f"at least 0 and below 1: got {share}"):
        reading.tokens(folder, 1, validation_share=share)


def test_without_a_share_there_is_nothing_to_validate_on(folder):
    with pytest.raises(ValueError, match="no records for validation"):
        reading.tokens(folder, 1, validation=True)


def test_batches_of_one(folder, pictures):
    """Grain counts them in a float, which has no such number as that of an endless data set."""
    training = reading.tokens(folder, 1)
    assert training[0].shape == training[2**40].shape == (1, 8)
    assert reading.pictures(pictures, 1, 16)[7].shape == (1, 16, 16, 3)


def test_a_folder_that_is_said_to_have_endless_shards_is_refused_at_once(tmp_path):
    manifests.begin(tmp_path, Manifest(manifests.PICTURES, 10**15, 1, None, {}))
    with pytest.raises(FileNotFoundError, match="lacks 1000000000000000 of 1000000000000000"):
        reading.Records(tmp_path)


@pytest.mark.parametrize("number", [1, 3, 24])
def test_fewer_records_than_a_batch_fill_it(tmp_path, number):
    records_of(tmp_path, list(range(number)))
    training = reading.tokens(tmp_path, 16)
    assert training[0].shape == training[1].shape == (16, 8)
    once = reading.tokens(tmp_path, 16, epochs=1)
    assert len(once) == 1 and once[0].shape == (16, 8)
    counts = np.bincount(numbers(once[0]), minlength=number)
    assert counts.max() - counts.min() <= 1  # every record as often
    halves = [
        reading.tokens(tmp_path, 16, epochs=1, process_index=i, process_count=2) for i in (0, 1)
    ]
    np.testing.assert_array_equal(np.concatenate([half[0] for half in halves]), once[0])
    named = reading.record_numbers(tmp_path, 16, 0, epochs=1)
    assert named.tolist() == numbers(once[0])


def test_a_short_folder_is_validated_on(tmp_path):
    records_of(tmp_path, list(range(24)))
    unseen = reading.tokens(tmp_path, 16, validation_share=0.1, validation=True, epochs=1)
    assert len(unseen) == 1 and len(set(numbers(unseen[0]))) == 2
    training = reading.tokens(tmp_path, 16, validation_share=0.1, epochs=1)
    assert not set(numbers(training[0])) & set(numbers(unseen[0]))


def test_pictures_are_split_too(pictures):
    part = reading.pictures(pictures, 2, 16, validation_share=0.4, validation=True, epochs=1)
    assert len(part) == 1  # two of six
    assert len(reading.pictures(pictures, 2, 16, validation_share=0.4, epochs=1)) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 1},
        {"process_index": 1, "process_count": 2, "epochs": 2},
        {"validation_share": 0.3, "seed": 2},
        {"validation_share": 0.5, "validation": True},
    ],
)
def test_the_records_of_a_step_can_be_named(folder, options):
    dataset = reading.tokens(folder, 4, **options)
    for step in (0, 3, 7):
        named = reading.record_numbers(folder, 4, step, **options)
        assert named.tolist() == numbers(dataset[step])


def test_the_pictures_of_a_step_can_be_named(pictures):
    records = reading.Records(pictures)
    crops = reading.pictures(pictures, 3, 8, seed=4, smallest=48)
    for step in (0, 5):
        for number, crop in zip(
            reading.record_numbers(pictures, 3, step, seed=4), crops[step], strict=True
        ):
            whole = open_picture(records[number])
            # All of the shorter side: only the place across is left to chance.
            assert any(
                (
                    np.asarray(whole.resize((8, 8), Image.Resampling.BOX, (x, 0, x + 48, 48)))
                    == crop
                ).all()
                for x in range(13)
            )


def test_crops_are_a_function_of_seed_and_place(pictures):
    one = reading.pictures(pictures, 4, 16, seed=5)
    assert one[0].shape == (4, 16, 16, 3) and one[0].dtype == np.uint8
    many = [
        reading.pictures(pictures, 4, 16, seed=5, process_index=i, process_count=2) for i in (0, 1)
    ]
    for step in (0, 3):
        np.testing.assert_array_equal(np.concatenate([each[step] for each in many]), one[step])
    epochs = np.concatenate([one[step] for step in range(3)])  # each picture twice
    assert len(np.unique(epochs.reshape(12, -1), axis=0)) == 12


def test_a_crop_is_in_the_picture_and_half_are_mirrored():
    across = np.broadcast_to(np.arange(60, dtype=np.uint8)[None, :, None], (48, 60, 3))
    image = Image.fromarray(np.ascontiguousarray(across))
    rng = np.random.default_rng(0)
    crops = [reading.random_crop(image, 16, rng, 16, mirror=True) for _ in range(200)]
    mirrored = [bool(crop[0, 0, 0] > crop[0, -1, 0]) for crop in crops]
    assert 70 < sum(mirrored) < 130
    edges = [abs(int(crop[0, 0, 0]) - int(crop[0, -1, 0])) for crop in crops]
    assert min(edges) < 20 and max(edges) > 38
    kept = [reading.random_crop(image, 16, rng, 16) for _ in range(20)]
    assert all(crop[0, 0, 0] < crop[0, -1, 0] for crop in kept)
    assert reading.random_crop(image, 64, rng, 64).shape == (64, 64, 3)  # a smaller picture grows


def test_mistakes_are_one_line(folder, pictures, tmp_path):
    with pytest.raises(ValueError, match="shared equally"):
        reading.tokens(folder, 9, process_count=2)
    with pytest.raises(ValueError, match="shared equally"):
        reading.tokens(folder, 8, process_index=2, process_count=2)
    with pytest.raises(ValueError, match="holds pictures"):
        reading.tokens(pictures, 4)
    with pytest.raises(ValueError, match="holds tokens"):
        reading.pictures(folder, 4, 16)
    with pytest.raises(FileNotFoundError, match="no prepared records"):
        reading.Records(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-5000], "is damaged: delete it"),
        (lambda content: b"", "is damaged: delete it"),
        (lambda content: content.replace(b"s", b"t"), "is damaged: delete it"),
        (None, "lacks 1 of 4 shards"),
    ],
)
def test_a_damaged_shard_is_named(folder, tmp_path, damage, message):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    file = reading.Records(copy).manifest.shard_file(copy, 2)
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(file.read_bytes()))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        records = reading.Records(copy)
        [records[i] for i in range(len(records))]


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"num_inputs": "80"},
            {"shard_size": 0},
            {"kind": "x"},
            {"settings": []},
            {"layout": None},
        ),
        {"num_inputs": float("nan")},
    ],
)
def test_values_that_no_manifest_has_are_refused(folder, tmp_path, change):
    content = json.loads((folder / manifests.MANIFEST).read_text())
    (tmp_path / manifests.MANIFEST).write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match="records.json is damaged or of another version"):
        manifests.read(tmp_path)


def test_a_damaged_manifest_is_named(folder, tmp_path):
    for content in ("", "[]", '{"format": 1}', '{"format": 2}'):
        (tmp_path / manifests.MANIFEST).write_text(content)
        with pytest.raises(ValueError, match="records.json is damaged"):
            manifests.read(tmp_path)


@pytest.mark.parametrize(
    "options", [{"text_slots": 0}, {"sizes": ()}, {"sizes": (20,)}, {"sizes": (32, 16)}]
)
def test_unfit_layouts_are_refused(options):
    with pytest.raises(ValueError):
        RecordLayout(**options)
