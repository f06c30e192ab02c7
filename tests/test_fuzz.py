"""Generated inputs over all commands: they succeed, or say in one line why not. See `fuzzing`."""

import contextlib
import io
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogview2_jax import bundle as bundles
from cogview2_jax import cli
from cogview2_jax.cli import common
from tests.fuzzing import (
    NUMBERS,
    PROMPTS,
    WORDS,
    changed_json,
    check_command,
    damaged,
    examples,
    limits,
    state_of,
)
from tests.fuzzing_files import captions_files, inputs_of, make_world, outputs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("fuzz") / "world")


@pytest.fixture(scope="module")
def run(world, tiny_folder, tmp_path_factory):
    """Run a command in an empty folder of its own, and check what it did."""
    place = tmp_path_factory.mktemp("work")
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "use_compilation_cache", lambda: None)
        for name, value in (
            ("jax_compilation_cache_dir", str(cache)),
            ("jax_persistent_cache_min_compile_time_secs", 0),
            ("jax_persistent_cache_min_entry_size_bytes", -1),
        ):
            jax.config.update(name, value)
        patch.setenv("HOME", str(place))
        yield lambda *arguments, **files: _run(place, (world, tiny_folder), arguments, files)
        jax.config.update("jax_compilation_cache_dir", None)


