// The page around the models of thinker.js: a question, a column a model, and where each token looks.
// Text of readers and models enters the document by textContent alone.

const PATIENCE = 12; // milliseconds of a frame in which tokens are written
const RECALLED = new Set(["wait", "等等"]); // second thoughts, as elsewhere in this report

function made(tag, name, text = "") {
  const element = document.createElement(tag);
  element.className = name, element.textContent = text;
  return element;
}

// One model: its answer so far, a token an element, and the shade of what one of them looks at.
class Column {
  constructor(model, place, size) {
    this.model = model;
    this.element = made("article", "answer");
    this.list = made("div", "text");
    this.list.id = `mind-${place}`;
    this.list.tabIndex = 0;
    for (const [name, value] of [["role", "listbox"], ["aria-orientation", "horizontal"]]) this.list.setAttribute(name, value);
    this.list.setAttribute("aria-label", `what ${model.label} reads and writes, token by token`);
    const title = made("h3", "", model.label);
    title.append(" ", made("small", "", size));
    this.verdict = made("p", "verdict"), this.looking = made("p", "looking"), this.count = made("p", "count");
    const state = made("div", "state");
    state.append(this.verdict, this.count);
    this.element.append(title, state, this.list, this.looking);
    this.clear();
  }

  clear() {
    this.list.replaceChildren();
    this.tokens = [], this.pointed = null, this.group = null, this.answer = null;
    this.element.classList.remove("right", "wrong");
    this.verdict.replaceChildren(made("span", "none", "waits for a problem"));
    this.looking.textContent = this.count.textContent = "";
    this.list.removeAttribute("aria-activedescendant");
  }

  ask(question, options) {
    this.clear();
    this.answer = new Answer(this.model, question, options);
    this.part("question");
    this.answer.prompt.forEach((id) => this.show(id));
    this.state(this.group.dataset.part === "thought" ? "thinks …" : "writes …");
  }

  part(name) {
    const part = made("div", "part");
    part.dataset.part = name;
    part.setAttribute("role", "group"), part.setAttribute("aria-label", name);
    const label = made("small", "", name);
    label.setAttribute("aria-hidden", "true");
    part.append(label);
    this.list.append(part);
    this.group = part;
  }

  show(id) {
    const word = this.model.reader.word(id), special = /^<\|.*\|>$/.test(word);
    if (word === "<think>" && this.group.dataset.part === "question") this.part("thought");
    const token = made("span", "token", special ? "·" : word);
    if (special) token.title = word;
    if (/^<.*>$/.test(word)) token.classList.add("tag");
    if (RECALLED.has(word)) token.classList.add("again");
    token.setAttribute("role", "option"), token.setAttribute("aria-selected", "false");
    token.id = `${this.list.id}-${this.tokens.length}`;
    token.dataset.place = this.tokens.length;
    this.group.append(token, " ");
    this.tokens.push(token);
    if (word === "</think>") this.part("answer");
  }

  // One token more. The text follows what is written, unless the reader has scrolled back.
  step(examples) {
    const { list } = this, below = list.scrollHeight - list.scrollTop - list.clientHeight < 30;
    if (this.tokens.length === this.answer.prompt.length && this.group.dataset.part === "question") this.part("answer");
    this.show(this.answer.write());
    this.state(this.group.dataset.part === "answer" ? "answers …" : this.verdict.textContent);
    if (!this.busy) this.finish(examples);
    if (below) list.scrollTop = list.scrollHeight;
  }

  state(text) {
    if (this.verdict.textContent !== text) this.verdict.textContent = text;
    const n = this.answer.ids.length;
    this.count.textContent = `${n} token${n === 1 ? "" : "s"}`;
  }

  get busy() {
    return Boolean(this.answer) && !this.answer.stop;
  }

