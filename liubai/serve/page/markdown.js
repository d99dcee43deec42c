// A small Markdown, built of nodes: a model's text never becomes HTML. Paragraphs, headings, lists, quotes, code,
// bold and italic; links and images stay the text that they are, and so does mathematics.

// Lengths are bounded so that no text takes long. Mathematics is matched first to be left alone.
const INLINE = new RegExp([
  /\$\$[^$]{1,2000}\$\$|\$[^$\n]{1,400}\$|\\\([^\n]{1,400}?\\\)|\\\[[^]{1,2000}?\\\]/.source,
  /(?<ticks>`{1,3})(?<code>[^\n]{1,800}?)\k<ticks>(?!`)/.source,
  /\*\*(?=\S)(?<bold>[^\n]{1,800}?)(?<=\S)\*\*/.source,
  /(?<![\w*])\*(?=[^\s*])(?<italic>[^*\n]{1,400}?)(?<=\S)\*(?![\w*])/.source,
].join("|"), "gu");

const ITEM = /^ {0,8}(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;

function node(tag, ...children) {
  const made = document.createElement(tag);
  made.append(...children);
  return made;
}

/** Nodes of one run of text. */
export function inline(text) {
  const nodes = [];
  let from = 0;
  for (const match of text.matchAll(INLINE)) {
    const { code, bold, italic } = match.groups;
    if (code === undefined && bold === undefined && italic === undefined) continue;
    if (match.index > from) nodes.push(text.slice(from, match.index));
    if (code !== undefined) nodes.push(node("bdi", node("code", code)));
    else if (bold !== undefined) nodes.push(node("strong", ...inline(bold)));
    else nodes.push(node("em", ...inline(italic)));
    from = match.index + match[0].length;
  }
  if (from < text.length) nodes.push(text.slice(from));
  return nodes;
}

function block(tag, ...children) {
  const made = node(tag, ...children);
  made.dir = "auto";
  return made;
}

/** The blocks of `text` as [node, offset where it begins]. The last one may not be finished. */
function blocks(text) {
  const lines = text.split("\n"), found = [];
  let offset = 0, i = 0;
  const next = () => { offset += lines[i].length + 1; i += 1; };
  const opens = (line) => ITEM.test(line) || FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || RULE.test(line);
  while (i < lines.length) {
    const line = lines[i], begin = offset;
    let match;
    if (!line.trim()) {
      next();
    } else if ((match = FENCE.exec(line))) {
      const fence = match[1], code = [];
      next();
      while (i < lines.length && !(lines[i].trim().startsWith(fence) && !lines[i].trim().replaceAll(fence[0], ""))) {
        code.push(lines[i]);
        next();
      }
      if (i < lines.length) next();
      const pre = node("pre", node("code", code.join("\n")));
      pre.tabIndex = 0;  // a wide one is scrolled by the keyboard too
      found.push([pre, begin]);
    } else if ((match = HEADING.exec(line))) {
      next();
      found.push([block(match[1].length < 3 ? "h3" : "h4", ...inline(match[2])), begin]);
    } else if (RULE.test(line)) {
      next();
      found.push([node("hr"), begin]);
    } else if ((match = ITEM.exec(line))) {
      const list = node(match[1] ? "ol" : "ul"), ordered = Boolean(match[1]);
      if (ordered) list.start = Number(match[1]);
      let item = null;
      while (i < lines.length) {
        const here = ITEM.exec(lines[i]);
        const blank = !lines[i].trim();
        if (here && Boolean(here[1]) !== ordered) break;
        if (here) list.append((item = block("li", ...inline(here[2]))));
        else if (blank && !ITEM.test(lines.slice(i).find((l) => l.trim()) || "")) break;
        else if (!blank && (opens(lines[i]) || !/^\s/.test(lines[i]))) break;
        else if (!blank) item.append("\n", ...inline(lines[i].trim()));
        next();
      }
      found.push([list, begin]);
    } else if (QUOTE.test(line)) {
      const said = [];
      while (i < lines.length && QUOTE.test(lines[i])) {
        said.push(QUOTE.exec(lines[i])[1]);
        next();
      }
      found.push([block("blockquote", ...inline(said.join("\n"))), begin]);
    } else {
      const said = [];
      do {
        said.push(lines[i]);
        next();
      } while (i < lines.length && lines[i].trim() && !opens(lines[i]));
      found.push([block("p", ...inline(said.join("\n"))), begin]);
    }
  }
  return found;
}

/** Draws a text that grows. Finished blocks are never touched again; the open one is drawn anew, and less often
 *  the longer that takes. */
export class Markdown {
  constructor(box) {
    this.box = box;
    this.text = "";
    this.open = [];
    this.cost = this.last = 0;
  }

  push(text) {
    this.text += text;
    if (performance.now() - this.last > 15 * this.cost) this.draw();
  }

  end() {
    this.draw();
  }

  draw() {
    const begin = performance.now();
    for (const old of this.open) old.remove();
    const found = blocks(this.text);
    this.box.append(...found.map(([made]) => made));
    this.open = found.slice(-1).map(([made]) => made);
    if (found.length) this.text = this.text.slice(found.at(-1)[1]);
    this.last = performance.now();
    this.cost = this.last - begin;
  }
}
