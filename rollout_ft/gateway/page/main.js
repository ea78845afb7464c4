// The page's life: the key, the looks, which of the two views is shown. Owns when the run is asked: every 2 s while somebody can see it
// (one trial every 5 s), every 30 s in a tab that is hidden, less and less often while nobody answers.

import { Refused, ask, forget, fragment, keep, key, takeKey } from "./api.js";
import { byId, clock, length, plural, say, show } from "./dom.js";
import { drawOne } from "./trial.js";
import { Whole, problems } from "./whole.js";

const EVERY_S = 2, TRIAL_S = 5, HIDDEN_S = 30, SLOWEST_S = 30;
const whole = new Whole(() => look());
let timer = 0, turn = 0, failures = 0, held = false, answered = 0;

function trial() {
  return fragment().get("trial") || "";
}

async function look() {
  const mine = ++turn;
  clearTimeout(timer);
  if (!key()) return door("");
  try {
    const id = trial();
    const told = id ? await ask(`trials/${encodeURIComponent(id)}/timeline`) : await ask("overview", whole.parameters());
    if (mine !== turn) return;
    door(null);
    failures = 0;
    answered = Date.now();
    show(byId("broken"), false);
    show(byId("whole"), !id);
    show(byId("one"), Boolean(id));
    show(byId("one-failed"), false);
    show(byId("one-told"), true);
    if (id) drawOne(id, told);
    else drawWhole(told);
    say(byId("seen"), `as of ${clock(answered / 1000)}`);
  } catch (e) {
    if (mine !== turn) return;
    if (e instanceof Refused) {
      forget();
      return door(e.message);
    }
    door(null);
    if (e.status === 404 && trial()) return missing(e.message);
    failures += 1;
    const old = answered ? ` What is below is ${length((Date.now() - answered) / 1000)} old.` : "";
    say(byId("broken"), `${e.message}${old} Asking again.`);
    show(byId("broken"), true);
  }
  if (mine === turn && !held) timer = setTimeout(look, pauseS() * 1000);
}

// Nobody asks again for a trial that there is not.
function missing(why) {
  show(byId("broken"), false);
  show(byId("whole"), false);
  show(byId("one"), true);
  show(byId("one-told"), false);
  say(byId("h-one"), `Trial ${trial()}`);
  say(byId("one-failed"), why);
  show(byId("one-failed"), true);
}

function pauseS() {
  const wanted = document.hidden ? HIDDEN_S : trial() ? TRIAL_S : EVERY_S;
  return failures ? Math.max(wanted, Math.min(SLOWEST_S, 2 ** failures)) : wanted;
}

function drawWhole(told) {
  whole.draw(told);
  const wrong = problems(told), bad = wrong.length;
  document.title = `${bad ? `(${bad}) ` : ""}${told.fleet.run} · rollout_ft`;
  say(byId("run"), told.fleet.run);
  say(byId("headline"), `${told.fleet.serves ? "serves" : "serves nothing"}, ${bad ? plural(bad, "thing") + " to look at" : "nothing is wrong"}`);
  byId("headline").className = wrong.some((each) => each.level === "bad") ? "bad" : bad ? "warn" : "good";
}

// null: the key is good as far as anybody knows.
function door(why) {
  const closed = why !== null;
  show(byId("door"), closed);
  show(byId("main"), !closed);
  show(byId("pause"), !closed);
  if (!closed) return;
  say(byId("refused"), why);
  byId("key").focus();
}

byId("door").addEventListener("submit", (event) => {
  event.preventDefault();
  keep(byId("key").value);
  byId("key").value = "";
  look();
});
byId("pause").addEventListener("click", () => {
  held = !held;
  byId("pause").setAttribute("aria-pressed", String(held));
  say(byId("pause"), held ? "Go on" : "Hold still");
  if (held) clearTimeout(timer);
  else look();
});
document.addEventListener("visibilitychange", () => {
  if (held) return;
  clearTimeout(timer);
  if (document.hidden) timer = setTimeout(look, HIDDEN_S * 1000);
  else look();
});
window.addEventListener("hashchange", () => {
  takeKey();
  look().then(() => (trial() ? byId("h-one") : byId("main")).focus());
});

takeKey();
look();
