"""The openai package, unmodified: what it sends, what it parses, and which exceptions it raises."""

import asyncio
import base64
import json
import threading
import time

import openai
import pytest
from serving import Server

PROMPT = "Once upon a time"
CANCELLED = 'kvfold_requests_finished_total{reason="cancelled"}'
MESSAGES = [{"role": "system", "content": "Tell stories."}, {"role": "user", "content": "Tell me of a dog."}]


@pytest.fixture(scope="module")
def stories_sdk(stories):
    return openai.OpenAI(base_url=stories.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def chat_sdk(chat):
    return openai.OpenAI(base_url=chat.url + "/v1", api_key=chat.key, max_retries=0)


@pytest.fixture(scope="module")
def story(stories, stories_sdk):
    """complete(...) of the embedded model, greedy unless told otherwise."""

    def complete(prompt=PROMPT, **fields):
        fields = {"model": stories.model(), "temperature": 0, "max_tokens": 40} | fields
        return stories_sdk.completions.create(prompt=prompt, **fields)

    return complete


@pytest.fixture(scope="module")
def talk(chat, chat_sdk):
    def complete(messages=MESSAGES, **fields):
        fields = {"model": chat.model(), "temperature": 0, "max_tokens": 40} | fields
        return chat_sdk.chat.completions.create(messages=messages, **fields)

    return complete


def test_models(stories, stories_sdk):
    (model,) = stories_sdk.models.list().data
    assert model.object == "model"
    assert stories_sdk.models.retrieve(model.id).id == model.id
    with pytest.raises(openai.NotFoundError):
        stories_sdk.models.retrieve("another")


def test_completion(story):
    answer = story()
    assert answer.object == "text_completion"
    (choice,) = answer.choices
    assert choice.finish_reason == "length" and choice.text
    usage = answer.usage
    assert usage.completion_tokens == 40
    assert usage.total_tokens == usage.prompt_tokens + 40
    assert story().choices[0].text == choice.text


def test_what_the_cache_did(story):
    receipt = story().usage.model_extra["kvfold"]
    # The embedded model is a plain one: everything is kept, and said so.
    assert receipt["engaged"] is False
    assert receipt["logical_ratio"] == pytest.approx(1)
    assert receipt["physical_ratio"] == pytest.approx(receipt["dense_kv_bytes"] / receipt["kv_bytes"])
    assert receipt["tokens_seen"] >= 40
    assert story(extra_body={"kvfold": {"enabled": False}}).usage.model_extra["kvfold"]["engaged"] is False


def test_prompt_forms(stories, story):
    others = [PROMPT, "The cat sat on"]
    ids = [stories.json("/tokenize", {"prompt": text})["tokens"] for text in others]
    alone = [story(text).choices[0].text for text in others]
    assert [choice.text for choice in sorted(story(others).choices, key=lambda choice: choice.index)] == alone
    assert story(ids[0]).choices[0].text == alone[0]
    assert [choice.text for choice in sorted(story(ids).choices, key=lambda choice: choice.index)] == alone


def test_detokenize(stories):
    ids = stories.json("/tokenize", {"prompt": PROMPT, "add_special_tokens": False})
    assert ids["count"] == len(ids["tokens"]) and ids["max_model_len"] == 512
    assert stories.json("/detokenize", {"tokens": ids["tokens"]})["prompt"].strip() == PROMPT


def test_stream_of_completion(story):
    whole = story()
    chunks = list(story(stream=True, stream_options={"include_usage": True}))
    *parts, last = chunks
    assert "".join(chunk.choices[0].text for chunk in parts) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in parts if chunk.choices[0].finish_reason] == ["length"]
    assert last.choices == [] and last.usage.total_tokens == whole.usage.total_tokens
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in parts)


