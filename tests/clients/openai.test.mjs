// The openai package of npm, unmodified. KVFOLD_URL and KVFOLD_KEY say where the server is; test_node.py sets them.
import assert from 'node:assert/strict';
import { test } from 'node:test';
import OpenAI from 'openai';

const baseURL = process.env.KVFOLD_URL + '/v1';
const client = new OpenAI({ baseURL, apiKey: process.env.KVFOLD_KEY, maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const prompt = 'Once upon a time';
const messages = [{ role: 'user', content: 'Tell me of a dog.' }];
const greedy = { model, temperature: 0, max_tokens: 40 };

test('a completion, whole and as a stream', async () => {
  const whole = await client.completions.create({ ...greedy, prompt });
  assert.equal(whole.choices[0].finish_reason, 'length');
  let text = '';
  let usage;
  const options = { stream: true, stream_options: { include_usage: true } };
  for await (const chunk of await client.completions.create({ ...greedy, prompt, ...options })) {
    text += chunk.choices[0]?.text ?? '';
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, whole.choices[0].text);
  assert.equal(usage.total_tokens, whole.usage.total_tokens);
});

test('a chat, whole, as a stream, and as the helper that gathers one', async () => {
  const whole = await client.chat.completions.create({ ...greedy, messages });
  assert.equal(whole.choices[0].message.role, 'assistant');
  let text = '';
  for await (const chunk of await client.chat.completions.create({ ...greedy, messages, stream: true })) {
    text += chunk.choices[0]?.delta.content ?? '';
  }
  assert.equal(text, whole.choices[0].message.content);
  const gathered = await client.chat.completions.stream({ ...greedy, messages }).finalChatCompletion();
  assert.equal(gathered.choices[0].message.content, whole.choices[0].message.content);
});

test('logprobs, n, seed and stop', async () => {
  const drawn = { ...greedy, temperature: 1, n: 2, seed: 5 };
  const texts = async () => (await client.chat.completions.create({ ...drawn, messages })).choices.map((c) => c.message.content);
  assert.deepEqual(await texts(), await texts());
  const scored = await client.chat.completions.create({ ...greedy, messages, logprobs: true, top_logprobs: 2 });
  assert.equal(scored.choices[0].logprobs.content.length, scored.usage.completion_tokens);
  const text = (await client.completions.create({ ...greedy, prompt })).choices[0].text;
  const stop = text.slice(20, 25);
  const stopped = (await client.completions.create({ ...greedy, prompt, stop })).choices[0];
  assert.equal(stopped.text, text.slice(0, text.indexOf(stop)));
  assert.equal(stopped.finish_reason, 'stop');
});

test('errors are the classes of their status', async () => {
  await assert.rejects(client.chat.completions.create({ ...greedy, messages, temperature: 'hot' }), OpenAI.BadRequestError);
  await assert.rejects(client.chat.completions.create({ ...greedy, messages: 'hello' }), OpenAI.BadRequestError);
  await assert.rejects(client.completions.create({ ...greedy, prompt, model: 'gpt-4' }), OpenAI.NotFoundError);
  const stranger = new OpenAI({ baseURL, apiKey: 'wrong', maxRetries: 0 });
  await assert.rejects(stranger.models.list(), OpenAI.AuthenticationError);
});

test('a stream that its client leaves', async () => {
  const long = { ...greedy, prompt, max_tokens: 400, n: 8, stream: true, ignore_eos: true };
  const stream = await client.completions.create(long);
  for await (const chunk of stream) {
    assert.ok(chunk.choices);
    break;
  }
  const aborting = new AbortController();
  const waiting = client.completions.create({ ...long, stream: false }, { signal: aborting.signal });
  setTimeout(() => aborting.abort(), 20);
  await assert.rejects(waiting, OpenAI.APIUserAbortError);
});
