// Several paths side by side: they grow at once, and then show how they were weighed and which one was chosen.
import { cut, Flow, Follow } from "./flow.js";
import { say } from "./words.js";

const make = (tag, name, ...children) => {
  const made = document.createElement(tag);
  if (name) made.className = name;
  made.append(...children);
  return made;
};
const isolated = (text) => make("bdi", "", text);
const text = (value) => (typeof value === "string" ? value : "");

class Path {
  constructor(index) {
    this.reasoning = this.content = "";
    this.drawn = { reasoning: 0, content: 0 };
    this.number = say(make("h3"), "path", [index + 1]);
    this.state = say(make("span", "state"), "pathWaiting");
    this.thought = make("div", "model thought-text");
    this.answer = make("div", "model answer-text");
    this.body = make("div", "body", this.thought, this.answer);
    this.body.tabIndex = 0;
    this.body.setAttribute("role", "group");
    say(this.body, "path", [index + 1], "aria-label");
    this.figures = make("p", "figures");
    this.box = make("li", "path", make("header", "", this.number, this.state), this.body, this.figures);
    this.flows = { reasoning: new Flow(this.thought), content: new Flow(this.answer) };
    this.follow = new Follow(this.body);
  }

  get began() { return Boolean(this.reasoning || this.content); }

  hear(piece) {
    this.reasoning += text(piece.reasoning);
    this.content += text(piece.content);
    say(this.state, this.content ? "pathAnswering" : "pathThinking");
  }

  draw() {
    for (const part of ["reasoning", "content"]) {
      if (this[part].length === this.drawn[part]) continue;
      this.flows[part].push(this[part].slice(this.drawn[part]));
      this.drawn[part] = this[part].length;
    }
    this.follow.grown();
  }

  /** What the server sums up at the end; text that was not streamed (beams) is in it. */
  settle(path, chosen, kind) {
    for (const part of ["reasoning", "content"]) {
      if (text(path[part]) && !this[part]) this[part] = path[part];
    }
    this.draw();
    this.box.classList.toggle("chosen", chosen);
    say(this.state, chosen ? "chosen" : path.finish_reason === "length" ? "pathCut" : "pathDone");
    const answer = text(path.answer).trim();
    const figures = [answer ? make("b", "", isolated(cut(answer, 80))) : say(make("span"), "noAnswer")];
    if (typeof path.votes === "number" && kind === "tree") figures.push(say(make("span"), "visits", [path.votes]));
    else if (path.votes > 0) figures.push(say(make("span"), "agrees", [path.votes - 1]));  // the votes stand at the answers
    if (typeof path.score === "number") figures.push(say(make("span"), "score", [path.score]));
    if (typeof path.tokens === "number") figures.push(say(make("span"), "tokens", [path.tokens]));
    this.figures.replaceChildren(...figures);
  }
}

export class Paths {
  constructor(section, kind) {
    this.section = section;
    this.kind = kind;
    this.paths = new Map();
    this.settled = false;
    this.title = make("h3", "title");
    this.tally = make("ul", "tally");
    this.list = make("ul", "lanes");
    section.append(this.title, this.list, this.tally);
  }

  expect(n) {
    for (let i = 0; i < n; i += 1) this.at(i);
  }

  get began() { return [...this.paths.values()].some((path) => path.began); }

  at(index) {
    let path = this.paths.get(index);
    if (!path) {
      path = new Path(index);
      this.paths.set(index, path);
      this.list.append(path.box);
      this.section.hidden = false;
      this.entitle();
    }
    return path;
  }

  entitle() {
    const known = ["vote", "best", "beam", "tree", "sample", "greedy"].includes(this.kind);
    const parts = [say(make("span"), "pathsTitle", [this.paths.size])];
    if (known) parts.push(say(make("span", "by"), `by${this.kind}`));
    this.title.replaceChildren(...parts);
  }

  hear(piece) {
    if (Number.isInteger(piece.path) && piece.path >= 0 && piece.path < 256) this.at(piece.path).hear(piece);
  }

  draw() {
    for (const path of this.paths.values()) path.draw();
  }

  settle(summary) {
    const list = (Array.isArray(summary.list) ? summary.list : []).filter((path) => path && Number.isInteger(path.index));
    if (!list.length) return;
    this.settled = true;
    if (list.length === 1) return this.keep(() => false);  // there is nothing to compare it with
    this.kind = summary.kind;
    for (const path of list) this.at(path.index).settle(path, path.index === summary.chosen, this.kind);
    this.keep((index) => list.some((settled) => settled.index === index));
    if (this.kind === "vote") this.count(list, summary.chosen);
    this.showChosen(this.paths.get(summary.chosen));
  }

  /** No more comes. What was not summed up is cut off where it is, and what never began goes. */
  end() {
    if (this.settled) return;
    this.kind = null;  // nobody chose
    this.keep((index, path) => path.began);
    for (const path of this.paths.values()) say(path.state, "pathCut");
  }

  keep(stays) {
    for (const [index, path] of this.paths) {
      if (stays(index, path)) continue;
      path.box.remove();
      this.paths.delete(index);
    }
    this.section.hidden = !this.paths.size;
    this.entitle();
  }

  /** On a narrow screen the paths are swiped, and the chosen one may be out of sight. */
  showChosen(path) {
    if (!path) return;
    const left = path.box.getBoundingClientRect().left - this.list.getBoundingClientRect().left;
    this.list.scrollLeft += left - parseFloat(getComputedStyle(this.list).paddingLeft);
  }

  /** One mark a vote, most votes first; the marks are a picture of the numbers beside them. */
  count(list, chosen) {
    const groups = new Map();
    for (const path of list) {
      const answer = text(path.answer).trim();
      const group = groups.get(answer) || { size: 0, won: false };
      group.size = typeof path.votes === "number" ? path.votes : group.size + 1;  // the server knows 0.5 and 1/2 as one
      group.won ||= path.index === chosen;
      groups.set(answer, group);
    }
    const sorted = [...groups].sort((a, b) => b[1].won - a[1].won || b[1].size - a[1].size);
    this.tally.replaceChildren(...sorted.map(([answer, group]) => {
      const name = answer ? isolated(cut(answer, 60)) : say(make("span"), "noAnswer");
      const marks = make("span", "marks", ...list.map((_, i) => make("i", i < group.size ? "on" : "")));
      marks.setAttribute("aria-hidden", "true");
      return make("li", group.won ? "won" : "", make("b", "", name), marks, say(make("span"), "votes", [group.size, list.length]));
    }));
    say(this.tally, "tally", [], "aria-label");
  }
}
