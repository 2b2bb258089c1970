"""Every maximum in the system, by name, with the relations that must hold between them.

Units come last in a name. A limit that a peer must know is announced by `Describe`.
"""

from __future__ import annotations

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

HASH_BYTES = 32
LEASE_ID_BYTES = 16
EPOCH_BYTES = 16

SEGMENT_BLOCKS = 64
"""Consecutive blocks of a chain that are placed together in a cluster. Part of every block hash: a change renames all pages."""
SEGMENT_KEY_BYTES = 7

CAPACITY_BYTES_MAX = 1 << 46
"""The capacity of one node: half of the address space of an x86-64 process."""

NODE_OTHER_BYTES_MIN = 512 * MIB
"""Memory of a node's process besides its arena. Measured: 66 MiB when idle, 300 MiB with the packages of attention loaded."""

PAGE_BYTES_MAX = 256 * MIB
"""The size of one page. Llama-3-70B with 128-token blocks in bf16 has 40 MiB."""

MESSAGE_BYTES_MAX = 4 * MIB
"""A gRPC message. This is gRPC's own default, so that proxies need no special setting."""
FRAME_BYTES_MAX = MIB
"""An HTTP/2 frame that a peer may send. With gRPC's default of 16 KiB a page of SmolLM2 arrives as 23 frames, each parsed alone."""

CHUNK_BYTES_MAX = 1 * MIB
"""Payload of one ReadChunk or WriteChunk."""

CHUNK_HEADER_BYTES_MAX = 4 * KIB

REFUSAL_CHARS_MAX = 512
"""The text of a refusal over gRPC: it may quote a long request, and a header that is too long never arrives."""

HASHES_MAX = 100_000
"""Hashes in one Match, Read or Delete; 1.6 million tokens at 16 tokens a block."""

LEASE_MS_MAX = 600_000
LEASES_MAX = 65_536
"""Live leases on one node."""

WORK_PAGES_MAX = 512
"""Pages that a node evicts or deletes before other callers get a turn: a few milliseconds of work."""
MATCH_PAGES_MAX = 4_096
"""Pages that a node matches, pins or unpins before other callers get a turn. Each takes far less time than an eviction, and few
prompts have more.
"""

LEASED_PAGES_MAX = 4_194_304
"""Pages of all leases of one node together; a page counts once per lease entry."""

VISIBLE_PAGES_MAX = 8_192
"""New pages that Python's garbage collector sees before they are hidden from it: collecting them takes 5 ms."""
VISIBLE_LEASED_PAGES_MAX = 8 * VISIBLE_PAGES_MAX
"""New entries of leases that it sees, at the same cost: an entry is a reference, a page is two objects."""
UNSEEN_OBJECTS_MAX = 1_000_000
"""Estimated garbage among the hidden objects that makes a node collect garbage over all of its pages."""
_OBJECT_BYTES = 256

NAMESPACES_MAX = 4_096
NAMESPACE_EMPTY_MS_MAX = 600_000
"""A namespace without pages is forgotten after this long, or sooner if its place is needed; a client registers it again."""
STREAMS_MAX = 256
"""Read and Write calls running at once on one node. Like every limit below that callers share, it is divided fairly among the
node's tenants (`attnstore.core.fair_share`); a call beyond a tenant's share is refused as `overloaded`.
"""
WATCHERS_MAX = 128
"""Watch calls running at once on one node. They last, so they are counted apart from Read and Write."""
ATTEND_CALLS_MAX = 64
"""Attend calls over gRPC running at once on one node; each may keep a thread waiting for the node's cores."""

WATCH_EVENTS_MAX = 65_536
"""Events queued for one slow watcher; further ones are dropped and reported as LAGGED."""

WATCHED_EVENTS_MAX = 4 * WATCH_EVENTS_MAX
"""Events queued for all watchers of one node together."""

