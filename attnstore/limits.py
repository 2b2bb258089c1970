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
"""Of one node: half of what an x86-64 process can address."""

NODE_OTHER_BYTES_MIN = 512 * MIB
"""Room for a node's process beside its arena. Measured: 66 MiB when idle, 300 MiB with the packages of attention loaded."""

PAGE_BYTES_MAX = 256 * MIB
"""One page. Llama-3-70B with 128-token blocks in bf16 is 40 MiB."""

MESSAGE_BYTES_MAX = 4 * MIB
FRAME_BYTES_MAX = MIB
"""HTTP/2 frames that a peer may send: with gRPC's 16 KiB a page comes as 23 of them, each parsed on its own."""
"""gRPC's own default maximum of a received message: we stay under it so that proxies need no special setting."""

CHUNK_BYTES_MAX = 1 * MIB
"""Payload of one ReadChunk or WriteChunk."""

CHUNK_HEADER_BYTES_MAX = 4 * KIB

REFUSAL_CHARS_MAX = 512
"""Of the text of a refusal over gRPC: it may quote a long request, and a header that is too long never arrives."""

HASHES_MAX = 100_000
"""Hashes in one Match, Read or Delete; 1.6 million tokens at 16 tokens a block."""

LEASE_MS_MAX = 600_000
LEASES_MAX = 65_536
"""Live leases on one node."""

WORK_PAGES_MAX = 512
"""Pages that a node evicts or deletes before others get their turn: a few milliseconds of work."""
MATCH_PAGES_MAX = 4_096
"""Pages that it finds, holds or lets go before that. Each takes far less time than one removed, and few prompts have more."""

LEASED_PAGES_MAX = 4_194_304
"""Pages held by all leases of one node together, a page counted once for each time that a lease holds it."""

VISIBLE_PAGES_MAX = 8_192
"""New pages that Python's garbage collector sees before they leave its view: a collection of them takes 5 ms."""
VISIBLE_LEASED_PAGES_MAX = 8 * VISIBLE_PAGES_MAX
"""As many, where leases are new: an entry of a lease is a reference, a page is two objects."""
UNSEEN_OBJECTS_MAX = 1_000_000
"""Garbage that may lie outside that view, by an estimate, until a node looks through all of its pages."""
_OBJECT_BYTES = 256

NAMESPACES_MAX = 4_096
NAMESPACE_EMPTY_MS_MAX = 600_000
"""A namespace without pages is forgotten after this long, or sooner where its place is needed; a client registers it again."""
STREAMS_MAX = 256
"""Read and Write calls running at once on one node. This and every limit below that many callers share is shared fairly among the
node's tenants (`attnstore.core.fair_share`); what is beyond a tenant's share is refused as `overloaded`."""
WATCHERS_MAX = 128
"""Watch calls running at once on one node. They last, so they take no place of a Read or Write."""
ATTEND_CALLS_MAX = 64
"""Attend calls over gRPC running at once on one node; each may keep a thread waiting for the node's cores."""

WATCH_EVENTS_MAX = 65_536
"""Events queued for one slow watcher before they are dropped and it is told so."""

WATCHED_EVENTS_MAX = 4 * WATCH_EVENTS_MAX
"""Events queued for all watchers of one node together."""

EXTENT_BYTES_MAX = 64 * MIB
"""The arena is handed to (tenant, page size) classes in extents of at most this size, unless the operator names another."""

EXTENT_BYTES_MIN = 4 * MIB
EXTENTS_MIN = 8
"""An arena with room for so many extents of EXTENT_BYTES_MIN is cut into no fewer, so that several classes can share it."""

