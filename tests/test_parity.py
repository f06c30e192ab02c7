"""The parity harness: every recorded file passes; how it reads, reports and refuses."""

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.numpy import save_file

from cogview2_jax.networks import attention
from cogview2_jax.published import convert
from cogview2_jax.tokenizer import text
from experiments.parity import configs
from experiments.parity.golden import Check, Golden, close, equal, seeded_weights
from experiments.parity.run import CHECKS, main
from pallas_kernels import local_attention_2d_with_lse
from tests.common import GOLDEN
from tests.published import published_files


def run(directory: Path, *options: str) -> Result:
    result = CliRunner().invoke(main, ["--golden", str(directory), *options])
    # Whatever is wrong with the files is a line of the table or of usage, never a traceback.
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def recorded(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def line_of(result: Result, start: str) -> str:
    lines = [line for line in result.output.splitlines() if line.startswith(start)]
    assert len(lines) == 1, (start, result.output)
    return lines[0]


@pytest.mark.parametrize("file", CHECKS)
def test_every_recorded_number_is_met(file):
    golden = Golden(GOLDEN / f"{file}.npz")
    outcomes = list(CHECKS[file](golden))
    checks = [outcome for outcome in outcomes if isinstance(outcome, Check)]
    assert checks == outcomes  # every part is recorded, so nothing is skipped
    assert not [check for check in checks if not check.passed]
    # The labels are for whoever draws with this network: its own file records no distribution.
    assert golden.unread() == (["cluster_labels"] if file == "coglm" else [])


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", ["direct_sr", pytest.param("iterative_sr", marks=pytest.mark.long)]
)
def test_the_kernels_meet_every_recorded_number_of_super_resolution(monkeypatch, file):
    calls = []

    def on_the_kernels(*qkv, window):
        calls.append(window)
        return local_attention_2d_with_lse(
            *qkv, window=window, implementation="pallas_triton_interpret"
        )

    monkeypatch.setattr(attention, "local_attention_2d_with_lse", on_the_kernels)
    checks = list(CHECKS[file](Golden(GOLDEN / f"{file}.npz")))
    assert calls
    assert not [check for check in checks if not check.passed]


@pytest.fixture
def small(tmp_path):
    """A folder of one file: two cases of local attention under other names, one of one row."""
    cases = {"near": ("causal_5x3", slice(0, 1)), "far/out": ("cross2_3x3", slice(None))}
    arrays = recorded("local_attention")
    made = {}
    for ours, (theirs, rows) in cases.items():
        for name in ("q_scaled", "k", "v", "scores", "lse", "out"):
            made[f"{ours}/{name}"] = arrays[f"{theirs}/{name}"][rows]
        for name in ("window", "causal"):
            made[f"{ours}/{name}"] = arrays[f"{theirs}/{name}"]
    np.savez(tmp_path / "local_attention.npz", **made)
    return tmp_path


def damage(directory: Path, file: str, name: str, change) -> None:
    path = directory / f"{file}.npz"
    with np.load(path) as arrays:
        made = {key: arrays[key] for key in arrays.files}
    made[name] = change(made[name])
    np.savez(path, **made)


def test_cases_are_found_by_their_names_and_absent_files_told(small, tmp_path):
    report = tmp_path / "report.json"
    result = run(small, "--json", str(report))
    assert result.exit_code == 0, result.output
    assert "pass" in line_of(result, "local_attention: near: output by xla")
    assert "pass" in line_of(result, "local_attention: far/out: lse by reference")
    assert line_of(result, "coglm ").endswith("skipped  coglm.npz is not there")
    assert "10 of 10 checks pass" in result.output
    made = json.loads(report.read_text())
    assert made["passed"] and len(made["checks"]) == 10
    assert {entry["file"] for entry in made["skipped"]} == set(CHECKS) - {"local_attention"}
    first = made["checks"][0]
    assert first["error"] <= first["tolerance"] == 1e-4 and first["passed"]