def test_continuous_usage(story):
    chunks = list(story(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 40


def test_chat(talk):
    answer = talk()
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert talk(max_tokens=None, max_completion_tokens=40).choices[0].message.content == answer.choices[0].message.content
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES]
    assert talk(parts).choices[0].message.content == answer.choices[0].message.content


def test_stream_of_chat(talk):
    whole = talk()
    chunks = list(talk(stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert reasons == [whole.choices[0].finish_reason]
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_logprobs_of_chat(talk):
    (choice,) = talk(logprobs=True, top_logprobs=5).choices
    entries = choice.logprobs.content
    assert len(entries) == 40
    for entry in entries:
        best = [top.logprob for top in entry.top_logprobs]
        assert len(best) == 5 and best == sorted(best, reverse=True) and best[0] <= 0
        # Greedy: the token is the most likely one, to the bit.
        assert entry.logprob == best[0] and entry.token == entry.top_logprobs[0].token
    said = b"".join(bytes(entry.bytes) for entry in entries).decode("utf-8", "replace")
    assert said.strip() == choice.message.content.strip()
    streamed = [
        entry.logprob
        for chunk in talk(logprobs=True, top_logprobs=5, stream=True)
        for part in chunk.choices
        if part.logprobs
        for entry in part.logprobs.content or []
    ]
    assert streamed == pytest.approx([entry.logprob for entry in entries], abs=1e-5)


def test_logprobs_of_completion(story):
    logprobs = story(logprobs=3).choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(logprobs.text_offset) == 40
    for own, top in zip(logprobs.token_logprobs, logprobs.top_logprobs):
        assert own == max(top.values())


def test_echo_scores_a_prompt(stories, story):
    ids = stories.json("/tokenize", {"prompt": PROMPT})["tokens"]
    answer = story(ids, echo=True, logprobs=1, max_tokens=0)
    scores = answer.choices[0].logprobs.token_logprobs
    assert len(scores) == len(ids) and scores[0] is None and all(score <= 0 for score in scores[1:])
    assert answer.usage.completion_tokens == 0
    more = story(ids, echo=True, logprobs=1, max_tokens=3).choices[0]
    assert more.logprobs.token_logprobs[1 : len(ids)] == pytest.approx(scores[1:], abs=1e-4)
    assert len(more.logprobs.tokens) == len(ids) + 3
    assert more.text.strip().startswith(PROMPT)


def test_an_end_of_text_has_a_logprob_too(stories, story):
    # lm-eval asks for one token after the prompt and drops the last entry, whatever that token was.
    ids = stories.json("/tokenize", {"prompt": PROMPT})["tokens"]
    (choice,) = story(ids, echo=True, logprobs=1, max_tokens=1, logit_bias={"2": 100}).choices
    assert choice.finish_reason == "stop"
    assert len(choice.logprobs.token_logprobs) == len(ids) + 1


def test_stop(story):
    text = story(max_tokens=60).choices[0].text
    # From the middle of the text, a string of several tokens.
    stop = text[len(text) // 2 :][:6]
    before = text[: text.index(stop)]
    (choice,) = story(max_tokens=60, stop=stop).choices
    assert (choice.text, choice.finish_reason) == (before, "stop")
    (choice,) = story(max_tokens=60, stop=["\x00never", stop]).choices
    assert (choice.text, choice.finish_reason) == (before, "stop")
    chunks = list(story(max_tokens=60, stop=[stop], stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == before


def test_n_and_seed(story):
    def drawn(**fields):
        answer = story(temperature=1, n=3, **fields)
        return [choice.text for choice in sorted(answer.choices, key=lambda choice: choice.index)]

    first = drawn(seed=7)
    assert len(set(first)) == 3, "choices of one request should differ"
    assert drawn(seed=7) == first
    assert drawn(seed=8) != first
    assert drawn() != drawn(), "without a seed each request draws its own"
    texts = ["", "", ""]
    for chunk in story(temperature=1, n=3, seed=7, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == first


def test_logit_bias(stories, story):
    first = story(max_tokens=1, logprobs=1).choices[0]
    (again,) = stories.json("/tokenize", {"prompt": "x", "add_special_tokens": False})["tokens"][-1:]
    forced = story(max_tokens=5, logit_bias={str(again): 100}, logprobs=1).choices[0].logprobs.tokens
    assert len(set(forced)) == 1
    assert story(max_tokens=1, logit_bias={str(again): 100}).choices[0].text != first.text


def test_min_tokens_and_ignore_eos(story):
    biased = {"logit_bias": {"2": 100}, "max_tokens": 12}
    assert story(**biased).usage.completion_tokens <= 1
    assert story(**biased, extra_body={"min_tokens": 5}).usage.completion_tokens >= 5
    assert story(**biased, extra_body={"ignore_eos": True}).usage.completion_tokens == 12


def test_json_schema(talk):
    schema = {
        "type": "object",
        "properties": {"animal": {"enum": ["cat", "dog"]}, "big": {"type": "boolean"}},
        "required": ["animal", "big"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "pet", "schema": schema, "strict": True}}
    for seed in range(4):
        (choice,) = talk(response_format=form, max_tokens=200, temperature=1, seed=seed).choices
        pet = json.loads(choice.message.content)
        assert pet["animal"] in ("cat", "dog") and isinstance(pet["big"], bool) and len(pet) == 2


def test_tool_call(talk):
    parameters = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"], "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "light", "description": "A lamp", "parameters": parameters}}
    choice = {"type": "function", "function": {"name": "light"}}
    (answer,) = talk(tools=[tool], tool_choice=choice, max_tokens=200).choices
    (call,) = answer.message.tool_calls
    assert call.function.name == "light" and isinstance(json.loads(call.function.arguments)["on"], bool)
    assert answer.finish_reason in ("tool_calls", "stop")
    assert not talk(tools=[tool], tool_choice="none").choices[0].message.tool_calls


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"suffix": "The end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 1000}, "logprobs"),
        ({"stop": [str(number) for number in range(17)]}, "stop"),
    ],
)
def test_bad_request(story, fields, param):
    with pytest.raises(openai.BadRequestError) as raised:
        story(**fields)
    assert raised.value.param == param
    assert param in raised.value.message and raised.value.type


def test_too_long(story):
    with pytest.raises(openai.BadRequestError):
        story([5] * 600)


def test_null_is_as_good_as_absent(story):
    assert story(extra_body={"stop": None, "top_p": None, "seed": None, "logit_bias": None}).choices[0].text == story().choices[0].text


def test_unknown_fields_are_named(stories, stories_sdk):
    raw = stories_sdk.completions.with_raw_response.create(
        model=stories.model(), prompt=PROMPT, max_tokens=2, extra_body={"frobnicate": 1, "best_effort": True}
    )
    named = {name.strip() for name in raw.headers["x-ignored-params"].split(",")}
    assert named == {"frobnicate", "best_effort"}


def test_another_model_is_not_found(story):
    with pytest.raises(openai.NotFoundError):
        story(model="gpt-4")


def test_without_the_key(chat):
    for key in ("wrong", chat.key + "x", chat.key[:-1]):
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=chat.url + "/v1", api_key=key, max_retries=0).models.list()
    for path in ("/", "/ready", "/metrics", "/version", "/openapi.json", "/v1/models"):
        assert chat.ask(path, key=None)[0] == 401, path
    assert chat.ask("/health", key=None)[0] == 200
    # A browser asks for a user and a password; the key is the password.
    basic = base64.b64encode(f"anybody:{chat.key}".encode()).decode()
    assert chat.ask("/v1/models", key=None, headers={"authorization": f"Basic {basic}"})[0] == 200


def test_cancelled_mid_stream(stories, story):
    before = stories.idle()
    # Long enough that much of it is still to come when the client leaves.
    stream = story(max_tokens=480, n=16, temperature=1, stream=True, extra_body={"ignore_eos": True})
    for _ in range(3):
        next(stream)
    stream.close()
    after = stories.idle()
    assert after.get(CANCELLED, 0) > before.get(CANCELLED, 0)
    assert after["kvfold_kv_pages_held"] == before["kvfold_kv_pages_held"]


def test_cancelled_without_a_stream(stories, stories_sdk):
    before = stories.idle()
    impatient = stories_sdk.with_options(timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        fields = {"max_tokens": 480, "n": 16, "extra_body": {"ignore_eos": True}}
        impatient.completions.create(model=stories.model(), prompt=[PROMPT] * 4, **fields)
    after = stories.idle()
    assert after.get(CANCELLED, 0) > before.get(CANCELLED, 0)
    assert after["kvfold_kv_pages_held"] == before["kvfold_kv_pages_held"]


def test_async_beside_each_other(stories, story):
    prompts = [f"{name} went to the" for name in ("Tom", "Lily", "Sue", "Ben", "Max", "Mia", "Sam", "Anna")]
    alone = [story(prompt).choices[0].text for prompt in prompts]

    async def together():
        async with openai.AsyncOpenAI(base_url=stories.url + "/v1", api_key="none", max_retries=0) as client:

            async def one(prompt):
                text = ""
                fields = {"model": stories.model(), "temperature": 0, "max_tokens": 40}
                async for chunk in await client.completions.create(prompt=prompt, stream=True, **fields):
                    text += chunk.choices[0].text
                return text

            return await asyncio.gather(*map(one, prompts))

    assert asyncio.run(together()) == alone


def test_a_full_queue_is_a_rate_limit(kvfold):
    with Server(kvfold, "stories260k", "--max-running", "1", "--max-queue", "1") as server:
        outcomes = []

        def one():
            client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
            try:
                client.completions.create(model=model, prompt=PROMPT, max_tokens=480, extra_body={"ignore_eos": True})
                outcomes.append("done")
            except openai.RateLimitError as error:
                assert float(error.response.headers["retry-after"]) >= 0
                outcomes.append("refused")
            except openai.APIError as error:
                outcomes.append(repr(error))

        model = server.model()
        threads = [threading.Thread(target=one) for _ in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(outcomes) == {"done", "refused"}, outcomes


def test_drain(kvfold):
    server = Server(kvfold, "stories260k", "--drain", "30")
    try:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        fields = {"prompt": PROMPT, "max_tokens": 480, "n": 8, "stream": True, "extra_body": {"ignore_eos": True}}
        streams = [client.completions.create(model=server.model(), **fields) for _ in range(2)]
        for stream in streams:
            next(stream)
        server.child.terminate()
        time.sleep(0.1)
        # Nothing new is taken: 503, or nobody listens any more.
        with pytest.raises((openai.InternalServerError, openai.APIConnectionError)) as raised:
            client.completions.create(model="stories260k", prompt=PROMPT, max_tokens=1)
        if isinstance(raised.value, openai.InternalServerError):
            assert raised.value.status_code == 503 and "retry-after" in raised.value.response.headers
        for stream in streams:
            reasons = [choice.finish_reason for chunk in stream for choice in chunk.choices if choice.finish_reason]
            assert reasons == ["length"] * 8
        server.stop()
    finally:
        server.child.kill()
        server.child.wait()
