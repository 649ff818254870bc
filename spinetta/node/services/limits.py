"""Limits of the API's work on a node, each with its reason. What a request may hold is in `spinetta.validate`."""

from __future__ import annotations

ANSWER_BYTES_MAX = 3 * 2**20  # clients that were not told otherwise, grpcurl for one, receive at most 4 MiB
READ_KEYS = 100  # records in one read: 100 of the largest, 300 kB, still fit into a message of 32 MiB
SCAN_MAX = 5000  # tasks looked at for one page of a List: about a quarter of a second
SCAN_STEP = 500  # of them before other calls get a turn
RUNNING_KEYS_MAX = 50_000  # read for a List of running tasks: 1,000 nodes with 50 each
FRAGMENT_SCAN_MAX = 10_000  # newest tasks searched for the end of an id: nothing indexes the ends of keys
CANDIDATES_MAX = 5  # shown when a fragment fits several tasks
TRIES_MAX = 8  # of one read-decide-write round: a task changes hands a few times a second at most
TRY_WAIT_S = 0.02  # before the second of them; doubles
WAIT_MAX_S = 24 * 3600.0  # then Wait answers "timed out" and the client asks again
WAIT_MARGIN_S = 0.25  # before the caller's deadline, so that an answer still arrives
REREAD_S = 45.0  # between full readings of what a stream waits for: events can be missed (see DESIGN on watches)
WATCHED_MAX = 100_000  # unfinished tasks that a Watch remembers having sent: about 150 B each
REREAD_TASKS_MAX = 1200  # of them, read again every REREAD_S, the longest unchanged first: ten reads
RPCS_MAX = 4000  # calls at once; streams count too
LOG_STREAMS_MAX = 500  # each reads a file and uses a thread now and then
LOG_POLL_MIN_S = 0.02
LOG_POLL_MAX_S = 0.25
LOG_LOOK_S = 1.0  # between a worker's looks at a task whose log is followed: it may not watch
LOG_RECONNECT_S = 30.0  # how long a followed log survives the restart of the daemon that has it
FORWARD_TIMEOUT_S = 15.0  # of a call passed on to another node
CHANNELS_MAX = 64  # to other nodes, kept open
BEAT_POLL_S = 5.0  # heartbeats carry no time: their age is measured from when we saw them change
CALLS_PER_S = 200.0  # of one identity, when neither its record nor the policy says: a tenth of what a node answers
TASKS_PER_S = 4000.0  # submitted by one identity: half of what a node takes at best
BURST_S = 10.0  # seconds' worth that may come at once after a rest
DENIED_COSTS = 10  # calls that a refused one counts as
BUSY_MIN_S, BUSY_MAX_S = 0.05, 10.0  # told to those who have to wait
GUEST_CALLS_PER_S = 10.0  # from one address without an identity: a rack that joins through one gateway
GUESTS_CALLS_PER_S = 50.0  # from all of them: each costs a read of the store and a hash
GUEST_OPEN_MAX = 16  # calls at once from one address without an identity
GUESTS_OPEN_MAX = 64  # and from all of them: few beside RPCS_MAX
STREAMS_PER_CALLER_MAX = 200  # of one identity, waits too
BUCKETS_MAX = 4096  # callers remembered, 200 B each; the one that was quiet longest is forgotten first
RECHECK_S = 3.0  # between looks at the rights of one who has a stream open
UNKNOWN_MAX_S = 30.0  # for which a stream goes on while the rights cannot be read: an election takes a few
METADATA_BYTES_MAX = 16 << 10  # of one call: a bearer token with many groups, and gRPC's own
CALLS_OPEN_PER_CALLER_MAX = 500  # of one certificate: an eighth of what a node serves, streams and all
REQUEST_S = 30.0  # for a request to arrive: the largest, 16 MiB, over 5 Mbit/s