def test_text_ids_are_compared(tmp_path):
    """A small text model in place of the published one, with recorded ids made here."""
    model = tmp_path / "ice_text.model"
    model.write_bytes(text.train_text_model(["a cat", "一只猫"]))
    vocabulary = text.vocabulary_for(text.load_text_model(model), 20_000, as_published=True)
    start = vocabulary.start_of_image
    ids = {"a": [20_005], " ": [], "a dog": [20_005, 20_004, 20_000]}
    rows = [
        {"text": typed, "ids": row, "keep_line_breaks": row, "with_start": [*row, start]}
        for typed, row in ids.items()
    ]
    rows[1]["with_start"] = [20_004, start]
    (tmp_path / "text_ids.json").write_text(json.dumps(rows))
    result = CliRunner().invoke(main, ["--text-model", str(model)])
    assert result.exit_code == 0 and "3 of 3 checks pass" in result.output, result.output
    rows[2]["ids"] = [20_005, 20_000]
    (tmp_path / "others.json").write_text(json.dumps(rows))
    result = run(GOLDEN, "--text-model", str(model), "--text-ids", str(tmp_path / "gone.json"))
    assert result.exit_code == 2
    changed = ["--text-model", str(model), "--text-ids", str(tmp_path / "others.json")]
    result = CliRunner().invoke(main, changed)
    assert result.exit_code == 1
    assert line_of(result, "others.json: ids").endswith("FAIL     3 texts, first wrong: 'a dog'")
    assert "pass" in line_of(result, "others.json: with_start")
    (tmp_path / "text_ids.json").write_text("[")
    result = CliRunner().invoke(main, ["--text-model", str(model)])
    assert result.exit_code == 1 and "FAIL" in line_of(result, "text_ids.json: reading")
    for arguments in ([], ["--golden", str(GOLDEN), "--text-ids", str(model)]):
        assert CliRunner().invoke(main, arguments).exit_code == 2


@pytest.mark.parametrize("wrong", [0.01, np.nan])
def test_a_damaged_number_fails(small, tmp_path, wrong):
    def change(array):
        array = array.copy()
        array.flat[3] += wrong
        return array

    damage(small, "local_attention", "near/out", change)
    report = tmp_path / "report.json"
    result = run(small, "--json", str(report))
    assert result.exit_code == 1
    assert "FAIL" in line_of(result, "local_attention: near: output by xla")
    assert "pass" in line_of(result, "local_attention: near: lse by xla")
    made = json.loads(report.read_text())
    assert not made["passed"]
    assert [check["name"] for check in made["checks"] if not check["passed"]] == [
        "near: output by reference",
        "near: output by xla",
    ]


def test_a_foreign_shape_fails_by_name(small):
    damage(small, "local_attention", "near/lse", lambda lse: lse[:, :-1])
    result = run(small)
    assert result.exit_code == 1
    line = line_of(result, "local_attention: near: lse by xla")
    assert line.endswith("FAIL     ours has shape (1, 7, 9), the recorded (1, 6, 9)")


def test_what_cannot_be_computed_fails_and_the_rest_goes_on(small):
    damage(small, "local_attention", "near/window", lambda window: window * 2)
    result = run(small)
    assert result.exit_code == 1
    assert "window must have odd, positive sides" in line_of(result, "local_attention: near ")
    assert "pass" in line_of(result, "local_attention: far/out: output by xla")


def test_arrays_that_are_missing_or_unknown_are_told(small):
    path = small / "local_attention.npz"
    with np.load(path) as arrays:
        made = {key: arrays[key] for key in arrays.files if key != "near/lse"}
    np.savez(path, **made, surprise=np.zeros(3))
    result = run(small)
    assert result.exit_code == 0
    assert "skipped  near/lse not recorded" in line_of(result, "local_attention: near")
    assert "not looked at: near/" in line_of(result, "local_attention  ")
    assert "surprise" in line_of(result, "local_attention  ")


