"""The Lua scripts that run inside Redis or Valkey, and their keys.

Owns: every key of the directory. Invariant: nothing accumulates. All data expires by the server's own clock, so the clocks of nodes
and workers do not matter; every collection is bounded; every script runs in time proportional to the number of nodes.

In a cluster with a key, records of `nodes`, `intents` and `quotas` are signed (see `attnstore.directory.trust`).

All keys of a cluster NAME contain the hash tag `{attnstore:NAME}`, so that they are in one slot of a Redis Cluster.

| key        | type       | content                                                 | lives                                      |
|------------|------------|---------------------------------------------------------|--------------------------------------------|
| `nodes`    | hash       | node id -> record of the node, JSON                     | field: until its heartbeat is overdue      |
| `alive`    | sorted set | node id, scored with when its heartbeat is overdue (ms) | as above                                   |
| `intents`  | hash       | node id -> `drain` or `evict`                           | field: an hour after the node's heartbeats |
| `intended` | sorted set | node id, scored with when its intent is forgotten (ms)  | as above                                   |
| `quotas`   | hash       | tenant -> bytes over all nodes                          | until lifted; at most TENANTS_MAX          |
| `revision` | hash       | `incarnation` (random), `number` (counts changes), ...  | as `nodes`                                 |
| `changes`  | sorted set | node id, scored with its last change's `number`         | at most CHANGES_MAX                        |
| `layouts`  | sorted set | record of a namespace, JSON, scored with when it is old | a day; at most DIRECTORY_LAYOUTS_MAX       |
| `events`   | stream     | page events, a batch of one node in each entry          | at most EVENT_BATCHES_MAX entries          |
| `deletions`| stream     | pages that were deleted, JSON, for nodes that are away  | TOMBSTONE_MS_MAX; at most DELETIONS_MAX    |

The last three keys and `quotas` have lifetimes of their own; all other keys expire an hour after the last heartbeat of any node.
`events` expires an hour after the last batch.

A reader that knows a revision receives only the changes since: with a thousand nodes, each of which may announce other hot segments
every second, the full state would be megabytes per second for each client. Other fields of `revision` serve this: `counted` is the
last `number` that these scripts set (if `number` differs, someone else has changed the data, and the full state is returned),
`since` is the number up to which `changes` is incomplete, and `intents` and `quotas` are the numbers of their last changes.

A directory that lost its data (a restart without persistence, a fail-over to an empty replica) has a new incarnation. Readers then
wait until every node had time for a heartbeat before they consider a missing node as removed. A directory that was only away
(paused, cut off) has received no heartbeat for DIRECTORY_GAP_MS (`beat_ms` in `revision` is the time of the last one). Until the
first new heartbeat no node is overdue; from then on every node has the time that it had left before.

The scripts are sent with EVAL: at one call per second for each node and worker, a kilobyte of text costs less than tracking which
server has which script after a fail-over.
"""

from __future__ import annotations

from typing import Final

from attnstore.limits import DIRECTORY_GAP_MS, INTENT_MS_MAX, NODES_MAX

MEMBERSHIP_KEYS: Final = ("nodes", "alive", "intents", "quotas", "revision", "changes", "intended")
KEYS: Final = (*MEMBERSHIP_KEYS, "layouts", "events", "deletions")

KEEP_MS: Final = 3_600_000
"""The data of a cluster without heartbeats is deleted after this long."""
CHANGES_MAX: Final = 2 * NODES_MAX
"""Nodes whose last change is known, including removed nodes."""

assert INTENT_MS_MAX <= KEEP_MS

_NOW: Final = """
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
"""

_JUDGED: Final = f"""
local beat_ms = tonumber(redis.call('HGET', KEYS[5], 'beat_ms')) or now_ms
local was_away = now_ms - beat_ms > {DIRECTORY_GAP_MS}
local judged_ms = was_away and beat_ms or now_ms
"""

_CHANGED: Final = """
local function counted()
  local before = redis.call('HGET', KEYS[5], 'number') or '0'
  if before ~= (redis.call('HGET', KEYS[5], 'counted') or '0') then redis.call('HSET', KEYS[5], 'since', before) end
  local number = redis.call('HINCRBY', KEYS[5], 'number', 1)
  redis.call('HSET', KEYS[5], 'counted', number)
  return number
end
local function changed(node_id) redis.call('ZADD', KEYS[6], counted(), node_id) end
"""

