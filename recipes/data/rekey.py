"""Write quickstart_ledger.jsonl anew from the readable table of answers.

Run it when the wording of a request, the sampling of the recipe or the prompts change:

    python recipes/data/rekey.py

The recipe runs with its models replaced by a look-up in quickstart_answers.jsonl (step, prompt,
model, order, text), so every request gets its key from the code as it is. The duplicate steps are
left out, so that other thresholds than the recipe's find their answers too.
"""

import json
import tempfile
from pathlib import Path

from datakit.models.chat import Reply, Request
from datakit.models.ledger import Ledger
from datakit.pipeline import run
from datakit.recipe import Recipe, load_recipe

FOLDER = Path(__file__).parent


class Table:
    """A chat model that answers from the table; it finds its row by the texts in the request."""

    def __init__(self, role: str, identity: str) -> None:
        self.identity = identity
        prompts = _lines("quickstart_prompts.jsonl")
        rows = _lines("quickstart_answers.jsonl")
        self._prompts = {row["prompt"]: row["key"] for row in prompts}
        answered = {row["prompt"] for row in rows}
        # A byte-identical copy of a prompt shares its answers, under the original's key.
        for row in prompts:
            if row["key"] in answered:
                self._prompts[row["prompt"]] = row["key"]
        self._answers = {(row["prompt"], row["model"], row["order"]): row["text"] for row in rows}
        self._role = role

    async def answer(self, request: Request) -> Reply:
        """The recorded answer; KeyError where the table holds none."""
        turns = request.body["messages"]
        asked = turns[-1]["content"]
        if self._role != "judge":
            text = self._answers[self._prompts[asked], self._role, ""]
        else:
            text = self._judgement(asked)
        words = sum(len(turn["content"].split()) for turn in turns)
        return Reply(
            text=text,
            finish_reason="stop",
            input_tokens=words,
            output_tokens=len(text.split()),
        )

    def _judgement(self, asked: str) -> str:
        conversation = asked.partition("<conversation>\nuser: ")[2]
        prompt = conversation.partition("\n</conversation>")[0]
        key = self._prompts[prompt]
        shown_first = asked.partition("<answer_a>\n")[2].partition("\n</answer_a>")[0]
        order = "ab" if shown_first == self._answers[key, "writer", ""] else "ba"
        return self._answers[key, "judge", order]

    async def close(self) -> None:
        """Nothing to close."""


def _lines(name: str) -> list[dict[str, str]]:
    text = (FOLDER / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def without_duplicate_steps(recipe: Recipe) -> Recipe:
    """The recipe with every prompt asked, and no gate."""
    steps = tuple(one for one in recipe.steps if one.name != "curation.near")
    return recipe.model_copy(update={"steps": steps, "gate": {}, "recorded": None})


def main() -> None:
    """Answer every request of the recipe from the table and export the ledger."""
    recipe = without_duplicate_steps(load_recipe(FOLDER.parent / "quickstart.yaml"))
    models = {
        role: Table(role, recipe.models[role].resolved_identity())
        for role in ("writer", "drafter", "judge")
    }
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state"
        run(recipe, outputs=Path(folder) / "outputs", state=state, models=models)
        with Ledger.opened(state) as ledger:
            count = ledger.export(FOLDER / "quickstart_ledger.jsonl")
    print(f"{count} answers written")


if __name__ == "__main__":
    main()
