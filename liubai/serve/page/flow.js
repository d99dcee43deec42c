// Text that grows without slowing down, boxes that follow their end until the reader scrolls away, and a voice
// for those who listen.

const BLOCK = 1500;  // characters after which a line break begins a new block, so that the layout of the old ones stays

/** Plain text in a box, appended to and never rewritten. */
export class Flow {
  constructor(box) {
    this.box = box;
    this.last = null;
  }

  push(text) {
    if (!this.last) text = text.trimStart();
    while (text) {
      if (!this.last || (this.last.length > BLOCK && this.last.data.endsWith("\n"))) {
        const block = document.createElement("div");
        this.last = block.appendChild(document.createTextNode(""));
        this.box.append(block);
      }
      const room = Math.max(0, BLOCK - this.last.length);
      const cut = text.indexOf("\n", room) + 1 || text.length;
      this.last.appendData(text.slice(0, cut));
      text = text.slice(cut);
    }
  }

  end() {}
}

/** Keeps a scrolled box at its end while it grows. Scrolling up lets go, scrolling to the end takes hold again. */
export class Follow {
  constructor(box, changed = () => {}) {
    this.box = box;
    this.changed = changed;
    this.held = true;
    this.top = 0;
    box.addEventListener("scroll", () => {
      const top = box.scrollTop, end = box.scrollHeight - box.clientHeight - top < 8;
      const held = end || (this.held && top >= this.top - 1);
      this.top = top;
      if (held !== this.held) this.changed((this.held = held));
    }, { passive: true });
    new ResizeObserver(() => this.grown()).observe(box);
  }

  grown() {
    if (!this.held) return;
    this.box.scrollTop = this.box.scrollHeight;
    this.top = this.box.scrollTop;  // as far as it went
  }

  hold() {
    this.changed((this.held = true));
    this.grown();
  }
}

/** One run of work a frame, however often it is asked for. */
export class Frame {
  constructor(work) {
    this.work = work;
    this.asked = 0;
  }

  ask() {
    this.asked ||= requestAnimationFrame(() => this.now());
  }

  now() {
    cancelAnimationFrame(this.asked);
    this.asked = 0;
    this.work();
  }
}

/** A live region that is told whole sentences, and not more often than they can be listened to. */
export class Voice {
  constructor(region) {
    this.region = region;
    this.text = "";
    this.last = 0;
  }

  tell(text) {
    const line = document.createElement("p");
    line.textContent = text;
    this.region.append(line);
    while (this.region.childElementCount > 12) this.region.firstElementChild.remove();
  }

  push(text) {
    this.text += text;
    const now = performance.now();
    if (now - this.last < 3000) return;
    const sentence = /^[^]*(?:[.!?]\s|[。！？\n])/.exec(this.text);
    if (!sentence) return;
    this.last = now;
    this.tell(sentence[0]);
    this.text = this.text.slice(sentence[0].length);
  }

  end() {
    if (this.text.trim()) this.tell(this.text);
    this.text = "";
    this.last = 0;
  }
}

/** What a text would come to in tokens, roughly: until the server says it. */
export function roughTokens(text) {
  return (text.match(/\p{Script=Han}|[\p{L}\p{N}]{1,6}|[^\s\p{L}\p{N}]/gu) || []).length;
}

export const cut = (text, most) => (text.length > most ? text.slice(0, most - 1) + "…" : text);
