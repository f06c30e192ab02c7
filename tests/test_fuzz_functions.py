"""Generated arguments of the public functions: they return, or raise what callers can show."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogview2_jax import bundle as bundles
from cogview2_jax import config as configs
from cogview2_jax.data.records import RecordLayout, make_record
from cogview2_jax.decoding import loops, sampling
from cogview2_jax.pipeline.cogview import CogView
from cogview2_jax.tokenizer import text
from cogview2_jax.tokenizer.pictures import fit_picture, open_picture
from cogview2_jax.training import options
from pallas_kernels import local_attention_2d_with_lse, merge_attention
from tests.fuzzing import JSON, PROMPTS, WORDS, damaged, examples, refusing
from tests.fuzzing_files import MODES, inputs_of, make_world, picture, picture_files

pytestmark = pytest.mark.slow

NUMBER = st.one_of(
    st.sampled_from(
        [0, -1, 1, 2, 3, 7, 1.0, 0.5, -0.0, float("nan"), float("inf"), 1e308, 10**400]
    ),
    st.sampled_from([2**31, 2**63, True, None, "1", (1,), np.float32(2), np.int64(3), 1e-30, 1j]),
    st.integers(-5, 50),
)
ARRAY = st.one_of(
    st.tuples(
        st.lists(st.integers(0, 5), max_size=4),
        st.sampled_from(["float32", "float16", "int32", "uint8", "bool", "complex64"]),
    ).map(lambda about: np.ones(*about)),
    st.sampled_from(
        [np.full((2, 5), value, np.float32) for value in (np.nan, np.inf, -np.inf, 1e38)]
    ),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("fuzz") / "world")


@pytest.fixture(scope="module")
def cv(tiny):
    return CogView(tiny)


# --- Pictures -------------------------------------------------------------------------------------


@examples(150)
@given(picture_files(), st.sampled_from([(8, 8), (1, 30), (64, 1)]))
def test_files_of_pictures(content, size):
    with refusing():
        made = fit_picture(content, *size)
        assert made.shape == (*size, 3) and made.dtype == np.uint8


@examples(80)
@given(data=st.data())
def test_pictures_in_memory_and_paths(world, data):
    given_ = data.draw(
        st.one_of(
            inputs_of(world),
            st.sampled_from(MODES).map(picture),
            ARRAY,
            st.sampled_from([None, 1, [], b"", "a\0b", "\ud83d", np.ones((3, 4, 5, 3)), object()]),
            st.lists(st.integers(0, 3), min_size=2, max_size=3).map(lambda s: np.ones(s, np.uint8)),
        )
    )
    height = data.draw(st.sampled_from([8, 1, 0, -1]))
    with refusing(given_):
        open_picture(given_)
    with refusing(given_):
        fit_picture(given_, height, 8)


# --- Text -----------------------------------------------------------------------------------------


@examples(100)
@given(
    words=WORDS | st.text(max_size=30),
    most=st.sampled_from([None, 0, 1, 12, -1]),
    unknown=st.sampled_from([None, True, False]),
    published=st.booleans(),
    flags=st.tuples(st.booleans(), st.booleans()),
)
def test_text_there_and_back(tiny, words, most, unknown, published, flags):
    vocabulary = dataclasses.replace(tiny.coglm_config.vocabulary, as_published=published)
    with refusing():
        text.clean(words)
    with refusing():
        ids = text.encode(
            tiny.text_model,
            words,
            vocabulary,
            max_tokens=most,
            allow_unknown=unknown,
            keep_line_breaks=flags[0],
            allow_empty=flags[1],
        )
        text.decode(tiny.text_model, ids, vocabulary.num_image)


@examples(60)
@given(ids=st.lists(st.integers(-(2**65), 2**65) | st.integers(0, 200) | NUMBER, max_size=8))
def test_ids_to_text(tiny, ids):
    with refusing():
        text.decode(tiny.text_model, ids, tiny.coglm_config.vocabulary.num_image)


@examples(60)
@given(data=st.data())
def test_text_models(tiny, data):
    content = data.draw(damaged(tiny.text_model.serialized_model_proto()))
    words = data.draw(WORDS)
    with refusing():
        model = text.load_text_model(content)
        vocabulary = text.vocabulary_for(model, 16)
        text.encode(model, words, vocabulary, allow_unknown=True)


@examples(40)
@given(sentences=st.lists(WORDS, max_size=6), pieces=st.sampled_from([None, 8, 20, 1, -1, 10**6]))
def test_making_text_models(sentences, pieces):
    with refusing():
        if pieces is None:
            text.load_text_model(text.train_text_model(sentences))
        else:
            text.load_text_model(text.train_subword_model(sentences, pieces))


# --- Sampling and loops ---------------------------------------------------------------------------


@examples(100)
@given(
    logits=ARRAY.filter(lambda array: array.ndim),
    k=NUMBER,
    most=st.none() | NUMBER,
    temperature=NUMBER,
    block=st.none() | NUMBER,
    key=st.sampled_from(
        [0, None, "key", jax.random.PRNGKey(0), jax.random.split(jax.random.key(0))]
    )
    | st.just(jax.random.key(0)),
)
def test_top_k(logits, k, most, temperature, block, key):
    logits = jnp.asarray(logits)
    with refusing():
        sampling.top_k_logits(logits, k, max_k=most)
    with refusing():
        sampling.sample_top_k(key, logits, k, temperature, max_k=most, block=block)
    with refusing():
        sampling.greedy(logits)


@examples(80)
@given(
    logits=ARRAY.filter(lambda array: array.ndim),
    labels=st.lists(st.integers(-2, 9), min_size=5, max_size=5)
    | st.lists(st.integers(0, 3), max_size=6),
    clusters=NUMBER,
    settings=st.tuples(NUMBER, NUMBER, NUMBER),
    block=st.none() | NUMBER,
)
def test_clusters(logits, labels, clusters, settings, block):
    logits, labels = jnp.asarray(logits), jnp.asarray(labels, jnp.int32)
    with refusing():
        chosen = configs.ClusterSampling(*settings)
        key = jax.random.key(0)
        sampling.sample_clusters(key, logits, labels, clusters, chosen, block=block)
        sampling.cluster_probabilities(logits, labels, clusters, chosen)
    with refusing():
        sampling.greedy_clusters(logits, labels, clusters, settings[0])


@examples(30)
@given(
    number=st.sampled_from([0, -1, 1, 3, 1.5, None, "1", True]),
    rounds=st.integers(0, 3),
    cells=st.integers(0, 4),
    mask=st.integers(-2, 5),
)
def test_loops(number, rounds, cells, mask):
    def logits(tokens):
        return jnp.zeros((*tokens.shape, 3))

    def greedy(logits, i):
        return sampling.greedy(logits)

    with refusing():
        loops.decode(
            lambda cache, token, i: (logits(token), cache), greedy, jnp.zeros((2, 3)), (), number
        )
    with refusing():
        reset = np.ones((rounds, cells), bool)
        loops.lopar(logits, greedy, jnp.zeros((2, 4), jnp.int32), reset, mask)


# --- Attention ------------------------------------------------------------------------------------


@examples(60)
@given(data=st.data())
def test_local_attention(data):
    side = st.integers(0, 4)
    shape = data.draw(st.tuples(st.integers(0, 2), side, side, st.just(1), st.sampled_from([0, 2])))
    keys = data.draw(
        st.just(shape) | st.tuples(st.integers(0, 2), side, side, st.just(1), st.just(2))
    )
    dtype = data.draw(st.sampled_from(["float32", "float32", "bfloat16", "int32"]))
    windows = st.tuples(
        st.sampled_from([1, 3, 5, 99, 10**9 + 1]), st.sampled_from([1, 3, 2, 0, -1])
    )
    window = data.draw(windows | NUMBER)
    q, k = jnp.ones(shape, dtype), jnp.ones(keys, dtype)
    with refusing():
        out, lse = local_attention_2d_with_lse(
            q,
            k,
            k,
            window=window,
            causal=data.draw(st.booleans()),
            scale=data.draw(st.none() | NUMBER),
            implementation=data.draw(st.sampled_from(["auto", "xla", "reference", "pallas", ""])),
        )
        others = st.sampled_from([lse, lse[..., :1], lse.astype(jnp.float16), out])
        merge_attention((out, lse), (out, data.draw(others)))


# --- Settings -------------------------------------------------------------------------------------


@examples(150)
@given(data=st.data())
def test_settings(data):
    kinds = [
        *(configs.Training, configs.Vocabulary, configs.TransformerConfig, configs.CogLMConfig),
        *(configs.DirectSRConfig, configs.IterativeSRConfig, configs.HVQVAEConfig),
        *(configs.ClusterSampling, configs.Sampling, RecordLayout),
        *(options.Options, options.LoopOptions, options.ComputeOptions, options.ProcessOptions),
        *(options.TokenizerOptions, options.CogLMOptions, options.DirectSROptions),
        options.IterativeSROptions,
    ]
    kind = data.draw(st.sampled_from(kinds))
    names = [field.name for field in dataclasses.fields(kind)]
    value = st.one_of(NUMBER, WORDS, JSON, st.tuples(NUMBER, NUMBER), st.tuples(JSON), st.just(()))
    given_ = {
        name: data.draw(value) for name in data.draw(st.lists(st.sampled_from(names), max_size=2))
    }
    with refusing():
        made = kind(**given_)
        for name in ("planned_steps", "grid", "num_image_tokens", "strides", "length", "head_dim"):
            getattr(made, name, None)


@examples(60)
@given(
    texts=st.lists(st.lists(st.integers(-2, 200) | NUMBER, max_size=14) | WORDS, max_size=3),
    image=st.lists(st.integers(0, 3), min_size=16, max_size=16) | ARRAY | JSON,
)
def test_records(tiny, texts, image):
    with refusing():
        make_record(texts, image, tiny.coglm_config)


# --- The pipeline ---------------------------------------------------------------------------------


@examples(50)
@given(data=st.data())
def test_the_pipeline(cv, world, data):
    """Arguments that are refused, and a few that are not: each of those may compile."""
    keys = [*[jax.random.key(1), jax.random.PRNGKey(1)] * 4, 1, None, "key"]
    key = data.draw(st.sampled_from(keys))
    prompts = st.sampled_from(PROMPTS)
    prompt = data.draw(prompts | prompts | prompts | WORDS | JSON)
    plain = st.just(str(world / "plain.png"))
    shown = data.draw(plain | plain | plain | inputs_of(world))
    number = data.draw(st.sampled_from([*[2] * 20, 0, -1, 1.5, "1", None, 2**40, True]))
    shared = {
        "key": key,
        "stage": data.draw(st.sampled_from([*["base", "full", None] * 4, "last", 1])),
    }
    box = data.draw(st.just((0, 0, 1, 0.5)) | st.lists(NUMBER, max_size=5) | JSON)
    candidates = data.draw(st.sampled_from([*[1] * 9, 0, -1, 0.5, "2"]))
    match data.draw(st.sampled_from(["generate", "infill", "caption", "rank"])):
        case "generate":
            with refusing():
                cv.generate(prompt, number, candidates=candidates, **shared)
        case "infill":
            with refusing(shown):
                cv.infill(prompt, shown, box, number, candidates=candidates, **shared)
        case "caption":
            how = data.draw(
                st.fixed_dictionaries({}, optional={"top_k": NUMBER, "temperature": NUMBER})
            )
            language = data.draw(st.sampled_from(["en", "zh", "fr", None, 1]))
            key = data.draw(st.sampled_from([None, key]))
            with refusing(shown):
                cv.caption(shown, language=language, key=key, **how)
        case "rank":
            pictures = data.draw(st.sampled_from([[shown], [], None, [None], shown]))
            with refusing(shown):
                cv.rank(prompt, pictures)


# --- Bundles --------------------------------------------------------------------------------------


@examples(30)
@given(data=st.data())
def test_saving_and_loading_bundles(tiny, world, data):
    trees = {name: {} for name in data.draw(st.sets(st.sampled_from(bundles.NETWORKS)))}
    labels = [tiny.cluster_labels, np.zeros(0, int), np.full(3, 7), np.full(64, -1)]
    made = tiny._replace(**trees, cluster_labels=data.draw(st.sampled_from(labels)))
    place = world.parent / "saved" / data.draw(st.sampled_from(["a", "b [c]", "x" * 300, "d/e/f"]))
    networks = data.draw(st.sampled_from([None, (), ("coglm",), ("none",), "coglm"]))
    another = data.draw(inputs_of(world))
    with refusing(place):
        bundles.save(place, made)
        bundles.load(place, networks)
    with refusing(another):
        bundles.load(another)


@examples(30)
@given(content=JSON)
def test_descriptions(world, content):
    with refusing():
        bundles.parse_description({"format": 1, "made_with": {}, "sampling": content}, world)
    json.dumps(content)
