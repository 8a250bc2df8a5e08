"""What the test endpoint answers: a pure function of the request body."""

import json
import re
from hashlib import sha256
from typing import Any

from endpoint_schema import WORDS, Json, fitting, resolved, schema_in, sentences, unfit

# An opening tag that comes again before it is closed was only mentioned: it opens no block.
BLOCK = re.compile(r"<(answer_([ab])_*)>((?:(?!<\1>).)*?)</\1>", re.DOTALL)
TOKEN = re.compile(r"\s*\S+|\s+")


def body_key(body: Json) -> str:
    """The name of a request body in the accounting: equal JSON is one body, whatever its order."""
    return sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def said_in(message: Json) -> str:
    """The text of a message, of several parts or one."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(p.get("text", "") for p in content)


def texts_of(body: Json) -> list[str]:
    """The text of each prompt, one for a chat; ValueError where we cannot answer the request."""
    source, plain = body.get("messages") or body.get("prompt"), isinstance(body.get("model"), str)
    unserved = body.get("stream") or body.get("max_tokens", 0) < 0
    if not source or not plain or unserved or body.get("n", 1) not in range(1, 129):
        raise ValueError("give model, messages or prompt, n up to 128; no stream")
    if "messages" in body:
        if body.get("echo"):
            raise ValueError("only completions echo")
        return ["\n".join(map(said_in, source))]
    # A prompt is a text, a list of texts, or token ids in one list or in several.
    single = isinstance(source, str) or isinstance(source[0], int)
    return [str(prompt) for prompt in ([source] if single else source)]


def schema_asked(body: Json) -> Json | None:
    """The schema that the answer shall fit; empty where one is only mentioned; None for no JSON.

    A repair turn may name the schema no more: there the earlier messages count too.
    """
    form = body.get("response_format") or {}
    if form.get("type") == "json_schema":
        return form["json_schema"]["schema"]
    turns = body.get("messages") or []
    mentioned = False
    for turn in reversed(turns if repairs(body) else turns[-1:]):
        if turn.get("role") != "assistant":
            text = said_in(turn)
            if found := schema_in(text):
                return found
            mentioned |= "json schema" in text.lower()
    return {} if mentioned else None


def repairs(body: Json) -> bool:
    """Whether the conversation holds an answer already."""
    return any(turn.get("role") == "assistant" for turn in body.get("messages") or [])


def verdict(text: str, form: Json | None) -> Json | None:
    """The verdict of a judge who prefers the same text in both orders; None: none is asked."""
    if "<answer_" not in text:
        return None
    blocks = {label.upper(): block.strip() for _, label, block in BLOCK.findall(text)}
    asks = f"{text}{json.dumps(form)}".lower()
    if len(blocks) < 2 or "json" not in asks or "verdict" not in asks:
        return None
    best = max("AB", key=lambda k: sha256(blocks[k].encode(errors="surrogatepass")).digest())
    return {"reason": f"The text of {best} has the larger hash.", "verdict": best}


def default_text(body: Json, text: str, seed: str) -> str:
    """A verdict where one is asked, else JSON that fits the schema if there is one, else words."""
    schema = schema_asked(body)
    judged = verdict(text, body.get("response_format"))
    if not schema:
        return json.dumps(judged) if judged else sentences(seed)
    value = fitting(schema, seed)
    if judged and isinstance(value, dict) and "verdict" in value:
        known = resolved(schema, schema)["properties"]
        if judged["verdict"] in resolved(known["verdict"], schema).get("enum", "AB"):
            value |= {name: said for name, said in judged.items() if name in value}
    return json.dumps(value)


def clip(text: str, body: Json) -> tuple[str, str]:
    """The text up to its first stop string and its last allowed word, and the finish reason."""
    stops: str | list[str] = body.get("stop") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop, 1)[0]
    limit: int | None = body.get("max_completion_tokens", body.get("max_tokens"))
    # Every word but the last is followed by a space at least.
    if limit is None or len(text) < 2 * limit:
        return text, "stop"
    ends = [word.end() for word in re.finditer(r"\S+", text)]
    return (text, "stop") if len(ends) <= limit else (text[: [0, *ends][limit]], "length")


def scores(model: str, before: str, text: str, alternatives: int) -> list[tuple[int, str, Json]]:
    """For each token of `text`: its place, itself, and the log-probabilities there, its own first.

    They are functions of the model, of all the text before, and of the token alone.
    """
    read, found = sha256(f"{model}\0{before}".encode(errors="surrogatepass")), list[Any]()
    for match in TOKEN.finditer(text):
        state, token = read.digest(), match[0]
        turn = state[0]
        others = [f" {WORDS[(turn + k) % len(WORDS)]}" for k in range(min(alternatives, 12))]
        found.append((match.start(), token, {t: logprob(state, t) for t in (token, *others)}))
        read.update(token.encode(errors="surrogatepass"))
    return found


def logprob(state: bytes, token: str) -> float:
    """A number from -10 to below 0, mostly near 0."""
    drawn = sha256(state + token.encode(errors="surrogatepass")).digest()
    return round(-1e-4 - 9.9 * (int.from_bytes(drawn[:4]) / 2**32) ** 3, 6)


def best(found: Json, count: int) -> Json:
    """The first entry and the likeliest others, `count` in all, the likeliest first."""
    (own, value), *others = found.items()
    others = sorted(others, key=lambda pair: -pair[1])[: max(count - 1, 0)]
    return dict(sorted([(own, value), *others], key=lambda pair: -pair[1]))


def completion_logprobs(body: Json, prompt: str, said: str) -> Json:
    """The `logprobs` of a completion; an echoed prompt has none for its first token."""
    before = "" if body.get("echo") else prompt
    count = int(body["logprobs"])
    rows = scores(body["model"], before, said, count)
    kept = [values[token] for _, token, values in rows]
    # The API adds the token itself to the likeliest ones.
    top: list[Json | None] = [best(values, count + 1) for *_, values in rows]
    if not before and rows:
        kept[0] = top[0] = None
    tokens = [token for _, token, _ in rows]
    # Offsets count from the start of the prompt, whether it is echoed or not.
    offsets = [len(before) + place for place, *_ in rows]
    return {"tokens": tokens, "token_logprobs": kept, "top_logprobs": top, "text_offset": offsets}


def chat_logprobs(body: Json, prompt: str, said: str) -> Json:
    """The `logprobs` of a chat answer."""

    def entry(token: str, value: float) -> Json:
        spelt = list(token.encode(errors="replace"))
        return {"token": token, "logprob": value, "bytes": spelt}

    count = body.get("top_logprobs", 0)
    content = list[Json]()
    for _, token, values in scores(body["model"], prompt, said, count):
        top = best(values, count) if count else {}
        tops = [entry(*pair) for pair in top.items()]
        content.append({**entry(token, values[token]), "top_logprobs": tops})
    return {"content": content, "refusal": None}


def spoilt(text: str, finish: str, outcome: str) -> tuple[str, str]:
    """The text and the finish reason that a knob makes of them."""
    match outcome:
        case "pempty":
            return "", "stop"
        case "pfilter":
            return "", "content_filter"
        case "plength":
            return text[: len(text) // 2], "length"
        case _:
            return text, finish


def answer(body: Json, *, chat: bool, own: str | None = None, outcome: str = "ok") -> Json:
    """The completion: `own` text if given, else the default one, spoilt as `outcome` says.

    Nothing in it may differ between two answers to one body, hence the constant time and the id.
    """
    texts, given, choices, source = texts_of(body), 0, list[Json](), ""
    if chat is not ("messages" in body):
        raise ValueError("chat completions take messages, completions a prompt")
    place = chat_logprobs if chat else completion_logprobs
    # 0 asks for the tokens themselves, and equals False.
    scored = not any(body.get("logprobs") is no for no in (None, False))
    for text in texts:
        source = json.dumps([body["model"], body.get("messages"), text, body.get("seed")])
        for draw in range(body.get("n", 1)):
            seed = f"{draw} {source}"
            if outcome == "pinvalid":
                full = json.dumps(unfit(schema_asked(body) or {}, seed))
            else:
                full = default_text(body, text, seed) if own is None else own
            said, finish = spoilt(*clip(full, body), outcome)
            given += len(said.split())
            if body.get("echo"):
                said = text + said
            one: Json = {"message": {"role": "assistant", "content": said}} if chat else {}
            one = one or {"text": said}
            if scored:
                one["logprobs"] = place(body, text, said)
            choices.append({"index": len(choices), **one, "finish_reason": finish})
    asked = sum(len(text.split()) for text in texts)
    usage = {"prompt_tokens": asked, "completion_tokens": given, "total_tokens": asked + given}
    kind = "chat.completion" if chat else "text_completion"
    name = f"cmpl-{sha256(source.encode()).hexdigest()[:24]}"
    head = {"id": name, "object": kind, "created": 1_700_000_000, "model": body["model"]}
    return {**head, "choices": choices, "usage": usage}
