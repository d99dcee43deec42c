// The page: the composer with its settings, the conversation, and who does what when a question is asked.
import { Answer } from "./answer.js";
import { Follow, Voice } from "./flow.js";
import { closeTip, tipOpen } from "./ink.js";
import { getKey, MOST_PATHS, set, setKey, settings, TOOLS } from "./settings.js";
import { ask, listModels, Refusal, sendable } from "./wire.js";
import { language, say, sayAll, setLanguage, words } from "./words.js";

const $ = (id) => document.getElementById(id);
const SEVERAL = ["vote", "best", "beam", "tree"];
const TRIES = 5;  // while the server is busy

const talk = $("talk"), turns = $("turns"), question = $("question"), voice = new Voice($("voice"));
const follow = new Follow(talk, (held) => { $("to-end").hidden = held; });
let models = [], answers = [], running = null, pending = null;

// ---- what is sent

const model = () => models.find((one) => one.id === $("model").value);
const able = (name, all) => {
  const said = model()?.liubai?.[name];
  return Array.isArray(said) ? all.filter((one) => said.includes(one)) : all;
};

/** The conversation as the server is sent it: without the thoughts, and without questions that got no answer. */
function messages(asked) {
  const told = answers.filter((one) => one.content.text && !one.busy);
  const list = told.flatMap((one) => [
    { role: "user", content: one.ask.question },
    { role: "assistant", content: one.content.text },
  ]);
  return [...list, { role: "user", content: asked }];
}

/** At least so many thought tokens when thinking longer and none were named: a quarter of what fits, 512 at most. */
function least() {
  const fits = model()?.liubai?.max_length;
  return settings.atLeast ?? (typeof fits === "number" ? Math.max(1, Math.min(512, Math.floor(fits / 4))) : 512);
}

/** The way that is asked for: "none" where the switch alone decides, as it does on a server without a router. */
const way = () => able("routes", [settings.route])[0] ?? "none";

/** Whether it will think, as the switch shows it: "true", "false", or "mixed" where the router decides. */
function thought() {
  if (model()?.liubai?.thinking === false) return "false";
  return { none: String(settings.thinking), fast: "false", think: "true" }[way()] ?? "mixed";
}

function body(asked, seed) {
  const kind = able("paths", [settings.kind])[0], route = way();
  const made = { model: $("model").value, messages: messages(asked), stream: true, stream_options: { include_usage: true }, seed };
  if (route !== "none") made.route = route;
  else if (model()?.liubai?.thinking !== false) made.thinking = settings.thinking;
  if (thought() !== "false") {
    if (settings.budget) made.thinking_budget = settings.budget;
    if (settings.longer) made.think_at_least = settings.budget ? Math.min(least(), settings.budget) : least();
  }
  if (SEVERAL.includes(kind)) made.paths = { kind, [kind === "beam" ? "width" : "n"]: settings.n };
  else if (kind === "greedy") made.paths = { kind };
  const tools = able("tools", settings.tools);
  if (tools.length) made.use_tools = tools;
  if (settings.ink) Object.assign(made, { logprobs: true, top_logprobs: 5 });
  if (settings.temperature !== null) made.temperature = settings.temperature;
  if (settings.maxTokens) made.max_tokens = settings.maxTokens;
  return made;
}

// ---- asking

const newSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;

async function send(asked) {
  const seed = newSeed(), made = body(asked, seed);
  const answer = new Answer(
    { question: asked, seed, kind: made.paths?.kind ?? "sample", n: settings.n, routed: Boolean(made.route), ink: settings.ink, folded: settings.folded },
    { follow, voice, retry, edit, folded: (folded) => set("folded", folded) },
  );
  answers.at(-1)?.box.classList.remove("last");
  answer.box.classList.add("last");
  answers.push(answer);
  turns.append(answer.box);
  $("hero").hidden = true;
  follow.hold();
  const mine = running = new AbortController();
  show();
  voice.tell(answer.waitText.textContent);
  const why = await tries(answer, made, mine.signal);
  answer.end(why);
  if (running !== mine) return;  // a new chat was begun
  running = null;
  if (why?.kind === "key") wantKey(answer);
  show();
}