EXTENT_BYTES_MAX = 64 * MIB
"""The default maximum size of an extent, the unit in which the arena is given to (tenant, page size) classes."""

EXTENT_BYTES_MIN = 4 * MIB
EXTENTS_MIN = 8
"""An arena with room for this many extents of EXTENT_BYTES_MIN has at least as many, so that several classes can share it."""

DEADLINE_MS_DEFAULT = 10_000
DEADLINE_MS_MAX = 86_400_000
PEER_BYTES_PER_S_MIN = 8 * KIB
"""The least that a peer must move, on average over `--stall-ms`, while a node waits for it during a transfer: a fifteenth of a link
of 1 Mb/s. A silence of `--stall-ms` always ends the call.
"""
MESSAGE_OVERHEAD_BYTES = 128
"""What a gRPC message counts in addition to its bytes: the headers of TCP/IP, HTTP/2 and gRPC. A read of missing pages consists of
little else.
"""
GRPC_CONNECTIONS_MAX = 4_096
"""Connections to the gRPC port of one node; fewer if the process may not open so many file descriptors."""
GRPC_CONNECTIONS_MIN = 128
GRPC_CALLS_MAX = 1_024
"""Calls at once on one connection; further calls of the client wait."""
GRPC_IDLE_MS_MAX = 300_000
"""A gRPC connection without a call for this long is closed; a client opens another with its next call."""
OPEN_STREAMS_MAX = 64
"""Streams of the services that require no token, health and reflection; the oldest is closed for the next."""
OPEN_WRITE_MS_MAX = 1_000
KEEPALIVE_MS = 15_000
"""Both sides ping a silent peer this often, so that a vanished one does not hold a stream and nobody waits for it."""
KEEPALIVE_TIMEOUT_MS = 10_000
CONNECT_MS_MAX = 5_000
"""One attempt to connect, TLS handshake included."""
DRAIN_MS_DEFAULT = 10_000
STOP_MS_MAX = 3_000
"""A node ends within this time after draining, whatever still runs."""

assert CHUNK_BYTES_MAX + CHUNK_HEADER_BYTES_MAX <= MESSAGE_BYTES_MAX
assert HASHES_MAX * HASH_BYTES + CHUNK_HEADER_BYTES_MAX <= MESSAGE_BYTES_MAX
assert CHUNK_BYTES_MAX <= EXTENT_BYTES_MIN <= EXTENT_BYTES_MAX <= PAGE_BYTES_MAX <= CAPACITY_BYTES_MAX
assert 0 < KEEPALIVE_TIMEOUT_MS < KEEPALIVE_MS
assert HASHES_MAX <= LEASED_PAGES_MAX
assert WORK_PAGES_MAX <= MATCH_PAGES_MAX <= HASHES_MAX
assert WORK_PAGES_MAX <= VISIBLE_PAGES_MAX
assert UNSEEN_OBJECTS_MAX * _OBJECT_BYTES <= NODE_OTHER_BYTES_MIN
assert LEASE_MS_MAX < 1 << 32

