// One question with its answer: what came over the wire, and how it is shown while it comes.
import { Flow, Follow, Frame, roughTokens } from "./flow.js";
import { Ink, legend, spaced, Tokens } from "./ink.js";
import { Markdown } from "./markdown.js";
import { Paths } from "./paths.js";
import { say, words } from "./words.js";

const TEMPLATE = document.getElementById("turn");
const text = (value) => (typeof value === "string" ? value : "");
const span = (name) => Object.assign(document.createElement("span"), { className: name });

function isolated(value) {
  return Object.assign(document.createElement("bdi"), { textContent: value });
}

/** One of the two texts of an answer: kept whole, with its tokens when they were asked for, and drawn as text or in ink. */
class Script {
  constructor(box, plain, voice) {
    Object.assign(this, { box, plain, voice, text: "", tokens: [], inTokens: 0, reader: new Tokens() });
    this.begin(false);
  }

  hear(piece, tokens) {
    this.text += piece;
    if (tokens.length) this.tokens.push(...spaced(this.reader.read(tokens), piece));
  }

  begin(inked) {
    const box = this.box.cloneNode(false);  // of the old drawing not even the listeners stay
    box.classList.remove("ink");
    for (const name of ["role", "aria-label", "tabindex"]) box.removeAttribute(name);
    this.box.replaceWith(box);
    this.box = box;
    this.inked = inked && this.tokens.length > 0;
    this.drawn = 0;
    this.pen = this.inked ? new Ink(box, this.voice) : new this.plain(box);
  }

  draw(inked, end) {
    if ((inked && this.tokens.length > 0) !== this.inked) this.begin(inked);
    const from = this.drawn, all = this.inked ? this.tokens : this.text;
    this.drawn = all.length;
    if (all.length > from) this.pen.push(all.slice(from));
    if (end) this.pen.end();
  }
}

const SILENT = ["beam", "tree"];  // what they wrote comes at their end

/** @param ask {question, seed, kind, n, routed, ink, folded}
 *  @param hooks {follow, voice, retry(answer), edit(answer), folded(bool), stop()} */
export class Answer {
  constructor(ask, hooks) {
    this.ask = ask;
    this.hooks = hooks;
    this.box = TEMPLATE.content.cloneNode(true).querySelector("article");
    for (const part of this.box.querySelectorAll("[data-part]")) this[part.dataset.part] = part;
    for (const part of this.box.querySelectorAll("[data-say]")) say(part, part.dataset.say);
    this.questionText.textContent = ask.question;
    this.ink = ask.ink;
    this.folded = ask.folded;
    this.reasoning = new Script(this.thoughtText, Flow, hooks.voice);
    this.content = new Script(this.contentText, Markdown, hooks.voice);
    this.frame = new Frame(() => this.draw(false));
    this.route.hidden = this.thought.hidden = this.tools.hidden = true;
    this.listen();
    this.begin();
  }

  listen() {
    say(this.thoughtBody, "thought", [], "aria-label");
    // "toggle" comes later than the change: what we did ourselves is told from the reader's doing by a click
    this.summary.addEventListener("click", () => {
      this.folded = this.thought.open;
      this.hooks.folded(this.folded);
    });
    this.thought.addEventListener("toggle", () => this.thoughtFollow.grown());
    this.thoughtFollow = new Follow(this.thoughtBody);
    this.copy.addEventListener("click", () => this.toClipboard(this.copy, "copy", this.content.text));
    this.copyAll.addEventListener("click", () => this.toClipboard(this.copyAll, "copyAll", this.whole()));
    this.retry.addEventListener("click", () => this.hooks.retry(this));
    this.edit.addEventListener("click", () => this.hooks.edit(this));
  }

  /** From nothing: also when a refused question is asked again. */
  begin() {
    this.state = "waiting";
    this.rough = 0;
    this.figures = {};
    this.summed = null;
    this.usage = null;
    this.finish = null;
    this.started = performance.now();
    this.thinkFrom = this.thinkTo = null;
    this.way = null;
    this.waited = 0;
    this.box.setAttribute("aria-busy", "true");
    this.note.hidden = this.acts.hidden = true;
    this.wait.hidden = false;
    this.waitTime.hidden = true;
    say(this.waitText, SILENT.includes(this.ask.kind) ? "searching" : "waiting");
    this.pathsBox.replaceChildren();
    this.pathsBox.hidden = true;
    this.paths = new Paths(this.pathsBox, this.ask.kind);
    this.several = ["vote", "best", "beam", "tree"].includes(this.ask.kind);
    if (!this.ask.routed) this.expectPaths();
    clearInterval(this.clock);
    this.clock = setInterval(() => {
      this.showWait();
      this.showThought();
    }, 200);
  }

  /** Places for the paths that will come: not before the router has said that no calculator answers. */
  expectPaths() {
    if (this.several && this.ask.kind !== "tree") this.paths.expect(this.ask.n);
  }

  get busy() { return this.state === "waiting" || this.state === "thinking" || this.state === "answering"; }

