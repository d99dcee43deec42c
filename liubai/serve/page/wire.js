// The only talk with the server: the list of models, and one streamed answer. Nothing else is ever fetched.

/** Why there is no (whole) answer. `kind`: unreachable, key, busy, refused, failed or broken; `detail`: what the
 *  server said about it; `after`: seconds to wait before the next try. */
export class Refusal extends Error {
  constructor(kind, detail = "", after = null) {
    super(detail || kind);
    this.kind = kind;
    this.detail = detail;
    this.after = after;
  }
}

/** Whether a browser can send `key`, and a server can have it. */
export const sendable = (key) => /^[\x20-\x7e]*$/.test(key);

function headers(key) {
  if (!sendable(key)) throw new Refusal("key");  // `fetch` would throw, as if there were no server
  return key ? { "Content-Type": "application/json", Authorization: `Bearer ${key}` } : { "Content-Type": "application/json" };
}

async function get(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, cache: "no-store", credentials: "same-origin" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("unreachable");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let detail = "";
  try {
    detail = (await response.json()).error.message;
  } catch { /* not of OpenAI's shape: the status says enough */ }
  if (typeof detail !== "string") detail = "";
  if (response.status === 401) return new Refusal("key", detail);
  if (response.status === 429 || response.status === 503) return new Refusal("busy", detail, wait(response.headers.get("Retry-After")));
  return new Refusal(response.status < 500 ? "refused" : "failed", detail);
}

/** Seconds of a Retry-After header, which is a number or a date (RFC 9110, 10.2.3); 5 where it is neither. */
export function wait(header) {
  const seconds = /^\s*\d+\s*$/.test(header || "") ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.min(600, Math.max(1, Math.ceil(seconds))) : 5;
}

export async function listModels(key) {
  const response = await get("v1/models", { headers: headers(key) });
  const list = await response.json().catch(() => null);
  if (!list || !Array.isArray(list.data)) throw new Refusal("wrongModels");
  return list.data.filter((model) => model && typeof model.id === "string");
}

/** Posts `body` and gives `heard` every chunk of the stream. Raises a `Refusal`; an aborted `signal` raises the
 *  browser's AbortError. */
export async function ask(body, key, signal, heard) {
  const response = await get("v1/chat/completions", { method: "POST", headers: headers(key), body: JSON.stringify(body), signal });
  if (!response.body) throw new Refusal("broken");
  const reader = response.body.getReader(), decoder = new TextDecoder();
  let rest = "", data = [];
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (signal.aborted) throw error;
      throw new Refusal("broken");
    }
    if (piece.done) throw new Refusal("broken");
    rest += decoder.decode(piece.value, { stream: true });
    const lines = rest.split("\n");
    rest = lines.pop();
    for (const raw of lines) {
      const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
      if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
      if (line || !data.length) continue;  // a comment, a field that we do not use, or an event of no data
      const event = data.join("\n");
      data = [];
      if (event === "[DONE]") return void reader.cancel().catch(() => {});
      heard(chunk(event));
    }
  }
}

function chunk(event) {
  let found;
  try {
    found = JSON.parse(event);
  } catch {
    throw new Refusal("broken");
  }
  if (!found || typeof found !== "object") throw new Refusal("broken");
  if (found.error) throw new Refusal("failed", String(found.error.message || ""));
  return found;
}