DEADLINE_MS_DEFAULT = 10_000
DEADLINE_MS_MAX = 86_400_000
PEER_BYTES_PER_S_MIN = 8 * KIB
"""The least that a peer must move, on average over `--stall-ms`, while a node waits for it in the middle of a transfer: a fifteenth
of a link of 1 Mb/s. Silence for as long ends the call whatever came before."""
MESSAGE_OVERHEAD_BYTES = 128
"""What a gRPC message counts for beside its bytes: the headers of TCP/IP, HTTP/2 and gRPC. A read of pages that are all missing
consists of little else."""
GRPC_CONNECTIONS_MAX = 4_096
"""Connections to the gRPC port of one node, fewer where the process may not have so many file descriptors."""
GRPC_CONNECTIONS_MIN = 128
GRPC_CALLS_MAX = 1_024
"""Calls at once on one connection; a client's further ones wait."""
GRPC_IDLE_MS_MAX = 300_000
"""A gRPC connection without a call for this long is closed; a client opens another with its next call."""
OPEN_STREAMS_MAX = 64
"""Streams of the services that ask for no token, health and reflection; the oldest gives way to the next."""
OPEN_WRITE_MS_MAX = 1_000
KEEPALIVE_MS = 15_000
"""Both ends ask a silent peer for a sign of life this often, so that a vanished one holds no stream and nobody waits for it."""
KEEPALIVE_TIMEOUT_MS = 10_000
CONNECT_MS_MAX = 5_000
"""One attempt to connect, TLS handshake included."""
DRAIN_MS_DEFAULT = 10_000
STOP_MS_MAX = 3_000
"""A node has ended so long after the time for draining, whatever still runs."""

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
"""A page channel's one-time token is good for this long."""
CHANNEL_TOKENS_MAX = 1_024
"""Tokens given out and not yet used."""
CHANNEL_CONNECTIONS_MAX = 128
"""Page channels on one node whose peers have shown a token, and as many shared memory connections; each has a thread."""
CHANNEL_NEWCOMERS_MAX = 32
"""Connections to one listener whose peers have shown nothing yet; the oldest gives way to the next."""
CHANNEL_BACKLOG_MAX = 1_024
"""Connections that the kernel holds for one listener until they are accepted."""
CHANNEL_READ_HASHES_MAX = 4_096
"""Hashes in one READ frame; longer reads are sent as several. Also hashes, and prefixes, of a MATCH; longer ones go over gRPC."""
CHANNEL_SECOND_READ_HASHES_MAX = 512
"""Hashes in a READ that is sent while another is being answered. Such a frame fits the kernel's buffers, whatever they hold."""
CHANNELS_MAX = 16
"""Page channels that one transfer of a client may use at once."""
CHANNEL_CREDITS = 64
"""Pages that a writer may have on the way without a verdict. Their verdicts fit any socket buffer."""
CHANNEL_GATHER_PAGES = 64
"""Pages whose slices of one layer travel in one frame, and in one system call (whose own limit is 1,024 pieces)."""
CHANNEL_REASON_BYTES_MAX = 4 * KIB
CHANNEL_HELLO_MS_MAX = 5_000
"""A page channel that has not said HELLO by then is closed: it holds a thread."""
CHANNEL_IDLE_MS_MAX = 300_000
"""A page channel on which nothing is asked for this long is closed."""

CHANNEL_LAYER_PINS_MS_MAX = 10_000
"""A read by layers keeps all of its pages in place for this long; from then on only those of the frame that is being sent."""

SHM_LOCATE_HASHES_MAX = 256
"""Pages in one question of the shared memory protocol. Two of them and their answers fit the kernel's buffers of a Unix socket."""
SHM_TAKE_PAGES_MAX = 64
"""Pages in one request of a writer; a few of them, and their answers, fit the same buffers."""
SHM_LENT_BYTES_MAX = 2 * PAGE_BYTES_MAX
"""Memory that a writer lends a node over one connection: room for one page to be copied by each side at a time."""
SHM_LENT_NODE_BYTES_MAX = 4 * SHM_LENT_BYTES_MAX
"""Memory lent to one node over all connections together; most lend 8 MiB. Holes in it are filled when the node maps it."""

assert CHANNEL_SECOND_READ_HASHES_MAX <= CHANNEL_READ_HASHES_MAX <= HASHES_MAX
assert CHANNELS_MAX <= CHANNEL_CONNECTIONS_MAX
assert CHANNEL_CONNECTIONS_MAX + CHANNEL_NEWCOMERS_MAX <= CHANNEL_BACKLOG_MAX

