"""Sampling settings: a step's over those of its model."""

from functools import lru_cache

from pydantic import Field, JsonValue

from datakit.text import canonical_json
from datakit.values import Value


class Sampling(Value):
    """Sampling settings; None leaves the choice to the model's spec, then to the endpoint."""

    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1)
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __hash__(self) -> int:
        return hash((self.temperature, self.top_p, self.max_tokens, self.stop, self.seed))

    def over(self, default: "Sampling") -> dict[str, JsonValue]:
        """The settings to send: this one's where set, else the default's."""
        return dict(_merged(self, default))

    def text_over(self, default: "Sampling") -> str:
        """The same as canonical JSON."""
        return _merged_text(self, default)


# Every request asks for one of the few combinations that a recipe has.
@lru_cache
def _merged(given: Sampling, default: Sampling) -> dict[str, JsonValue]:
    merged = default.model_dump(exclude_defaults=True) | given.model_dump(exclude_defaults=True)
    return {name: list(v) if isinstance(v, tuple) else v for name, v in merged.items()}


@lru_cache
def _merged_text(given: Sampling, default: Sampling) -> str:
    return canonical_json(_merged(given, default))