CHANNEL_TOKEN_BYTES = 32
CHANNEL_TOKEN_MS_MAX = 10_000
"""The validity of a one-time token of a bulk transport."""
CHANNEL_TOKENS_MAX = 1_024
"""Issued, unused tokens."""
CHANNEL_CONNECTIONS_MAX = 128
"""Page channels on one node whose peers have shown a token, and as many shared memory connections; each has a thread."""
CHANNEL_UNAUTHENTICATED_MAX = 32
"""Connections to one listener whose peers have not authenticated yet; the oldest is closed for the next."""
CHANNEL_BACKLOG_MAX = 1_024
"""Connections that the kernel holds for one listener until they are accepted."""
CHANNEL_READ_HASHES_MAX = 4_096
"""Hashes in one READ frame; longer reads are sent as several."""
CHANNEL_MATCH_HASHES_MAX = 16_384
"""Hashes, and prefixes, of one MATCH frame; longer matches go over gRPC. A prompt of 262,144 tokens in blocks of 16."""
CHANNEL_SECOND_READ_HASHES_MAX = 512
"""Hashes in a READ that is sent while another is being answered. Such a frame always fits the kernel's buffers."""
CHANNELS_MAX = 16
"""Page channels that one transfer of a client uses at once."""
CHANNEL_CREDITS = 64
"""Pages that a writer may have in flight without a verdict. Their verdicts fit any socket buffer."""
CHANNEL_GATHER_PAGES = 64
"""Pages whose slices of one layer are sent in one frame, and in one system call (which takes at most 1,024 buffers)."""
CHANNEL_REASON_BYTES_MAX = 4 * KIB
CHANNEL_HELLO_MS_MAX = 5_000
"""A page channel that has not sent HELLO by then is closed, because it holds a thread."""
CHANNEL_IDLE_MS_MAX = 300_000
"""A page channel without a request for this long is closed."""

CHANNEL_LAYER_PINS_MS_MAX = 10_000
"""A read by layers keeps all of its pages pinned for this long; after that only the pages of the frame being sent."""

SHM_LOCATE_HASHES_MAX = 256
"""Pages in one LOCATE. Two requests and their answers fit the kernel's buffers of a Unix socket."""
SHM_TAKE_PAGES_MAX = 64
"""Pages in one TAKE; a few requests and their answers fit the same buffers."""
SHM_LENT_BYTES_MAX = 2 * PAGE_BYTES_MAX
"""Memory that a writer lends a node over one connection: one page that the writer fills and one that the node copies."""
SHM_LENT_NODE_BYTES_MAX = 4 * SHM_LENT_BYTES_MAX
"""Memory lent to one node over all connections together; most lend 8 MiB. Mapping it allocates its holes."""

assert CHANNEL_SECOND_READ_HASHES_MAX <= CHANNEL_READ_HASHES_MAX <= CHANNEL_MATCH_HASHES_MAX <= HASHES_MAX
assert CHANNELS_MAX <= CHANNEL_CONNECTIONS_MAX
assert CHANNEL_CONNECTIONS_MAX + CHANNEL_UNAUTHENTICATED_MAX <= CHANNEL_BACKLOG_MAX

DESCRIPTORS_OTHER_MAX = 128
"""File descriptors of a node besides its arena and its peers: event loop, log, directory, clients of other nodes."""
DESCRIPTORS_BESIDE_ARENA_MIN = (
    DESCRIPTORS_OTHER_MAX + GRPC_CONNECTIONS_MIN + 3 * (CHANNEL_UNAUTHENTICATED_MAX + 2) + (1 + 2) * CHANNEL_CONNECTIONS_MAX
)
"""Three listeners (page channel, shared memory, metrics); a shared memory connection may pass a descriptor besides its own."""

assert 2 * STREAMS_MAX <= GRPC_CALLS_MAX, "one client can use all streams over one connection"
assert CHANNEL_CONNECTIONS_MAX <= GRPC_CONNECTIONS_MIN, "every page channel needs a gRPC connection first"

SECRET_CHARS_MAX = 4 * KIB
"""A token or a salt. A token is sent in a header of each call, besides others, and gRPC refuses headers of 8 KiB."""
TENANT_CHARS_MAX = 1_024
SETTINGS_CHARS_MAX = 4 * MIB
"""A file of options, tokens or a model's configuration. The user may name a device that never ends."""
PROMPT_CHARS_MAX = 64 * MIB
"""A prompt in a file, and a file of decisions: some 16 million tokens."""
THREADS_MAX = 1_024
"""Threads of one computation."""
SEQUENCES_MAX = 65_536
"""Options: sequences that a worker runs at once, or prefetches for."""
WAITING_MAX = 16 * SEQUENCES_MAX
"""Options: sequences that wait in a worker."""
CONTEXT_TOKENS_MAX = 100_000_000
"""Options: tokens of one sequence; a model's own context is shorter."""
HOT_USES_MAX = 1_000_000
BLOCK_TOKENS_MAX = 1_024
"""Options of the calculator: tokens in a block, and GPUs of a model."""
GPUS_MAX = 1_024
DECISIONS_SHOWN_MAX = 1_000_000
MEMORY_GB_PER_S_MAX = 1e6