DESCRIPTORS_OTHER_MAX = 128
"""File descriptors of a node beside its arena and its peers: event loop, log, directory, clients of other nodes."""
DESCRIPTORS_BESIDE_ARENA_MIN = (
    DESCRIPTORS_OTHER_MAX + GRPC_CONNECTIONS_MIN + 3 * (CHANNEL_NEWCOMERS_MAX + 2) + (1 + 2) * CHANNEL_CONNECTIONS_MAX
)
"""Three listeners (page channel, shared memory, metrics); a shared memory connection may pass a descriptor beside its own."""

assert 2 * STREAMS_MAX <= GRPC_CALLS_MAX, "one client may use up its tenant's streams over one connection"
assert CHANNEL_CONNECTIONS_MAX <= GRPC_CONNECTIONS_MIN, "whoever has a page channel came over gRPC"

SECRET_CHARS_MAX = 4 * KIB
"""Of a token or a salt. A token travels in a header of each call, beside others, and gRPC refuses headers of 8 KiB."""
TENANT_CHARS_MAX = 1_024
SETTINGS_CHARS_MAX = 4 * MIB
"""Of a file of options, tokens or a model's configuration. A file is named by a user, who may name a device without an end."""
PROMPT_CHARS_MAX = 64 * MIB
"""Of a prompt in a file, and of a file of decisions: some 16 million tokens."""
THREADS_MAX = 1_024
"""Threads of one computation."""
SEQUENCES_MAX = 65_536
"""Sequences that a worker may be told to run at once, or to fetch ahead for."""
WAITING_MAX = 16 * SEQUENCES_MAX
"""Sequences that a worker may be told to let wait."""
CONTEXT_TOKENS_MAX = 100_000_000
"""Tokens of one sequence, as far as options go; a model's own context is shorter."""
HOT_USES_MAX = 1_000_000
BLOCK_TOKENS_MAX = 1_024
"""Tokens in a block, and GPUs of a model, that the calculator takes."""
GPUS_MAX = 1_024
DECISIONS_SHOWN_MAX = 1_000_000
MEMORY_GB_PER_S_MAX = 1e6

assert HASHES_MAX <= CONTEXT_TOKENS_MAX

HTTP_BODY_BYTES_MAX = 4 * MIB
"""A request of a worker's HTTP endpoint."""
HTTP_BODY_BRACKETS_MAX = 131_072
"""Lists and objects in it, those in its texts included: what is wrong with a million of them takes seconds to find out."""
CACHE_SALT_CHARACTERS_MAX = 256
"""A request's `cache_salt`, which is hashed with each of its blocks; 43 characters hold 256 random bits."""
HTTP_IDLE_MS_MAX = 5_000
"""A connection to that endpoint on which no request has begun for so long is closed."""
HTTP_HEAD_MS_MAX = 10_000
"""From the connection, or the answer before, to the end of a request's head."""
HTTP_BODY_MS_MAX = 30_000
"""From the end of a request's head to the end of its body."""
HTTP_STALL_MS_MAX = 30_000
"""A client that takes nothing of its answer for so long loses its connection."""

assert HTTP_BODY_BRACKETS_MAX < HTTP_BODY_BYTES_MAX
assert HTTP_IDLE_MS_MAX <= HTTP_HEAD_MS_MAX <= HTTP_BODY_MS_MAX
assert HASHES_MAX * 4 <= HTTP_BODY_BYTES_MAX, "a prompt as long as one look-up fits, at four characters a token id"

