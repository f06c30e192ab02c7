"""info: what a model is made of."""


def test_info_shows_model_and_devices(run, tiny_folder):
    code, out, _ = run("info", "--bundle", tiny_folder)
    assert code == 0
    for expected in (str(tiny_folder), "12 tokens", "4 × 4", "12 × 12", "device", "CogLMConfig"):
        assert expected in out
