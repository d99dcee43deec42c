// What the reader chose, kept in this browser; and the key, kept in this tab.
const NAME = "liubai", KEY = "liubai-key";
export const KINDS = ["sample", "greedy", "vote", "best", "beam", "tree"];
export const ROUTES = ["none", "auto", "fast", "think", "tool"];
export const TOOLS = ["calculator", "python"];
export const MOST_PATHS = 16;

const between = (low, high, whole = true) => (value) =>
  typeof value === "number" && value >= low && value <= high && (!whole || Number.isInteger(value));
const oneOf = (...values) => (value) => values.includes(value);
const flag = (value) => typeof value === "boolean";
const orNothing = (fine) => (value) => value === null || fine(value);

/** Each setting with its first value and what it may be: storage may hold anything. */
const SETTINGS = {
  model: ["", (value) => typeof value === "string"],
  thinking: [true, flag],
  longer: [false, flag],
  atLeast: [null, orNothing(between(1, 1e6))],
  budget: [null, orNothing(between(1, 1e6))],
  maxTokens: [null, orNothing(between(1, 1e6))],
  temperature: [null, orNothing(between(0, 2, false))],
  kind: ["sample", oneOf(...KINDS)],
  n: [5, between(2, MOST_PATHS)],
  route: ["auto", oneOf(...ROUTES)],
  tools: [[], (value) => Array.isArray(value) && value.every((tool) => TOOLS.includes(tool))],
  ink: [false, flag],
  folded: [false, flag],
  options: [false, flag],
  theme: ["auto", oneOf("auto", "light", "dark")],
  language: [null, orNothing(oneOf("en", "zh"))],
};

function kept() {
  try {
    const found = JSON.parse(localStorage.getItem(NAME));
    return found && typeof found === "object" ? found : {};
  } catch {
    return {};
  }
}

const stored = kept();
export const settings = Object.fromEntries(
  Object.entries(SETTINGS).map(([name, [first, fine]]) => [name, fine(stored[name]) ? stored[name] : first]),
);

/** Keeps a value if it may be, and says what is kept. */
export function set(name, value) {
  if (SETTINGS[name][1](value)) settings[name] = value;
  try {
    localStorage.setItem(NAME, JSON.stringify(settings));
  } catch { /* storage is off or full: it holds until the page is left */ }
  return settings[name];
}

let key = "";
try { key = sessionStorage.getItem(KEY) || ""; } catch { /* off */ }
export const getKey = () => key;
export function setKey(value) {
  key = value;
  try { sessionStorage.setItem(KEY, value); } catch { /* off */ }
}
