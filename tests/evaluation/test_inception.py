"""FID's network: its features beside those of other libraries, and files of its weights."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from cogview2_jax.evaluation import inception
from tests.evaluation.inception_weights import published
from tests.published import published_files as pf

SIZES = ((299, 299), (64, 64), (192, 192), (256, 341), (480, 320))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    file = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file(published(), file)
    return file


def pictures(size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(sum(size)).integers(0, 256, (2, *size, 3), np.uint8)


def test_parameters_are_those_of_the_published_file():
    leaves = jax.tree.leaves(inception.shapes())
    # 23,851,784 of the ImageNet network without its auxiliary part, less a BN scale for each
    # feature (folded), 8 classes more, no bias of the classifier.
    assert sum(leaf.size for leaf in leaves) == sum(
        values.size
        for name, values in published().items()
        if name != "fc.bias" and not name.endswith(("bn.weight", "running_mean", "running_var"))
    )
    assert len(published()) == 5 * 94 + 2


@pytest.mark.parametrize("side", [1, 2, 37, 299, 500])
@pytest.mark.parametrize("how", ["tensorflow", "torch"])
def test_resizing_keeps_what_is_flat_and_takes_pixels_in_order(side, how):
    flat = np.full((1, side, side, 3), 200, np.uint8)
    expected = (200 - 128) / 128 if how == "tensorflow" else 200 / 255 * 2 - 1
    np.testing.assert_allclose(inception.resized(flat, how), expected, atol=1e-6)
    ramp = np.arange(side) * 255 // max(1, side - 1)
    ramp = np.broadcast_to(ramp.astype(np.uint8)[None, None, :, None], (1, side, side, 3))
    row = np.asarray(inception.resized(ramp, how))[0, 0, :, 0]
    assert row.shape == (299,) and (np.diff(row) >= -1e-6).all()


def test_a_picture_of_the_networks_size_is_not_resized():
    picture = pictures((299, 299))
    np.testing.assert_allclose(
        inception.resized(picture, "tensorflow"), (picture.astype(float) - 128) / 128, atol=1e-6
    )


@pytest.mark.slow
def test_files_of_every_kind_hold_the_same_network(weights, tmp_path):
    params = inception.read_weights(weights)
    tensors = {name: pf.Tensor(values) for name, values in published().items()}
    pf.write_pt(tmp_path / "new.pth", tensors)
    pf.write_old(tmp_path / "old.pth", tensors)
    for name in ("new", "old"):
        jax.tree.map(
            np.testing.assert_array_equal, inception.read_weights(tmp_path / f"{name}.pth"), params
        )
    assert jax.tree.map(np.shape, params) == jax.tree.map(
        lambda leaf: leaf.shape, inception.shapes()
    )


def write_changed(file, change):
    tensors = dict(published())
    change(tensors)
    save_file({name: np.ascontiguousarray(each) for name, each in tensors.items()}, file)


def test_all_wrong_tensors_are_named(tmp_path):
    file = tmp_path / "a.safetensors"

    def change(tensors):
        del tensors["Mixed_5b.branch1x1.conv.weight"]
        tensors["fc.weight"] = tensors["fc.weight"][:1000]  # torchvision's classes

    write_changed(file, change)
    with pytest.raises(ValueError) as caught:
        inception.read_weights(file)
    message = str(caught.value)
    assert "2 wrong tensors" in message and "no Mixed_5b.branch1x1.conv.weight" in message
    assert "fc.weight is [1000, 2048], not [1008, 2048]" in message
    assert "not those of torchvision's Inception" in message and "\n" not in message


def test_weights_that_are_not_finite_or_no_weights_are_refused(tmp_path):
    file = tmp_path / "a.safetensors"

    def change(tensors):
        tensors["Conv2d_1a_3x3.bn.bias"] = np.full(32, np.nan, np.float32)

    write_changed(file, change)
    with pytest.raises(ValueError, match="Conv2d_1a_3x3.bn.bias is not finite"):
        inception.read_weights(file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is damaged"):
        inception.read_weights(file)
    pf.write_pt(tmp_path / "list.pth", [1, 2])
    with pytest.raises(ValueError, match="no tensors by name"):
        inception.read_weights(tmp_path / "list.pth")
    with pytest.raises(OSError):
        inception.read_weights(tmp_path / "nothing.pth")


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_features_are_those_of_torch_fidelity(size, weights, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    file = tmp_path / "weights.pth"
    state = {name: torch.from_numpy(each) for name, each in published().items()}
    torch.save(state | counters(torch), file)
    theirs = FeatureExtractorInceptionV3("a", ["2048", "logits_unbiased"], str(file))
    batch = pictures(size)
    with torch.no_grad():
        pool, logits = theirs(torch.from_numpy(batch).permute(0, 3, 1, 2))
    found = inception.apply(inception.read_weights(file), batch)
    assert float(pool.std()) > 0.1
    np.testing.assert_allclose(found.pool, pool.numpy(), atol=1e-4)
    np.testing.assert_allclose(found.logits, logits.numpy(), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_features_are_those_of_pytorch_fid(size, weights, monkeypatch):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("pytorch_fid.inception")
    state = {name: torch.from_numpy(each) for name, each in published().items()}
    monkeypatch.setattr(
        theirs, "load_state_dict_from_url", lambda *_, **__: state | counters(torch)
    )
    batch = pictures(size)
    network = theirs.InceptionV3([3]).eval()
    with torch.no_grad():
        (pool,) = network(torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 255)
    found = inception.apply(inception.read_weights(weights), batch, resize="torch")
    np.testing.assert_allclose(found.pool, pool[:, :, 0, 0].numpy(), atol=1e-4)


def counters(torch):
    """What the published file has beside the weights."""
    names = [name.removesuffix(".weight") for name in published() if name.endswith("bn.weight")]
    return {f"{name}.num_batches_tracked": torch.tensor(0) for name in names}
