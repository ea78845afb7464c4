"""Which events there are: the noun and the verb, and what it says.

Owns the list, which `docs/events.md` shows. Pure. Fields: `trial`, `attempt`, `session`, `turn` (1 for the first of a path), `engine`,
`incarnation`, and why: `reason` or `cause`. A transition that is not in it is not told.
"""

from __future__ import annotations

EVENTS = {
    # trials
    "trial.opened": "Its first attempt began; `engine` has its session.",
    "trial.restarted": "Another attempt began, from the checkpoint or from nothing; `reason` is who or what is to blame, `cause` in words.",
    "trial.diverged": "A request of its replay is none of those recorded at its place: the first difference.",
    "trial.ended": "The store has its outcome; with what it sampled, reused and wasted, and why it was wasted.",
    "trial.released": "It was collected, and the stores forgot it but for its summary.",
    "trial.refused": "Records of it are damaged: it cannot go on.",
    # sessions and turns
    "session.adopted": "An engine's actor read it from the store and serves it, at this epoch.",
    "session.moved": "Another engine took it over, as somebody asked for it; `epoch` fences those before.",
    "session.resumed": "After that its next new token was there; `seconds` and `reason` are those of `recovery_seconds`.",
    "turn.replayed": "A reply that was committed went out again in the same attempt: the one before it was lost.",
    "turn.attached": "A request asked for a turn that was being generated already, and got its reply.",
    "turn.continued": "A turn went on from tokens that an engine before it had sampled.",
    "turn.regenerated": "A turn was sampled again from its beginning.",
    "routed_experts.lost": "Routed experts of turns could not be kept or read.",
    # engines
    "engine.up": "It is started and serves, or waits until it may.",
    "engine.joined": "One of somebody else's was named, or came.",
    "engine.doubted": "Its actor sees signs of a hang; nothing new goes there.",
    "engine.trusted": "They are gone.",
    "engine.lost": "Its actor gave it up.",
    "engine.dead": "It is lost to the run; its sessions go elsewhere as soon as somebody asks for them.",
    "engine.start_failed": "It did not come up.",
    "engine.spared": "It looks dead, and so many do that it is left alone.",
    "engine.draining": "It takes no session any more.",
    "engine.retired": "It is not wanted any more, and is not started again.",
    "engine.closed": "Its owner keeps it still.",
    "engine.opened": "Its owner lets it serve again.",
    "engine.unchecked": "It could not be asked what it is.",
    "engine.warning": "Its settings are not what they should be.",
    "engine.stays_stale": "It missed an update of the weights and does not serve.",
    "engine.replace_asked": "Its owner was asked for another.",
    "engine.replace_refused": "Its owner has no other.",
    "orphans.linger": "An engine still works for calls that nobody waits for.",
    "retries.spent": "Calls to an engine were repeated too often in a row: the next waits.",
    # the fleet and the trainer
    "fleet.version": "The weights of somebody else's engines changed.",
    "fleet.ordered": "A trainer's command was carried out.",
    "fleet.pause_overdue": "The trainer keeps the engines still for longer than it said.",
    # the checkpoint store
    "view.opened": "The store goes on with these replicas.",
    "store.lost": "A replica is gone.",
    "store.join_failed": "Another could not take its place.",
    "store.exposed": "Too few replicas, or all on one node.",
    "store.data_lost": "No replica is left, and the journal has to do.",
    "store.reload_failed": "The journal could not be read.",
    "journal.failed": "It could not be written to.",
    "journal.torn": "Its end was cut: what a machine that lost its power had not written.",
    "journal.damaged": "Records of it are not what was written.",
    # the run itself
    "gateway.lost": "A gateway is gone, and another takes its port.",
    "supervisor.rebuilt": "The supervisor was started again and found what lives.",
    "run.started": "It is up; `gateway_url` is where it is served.",
    "run.adopted": "Another process goes on with it, with the actors that live.",
    "run.resumed": "Another process goes on with it, so many trials without an outcome.",
    "run.orphaned": "Nobody renewed it for `orphan_s`: it ends itself.",
    "events.missed": "So many events came too fast, and are told by nobody.",
    "events.rotated": "Older events are not kept: this is their account.",
}  # fmt: skip
