// Tokens in ink: the less probable, the darker the wash. One hue from light to dark, so that it is read without
// telling colours apart, and a dotted or full line under the least probable.
import { number, say, words } from "./words.js";

const STEPS = [0.9, 0.6, 0.3, 0.1];  // at least so probable: wash 0 … 3; below all of them: 4
const BLOCK = 300;  // tokens after which a line break begins a new block (see flow.js)
const percent = (p) => `${number(100 * p, p < 0.0995 ? 1 : 0)} %`;
const shown = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ | $/g, "␣") || "∅";

/** What the server says of tokens, as {text, p, logprob, others: [{text, logprob}]}. A character may be spread over
 *  several tokens; it is then shown at the last of them. */
export class Tokens {
  constructor() {
    this.decoder = new TextDecoder();
  }

  read(list) {
    return list.filter((token) => token && typeof token.logprob === "number").map((token) => ({
      text: Array.isArray(token.bytes) ? this.decoder.decode(new Uint8Array(token.bytes), { stream: true }) : String(token.token),
      logprob: token.logprob,
      p: Math.exp(token.logprob),
      others: (Array.isArray(token.top_logprobs) ? token.top_logprobs : [])
        .filter((other) => other && typeof other.logprob === "number")
        .map((other) => ({ text: String(other.token), logprob: other.logprob })),
      name: String(token.token),
    }));
  }
}

/** The tokens with the white space that stands between them in `text`: some tokenizers leave it to the decoder. As
 *  they are where they do not spell the text. */
export function spaced(tokens, text) {
  const found = [];
  let at = 0;
  for (const token of tokens) {
    const bare = token.text.trim(), from = text.indexOf(bare, at);
    if (from < 0 || text.slice(at, from).trim()) return tokens;
    found.push({ ...token, text: text.slice(at, from + bare.length) });
    at = from + bare.length;
  }
  if (text.slice(at).trim()) return tokens;
  if (found.length) found.at(-1).text += text.slice(at);
  return found;
}

const tip = document.createElement("div");
tip.id = "tip";
tip.setAttribute("role", "tooltip");
tip.hidden = true;
document.body.append(tip);
export const tipOpen = () => !tip.hidden;
export const closeTip = () => { tip.hidden = true; };

function row(text, p, chosen) {
  const line = document.createElement("tr"), name = document.createElement("td"), bar = document.createElement("td");
  const isolated = document.createElement("bdi"), rule = document.createElement("i"), share = document.createElement("td");
  if (chosen) line.className = "chosen";
  isolated.textContent = shown(text);
  rule.style.width = `${Math.max(1, 100 * p)}%`;
  share.textContent = percent(p);
  name.append(isolated);
  bar.append(rule);
  line.append(name, bar, share);
  return line;
}

function openTip(span, token) {
  const head = document.createElement("p"), table = document.createElement("table");
  head.textContent = words("inkTip", percent(token.p), number(token.logprob, 2));
  for (const other of token.others) table.append(row(other.text, Math.exp(other.logprob), other.text === token.name));
  if (!token.others.some((other) => other.text === token.name)) table.append(row(token.name, token.p, true));
  tip.replaceChildren(head, table);
  tip.hidden = false;
  const at = span.getClientRects()[0] || span.getBoundingClientRect(), box = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, at.left), innerWidth - box.width - 8);
  const top = at.top - box.height - 8 > 0 ? at.top - box.height - 6 : at.bottom + 6;
  tip.style.left = `${left}px`;
  tip.style.top = `${top}px`;
}

/** A text as coloured tokens, of the same form as `Flow`: one stop of the Tab key, arrow keys inside. */
export class Ink {
  constructor(box, voice) {
    this.box = box;
    this.voice = voice;
    this.spans = [];
    this.tokens = new WeakMap();
    this.at = -1;
    box.classList.add("ink");
    box.tabIndex = 0;
    box.setAttribute("role", "group");
    say(box, "inkText", [], "aria-label");
    box.addEventListener("pointerover", (event) => this.point(event.target));
    box.addEventListener("pointerleave", closeTip);
    box.addEventListener("click", (event) => this.point(event.target));
    box.addEventListener("keydown", (event) => this.key(event));
    box.addEventListener("focus", () => { if (box.matches(":focus-visible")) this.go(Math.max(0, this.at)); });
    box.addEventListener("blur", () => this.go(-1));
  }

  push(tokens) {
    for (const token of tokens) {
      if (!token.text) continue;
      if (!this.block || (this.held > BLOCK && this.broke)) {
        this.block = this.box.appendChild(document.createElement("div"));
        this.held = 0;
      }
      const span = document.createElement("span"), step = STEPS.findIndex((least) => token.p >= least);
      span.className = `wash${step < 0 ? STEPS.length : step}`;
      span.textContent = token.text;
      this.block.append(span);
      this.broke = token.text.endsWith("\n");
      this.held += 1;
      this.tokens.set(span, token);
      this.spans.push(span);
    }
  }

  end() {}

  point(span) {
    const token = this.tokens.get(span);
    if (token) openTip(span, token);
  }

  go(to) {
    this.spans[this.at]?.classList.remove("here");
    this.at = Math.min(to, this.spans.length - 1);
    const span = this.spans[this.at];
    if (!span) return closeTip();
    span.classList.add("here");
    span.scrollIntoView({ block: "nearest" });
    this.point(span);
    const token = this.tokens.get(span);
    const rest = token.others.filter((other) => other.text !== token.name).map((other) => `${shown(other.text)} ${percent(Math.exp(other.logprob))}`);
    this.voice.tell(words("inkSaid", shown(token.name), percent(token.p), rest.join(", ")));
  }

  key(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key];
    const end = { Home: 0, End: this.spans.length - 1 }[event.key];
    if (step === undefined && end === undefined) return;
    event.preventDefault();
    this.go(end ?? Math.max(0, this.at + step));
  }
}

/** The five washes with what they mean. */
export function legend() {
  const box = document.createElement("p"), title = document.createElement("span"), how = document.createElement("span");
  box.className = "legend";
  box.append(say(title, "legend"));
  [...STEPS, 0].forEach((least, i) => {
    const key = document.createElement("span");
    key.className = `wash${i}`;
    key.textContent = i < STEPS.length ? `≥ ${100 * least} %` : `< ${100 * STEPS[i - 1]} %`;
    box.append(key);
  });
  how.className = "how";
  box.append(say(how, "inkKeys"));
  return box;
}