NODES_MAX = 1_024
"""Nodes of one cluster."""
NODE_ID_CHARS_MAX = 128
REPLICAS_MAX = 8
NODE_WEIGHT_MAX = 65_536.0
"""By default a node weighs its capacity in GiB."""
HEARTBEAT_MS = 1_000
"""Nodes announce themselves this often, and clients look as often whether the membership has changed."""
MEMBER_MS_MAX = 4 * HEARTBEAT_MS
"""A node that has not announced itself for this long is no member any more."""
DIRECTORY_GAP_MS = 2 * HEARTBEAT_MS
"""A directory that took no heartbeat of any node for this long was away itself: that time counts against nobody."""
INTENT_MS_MAX = 3_600_000
"""What an operator wants of a node is kept for this long after the node was last heard of."""
NODE_ANSWER_MS_MAX = 1_000
"""A node of a cluster that does not answer a match, a renewal or a release for this long is taken to have nothing: others may be
asked still.
"""
NODE_FAIR_MS = 500
"""A node that was given less than this to answer, and did not, has not failed: whoever asked it was in a hurry."""
NODE_FAIR_BYTES_PER_MS = 10_000
"""What a call moves adds to the fair time at this rate, 80 Mb/s: a slower node is no better than one that does not answer."""
HEDGES_PERCENT_MAX = 5
"""Of the reads of a cluster's client that it may ask a second node for as well, because the first is late."""
HEDGES_BURST_MAX = 10
"""Such reads that may come in a row, after many that were not late."""
DIRECTORY_MS_MAX = 1_000
"""One call to the directory. A slow directory is as good as none: the last view goes on."""
NODE_URL_CHARS_MAX = 512
RECORD_BYTES_MAX = 16 * KIB
"""Of one record in the directory; longer ones are skipped unread. Names may be written in escapes of twelve characters each."""
QUOTA_BYTES_MAX = NODES_MAX * CAPACITY_BYTES_MAX
"""Of one tenant on all nodes."""
RECORD_SIGNED_MS_MAX = 3_600_000
"""A signed record of a node is believed for this long: as long as an old one that somebody kept could bring an old address back."""
RECORD_AGAIN_MS = 900_000
"""Nodes sign their records anew this often. Each time everybody is told of the change."""
CLOCKS_APART_MS_MAX = 300_000
"""How far the clocks of two machines of a cluster with a key may be apart."""
CREDENTIAL_MS_MAX = 600_000
"""A node may act as a tenant at another one for this long before it says anew who it is."""
CREDENTIAL_BYTES_MAX = 2_048
CHALLENGE_BYTES = 32
TASK_AGAIN_MS_MIN = 100
TASK_AGAIN_MS_MAX = 1_000
"""Background work that has failed is tried again after a pause between these."""
PREVIOUS_OWNERS_MS_MAX = 600_000
"""For this long after a change of the membership a segment is also looked for where it was before."""
PREVIOUS_OWNERS_MAX = 3
"""Earlier placements that are looked at."""
TOMBSTONES_MAX = 262_144
"""Deleted pages that one node remembers, so that nobody hands them over to it; a hundred bytes each, and the hash."""
TOMBSTONE_MS_MAX = 600_000
"""A node remembers for this long that a page was deleted, and the directory tells nodes of it that were away."""
TOMBSTONE_MARGIN_MS = DEADLINE_MS_DEFAULT
"""A page that is handed over was written after its deletion only if it is younger by this much: it was on its way for a while."""
PAGE_AGE_MS_MAX = 1 << 40
"""A page that is handed over counts as no older than 34 years."""
DELETIONS_MAX = 1_024
"""Deletions that the directory keeps, of at most DELETION_HASHES_MAX pages each."""
DELETION_HASHES_MAX = 192
DELETIONS_IN_BEAT_MAX = 64
"""Deletions that a node publishes with one heartbeat; what it learns in one is four times as many."""
HEAT_WINDOW_MS = 10_000
"""Uses of a segment are counted for so long; a segment that is used often enough within it is hot."""
HEAT_SEGMENTS_MAX = 65_536
"""Segments whose uses a node counts at a time; further ones are not seen until the next window."""
HOT_SEGMENTS_MAX = 64
"""Hot segments that one node announces: a kilobyte and a half in its record."""
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
assert 0 < NODE_FAIR_MS < NODE_ANSWER_MS_MAX, "a node that does not answer has had a fair time"
assert RECORD_AGAIN_MS + CLOCKS_APART_MS_MAX < RECORD_SIGNED_MS_MAX, "a record is signed anew before it is too old for anybody"
assert TASK_AGAIN_MS_MIN < TASK_AGAIN_MS_MAX <= HEARTBEAT_MS, "a heartbeat that failed is made again before its node is overdue"
assert 12 * (NODE_ID_CHARS_MAX + NODE_URL_CHARS_MAX) + HOT_SEGMENTS_MAX * (2 * SEGMENT_KEY_BYTES + 4) + KIB <= RECORD_BYTES_MAX
assert 0 < HEDGES_PERCENT_MAX < 100 <= 100 * HEDGES_BURST_MAX
assert PREVIOUS_OWNERS_MS_MAX <= TOMBSTONE_MS_MAX, (
    "a page is not found at an earlier owner after it was forgotten that it is deleted"
)
assert HASHES_MAX <= TOMBSTONES_MAX
assert TOMBSTONE_MARGIN_MS < TOMBSTONE_MS_MAX < PAGE_AGE_MS_MAX
assert CAPACITY_BYTES_MAX <= NODE_WEIGHT_MAX * GIB
assert HASHES_MAX < DELETIONS_MAX * DELETION_HASHES_MAX
assert 2 * HASH_BYTES * (DELETION_HASHES_MAX + 1) + 2 * KIB <= RECORD_BYTES_MAX
assert HEARTBEAT_MS < HEAT_WINDOW_MS, "heat is looked at several times in a window"
assert HOT_REPLICAS <= REPLICAS_MAX