def _run(
    place: Path, inputs: tuple[Path, ...], arguments: tuple[Any, ...], files: dict[str, Any]
) -> tuple[int, str, str]:
    work = place / "work"
    shutil.rmtree(work, ignore_errors=True)
    (work / "there").mkdir(parents=True)
    (work / "file").write_bytes(b"a file")
    (work / "loop").symlink_to("loop")
    os.mkfifo(work / "pipe")
    before = state_of(work), state_of(*inputs)
    spoken = os.dup(2)  # what libraries that are not Python say
    out, err = (
        io.TextIOWrapper(io.BytesIO(), "utf-8", errors=how)
        for how in ("strict", "backslashreplace")
    )
    with (
        tempfile.TemporaryFile() as below,
        contextlib.chdir(work),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        os.dup2(below.fileno(), 2)
        try:
            with limits(), pytest.raises(SystemExit) as caught:
                cli.main([str(argument) for argument in arguments])
        finally:
            os.dup2(spoken, 2)
            os.close(spoken)
        below.seek(0)
        libraries = below.read().decode(errors="replace")
    said = [(stream.flush(), stream.buffer.getvalue().decode())[1] for stream in (out, err)]
    wrote = state_of(work) != before[0]
    check_command(caught.value.code, *said, wrote=wrote)
    assert caught.value.code != 2 or not libraries, libraries
    assert state_of(*inputs) == before[1], "an input was changed"
    return caught.value.code, *said


def often(usual: Any, odd: Any) -> Any:
    """One of a few usual values, or, one time in seven, an odd one: most calls get past the first
    checks.
    """
    return st.sampled_from([*[st.sampled_from(usual)] * 6, odd]).flatmap(lambda values: values)


@st.composite
def options(draw: Any, **known: Any) -> list[str]:
    """Some of the options, each name with underscores and the strategy of its values."""
    given: list[str] = []
    for name, values in known.items():
        if draw(st.booleans()):
            value = None if values is None else draw(values)
            given.append(f"--{name.replace('_', '-')}")
            given += [] if value is None else value if isinstance(value, list) else [value]
    return given


DRAWING = dict(
    num_images=often(["2"], NUMBERS),
    seed=often(["0", "7"], NUMBERS),
    stage=often(["base", "direct", "full"], WORDS),
    candidates=often(["1", "2"], NUMBERS),
    dtype=often(["float32"], WORDS),
    out=often(["out"], outputs()),
    overwrite=None,
)
PROMPT = often(PROMPTS, WORDS)


@examples(25)
@given(data=st.data())
def test_generate(run, tiny_folder, data):
    prompts = data.draw(st.lists(PROMPT, max_size=2))
    chosen = data.draw(options(**DRAWING))
    run(
        "generate", "--bundle", tiny_folder, *chosen, *(["--"] * data.draw(st.booleans())), *prompts
    )


@examples(40)
@given(data=st.data())
def test_caption(run, world, tiny_folder, data):
    pictures = data.draw(st.lists(inputs_of(world), max_size=3))
    chosen = data.draw(options(language=often(["en", "zh"], WORDS)))
    run("caption", "--bundle", tiny_folder, *chosen, "--", *pictures)


@examples(30)
@given(data=st.data())
@pytest.mark.long
def test_infill(run, world, tiny_folder, data):
    edges = st.sampled_from(["0", "0.5", "1", "0.01", "0.99"])
    box = data.draw(
        st.just(["0", "0", "0.5", "1"]) | st.lists(edges | NUMBERS, min_size=4, max_size=4)
    )
    chosen = data.draw(options(**DRAWING))
    picture = data.draw(often([str(world / "plain.png")], inputs_of(world)))
    command = ["infill", "--bundle", tiny_folder, "--box", *box, *chosen, "--"]
    run(*command, data.draw(PROMPT), picture)


@examples(40)
@given(data=st.data())
def test_edit(run, world, tiny_folder, data):
    """Boxes and masks of every kind, and files of lines of which some are no edits."""
    edges = st.sampled_from(["0", "0.5", "1", "0.01", "0.99", "nan", ""]) | NUMBERS
    box = data.draw(
        st.just(["0", "0", "0.5", "1"]) | st.lists(edges, min_size=4, max_size=4).map(list)
    )
    chosen = data.draw(options(**DRAWING))
    picture = data.draw(often([str(world / "plain.png")], inputs_of(world)))
    command = ["edit", "--bundle", tiny_folder, *chosen]
    match data.draw(st.sampled_from(["box", "mask", "lines"])):
        case "box":
            run(*command, f"--box={','.join(box)}", "--", picture, data.draw(PROMPT))
        case "mask":
            masks = [str(world / f"{name}.png") for name in ("plain", "white", "black")]
            mask = data.draw(often(masks, inputs_of(world)))
            run(*command, "--mask", mask, "--", picture, data.draw(PROMPT))
        case "lines":
            good = "\t".join(["a star", str(world / "plain.png"), "0", "0", "0.5", "1"])
            line = "\t".join([data.draw(PROMPT), picture, *box])
            lines = data.draw(st.permutations([good, line, data.draw(WORDS)]))
            file = world.parent / "edits.tsv"
            file.write_bytes("\n".join(lines).encode(errors="surrogatepass"))
            run(*command, "--lines", data.draw(often([str(file)], inputs_of(world))))


@examples(20)
@given(data=st.data())
def test_rank(run, world, tiny_folder, data):
    pictures = data.draw(st.lists(inputs_of(world), max_size=3))
    run("rank", "--bundle", tiny_folder, "--", data.draw(PROMPT), *pictures)


@examples(25)
@given(data=st.data())
def test_init(run, world, data):
    """With changes of the configuration, text models and captions of every kind."""
    inputs = inputs_of(world)
    changes = data.draw(changed_json(_shipped()))
    file = world.parent / "changes.json"
    file.write_text(json.dumps(changes))
    known = dict(
        preset=often(["scenes"], WORDS),
        config=often([str(file)], inputs),
        text_model=often([str(bundles.SHIPPED / bundles.TEXT_MODEL)], inputs),
        captions=often([str(world / "captions.txt"), str(world / "good.jsonl")], inputs),
        caption_field=WORDS,
        pieces=often(["20"], NUMBERS),
    )
    given_ = data.draw(options(**known)) or ["--config", str(file)]
    run("init", "--out", data.draw(often(["new"], outputs())), *given_)


def _shipped() -> Any:
    return bundles.to_json(bundles.read_description(bundles.SHIPPED))


@examples(40)
@given(data=st.data())
def test_damaged_bundles(run, world, tiny_folder, data):
    """A field of the configuration, or bytes of a file, are changed: info, and a picture."""
    copy = world.parent / "damaged"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(tiny_folder, copy)
    config = json.loads((copy / bundles.CONFIG).read_bytes())
    name = data.draw(
        st.sampled_from(("fields", bundles.CONFIG, bundles.TEXT_MODEL, bundles.WEIGHTS))
    )
    if name == "fields":
        (copy / bundles.CONFIG).write_text(json.dumps(data.draw(changed_json(config))))
    else:
        content = (copy / name).read_bytes()
        # The header of the weights is what has a structure.
        head = (
            int.from_bytes(content[:8], "little") + 8 if name == bundles.WEIGHTS else len(content)
        )
        (copy / name).write_bytes(data.draw(damaged(content[:head])) + content[head:])
    if run("info", "--bundle", copy)[0] == 0:
        command = ["generate", PROMPTS[2], "--bundle", copy, "--num-images", 2, "--candidates", 1]
        run(*command, "--stage", data.draw(st.sampled_from(("base", "full"))))


@examples(50)
@given(data=st.data())
def test_prepare(run, world, tiny_folder, data):
    ending, content = data.draw(captions_files())
    file = world / f"generated{ending}"
    file.write_bytes(content)
    sources = [str(file), str(file), str(world / "good.tsv"), str(world), "scenes"]
    known = dict(
        out=often(["records"], outputs()),
        pictures=None,
        split=often(["train"], WORDS),
        count=often(["2", "3"], NUMBERS.filter(lambda number: len(number) < 4)),
        images=often([str(world)], inputs_of(world)),
        image_field=often(["image"], WORDS),
        caption_field=often(["caption", "zh", "en"], WORDS),
        apart=None,
        allow_unknown=None,
        size=often(["32", "96"], NUMBERS),
        stride=often(["8"], NUMBERS),
        text_slots=often(["12", "30"], NUMBERS),
        data_dir=inputs_of(world),
        workers=often(["1", "2"], NUMBERS),
        batch_size=often(["4"], NUMBERS),
        shard_size=often(["2", "4096"], NUMBERS),
        bundle=often([str(tiny_folder)], inputs_of(world)),
    )
    chosen = data.draw(options(**known))
    chosen += [] if "--out" in chosen else ["--out", "records"]
    chosen += [] if {"--bundle", "--pictures"} & set(chosen) else ["--bundle", tiny_folder]
    chosen += [] if {"--batch-size", "--pictures"} & set(chosen) else ["--batch-size", "4"]
    source = data.draw(often(sources, inputs_of(world)))
    try:
        run("data", "prepare", *chosen, "--", source)
    finally:
        file.unlink()


# --- train ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trainable(run, world, tiny_folder, tmp_path_factory):
    """Records of both kinds, and a run of one step with each of the networks that is trained."""
    place = tmp_path_factory.mktemp("trainable")
    tokens, pictures = place / "tokens", place / "pictures"
    prepare = ("data", "prepare", world / "good.tsv", "--allow-unknown")
    sizes = ("--size", 32, "--size", 96, "--text-slots", 22, "--batch-size", 2)
    assert run(*prepare, *sizes, "--bundle", tiny_folder, "--out", tokens)[0] == 0
    assert run("data", "prepare", "scenes", "--count", 2, "--pictures", "--out", pictures)[0] == 0
    for name, records in (("coglm", tokens), ("tokenizer", pictures)):
        command = ("train", name, records, "--bundle", tiny_folder, "--out", place / name)
        assert run(*command, *SMALL[name], "--steps", 1)[0] == 0
    return place


STEP = ("--batch-size", 1, "--log-every", 1)
SMALL = {
    "coglm": (*STEP, "--patch-size", 2, "--text-ratio", 0),
    "tokenizer": (*STEP, "--stride", 8, "--side", 16),
    "direct-sr": STEP,
    "iterative-sr": STEP,
}
# Small numbers would be minutes of training; large ones are to be refused.
REFUSED = NUMBERS.filter(lambda number: number not in ("1", "2", "1e3", "1_000", "٣", " 1"))
EVERYWHERE = dict(
    steps=often(["1"], REFUSED.filter(lambda number: len(number) < 4)),
    batch_size=often(["1"], REFUSED),
    accumulate=often(["1"], NUMBERS),
    optimizer=often(["adamw"], WORDS),
    schedule_steps=often(["1", "50"], NUMBERS),
    dtype=often(["float32"], WORDS),
    remat=often(["none"], WORDS),
    sample_every=often(["0", "1"], NUMBERS),
    start=often(["model"], WORDS),
    prompt=PROMPT,
    distributed=None,
    coordinator=WORDS,
    processes=NUMBERS,
    process=NUMBERS,
    out=often(["run"], outputs()),
) | {
    name: NUMBERS
    for name in ("learning_rate", "warmup", "final_rate", "weight_decay", "clip", "average", "seed")
    + ("z_loss", "validation", "dropout", "data", "fsdp", "tensor", "save_every", "keep")
}
OWN = {
    "coglm": ("caption_ratio", "completion_ratio", "text_ratio", "patch_size", "num_patches"),
    "tokenizer": ("side", "stride", "clusters", "settle", "decay", "commitment"),
    "direct-sr": (),
    "iterative-sr": (),
}


@examples(15)
@given(data=st.data())
@pytest.mark.long
def test_train(run, world, tiny_folder, trainable, data):
    name = data.draw(st.sampled_from(sorted(OWN)))
    known = EVERYWHERE | {option: NUMBERS for option in OWN[name]}
    names = data.draw(st.lists(st.sampled_from(sorted(known)), max_size=4, unique=True))
    chosen: list[Any] = []
    for option in names:
        flag = f"--{option.replace('_', '-')}"
        chosen += [flag] if known[option] is None else [flag, data.draw(known[option])]
    records = trainable / ("pictures" if name == "tokenizer" else "tokens")
    source = data.draw(often([str(records)] * 4, inputs_of(world)))
    out = [] if "out" in names else ["--out", "run"]
    command = ("train", name, "--bundle", tiny_folder, "--steps", 1, *SMALL[name], *out, *chosen)
    run(*command, "--", source)


@examples(12)
@given(data=st.data())
def test_damaged_records_and_runs(run, world, tiny_folder, trainable, data):
    """A file of prepared records or of a checkpoint is changed, and the training goes on."""
    name = data.draw(st.sampled_from(("coglm", "tokenizer")))
    records, begun = (
        trainable / {"coglm": "tokens", "tokenizer": "pictures"}[name],
        trainable / name,
    )
    copies = world.parent / "copies"
    shutil.rmtree(copies, ignore_errors=True)
    shutil.copytree(records, copies / "records")
    shutil.copytree(begun, copies / "run")
    files = sorted(
        path
        for path in (*(copies / "records").iterdir(), *(copies / "run").rglob("*"))
        if path.is_file() and "model" not in path.parts
    )
    file = data.draw(st.sampled_from(files) | st.just(copies / "records" / "records.json"))
    content = file.read_bytes()
    if file.suffix == ".json" and data.draw(st.booleans()):
        file.write_text(json.dumps(data.draw(changed_json(json.loads(content)))))
    elif data.draw(st.integers(0, 9)) == 0:
        file.unlink()
    else:
        file.write_bytes(data.draw(damaged(content)))
    command = ("train", name, copies / "records", "--bundle", tiny_folder, *SMALL[name])
    steps = data.draw(st.sampled_from((1, 1, 1, 2)))
    code, _, err = run(*command, "--steps", steps, "--out", copies / "run")
    assert code != 1, err


@examples(20)
@given(data=st.data())
def test_preparing_in_a_damaged_folder(run, world, trainable, data):
    copy = world.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(trainable / "pictures", copy)
    file = data.draw(st.sampled_from(sorted(copy.iterdir())))
    content = file.read_bytes()
    if file.suffix == ".json" and data.draw(st.booleans()):
        file.write_text(json.dumps(data.draw(changed_json(json.loads(content)))))
    else:
        file.write_bytes(data.draw(damaged(content)))
    run("data", "prepare", "scenes", "--count", 2, "--pictures", "--out", copy)
