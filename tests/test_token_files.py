"""States on disk: the same table in half precision, written once, stopped and resumed, refused for others."""

import pytest
import torch

from tda_core import token_files
from tda_core.designs import balanced
from tda_core.token_files import mapped_token_table
from tda_core.token_steering import TokenSteering
from tda_core.token_stride import fit_token_stride
from tda_core.token_table import token_table
from tests.language_toys import language_model, text_pairs

MODEL = language_model("llama")
TRAIN = MODEL.examples(text_pairs(12, seed=1, response=(2, 6)))


@pytest.mark.parametrize("layer", [None, 0.5])
def test_mapped_tables_are_the_tables_in_half_precision(tmp_path, monkeypatch, layer):
    monkeypatch.setattr(token_files, "BLOCK", 5)
    expected = token_table(MODEL, TRAIN, layer=layer, n_context=1)
    for _ in range(2):  # written, then read
        found = mapped_token_table(MODEL, TRAIN, tmp_path, layer=layer)
        for name in ("hidden", "last"):
            assert getattr(found, name).dtype == torch.float16
            torch.testing.assert_close(getattr(found, name).float(), getattr(expected, name), rtol=1e-3, atol=1e-3)
        for name in ("context", "targets", "documents"):
            assert torch.equal(getattr(found, name), getattr(expected, name))
        assert found.n_documents == 12
        monkeypatch.setattr(token_files, "token_table", lambda *_, **__: pytest.fail("written already"))


def test_a_stopped_run_goes_on_behind_the_last_block(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "BLOCK", 4)
    expected = mapped_token_table(MODEL, TRAIN, tmp_path / "whole").last.clone()
    seen = []

    def stops(model, examples, **options):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(examples))
        return token_table(model, examples, **options)

    monkeypatch.setattr(token_files, "token_table", stops)
    with pytest.raises(KeyboardInterrupt):
        mapped_token_table(MODEL, TRAIN, tmp_path / "states")
    seen.clear()
    assert torch.equal(mapped_token_table(MODEL, TRAIN, tmp_path / "states").last, expected)
    assert seen == [4]


def test_states_of_others_are_refused(tmp_path):
    mapped_token_table(MODEL, TRAIN, tmp_path)
    for model, examples, layer in (
        (language_model("llama", seed=1), TRAIN, None),
        (MODEL, TRAIN[:5], None),
        (MODEL, TRAIN, 1),
    ):
        with pytest.raises(ValueError, match="holds states of"):
            mapped_token_table(model, examples, tmp_path, layer=layer)


@pytest.mark.parametrize("layer", [None, 1])
def test_operators_are_fitted_on_mapped_states(tmp_path, layer):
    membership, settings = balanced(12, 5, 2, seed=0), TokenSteering(rank=4, layer=layer, steps=3, members=2)
    expected = fit_token_stride(MODEL, TRAIN, membership, settings).measurements(TRAIN)
    found = fit_token_stride(MODEL, TRAIN, membership, settings, states=tmp_path).measurements(TRAIN)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * float(expected.abs().max()))
    assert not torch.equal(found, expected)
