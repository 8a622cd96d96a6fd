"""litellm, unmodified: its provider `openai`, pointed at kvfold."""

import asyncio

import litellm
import pytest

MESSAGES = [{"role": "user", "content": "Tell me of a dog."}]


@pytest.fixture(scope="module")
def where(chat):
    return {"model": f"openai/{chat.model()}", "api_base": chat.url + "/v1", "api_key": chat.key, "temperature": 0, "max_tokens": 40, "num_retries": 0}


def test_whole_and_stream(where):
    whole = litellm.completion(messages=MESSAGES, **where)
    assert whole.usage.completion_tokens == 40
    chunks = list(litellm.completion(messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **where))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole.choices[0].message.content
    assert litellm.stream_chunk_builder(chunks, messages=MESSAGES).usage.total_tokens == whole.usage.total_tokens

    async def later():
        return await litellm.acompletion(messages=MESSAGES, **where)

    assert asyncio.run(later()).choices[0].message.content == whole.choices[0].message.content


def test_text_completion(where):
    where = where | {"model": where["model"].replace("openai/", "text-completion-openai/")}
    whole = litellm.text_completion(prompt="Once upon a time", **where)
    text = "".join(chunk.choices[0].text or "" for chunk in litellm.text_completion(prompt="Once upon a time", stream=True, **where))
    assert whole.choices[0].text and text == whole.choices[0].text


def test_errors(where):
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(messages=MESSAGES, **where | {"api_key": "wrong"})
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(messages=MESSAGES, **where | {"model": "openai/another"})
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(messages=[{"role": "user", "content": "word " * 600}], **where)