assert HASHES_MAX <= CONTEXT_TOKENS_MAX

HTTP_BODY_BYTES_MAX = 4 * MIB
"""A request of a worker's HTTP endpoint."""
HTTP_BODY_BRACKETS_MAX = 131_072
"""Lists and objects in such a request, including brackets in its strings: reporting the errors of a million takes seconds."""
CACHE_SALT_CHARACTERS_MAX = 256
"""A request's `cache_salt`, which is hashed with each of its blocks; 43 characters hold 256 random bits."""
HTTP_IDLE_MS_MAX = 5_000
"""A connection to that endpoint without a request for this long is closed."""
HTTP_HEAD_MS_MAX = 10_000
"""From the connection, or the previous answer, to the end of a request's head."""
HTTP_BODY_MS_MAX = 30_000
"""From the end of a request's head to the end of its body."""
HTTP_STALL_MS_MAX = 30_000
"""A client that reads nothing of its answer for this long loses its connection."""

assert HTTP_BODY_BRACKETS_MAX < HTTP_BODY_BYTES_MAX
assert HTTP_IDLE_MS_MAX <= HTTP_HEAD_MS_MAX <= HTTP_BODY_MS_MAX
assert HASHES_MAX * 4 <= HTTP_BODY_BYTES_MAX, "a prompt as long as one look-up fits, at four characters a token id"