_PURGE: Final = f"""
if redis.call('HSETNX', KEYS[5], 'incarnation', ARGV[3]) == 1 then
  redis.call('HSETNX', KEYS[5], 'number', 0)
  redis.call('PEXPIRE', KEYS[5], {KEEP_MS})
end
if was_away then
  local late = redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. beat_ms, now_ms, 'LIMIT', 0, {NODES_MAX})
  for _, node_id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. beat_ms, '+inf', 'LIMIT', 0, {NODES_MAX})) do
    redis.call('ZINCRBY', KEYS[2], now_ms - beat_ms, node_id)
  end
  for _, node_id in ipairs(late) do changed(node_id) end -- some may have been told that it is gone
end
redis.call('HSET', KEYS[5], 'beat_ms', now_ms)
judged_ms = now_ms
for _, node_id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now_ms, 'LIMIT', 0, {NODES_MAX})) do
  redis.call('ZREM', KEYS[2], node_id)
  redis.call('HDEL', KEYS[1], node_id)
  changed(node_id)
end
for _, node_id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[7], '-inf', now_ms, 'LIMIT', 0, {NODES_MAX})) do
  redis.call('ZREM', KEYS[7], node_id)
  if redis.call('HDEL', KEYS[3], node_id) == 1 then redis.call('HSET', KEYS[5], 'intents', counted()) end
end
local surplus = redis.call('ZCARD', KEYS[6]) - {CHANGES_MAX}
if surplus > 0 then
  local last = redis.call('ZRANGE', KEYS[6], surplus - 1, surplus - 1, 'WITHSCORES')
  redis.call('HSET', KEYS[5], 'since', last[2])
  redis.call('ZREMRANGEBYRANK', KEYS[6], 0, surplus - 1)
end
"""

_ANSWER: Final = f"""
local incarnation = redis.call('HGET', KEYS[5], 'incarnation') or ''
local number = redis.call('HGET', KEYS[5], 'number') or '0'
local overdue = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', judged_ms, 'LIMIT', 0, {NODES_MAX})
if incarnation == ARGV[1] and number == ARGV[2] and #overdue == 0 then return {{}} end
local known = incarnation == ARGV[1] and tonumber(ARGV[2]) or -1
local is_all = known < (tonumber(redis.call('HGET', KEYS[5], 'since')) or 0) or known > tonumber(number)
  or (redis.call('HGET', KEYS[5], 'counted') or '0') ~= number
local records, gone = {{}}, overdue
local function tell(node_id)
  local record = redis.call('HGET', KEYS[1], node_id)
  if record then
    records[#records + 1] = node_id
    records[#records + 1] = record
  end
  return record
end
if is_all then
  local alive = redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. judged_ms, '+inf', 'LIMIT', 0, {NODES_MAX})
  for _, node_id in ipairs(alive) do tell(node_id) end
else
  for _, node_id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[6], '(' .. known, '+inf')) do
    if not tell(node_id) then gone[#gone + 1] = node_id end
  end
end
local function told(key, field)
  local is_news = is_all or (tonumber(redis.call('HGET', KEYS[5], field)) or 0) > known
  return is_news and redis.call('HGETALL', key)
end
return {{incarnation, number, is_all and 1 or 0, records, gone, told(KEYS[3], 'intents'), told(KEYS[4], 'quotas')}}
"""

MEMBERSHIP: Final = _NOW + _JUDGED + _ANSWER
"""Returns the membership, without nodes whose heartbeat is overdue. Changes nothing, so that a read-only user can run it.

KEYS: MEMBERSHIP_KEYS. ARGV: incarnation and number of the revision that the caller knows. The answer is empty if that revision is
current and no heartbeat is overdue. Otherwise it is: incarnation, number, 1 for the full state or 0 for the changes, names and
records, names of removed nodes, intents, quotas (nothing if unchanged). A directory that was never written to has the incarnation
''.
"""

ANNOUNCE: Final = (
    _NOW
    + _JUDGED
    + _CHANGED
    + _PURGE
    + f"""
if redis.call('HEXISTS', KEYS[1], ARGV[4]) == 0 and redis.call('HLEN', KEYS[1]) >= {NODES_MAX} then
  return redis.error_reply('CLUSTERFULL no more nodes fit this cluster')
end
if redis.call('HGET', KEYS[1], ARGV[4]) ~= ARGV[5] then
  redis.call('HSET', KEYS[1], ARGV[4], ARGV[5])
  changed(ARGV[4])
end
redis.call('ZADD', KEYS[2], now_ms + tonumber(ARGV[6]), ARGV[4])
if redis.call('HEXISTS', KEYS[3], ARGV[4]) == 1 then redis.call('ZADD', KEYS[7], now_ms + {INTENT_MS_MAX}, ARGV[4]) end
for _, index in ipairs({{1, 2, 3, 5, 6, 7}}) do redis.call('PEXPIRE', KEYS[index], ARGV[7]) end
"""
    + _ANSWER
)
"""Sends a heartbeat. KEYS and ARGV[1..2] as in MEMBERSHIP.

ARGV[3] an incarnation for a directory that has none, [4] node id, [5] its record, [6] milliseconds until the next heartbeat is
overdue, [7] milliseconds to keep all keys.
"""

