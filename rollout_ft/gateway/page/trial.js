// One trial: what is known of it, and its moments in order.

import { bar, byId, clock, el, length, moment, number, plural, say, show, tiles } from "./dom.js";

const FAULTS = new Set(["fault", "moved", "resumed", "restarted", "diverged", "ended", "around", "opened"]);
let drawn = "", last = null;

export function drawOne(id, { trial, moments, left_out: leftOut }) {
  last = [id, { trial, moments, left_out: leftOut }];
  document.title = `${id} · rollout_ft`;
  say(byId("h-one"), `Trial ${id}`);
  facts(trial);
  const only = byId("one-bad").checked;
  const told = JSON.stringify([id, moments.length, moments.at(-1), only]);
  if (told === drawn) return;
  drawn = told;
  strip(moments);
  const shown = only ? moments.filter((m) => m.bad || FAULTS.has(m.kind)) : moments;
  say(byId("one-note"), moments.length
    ? `${number(shown.length)} moments${leftOut ? `; ${number(leftOut)} older ones are left out` : ""}. rollout-ft trial show has what was said.`
    : "Nothing is kept of it any more: it was collected, and its turns are in the run's directory (rollout-ft trial show).");
  let attempt = 0;
  byId("one-moments").replaceChildren(...shown.map((m) => {
    const begins = m.attempt > attempt;
    attempt = Math.max(attempt, m.attempt);
    const when = el("time", { text: m.time ? clock(m.time) : "", title: m.time ? moment(m.time) : "" });
    return el("li", { cls: `${m.bad ? "bad " : ""}${begins && attempt > 1 ? "begins " : ""}${m.kind}` }, when,
      el("b", { text: m.kind, cls: "kind" }), el("span", { text: m.text || m.kind }));
  }));
}

function facts(trial) {
  const about = trial.metadata || {};
  const what = trial.outcome ? `${trial.outcome}${trial.cause ? `: ${trial.cause}` : ""}` : trial.fault ? `tainted: ${trial.fault}` : "";
  const doing = trial.activity;
  const now = doing ? (doing.waiting ? `${plural(doing.waiting, "request")} in flight, the oldest for ${length(doing.turn_s)}` : `its agent has asked for nothing for ${length(doing.quiet_s)}`) : "";
  byId("one-what").replaceChildren(...[what, now].filter(Boolean).map((text) => el("p", { text })));
  tiles(byId("one-facts"), [
    ["state", trial.state, trial.outcome === "infra_exhausted" || trial.outcome === "env_failed" ? "bad" : ""],
    ["task", trial.task_id || "none"], ["group", trial.group_id || "none"], ["attempt", String(trial.attempt), trial.attempt > 1 ? "warn" : ""],
    ["turns", number(trial.turns)], ["reward", trial.reward === null || trial.reward === undefined ? "none" : String(trial.reward)],
    ["replayed", number(about.replayed || 0)], ["phantoms", number(about.phantoms || 0)], ["unanswered", number(about.unanswered || 0), about.unanswered ? "warn" : ""],
  ]);
  const made = about.tokens_generated || 0, wasted = Math.min(made, about.tokens_wasted || 0), reused = Math.min(made - wasted, about.tokens_reused || 0);
  bar("one-tokens", [["useful", made - wasted - reused, "useful"], ["saved", reused, "reused"], ["in no trajectory", wasted, "wasted"]]);
  say(byId("one-words"), made ? `${number(made)} tokens were sampled${trial.outcome ? "" : " so far"}.` : "");
}

// An attempt is a line on which time goes from left to right.
function strip(moments) {
  const timed = moments.filter((m) => m.time);
  if (timed.length < 2) return byId("one-strip").replaceChildren();
  const first = Math.min(...timed.map((m) => m.time - m.seconds)), span = Math.max(...timed.map((m) => m.time)) - first || 1;
  const attempts = new Map();
  for (const m of timed) attempts.set(m.attempt || 1, [...(attempts.get(m.attempt || 1) || []), m]);
  const lines = [...attempts].slice(-12).map(([attempt, those]) => el("div", { cls: "strip" }, el("span", { text: `attempt ${attempt}` }),
    el("div", {}, ...those.slice(-400).map((m) => {
      const begun = m.kind === "turn" ? m.time - m.seconds : m.time;
      const mark = el("i", { cls: m.bad ? "bad" : m.kind, title: `${clock(m.time)} ${m.text}` });
      mark.style.left = `${(100 * (begun - first)) / span}%`;
      mark.style.width = m.kind === "turn" ? `max(3px, ${(100 * m.seconds) / span}%)` : "3px";
      return mark;
    }))));
  byId("one-strip").replaceChildren(...lines, el("p", { cls: "note", text: `${clock(first)} to ${clock(first + span)}, ${length(span)}` }));
}

byId("one-bad").addEventListener("change", () => last && drawOne(...last));