  hear(chunk) {
    const extra = chunk.liubai && typeof chunk.liubai === "object" ? chunk.liubai : {};
    if (extra.route) this.showRoute(extra.route);
    if (extra.path !== undefined) this.hearPath(extra);
    if (extra.thinking && typeof extra.thinking === "object") Object.assign(this.figures, extra.thinking);
    if (Array.isArray(extra.tools)) this.showTools(extra.tools);
    if (extra.paths && typeof extra.paths === "object") this.paths.settle((this.summed = extra.paths));
    if (chunk.usage) this.usage = chunk.usage;
    const choice = (Array.isArray(chunk.choices) ? chunk.choices : []).find((one) => (one.index ?? 0) === 0);
    if (choice) this.hearChoice(choice);
    this.frame.ask();
  }

  hearPath(piece) {
    this.paths.hear(piece);
    this.thinkFrom ??= performance.now();
    if (this.state === "waiting") this.enter("thinking");
  }

  hearChoice(choice) {
    const delta = choice.delta || {}, logprobs = choice.logprobs || {};
    const thought = text(delta.reasoning_content) || text(delta.reasoning), said = text(delta.content);
    const list = (name) => (Array.isArray(logprobs[name]) ? logprobs[name] : []);
    if (choice.finish_reason) this.finish = choice.finish_reason;
    if (thought) {
      this.reasoning.hear(thought, list("reasoning_content"));
      this.rough += roughTokens(thought);
      this.thinkFrom ??= performance.now();
      if (this.state === "waiting") this.enter("thinking");
      if (this.thought.hidden) {
        this.thought.hidden = false;
        this.thought.open = !this.folded && !this.several;  // several paths have already shown it
      }
    }
    if (!said) return;
    this.content.hear(said, list("content"));
    if (this.state !== "answering") {
      this.thinkTo = performance.now();
      this.enter("answering");
    }
    this.hooks.voice.push(said);
  }

  enter(state) {
    this.state = state;
    this.wait.hidden = true;
    this.hooks.voice.tell(words(state));
  }

  draw(end) {
    this.reasoning.draw(this.ink, end);
    this.content.draw(this.ink, end);
    this.paths.draw();
    if (this.thought.open) this.thoughtFollow.grown();
    this.showInk();
    this.hooks.follow.grown();
  }

  /** A sign of life while nothing comes. */
  showWait() {
    const seconds = Math.floor((performance.now() - this.started) / 1000);
    if (this.wait.hidden || seconds === this.waited) return;
    this.waited = seconds;
    say(this.waitTime, "elapsed", [seconds]);
    this.waitTime.hidden = false;
  }

  showThought() {
    if (this.thought.hidden) return;
    const writing = this.busy && this.state !== "answering";
    const here = (this.thinkTo ?? performance.now()) - this.thinkFrom;
    const parts = [say(span("what"), writing ? "thinking" : "thoughtDone")];
    parts.push(say(span("figure"), "seconds", [typeof this.figures.seconds === "number" ? this.figures.seconds : here / 1000]));
    const exact = this.figures.tokens ?? this.usage?.completion_tokens_details?.reasoning_tokens ?? (this.reasoning.tokens.length || null);
    parts.push(exact === null ? say(span("figure"), "about", [this.rough]) : say(span("figure"), "tokens", [exact]));
    if (this.figures.forced) parts.push(say(span("figure"), "forced"));
    this.thought.classList.toggle("writing", writing);
    const told = parts.map((part) => part.textContent).join();
    if (told === this.told) return;
    this.told = told;
    this.summaryText.replaceChildren(...parts);
  }

  showRoute(route) {
    if (this.way === null && route.way !== "tool") this.expectPaths();
    this.way = text(route.way);
    const way = document.createElement("b"), known = ["fast", "think", "tool"].includes(route.way);
    if (known) say(way, `way${route.way}`);
    else way.append(isolated(text(route.way)));
    this.route.replaceChildren(way, isolated(text(route.why)));
    this.route.hidden = false;
  }

  showTools(tools) {
    const rows = tools.filter((tool) => tool && typeof tool === "object").map((tool) => {
      const row = document.createElement("li"), name = document.createElement("b");
      if (["calculator", "python"].includes(tool.name)) say(name, `tool${tool.name}`);
      else name.append(isolated(text(tool.name)));
      const [put, got] = [tool.input, tool.output].map((value) => {
        const code = document.createElement("code");
        code.append(isolated(typeof value === "string" ? value : JSON.stringify(value ?? "")));
        return code;
      });
      row.append(name, put, Object.assign(span("gives"), { textContent: "→" }), got);
      return row;
    });
    this.toolList.replaceChildren(...rows);
    this.tools.hidden = !rows.length;
  }

