// The whole run on one page: what needs somebody, trials, engines, turns in flight, recoveries, events. Every list is bounded, by the
// gateway or here.

import { bar, byId, clock, el, length, moment, number, plural, prose, say, show, Table, tiles } from "./dom.js";

const ENGINES = 10, EVENTS = 100, TURNS = 15, TRIALS = 25;
const OF_TRIALS = /^(trial|session)\./;
const STATES = ["held", "idle", "ended", "released", "damaged"];
const OUTCOMES = ["completed", "truncated", "agent_failed", "env_failed", "infra_exhausted", "cancelled"];
const NEEDS = {
  damaged: ["damaged", "bad"], stuck: ["stands still", "bad"], waits: ["waits", "warn"], homeless: ["between engines", "warn"],
  lost: ["lost", "bad"], restarted: ["restarted", "warn"], failed: ["failed", "warn"], idle: ["idle", "dim"], runs: ["runs", "good"],
  done: ["done", "dim"],
};
const HEALTH = { healthy: "good", suspect: "warn", stale: "warn", restarting: "warn", offloaded: "warn", dead: "bad", retired: "dim" };
const GRAVITY = ["dead", "suspect", "stale", "restarting", "offloaded", "healthy", "retired"];
const BAD = /dead|lost|failed|damaged|torn|refused|exposed|orphaned|overdue|spared/;
const WARN = /restarted|moved|resumed|doubt|diverged|warning|closed|draining/;
const PARKED = "rollout_ft/turns_parked/";

// What is wrong, the gravest first; that the store is silent is one of it.
export function problems({ problems: known, store_silent: silent }) {
  return silent ? [{ level: "bad", what: silent, why: "", remedy: "What is said of trials is old. See the store's actors in Ray's dashboard." }, ...known] : known;
}

