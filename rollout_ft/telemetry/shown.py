"""What is meant by the words that screens show of a run that goes on: what a turn waits for, and events.

Owns their causes, and what to do; which events there are, and what they say, is `telemetry.vocabulary`'s. Pure.
"""

from __future__ import annotations

from rollout_ft.telemetry.vocabulary import EVENTS

_TRAINER = "The trainer: POST /fleet/resume ends a pause, an update ends itself. Look whether it still lives."
WAIT_ROWS = [
    ("first_token", "The turn waits for its first token.", "A long prompt, or a queue at its engine.",
     "Nothing yet: past `engine.first_token_timeout_s` the call is begun again. If many wait so, look at their engine."),
    ("tokens", "The turn waits for its next token.", "An engine with many calls, or one that stands still.",
     "Nothing yet: past `engine.token_timeout_s` it goes on elsewhere. If many do, look at their engine."),
    ("commit", "The turn is sampled, and waits for the store.", "A replica that is slow or gone.",
     "Look at the store: every replica of the view has to answer before a reply leaves."),
    ("paused", "The turn waits for the trainer, which paused the fleet.", "An update that is about to come, or a trainer that is gone.",
     _TRAINER),
    ("updating", "The turn waits for new weights.", "An update that is under way.", _TRAINER),
    ("owner", "The turn waits for its engine's owner, who keeps it still.", "Somebody else's engine, paused without telling us.",
     "Whoever owns the engine: it goes on when they are seen to have opened it."),
    ("admission", "The turn waits for a place at its engine.", "The engine has as many calls as it can run.",
     "More engines, or fewer trials at once."),
    ("no_engine", "The turn waits at a gateway: no engine serves.", "Engines that start, or all of them dead, stale or kept still.",
     "`rollout-ft status` says what became of each."),
    ("retry", "The turn waits for its next try.", "A call that its engine refused.",
     "Nothing: it is tried again. If many wait so, look at what the engine refuses."),
]  # fmt: skip

_DISK = "A disk that is full, broken or not mounted."
_DONE = ("It is a transition of the run; its fields say of whom.", "Nothing.")
TO_DO = {
    "trial.diverged": ("An agent that is not deterministic: times, random ids, an order of files in its messages.",
        "Make those equal with `session.normalizers`; `rollout-ft report DIR` shows where replays left their record."),
    "trial.refused": ("A record in the middle of the journal that a disk or a person damaged.",
        "`rollout-ft trial list DIR` shows which file and record: restore that file, or play the task as another trial."),
    "routed_experts.lost": ("An engine or a node that was lost with them.",
        "Nothing, unless it recurs: such turns are trained without them."),
    "engine.dead": ("`reason` says how it was seen; `rollout-ft explain` knows that as well.",
        "Nothing, unless it recurs: then read the engine's log."),
    "engine.start_failed": ("`reason` has the last lines of its log.",
        "Do what `rollout-ft explain` says of the reason; it is tried again."),
    "engine.spared": ("What the engines share: network, disk, driver, power.",
        "Look for that. It takes no new session while others can; `fleet.max_kills_share` of them are let go of in `fleet.kill_window_s`."),
    "engine.unchecked": ("An engine of somebody else that does not say what it is.",
        "Compare its model and its parsers with the config: nobody else does."),
    "engine.warning": ("`warning` names the setting.", "Do what `warning` says, and start the engine again."),
    "engine.stays_stale": ("An update that it missed and that cannot be repeated.",
        "Repeat the update, or let the trainer's next one bring it back (POST /fleet/weights)."),
    "engine.replace_refused": ("Its owner has no other, or is not there.", "Ask whoever runs `engine.attach.replace_url`."),
    "orphans.linger": ("An abort that an engine did not take.", "Nothing, unless it recurs: then read the engine's log."),
    "retries.spent": ("An engine that refuses many calls.", "Look at what it refuses, in its log."),
    "fleet.pause_overdue": ("A trainer that is slow or gone.", f"{_TRAINER} `fleet.max_pause_s` is how long it may take."),
    "store.lost": ("A node or an actor that is gone.", "Nothing, unless `store.join_failed` follows: then add nodes."),
    "store.join_failed": ("No node is left for another replica, or it cannot be filled.", "Add nodes; `reason` says what failed."),
    "store.exposed": ("Fewer nodes than `store.replicas`.", "Add nodes, or set `store.journal_dir` to a disk that outlives that node."),
    "store.data_lost": ("Every node with a replica was lost at once.",
        "Nothing with a journal, from which the run goes on; without one set `store.journal_dir` for the next run."),
    "store.reload_failed": (_DISK, "`reason` names the file: make it readable, and `rollout-ft resume DIR`."),
    "journal.failed": (_DISK, "Give the disk room: a replica without its journal is left out. `reason` says what failed."),
    "journal.torn": ("A machine that lost its power.", "Nothing: what was cut had not been acknowledged by this replica alone."),
    "journal.damaged": ("A disk or a person that changed records.", "Restore that file, or play the trials that it names as others."),
    "run.orphaned": ("Its process was killed or cut off.",
        "`rollout-ft resume DIR` goes on with it; `orphan_s` is how long it is waited for."),
    "events.missed": ("More transitions in a second than are kept, or a disk that took no events for long.",
        "Nothing for the trials; the account of the run lacks them."),
}  # fmt: skip
"""What causes an event that may ask for something to be done, and what that is."""
EVENT_ROWS = [(name, sentence, *TO_DO.get(name, _DONE)) for name, sentence in EVENTS.items()]