  showInk() {
    if (!this.ink) return void (this.legend.hidden = true);
    const has = this.reasoning.tokens.length + this.content.tokens.length > 0;
    if (!has && this.busy) return;
    const state = has ? "has" : this.way === "tool" ? "inkTool" : "inkNone";
    this.legend.hidden = !has && (this.state === "failed" || !(this.content.text || this.reasoning.text));
    if (this.legend.dataset.state === state) return;
    this.legend.dataset.state = state;
    this.legend.replaceChildren(has ? legend() : this.inkless(state));
  }

  /** Why there are no probabilities; and that Retry would bring them, where it is there and would. */
  inkless(key) {
    const line = Object.assign(document.createElement("p"), { className: "legend" });
    line.append(say(span(""), key));
    if (key === "inkNone" && !this.ask.ink) line.append(say(span("only-last"), "inkRetry"));
    return line;
  }

  setInk(on) {
    this.ink = on;
    this.draw(!this.busy);
  }

  /** The end, in whatever way. `why`: null for a whole answer, "stopped", or a `Refusal`. */
  end(why) {
    clearInterval(this.clock);
    this.thinkTo ??= this.thinkFrom && performance.now();
    this.state = why === null || why === "stopped" ? "done" : "failed";
    this.box.setAttribute("aria-busy", "false");
    this.wait.hidden = true;
    this.paths.end();
    if (this.several && this.pathsBox.hidden) this.thought.open = !this.folded;  // one path, seen nowhere else
    this.frame.now();
    this.draw(true);
    this.showThought();
    this.hooks.voice.end();
    const key = why === "stopped" ? (this.began ? "stopped" : "stoppedEarly") : why ? why.kind : this.verdict();
    if (key) this.showNote(key, why?.detail, Boolean(why && why !== "stopped"));
    this.showFigures();
    this.acts.hidden = false;
    this.copy.hidden = !this.content.text;
    this.copyAll.hidden = !this.reasoning.text;
    this.retry.hidden = this.state === "failed";  // the note has it
    this.hooks.follow.grown();
  }

  get began() { return Boolean(this.content.text || this.reasoning.text || this.paths.began); }

  /** What is to be said of an answer that came to its own end, if anything. */
  verdict() {
    const said = this.content.text.trim(), thought = this.reasoning.text.trim();
    if (this.finish === "length") return said || !thought ? "cutOff" : "cutEarly";
    return said ? null : thought ? "onlyThought" : "emptyAnswer";
  }

  showNote(key, detail, failed, args = []) {
    const line = say(document.createElement("span"), key === "busy" ? "tooBusy" : key, args);
    this.note.replaceChildren(line);
    if (detail) this.note.append(" ", isolated(detail));
    this.note.classList.toggle("failed", failed);
    this.note.hidden = false;
    this.hooks.voice.tell(this.note.textContent);
    if (!failed || key === "refused") return;  // the same question would be refused again: Edit is below
    const again = this.button("again", () => this.hooks.retry(this));
    again.className = "only-last";
    this.note.append(again);
  }

  button(key, work) {
    const button = document.createElement("button");
    button.type = "button";
    button.addEventListener("click", work);
    return say(button, key);
  }

  /** Counts the seconds down until the next try; `signal` or the button ends it early. */
  countdown(seconds, signal) {
    return new Promise((done) => {
      const until = performance.now() + 1000 * seconds, line = document.createElement("span");
      let shown = null, timer = 0;
      const finish = () => {
        clearInterval(timer);
        signal.removeEventListener("abort", finish);
        this.note.hidden = true;
        done();
      };
      const show = () => {
        const left = Math.ceil((until - performance.now()) / 1000);
        if (left <= 0) return finish();
        if (left !== shown) say(line, "busy", [(shown = left)]);
      };
      this.wait.hidden = true;
      this.note.classList.remove("failed");
      this.note.replaceChildren(line, this.button("now", finish));
      this.note.hidden = false;
      this.hooks.voice.tell(words("busySaid", seconds));
      signal.addEventListener("abort", finish);
      show();
      timer = setInterval(show, 100);
      this.hooks.follow.grown();
    });
  }

  showFigures() {
    const parts = [], total = this.usage?.completion_tokens ?? this.summed?.tokens;
    const seconds = (performance.now() - this.started) / 1000;
    if (total > 0) {  // the calculator's answer has none, and no chance in it
      parts.push(say(span(""), "tokens", [total]));
      if (seconds > 0.05) parts.push(say(span(""), "speed", [total / seconds]));
    }
    if (total !== 0 && (this.content.text || this.reasoning.text)) parts.push(say(span(""), "seed", [this.ask.seed]));
    this.stats.replaceChildren(...parts);
  }

  whole() {
    return this.reasoning.text ? `<think>\n${this.reasoning.text.trim()}\n</think>\n\n${this.content.text}` : this.content.text;
  }

  async toClipboard(button, key, copied) {
    let fine = true;
    try {
      await navigator.clipboard.writeText(copied);
    } catch {
      fine = false;
    }
    const label = button.querySelector("span");
    say(label, fine ? "copied" : "copyFailed");
    this.hooks.voice.tell(label.textContent);
    setTimeout(() => say(label, key), 1600);
  }
}