export class Whole {
  constructor(changed) {
    this.cursors = [""];
    this.next = "";
    this.since = "";
    this.events = [];
    this.all = false;
    this.trials = new Table(byId("trials"), "Trials", [
      ["trial", "id"], ["needs", "badge"], ["what is the matter, and what to do", "why"], ["state", "w"], ["attempt", "n"], ["engine", "w"], ["reward", "n"],
    ]);
    this.engines = new Table(byId("engines"), "Engines", [
      ["engine", "id"], ["state", "badge"], ["sessions", "n"], ["start", "n"], ["version", "w"], ["why", "why"],
    ], "No engine is known.");
    this.turns = new Table(byId("turns"), "Turns in flight", [
      ["trial", "id"], ["turn", "n"], ["waits for", "why"], ["no token for", "n"], ["age", "n"], ["tokens", "n"], ["engine", "w"],
    ], "No turn is in flight.");
    this.recoveries = new Table(byId("recoveries"), "Recoveries", [
      ["lost at", "w"], ["engine", "id"], ["why", "why"], ["sessions moved", "n"], ["go on", "n"], ["slowest", "n"], ["replaced", "w"],
    ], "No engine was lost.");
    for (const each of STATES) byId("state").append(el("option", { text: each }));
    for (const each of OUTCOMES) byId("outcome").append(el("option", { text: each }));
    const again = () => { this.cursors = [""]; changed(); };
    let typing = 0;
    byId("filters").addEventListener("submit", (event) => event.preventDefault());
    byId("search").addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(again, 250); });
    for (const id of ["state", "outcome", "order"]) byId(id).addEventListener("change", again);
    byId("on").addEventListener("click", () => { if (this.next) { this.cursors.push(this.next); changed(); } });
    byId("back").addEventListener("click", () => { if (this.cursors.length > 1) { this.cursors.pop(); changed(); } });
    byId("run-only").addEventListener("change", () => this.listEvents());
    byId("all-engines").addEventListener("click", () => { this.all = !this.all; this.drawEngines(this.fleet); });
  }

  parameters() {
    const chosen = Object.fromEntries(["search", "state", "outcome", "order"].map((id) => [id, byId(id).value.trim()]));
    return { ...chosen, after: this.cursors.at(-1), since: this.since, turns: String(TURNS), limit: String(TRIALS) };
  }

  draw(told) {
    this.fleet = told.fleet;
    this.drawProblems(problems(told));
    this.drawTotals(told);
    this.drawTrials(told.trials);
    this.drawEngines(told.fleet);
    this.drawTurns(told.turns);
    this.drawRecoveries(told.recoveries);
    this.drawEvents(told.events);
  }

  drawProblems(all) {
    const told = JSON.stringify(all);
    if (this.told === told) return;
    this.told = told;
    byId("problems").replaceChildren(...(all.length ? all : [{ level: "good", what: "Nothing is wrong.", why: "", remedy: "" }]).map((each) => el("li", { cls: each.level },
      el("strong", { text: each.what }),
      ...(each.why ? [el("span", { cls: "why", text: each.why })] : []),
      ...(each.remedy ? [el("span", { cls: "do" }, el("b", { text: "Do: " }), ...prose(each.remedy))] : []))));
  }

  drawTotals({ fleet, trials, turns }) {
    const m = (name) => fleet.metrics?.[`rollout_ft/${name}`] || 0;
    const counted = Object.keys(fleet.metrics || {}).length > 0, not = "not counted (telemetry.metrics)";
    const lost = (trials.outcomes.infra_exhausted || 0) + (trials.outcomes.env_failed || 0);
    const parked = Object.entries(fleet.metrics || {}).filter(([name, n]) => name.startsWith(PARKED) && n > 0);
    const ended = trials.states.ended + trials.states.released;
    const states = fleet.engine_states, serving = (states.healthy || 0) + (states.suspect || 0);
    const there = Object.values(states).reduce((sum, n) => sum + n, 0) - (states.retired || 0);
    tiles(byId("totals"), [
      ["engines that serve", `${number(serving)} of ${number(there)}`, fleet.serves ? "" : "bad"],
      ["trials", `${number(trials.states.held + trials.states.idle)} run, ${number(ended)} ended`],
      ["trials lost", number(lost), lost ? "bad" : "", "infra_exhausted or env_failed: their reward is None"],
      ["attempts restarted", number(trials.restarts), ""],
      ["turns in flight", number(turns.count), ""],
      ["turns parked", parked.map(([name, n]) => `${number(n)} ${name.slice(PARKED.length)}`).join(", ") || (counted ? "none" : not), parked.length ? "warn" : ""],
      ["turns replayed", counted ? number(m("turns_served/replayed")) : not, "", "Answered from the checkpoint, at no cost"],
      ["weights", `${fleet.weights.version || "as started"}, ${fleet.weights.phase}`, fleet.weights.phase === "serving" ? "" : "warn"],
      ["store", `${plural(fleet.view.members.length, "replica")}, view ${fleet.view.number}`, fleet.view.members.length < Math.max(1, fleet.view.min_replicas) ? "bad" : ""],
      ["sessions", number(fleet.sessions), ""],
    ]);
    const made = m("tokens_generated"), wasted = Math.min(made, m("tokens_wasted")), reused = Math.min(made - wasted, m("tokens_reused"));
    bar("tokens", [["useful", made - wasted - reused, "useful"], ["saved", reused, "reused"], ["wasted", wasted, "wasted"]]);
    say(byId("tokens-words"), made
      ? `${number(made)} tokens were sampled. Saved: sampled before a fault or a pause, and gone on from. Wasted: in no trajectory, known when a trial ends.`
      : counted ? "No token was sampled yet." : `Tokens are ${not}.`);
  }

  drawTrials({ trials, total, next }) {
    this.next = next;
    this.trials.update(trials.map((t) => [t.trial_id, [
      { text: t.trial_id, href: `#trial=${encodeURIComponent(t.trial_id)}`, second: [t.task_id, t.group_id].filter(Boolean).join(" · ") },
      { text: NEEDS[t.attention][0], cls: `badge ${NEEDS[t.attention][1]}` },
      { text: t.why, second: t.remedy && t.why ? t.remedy : "" },
      t.outcome ? `${t.outcome}${t.state === "released" ? ", collected" : ""}` : t.state,
      String(t.attempt), t.engine_id, t.reward === null ? "" : String(Math.round(t.reward * 1000) / 1000),
    ]]), total ? "No trial on this page." : "No trial matches.");
    const from = (this.cursors.length - 1) * TRIALS;
    say(byId("place"), trials.length ? `${number(from + 1)} to ${number(from + trials.length)} of ${number(total)}` : "none");
    byId("on").disabled = !next;
    byId("back").disabled = this.cursors.length === 1;
  }

  drawEngines(fleet) {
    const sorted = [...fleet.engines].sort((a, b) => GRAVITY.indexOf(a.state) - GRAVITY.indexOf(b.state) || a.engine_id.localeCompare(b.engine_id, "en", { numeric: true }));
    const shown = this.all ? sorted : sorted.slice(0, ENGINES);
    this.engines.update(shown.map((e) => [e.engine_id, [
      { text: e.engine_id, second: e.node }, { text: e.draining ? `${e.state}, drains` : e.state, cls: `badge ${HEALTH[e.state] || ""}` },
      number(e.sessions), String(e.incarnation), e.weight_version, e.stale || (e.reason && e.state === "healthy" ? `its last start: ${e.reason}` : e.reason) || (e.open === false ? `its owner has it: ${e.held}` : ""),
    ], e.state === "healthy" ? "" : "told"]));
    const all = Object.values(fleet.engine_states).reduce((sum, n) => sum + n, 0);
    const left = all > sorted.length ? `; the first ${number(sorted.length)} are here, GET /fleet has all` : "";
    say(byId("engines-note"), Object.entries(fleet.engine_states).map(([state, n]) => `${number(n)} ${state}`).join(", ") + left);
    show(byId("all-engines"), sorted.length > ENGINES);
    say(byId("all-engines"), this.all ? "Show the first only" : `Show all ${number(sorted.length)}`);
  }

  drawTurns({ count, waits, turns, silent }) {
    const said = Object.entries(waits).map(([what, n]) => `${number(n)} ${what.replace("_", " ")}`).join(", ");
    const quiet = silent.length ? ` ${silent.slice(0, 3).join(", ")}${silent.length > 3 ? " and more" : ""} did not say within 2 s.` : "";
    say(byId("turns-note"), (count ? `${number(count)} in flight; they wait for: ${said}.` : "") + (count > turns.length ? " Those without a token for longest are shown." : "") + quiet);
    this.turns.update(turns.map((t) => [`${t.session_id} ${t.key}`, [
      { text: t.trial_id, href: `#trial=${encodeURIComponent(t.trial_id)}`, second: t.attempt > 1 ? `attempt ${t.attempt}` : "" },
      String(t.turn), { text: t.waits_for_words, second: t.quiet_s >= 30 ? t.remedy : "" }, length(t.quiet_s), length(t.age_s),
      number(t.tokens) + (t.reused ? `, ${number(t.reused)} saved` : ""), t.engine_id,
    ], t.quiet_s >= 30 ? "told" : ""]));
  }

  drawRecoveries(recoveries) {
    say(byId("recoveries-note"), recoveries.length ? "Of each lost engine: the sessions that went elsewhere since, and those with a new token there. The others wait to be asked for." : "");
    this.recoveries.update(recoveries.map((r) => [`${r.engine} ${r.incarnation}`, [
      { text: clock(r.time), title: moment(r.time) }, `${r.engine}, start ${r.incarnation}`, r.reason, number(r.moved), number(r.resumed),
      r.resumed ? length(r.slowest_s) : "", r.replaced_s !== null ? `after ${length(r.replaced_s)}` : r.retired ? "no: retired" : "not yet",
    ], r.replaced_s === null && !r.retired ? "told" : ""]));
  }

  drawEvents({ events, next, missed }) {
    this.since = next;
    if (!events.length && !missed) return;
    const all = [...this.events, ...events];
    const kept = (ours) => all.filter((e) => OF_TRIALS.test(e.event) === ours).slice(-EVENTS);
    const both = new Set([...kept(true), ...kept(false)]);
    this.events = all.filter((e) => both.has(e));
    this.missed ||= missed;
    this.listEvents();
  }

  listEvents() {
    const shown = byId("run-only").checked ? this.events.filter((e) => !OF_TRIALS.test(e.event)) : this.events;
    say(byId("events-note"), `The newest first${this.missed ? "; not all were kept" : ""}. A run's DIR/events.jsonl has all.`);
    byId("events").replaceChildren(...[...shown].reverse().map((e) => {
      const { time, event, source, ...fields } = e;
      const said = Object.entries(fields).filter(([, value]) => value !== "" && value !== null).map(([name, value]) => `${name} ${typeof value === "object" ? JSON.stringify(value) : value}`).join(" · ");
      const when = el("time", { text: clock(time), title: `${moment(time)}, ${source}` });
      return el("li", { cls: BAD.test(event) ? "bad" : WARN.test(event) ? "warn" : "" }, when, el("b", { text: event }), el("span", { text: said }));
    }));
  }
}
