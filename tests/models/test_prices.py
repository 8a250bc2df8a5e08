"""What a million tokens cost: the recipe's word, one's own table, the table that ships."""

import pytest
from endpoint import Endpoint
from models_kit import openai

import datakit as dk
from datakit.errors import InputError
from datakit.models.prices import price_of
from datakit.models.specs import OpenAISpec, Price, ScriptedSpec


def test_the_recipes_price_counts_before_ones_own_table_and_that_before_the_shipped(tmp_path):
    spec = OpenAISpec(kind="openai", model="gpt-4o", base_url="https://api.openai.com/v1")
    own = Price(input=3, output=4)
    (tmp_path / "prices.yaml").write_text("{}")
    assert price_of(spec, tmp_path) == Price(input=2.5, output=10)
    assert price_of(spec.model_copy(update={"mode": "batch"}), tmp_path) == Price(
        input=1.25, output=5
    )
    assert (
        price_of(spec.model_copy(update={"base_url": "https://other.example/v1"}), tmp_path) is None
    )
    (tmp_path / "prices.yaml").write_text("gpt-4o: {input: 1, output: 2}")
    assert price_of(spec, tmp_path) == Price(input=1, output=2)
    assert price_of(spec.model_copy(update={"price": own}), tmp_path) == own
    for free in (ScriptedSpec(kind="scripted"), OpenAISpec(kind="openai", model="gpt-4o")):
        assert price_of(free, tmp_path) == Price(input=0, output=0)


@pytest.mark.parametrize("text", ["- 1", "a: 1", "a: {input: -1, output: 1}", "a: {", "a", "\0"])
def test_a_table_of_ones_own_that_is_broken_is_an_input_error_that_names_it(tmp_path, text):
    (tmp_path / "prices.yaml").write_text(text)
    with pytest.raises(InputError, match=r"prices\.yaml"):
        price_of(openai(), tmp_path)


def test_prices_of_ones_own_lie_in_the_state_folder_of_the_run(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "prices.yaml").write_text("any: {input: 1, output: 1}")
    steps = [{"step": "toys.numbers", "rows": 5}, {"step": "toys.answer"}]
    model = {"kind": "openai", "model": "any", "sampling": {"max_tokens": 50}}
    with Endpoint() as endpoint:
        recipe = {"name": "r", "models": {"m": model | {"base_url": endpoint.url}}, "steps": steps}
        dk.run(recipe, outputs=tmp_path / "outputs", state=tmp_path / "state", max_usd=1)
