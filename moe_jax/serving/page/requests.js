"use strict";

// Requests to the server that this page came from, without access to the page.

class ServerError extends Error {
  constructor(message, status, field) {
    super(message);
    this.status = status;
    this.field = field; // name of the refused field of the request, or null
  }
}

// Error of OpenAI's error object; a proxy before the server may answer anything else.
function serverError(status, body) {
  const error = body && body.error;
  if (error && typeof error.message === "string") {
    return new ServerError(error.message, status, error.param || null);
  }
  return new ServerError(`The server answered with status ${status}.`, status, null);
}

async function answered(path, options, key) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached. Is it still running?", 0, null);
  }
  if (!response.ok) throw serverError(response.status, await response.json().catch(() => null));
  return response;
}

async function listedModels(key) {
  return (await (await answered("v1/models", {}, key)).json()).data;
}

// Complete events in `text`, and the rest of it that has no end yet.
function splitEvents(text) {
  const events = text.split(/\r?\n\r?\n/);
  return { rest: events.pop(), events };
}

// Choices of a streamed answer, one a chunk. A stream that ends without [DONE] was cut.
async function* streamedChoices(path, request, key, signal) {
  const response = await answered(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...request, stream: true }),
    signal,
  }, key);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new ServerError("The connection ended before the answer did.", 0, null);
      const split = splitEvents(rest + value);
      rest = split.rest;
      for (const event of split.events) {
        const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:"))
          .map((line) => line.slice(5).trimStart()).join("\n");
        if (data === "[DONE]") return;
        if (data === "") continue; // a comment that keeps the connection open
        const chunk = JSON.parse(data);
        if (chunk.error) throw serverError(response.status, chunk);
        signal.throwIfAborted(); // one read may hold several events
        yield* chunk.choices;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it may have failed or been aborted already
  }
}
