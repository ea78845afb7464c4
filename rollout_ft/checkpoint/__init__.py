"""The checkpoint store: replicated, fenced, append-only logs of trials.

Reading order: `log` (the append rule), `state` (one replica's decisions), `store` (the replica), `mirror` (the writer's
side), `view` (who the replicas are); on disk: `records`, `frames`, `manifest`, `reading` (bytes to records and damage),
`replay` (records to trials), `journal` (the writer), `offline` (a journal read without a store).
"""