/** The answer, over and over while the server is busy; what stood in its way, or null. */
async function tries(answer, made, signal) {
  for (let again = 1; ; again += 1) {
    try {
      await ask(made, getKey(), signal, (chunk) => answer.hear(chunk));
      return null;
    } catch (error) {
      if (signal.aborted) return "stopped";
      if (!(error instanceof Refusal)) throw error;
      if (error.kind !== "busy" || again === TRIES) return error;
      await answer.countdown(error.after, signal);
      if (signal.aborted) return "stopped";
      answer.begin();
    }
  }
}

function stop() {
  running?.abort();
  question.focus();
}

/** Takes the last answer away, and gives its question. */
function takeBack(answer) {
  if (running || answer !== answers.at(-1)) return null;
  answers.pop();
  answer.box.remove();
  answers.at(-1)?.box.classList.add("last");
  return answer.ask.question;
}

function retry(answer) {
  if (!mended()) return;
  const asked = takeBack(answer);
  if (asked === null) return;
  question.focus();
  send(asked);
}

function edit(answer) {
  const asked = takeBack(answer);
  if (asked === null) return;
  question.value = asked;
  $("hero").hidden = answers.length > 0;
  show();
  question.focus();
}

function newChat() {
  running?.abort();
  running = null;
  answers = [];
  turns.replaceChildren();
  $("hero").hidden = false;
  closeTip();
  follow.hold();
  show();
  question.focus();
}

// ---- the key and the models

function wantKey(answer) {
  pending = answer;
  say($("key-why"), !getKey() ? "keyAsk" : sendable(getKey()) ? "keyWrong" : "keySigns");
  $("key-form").hidden = false;
  show();
  $("key").focus();
}

async function loadModels() {
  $("trouble").hidden = true;
  try {
    models = await listModels(getKey());
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    if (error.kind === "key") return wantKey(pending);
    say($("trouble-what"), error.kind === "busy" ? "tooBusy" : error.kind);
    $("trouble").hidden = false;
    return;
  }
  const options = models.map((one) => new Option(one.id, one.id));
  $("model").replaceChildren(...(options.length ? options : [say(new Option("", ""), "noModel")]));
  if (models.some((one) => one.id === settings.model)) $("model").value = settings.model;
  $("key-form").hidden = true;
  show();
  const again = pending;
  pending = null;
  if (again && again === answers.at(-1)) retry(again);
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("key").value.trim());
  $("key").value = "";
  question.focus();
  loadModels();
});
$("trouble-again").addEventListener("click", loadModels);

// ---- the composer

const numbers = [...document.querySelectorAll("[data-number]")];

/** Whether a field has a number that may be sent, or nothing; else what it takes is said below it. */
function checked(field) {
  const fine = field.checkValidity();
  field.setAttribute("aria-invalid", String(!fine));
  $(`wrong-${field.dataset.number}`).hidden = fine;
  return fine;
}

/** Nothing is sent while a number is wrong: the reader is led there. */
function mended() {
  const wrong = numbers.filter((field) => !checked(field));
  if (!wrong.length) return true;
  set("options", true);
  show();
  wrong[0].focus();
  return false;
}

function choices(select, offered) {
  for (const option of select.options) option.hidden = option.disabled = !offered.includes(option.value);
}

/** Everything that depends on the settings, the model, and whether an answer is being written. */
function show() {
  const kinds = able("paths", ["sample", "greedy", ...SEVERAL]), routes = ["none", ...able("routes", ["auto", "fast", "think", "tool"])];
  const offered = able("tools", TOOLS);
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  $("send").disabled = !question.value.trim() || !models.length;
  say($("send"), models.length ? "send" : $("key-form").hidden ? "sendNoModel" : "sendKey", [], "title");
  $("model").closest("label").hidden = !$("model").length;
  $("think").setAttribute("aria-checked", thought());
  $("think").disabled = model()?.liubai?.thinking === false;
  $("think").title = $("think").disabled ? words("cannotThink") : thought() === "mixed" ? words("thinkRouted") : "";
  say($("think-name"), thought() === "mixed" ? "thinkAuto" : "think");
  $("longer").setAttribute("aria-checked", String(settings.longer));
  $("longer").hidden = thought() === "false";
  choices($("kind"), kinds.includes("sample") ? kinds : ["sample", ...kinds]);
  $("kind").value = kinds.includes(settings.kind) ? settings.kind : "sample";
  $("count").hidden = !SEVERAL.includes($("kind").value);
  $("n").textContent = settings.n;
  $("fewer").disabled = settings.n <= 2;
  $("more").disabled = settings.n >= MOST_PATHS;
  choices($("route"), routes);
  $("route").value = way();
  $("route-more").hidden = routes.length < 2;
  for (const box of document.querySelectorAll("[data-tool]")) {
    box.closest("label").hidden = !offered.includes(box.value);
    box.checked = settings.tools.includes(box.value);
  }
  $("no-tools").hidden = offered.length > 0;
  $("ink").checked = settings.ink;
  for (const field of numbers) {
    if (document.activeElement !== field && field.checkValidity()) field.value = settings[field.dataset.number] ?? "";
  }
  $("options-button").setAttribute("aria-expanded", String(settings.options));
  $("options").hidden = !settings.options;
  say($("theme"), `theme${settings.theme}`, [], "aria-label");
  say($("theme"), `theme${settings.theme}`, [], "title");
  $("theme").dataset.now = settings.theme;
}

