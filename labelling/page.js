// The page of label.py. What is shown comes from the server as HTML without anything that runs;
// everything that this file writes itself goes in as text. A label is said to be saved once the
// server has answered, which it does when the label is on the disk.
"use strict";

const $ = (id) => document.getElementById(id);
const RETRY_MS = 1000, POLL_MS = 400, PATIENCE_MS = 10000;
let state = null;      // what the server said last
let asked = null;      // {ranks, rank, aspects}: what has been answered about the item on screen
let began = 0;         // when it was shown
let busy = false;      // a request is on its way: keys wait, so that none answers an unseen pair
let ended = false;

// ------------------------------------------------------------------ to the server

// Sent again until there is an answer: `body.id` makes that harmless.
async function ask(path, body) {
  for (;;) {
    try {
      const options = body === undefined ? {} : {
        method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body),
      };
      const response = await fetch(path, {...options, signal: AbortSignal.timeout(PATIENCE_MS)});
      if (response.ok || response.status === 400) return await response.json();
      throw new Error(`the server answered ${response.status}`);
    } catch (wrong) {
      tell(`Not saved yet: no answer from label.py (${wrong.message}). Is it still running? Trying again.`);
      await new Promise((go) => setTimeout(go, RETRY_MS));
    }
  }
}

async function send(path, body) {
  if (busy || ended) return;
  busy = true;
  document.body.setAttribute("aria-busy", "true");
  try {
    const told = await ask(path, body);
    if (told.stopped) return finish();
    if (told.item === undefined) return tell(told.problem);
    show(told);
  } finally {
    busy = false;
    document.body.removeAttribute("aria-busy");
  }
}

// ------------------------------------------------------------------ what is shown

function show(told) {
  const same = state && state.item && told.item && state.item.pair === told.item.pair &&
    state.last === told.last;
  state = told;
  tell(told.problem);
  $("bar").max = Math.max(1, told.total);
  $("bar").value = told.done;
  $("count").textContent = `${told.done} of ${told.total}`;
  $("left").textContent = told.left;
  document.title = `${told.done} of ${told.total} labelled`;
  if (!same) fresh();
  ready();
  if (!told.item && !told.finished) setTimeout(() => send("state"), POLL_MS);
}

// A new item: nothing of the last one stays.
function fresh() {
  const item = state.item;
  asked = {ranks: [], rank: 0, aspects: {}};
  $("note").value = "";
  $("noted").hidden = true;
  $("prompt").replaceChildren(...(item ? item.prompt.map(turn) : []));
  $("replies").replaceChildren(...(item ? item.replies.map(reply) : []));
  const main = document.querySelector("main");
  main.scrollTop = 0;
  main.focus();  // Space and the arrow keys scroll it
  began = performance.now();
}

function turn(said) {
  const box = element("div", `turn ${said.who === "user" ? "user" : ""}`);
  if (said.who) box.append(element("div", "who", said.who));
  return box.appendChild(rendered(said.html)).parentNode;
}

function reply(html, place) {
  const box = element("article", "reply");
  const head = box.appendChild(element("div", "place"));
  head.append(element("span", "name", `Reply ${place + 1}`), element("span", "rank"));
  box.append(rendered(html));
  return box;
}

function rendered(html) {
  const box = element("div", "text");
  box.dir = "auto";  // Hebrew and Arabic begin at the right
  box.innerHTML = html;  // made by labelling/markdown.py: text and plain tags alone
  return box;
}

function element(tag, name, text = "") {
  const made = document.createElement(tag);
  made.className = name;
  made.textContent = text;
  return made;
}

function tell(problem) {
  $("problem").textContent = problem || "";
  $("problem").hidden = !problem;
}