@pytest.mark.parametrize(
    ("file", "name", "check"),
    [
        ("coglm_masks", "t2i/two_languages/second/pos", "t2i/two_languages/second: positions"),
        ("coglm_masks", "i2t/one_language/attn_mask", "i2t/one_language: mask"),
        ("coglm_masks", "text/loss_mask", "text: loss mask"),
        ("editing", "crops", "crops"),
        ("editing", "masks_60", "masks of 60×60 cells"),
        ("editing", "case_mask", "sequence: mask"),
    ],
)
def test_one_wrong_integer_fails(tmp_path, file, name, check):
    shutil.copy(GOLDEN / f"{file}.npz", tmp_path)

    def change(array):
        array = array.copy()
        array.flat[-1] = ~array.flat[-1]
        return array

    damage(tmp_path, file, name, change)
    result = run(tmp_path)
    assert result.exit_code == 1
    assert line_of(result, f"{file}: {check}").split()[-4:-2] == ["equal", "FAIL"]
    assert sum("FAIL" in line for line in result.output.splitlines()) == 1


def test_draws_from_another_distribution_fail(tmp_path):
    arrays = recorded("sampling")
    kept = {name: arrays[name] for name in ("logits", "topk/40/probs")}
    # As if recorded at another temperature.
    flatter = np.where(kept["topk/40/probs"] > 0, kept["topk/40/probs"] ** 0.9, 0)
    kept["topk/40/probs"] = flatter / flatter.sum(-1, keepdims=True)
    np.savez(tmp_path / "sampling.npz", **kept)
    result = run(tmp_path)
    assert result.exit_code == 1
    assert "FAIL" in line_of(result, "sampling: topk/40: chi-square")
    assert "FAIL" in line_of(result, "sampling: topk/40: probabilities")