function grow() {
  question.style.height = "auto";
  question.style.height = `${Math.min(question.scrollHeight, innerHeight * 0.35)}px`;
}

function submit() {
  const asked = question.value.trim();
  if (!models.length && !$("key-form").hidden) return void $("key").focus();
  if (!asked || running || !models.length || !mended()) return;
  question.value = "";
  grow();
  send(asked);
}

const change = (id, event, name, value) => $(id).addEventListener(event, () => { set(name, value($(id))); show(); });
$("think").addEventListener("click", () => {
  set("thinking", thought() !== "true");
  set("route", "none");  // who presses it wants it to hold
  show();
});
change("longer", "click", "longer", () => !settings.longer);
change("kind", "change", "kind", (select) => select.value);
change("fewer", "click", "n", () => settings.n - 1);
change("more", "click", "n", () => settings.n + 1);
change("route", "change", "route", (select) => select.value);
change("model", "change", "model", (select) => select.value);
change("options-button", "click", "options", () => !settings.options);
for (const field of numbers) {
  const range = [Number(field.min), Number(field.max)];
  say($(`wrong-${field.dataset.number}`), field.step === "any" ? "anyNumber" : "wholeNumber", range);
  field.addEventListener("input", () => {
    const fine = field.checkValidity();
    set(field.dataset.number, field.value.trim() && fine ? Number(field.value) : null);
    if (fine) checked(field);
  });
  field.addEventListener("change", () => checked(field));  // not while it is being typed
}
for (const box of document.querySelectorAll("[data-tool]")) {
  box.addEventListener("change", () => set("tools", [...document.querySelectorAll("[data-tool]:checked")].map((one) => one.value)));
}
$("ink").addEventListener("change", () => {
  set("ink", $("ink").checked);
  closeTip();
  for (const answer of answers) answer.setInk(settings.ink);
});
$("theme").addEventListener("click", () => {
  const all = ["auto", "light", "dark"], theme = set("theme", all[(all.indexOf(settings.theme) + 1) % 3]);
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  show();
});
$("language").addEventListener("click", () => {
  setLanguage(set("language", language() === "zh" ? "en" : "zh"));
  $("language").lang = language() === "zh" ? "en" : "zh";
  show();
});
$("new").addEventListener("click", newChat);
$("to-end").addEventListener("click", () => follow.hold());
$("stop").addEventListener("click", (event) => {
  if (event.detail < 2) stop();  // the second click of a double click on Send is no wish to stop
});
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
question.addEventListener("input", () => { grow(); show(); });
question.addEventListener("keydown", (event) => {
  // Enter also ends the spelling of a Chinese word: then it sends nothing (229: Safari says it so)
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  submit();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing) return;
  if (tipOpen()) closeTip();
  else if (running) stop();
});
talk.addEventListener("scroll", closeTip, { passive: true });
for (const button of document.querySelectorAll("#examples button")) {
  button.addEventListener("click", () => {
    question.value = button.textContent;
    grow();
    show();
    question.focus();
  });
}

sayAll(document);
$("language").lang = language() === "zh" ? "en" : "zh";
show();
loadModels();
if (matchMedia("(pointer: fine)").matches) question.focus();  // a phone would open its keyboard
