// The server's API: plain requests, and streams of server-sent events. Addresses are relative to the page, so that it
// also works behind a proxy that adds a prefix.

/** What the API said instead of an answer. `status` is 0 when nothing was said at all. */
export class ApiError extends Error {
  constructor(message, { status = 0, param = null, code = null, retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.param = param;
    this.code = code;
    this.retryAfter = retryAfter;
  }

  /** One paragraph for the person who asked. */
  get text() {
    const where = this.param ? ` (${this.param})` : "";
    const wait = this.retryAfter ? ` The server asks to wait ${this.retryAfter} s.` : "";
    return `${this.status ? `${this.status}: ` : ""}${this.message}${where}${wait}`;
  }
}

function fromObject(error, more) {
  return new ApiError(error.message ?? "The server gave no reason.", { param: error.param ?? null, code: error.code ?? null, ...more });
}

async function fromResponse(response) {
  const more = { status: response.status, retryAfter: response.headers.get("retry-after") };
  try {
    const { error } = await response.json();
    return fromObject(error, more);
  } catch {
    return new ApiError(response.statusText || "The server gave no reason.", more);
  }
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (cause) {
    if (cause.name === "AbortError") throw cause;
    throw new ApiError("The server cannot be reached.");
  }
  if (!response.ok) throw await fromResponse(response);
  return response;
}

function posted(body, signal) {
  return { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal };
}

export async function get(path) {
  return (await request(path)).json();
}

/** The `data:` of each event in `text`, and what is left of an event that has not ended. */
function split(text) {
  const events = text.split(/\r?\n\r?\n/);
  const rest = events.pop();
  const data = events.map((event) =>
    event
      .split(/\r?\n/)
      .filter((line) => line.startsWith("data:"))
      .map((line) => line.slice(5).trimStart())
      .join("\n"),
  );
  return { data: data.filter((line) => line !== ""), rest };
}

/** The chunks of a streamed answer. Ends at `[DONE]`; a stream that ends before it, or with an error, throws. */
export async function* stream(path, body, signal) {
  const response = await request(path, posted(body, signal));
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let pending = "";
  for (;;) {
    let read;
    try {
      read = await reader.read();
    } catch (cause) {
      if (cause.name === "AbortError") throw cause;
      throw new ApiError("The connection broke before the answer had ended.");
    }
    if (read.done) throw new ApiError("The stream ended before the answer did.");
    const { data, rest } = split(pending + decoder.decode(read.value, { stream: true }));
    pending = rest;
    for (const line of data) {
      if (line === "[DONE]") return;
      const chunk = JSON.parse(line);
      if (chunk.error) throw fromObject(chunk.error);
      yield chunk;
    }
  }
}
