"""What a million tokens cost: the recipe's word, else a small dated table.

`price:` in a model's spec counts first, then `prices.yaml` in the state folder, then the table
here. Where none knows the model, a cap in dollars is refused, not ignored.
"""

from pathlib import Path
from urllib.parse import urlsplit

import yaml

from datakit.errors import InputError
from datakit.models.specs import FREE, ChatSpec, OpenAISpec, Price

AS_OF = "2025-10"
"""How old the table is; prices change, so `plan` says this."""

BATCH_SHARE = 0.5
"""What a provider's batch API costs beside the live one."""


TABLE: dict[str, dict[str, Price]] = {
    "api.openai.com": {
        "gpt-4.1": Price(input=2, output=8),
        "gpt-4.1-mini": Price(input=0.4, output=1.6),
        "gpt-4.1-nano": Price(input=0.1, output=0.4),
        "gpt-4o": Price(input=2.5, output=10),
        "gpt-4o-mini": Price(input=0.15, output=0.6),
        "gpt-5": Price(input=1.25, output=10),
        "gpt-5-mini": Price(input=0.25, output=2),
        "gpt-5-nano": Price(input=0.05, output=0.4),
        "o4-mini": Price(input=1.1, output=4.4),
    }
}
"""By host, because another host asks another price for a model of the same name."""


def price_of(spec: ChatSpec, state: Path) -> Price | None:
    """The price of a model's tokens; None where nobody knows it. Local models cost nothing.

    state: the folder of `prices.yaml`. Raises InputError where `prices.yaml` is broken.
    """
    price = spec.price
    if price is None:
        if not isinstance(spec, OpenAISpec) or not spec.urls:
            return FREE
        host = urlsplit(spec.urls[0]).hostname or ""
        price = _own(state / "prices.yaml").get(spec.model) or TABLE.get(host, {}).get(spec.model)
    if price is not None and isinstance(spec, OpenAISpec) and spec.mode == "batch":
        return Price(input=price.input * BATCH_SHARE, output=price.output * BATCH_SHARE)
    return price


def _own(path: Path) -> dict[str, Price]:
    """The user's table: `model: {input: 0.15, output: 0.6}`, dollars for a million tokens."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {str(name): Price.model_validate(price) for name, price in data.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise InputError(
            f"{str(path)!r} is not a table of `model: {{input: USD, output: USD}}`: {error}"
        ) from error
