"""langchain-openai, unmodified: chat, completions, streams with usage, batches, structured output."""

import asyncio

import openai
import pytest
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

MESSAGES = [SystemMessage("Tell stories."), HumanMessage("Tell me of a dog.")]


@pytest.fixture(scope="module")
def talk(chat):
    return ChatOpenAI(base_url=chat.url + "/v1", api_key=chat.key, model=chat.model(), temperature=0, max_tokens=40, max_retries=0)


def test_invoke_and_stream(talk):
    whole = talk.invoke(MESSAGES)
    assert whole.content and whole.usage_metadata["output_tokens"] == 40
    assert whole.response_metadata["finish_reason"] == "length"
    chunks = list(talk.stream(MESSAGES, stream_usage=True))
    gathered = chunks[0]
    for chunk in chunks[1:]:
        gathered += chunk
    assert gathered.content == whole.content
    assert gathered.usage_metadata["total_tokens"] == whole.usage_metadata["total_tokens"]


def test_content_in_parts(talk):
    parts = [SystemMessage("Tell stories."), HumanMessage([{"type": "text", "text": "Tell me of a dog."}])]
    assert talk.invoke(parts).content == talk.invoke(MESSAGES).content


def test_batch_is_as_one_by_one(talk):
    questions = ["A cat?", "A dog?", "A tree?", "The sun?"]
    alone = [talk.invoke(question).content for question in questions]
    assert [answer.content for answer in talk.batch(questions)] == alone

    async def together():
        return await asyncio.gather(*(talk.ainvoke(question) for question in questions))

    assert [answer.content for answer in asyncio.run(together())] == alone


def test_stop_and_logprobs(talk):
    text = talk.invoke(MESSAGES).content
    stop = text[len(text) // 2 :][:5]
    assert talk.invoke(MESSAGES, stop=[stop]).content == text[: text.index(stop)]
    scored = talk.bind(logprobs=True, top_logprobs=2).invoke(MESSAGES)
    assert len(scored.response_metadata["logprobs"]["content"]) == 40


def test_structured_output(talk):
    schema = {
        "title": "pet",
        "description": "A pet",
        "type": "object",
        "properties": {"animal": {"type": "string", "enum": ["cat", "dog"]}, "big": {"type": "boolean"}},
        "required": ["animal", "big"],
        "additionalProperties": False,
    }
    pet = talk.bind(max_tokens=200).bound.with_structured_output(schema, method="json_schema").invoke("A pet, please")
    assert pet["animal"] in ("cat", "dog") and isinstance(pet["big"], bool)


def test_completions(chat):
    model = OpenAI(base_url=chat.url + "/v1", api_key=chat.key, model=chat.model(), temperature=0, max_tokens=30, max_retries=0)
    whole = model.invoke("Once upon a time")
    assert whole and "".join(model.stream("Once upon a time")) == whole


def test_errors(chat, talk):
    with pytest.raises(openai.AuthenticationError):
        ChatOpenAI(base_url=chat.url + "/v1", api_key="wrong", model=chat.model(), max_retries=0).invoke("Hello")
    with pytest.raises(openai.BadRequestError):
        talk.invoke("word " * 600)
