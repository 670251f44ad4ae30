"use strict";

const OPEN = -2, UNSURE = -1;
const at = (id) => document.getElementById(id);
let state, place = 0, busy = false;

async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  const answer = await fetch(path, options);
  const value = await answer.json();
  if (!answer.ok) throw new Error(value.error);
  return value;
}

function named(code) {
  return code === UNSURE ? "unsure" : state.classes[code];
}

function caption() {
  const parts = [`sample ${place + 1} of ${state.labels.length}`];
  if (state.risks) parts.push(`risk ${state.risks[place].toPrecision(3)}`);
  const where = at("where"), code = state.labels[place];
  where.textContent = parts.join(" · ");
  if (code !== OPEN) {
    const label = document.createElement("b");
    label.textContent = named(code);
    where.append(" · ", label);
  }
}

function show() {
  const total = state.labels.length, done = state.labels.filter((code) => code !== OPEN).length;
  at("image").src = `image/${place}.png`;
  if (place + 1 < total) new Image().src = `image/${place + 1}.png`;
  caption();
  at("done").textContent = done === total ? `all ${total} labeled` : `${done} of ${total} labeled`;
  at("bar").setAttribute("aria-valuenow", done);
  at("bar").firstElementChild.style.width = `${100 * done / total}%`;
  at("question").textContent = done === total ? "All samples are labeled. You can close this page." : "What do you see?";
  for (const button of at("classes").children) {
    button.setAttribute("aria-pressed", Number(button.dataset.code) === state.labels[place]);
  }
  at("back").disabled = place === 0;
  at("next").disabled = place === total - 1;
  at("undo").disabled = done === 0;
  at("skip").disabled = done === total;
}

function go(to) {
  place = Math.min(Math.max(to, 0), state.labels.length - 1);
  show();
}

function skip() {
  const total = state.labels.length;
  for (let step = 1; step <= total; step += 1) {
    const to = (place + step) % total;
    if (state.labels[to] === OPEN) return go(to);
  }
  show();
}

// One change at a time: a label counts once it is on the disk, and the page moves on after that. What is pressed before
// the next picture is there is ignored, so that nothing is labeled unseen.
async function change(work) {
  if (busy) return;
  wait(true);
  try {
    await work();
    at("error").hidden = true;
  } catch (error) {
    at("error").textContent = `Not saved: ${error.message}`;
    at("error").hidden = false;
  }
  await at("image").decode().catch(() => {});
  wait(false);
}

function wait(on) {
  busy = on;
  document.body.setAttribute("aria-busy", on);
}

const label = (code) => change(async () => {
  await ask("label", { position: place, code: code === UNSURE ? null : code });
  state.labels[place] = code;
  skip();
});

const undo = () => change(async () => {
  const back = await ask("undo", {});
  if (back.position === null) return;
  state.labels[back.position] = back.code;
  go(back.position);
});

function press(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const key = event.key.toLowerCase(), code = state.keys.indexOf(key);
  const moves = { arrowleft: () => go(place - 1), arrowright: () => go(place + 1), " ": skip, u: undo };
  const act = moves[key] ?? (key === "0" ? () => label(UNSURE) : code >= 0 ? () => label(code) : null);
  if (!act) return;
  event.preventDefault();
  act();
}

function choice(name, key, code) {
  const button = document.createElement("button"), hint = document.createElement("kbd");
  button.type = "button";
  button.dataset.code = code;
  button.className = code === UNSURE ? "unsure" : code === 0 ? "right" : "wrong";
  hint.textContent = key;
  button.append(hint, name);
  button.addEventListener("click", () => label(code));
  return button;
}

async function start() {
  state = await ask("state");
  document.title = `fanal label: ${state.run}`;
  at("run").textContent = state.run;
  at("bar").setAttribute("aria-valuemax", state.labels.length);
  at("classes").append(...state.classes.map((name, code) => choice(name, state.keys[code], code)));
  at("classes").append(choice("unsure", "0", UNSURE));
  for (const [id, act] of [["back", () => go(place - 1)], ["next", () => go(place + 1)], ["undo", undo], ["skip", skip]]) {
    at(id).addEventListener("click", act);
  }
  document.addEventListener("keydown", press);
  place = state.labels.length - 1;
  skip();
}

start().catch((error) => {
  at("error").textContent = error.message;
  at("error").hidden = false;
});