  // What came out; the sentence is for the voice.
  finish(examples) {
    if (this.busy) this.answer.stop = "halted";
    const ended = this.answer.stop === "end", said = ended ? answerIn(this.answer.text) : null;
    const right = ended ? isRight(this.answer.question, said, examples) : null;
    const short = { halted: "stopped", length: "cut off" }[this.answer.stop];
    const mark = short ?? (right === null ? "answer" : right ? "✓ right" : "✗ wrong");
    this.state("");
    if (right !== null) this.element.classList.add(right ? "right" : "wrong");
    this.verdict.replaceChildren(made("b", "", mark));
    if (!short) this.verdict.append(said === null ? "no answer" : made("code", "", said));
    this.said = `${this.model.label}: ${mark.replace(/^\W /u, "")}${short ? "" : `, ${said ?? "no answer"}`}, ${this.count.textContent}.`;
  }

  // Shades what token `pointed`, or the newest that was read, looks at.
  shade(wanted) {
    const read = this.answer ? this.answer.mind.looks.length : 0;
    const at = this.pointed ?? read - 1, known = wanted && at >= 0 && at < read;
    const row = known ? this.answer.mind.weights(at, wanted) : [];
    this.tokens.forEach((token, place) => {
      const weight = row[place];
      if (weight >= 0.004) token.style.setProperty("--weight", Math.sqrt(weight).toFixed(3));
      else token.style.removeProperty("--weight");
      token.classList.toggle("looks", Boolean(wanted) && place === at);
      token.setAttribute("aria-selected", String(place === this.pointed));
    });
    this.looking.textContent = this.told(row, at, known, Boolean(wanted));
    const pointed = this.tokens[this.pointed];
    if (pointed) this.list.setAttribute("aria-activedescendant", pointed.id);
    else this.list.removeAttribute("aria-activedescendant");
    if (pointed) pointed.setAttribute("aria-label", this.looking.textContent || pointed.textContent);
  }

  told(row, at, known, shown) {
    if (!shown || !this.tokens[at]) return "";
    const word = (place) => `“${this.tokens[place].textContent}”`;
    if (!known) return `${word(at)} was written last and not read any more.`;
    const most = [...row.keys()].sort((a, b) => row[b] - row[a]).slice(0, 3).filter((place) => row[place] >= 0.01);
    return `${word(at)} looks at ${most.map((place) => `${word(place)} ${Math.round(100 * row[place])}\u00a0%`).join(", ")}`;
  }

  point(place) {
    this.pointed = place === null ? null : Math.max(0, Math.min(this.tokens.length - 1, place));
    this.tokens[this.pointed]?.scrollIntoView({ block: "nearest" });
  }
}