NODES_MAX = 1_024
"""Nodes of one cluster."""
NODE_ID_CHARS_MAX = 128
REPLICAS_MAX = 8
NODE_WEIGHT_MAX = 65_536.0
"""The default weight of a node is its capacity in GiB."""
HEARTBEAT_MS = 1_000
"""The period of the nodes' heartbeats, and of the clients' requests for changes of the membership."""
MEMBER_MS_MAX = 4 * HEARTBEAT_MS
"""A node without a heartbeat for this long is no longer a member."""
DIRECTORY_GAP_MS = 2 * HEARTBEAT_MS
"""A directory that received no heartbeat of any node for this long was away itself: that time counts against no node."""
INTENT_MS_MAX = 3_600_000
"""An operator's intent for a node is kept for this long after the node's last heartbeat."""
NODE_ANSWER_MS_MAX = 1_000
"""A node of a cluster that does not answer a match, a renewal or a release within this time counts as having no page, so that there
is time to ask others.
"""
NODE_FAIR_MS = 500
"""A node that does not answer within a shorter deadline than this does not count as failed."""
NODE_FAIR_BYTES_PER_MS = 10_000
"""The bytes of a call extend that time at this rate, 80 Mb/s: a slower node is no better than one that does not answer."""
HEDGES_PERCENT_MAX = 5
"""Share of the reads of a cluster's client that it may also send to a second node because the first is late."""
HEDGES_BURST_MAX = 10
"""Such reads in a row, after many that were not late."""
DIRECTORY_MS_MAX = 1_000
"""One call to the directory. After it, the last view stays in force."""
NODE_URL_CHARS_MAX = 512
RECORD_BYTES_MAX = 16 * KIB
"""One record in the directory; longer ones are skipped unread. Each character of a name may be escaped as twelve characters."""
QUOTA_BYTES_MAX = NODES_MAX * CAPACITY_BYTES_MAX
"""The quota of one tenant on all nodes."""
RECORD_SIGNED_MS_MAX = 3_600_000
"""A signed record of a node is believed for this long, which bounds how long a replayed record can redirect clients to an old
address.
"""
RECORD_AGAIN_MS = 900_000
"""Nodes sign their records again this often. Each time all readers receive the change."""
CLOCKS_APART_MS_MAX = 300_000
"""The maximum difference of the clocks of two machines in a cluster with a key."""
CREDENTIAL_MS_MAX = 600_000
"""The validity of the credential with which a node acts as a tenant at another node."""
CREDENTIAL_BYTES_MAX = 2_048
CHALLENGE_BYTES = 32
TASK_AGAIN_MS_MIN = 100
TASK_AGAIN_MS_MAX = 1_000
"""Failed background work is retried after a pause between these two."""
PREVIOUS_OWNERS_MS_MAX = 600_000
"""After a change of the membership, segments are also looked up at their previous owners for this long."""
PREVIOUS_OWNERS_MAX = 3
"""Previous placements that are looked at."""
TOMBSTONES_MAX = 262_144
"""Deleted pages that one node remembers, so that no node hands them over again; about 100 bytes each, plus the hash."""
TOMBSTONE_MS_MAX = 600_000
"""A node remembers a deletion for this long, and the directory keeps it for nodes that were away."""
TOMBSTONE_MARGIN_MS = DEADLINE_MS_DEFAULT
"""A handed-over page counts as written after its deletion only if it is younger by this much, because its transfer takes time."""
PAGE_AGE_MS_MAX = 1 << 40
"""The maximum age of a handed-over page: 34 years."""
DELETIONS_MAX = 1_024
"""Deletions that the directory keeps, of at most DELETION_HASHES_MAX pages each."""
DELETION_HASHES_MAX = 192
DELETIONS_IN_BEAT_MAX = 64
"""Deletions that a node publishes with one heartbeat; it reads up to four times as many."""
HEAT_WINDOW_MS = 10_000
"""Uses of a segment are counted for this long; a segment with enough uses in this window is hot."""
HEAT_SEGMENTS_MAX = 65_536
"""Segments whose uses a node counts at a time; further ones are ignored until the next window."""
HOT_SEGMENTS_MAX = 64
"""Hot segments that one node announces: 1.5 KiB in its record."""
HOT_USES_DEFAULT = 50
HOT_REPLICAS = 2
"""Copies of a hot segment."""
LAYOUT_MS_MAX = 86_400_000
DIRECTORY_LAYOUTS_MAX = 4_096
TENANTS_MAX = 4_096
EVENT_BATCHES_MAX = 256
"""Batches that the directory's stream of page events keeps, of at most EVENTS_IN_BATCH_MAX events each."""
EVENTS_IN_BATCH_MAX = 1_024

assert 2 * HEARTBEAT_MS < MEMBER_MS_MAX, "one lost heartbeat removes nobody"
assert HEARTBEAT_MS < DIRECTORY_GAP_MS < MEMBER_MS_MAX < INTENT_MS_MAX
assert DIRECTORY_MS_MAX <= HEARTBEAT_MS
assert 0 < NODE_FAIR_MS < NODE_ANSWER_MS_MAX, "a node that does not answer had enough time"
assert RECORD_AGAIN_MS + CLOCKS_APART_MS_MAX < RECORD_SIGNED_MS_MAX, "a record is signed again before it expires"
assert TASK_AGAIN_MS_MIN < TASK_AGAIN_MS_MAX <= HEARTBEAT_MS, "a failed heartbeat is retried before its node is overdue"
assert 12 * (NODE_ID_CHARS_MAX + NODE_URL_CHARS_MAX) + HOT_SEGMENTS_MAX * (2 * SEGMENT_KEY_BYTES + 4) + KIB <= RECORD_BYTES_MAX
assert 0 < HEDGES_PERCENT_MAX < 100 <= 100 * HEDGES_BURST_MAX
assert PREVIOUS_OWNERS_MS_MAX <= TOMBSTONE_MS_MAX, "a tombstone outlives the look-ups at previous owners"
assert HASHES_MAX <= TOMBSTONES_MAX
assert TOMBSTONE_MARGIN_MS < TOMBSTONE_MS_MAX < PAGE_AGE_MS_MAX
assert CAPACITY_BYTES_MAX <= NODE_WEIGHT_MAX * GIB
assert HASHES_MAX < DELETIONS_MAX * DELETION_HASHES_MAX
assert 2 * HASH_BYTES * (DELETION_HASHES_MAX + 1) + 2 * KIB <= RECORD_BYTES_MAX
assert HEARTBEAT_MS < HEAT_WINDOW_MS, "hot segments are announced several times per window"
assert HOT_REPLICAS <= REPLICAS_MAX