WITHDRAW: Final = (
    _CHANGED
    + """
if redis.call('HDEL', KEYS[1], ARGV[1]) == 1 then changed(ARGV[1]) end
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('ZREM', KEYS[7], ARGV[1])
if redis.call('HDEL', KEYS[3], ARGV[1]) == 1 then redis.call('HSET', KEYS[5], 'intents', counted()) end
return 1
"""
)
"""Removes a node that leaves. KEYS as in MEMBERSHIP. ARGV[1] node id."""

SET_INTENT: Final = (
    _NOW
    + _CHANGED
    + f"""
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 and redis.call('HEXISTS', KEYS[3], ARGV[1]) == 0 then return 0 end
if ARGV[2] == '' then
  redis.call('HDEL', KEYS[3], ARGV[1])
  redis.call('ZREM', KEYS[7], ARGV[1])
else
  redis.call('HSET', KEYS[3], ARGV[1], ARGV[2])
  redis.call('ZADD', KEYS[7], now_ms + {INTENT_MS_MAX}, ARGV[1])
end
for _, index in ipairs({{3, 5, 6, 7}}) do redis.call('PEXPIRE', KEYS[index], ARGV[3]) end
redis.call('HSET', KEYS[5], 'intents', counted())
return 1
"""
)
"""Sets an operator's intent for a node. KEYS as in MEMBERSHIP. ARGV[1] node id, [2] the intent or empty, [3] milliseconds to keep
it.
"""

SET_QUOTA: Final = (
    _CHANGED
    + """
if ARGV[2] == '' then
  redis.call('HDEL', KEYS[4], ARGV[1])
elseif redis.call('HEXISTS', KEYS[4], ARGV[1]) == 0 and redis.call('HLEN', KEYS[4]) >= tonumber(ARGV[3]) then
  return redis.error_reply('TENANTSFULL no more quotas fit this cluster')
else
  redis.call('HSET', KEYS[4], ARGV[1], ARGV[2])
end
if redis.call('EXISTS', KEYS[5]) == 1 then redis.call('HSET', KEYS[5], 'quotas', counted()) end
return 1
"""
)
"""Sets a tenant's quota. KEYS as in MEMBERSHIP. ARGV[1] tenant, [2] bytes or empty for none, [3] the maximum number of tenants."""

PUT_LAYOUTS: Final = (
    _NOW
    + """
for index = 3, #ARGV do redis.call('ZADD', KEYS[1], now_ms + tonumber(ARGV[1]), ARGV[index]) end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now_ms)
redis.call('ZREMRANGEBYRANK', KEYS[1], 0, -1 - tonumber(ARGV[2]))
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return 1
"""
)
"""Publishes layouts in use. KEYS[1] layouts. ARGV[1] milliseconds until they expire, [2] their maximum number, [3...] records."""

LAYOUTS: Final = (
    _NOW
    + """
return redis.call('ZRANGEBYSCORE', KEYS[1], now_ms, '+inf')
"""
)
"""Returns the layouts that have not expired. KEYS[1] layouts."""

PUBLISH: Final = """
redis.call('XADD', KEYS[1], 'MAXLEN', ARGV[1], '*', 'node', ARGV[3], 'packed', ARGV[4], 'dropped', ARGV[5])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
"""
"""Appends a batch of events. KEYS[1] events. ARGV[1] maximum of batches, [2] milliseconds to keep, [3] node id, [4] events, [5]
dropped.
"""

PUBLISH_DELETIONS: Final = (
    _NOW
    + """
for index = 4, #ARGV do
  redis.call('XADD', KEYS[1], 'MAXLEN', ARGV[1], '*', 'node', ARGV[3], 'deletion', ARGV[index])
end
redis.call('XTRIM', KEYS[1], 'MINID', now_ms - tonumber(ARGV[2]))
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
"""
)
"""Appends deletions. KEYS[1] deletions. ARGV[1] their maximum number, [2] milliseconds to keep, [3] node id, [4...] records."""

DELETIONS: Final = (
    _NOW
    + """
return {now_ms, redis.call('XRANGE', KEYS[1], ARGV[1], '+', 'COUNT', ARGV[2])}
"""
)
"""Returns the deletions from a position on, and the time. KEYS[1] deletions. ARGV[1] position, [2] maximum number."""