function bring(root) {
  const data = JSON.parse(root.querySelector('script[type="application/json"]').textContent);
  const part = (name) => root.querySelector(`.${name}`);
  const form = part("ask"), input = part("question"), trouble = part("trouble"), halt = part("halt");
  const speed = part("speed"), draw = part("draw"), seed = part("seed"), view = part("view"), voice = part("voice");
  let columns = null, running = 0, credit = 0, before = 0;

  // Where to look: "all", "none", "2" (a layer) or "2.1" (a head), counted from 0.
  const wanted = () => {
    if (view.value === "none") return null;
    const [layer, head] = view.value === "all" ? [] : view.value.split(".").map(Number);
    return (l, h) => (layer === undefined || l === layer) && (head === undefined || h === head);
  };
  const shade = (some = columns ?? []) => some.forEach((column) => column.shade(wanted()));

  const settle = () => {
    cancelAnimationFrame(running);
    running = 0, halt.disabled = true;
    columns.filter((column) => column.busy).forEach((column) => column.finish(data.examples));
    voice.textContent = columns.map((column) => column.said).join(" ");
    shade();
  };

  const frame = (now) => {
    const rate = Number(speed.value);
    // a frame may bear an earlier time than the click that asked for it
    credit = rate === Infinity ? Infinity : Math.min(credit + (rate * Math.max(0, now - before)) / 1000, 8);
    before = now;
    const busy = () => columns.filter((column) => column.busy);
    const written = new Set(), late = () => performance.now() - now > PATIENCE;
    for (; credit >= 1 && busy().length; credit--) {
      for (const column of busy()) column.step(data.examples), written.add(column);
      if (late()) break;
    }
    shade([...written]);
    if (busy().length) running = requestAnimationFrame(frame);
    else settle();
  };

  const worry = (text) => {
    trouble.textContent = text;
    input.setAttribute("aria-invalid", String(Boolean(text)));
  };

  const begin = () => {
    if (running) cancelAnimationFrame(running), running = 0;
    const question = input.value.trim();
    columns?.forEach((column) => column.clear());
    voice.textContent = "";
    worry("");
    if (!question) return worry("Type a problem first, or take an example."), input.focus();
    const strange = new Set(), temperature = Number(draw.value);
    for (const column of columns) {
      const { reader, mind } = column.model;
      reader.unknownIn(question).forEach((word) => strange.add(word));
      const most = Math.min(data.max_tokens, mind.config.positions - reader.prompt(question).length);
      if (most < 1) return worry(`That is longer than ${column.model.label} can read.`), input.focus();
      column.options = { most, temperature, seed: /^\d{1,18}$/.test(seed.value) ? seed.value : "0" };
    }
    if (strange.size) {
      const words = [...strange].slice(0, 8).map((word) => `“${word}”`).join(", ");
      worry(`${words}: the models have no such word${strange.size > 1 ? "s" : ""}, and read <|unknown|>.`);
    }
    columns.forEach((column) => column.ask(question, column.options));
    halt.disabled = false;
    credit = 1, before = performance.now();
    shade();
    running = requestAnimationFrame(frame);
  };

  const start = () => {
    if (!columns) {
      columns = mindsOf(data).map((model, i) => new Column(model, `${root.id}-${i}`, data.models[i].size));
      part("minds").replaceChildren(...columns.map((column) => column.element));
      columns.forEach(listen);
    }
    begin();
  };

  const listen = (column) => {
    const move = (place) => (column.point(place), shade([column]));
    const over = (event) => event.target.closest(".token")?.dataset.place;
    column.list.addEventListener("pointerover", (event) => {
      const place = over(event);
      if (place !== undefined) column.pointed = Number(place), shade([column]);
    });
    column.list.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && move(null));
    column.list.addEventListener("keydown", (event) => {
      const last = column.tokens.length - 1, at = column.pointed ?? last + (event.key === "ArrowRight" ? 0 : 1);
      const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: last, Escape: null }[event.key];
      if (to === undefined || last < 0) return;
      event.preventDefault();
      move(to);
    });
    column.list.addEventListener("blur", () => move(null));
  };

  const { layers, heads } = data.models.reduce(
    (most, { config }) => ({ layers: Math.max(most.layers, config.layers), heads: Math.max(most.heads, config.heads) }),
    { layers: 0, heads: 0 },
  );
  for (let layer = 0; layer < layers; layer++) {
    const group = document.createElement("optgroup");
    group.label = `layer ${layer + 1}`;
    group.append(new Option(`layer ${layer + 1}, mean`, `${layer}`));
    for (let head = 0; head < heads; head++) group.append(new Option(`head ${layer + 1}.${head + 1}`, `${layer}.${head}`));
    view.append(group);
  }
  for (const example of data.examples) {
    const button = made("button", "", example.prompt);
    button.type = "button", button.lang = example.language;
    button.addEventListener("click", () => ((input.value = example.prompt), start()));
    part("pick").append(button);
  }
  input.value = data.examples[0]?.prompt ?? "";
  form.addEventListener("submit", (event) => (event.preventDefault(), start()));
  halt.addEventListener("click", () => running && settle());
  view.addEventListener("change", () => shade());
  draw.addEventListener("change", () => (seed.disabled = draw.value === "0"));
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) speed.value = "Infinity";
  part("off").hidden = true, part("on").hidden = false;
}

document.querySelectorAll(".thinker").forEach(bring);
