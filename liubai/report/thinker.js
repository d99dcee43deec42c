"use strict";
// A language model in a page: tokenizer, forward pass, sampling, and rules that tell right from wrong.
// Nothing here touches the document. Numbers between layers are float32, as in the engine; sums are doubles.
//
// Letters: V words, D hidden, F inner size, H query heads, K key/value heads, E head size, t the place of a token.

// ---- from JSON to numbers ----

function bytesOf(base64) {
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

// A matrix comes as 8-bit integers q with a scale s a row: W[r][c] = s[r] q[r][c]. A vector comes as it is.
function tensorOf({ shape, data, scale }) {
  const raw = bytesOf(data);
  if (scale === undefined) return new Float32Array(raw.buffer);
  const q = new Int8Array(raw.buffer), s = new Float32Array(bytesOf(scale).buffer);
  const [rows, columns] = shape, W = new Float32Array(rows * columns);
  for (let r = 0, i = 0; r < rows; r++) {
    for (const end = i + columns; i < end; i++) W[i] = s[r] * q[i];
  }
  return W;
}

// ---- words ----

// Blanks separate; then words, whole numbers, and numbers with the sign that says their role (=7, :28, ->35).
// Blank, digit and Han are Unicode's, as in the tokenizers library.
const BLANK = /\p{White_Space}+/u;
const PIECES =
  /<\/?[a-z]+>|<\|[a-z]+\|>|(?:->|=|:)(?:\p{Nd}+|big|far)|\p{Nd}+|\p{Script=Han}+|[A-Za-z]+|\P{White_Space}/gu;

class Reader {
  constructor({ words, unknown, ends, before, after }) {
    Object.assign(this, { words, unknown, before, after, ends: new Set(ends) });
    this.ids = new Map(words.map((word, id) => [word, id]));
  }

  pieces(text) {
    return text.split(BLANK).flatMap((part) => part.match(PIECES) ?? []);
  }

  encode(text) {
    return this.pieces(text).map((piece) => this.ids.get(piece) ?? this.unknown);
  }

  // The question in the template: what the model reads before it writes.
  prompt(question) {
    return this.encode(this.before + question + this.after);
  }

  // Words of the question that the model does not have, each once.
  unknownIn(question) {
    return [...new Set(this.pieces(question).filter((piece) => !this.ids.has(piece)))];
  }

  word(id) {
    return this.words[id] ?? "";
  }
}

// ---- the forward pass ----

// y = W x + b, with W [rows, columns] row by row.
function product(W, x, y, b) {
  const columns = x.length;
  for (let r = 0, i = 0; r < y.length; r++) {
    let sum = b ? b[r] : 0;
    for (let c = 0; c < columns; c++) sum += W[i++] * x[c];
    y[r] = sum;
  }
}

// y = x / √(mean(x²) + ε) · w: RMSNorm (Zhang & Sennrich 2019). x and y may be the same.
function normalise(x, w, epsilon, y) {
  let squares = 0;
  for (let i = 0; i < x.length; i++) squares += x[i] * x[i];
  const scale = 1 / Math.sqrt(squares / x.length + epsilon);
  for (let i = 0; i < x.length; i++) y[i] = x[i] * scale * w[i];
}

// One head's softmax(q·k_j / √E) over all places j ≤ t, written into row[at …].
function attend(q, keys, from, size, row, at) {
  let top = -Infinity, total = 0;
  for (let j = 0; j < keys.length; j++) {
    let score = 0;
    for (let e = 0; e < size; e++) score += q[e] * keys[j][from + e];
    row[at + j] = score / Math.sqrt(size);
    top = Math.max(top, row[at + j]);
  }
  for (let j = 0; j < keys.length; j++) total += row[at + j] = Math.exp(row[at + j] - top);
  for (let j = 0; j < keys.length; j++) row[at + j] /= total;
}

// A decoder: per layer x += O·attention(norm(x)), then x += Down·(silu(Gate·n) ⊙ Up·n) with n = norm(x).
// Llama; with biases of q, k, v it is Qwen2, with norms of q and k Qwen3. Which one it is, its tensors say.
class Mind {
  constructor(config, tensor) {
    const { hidden, inner, heads, kv_heads, head_size, vocabulary } = config;
    const floats = (n) => new Float32Array(n);
    this.config = config;
    this.embedding = tensor("embed_tokens.weight");
    this.head = tensor("lm_head.weight") ?? this.embedding; // tied where there is none
    this.norm = tensor("norm.weight");
    this.layers = Array.from({ length: config.layers }, (_, layer) => {
      const part = (name) => tensor(`layers.${layer}.${name}`);
      const own = (name) => part(`self_attn.${name}`), mlp = (name) => part(`mlp.${name}_proj.weight`);
      const projection = (name) => [own(`${name}_proj.weight`), own(`${name}_proj.bias`)];
      return {
        before: part("input_layernorm.weight"),
        after: part("post_attention_layernorm.weight"),
        q: projection("q"), k: projection("k"), v: projection("v"), o: own("o_proj.weight"),
        qNorm: own("q_norm.weight"), kNorm: own("k_norm.weight"),
        gate: mlp("gate"), up: mlp("up"), down: mlp("down"),
      };
    });
    this.x = floats(hidden), this.n = floats(hidden), this.y = floats(hidden);
    this.q = floats(heads * head_size), this.out = floats(heads * head_size);
    this.gate = floats(inner), this.up = floats(inner);
    this.logits = floats(vocabulary);
    this.kvSize = kv_heads * head_size;
    this.forget();
  }

  forget() {
    this.cache = this.layers.map(() => ({ keys: [], values: [] }));
    this.looks = []; // of every token that was read: [layer, head, place] weights, H·(t+1) a layer
  }

  // Reads one more token; gives the logits [V] of the next (overwritten by the next call).
  read(id) {
    const { hidden: D, heads: H, kv_heads: K, head_size: E, inner: F, epsilon, turns } = this.config;
    const { x, n, y, q, out, gate, up } = this, t = this.looks.length;
    const looks = new Float32Array(this.layers.length * H * (t + 1));
    // RoPE (Su et al. 2021): place t turns the pair (i, i + E/2) of each head by the angle t·turns[i]
    const cos = Float32Array.from(turns, (turn) => Math.cos(t * turn));
    const sin = Float32Array.from(turns, (turn) => Math.sin(t * turn));
    const rotated = (heads, norm) => {
      for (let at = 0; at < heads.length; at += E) {
        const head = heads.subarray(at, at + E);
        if (norm) normalise(head, norm, epsilon, head);
        for (let i = 0; i < E / 2; i++) {
          const a = head[i], b = head[i + E / 2];
          head[i] = a * cos[i] - b * sin[i];
          head[i + E / 2] = b * cos[i] + a * sin[i];
        }
      }
    };
    x.set(this.embedding.subarray(id * D, (id + 1) * D));
    this.layers.forEach((layer, l) => {
      const { keys, values } = this.cache[l];
      const k = new Float32Array(this.kvSize), v = new Float32Array(this.kvSize);
      normalise(x, layer.before, epsilon, n);
      product(layer.q[0], n, q, layer.q[1]);
      product(layer.k[0], n, k, layer.k[1]);
      product(layer.v[0], n, v, layer.v[1]);
      rotated(q, layer.qNorm), rotated(k, layer.kNorm);
      keys.push(k), values.push(v);
      out.fill(0);
      for (let h = 0; h < H; h++) {
        const from = Math.floor((h * K) / H) * E; // H/K query heads share a key/value head
        const at = (l * H + h) * (t + 1);
        attend(q.subarray(h * E, (h + 1) * E), keys, from, E, looks, at);
        for (let e = 0; e < E; e++) {
          let sum = 0;
          for (let j = 0; j <= t; j++) sum += looks[at + j] * values[j][from + e];
          out[h * E + e] = sum;
        }
      }
      product(layer.o, out, y);
      for (let i = 0; i < D; i++) x[i] += y[i];
      normalise(x, layer.after, epsilon, n);
      product(layer.gate, n, gate), product(layer.up, n, up);
      for (let i = 0; i < F; i++) gate[i] = (gate[i] / (1 + Math.exp(-gate[i]))) * up[i];
      product(layer.down, gate, y);
      for (let i = 0; i < D; i++) x[i] += y[i];
    });
    this.looks.push(looks);
    normalise(x, this.norm, epsilon, n);
    product(this.head, n, this.logits);
    return this.logits;
  }

  // Where token t looks: weights over places 0 … t of one head, or the mean of all those that `wanted` names.
  weights(t, wanted = () => true) {
    const { heads } = this.config, looks = this.looks[t], row = new Float32Array(t + 1);
    let count = 0;
    this.layers.forEach((_, layer) => {
      for (let head = 0; head < heads; head++) {
        if (!wanted(layer, head)) continue;
        const at = (layer * heads + head) * (t + 1);
        for (let j = 0; j <= t; j++) row[j] += looks[at + j];
        count++;
      }
    });
    return count ? row.map((weight) => weight / count) : row;
  }
}

// All models of a report, made when they are asked for; tensors that several share are decoded once.
function mindsOf({ models, readers, tensors }) {
  const decoded = new Map(), named = readers.map((reader) => new Reader(reader));
  const tensor = (key) => {
    if (key !== undefined && !decoded.has(key)) decoded.set(key, tensorOf(tensors[key]));
    return decoded.get(key);
  };
  return models.map(({ label, config, weights, reader }) => ({
    label,
    reader: named[reader],
    mind: new Mind(config, (name) => tensor(weights[name])),
  }));
}

// ---- the next token ----

// Uniform in [0, 1): splitmix64 (Steele et al. 2014) of seed and token index, the engine's own.
function chance(seed, index) {
  const cut = (z) => BigInt.asUintN(64, z);
  let z = cut(BigInt(seed) + BigInt(index + 1) * 0x9e3779b97f4a7c15n);
  z = cut((z ^ (z >> 30n)) * 0xbf58476d1ce4e5b9n);
  z = cut((z ^ (z >> 27n)) * 0x94d049bb133111ebn);
  return Number((z ^ (z >> 31n)) >> 11n) * 2 ** -53;
}

// The likeliest token; above temperature 0 the first whose cumulative probability exceeds `uniform`.
function choose(logits, temperature, uniform) {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
  if (temperature === 0) return best;
  const p = logits.map((z) => Math.exp(Math.fround(Math.fround(z - logits[best]) / temperature)));
  const total = p.reduce((sum, share) => sum + share, 0);
  const threshold = Math.min(uniform * total, total * (1 - 2 ** -52));
  let id = 0;
  for (let mass = p[0]; mass <= threshold && id < p.length - 1; mass += p[id]) id++;
  return id;
}

// One answer, a token at a time. `stop` is "" while it is being written, then "end" or "length".
class Answer {
  constructor({ mind, reader }, question, { most, temperature = 0, seed = 0 }) {
    Object.assign(this, { mind, reader, question, most, temperature, seed, ids: [], stop: "" });
    this.prompt = reader.prompt(question);
    mind.forget();
    for (const id of this.prompt) this.logits = mind.read(id);
  }

  write() {
    const uniform = this.temperature && chance(this.seed, this.ids.length);
    const id = choose(this.logits, this.temperature, uniform);
    this.ids.push(id);
    if (this.reader.ends.has(id)) this.stop = "end";
    else if (this.ids.length >= this.most) this.stop = "length";
    else this.logits = this.mind.read(id);
    return id;
  }

  // The turn as text, with what the template began; without the token that ends it.
  get text() {
    const said = this.stop === "end" ? this.ids.slice(0, -1) : this.ids;
    return [...this.reader.pieces(this.reader.after), ...said.map((id) => this.reader.word(id))].join(" ");
  }
}

// ---- right or wrong ----

// What stands between the last answer tags after the thought; null when the form leaves it unclear.
function answerIn(text) {
  const closed = text.lastIndexOf("</think>");
  if (text.lastIndexOf("<think>") > closed) return null;
  const said = closed < 0 ? text : text.slice(closed + "</think>".length);
  let open = -1, answer = null;
  for (const tag of said.matchAll(/<answer>|<\/answer>/g)) {
    if ((tag[0] === "<answer>") === (open >= 0)) return null; // one inside another, or one too many
    if (open < 0) open = tag.index + tag[0].length;
    else answer = said.slice(open, tag.index), open = -1;
  }
  return open < 0 && answer !== null && answer.trim() ? answer.trim() : null;
}

// "( 3 + 8 ) * 9": { top, under } as an exact fraction, and the numbers in it; null for anything else.
function expression(text) {
  const tokens = [], sign = { "×": "*", "÷": "/", "−": "-" };
  for (const [piece] of text.matchAll(/[0-9]+|[^ \t\n]/gu)) {
    if (!/^(?:0|[1-9][0-9]{0,8}|[-+*/()×÷−])$/u.test(piece)) return null;
    tokens.push(sign[piece] ?? piece);
  }
  if (text.length > 300) return null;
  const numbers = [];
  let at = 0;
  class Refused extends Error {}
  const total = (depth) => {
    let a = term(depth);
    while (tokens[at] === "+" || tokens[at] === "-") {
      const minus = tokens[at++] === "-" ? -1n : 1n, b = term(depth);
      a = { top: a.top * b.under + minus * b.top * a.under, under: a.under * b.under };
    }
    return a;
  };
  const term = (depth) => {
    let a = atom(depth);
    while (tokens[at] === "*" || tokens[at] === "/") {
      const over = tokens[at++] === "/", b = atom(depth);
      if (over && b.top === 0n) throw new Refused();
      a = over ? { top: a.top * b.under, under: a.under * b.top } : { top: a.top * b.top, under: a.under * b.under };
    }
    return a;
  };
  const atom = (depth) => {
    const token = tokens[at++];
    if (token === "(" && depth < 20) {
      const inside = total(depth + 1);
      if (tokens[at++] !== ")") throw new Refused();
      return inside;
    }
    if (token === undefined || !/^[0-9]/.test(token)) throw new Refused();
    numbers.push(Number(token));
    return { top: BigInt(token), under: 1n };
  };
  try {
    const value = total(0);
    return at === tokens.length ? { ...value, numbers } : null;
  } catch (error) {
    if (error instanceof Refused) return null;
    throw error;
  }
}

// Countdown: exactly these numbers, each once, make the target; a closing "= 35" may be there and must be right.
function makes(numbers, target, answer) {
  const [text, ...claims] = answer.split(/=(.*)/s).slice(0, 2);
  if (claims.length) {
    const claim = /^[ \t\n]*([-−]?)[ \t\n]*(0|[1-9][0-9]{0,8})[ \t\n]*$/.exec(claims[0]);
    if (!claim || Number(claim[2]) * (claim[1] ? -1 : 1) !== target) return false;
  }
  const found = expression(text), sorted = (list) => [...list].sort((a, b) => a - b).join(" ");
  return Boolean(found) && found.top === BigInt(target) * found.under && sorted(found.numbers) === sorted(numbers);
}

// The right number for the other questions that say it all by themselves, as text; null for all others.
function numberFor(question) {
  const sum = /^(?:total|求和)((?: \S+ \d{1,2})+)$/u.exec(question);
  if (sum) return String(sum[1].trim().split(" ").reduce((all, word, i) => all + (i % 2 ? Number(word) : 0), 0));
  const pair = /^(\d+\.\d+) (?:or|还是) (\d+\.\d+)$/u.exec(question);
  if (pair) return Number(pair[1]) === Number(pair[2]) ? null : pair[Number(pair[1]) > Number(pair[2]) ? 1 : 2];
  const line = /^(?:solve|解) (\d+) \* x ([-+]) (\d+) = (\d+)$/u.exec(question);
  if (!line) return null;
  const x = (Number(line[4]) - Number(line[2] + line[3])) / Number(line[1]);
  return Number.isInteger(x) && x >= 0 ? String(x) : null;
}

// true or false, or null where nothing here can tell. `examples` are problems whose gold is known.
function isRight(question, answer, examples = []) {
  const bare = question.trim().replace(/\p{White_Space}+/gu, " ");
  const aim = /^(?:make |凑 )?(\d{1,9}(?: \d{1,9})*) ?->(\d{1,9})$/u.exec(bare);
  if (aim) return answer !== null && makes(aim[1].split(" ").map(Number), Number(aim[2]), answer);
  const known = examples.find((example) => example.verifier === "number" && example.prompt === bare);
  const gold = known ? known.gold : numberFor(bare);
  if (gold === null) return null;
  const plain = /^-?\d+(?:\.\d+)?$/, said = (answer ?? "").replace(/(\d) ?\. ?(?=\d)/g, "$1.");
  return plain.test(gold) ? plain.test(said) && Number(said) === Number(gold) : null;
}