def test_a_broken_file_fails(tmp_path):
    whole = (GOLDEN / "sampling.npz").read_bytes()
    (tmp_path / "sampling.npz").write_bytes(whole[: len(whole) // 2])
    result = run(tmp_path)
    assert result.exit_code == 1
    assert "FAIL" in line_of(result, "sampling: reading")


def test_nothing_to_check_and_nowhere_to_write_are_refused(tmp_path, small):
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments in (
        ["--golden", str(empty)],
        ["--golden", str(tmp_path / "absent")],
        ["--golden", str(small), "--json", str(tmp_path / "absent" / "report.json")],
    ):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2
        assert "Error: " in result.output


def test_arrays_are_compared_with_care():
    ours = np.zeros((2, 3))
    assert equal("", ours, np.zeros(3)).passed  # one recording for every row
    assert equal("", ours, np.zeros((1, 1, 2, 3))).passed
    assert close("", ours, np.full((1, 3), 9e-5), "logits").passed
    assert not close("", ours, np.full((2, 3), 2e-4), "logits").passed
    for recording in (np.zeros(()), np.zeros((3, 3)), np.zeros((2, 4)), np.zeros((2, 2, 3))):
        assert not equal("", ours, recording).passed
    assert not close("", ours, np.full((2, 3), np.nan), "logits").passed
    assert not equal("", np.zeros((0, 3)), np.zeros((0, 3))).passed


def test_sizes_come_from_the_file():
    """Nothing in the derived configurations is a constant of `tests/golden`."""
    tensors = {
        "transformer.word_embeddings.weight": np.empty((900, 96)),
        "transformer.position_embeddings.weight": np.empty((700, 96)),
        **{
            f"transformer.layers.{i}.mlp.dense_h_to_4h.weight": np.empty((384, 96))
            for i in range(3)
        },
    }
    sizes = {"config": np.array([3, 96, 6, 900, 500, 40])}
    cells, start = 36, 897
    coglm = configs.coglm(
        dict(
            sizes,
            decode_tokens=np.array([[600] * 120 + [start] + [1] * cells]),
            decode_step_logits=np.empty((1, cells, 500)),
            caption_position_ids=np.append(300 + np.arange(cells), np.arange(9)),
        ),
        tensors,
    )
    assert (coglm.transformer.num_layers, coglm.transformer.num_heads) == (3, 6)
    assert (coglm.vocabulary.num_image, coglm.vocabulary.start_of_image) == (500, start)
    assert (coglm.grid, coglm.max_text, coglm.image_position) == ((6, 6), 120, 300)
    assert coglm.num_positions == 700

    direct = configs.direct_sr(
        dict(
            sizes,
            layout=np.array([20, 56, 56 + 144]),
            windows=np.array([[7, 3], [3, 1]]),
            position_ids=np.append(np.zeros(20, int), 300 + np.arange(180)),
        ),
        tensors,
    )
    assert (direct.text_slots, direct.coglm.grid, direct.grid, direct.ratio) == (
        20,
        (6, 6),
        (12, 12),
        2,
    )
    assert (direct.window, direct.cross_window) == ((7, 3), (3, 1))

    iterative = configs.iterative_sr(
        dict(
            sizes,
            layout=np.array([10, 154]),
            window=np.array([5, 7]),
            lopar_order_6x6=np.array([[1, 2], [-1, 0]]),
            topk_per_step=np.array([3, 2]),
        ),
        tensors,
    )
    assert (iterative.text_slots, iterative.grid, iterative.window) == (10, (12, 12), (5, 7))
    assert (iterative.order, iterative.rounds) == (((1, 2), (-1, 0)), 2)
    assert iterative.num_positions == 700

    edits = configs.editing(
        dict(
            masks_20=np.empty((3, 5, 5)),
            masks_60=np.empty((3, 10, 10)),
            case_text=np.array([600, 520, 897]),
            case_positions=np.append([0, 1, 2, 299], 300 + np.arange(25)),
        )
    )
    assert (edits.grid, edits.coglm.grid, edits.coglm.image_position) == ((10, 10), (5, 5), 300)
    assert edits.coglm.vocabulary.start_of_image == 897


def test_weights_are_those_of_their_seed_and_tag():
    """One tensor against the formula in the recording's note, written out."""
    weights = seeded_weights(Golden(GOLDEN / "direct_sr.npz"))
    name = "mixins.attention_plus.query_key_value.0.weight"
    drawn = np.random.RandomState(zlib.crc32(f"7/dsr/{name}".encode())).standard_normal((192, 64))
    np.testing.assert_array_equal(weights[name], (0.12 * drawn).astype(np.float32))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    convert.convert(published_files.write_all(folder / "files", ranks=2), folder / "model")
    return folder / "model"


def test_a_bundle_has_the_recorded_weights(converted, tmp_path):
    shutil.copy(GOLDEN / "hvqvae.npz", tmp_path)
    result = run(tmp_path, "--bundle", str(converted))
    assert result.exit_code == 0, result.output
    assert "pass" in line_of(result, "hvqvae: weights of the bundle")
    with safe_open(converted / "weights.safetensors", framework="numpy") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}
    tensors["tokenizer/decoder_8/conv_out/bias"][1] += 0.01
    changed = shutil.copytree(converted, tmp_path / "changed")
    save_file(tensors, changed / "weights.safetensors")
    result = run(tmp_path, "--bundle", str(changed))
    assert result.exit_code == 1
    assert "FAIL" in line_of(result, "hvqvae: weights of the bundle")
    assert "FAIL" in line_of(result, "hvqvae: stride 8: pictures")
    del tensors["tokenizer/codebook"]
    save_file(tensors, changed / "weights.safetensors")
    assert "lacks tensor 'tokenizer/codebook'" in run(tmp_path, "--bundle", str(changed)).output


def test_a_bundle_goes_with_recorded_files(converted):
    result = CliRunner().invoke(main, ["--bundle", str(converted)])
    assert result.exit_code == 2