REPORTED_HASHES_MAX = 256
"""Pages in one Verify."""
REPORT_MS_MAX = 1_000
"""A reader waits no longer for the node to look into what it reports."""
REPORTED_BYTES_PER_S_MAX = 256 * MIB
"""Reported pages are hashed at this pace: a few percent of a core, however many are reported."""
SCRUB_BYTES_PER_S_DEFAULT = 32 * MIB
SCRUB_BYTES_PER_S_MAX = GIB

assert REPORTED_HASHES_MAX <= HASHES_MAX
assert PAGE_BYTES_MAX <= REPORTED_BYTES_PER_S_MAX, "the largest page holds the others up for a second at most"
assert SCRUB_BYTES_PER_S_DEFAULT <= SCRUB_BYTES_PER_S_MAX

ATTEND_SETS_MAX = 256
"""Sets of pages that one attend stream may have open, and ask about in one query: the sequences of one worker's batch."""
ATTEND_HASHES_MAX = 65_536
"""Pages in one set; a million tokens at 16 tokens a block."""
ATTEND_PAGES_MAX = 1_048_576
"""Pages in all sets that are open on one node together; each costs some 300 bytes beside the page."""
ATTEND_ROWS_MAX = 1_024
"""Query rows in one query, of all its sets together."""
ATTEND_BYTES_MAX = 2 * MIB
"""The rows of one query, and each of the two halves of its answer."""
ATTEND_FRAME_BYTES_MAX = ATTEND_BYTES_MAX + 4 * KIB
"""Of a frame that carries rows, or hashes, and what names them."""
ATTEND_HEADS_MAX = 1_024
ATTEND_WAITING_MAX = 256
"""Queries that wait for a node's cores; more are refused as `overloaded`."""
ATTEND_TOGETHER_MAX = 32
"""Queries that a node answers in one computation."""
ATTEND_VERIFIED_MS_MAX = 60_000
"""A page of a set that is opened is hashed if it has not been for this long."""

assert ATTEND_HASHES_MAX <= HASHES_MAX
assert ATTEND_HASHES_MAX <= ATTEND_PAGES_MAX <= LEASED_PAGES_MAX, "a set's pages are leased"
assert ATTEND_BYTES_MAX + CHUNK_HEADER_BYTES_MAX <= MESSAGE_BYTES_MAX
assert ATTEND_HASHES_MAX * HASH_BYTES <= ATTEND_BYTES_MAX
assert ATTEND_SETS_MAX * 8 <= ATTEND_FRAME_BYTES_MAX - ATTEND_BYTES_MAX