// What is asked now, and the buttons that answer it.
function ready() {
  const item = state.item, aspect = nextAspect();
  $("waiting").hidden = Boolean(item);
  $("waiting").textContent = state.finished
    ? `All done. Every label is in ${state.file}; End (q) stops label.py, and then this page can be closed.`
    : "The replies are being sampled …";
  $("skip").disabled = !item || rated();
  $("write").disabled = !item;
  $("undo").disabled = !state.last && !begun();
  const question = $("question");
  question.replaceChildren();
  $("choices").replaceChildren();
  if (!item) return;
  const two = item.replies.length === 2;
  document.body.classList.toggle("alone", item.replies.length === 1);
  if (item.replies.length === 1) {
    question.append("Is it ", element("b", "", "good"), "?");
    $("choices").append(button("Good", "g", () => mark(0)), button("Bad", "b", () => mark(1)));
    return;
  }
  const what = aspect || (asked.rank ? "next best" : two ? "better" : "best");
  question.append("Which is ", aspect ? (two ? "more " : "most ") : "", element("b", "", what), "?");
  const left = aspect ? item.replies.map((_, place) => place) : open();
  for (const place of left) {
    $("choices").append(button(`Reply ${place + 1}`, String(place + 1), () => pick(place)));
  }
  $("choices").append(button("Tie", "t", () => pick(null)));
  document.querySelectorAll(".reply").forEach((box, place) => {
    const rank = asked.ranks[place];
    box.classList.toggle("picked", rank === 0);
    box.querySelector(".rank").textContent = rank === undefined ? "" : `rank ${rank + 1}`;
  });
}

function button(text, key, act) {
  const made = element("button", "", text);
  made.append(element("kbd", "", key));
  made.dataset.key = key;
  made.addEventListener("click", act);
  return made;
}

// ------------------------------------------------------------------ what a person does

const open = () => state.item.replies.map((_, p) => p).filter((p) => asked.ranks[p] === undefined);
const rated = () => Boolean(state.item) && open().length === 0;
const begun = () => asked !== null && asked.ranks.some((rank) => rank !== undefined);
const nextAspect = () => rated() ? state.aspects.find((name) => !(name in asked.aspects)) : undefined;

// A reply is the best of those left, or of an aspect; null: they are as good.
function pick(place) {
  if (busy || !state || !state.item) return;
  const aspect = nextAspect();
  if (aspect) {
    asked.aspects[aspect] = place;
  } else {
    for (const p of place === null ? open() : [place]) asked.ranks[p] = asked.rank;
    asked.rank += 1;
    if (open().length === 1) asked.ranks[open()[0]] = asked.rank;
  }
  if (rated() && !nextAspect()) label(Array.from(asked.ranks));
  else ready();
}

// A reply alone: 0 good, 1 bad.
function mark(rank) {
  if (!busy && state && state.item) label([rank]);
}

function label(ranks) {
  send("label", {
    id: name(), pair: state.item.pair, ranks, aspects: ranks ? asked.aspects : {},
    note: $("note").value, seconds: (performance.now() - began) / 1000,
  });
}

const name = () => Array.from(crypto.getRandomValues(new Uint8Array(16)),
  (byte) => byte.toString(16).padStart(2, "0")).join("");

function undo() {
  if (begun()) { fresh(); ready(); } else if (state && state.last) send("undo", {id: state.last});
}

function note() {
  $("noted").hidden = false;
  $("note").focus();
}

function finish() {
  ended = true;
  document.querySelectorAll("button").forEach((b) => { b.disabled = true; });
  $("prompt").replaceChildren();
  $("replies").replaceChildren();
  $("waiting").hidden = false;
  $("waiting").textContent = "label.py has ended. Every label is on the disk; this page can be closed.";
}

$("skip").addEventListener("click", () => { if (!busy) label(null); });
$("undo").addEventListener("click", undo);
$("write").addEventListener("click", note);
$("end").addEventListener("click", () => send("stop", {}));

document.addEventListener("keydown", (event) => {
  if (event.target === $("note")) {
    if (event.key === "Enter" || event.key === "Escape") $("note").blur();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || busy || ended) return;
  const key = {"=": "t", "ArrowLeft": "1", "ArrowRight": "2", "l": "1", "r": "2"}[event.key] || event.key;
  const found = document.querySelector(`button[data-key="${CSS.escape(key.toLowerCase())}"]`);
  if (!found || found.disabled) return;
  event.preventDefault();
  found.click();
});

send("state");