REPORTED_HASHES_MAX = 256
"""Pages in one Verify."""
REPORT_MS_MAX = 1_000
"""How long a reader waits for the node to check reported pages."""
REPORTED_BYTES_PER_S_MAX = 256 * MIB
"""Reported pages are hashed at this rate: a few percent of a core, however many are reported."""
SCRUB_BYTES_PER_S_DEFAULT = 32 * MIB
SCRUB_BYTES_PER_S_MAX = GIB

assert REPORTED_HASHES_MAX <= HASHES_MAX
assert PAGE_BYTES_MAX <= REPORTED_BYTES_PER_S_MAX, "the largest page delays the others by a second at most"
assert SCRUB_BYTES_PER_S_DEFAULT <= SCRUB_BYTES_PER_S_MAX

ATTEND_SETS_MAX = 256
"""Sets of pages that one attend stream may have open, and name in one query: the sequences of one worker's batch."""
ATTEND_HASHES_MAX = 65_536
"""Pages in one set; a million tokens at 16 tokens a block."""
ATTEND_PAGES_MAX = 1_048_576
"""Pages in all open sets on one node together; each costs some 300 bytes besides the page."""
ATTEND_ROWS_MAX = 1_024
"""Query rows in one query, of all its sets together."""
ATTEND_BYTES_MAX = 2 * MIB
"""The rows of one query, and each of the two halves of its answer."""
ATTEND_FRAME_BYTES_MAX = ATTEND_BYTES_MAX + 8 * KIB
"""A frame with rows, or hashes, and their description: 8 bytes for each set, 4 for each row."""
ATTEND_HEADS_MAX = 1_024
LATENT_DIM_STEP = 32
"""The elements of a latent row that is attended to, and those of its value, are multiples of it: of DeepSeek's, 576 and 512."""
LATENT_DIM_MAX = 4_096
"""Elements of such a row. A node's scratch memory for a query grows with it."""
ATTEND_WAITING_MAX = 256
"""Queries that wait for a node's cores; further ones are refused as `overloaded`."""
ATTEND_TOGETHER_MAX = 32
"""Queries that a node answers in one computation."""
ATTEND_VERIFIED_MS_MAX = 60_000
ATTEND_SPIN_MS = 1.0
"""How long a wait of an attend stream looks for the next frame before it sleeps, on both sides."""
"""When a set is opened, pages that were not hashed for this long are hashed."""

assert LATENT_DIM_MAX % LATENT_DIM_STEP == 0
assert ATTEND_HASHES_MAX <= HASHES_MAX
assert ATTEND_HASHES_MAX <= ATTEND_PAGES_MAX <= LEASED_PAGES_MAX, "the pages of a set are leased"
assert ATTEND_BYTES_MAX + CHUNK_HEADER_BYTES_MAX <= MESSAGE_BYTES_MAX
assert ATTEND_HASHES_MAX * HASH_BYTES <= ATTEND_BYTES_MAX
assert ATTEND_SETS_MAX * 8 + ATTEND_ROWS_MAX * 4 <= ATTEND_FRAME_BYTES_MAX - ATTEND_BYTES_MAX
